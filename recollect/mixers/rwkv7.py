"""RWKV-7: a delta rule whose decay, erase key, write key and strength are all vectors of their own.

Axis legend: B batch, T time, D model dim, H heads, K channels of a head (keys and values).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from recollect.mixers.base import register
from recollect.mixers.blocks import LowRank, exact, l2_normalize, shift_back
from recollect.mixers.recurrent import Cached, DepthConfig, RecurrentMixer, depth_pattern, zeros
from recollect.mixers.stream import Steps
from recollect.ops.miras import MirasState, presets, scan
from recollect.ops.miras.spec import held

STRONGEST = -math.exp(-0.5)  # the log decay of one token lies between this and 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config(DepthConfig):
    """Options: those of `DepthConfig` (token shifts, decays and the norm start differently at each depth), and

    Attributes:
        decay_rank, rate_rank, gate_rank: middle channels of the low-rank maps. None: the paper's, near 2.5 sqrt(D), 2.5 sqrt(D) and
            5 sqrt(D) in steps of 32, times K / 64 for the first two, and at most D / 4.
    """

    decay_rank: int | None = None
    rate_rank: int | None = None
    gate_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.n_heads or self.dim // self.n_heads < 2:
            raise ValueError(
                f"n_heads must divide dim into heads of at least 2 channels: dim={self.dim}, n_heads={self.n_heads}"
            )
        for name, rank in (("decay_rank", self.decay_rank), ("rate_rank", self.rate_rank), ("gate_rank", self.gate_rank)):
            if rank is not None and rank < 1:
                raise ValueError(f"{name} must be positive; got {rank}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.dim // self.n_heads

    def rank(self, given: int | None, factor: float) -> int:
        """A low-rank map's middle channels: as given, or near factor * sqrt(D)."""
        if given is not None:
            return given
        return max(1, min(max(32, 32 * round(factor * self.dim**0.5 / 32)), self.dim // 4))


@register(
    "rwkv7",
    config=RWKV7Config,
    pattern=depth_pattern,
    summary="RWKV-7: token shift, vector-valued decay and in-context learning rate, separate erase and write keys",
    source="arXiv 2503.14456",
    state="constant: K^2 numbers per head, and D",
)
class RWKV7(RecurrentMixer):
    """RWKV-7 time mixing.

    x_c = x_t + mu_c (x_{t-1} - x_t) for c in r, w, k, v, a, g, then
      w = exp(-e^(-1/2) sigmoid(w_0 + tanh(x_w A_w) B_w)), a = sigmoid(a_0 + x_a A_a B_a), g = sigmoid(x_g A_g) B_g,
      kappa = (k * xi) / |k * xi| per head, k~ = k * (1 + (a - 1) alpha),
      S_t = S_{t-1} (Diag(w) - kappa (a * kappa)^T) + v k~^T,
      y = W_o (g * (groupnorm(S_t r) + (r . (rho * k~)) v)).
    The mixing of a layer's values with those of the first layer is left out: a mixer sees its own layer only. Heads are dim / n_heads
    wide (the paper's: 64). 4 D^2 parameters, and the low-rank maps (a tenth more at D = 2048, under 1.5 D^2 at any width).

    Parameters start as in the authors' code, but for what makes a fresh layer's output zero there: W_o is drawn as the other
    maps, and B_g with std rank^(-1/2).

    Source: Peng et al. 2025, arXiv 2503.14456, section 4; initial values: its appendix and BlinkDL/RWKV-LM.
    """

    config: RWKV7Config

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        dim, shape, wide = config.dim, (config.n_heads, config.head_dim), config.head_dim / 64
        ratio, zigzag = _ramps(dim, config.head_dim)
        depth = config.layer / max(config.model_layers - 1, 1)
        decay = [-5.5 + 6 * r ** (1 + depth**0.3) + 2.5 * z for r, z in zip(ratio, zigzag, strict=True)]
        rate = [-0.19 + 0.3 * z + 0.4 * (r - 0.5) for r, z in zip(ratio, zigzag, strict=True)]
        self.mix_r, self.mix_w, self.mix_k, self.mix_v, self.mix_a, self.mix_g = (
            nn.Parameter(torch.empty(dim)) for _ in range(6)
        )
        self.r, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w = LowRank(dim, config.rank(config.decay_rank, 2.5 * wide), dim, bias=decay, activation="tanh")
        self.a = LowRank(dim, config.rank(config.rate_rank, 2.5 * wide), dim, bias=rate)
        self.g = LowRank(dim, config.rank(config.gate_rank, 5.0), dim, bias=None, activation="sigmoid", gain=1.0)
        self.erase = nn.Parameter(torch.empty(shape))
        self.replace = nn.Parameter(torch.empty(shape))
        self.bonus = nn.Parameter(torch.empty(shape))
        self.norm_weight = nn.Parameter(torch.empty(shape))
        self.norm_bias = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights, and the ramps over channels and depth."""
        super().reset_parameters()
        dim, layer, n_layers = self.config.dim, self.config.layer, self.config.model_layers
        device = self.mix_r.device
        channel = torch.arange(dim, dtype=torch.float64, device=device)
        share = 1 - layer / n_layers
        powers = (
            (self.mix_r, 0.2),
            (self.mix_w, 0.9),
            (self.mix_k, 0.7),
            (self.mix_v, 0.7),
            (self.mix_a, 0.9),
            (self.mix_g, 0.2),
        )
        for mix, power in powers:
            mix.copy_(1 - (channel / dim) ** (power * share))
        self.erase.copy_((0.71 - 0.1 * (channel / max(dim - 1, 1) - 0.5)).view_as(self.erase))
        self.replace.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.norm_weight.fill_(((layer + 1) / n_layers) ** 0.7)
        self.norm_bias.zero_()

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """Zeros [B, H, K, K], and the input before the first token, zeros [B, 1, D]."""
        size = self.config.head_dim
        memory = zeros(self.o.weight, batch_size, self.config.n_heads, size, size)
        return held((memory,)), (self.o.weight.new_zeros(batch_size, 1, self.config.dim),)

    def mix(self, x: Tensor, memory: MirasState, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        heads = (self.config.n_heads, self.config.head_dim)
        assert inputs[0] is not None
        before, cached = shift_back(x, inputs[0], steps.valid, steps.reset)
        change = before - x
        mixes = (self.mix_r, self.mix_w, self.mix_k, self.mix_v, self.mix_a, self.mix_g)
        x_r, x_w, x_k, x_v, x_a, x_g = (torch.addcmul(x, change, mix) for mix in mixes)
        r, k, v = self.r(x_r).unflatten(-1, heads), self.k(x_k).unflatten(-1, heads), self.v(x_v).unflatten(-1, heads)
        (logits,) = exact(self.w(x_w).unflatten(-1, heads))
        rate = torch.sigmoid(self.a(x_a)).unflatten(-1, heads)
        kappa = l2_normalize(k * self.erase)
        write = k * (1 + (rate - 1) * self.replace)
        gates = {"log_alpha": STRONGEST * torch.sigmoid(logits), "eta": rate, "write": write}
        y, memory = scan(
            presets.rwkv7(), r, kappa, v, gates, memory, reset=steps.reset, valid=steps.valid, decay_floor=STRONGEST
        )
        y = self._group_norm(y) + (r * write * self.bonus).sum(-1, keepdim=True) * v
        return self.o(y.flatten(2) * self.g(x_g)), memory, (cached,)

    def _group_norm(self, y: Tensor) -> Tensor:
        """Layer norm of every head [B, T, H, K] with eps K 1e-5, in fp32 (fp64 for fp64)."""
        wide, weight, bias = exact(y, self.norm_weight, self.norm_bias)
        centred = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.config.head_dim * 1e-5)
        return (centred * scale * weight + bias).to(y.dtype)


def _ramps(dim: int, head_dim: int) -> tuple[list[float], list[float]]:
    """Channel / (D - 1) in [0, 1], and per head the signed square of a ramp from -1 to 1."""
    ratio = [n / (dim - 1) for n in range(dim)]
    half = (head_dim - 1) / 2
    within = [(n % head_dim - half) / half for n in range(dim)]
    return ratio, [z * abs(z) for z in within]
