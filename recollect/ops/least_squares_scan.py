"""Regularised least squares over the past, solved exactly at every token (the Mesa layer).

Axis legend: B batch, T time, H heads, K key dim, V value dim, N tiles, C tokens of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import tiles
from recollect.ops.decay import decay_matrix

# A tile holds one K x K matrix per token, and makes them with C^2 K^2 multiplications: short tiles.
LARGEST_TILE = 16


def least_squares_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    eta: Tensor | None = None,
    ridge: float | Tensor = 1.0,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    tile: int = 16,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The memory that fits all (decayed) pairs so far in the ridge-regression sense, read at q.

    G_t = a_t G_{t-1} + eta_t v_t k_t^T, P_t = a_t P_{t-1} + eta_t k_t k_t^T, y_t = G_t (P_t + Diag(ridge))^-1 q_t, a = exp(log_decay).
    The systems are solved by Cholesky factorisation, K^3/6 multiplications a token and head (the paper iterates conjugate gradients).
    Gradients are first order: there are none of gradients.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        log_decay: <= 0, None (no decay) or [B, T, H].
        state: (G [B, H, V, K], P [B, H, K, K]) before the first token; None: zeros.
        eta: >= 0, the weight of each pair, None (1) or [B, T, H].
        ridge: > 0, a number or [H, K]; the smaller, the closer the fit and the worse the conditioning.
        reset: bool [B, T], true at the first token of a document: the state before it is forgotten.
        valid: bool [B, T], false at padding: it leaves the state as it is, its y is 0, its content has no effect.
        tile: tokens that are computed at once, >= 1 (at most 16 are); no effect on the result.
        backend: None or "chunked", or "sequential".
    Returns:
        y [B, T, H, V] in q's dtype, and (G, P) after the last token, in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: shapes that do not fit, an unknown backend, a ridge number that is not positive.
        torch.linalg.LinAlgError: a system that is not positive definite (a ridge tensor or eta with negative entries).
    Source: von Oswald et al. 2025, arXiv 2506.05233.
    """
    tiles.check_tokens(q, k, v, reset, valid)
    tiles.check_shape("log_decay", log_decay, q.shape[:3])
    tiles.check_shape("eta", eta, q.shape[:3])
    n_rows, n_tokens, n_heads, key_dim = q.shape
    dtype = q.dtype
    if isinstance(ridge, Tensor):
        tiles.check_shape("ridge", ridge, (n_heads, key_dim))
        ridge = ridge.to(tiles.computing_dtype(q))
    elif ridge <= 0:
        raise ValueError(f"ridge must be positive, else the systems are singular; got {ridge}")
    else:
        ridge = q.new_full((n_heads, key_dim), ridge, dtype=tiles.computing_dtype(q))
    cross, square = (None, None) if state is None else state
    cross = tiles.first_state(cross, (n_rows, n_heads, v.shape[-1], key_dim), q, "G")
    square = tiles.first_state(square, (n_rows, n_heads, key_dim, key_dim), q, "P")
    reset = tiles.real_resets(reset, valid)
    log_decay = tiles.real_log_decay(log_decay, q, valid, reset)
    q, k, v = (tiles.real_part(x, valid) for x in (q, k, v))
    written = k if eta is None else k * tiles.real_part(eta, valid)[..., None]
    if tiles.runs_sequentially(backend, n_tokens, tile):
        y, cross, square = _by_tokens(q, k, v, written, log_decay, ridge, cross, square, reset)
    else:
        size = min(tile, n_tokens, LARGEST_TILE)
        y, cross, square = _by_tiles(q, k, v, written, log_decay, ridge, cross, square, reset, size)
    return y.to(dtype), (cross, square)


def _by_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    written: Tensor,
    log_decay: Tensor,
    ridge: Tensor,
    cross: Tensor,
    square: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    decay, ridge = log_decay.exp()[..., None, None], torch.diag_embed(ridge)
    outputs = []
    for t, (q_t, k_t, v_t, key_t, decay_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, written, decay)), strict=True)):
        if reset is not None:
            cross, square = (tiles.blank(part, reset[:, t, None, None, None]) for part in (cross, square))
        cross = cross * decay_t + v_t[..., :, None] * key_t[..., None, :]
        square = square * decay_t + k_t[..., :, None] * key_t[..., None, :]
        outputs.append((cross @ torch.linalg.solve(square + ridge, q_t[..., None])).squeeze(-1))
    return torch.stack(outputs, 1), cross, square


def _by_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    written: Tensor,
    log_decay: Tensor,
    ridge: Tensor,
    cross: Tensor,
    square: Tensor,
    reset: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens, breaks = q.shape[1], tiles.find_breaks(reset, size)
    c = tiles.decay_from_start(log_decay, size, breaks)
    q, k, v, written = (tiles.to_tiles(x, size) for x in (q, k, v, written))
    weights = tiles.blank(decay_matrix(c.squeeze(-1)), breaks.between)
    from_start = tiles.blank(c.exp(), breaks.before)
    reaching = tiles.blank(written * tiles.decay_to_end(c), breaks.after)
    end = tiles.blank(c[..., -1:, :].exp(), breaks.within)
    crosses, cross = tiles.carry(cross, end, v.mT @ reaching)
    squares, square = tiles.carry(square, end, k.mT @ reaching)
    # One tile at a time: all K x K systems of a sequence would not fit in memory.
    per_tile = zip(*(part.unbind(2) for part in (q, k, written, weights, from_start, squares)), strict=True)
    solved = torch.stack([_Solve.apply(*parts, ridge) for parts in per_tile], 2)
    y = from_start * (solved @ crosses.mT) + (weights * (solved @ written.mT)) @ v
    return tiles.from_tiles(y, n_tokens), cross, square


class _Solve(torch.autograd.Function):
    """x_t = (P_t + Diag(ridge))^-1 q_t for the tokens of one tile, P_t = from_start_t square + sum_i weights[t, i] k_i written_i^T.

    q, k, written, x: [B, H, C, K]; weights: [B, H, C, C]; from_start: [B, H, C, 1]; square: [B, H, K, K]; ridge: [H, K]. Backward
    solves for the gradient with the same systems, made again, and so keeps no K x K matrix; d P_t = -dq_t x_t^T has rank one.
    """

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        x = _solve(*inputs)
        ctx.save_for_backward(x, *inputs)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, _, *system = ctx.saved_tensors
        d_q = _solve(grad, *system)
        with torch.enable_grad():
            system = [part.detach().requires_grad_() for part in system]
            k, written, weights, from_start, square, ridge = system
            applied = (weights * (x @ written.mT)) @ k + from_start * (x @ square.mT) + ridge[:, None] * x
        return d_q, *torch.autograd.grad(applied, system, -d_q)


def _solve(q: Tensor, k: Tensor, written: Tensor, weights: Tensor, from_start: Tensor, square: Tensor, ridge: Tensor) -> Tensor:
    """x of `_Solve` by Cholesky factorisation."""
    pairs = (k[..., :, None] * written[..., None, :]).flatten(-2)
    systems = (weights @ pairs).unflatten(-1, (q.shape[-1], -1))
    systems += from_start[..., None] * square[..., None, :, :]
    systems.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    return torch.cholesky_solve(q[..., None], torch.linalg.cholesky(systems)).squeeze(-1)
