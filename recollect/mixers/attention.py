"""Softmax attention: the Transformer's mixer, with rotary positions, grouped key-value heads and an optional sliding window.

Axis legend: B batch, T time, S cached keys, D model dim, H heads, Hkv key-value heads, K head dim.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from torch import Tensor, nn

from recollect.mixers.base import Mixer, MixerConfig, register
from recollect.mixers.place import Place, locate, origin
from recollect.ops.attention import rotary, softmax_attention, visible
from recollect.ops.growing import appended
from recollect.ops.multi_token import scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig(MixerConfig):
    """Options that every attention-like mixer has.

    Attributes:
        n_kv_heads: key-value heads Hkv, a divisor of n_heads; None: n_heads.
        head_dim: K, even; None: dim / n_heads.
        rope_theta: base of the rotary wavelengths (1e5 as in the Multi-Token Attention paper; raise it for longer contexts).
        dropout: of the attention weights, in training.
    """

    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 1e5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        dim, n_heads, size = self.dim, self.n_heads, self.head_dim or self.dim // self.n_heads
        if self.head_dim is None and dim % n_heads:
            raise ValueError(f"n_heads must divide dim: dim={dim}, n_heads={n_heads}")
        if size < 2 or size % 2:
            raise ValueError(f"rotary positions need an even head dim; got {size} (dim={dim}, n_heads={n_heads})")
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or n_heads % self.n_kv_heads):
            raise ValueError(f"n_kv_heads must divide n_heads: n_heads={n_heads}, n_kv_heads={self.n_kv_heads}")
        if not 0.0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be positive and finite; got {self.rope_theta}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout lies in [0, 1); got {self.dropout}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(HeadConfig):
    """Options of softmax attention: those of `HeadConfig`, and

    Attributes:
        window: keys that a query sees, its own included; None: all. The state then keeps window - 1 keys.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ValueError(f"window counts the keys a query sees, its own included: at least 1; got {self.window}")


class AttentionState(NamedTuple):
    """Keys and values so far, [B, S, Hkv, K], keys after rotation, and where the next token stands."""

    k: Tensor
    v: Tensor
    place: Place


@register(
    "attention",
    config=AttentionConfig,
    summary="softmax attention (Transformer)",
    source="arXiv 1706.03762",
    state="2 Hkv K numbers per token",
)
@register(
    "sliding_window",
    config=AttentionConfig,
    options={"window": 128},
    summary="softmax attention over the last `window` tokens",
    source="arXiv 2004.05150",
    state="constant: 2 (window - 1) Hkv K numbers",
)
class Attention(Mixer):
    """Softmax attention.

    Source: Vaswani et al. 2017, arXiv 1706.03762; rotary positions: arXiv 2104.09864; grouped heads: arXiv 2305.13245.
    """

    config: AttentionConfig

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.project = Projections(config.dim, config.n_heads, config.n_kv_heads, config.head_dim)

    def reset_parameters(self) -> None:
        """Fresh weights (see `Projections`)."""
        self.project.reset_parameters()

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
        out = softmax_attention(
            q, state.k, state.v, start=start, window=self.config.window, dropout_p=self.config.dropout if self.training else 0.0
        )
        return self.project.out(out), forget_outside(state, self.config.window)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """{"attention": weights [B, H, T, T]}."""
        q, k, v = self.project(x)
        q, state, _ = extend_cache(q, k, v, None, self.config.rope_theta, None, None)
        seen = visible(x.shape[1], x.shape[1], window=self.config.window, device=x.device)
        return {"attention": scores(q, state.k, q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)}


class Projections(nn.Module):
    """Linear maps without bias: D -> q [H, K], k [Hkv, K], v [Hkv, V], and heads -> D.

    Weights start truncated-normal with std D^(-1/2), cut at 3 std (arXiv 2504.00927's code).
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        n_value_heads: int | None = None,
    ) -> None:
        """n_value_heads: value heads if not n_kv_heads; values then share n_kv_heads * K channels among fewer, wider heads."""
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        self.n_value_heads = n_value_heads or self.n_kv_heads
        self.head_dim = head_dim or dim // n_heads
        self.q = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.k = nn.Linear(dim, self.n_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, self.n_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        std = self.q.in_features**-0.5
        for layer in (self.q, self.k, self.v, self.o):
            nn.init.trunc_normal_(layer.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> q [B, T, H, K], k [B, T, Hkv, K], v [B, T, n_value_heads, V].

        Raises:
            ValueError: x is not [B, T, D].
        """
        if x.dim() != 3 or x.shape[-1] != self.q.in_features:
            raise ValueError(f"x is [B, T, D] with D={self.q.in_features}; got {tuple(x.shape)}")
        return (
            self.q(x).unflatten(-1, (self.n_heads, -1)),
            self.k(x).unflatten(-1, (self.n_kv_heads, -1)),
            self.v(x).unflatten(-1, (self.n_value_heads, -1)),
        )

    def out(self, heads: Tensor) -> Tensor:
        """heads [B, T, H, V] -> [B, T, D]."""
        return self.o(heads.flatten(2))


def empty_cache(project: Projections, batch_size: int) -> AttentionState:
    """A cache without keys, in the projections' dtype and on their device."""
    weight = project.k.weight
    k = weight.new_empty(batch_size, 0, project.n_kv_heads, project.head_dim)
    v = weight.new_empty(batch_size, 0, project.n_value_heads, project.n_kv_heads * project.head_dim // project.n_value_heads)
    return AttentionState(k, v, origin(batch_size, weight.device))


def extend_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState | None,
    theta: float,
    mask: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, AttentionState, Tensor | None]:
    """Rotate q and k and append k, v to the cache: returns rotated q, the longer cache, and each query's first visible key."""
    batch_size, n_tokens = q.shape[:2]
    n_cached = 0 if state is None else state.k.shape[1]
    place = None if state is None else state.place
    positions, start, place = locate(place, n_cached, n_tokens, batch_size, q.device, mask, document_ids)
    q, k = rotary(q, positions, theta=theta), rotary(k, positions, theta=theta)
    if state is not None and n_cached:
        k, v = appended(state.k, k), appended(state.v, v)
    return q, AttentionState(k, v, place), start


def forget_outside(state: AttentionState, window: int | None) -> AttentionState:
    """Drop the keys that no later query will see."""
    surplus = 0 if window is None else max(0, state.k.shape[1] - (window - 1))
    if not surplus:
        return state
    place = state.place._replace(start=(state.place.start - surplus).clamp(min=0))
    return AttentionState(state.k[:, surplus:], state.v[:, surplus:], place)
