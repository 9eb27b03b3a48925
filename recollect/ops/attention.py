"""Softmax attention, rotary positions, and differential attention.

Axis legend: B batch, T queries, S keys (the queries are the last T of the S positions), H query heads, Hkv key-value heads,
K key dim, V value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, *, theta: float = 1e5) -> Tensor:
    """Rotary position embedding on interleaved pairs (0, 1), (2, 3), ...

    Args:
        x: [B, T, H, K], K even.
        positions: int [T] or [B, T], tokens from the start of the sequence.
        theta: base of the wavelengths; pair c turns by position * theta^(-2c/K) radians.
    Returns:
        [B, T, H, K] in x's dtype; angles in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: K is odd.
    Source: Su et al. 2021, arXiv 2104.09864.
    """
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary positions turn pairs of channels: the head dim must be even, got {size}")
    exact = torch.promote_types(x.dtype, torch.float32)
    inverse = theta ** (-torch.arange(0, size, 2, device=x.device, dtype=exact) / size)
    angle = positions.to(exact)[..., None, None] * inverse
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.to(exact).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def visible(n_queries: int, n_keys: int, *, start: Tensor | None = None, window: int | None = None, device=None) -> Tensor:
    """Which keys each query sees: causal, its own document, at most `window` keys.

    Args:
        n_queries, n_keys: T and S; query t stands at position S - T + t.
        start: int [B, T], first visible key of each query (None: 0).
        window: number of keys seen, the query's own included (None: all).
    Returns:
        bool [T, S], or [B, 1, T, S] when `start` is given.
    """
    row = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    column = torch.arange(n_keys, device=device)
    seen = column <= row
    if window is not None:
        seen = seen & (column > row - window)
    return seen if start is None else seen & (column >= start[:, None, :, None])


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    start: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal softmax attention by `scaled_dot_product_attention`.

    Args:
        q: [B, T, H, K], the last T of the S positions.
        k: [B, S, Hkv, K], v: [B, S, Hkv, V]; Hkv divides H, consecutive query heads share a key-value head.
        scale: factor on the logits; default K^(-1/2).
        start: int [B, T], first visible key of each query (documents, left padding); None: 0. Must not exceed the query's position.
        window: number of keys seen, the query's own included; None: all.
        dropout_p: dropout of the attention weights, in [0, 1); drawn from torch's global generator.
    Returns:
        [B, T, H, V].
    Raises:
        ValueError: shapes that do not fit.
    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    check_shapes(q, k, v)
    n_queries, n_keys = q.shape[1], k.shape[1]
    plain = start is None and (window is None or window >= n_keys)
    causal = plain and n_queries == n_keys and n_queries > 1
    mask = None
    if not causal and not (plain and n_queries == 1):
        mask = visible(n_queries, n_keys, start=start, window=window, device=q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    scale: float | None = None,
    start: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The difference of two softmax attentions, `attention_1 - lam * attention_2`, per pair of query heads.

    Pair m is made of query heads 2m and 2m + 1 and reads key-value head m // (H / Hkv). Version 1 gives each map its own keys
    (2 Hkv key heads) and twice as wide values; version 2 shares the keys.

    Args:
        q: [B, T, 2H, K], the last T of the S positions.
        k: [B, S, 2Hkv, K] (version 1; key heads 2g and 2g + 1 belong to group g) or [B, S, Hkv, K] (version 2).
        v: [B, S, Hkv, V].
        lam: broadcastable to [B, T, H].
        scale, start, dropout_p: as in `softmax_attention`.
    Returns:
        [B, T, H, V].
    Raises:
        ValueError: an odd number of query heads, or shapes that do not fit.
    Source: Ye et al. 2024, arXiv 2410.05258, Eq. 1; version 2: Microsoft unilm, Diff-Transformer-V2.
    """
    if q.shape[2] % 2:
        raise ValueError(f"differential attention pairs query heads: their number must be even, got {q.shape[2]}")
    n_pairs, n_groups = q.shape[2] // 2, v.shape[2]
    if k.shape[2] not in (n_groups, 2 * n_groups) or n_pairs % n_groups:
        raise ValueError(
            f"k needs Hkv or 2 Hkv heads and Hkv must divide H: q {q.shape[2]}, k {k.shape[2]}, v {v.shape[2]} heads"
        )
    first, second = q.unflatten(2, (n_pairs, 2)).unbind(3)
    if k.shape[2] == 2 * n_groups:
        key_first, key_second = k.unflatten(2, (n_groups, 2)).unbind(3)
    else:
        key_first = key_second = k
    # The fused kernels want values as wide as keys: wider values go through in slices of K.
    width = q.shape[-1]
    parts = [
        softmax_attention(first, key_first, piece, scale=scale, start=start, dropout_p=dropout_p)
        - lam[..., None].to(v.dtype)
        * softmax_attention(second, key_second, piece, scale=scale, start=start, dropout_p=dropout_p)
        for piece in v.split(width, dim=-1)
    ]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError, naming the sizes, unless q [B, T, H, K], k [B, S, Hkv, K], v [B, S, Hkv, V] fit with T <= S and Hkv | H."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v are [B, T, H, K]; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must share the key dim: q has K={q.shape[-1]}, k has K={k.shape[-1]}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q, k, v must share the batch, k and v also length and heads: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"the queries are the last T of the S keys: T={q.shape[1]} exceeds S={k.shape[1]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"key-value heads must divide query heads: {q.shape[2]} query heads, {k.shape[2]} key-value heads")
