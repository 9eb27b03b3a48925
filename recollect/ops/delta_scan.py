"""The delta-rule family: a decayed matrix state with a rank-one transition per token.

With u_t = strength_t * (S_{t-1} a_t) the state is a sum of decayed outer products u_i b_i^T + v_i k_i^T. Inside a tile that starts
from S, row t of U (all u_t) reads the rows before it, so with the strictly lower triangular, decayed score matrices of a against b
and of a against k:

    (I - strength A_ab) U = strength (A S^T + A_ak V)

One triangular solve gives U = W S^T + U_0 for all tiles at once (the WY form): the tile's effect on the state is then a matrix,
S <- S M + N, and only that product runs from tile to tile. A strength per value row has one system per row, solved in the loop.

Axis legend: B batch, T time, H heads, K key dim, V value dim, N tiles, C tokens of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops import tiles
from recollect.ops.decay import decay_matrix, decayed_scores

# One C x C system per value row costs C/K of all the other work: short tiles.
ROW_TILE = 16


class _Tiles(NamedTuple):
    """All tiles of a sequence. Rows: what reads the tile's first state. Columns: what reaches the state after the tile.

    Attributes:
        q, a: [B, H, N, C, K], decayed from the tile's start (a before its own token's decay).
        k, b: [B, H, N, C, K], decayed to the tile's end.
        v, strength: [B, H, N, C, V] and [B, H, N, C, 1 or V].
        qk, qb, ak, ab: [B, H, N, C, C], decayed scores.
        decay: [B, H, N, 1, K or 1], of the state over the whole tile.
    """

    q: Tensor
    a: Tensor
    k: Tensor
    b: Tensor
    v: Tensor
    strength: Tensor
    qk: Tensor
    qb: Tensor
    ak: Tensor
    ab: Tensor
    decay: Tensor


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    strength: Tensor | None = None,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    floor: float | None = None,
    tile: int = 32,
    products: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} Diag(exp(log_decay_t)) + (strength_t * (S_{t-1} a_t)) b_t^T + v_t k_t^T, y_t = S_t q_t.

    DeltaNet: a = k, b = -beta k, write key beta k. Gated DeltaNet: b = -alpha beta k. RWKV-7: a = kappa, b = -(rate * kappa) and a
    write key of its own. Longhorn: a = k, b = -k, a strength and values per row.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V]. k is the write key.
        a, b: [B, T, H, K], where the state is read and where that is added.
        log_decay: <= 0, any size: None (no decay), [B, T, H] or, per key channel, [B, T, H, K].
        state: S before the first token, [B, H, V, K]; None: zeros.
        strength: None (1), [B, T, H], or one per value row [B, T, H, V] (several times as expensive).
        reset: bool [B, T], true at the first token of a document: the state before it is forgotten.
        valid: bool [B, T], false at padding: it leaves the state as it is, its y is 0, its content has no effect.
        floor: the most negative log decay one token can have, if known; None: any. Saves time for decays per channel.
        tile: tokens that are computed at once, >= 1; no effect on the result.
        products: the dtype that matrix products may be taken in where another than fp32 is faster; None: that of the most precise of
            q, k and v, or autocast's. Only "fla" takes them in bf16 or fp16.
        backend: None (the best that can run here), "chunked", "sequential", "triton" (the token loop on a GPU) or "fla" (the kernels
            of flash-linear-attention, if installed).
    Returns:
        y [B, T, H, V] in q's dtype, and S after the last token, [B, H, V, K], in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: shapes that do not fit, an unknown backend.
        RuntimeError: the named backend cannot run on these inputs.
    Source: Yang et al. 2024, arXiv 2406.06484 (chunk form) and 2412.06464 (with decay); Peng et al. 2025, arXiv 2503.14456.
    """
    products = products or tiles.products_dtype(q, k, v)
    return _scan(q, k, v, a, b, log_decay, state, strength, None, reset, valid, floor, tile, products, backend)


def delta_rule_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    floor: float | None = None,
    tile: int = 32,
    products: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The exact delta rule, after a decay: S' = S_{t-1} Diag(exp(log_decay_t)), S_t = S' - beta_t (S' k_t - v_t) k_t^T, y_t = S_t q_t.

    `delta_scan` with the write key beta k, a = exp(log_decay) k and b = -beta k; there are kernels for this rule that are not for any.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        beta: [B, T, H], the step.
        log_decay, state, reset, valid, floor, tile, products, backend: as in `delta_scan`.
    Returns, Raises: as `delta_scan`.
    Source: DeltaNet, Yang et al. 2024, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464 (a decay per head); Kimi Delta Attention,
    arXiv 2510.26692 (one per key channel).
    """
    tiles.check_tokens(q, k, v, reset, valid)
    tiles.check_shape("beta", beta, q.shape[:3])
    tiles.check_shape("log_decay", log_decay, q.shape[:3], q.shape)
    products = products or tiles.products_dtype(q, k, v)
    k, beta = tiles.real_part(k, valid), tiles.real_part(beta, valid)
    read, write = k, beta[..., None] * k
    if log_decay is not None:
        log_decay = tiles.real_part(log_decay, valid)
        read = k * (log_decay if log_decay.dim() == 4 else log_decay[..., None]).exp()
    rule = (k, beta)
    return _scan(q, write, v, read, -write, log_decay, state, None, rule, reset, valid, floor, tile, products, backend)


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    strength: Tensor | None,
    rule: tuple[Tensor, Tensor] | None,
    reset: Tensor | None,
    valid: Tensor | None,
    floor: float | None,
    tile: int,
    products: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`delta_scan`, which in the case of `delta_rule_scan` is told the rule's own key and beta as well."""
    tiles.check_tokens(q, k, v, reset, valid)
    if q.shape[1] > tiles.SLAB:

        def slab(carried: Tensor | None, *parts: Tensor | None) -> tuple[Tensor, Tensor]:
            q, k, v, a, b, log_decay, strength, key, beta, reset, valid = parts
            assert q is not None
            assert k is not None
            assert v is not None
            assert a is not None
            assert b is not None
            rule = None if key is None or beta is None else (key, beta)
            return _scan(q, k, v, a, b, log_decay, carried, strength, rule, reset, valid, floor, tile, products, backend)

        return tiles.by_slabs(slab, state, q, k, v, a, b, log_decay, strength, *(rule or (None, None)), reset, valid)
    tiles.check_shape("a", a, q.shape)
    tiles.check_shape("b", b, q.shape)
    tiles.check_shape("log_decay", log_decay, q.shape[:3], q.shape)
    tiles.check_shape("strength", strength, q.shape[:3], v.shape)
    n_rows, n_tokens, n_heads, key_dim = q.shape
    state = tiles.first_state(state, (n_rows, n_heads, v.shape[-1], key_dim), q)
    reset = tiles.real_resets(reset, valid)
    decays, log_decay = log_decay is not None, tiles.real_log_decay(log_decay, q, valid, reset)
    dtype, (q, k, v, a, b) = q.dtype, (tiles.real_part(x, valid) for x in (q, k, v, a, b))
    strength = q.new_ones(q.shape[:3]) if strength is None else tiles.real_part(strength, valid)
    strength = strength[..., None] if strength.dim() == 3 else strength
    call = tiles.Recurrence(q, k, v, a, b, log_decay, strength, state, reset, False, decays, products, floor, rule)
    if (found := tiles.by_faster_form(backend, call)) is not None:
        return found[0].to(dtype), found[1]
    if tiles.runs_sequentially(backend, n_tokens, tile):
        y, state = _by_tokens(q, k, v, a, b, log_decay, strength, state, reset)
        return y.to(dtype), state
    by_rows = strength.shape[-1] > 1
    size = min(tile, n_tokens, ROW_TILE) if by_rows else min(tile, n_tokens)
    every = _prepare(q, k, v, a, b, log_decay, strength, reset, floor, size)
    y, state = _solve_by_rows(every, state) if by_rows else _solve(every, state)
    return tiles.from_tiles(y, n_tokens).to(dtype), state


def _by_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    state: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp()
    decay = decay[..., None, None] if decay.dim() == 3 else decay[..., None, :]
    outputs = []
    per_token = zip(*(x.unbind(1) for x in (q, k, v, a, b, decay, strength)), strict=True)
    for t, (q_t, k_t, v_t, a_t, b_t, decay_t, strength_t) in enumerate(per_token):
        if reset is not None:
            state = tiles.blank(state, reset[:, t, None, None, None])
        read = strength_t * (state @ a_t[..., None]).squeeze(-1)
        state = state * decay_t + read[..., :, None] * b_t[..., None, :] + v_t[..., :, None] * k_t[..., None, :]
        outputs.append((state @ q_t[..., None]).squeeze(-1))
    return torch.stack(outputs, 1), state


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    reset: Tensor | None,
    floor: float | None,
    size: int,
) -> _Tiles:
    """The scores and decays of every tile of `size` tokens."""
    breaks = tiles.find_breaks(reset, size)
    c = tiles.decay_from_start(log_decay, size, breaks)
    q, k, v, a, b, strength = (tiles.to_tiles(x, size) for x in (q, k, v, a, b, strength))
    qk, qb, ak, ab = (tiles.blank(scores, breaks.between) for scores in _scores(q, k, a, b, c, floor))
    end, to_end = c[..., -1:, :], tiles.decay_to_end(c)
    before = torch.cat([torch.zeros_like(end), c[..., :-1, :]], -2).exp()
    return _Tiles(
        q=tiles.blank(q * c.exp(), breaks.before),
        a=tiles.blank(a * before, breaks.before),
        k=tiles.blank(k * to_end, breaks.after),
        b=tiles.blank(b * to_end, breaks.after),
        v=v,
        strength=strength,
        qk=qk,
        qb=qb,
        ak=ak,
        ab=ab,
        decay=tiles.blank(end.exp(), breaks.within),
    )


def _scores(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, c: Tensor, floor: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q against k and b with the decay of token t, a against k and b before it (strict): four [B, H, N, C, C]."""
    size = q.shape[-2]
    if c.shape[-1] == 1:
        c = c.squeeze(-1)
        scores = torch.cat([q, a], -2) @ torch.cat([k, b], -2).mT
        from_q, from_a = scores.split(size, -2)
        qk, qb = (from_q.unflatten(-1, (2, size)) * decay_matrix(c)[..., None, :]).unbind(-2)
        ak, ab = (from_a.unflatten(-1, (2, size)) * decay_matrix(c, strict=True)[..., None, :]).unbind(-2)
        return qk, qb, ak, ab
    columns = torch.stack([k, b])
    qk, qb = decayed_scores(q, columns, c, floor=floor)
    ak, ab = decayed_scores(a, columns, c, floor=floor, strict=True)
    return qk, qb, ak, ab


def _solve(x: _Tiles, state: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, N, C, V] and the last state, one strength per token: all tiles' systems at once, one product per tile for the state."""
    sides = x.strength * torch.cat([x.a, x.ak @ x.v], -1)
    # Unit triangular: the diagonal of -strength A_ab is taken as 1, its zeros are never read.
    w, u = torch.linalg.solve_triangular(-x.strength * x.ab, sides, upper=False, unitriangular=True).split(
        [x.a.shape[-1], x.v.shape[-1]], -1
    )
    transitions = (torch.diag_embed(x.decay.squeeze(-2).expand(*x.a.shape[:-2], x.a.shape[-1])) + w.mT @ x.b).unbind(2)
    added = (u.mT @ x.b + x.v.mT @ x.k).unbind(2)
    starts = []
    for transition, new in zip(transitions, added, strict=True):
        starts.append(state)
        state = state @ transition + new
    y = (x.q + x.qb @ w) @ torch.stack(starts, 2).mT + x.qk @ x.v + x.qb @ u
    return y, state


def _solve_by_rows(x: _Tiles, state: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, N, C, V] and the last state, one strength per token and value row: one system per row."""
    sides, added = x.strength * (x.ak @ x.v), x.v.mT @ x.k
    per_tile = (x.a, x.b, x.ab, x.strength, x.decay, sides, added)
    starts, reads = [], []
    for a, b, ab, strength, decay, side, new in zip(*(part.unbind(2) for part in per_tile), strict=True):
        starts.append(state)
        systems = strength.mT[..., None] * -ab[..., None, :, :]
        right = (strength * (a @ state.mT) + side).mT[..., None]
        u = torch.linalg.solve_triangular(systems, right, upper=False, unitriangular=True).squeeze(-1)
        reads.append(u.mT)
        state = state * decay + u @ b + new
    y = x.q @ torch.stack(starts, 2).mT + x.qk @ x.v + x.qb @ torch.stack(reads, 2)
    return y, state
