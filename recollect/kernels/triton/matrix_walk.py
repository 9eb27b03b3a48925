"""The matrix memory's walk over the pieces of one head of one batch element, forward and backward.

One program has a block of the matrix' rows (value channels), which never meet inside a chunk: all of them only where a bias or link
takes a norm over them. The matrix that is written and the one at the chunk's start stay in registers. Backward, a segment is computed
again from the state saved at its first piece, then its pieces are differentiated from the last to the first.
NOT YET MEASURED ON A GPU.

Axis legend: B batch, T time, H heads, K key dim, V value dim, P pieces, N blocks of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    LEAST,
    SCALED,
    SIMPLEX,
    channels,
    entry_power,
    factor_of,
    line,
    norm_of_units,
    phi,
    phi_back,
    product,
    put,
    put_line,
    put_square,
    shrunk,
    square,
    tokens_of,
)
from recollect.kernels.triton.perceptron_simplex import evened

SEGMENT = tl.constexpr(4)


@triton.jit
def rows_of(x, rows, VALUE: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr):
    """[BV, KW]: rows of a matrix, zeros beyond."""
    c = tl.arange(0, KW)[None, :]
    return tl.load(x + rows[:, None] * KEY + c, mask=(rows < VALUE)[:, None] & (c < KEY), other=0.0)


@triton.jit
def put_rows(x, rows, value, VALUE: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr):
    """Store what `rows_of` reads."""
    c = tl.arange(0, KW)[None, :]
    tl.store(x + rows[:, None] * KEY + c, value, mask=(rows < VALUE)[:, None] & (c < KEY))


@triton.jit
def some(x, row, real, rows, VALUE: tl.constexpr, WIDE: tl.constexpr):
    """[16, BV] of tokens' rows of x: the value channels `rows`, zeros beyond, or one number in all of them unless WIDE."""
    inside = real[:, None] & (rows < VALUE)[None, :]
    if WIDE:
        entries = tl.load(x + row[:, None] * VALUE + rows[None, :], mask=inside, other=0.0)
    else:
        entries = tl.where(inside, tl.load(x + row, mask=real, other=0.0)[:, None], 0.0)
    return entries


@triton.jit
def put_some(x, row, real, rows, value, VALUE: tl.constexpr):
    """Store what `some` reads, WIDE."""
    tl.store(x + row[:, None] * VALUE + rows[None, :], value, mask=real[:, None] & (rows < VALUE)[None, :])


@triton.jit
def norm_of(w, EXPONENT: tl.constexpr):
    """The l_q norm of a matrix, q = EXPONENT: in units of its largest entry, whose power may not be a number."""
    largest = tl.max(tl.abs(w))
    entry = w / tl.where(largest == 0, 1.0, largest)
    return norm_of_units(largest, tl.sum(entry * entry * entry_power(entry, EXPONENT - 2)), EXPONENT)


@triton.jit
def scaled_back(x, d_weights, norm, radius, factor, to_factor, EXPONENT: tl.constexpr):
    """From the gradients of a chunk's weights, the first matrix x times a factor, and of the factor to those of x and the radius."""
    size = norm + LEAST
    along = tl.where(radius <= size, (EXPONENT - 2) * factor * (to_factor + tl.sum(x * d_weights)), 0.0)
    unit = x * tl.where(norm > 0, 1 / tl.where(norm > 0, norm, 1.0), 0.0)
    return factor * d_weights - along / size * unit * entry_power(unit, EXPONENT - 2), along / radius


@triton.jit
def softmaxed(w, KEY: tl.constexpr, KW: tl.constexpr):
    """Link SIMPLEX: K softmax(row) - 1 of every row, the 1 being left to the values and outputs."""
    inside = (tl.arange(0, KW) < KEY)[None, :]
    powers = tl.exp(tl.where(inside, w, float("-inf")) - tl.max(tl.where(inside, w, float("-inf")), axis=1)[:, None])
    return tl.where(inside, powers * (KEY / tl.sum(powers, axis=1))[:, None] - 1, 0.0)


@triton.jit
def softmaxed_back(weights, d_weights, KEY: tl.constexpr, KW: tl.constexpr):
    """From the gradient of these weights to that of the matrix."""
    full = tl.where((tl.arange(0, KW) < KEY)[None, :], weights + 1, 0.0)
    return full * (d_weights - (tl.sum(full * d_weights, axis=1) / KEY)[:, None])


@triton.jit
def walk(
    order,
    entries,
    ends,
    k,
    v,
    delta,
    decayed,
    in_end,
    s,
    total,
    state,
    anchor,
    start,
    radius,
    open_kept,
    last,
    last_anchor,
    saved,
    written,
    factors,
    kept_before,
    y,
    n_tokens,
    n_heads,
    n_rows,
    n_slots,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    VALUE: tl.constexpr,
    BV: tl.constexpr,
    BIAS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_START: tl.constexpr,
    THRESHOLD: tl.constexpr,
    EXPONENT: tl.constexpr,
    LINK: tl.constexpr,
    LEARN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """decayed .. total: as `prepare` of `matrix_tokens` leaves them. state, anchor, last, last_anchor [B, H, V, K], start [H, V, K],
    radius [H]; saved [B, H, S, V, K]; written [B, T, H, V]: what the chunk's first weights give for keys. THRESHOLD: every full chunk
    ends with entries nearer to zero by it. With link SCALED, factors [B, H, P, 2]: that of the chunk's weights, and the norm it is of.
    With SIMPLEX, open_kept [B, H, K], the log of the decay in the open chunk before the call, and kept_before [B, H, P, K], the decay
    in the chunk before the piece; reads go through a frame of the chunk's weights (`perceptron_simplex`)."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, program % n_heads
    rows, area = tl.program_id(1) * BV + tl.arange(0, BV), KEY * VALUE
    tile = program * n_tokens * KEY
    w = rows_of(state + program * area, rows, VALUE, KEY, KW)
    point = rows_of(anchor + program * area, rows, VALUE, KEY, KW)
    by = tl.full((), 1.0, w.dtype)
    norm, weights = by, point
    if LINK == SIMPLEX:
        kept = tl.exp(line(open_kept + program * KEY, KEY, KW))
    for n in range(tl.load(ends + batch * 2)):
        entry = entries + (batch * n_rows + n) * 6
        flags, slot = tl.load(entry + 2), tl.load(entry + 3).to(tl.int64)
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        if THRESHOLD > 0 and (flags == 1) & (n > 0):
            w = shrunk(w, THRESHOLD)
        if HAS_START and flags >= 2:
            w = rows_of(start + head * area, rows, VALUE, KEY, KW)
        point = tl.where(flags % 2 == 1, w, point)
        if LEARN and slot >= 0:
            put_rows(saved + (program * n_slots + slot) * area, rows, w, VALUE, KEY, KW)
        frame = w
        if LINK == SCALED:
            if (flags % 2 == 1) | (n == 0):
                norm = norm_of(point, EXPONENT)
                by = factor_of(norm, tl.load(radius + head), EXPONENT)
            tl.store(factors + (program * n_rows + n) * 2, by)
            tl.store(factors + (program * n_rows + n) * 2 + 1, norm)
        if LINK == SIMPLEX:
            if (flags % 2 == 1) | (n == 0):
                weights = softmaxed(point, KEY, KW)
            kept = tl.where(flags % 2 == 1, 1.0, kept)
            put_line(kept_before + (program * n_rows + n) * KEY, kept, KEY, KW)
            frame = tl.where(flags % 2 == 1, weights, evened(w - kept * point, KEY, KW) + kept * weights)
        else:
            weights = point
        u = product(channels(k, row, real, KEY, KW, True), tl.trans(weights), PRECISION) * by
        r = u - some(v, row, real, rows, VALUE, True)
        if HAS_DELTA:
            bound = some(delta, row, real, rows, VALUE, DELTA_WIDE)
        else:
            bound = r
        g = phi(r, bound, VALUE, BIAS, SHARPNESS)
        if LEARN:
            put_some(written, row, real, rows, u, VALUE)
        query = channels(decayed + tile, at, real, KEY, KW, True)
        out = product(query, tl.trans(frame), PRECISION)
        out -= product(square(s + program * n_tokens * 16, at, real), g, PRECISION)
        put_some(y, row, real, rows, out * by, VALUE)
        keep, f = line(total + (program * n_rows + n) * KEY, KEY, KW), channels(in_end + tile, at, real, KEY, KW, True)
        w = keep * w - product(tl.trans(g), f, PRECISION)
        if LINK == SIMPLEX:
            kept = kept * keep
    full = tl.load(ends + batch * 2 + 1) != 0
    if THRESHOLD > 0 and full:
        w = shrunk(w, THRESHOLD)
    point = tl.where(full, w, point)
    put_rows(last + program * area, rows, w, VALUE, KEY, KW)
    put_rows(last_anchor + program * area, rows, point, VALUE, KEY, KW)


@triton.jit
def walk_back(
    order,
    entries,
    ends,
    k,
    v,
    delta,
    anchor,
    start,
    radius,
    saved,
    written,
    factors,
    kept_before,
    decayed,
    in_end,
    s,
    total,
    grad_y,
    states,
    d_v,
    d_delta,
    d_start,
    d_radius,
    d_kept,
    d_state,
    d_anchor,
    of_query,
    of_key,
    end_in,
    d_s,
    along,
    n_tokens,
    n_heads,
    n_rows,
    n_slots,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    VALUE: tl.constexpr,
    BV: tl.constexpr,
    BIAS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_START: tl.constexpr,
    THRESHOLD: tl.constexpr,
    EXPONENT: tl.constexpr,
    LINK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """decayed .. total, saved, written: as the forward pass has them. states [B, H, 5, V, K]: room for the matrix at the start of each
    piece of a segment and of the chunk open there. d_state, d_anchor [B, H, V, K] hold the gradients of the last matrices and become
    those of the first; d_start [B, H, V, K] starts at zeros; d_radius [B, H]. Of each block: d_kept [N, B, H, K], of open_kept;
    of_query, of_key, end_in [N, B, H, T, K], d_s [N, B, H, T, 16] and along [N, B, H, P, K], the gradient of the log of the decay over
    the piece; d_delta [N, B, T, H], or [B, T, H, V]."""
    program, piece_of = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = program // n_heads, program % n_heads
    rows, area = tl.program_id(1) * BV + tl.arange(0, BV), KEY * VALUE
    own = piece_of * tl.num_programs(0) + program  # of what every block has a place for
    tile, mine = program * n_tokens * KEY, own * n_tokens * KEY
    saved += program * n_slots * area
    states += program * 5 * area
    start += head * area
    d_start += program * area
    total += program * n_rows * KEY
    kept_before += program * n_rows * KEY
    entries += batch * n_rows * 6
    if not DELTA_WIDE:
        d_delta += piece_of * (tl.num_programs(0) // n_heads) * n_tokens * n_heads
    d = rows_of(d_state + program * area, rows, VALUE, KEY, KW)
    d_point = rows_of(d_anchor + program * area, rows, VALUE, KEY, KW)
    d_weights = tl.zeros_like(d)  # with a link, of the chunk's first weights
    later = tl.zeros((1, KW), d.dtype)  # with SIMPLEX, of the log of the decay in the chunk, by the pieces behind
    by, to_by, to_radius = tl.full((), 1.0, d.dtype), tl.full((), 0.0, d.dtype), tl.full((), 0.0, d.dtype)
    factors += program * n_rows * 2
    high = tl.load(ends + batch * 2)
    while high > 0:
        low = tl.load(entries + (high - 1) * 6 + 4)
        slot, chunk_at = tl.load(entries + low * 6 + 3).to(tl.int64), tl.load(entries + low * 6 + 5)
        if HAS_START and slot < 0:
            w = rows_of(start, rows, VALUE, KEY, KW)
        else:
            w = rows_of(saved + slot * area, rows, VALUE, KEY, KW)
        if chunk_at < 0:
            put_rows(states + SEGMENT * area, rows, rows_of(anchor + program * area, rows, VALUE, KEY, KW), VALUE, KEY, KW)
        elif chunk_at < low:
            slot = tl.load(entries + chunk_at * 6 + 3).to(tl.int64)
            if HAS_START and slot < 0:
                point = rows_of(start, rows, VALUE, KEY, KW)
            else:
                point = rows_of(saved + slot * area, rows, VALUE, KEY, KW)
            put_rows(states + SEGMENT * area, rows, point, VALUE, KEY, KW)
        for n in range(low, high - 1):
            put_rows(states + (n - low) * area, rows, w, VALUE, KEY, KW)
            at, row, real = tokens_of(order, entries + n * 6, batch, head, n_tokens, n_heads, 0)
            r = some(written, row, real, rows, VALUE, True) - some(v, row, real, rows, VALUE, True)
            if HAS_DELTA:
                bound = some(delta, row, real, rows, VALUE, DELTA_WIDE)
            else:
                bound = r
            g = phi(r, bound, VALUE, BIAS, SHARPNESS)
            f = channels(in_end + tile, at, real, KEY, KW, True)
            w = line(total + n * KEY, KEY, KW) * w - product(tl.trans(g), f, PRECISION)
            if THRESHOLD > 0 and tl.load(entries + (n + 1) * 6 + 2) == 1:
                w = shrunk(w, THRESHOLD)
        put_rows(states + (high - 1 - low) * area, rows, w, VALUE, KEY, KW)
        tl.debug_barrier()

        for behind in range(high - low):
            n = high - 1 - behind
            flags, chunk_at = tl.load(entries + n * 6 + 2), tl.load(entries + n * 6 + 5)
            at, row, real = tokens_of(order, entries + n * 6, batch, head, n_tokens, n_heads, 0)
            r = some(written, row, real, rows, VALUE, True) - some(v, row, real, rows, VALUE, True)
            if HAS_DELTA:
                bound = some(delta, row, real, rows, VALUE, DELTA_WIDE)
            else:
                bound = r
            g, d_out = phi(r, bound, VALUE, BIAS, SHARPNESS), some(grad_y, row, real, rows, VALUE, True)
            w, keep = rows_of(states + (n - low) * area, rows, VALUE, KEY, KW), line(total + n * KEY, KEY, KW)
            query, inner = channels(decayed + tile, at, real, KEY, KW, True), square(s + program * n_tokens * 16, at, real)
            point = rows_of(states + tl.where(chunk_at >= low, chunk_at - low, SEGMENT) * area, rows, VALUE, KEY, KW)
            weights, frame = point, w
            if LINK == SIMPLEX:
                weights, kept = softmaxed(point, KEY, KW), line(kept_before + n * KEY, KEY, KW)
                frame = tl.where(flags % 2 == 1, weights, evened(w - kept * point, KEY, KW) + kept * weights)
            if LINK == SCALED:
                by = tl.load(factors + n * 2)
                out = product(query, tl.trans(w), PRECISION) - product(inner, g, PRECISION)
                to_by += tl.sum(d_out * out)
                d_out = d_out * by
            f = channels(in_end + tile, at, real, KEY, KW, True)
            d_g = -product(tl.trans(inner), d_out, PRECISION)
            d_g -= product(f, tl.trans(d), PRECISION)
            put_square(d_s + own * n_tokens * 16, at, real, -product(d_out, tl.trans(g), PRECISION))
            end = product(g, d, PRECISION)
            put(end_in + mine, at, real, end, KEY, KW, True)
            put(of_query + mine, at, real, product(d_out, frame, PRECISION), KEY, KW, True)
            gained = tl.sum(d * w, axis=0)[None, :] * keep - tl.sum(end * f, axis=0)[None, :]
            put_line(along + (own * n_rows + n) * KEY, gained + later, KEY, KW)
            d_frame = product(tl.trans(d_out), query, PRECISION)
            if LINK == SIMPLEX:
                inside, even = flags % 2 == 0, evened(d_frame, KEY, KW)
                d = d * keep + tl.where(inside, even, 0.0)
                d_point -= tl.where(inside, kept * even, 0.0)
                d_weights += tl.where(inside, kept, 1.0) * d_frame
                later += tl.where(inside, tl.sum(d_frame * weights - even * point, axis=0)[None, :] * kept, 0.0)
            else:
                d = d * keep + d_frame

            d_r, d_bound = phi_back(d_g, r, bound, VALUE, BIAS, SHARPNESS)
            put_some(d_v, row, real, rows, -d_r, VALUE)
            if HAS_DELTA:
                d_bound = tl.where((rows < VALUE)[None, :], d_bound, 0.0)
                if DELTA_WIDE:
                    put_some(d_delta, row, real, rows, d_bound, VALUE)
                else:
                    tl.store(d_delta + row, tl.sum(d_bound, axis=1), mask=real)
            put(of_key + mine, at, real, product(d_r, weights, PRECISION) * by, KEY, KW, True)
            of_point = product(tl.trans(d_r), channels(k, row, real, KEY, KW, True), PRECISION)
            if LINK == SCALED:
                d_weights += of_point
                if (flags % 2 == 1) | (n == 0):
                    norm, rho = tl.load(factors + n * 2 + 1), tl.load(radius + head)
                    of_point, of_radius = scaled_back(point, d_weights, norm, rho, by, to_by, EXPONENT)
                    d_point += of_point
                    to_radius += of_radius
                    d_weights, to_by = tl.zeros_like(d), tl.full((), 0.0, d.dtype)
            elif LINK == SIMPLEX:
                d_weights += of_point
                if (flags % 2 == 1) | (n == 0):
                    d_point += softmaxed_back(weights, d_weights, KEY, KW)
                    d_weights = tl.zeros_like(d)
                later = tl.where(flags % 2 == 1, 0.0, later)
            else:
                d_point += of_point
            if flags % 2 == 1:  # a chunk starts: its first matrix is this one
                d += d_point
                d_point = tl.zeros_like(d)
            if THRESHOLD > 0 and (flags == 1) & (n > 0):
                d = tl.where(w == 0, 0.0, d)
            if HAS_START and flags >= 2:
                put_rows(d_start, rows, rows_of(d_start, rows, VALUE, KEY, KW) + d, VALUE, KEY, KW)
                d = tl.zeros_like(d)
        tl.debug_barrier()
        high = low
    if LINK == SCALED:
        tl.store(d_radius + program, to_radius)
    if LINK == SIMPLEX:
        put_line(d_kept + own * KEY, later, KEY, KW)
    put_rows(d_state + program * area, rows, d, VALUE, KEY, KW)
    put_rows(d_anchor + program * area, rows, d_point, VALUE, KEY, KW)
