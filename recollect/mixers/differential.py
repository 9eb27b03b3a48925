"""DIFF Transformer: attention as the difference of two softmax maps, versions 1 and 2.

Axis legend: B batch, T time, D model dim, H heads of the Transformer of the same size, K head dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from recollect.mixers.attention import (
    AttentionState,
    HeadConfig,
    Projections,
    empty_cache,
    extend_cache,
)
from recollect.mixers.base import Mixer, register
from recollect.ops.attention import differential_attention, visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialConfig(HeadConfig):
    """Options of both versions: those of `HeadConfig`, where n_heads are the heads of the Transformer of the same size.

    Version 1 makes n_heads / 2 pairs with values twice as wide (n_heads and n_kv_heads even); version 2 doubles the query heads and
    subtracts pairwise.
    """


def depth_factor(layer: int) -> float:
    """lambda_init of a 0-based layer, 0.8 - 0.6 exp(-0.3 layer). Source: arXiv 2410.05258, section 2.1."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


@register(
    "diff",
    config=DifferentialConfig,
    summary="DIFF Transformer: difference of two softmax maps, halved heads, per-head norm",
    source="arXiv 2410.05258",
    state="2 Hkv K numbers per token",
)
class Differential(Mixer):
    """DIFF Transformer, version 1.

    out = (1 - lambda_init) RMSNorm((softmax_1 - lambda softmax_2) V) per head, lambda = exp(lq1.lk1) - exp(lq2.lk2) + lambda_init, the
    four vectors shared by the layer's heads and drawn from N(0, 0.1^2); the norm's weight is shared by the heads. With grouped
    key-value heads, component c of pair m reads component c of key pair m // n_rep (as in the authors' flash variant).

    Source: Ye et al. 2024, arXiv 2410.05258, Eq. 1-3.
    """

    config: DifferentialConfig

    def __init__(self, config: DifferentialConfig) -> None:
        super().__init__(config)
        n_kv_heads = config.n_kv_heads or config.n_heads
        if config.n_heads % 2 or n_kv_heads % 2:
            raise ValueError(f"diff pairs heads: n_heads and n_kv_heads must be even; got {config.n_heads} and {n_kv_heads}")
        self.project = Projections(config.dim, config.n_heads, n_kv_heads, config.head_dim, n_value_heads=n_kv_heads // 2)
        size = self.project.head_dim
        self.lambda_init = depth_factor(config.layer)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (nn.Parameter(torch.empty(size)) for _ in range(4))
        self.norm_weight = nn.Parameter(torch.empty(2 * size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights."""
        self.project.reset_parameters()
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)
        nn.init.ones_(self.norm_weight)

    def lam(self) -> Tensor:
        """lambda of the layer, a scalar in fp32 (fp64 for fp64 parameters)."""
        exact = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (t.to(exact) for t in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + self.lambda_init

    def init_state(self, batch_size: int) -> AttentionState:
        """No keys yet."""
        return empty_cache(self.project, batch_size)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """x [B, T, D] -> y [B, T, D] and the grown cache; see `Mixer.forward`."""
        q, k, v = self.project(x)
        q, state, start = extend_cache(q, k, v, state, self.config.rope_theta, mask, document_ids)
        dropout_p = self.config.dropout if self.training else 0.0
        heads = differential_attention(q, state.k, state.v, self.lam().view(1, 1, 1), start=start, dropout_p=dropout_p)
        heads = (1 - self.lambda_init) * rms_norm(heads, self.norm_weight)
        return self.project.out(heads), state

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """{"before": first map, "after": the difference}, [B, H / 2, T, T]."""
        first, second = _pair_maps(self.project, x, self.config.rope_theta)
        return {"before": first, "after": first - self.lam().to(first.dtype) * second}


@register(
    "diff_v2",
    config=DifferentialConfig,
    summary="DIFF Transformer version 2: twice the query heads, a gate per token and head, no norm",
    source="microsoft/unilm Diff-Transformer-V2",
    state="2 Hkv K numbers per token",
)
class DifferentialV2(Mixer):
    """DIFF Transformer, version 2: out_m = attention_2m - sigmoid(x w_m) attention_(2m+1); pairs share keys and values.

    Source: microsoft/unilm, Diff-Transformer-V2 (2026).
    """

    config: DifferentialConfig

    def __init__(self, config: DifferentialConfig) -> None:
        super().__init__(config)
        head_dim = config.head_dim or config.dim // config.n_heads
        self.project = Projections(config.dim, 2 * config.n_heads, config.n_kv_heads or config.n_heads, head_dim)
        self.project.o = nn.Linear(config.n_heads * head_dim, config.dim, bias=False)
        self.gate = nn.Linear(config.dim, config.n_heads, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights."""
        self.project.reset_parameters()
        std = self.config.dim**-0.5
        nn.init.trunc_normal_(self.gate.weight, std=std, a=-3 * std, b=3 * std)

    def init_state(self, batch_size: int) -> AttentionState:
        """No keys yet."""
        return empty_cache(self.project, batch_size)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """x [B, T, D] -> y [B, T, D] and the grown cache; see `Mixer.forward`."""
        q, k, v = self.project(x)
        q, state, start = extend_cache(q, k, v, state, self.config.rope_theta, mask, document_ids)
        dropout_p = self.config.dropout if self.training else 0.0
        heads = differential_attention(q, state.k, state.v, self.gate(x).sigmoid(), start=start, dropout_p=dropout_p)
        return self.project.out(heads), state

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """{"before": first map, "after": the difference}, [B, H, T, T]."""
        first, second = _pair_maps(self.project, x, self.config.rope_theta)
        return {"before": first, "after": first - self.gate(x).sigmoid().transpose(1, 2)[..., None] * second}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS norm over the last axis, in fp32 (fp64 for fp64 input), cast back."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _pair_maps(project: Projections, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """The two softmax maps of every pair, each [B, pairs, T, T]."""
    q, k, v = project(x)
    q, state, _ = extend_cache(q, k, v, None, theta, None, None)
    seen = visible(x.shape[1], x.shape[1], device=x.device)
    q, k = q.transpose(1, 2), state.k.transpose(1, 2)
    n_pairs = q.shape[1] // 2
    q = q.unflatten(1, (n_pairs, 2))
    k = k.unflatten(1, (-1, 2)) if state.v.shape[2] * 2 == k.shape[1] else k[:, :, None].expand(-1, -1, 2, -1, -1)
    k = k.repeat_interleave(n_pairs // k.shape[1], dim=1)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    first, second = logits.masked_fill(~seen, float("-inf")).softmax(-1).unbind(2)
    return first, second
