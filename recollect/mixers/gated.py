"""Linear attention whose decay depends on the data: GLA, HGRN2 and gated slot attention.

Axis legend: B batch, T time, D model dim, H heads, K key dim and V value dim of a head, M slots.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.mixers.base import register
from recollect.mixers.blocks import HeadNorm, LowRank, exact
from recollect.mixers.recurrent import (
    Branch,
    Cached,
    DepthConfig,
    HeadSizeConfig,
    RecurrentMixer,
    check_width,
    depth_pattern,
    empty_matrix,
    no_inputs,
    run_branches,
    zeros,
)
from recollect.mixers.stream import Steps
from recollect.ops.miras import MirasState, presets, scan
from recollect.ops.miras.spec import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        gate_rank: middle channels of the decay's low-rank map.
        gate_temperature: the decay is sigmoid(.)^(1 / gate_temperature).
        conv_width: taps of a short convolution after q, k, v; None: none.
    """

    expand_k: float = 0.5
    gate_rank: int = 16
    gate_temperature: float = 16.0
    conv_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank < 1 or not self.gate_temperature > 0:
            raise ValueError(
                "gate_rank and gate_temperature must be positive; "
                f"got gate_rank={self.gate_rank}, gate_temperature={self.gate_temperature}"
            )
        check_width("conv_width", self.conv_width)


@register(
    "gla",
    config=GLAConfig,
    summary="gated linear attention: a decay per key channel from a low-rank map, norm per head, SiLU gate",
    source="arXiv 2312.06635",
    state="constant: K V numbers per head",
)
class GLA(RecurrentMixer):
    """Gated linear attention: S_t = S_{t-1} Diag(alpha_t) + v_t k_t^T, y = W_o (norm(S_t q_t) * silu(W_g x_t)).

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16); q is scaled by K^(-1/2). The paper uses 4 heads at every width. 4 D^2 parameters.

    Source: Yang et al. 2024, arXiv 2312.06635, section 4.4.
    """

    config: GLAConfig

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(config)
        dim, n_heads, size, width = config.dim, config.n_heads, config.value_dim, config.conv_width
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.v = Branch(dim, n_heads, size, conv_width=width)
        self.alpha = LowRank(dim, config.gate_rank, n_heads * config.key_dim, gain=0.1)
        self.gate = nn.Linear(dim, n_heads * size, bias=False)
        self.norm = HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        heads = (self.config.n_heads, -1)
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        (logits,) = exact(self.alpha(x).unflatten(-1, heads))
        gates = {"log_alpha": F.logsigmoid(logits) / self.config.gate_temperature}
        q = q * self.config.key_dim**-0.5
        y, memory = scan(presets.gla(), q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        y = self.norm(y, self.gate(x).unflatten(-1, heads))
        return self.o(y.flatten(2)), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2Config(HeadSizeConfig, DepthConfig):
    """Options: those of `HeadSizeConfig` and `DepthConfig` (deeper layers have a higher floor under the decay), and

    Attributes:
        conv_width: taps of a short convolution after q, f, v; None: none.
    """

    conv_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("conv_width", self.conv_width)


@register(
    "hgrn2",
    config=HGRN2Config,
    pattern=depth_pattern,
    summary="HGRN2: gated linear attention whose key is one minus the decay",
    source="arXiv 2404.07904",
    state="constant: K V numbers per head",
)
class HGRN2(RecurrentMixer):
    """HGRN2: S_t = S_{t-1} Diag(alpha_t) + v_t (1 - alpha_t)^T, y = W_o norm(S_t silu(q_t)).

    alpha_t = floor + (1 - floor) sigmoid(W_f x_t); silu(q) is scaled by K^(-1/2); the norm is over all heads together. The floor is
    learned per channel and starts at layer / n_layers, 0 and fixed in the first layer; the paper learns the floors of all layers as
    one cumulative softmax, which starts at the same values. The paper's heads have K = V = 128; here dim / n_heads. 4 D^2 parameters.

    Source: Qin et al. 2024, arXiv 2404.07904, Eq. 4-8; floors: arXiv 2311.04823, section 3.2.
    """

    config: HGRN2Config

    def __init__(self, config: HGRN2Config) -> None:
        super().__init__(config)
        dim, n_heads, size, width = config.dim, config.n_heads, config.value_dim, config.conv_width
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=width, conv_activation=None)
        self.f = Branch(dim, n_heads, config.key_dim, conv_width=width, conv_activation=None)
        self.v = Branch(dim, n_heads, size, conv_width=width, conv_activation=None)
        self.floor = nn.Parameter(torch.empty(n_heads, config.key_dim)) if config.layer else None
        self.norm = HeadNorm(n_heads * size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights; the floor at layer / n_layers."""
        super().reset_parameters()
        if self.floor is not None:
            share = self.config.layer / self.config.model_layers
            self.floor.fill_(share / (1 - share)).log_()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), no_inputs((self.q, self.f, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        (q, f, v), inputs = run_branches((self.q, self.f, self.v), x, inputs, steps)
        (f,) = exact(f)
        log_decay, k = F.logsigmoid(f), torch.sigmoid(-f)
        if self.floor is not None:
            (floor,) = exact(self.floor)
            log_decay = torch.logaddexp(F.logsigmoid(floor), F.logsigmoid(-floor) + log_decay)
            k = k * torch.sigmoid(-floor)
        q = F.silu(q) * self.config.key_dim**-0.5
        gates = {"log_alpha": log_decay}
        y, memory = scan(presets.hgrn2(), q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        return self.o(self.norm(y.flatten(2))), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSAConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        n_slots: M, memory slots of a head; None: 64, at most K.
        gate_temperature: the decay is sigmoid(.)^(1 / gate_temperature).
        conv_width: taps of a short convolution after q, k, v; None: none.
    """

    n_slots: int | None = None
    gate_temperature: float = 8.0
    conv_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1 or not self.gate_temperature > 0:
            raise ValueError(
                f"n_slots and gate_temperature must be positive; got n_slots={self.slots}, gate_temperature={self.gate_temperature}"
            )
        check_width("conv_width", self.conv_width)

    @property
    def slots(self) -> int:
        """M."""
        return min(64, self.key_dim) if self.n_slots is None else self.n_slots


@register(
    "gsa",
    config=GSAConfig,
    summary="gated slot attention: softmax over slots that are written and forgotten by gates",
    source="arXiv 2409.07146",
    state="constant: M (K + V) numbers per head",
)
class GSA(RecurrentMixer):
    """Gated slot attention: K~_t = Diag(alpha_t) K~_{t-1} + (1 - alpha_t) k_t^T, V~_t likewise, y = V~_t^T softmax(K~_t q_t).

    q, k, v = silu(W x); alpha = sigmoid(W_f x)^(1/8), one per slot; the output is W_o norm(silu(y)), the norm over all heads together.
    (4 + H M / D) D^2 parameters: 4 D^2 with the paper's few wide heads (4 heads, 64 slots), up to 5 D^2 with M = K.

    Source: Zhang et al. 2024, arXiv 2409.07146, section 3.
    """

    config: GSAConfig

    def __init__(self, config: GSAConfig) -> None:
        super().__init__(config)
        dim, n_heads, size, width = config.dim, config.n_heads, config.value_dim, config.conv_width
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.v = Branch(dim, n_heads, size, conv_width=width)
        self.f = nn.Linear(dim, n_heads * config.slots, bias=False)
        self.norm = HeadNorm(n_heads * size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, M, K] and [B, H, M, V]."""
        shape = (batch_size, self.config.n_heads, self.config.slots)
        memories = (zeros(self.o.weight, *shape, self.config.key_dim), zeros(self.o.weight, *shape, self.config.value_dim))
        return held(memories), no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        (logits,) = exact(self.f(x).unflatten(-1, (self.config.n_heads, -1)))
        gates, spec = {"log_alpha": F.logsigmoid(logits) / self.config.gate_temperature}, presets.gsa(self.config.slots)
        y, memory = scan(spec, F.silu(q), F.silu(k), F.silu(v), gates, memory, reset=steps.reset, valid=steps.valid)
        return self.o(self.norm(F.silu(y).flatten(2))), memory, inputs
