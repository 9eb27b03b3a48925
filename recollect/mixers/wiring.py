"""Two mixers in one layer, by name: a long-term memory beside sliding-window attention (as a gate) or before it (as a layer).

The attention branch is precise about the last `window` tokens, the memory branch keeps what it can of everything before. Any
registered mixer can be either. The persistent tokens that Titans puts before the sequence are left out: they are learned constants
and belong to the model, not to the wiring.

Axis legend: B batch, T time, D model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.mixers.base import Mixer, MixerConfig, build, configure, register
from recollect.mixers.blocks import HeadNorm
from recollect.state import State

WIRINGS = ("gate", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WiringConfig(MixerConfig):
    """Which mixers are wired, and how.

    Attributes:
        wiring: "gate" or "layer"; see `Wiring`.
        memory, attention: names of registered mixers.
        window: tokens that the attention branch sees; None: as many as that mixer says.
        memory_options, attention_options: further options of the two, by name.
    """

    wiring: str = "gate"
    memory: str = "titans"
    attention: str = "sliding_window"
    window: int | None = None
    memory_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wiring not in WIRINGS:
            raise ValueError(f"wiring is one of {', '.join(WIRINGS)}; got {self.wiring!r}")
        for branch in ("attention", "memory"):
            try:
                configure(**self.branch(branch))
            except ValueError as error:
                raise ValueError(f"{branch} branch: {error}") from error

    def branch(self, branch: str) -> dict[str, Any]:
        """What `build` wants for the branch "attention" or "memory"."""
        sizes = {"dim": self.dim, "n_heads": self.n_heads, "layer": self.layer}
        if branch == "memory":
            return {"name": self.memory, **sizes, **self.memory_options}
        window = {} if self.window is None else {"window": self.window}
        return {"name": self.attention, **sizes, **window, **self.attention_options}


class WiringState(NamedTuple):
    """The states of the two branches."""

    attention: State
    memory: State


@register(
    "memory_as_gate",
    config=WiringConfig,
    options={"wiring": "gate"},
    summary="Titans MAG: sliding-window attention gated by a memory; any two mixers, memory=... attention=...",
    source="arXiv 2501.00663",
    state="constant: both branches' states",
)
@register(
    "memory_as_layer",
    config=WiringConfig,
    options={"wiring": "layer"},
    summary="Titans MAL: a memory, then sliding-window attention over its output; any two mixers",
    source="arXiv 2501.00663",
    state="constant: both branches' states",
)
class Wiring(Mixer):
    """A memory and an attention in one layer.

    gate: y = norm(attention(x)) * sigmoid(norm(memory(x))), both norms with learned weights. The paper leaves the gating open
    ("any non-linear gating"; normalised, then a non-linearity); the sigmoid on the memory's side is our choice.

    layer: m = memory(x); y = m + attention(norm(x + m)). The paper writes attention(memory(x)) and says that all blocks have
    residual connections; this is that composition with the residual around each of the two.

    Source: Behrouz et al. 2024, arXiv 2501.00663, sections 4.2 and 4.3.
    """

    config: WiringConfig

    def __init__(self, config: WiringConfig) -> None:
        super().__init__(config)
        self.attention = build(**config.branch("attention"))
        self.memory = build(**config.branch("memory"))
        self.attention_norm = HeadNorm(config.dim)
        self.memory_norm = HeadNorm(config.dim) if config.wiring == "gate" else None

    def reset_parameters(self) -> None:
        """Fresh weights in both branches, norms of one."""
        for part in (self.attention, self.memory, self.attention_norm, self.memory_norm):
            if part is not None:
                part.reset_parameters()

    def init_state(self, batch_size: int) -> WiringState:
        """Both branches' own."""
        return WiringState(self.attention.init_state(batch_size), self.memory.init_state(batch_size))

    def forward(
        self,
        x: Tensor,
        state: WiringState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, WiringState]:
        """x [B, T, D] -> y [B, T, D] and both states; see `Mixer.forward`."""
        before = WiringState(None, None) if state is None else state
        remembered, memory = self.memory(x, before.memory, mask=mask, document_ids=document_ids)
        seen = x if self.memory_norm is not None else self.attention_norm(x + remembered)
        attended, attention = self.attention(seen, before.attention, mask=mask, document_ids=document_ids)
        if self.memory_norm is None:
            y = remembered + attended
        else:
            y = self.attention_norm(attended) * torch.sigmoid(self.memory_norm(remembered))
        return y, WiringState(attention, memory)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The attention branch's maps."""
        if self.memory_norm is None:
            x = self.attention_norm(x + self.memory(x)[0])
        return self.attention.maps(x)
