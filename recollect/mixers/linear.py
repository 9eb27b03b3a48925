"""Linear attention without data-dependent gates: the first one, RetNet's retention, and Lightning attention.

Axis legend: B batch, T time, D model dim, H heads, K key dim and V value dim of a head.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.mixers.base import register
from recollect.mixers.blocks import HeadNorm, exact
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
from recollect.ops.attention import rotary
from recollect.ops.miras import MirasState, presets, scan
from recollect.ops.miras.spec import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        feature_map: of queries and keys: "elu" (elu(x) + 1, positive), "silu" or "identity".
        normalize: divide by the sum of the weights, as attention does; needs the positive map. False: a norm per head instead.
        conv_width: taps of a short convolution after q, k, v; None: none.
    """

    feature_map: str = "elu"
    normalize: bool = True
    conv_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map not in ("elu", "silu", "identity"):
            raise ValueError(f"feature_map is 'elu', 'silu' or 'identity'; got {self.feature_map!r}")
        if self.normalize and self.feature_map != "elu":
            raise ValueError(
                f"normalize needs positive weights, feature_map='elu'; got {self.feature_map!r} (or pass normalize=False)"
            )
        check_width("conv_width", self.conv_width)


@register(
    "linear_attention",
    config=LinearAttentionConfig,
    summary="linear attention: positive features instead of a softmax",
    source="arXiv 2006.16236",
    state="constant: K (V + 1) numbers per head",
)
class LinearAttention(RecurrentMixer):
    """Linear attention: y_t = sum_{i<=t} (phi(q_t).phi(k_i)) v_i / sum_{i<=t} phi(q_t).phi(k_i), phi(x) = elu(x) + 1.

    4 D^2 parameters. Source: Katharopoulos et al. 2020, arXiv 2006.16236, Eq. 9-12.
    """

    config: LinearAttentionConfig

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        dim, n_heads, size, width = config.dim, config.n_heads, config.value_dim, config.conv_width
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.v = Branch(dim, n_heads, size, conv_width=width)
        self.norm = None if config.normalize else HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V (+ 1 for the sum of weights), K]."""
        size = self.config.value_dim + self.config.normalize
        memory = zeros(self.o.weight, batch_size, self.config.n_heads, size, self.config.key_dim)
        return held((memory,)), no_inputs((self.q, self.k, self.v), batch_size)

    def _features(self, x: Tensor) -> Tensor:
        if self.config.feature_map == "identity":
            return x
        return F.silu(x) if self.config.feature_map == "silu" else F.elu(x) + 1

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        q, k, v = exact(q, k, v)
        q, k = self._features(q) * self.config.key_dim**-0.5, self._features(k)
        if self.norm is None:
            v = F.pad(v, (0, 1), value=1.0)
        y, memory = scan(presets.linear_attention(), q, k, v, {}, memory, reset=steps.reset, valid=steps.valid)
        y = y[..., :-1] / (y[..., -1:] + 1e-6) if self.norm is None else self.norm(y)
        return self.o(y.to(x.dtype).flatten(2)), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig(HeadSizeConfig):
    """Options: those of `HeadSizeConfig`, and

    Attributes:
        rope_theta: base of the rotary wavelengths.
        conv_width: taps of a short convolution after q, k, v; None: none.
    """

    expand_v: float = 2.0
    rope_theta: float = 1e4
    conv_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_dim % 2:
            raise ValueError(
                f"rotary positions need an even key dim; got {self.key_dim} (dim={self.dim}, n_heads={self.n_heads})"
            )
        check_width("conv_width", self.conv_width)


@register(
    "retnet",
    config=RetNetConfig,
    summary="RetNet: rotary linear attention with a fixed decay per head, norm per head, SiLU gate",
    source="arXiv 2307.08621",
    state="constant: K V numbers per head",
)
class RetNet(RecurrentMixer):
    """Multi-scale retention: S_t = gamma_h S_{t-1} + v_t k_t^T, gamma_h = 1 - 2^(-5 - h); y = W_o (norm(S_t q_t) * silu(W_g x_t)).

    Queries and keys are rotated; keys are scaled by K^(-1/2); the norm per head has no weight (as in the authors' code; the paper
    calls it a group norm). The row scaling of the authors' parallel form is left out: the norm undoes it.

    8 D^2 parameters with the paper's expand_v = 2 (the paper narrows its MLPs for it); expand_k = 0.5 and expand_v = 1 make 4 D^2.
    Source: Sun et al. 2023, arXiv 2307.08621, Eq. 5-8.
    """

    config: RetNetConfig

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        dim, n_heads, size, width = config.dim, config.n_heads, config.value_dim, config.conv_width
        self.q = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.k = Branch(dim, n_heads, config.key_dim, conv_width=width)
        self.v = Branch(dim, n_heads, size, conv_width=width)
        self.gate = nn.Linear(dim, n_heads * size, bias=False)
        self.norm = HeadNorm(size, affine=False)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        n_heads, theta = self.config.n_heads, self.config.rope_theta
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        q = rotary(q, steps.positions, theta=theta)
        k = rotary(k, steps.positions, theta=theta) * self.config.key_dim**-0.5
        head = torch.arange(n_heads, device=x.device, dtype=memory.dual[0].dtype)
        log_decay = torch.log1p(-(2.0 ** (-5 - head))).expand(*x.shape[:2], n_heads)
        gates = {"log_alpha": log_decay}
        y, memory = scan(presets.retnet(), q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        y = self.norm(y, self.gate(x).unflatten(-1, (n_heads, -1)))
        return self.o(y.flatten(2)), memory, inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningConfig(HeadSizeConfig, DepthConfig):
    """Options: those of `HeadSizeConfig` and `DepthConfig` (deeper layers forget less)."""


@register(
    "lightning",
    config=LightningConfig,
    pattern=depth_pattern,
    summary="Lightning attention (MiniMax-01): SiLU features, a fixed decay per head and depth, norm, sigmoid gate",
    source="arXiv 2501.08313",
    state="constant: K V numbers per head",
)
class Lightning(RecurrentMixer):
    """Lightning attention: q, k, v = silu(W x); S_t = exp(-s_h) S_{t-1} + v_t k_t^T; y = W_o (norm(S_t q_t) * sigmoid(W_g x_t)).

    The slope of head h = 1..H is s_h = 2^(-8 h / H) (1 - layer / (n_layers - 1 + 1e-5) + 1e-5), so the last layer hardly forgets;
    the norm is over all heads together. 5 D^2 parameters (the output gate is the fifth).

    Source: MiniMax 2025, arXiv 2501.08313, section 2.2, and its released code for slopes and norm; Qin et al. 2024, arXiv 2401.04658.
    """

    config: LightningConfig

    def __init__(self, config: LightningConfig) -> None:
        super().__init__(config)
        dim, n_heads, size = config.dim, config.n_heads, config.value_dim
        self.q = Branch(dim, n_heads, config.key_dim)
        self.k = Branch(dim, n_heads, config.key_dim)
        self.v = Branch(dim, n_heads, size)
        self.gate = nn.Linear(dim, n_heads * size, bias=False)
        self.norm = HeadNorm(n_heads * size, eps=1e-6, gate="sigmoid")
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, V, K]."""
        return empty_matrix(self.o.weight, batch_size, self.config), ()

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        n_heads, layer, n_layers = self.config.n_heads, self.config.layer, self.config.model_layers
        q, k, v = (F.silu(branch(x, None, steps)[0]) for branch in (self.q, self.k, self.v))
        head = torch.arange(1, n_heads + 1, device=x.device, dtype=memory.dual[0].dtype)
        slope = 2.0 ** (-8 * head / n_heads) * (1 - layer / (n_layers - 1 + 1e-5) + 1e-5)
        gates = {"log_alpha": (-slope).expand(*x.shape[:2], n_heads)}
        y, memory = scan(presets.lightning(), q, k, v, gates, memory, reset=steps.reset, valid=steps.valid)
        return self.o(self.norm(y.flatten(2), self.gate(x))), memory, ()
