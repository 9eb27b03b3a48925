"""Sums over the past of a tile, weighted by products of per-token decays, as matrix products that cannot overflow.

The weight of token i at token t is exp(c[t] - c[i]), c the cumulative log decay. One decay per head is a matrix that multiplies the
scores. A decay per channel has to enter the matrix product as a factor of either side, and exp(-c[i]) overflows. So the tile is
halved again and again: between the later and the earlier half both sides are taken relative to the later half's first token, where
both exponents are <= 0; a single token is a dot product. If the caller knows a floor of the decay that keeps exp(-c[i]) in range, one
product of the whole tile does the same. References are past tokens and zeros are exact: no bit of a result depends on the future.

Documents: `cumulative_log_decay` can begin anew at each document of a tile, so that no bit depends on another document. c then rises
between documents; what is computed across that rise is finite and of no meaning, and the caller masks it.

Axis legend: C tokens of a tile, K channels, V value channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest exponent in the product of a whole tile: exp(60) leaves fp32 a factor 1e12 below its largest number.
SAFE_EXPONENT = {torch.float32: 60.0, torch.float64: 600.0}
# exp() of anything below is exactly 0 (half the smallest denormal number).
UNDERFLOW = {torch.float32: -104.0, torch.float64: -746.0}
# Up to this many rows, broadcast multiply-and-sum is faster than a batch of tiny matrix products.
TINY = 2


def cumulative_log_decay(log_decay: Tensor, *, dim: int, document: Tensor | None = None) -> Tensor:
    """Inclusive cumulative sum of log decays along `dim`, the c of this file.

    Decays that underflow to 0 are summed as if they were at the edge of underflow: they stay exactly 0, and the sum keeps the digits
    in which later tokens differ (after a log decay of -1e4, fp32 resolves 1e-3; after -104, 1e-5).

    Args:
        log_decay: <= 0, fp32 or fp64, any shape.
        dim: the time axis of one tile.
        document: int, broadcastable to log_decay, equal for tokens of one document: the sum begins anew at each (None: one document).
    Returns:
        same shape, non-increasing along `dim` within a document.
    """
    c = log_decay.clamp(min=UNDERFLOW[log_decay.dtype])
    if document is None:
        return c.cumsum(dim)
    # Doubling: after the step of length n, c is the sum over the last 2n tokens of the own document.
    dim = dim if dim < 0 else dim - c.dim()  # counted from the right, document's leading axes may be fewer
    n, size = 1, c.shape[dim]
    while n < size:
        other = document.narrow(dim, n, size - n) != document.narrow(dim, 0, size - n)
        c = torch.cat(
            [c.narrow(dim, 0, n), c.narrow(dim, n, size - n) + c.narrow(dim, 0, size - n).masked_fill(other, 0.0)], dim
        )
        n *= 2
    return c


def decay_matrix(c: Tensor, *, strict: bool = False) -> Tensor:
    """exp(c[t] - c[i]) for i <= t, exactly 0 elsewhere.

    Args:
        c: [..., C], inclusive cumulative log decay.
        strict: exp(c[t-1] - c[i]) for i < t instead: the weights before token t's own decay.
    Returns:
        [..., C, C], rows t, columns i, values in [0, 1].
    """
    rows = _row_logs(c[..., None], strict)
    return _weight(rows - c[..., None, :], future=~_past(c.shape[-1], strict, c.device))


def decayed_scores(x: Tensor, f: Tensor, c: Tensor, *, floor: float | None = None, strict: bool = False) -> Tensor:
    """out[t, i] = sum_k x[t, k] f[i, k] exp(c[t, k] - c[i, k]) for i <= t, exactly 0 elsewhere.

    Args:
        x, f: [..., C, K], fp32 or fp64; their leading axes broadcast, those of c to the result.
        c: inclusive cumulative log decay of the tile: [..., C] (one for all channels, one axis fewer than x) or [..., C, K].
        floor: the most negative log decay that one token can have, if known (RWKV-7's gates: -exp(-1/2)); None: any. If C tokens of
            it stay in range, one matrix product is enough; a decay below it may then overflow.
        strict: sum_k x[t, k] f[i, k] exp(c[t-1, k] - c[i, k]) for i < t instead.
    Returns:
        [..., C, C]; without a floor finite, with finite gradients, for any log decays (-1e4 and below in fp32).
    Raises:
        ValueError: floor > 0.
    """
    n_tokens = x.shape[-2]
    if c.dim() == x.dim() - 1:
        return (x @ f.mT) * decay_matrix(c, strict=strict)
    if _in_range(n_tokens, floor, c.dtype):
        scores = (x * _row_logs(c, strict).exp()) @ (f * (-c).exp()).mT
        return scores.masked_fill(~_past(n_tokens, strict, c.device), 0.0)
    x, f, c = _fill(x), _fill(f), _fill_logs(c)
    rows = _row_logs(c, strict)
    scores, size = (x * f).sum(-1)[..., None, None], 1
    scores = torch.zeros_like(scores) if strict else scores
    while size < x.shape[-2]:
        start = _later(rows, size)[..., :1, :]
        row_factor, column_factor = _weight(_later(rows, size) - start), _weight(start - _earlier(c, size))
        cross = _products(_later(x, size) * row_factor, _earlier(f, size) * column_factor)
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        scores = torch.cat([F.pad(first, (0, size)), torch.cat([cross, second], -1)], -2)
        size *= 2
    return scores.squeeze(-3)[..., :n_tokens, :n_tokens]


def decayed_sum(scores: Tensor, g: Tensor, c: Tensor, *, floor: float | None = None) -> Tensor:
    """out[t, v] = sum_{i <= t} scores[t, i] exp(c[t, v] - c[i, v]) g[i, v].

    Args:
        scores: [..., C, C], exactly 0 above the diagonal.
        g: [..., C, V], fp32 or fp64; leading axes of scores and g broadcast, those of c to the result.
        c: inclusive cumulative log decay of the tile: [..., C] (one for all channels, one axis fewer than g) or [..., C, V].
        floor: as in `decayed_scores`.
    Returns:
        [..., C, V]; without a floor finite, with finite gradients, for any log decays.
    Raises:
        ValueError: floor > 0.
    """
    n_tokens = g.shape[-2]
    if c.dim() == g.dim() - 1:
        return (scores * decay_matrix(c)) @ g
    if _in_range(n_tokens, floor, c.dtype):
        return c.exp() * (scores @ (g * (-c).exp()))
    g, c = _fill(g), _fill_logs(c)
    missing = g.shape[-2] - n_tokens
    scores = F.pad(scores, (0, missing, 0, missing))
    out, size = (scores.diagonal(dim1=-2, dim2=-1)[..., None] * g)[..., None, :], 1
    while size < g.shape[-2]:
        log_later = _later(c, size)
        start = log_later[..., :1, :]
        columns = _earlier(g, size) * _weight(start - _earlier(c, size))
        read = _weight(log_later - start) * _weighted(_below_diagonal(scores, size), columns)
        first, second = out.unflatten(-3, (-1, 2)).unbind(-3)
        out = torch.cat([first, second + read], -2)
        size *= 2
    return out.squeeze(-3)[..., :n_tokens, :]


def _weight(log_weight: Tensor, future: Tensor | None = None) -> Tensor:
    """exp of log weights <= 0; positive ones, between documents, count as 0; exactly 0 where `future` is true."""
    log_weight = log_weight.clamp(max=0.0)
    return (log_weight if future is None else log_weight.masked_fill(future, -torch.inf)).exp()


def _in_range(n_tokens: int, floor: float | None, dtype: torch.dtype) -> bool:
    """Whether exp(-c) of n_tokens decays of at least `floor` stays far from overflow."""
    if floor is not None and floor > 0:
        raise ValueError(f"floor is the most negative log decay of one token, <= 0; got {floor}")
    return floor is not None and -floor * n_tokens <= SAFE_EXPONENT[dtype]


def _row_logs(c: Tensor, strict: bool) -> Tensor:
    """Cumulative log decay at which row t of c [..., C, K] reads: its own, or (strict) the one before; strict row 0 reads nothing."""
    return torch.cat([c[..., :1, :], c[..., :-1, :]], -2) if strict else c


def _past(size: int, strict: bool, device: torch.device) -> Tensor:
    """bool [size, size], true for i <= t (strict: i < t)."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if strict else 0)


def _products(x: Tensor, f: Tensor) -> Tensor:
    """x f^T, [..., s, s]."""
    if x.shape[-2] <= TINY:
        return (x[..., :, None, :] * f[..., None, :, :]).sum(-1)
    return x @ f.mT


def _weighted(scores: Tensor, g: Tensor) -> Tensor:
    """scores g for scores [..., s, s] and g [..., s, V]."""
    if g.shape[-2] <= TINY:
        return (scores[..., None] * g[..., None, :, :]).sum(-2)
    return scores @ g


def _fill(x: Tensor) -> Tensor:
    """x [..., C, K] with zeros up to the next power of two of tokens."""
    return F.pad(x, (0, 0, 0, _missing(x.shape[-2])))


def _fill_logs(c: Tensor) -> Tensor:
    """c [..., C, K] going on without decay up to the next power of two of tokens."""
    return torch.cat([c, c[..., -1:, :].expand(*c.shape[:-2], _missing(c.shape[-2]), c.shape[-1])], -2)


def _missing(n_tokens: int) -> int:
    return (1 << (n_tokens - 1).bit_length()) - n_tokens


def _earlier(x: Tensor, size: int) -> Tensor:
    """Blocks 0, 2, ... of `size` tokens of x [..., C, K] -> [..., C / (2 size), size, K]."""
    return x.unflatten(-2, (-1, size))[..., ::2, :, :]


def _later(x: Tensor, size: int) -> Tensor:
    """Blocks 1, 3, ... of `size` tokens of x [..., C, K] -> [..., C / (2 size), size, K]."""
    return x.unflatten(-2, (-1, size))[..., 1::2, :, :]


def _below_diagonal(scores: Tensor, size: int) -> Tensor:
    """Blocks (1, 0), (3, 2), ... of scores [..., C, C], where a later half reads an earlier one -> [..., C / (2 size), size, size]."""
    blocks = scores.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks[..., 1::2, :, ::2, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
