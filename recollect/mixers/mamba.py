"""Selective state spaces: Mamba (S6) and Mamba-2, and Longhorn, which keeps Mamba's block around an implicit delta rule.

Axis legend: B batch, T time, D model dim, E inner channels, N state dim, H heads, V channels of a head.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.mixers.base import MixerConfig, register
from recollect.mixers.blocks import HeadNorm, ShortConvolution, draw_time_steps, exact
from recollect.mixers.recurrent import Cached, RecurrentMixer, check_width, zeros
from recollect.mixers.stream import Steps
from recollect.ops.miras import MirasState, presets, scan
from recollect.ops.miras.spec import held
from recollect.ops.selective_scan import selective_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Options.

    Attributes:
        expand: inner channels E as a multiple of dim.
        state_dim: N.
        dt_rank: middle channels of the map to time steps; None: dim / 16, rounded up.
        conv_width: taps of the short convolution.
    """

    expand: int = 2
    state_dim: int = 16
    dt_rank: int | None = None
    conv_width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expand < 1 or self.state_dim < 1 or self.rank < 1:
            raise ValueError(
                "expand, state_dim and dt_rank must be positive; "
                f"got expand={self.expand}, state_dim={self.state_dim}, dt_rank={self.dt_rank}"
            )
        check_width("conv_width", self.conv_width)

    @property
    def inner(self) -> int:
        """E."""
        return self.expand * self.dim

    @property
    def rank(self) -> int:
        """Middle channels of the map to time steps."""
        return math.ceil(self.dim / 16) if self.dt_rank is None else self.dt_rank


class Selection(nn.Module):
    """Mamba's way in and out: u = silu(conv(W_u x)), z = W_z x; (dt, b, c) linear in u; out = W_o ((y + skip * u) * silu(z))."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.sizes = (config.rank, config.state_dim, config.state_dim)
        self.into = nn.Linear(config.dim, 2 * config.inner, bias=False)
        self.conv = ShortConvolution(config.inner, config.conv_width, bias=True)
        self.select = nn.Linear(config.inner, sum(self.sizes), bias=False)
        self.dt = nn.Linear(config.rank, config.inner)
        self.skip = nn.Parameter(torch.empty(config.inner))
        self.out = nn.Linear(config.inner, config.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Maps with std inputs^(-1/2), a skip of one, a time-step bias of zero."""
        for linear in (self.into, self.select, self.out):
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
        self.conv.reset_parameters()
        bound = self.dt.in_features**-0.5
        nn.init.uniform_(self.dt.weight, -bound, bound)
        nn.init.zeros_(self.dt.bias)
        nn.init.ones_(self.skip)

    def forward(self, x: Tensor, cached: Tensor | None, steps: Steps) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, D] -> u, z, dt [B, T, E] (before its activation), b, c [B, T, N] and the next cached inputs."""
        u, z = self.into(x).chunk(2, dim=-1)
        u, cached = self.conv(u, cached, steps.valid, steps.reset)
        dt, b, c = self.select(u).split(self.sizes, dim=-1)
        return u, z, self.dt(dt), b, c, cached

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """y [B, T, E] with the skip in it, and z -> [B, T, D]."""
        return self.out(y * F.silu(z))


@register(
    "mamba",
    config=MambaConfig,
    summary="Mamba (S6): a diagonal state per channel with selected time step, input and output",
    source="arXiv 2312.00752",
    state="constant: E N numbers",
)
class Mamba(RecurrentMixer):
    """Mamba: h_t = exp(dt_t A) h_{t-1} + dt_t u_t b_t^T, y_t = h_t c_t + skip * u_t, dt = softplus(.), A = -exp(log_rate), per channel.

    u, z, dt, b, c as in `Selection`; A starts at -1..-N, time steps log-uniform on (0.001, 0.1). 6 D^2 parameters (the paper stacks
    two such blocks and no MLP where a Transformer has one layer); expand = 1 makes 3 D^2. n_heads is not used.

    Source: Gu & Dao 2023, arXiv 2312.00752, section 3.
    """

    config: MambaConfig

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.selection = Selection(config)
        self.log_rate = nn.Parameter(torch.empty(config.inner, config.state_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights, rates of 1..N and time steps."""
        super().reset_parameters()
        draw_time_steps(self.selection.dt.bias)
        rate = torch.arange(1, self.config.state_dim + 1, device=self.log_rate.device, dtype=torch.float64)
        self.log_rate.copy_(rate.log().expand_as(self.log_rate))

    def start(self, batch_size: int) -> tuple[Tensor, Cached]:
        """Zeros [B, E, N]."""
        memory = zeros(self.log_rate, batch_size, self.config.inner, self.config.state_dim)
        return memory, (self.selection.conv.init_state(batch_size),)

    def mix(self, x: Tensor, memory: Tensor, inputs: Cached, steps: Steps) -> tuple[Tensor, Tensor, Cached]:
        """See `RecurrentMixer.mix`."""
        u, z, logits, b, c, cached = self.selection(x, inputs[0], steps)
        log_rate, logits = exact(self.log_rate, logits)
        y, memory = selective_scan(
            u, F.softplus(logits), -log_rate.exp(), b, c, self.selection.skip, memory, reset=steps.reset, valid=steps.valid
        )
        return self.selection.finish(y, z), memory, (cached,)


@register(
    "longhorn",
    config=MambaConfig,
    summary="Longhorn: Mamba's block around an implicit delta rule, which needs no forget gate",
    source="arXiv 2407.14207",
    state="constant: E N numbers",
)
class Longhorn(RecurrentMixer):
    """Longhorn: M_t = M_{t-1} + Diag(eps_t) (u_t - M_{t-1} k_t) k_t^T, eps = beta / (1 + beta |k|^2), y_t = M_t q_t + skip * u_t.

    beta = sigmoid(.), per inner channel; u, z, beta, k, q as `Selection` makes u, z, dt, b, c. This is the closed-form step of the
    paper; the authors' kernel replaces k_t k_t^T by its diagonal in the erased part. Each inner channel solves its own triangular
    system, which costs more than the other delta rules. 6 D^2 parameters as Mamba. n_heads is not used.

    Source: Liu et al. 2024, arXiv 2407.14207, Theorem 3.1.
    """

    config: MambaConfig

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.selection = Selection(config)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, 1, E, N]."""
        memory = zeros(self.selection.skip, batch_size, 1, self.config.inner, self.config.state_dim)
        return held((memory,)), (self.selection.conv.init_state(batch_size),)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        u, z, logits, k, q, cached = self.selection(x, inputs[0], steps)
        (logits,) = exact(logits)
        q, k, v, beta = (t[:, :, None] for t in (q, k, u, torch.sigmoid(logits)))
        y, memory = scan(presets.longhorn(), q, k, v, {"eta": beta}, memory, reset=steps.reset, valid=steps.valid)
        return self.selection.finish(y[:, :, 0] + self.selection.skip * u, z), memory, (cached,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Options.

    Attributes:
        expand: inner channels E as a multiple of dim.
        state_dim: N; None: 128, at most dim / 4 or 16.
        head_dim: V, a divisor of E; None: dim / n_heads, so that there are expand * n_heads heads.
        conv_width: taps of the short convolution.
    """

    expand: int = 2
    state_dim: int | None = None
    head_dim: int | None = None
    conv_width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expand < 1 or self.n_state < 1:
            raise ValueError(f"expand and state_dim must be positive; got expand={self.expand}, state_dim={self.state_dim}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"n_heads must divide dim: dim={self.dim}, n_heads={self.n_heads}")
        if self.value_dim < 1 or self.inner % self.value_dim:
            raise ValueError(f"head_dim must divide expand * dim: head_dim={self.value_dim}, expand * dim={self.inner}")
        check_width("conv_width", self.conv_width)

    @property
    def inner(self) -> int:
        """E."""
        return self.expand * self.dim

    @property
    def n_state(self) -> int:
        """N."""
        return min(128, max(16, self.dim // 4)) if self.state_dim is None else self.state_dim

    @property
    def value_dim(self) -> int:
        """V."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim


@register(
    "mamba2",
    config=Mamba2Config,
    summary="Mamba-2: one decay per head, inputs and outputs shared by the heads, gated norm",
    source="arXiv 2405.21060",
    state="constant: E N numbers",
)
class Mamba2(RecurrentMixer):
    """Mamba-2: S_t = exp(dt_t A_h) S_{t-1} + dt_t u_t b_t^T, y = W_o norm((S_t c_t + skip_h u_t) * silu(z)), dt = softplus(. + bias).

    (z, u, b, c, dt) = W_in x, and (u, b, c) go through one convolution with bias and SiLU; b and c are shared by the heads. The norm
    is over all heads together. -A starts uniform on (1, 16), time steps log-uniform on (0.001, 0.1). 6 D^2 parameters plus 2 N D (the
    paper stacks two such blocks and no MLP where a Transformer has one layer).

    Source: Dao & Gu 2024, arXiv 2405.21060, section 7, and the released code for the initial values.
    """

    config: Mamba2Config

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        inner, n_state = config.inner, config.n_state
        n_heads = inner // config.value_dim
        self.n_heads = n_heads
        self.into = nn.Linear(config.dim, 2 * inner + 2 * n_state + n_heads, bias=False)
        self.conv = ShortConvolution(inner + 2 * n_state, config.conv_width, bias=True)
        self.log_rate, self.dt_bias, self.skip = (nn.Parameter(torch.empty(n_heads)) for _ in range(3))
        self.norm = HeadNorm(inner)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights, rates, time steps, and a skip of one."""
        super().reset_parameters()
        self.log_rate.uniform_(1, 16).log_()
        draw_time_steps(self.dt_bias)
        self.skip.fill_(1.0)

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, N]."""
        memory = zeros(self.skip, batch_size, self.n_heads, self.config.value_dim, self.config.n_state)
        return held((memory,)), (self.conv.init_state(batch_size),)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        inner, n_state, n_heads = self.config.inner, self.config.n_state, self.n_heads
        z, mixed, dt = self.into(x).split((inner, inner + 2 * n_state, n_heads), dim=-1)
        mixed, cached = self.conv(mixed, inputs[0], steps.valid, steps.reset)
        u, b, c = mixed.split((inner, n_state, n_state), dim=-1)
        u = u.unflatten(-1, (n_heads, -1))
        b, c = (t[:, :, None].expand(-1, -1, n_heads, -1) for t in (b, c))
        dt, bias, log_rate = exact(dt, self.dt_bias, self.log_rate)
        dt = F.softplus(dt + bias)
        gates = {"eta": dt, "log_alpha": -log_rate.exp() * dt}
        y, memory = scan(presets.mamba2(), c, b, u, gates, memory, reset=steps.reset, valid=steps.valid)
        y = (y + self.skip[:, None] * u).flatten(2)
        return self.out(self.norm(y * F.silu(z))), memory, (cached,)
