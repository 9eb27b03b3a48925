"""What the mixers around a recurrence share: options for head sizes, a state, and following padding and documents.

Axis legend: B batch, T time, D model dim, H heads, K key dim and V value dim of a head.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from recollect.mixers.base import Mixer, MixerConfig
from recollect.mixers.blocks import ShortConvolution, draw, reset
from recollect.mixers.stream import Steps, Stream, beginning, follow
from recollect.ops.miras import MirasState
from recollect.ops.miras.spec import held
from recollect.state import State

Cached: TypeAlias = tuple[Tensor | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSizeConfig(MixerConfig):
    """Options of mixers with n_heads matrix memories.

    Attributes:
        expand_k: channels of all keys together, as a multiple of dim; K = expand_k dim / n_heads.
        expand_v: channels of all values together, as a multiple of dim; V = expand_v dim / n_heads.
    """

    expand_k: float = 1.0
    expand_v: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ratio in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            channels = ratio * self.dim
            if channels != int(channels) or int(channels) < 1 or int(channels) % self.n_heads:
                raise ValueError(
                    f"{name} * dim must be a positive multiple of n_heads: {name}={ratio}, dim={self.dim}, n_heads={self.n_heads}"
                )

    @property
    def key_dim(self) -> int:
        """K of one head."""
        return int(self.expand_k * self.dim) // self.n_heads

    @property
    def value_dim(self) -> int:
        """V of one head."""
        return int(self.expand_v * self.dim) // self.n_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig(MixerConfig):
    """Options of mixers that start differently at each depth.

    Attributes:
        n_layers: layers of the model; None: this layer is the last one.
    """

    n_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_layers is not None and self.n_layers <= self.layer:
            raise ValueError(f"n_layers must exceed the 0-based layer: n_layers={self.n_layers}, layer={self.layer}")

    @property
    def model_layers(self) -> int:
        """Layers of the model."""
        return self.layer + 1 if self.n_layers is None else self.n_layers


def depth_pattern(layer: int, n_layers: int) -> Mapping[str, int]:
    """The pattern of mixers with a `DepthConfig`."""
    return {"n_layers": n_layers}


def check_width(name: str, width: int | None) -> None:
    """Raise ValueError if a convolution has no tap."""
    if width is not None and width < 1:
        raise ValueError(f"{name} counts the inputs that a token sees, its own included: at least 1; got {width}")


class RecurrentState(NamedTuple):
    """memory: what the recurrence carries; inputs: the last inputs of each convolution, [B, W - 1, C]; stream: where we are."""

    memory: State
    inputs: Cached
    stream: Stream


class RecurrentMixer(Mixer):
    """A mixer whose state has constant size. Subclasses give `start` and `mix`; this follows padding and documents.

    Linear maps start as those of the attention mixers (truncated normal, std inputs^(-1/2)) unless the class says otherwise, so
    that mixers differ by what they are and not by a library's habit.
    """

    def reset_parameters(self) -> None:
        """Fresh parameters of every part."""
        reset(self)

    @abc.abstractmethod
    def start(self, batch_size: int) -> tuple[State, Cached]:
        """The memory and the cached inputs before the first token."""

    def fresh(self, batch_size: int) -> tuple[State, Cached]:
        """What `mix` gets at the start of a sequence: `start`, or None for the memory where that says it better."""
        return self.start(batch_size)

    @abc.abstractmethod
    def mix(self, x: Tensor, memory: State, inputs: Cached, steps: Steps) -> tuple[Tensor, State, Cached]:
        """x [B, T, D], what the last piece left, and where the tokens stand -> y [B, T, D] and what this piece leaves."""

    def init_state(self, batch_size: int) -> RecurrentState:
        """Memory and inputs of zeros."""
        memory, inputs = self.start(batch_size)
        return RecurrentState(memory, inputs, beginning(batch_size, next(self.parameters()).device))

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """x [B, T, D] -> y [B, T, D] and the next state; see `Mixer.forward`.

        Raises:
            ValueError: x is not [B, T, D].
        """
        if x.dim() != 3 or x.shape[-1] != self.config.dim:
            raise ValueError(f"x is [B, T, D] with D={self.config.dim}; got {tuple(x.shape)}")
        batch_size, n_tokens = x.shape[:2]
        stream = None if state is None else state.stream
        memory, inputs = self.fresh(batch_size) if state is None else (state.memory, state.inputs)
        steps = follow(stream, n_tokens, batch_size, x.device, mask, document_ids)
        y, memory, inputs = self.mix(x, memory, inputs, steps)
        return y, RecurrentState(memory, inputs, steps.stream)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """A memory of zeros: fp32, or fp64 for an fp64 parameter, on its device."""
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def empty_matrix(like: Tensor, batch_size: int, config: HeadSizeConfig) -> MirasState:
    """What `scan` carries of one matrix [V, K] per head before the first token: zeros."""
    return held((zeros(like, batch_size, config.n_heads, config.value_dim, config.key_dim),))


class Branch(nn.Module):
    """Linear map without bias, then a short convolution if there is one, cut into heads: D -> [H, K].

    Args:
        dim: D.
        n_heads, head_dim: H and K.
        conv_width: taps of the convolution; None: none.
        conv_activation: after the convolution, "silu" or None.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        head_dim: int,
        *,
        conv_width: int | None = None,
        conv_activation: str | None = "silu",
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.linear = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.conv = None if conv_width is None else ShortConvolution(n_heads * head_dim, conv_width, conv_activation)

    def reset_parameters(self) -> None:
        """Fresh weights."""
        draw(self.linear)
        if self.conv is not None:
            self.conv.reset_parameters()

    def start(self, batch_size: int) -> Tensor | None:
        """Cached inputs before the first token."""
        return None if self.conv is None else self.conv.init_state(batch_size)

    def forward(self, x: Tensor, cached: Tensor | None, steps: Steps) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> [B, T, H, K] and the next cached inputs."""
        y = self.linear(x)
        if self.conv is not None:
            y, cached = self.conv(y, cached, steps.valid, steps.reset)
        return y.unflatten(-1, (self.n_heads, -1)), cached


def no_inputs(branches: Sequence[Branch], batch_size: int) -> Cached:
    """What the branches' convolutions have cached before the first token."""
    return tuple(branch.start(batch_size) for branch in branches)


def run_branches(branches: Sequence[Branch], x: Tensor, inputs: Cached, steps: Steps) -> tuple[list[Tensor], Cached]:
    """x [B, T, D] through each branch: the heads [B, T, H, K], and the next cached inputs."""
    pairs = [branch(x, cached, steps) for branch, cached in zip(branches, inputs, strict=True)]
    return [heads for heads, _ in pairs], tuple(cached for _, cached in pairs)
