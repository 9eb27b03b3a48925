"""What the perceptron memory computes for its tokens without its matrices: all pieces at once, before and after the walk over them.

One program has one piece of one head. What lies between these kernels and the walk is [B, H, T, K] or [B, H, T, 16], tokens in order.
NOT YET MEASURED ON A GPU.

Axis legend: B batch, T time, H heads, K key dim, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    SCALED,
    SIMPLEX,
    attended,
    attended_back,
    channels,
    column,
    descent,
    line,
    normalised,
    normalised_back,
    own_piece,
    put,
    put_line,
    put_square,
    scores,
    square,
    tokens_of,
    whole,
)
from recollect.kernels.triton.perceptron_simplex import evened


@triton.jit
def prepare(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
    log_alpha_in,
    decayed,
    in_end,
    rest,
    s,
    total,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    LINK: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    IN_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries decayed from the piece's start, eta k and eta decayed to its end, the first layer's scores, and [B, H, P, 2, K] the decay
    of both matrices over the piece. log_alpha_in: of W_in, where log_alpha is of W_out."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        step = channels(eta, row, real, KEY, KW, ETA_WIDE)
        logs = channels(log_alpha_in, row, real, KEY, KW, IN_WIDE)
        alpha, after = tl.exp(logs), tl.exp(channels(log_alpha_in, next_row, behind, KEY, KW, IN_WIDE))
        to_end = tl.cumprod(after, axis=0, reverse=True)
        put(decayed + tile, at, real, query * tl.cumprod(alpha, axis=0), KEY, KW, True)
        put(in_end + tile, at, real, step * keys * to_end, KEY, KW, True)
        put_line(total + (program * n_rows + n) * 2 * KEY, whole(logs), KEY, KW)
        f_in = step * keys
        if LINK == SIMPLEX:
            f_in = evened(f_in, KEY, KW)
        put_square(s + program * n_tokens * 16, at, real, scores(query, f_in, alpha, after, KW, PRECISION))
        logs = channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE)
        to_end = tl.cumprod(tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE)), axis=0, reverse=True)
        put_line(total + ((program * n_rows + n) * 2 + 1) * KEY, whole(logs), KEY, KW)
        put(rest + tile, at, real, step * to_end, KEY, KW, True)


@triton.jit
def finish(
    order,
    entries,
    ends,
    q,
    eta,
    log_alpha,
    scale,
    shift,
    gu,
    a,
    factors,
    read,
    y,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    LINK: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs, from what W_out gives for the piece's first state (`read`, which becomes that of every token's own) and the scores a."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry = entries + (batch * n_rows + n) * 6
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
        after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
        f_out = channels(eta, row, real, KEY, KW, ETA_WIDE) * channels(gu + program * n_tokens * KEY, at, real, KEY, KW, True)
        seen = channels(read, row, real, KEY, KW, True) * tl.cumprod(alpha, axis=0)
        seen -= attended(square(a + program * n_tokens * 16, at, real), f_out, alpha, after, KW, PRECISION)
        if LINK == SCALED:
            unit, _ = normalised(seen * tl.load(factors + (program * n_rows + n) * 4 + 1), KEY, KW)
        else:
            unit, _ = normalised(seen, KEY, KW)
        gain, offset = line(scale + head * KEY, KEY, KW), line(shift + head * KEY, KEY, KW)
        put(read, row, real, seen, KEY, KW, True)
        put(y, row, real, channels(q, row, real, KEY, KW, True) + gain * unit + offset, KEY, KW, True)


@triton.jit
def prepare_back(
    order,
    entries,
    ends,
    k,
    v,
    eta,
    log_alpha,
    delta,
    scale,
    shift,
    written,
    read,
    a,
    factors,
    grad_y,
    gu,
    d_seen,
    moved,
    of_out,
    d_a,
    d_scale,
    d_shift,
    d_factors,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    LINK: tl.constexpr,
    BIAS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the piece wrote with, and the gradients of the second layer's scores and of what the reads' norm took, as it is and decayed
    from the piece's start, and of eta gu by the reads. d_scale, d_shift [B, H, P, K], d_factors [B, H, P]: what the outputs give."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        gain, offset = line(scale + head * KEY, KEY, KW), line(shift + head * KEY, KEY, KW)
        keys, values = channels(k, row, real, KEY, KW, True), channels(v, row, real, KEY, KW, True)
        if HAS_DELTA:
            threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
        else:
            threshold = keys
        u = channels(written, row, real, KEY, KW, True)
        factor = descent(u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS)
        put(gu + tile, at, real, factor, KEY, KW, True)

        alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
        after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
        d_out = channels(grad_y, row, real, KEY, KW, True)
        seen = channels(read, row, real, KEY, KW, True)
        if LINK == SCALED:
            by = tl.load(factors + (program * n_rows + n) * 4 + 1)
            unit, rate = normalised(seen * by, KEY, KW)
            d = normalised_back(d_out * gain, unit, rate, KEY, KW)
            tl.store(d_factors + program * n_rows + n, tl.sum(d * seen))
            d = d * by
        else:
            unit, rate = normalised(seen, KEY, KW)
            d = normalised_back(d_out * gain, unit, rate, KEY, KW)
        put(d_seen + tile, at, real, d, KEY, KW, True)
        put(moved + tile, at, real, d * tl.cumprod(alpha, axis=0), KEY, KW, True)
        outer = square(a + program * n_tokens * 16, at, real)
        put(of_out + tile, at, real, -attended_back(outer, d, alpha, after, KW, PRECISION), KEY, KW, True)
        factor = factor * channels(eta, row, real, KEY, KW, ETA_WIDE)
        put_square(d_a + program * n_tokens * 16, at, real, -scores(d, factor, alpha, after, KW, PRECISION))
        put_line(d_scale + (program * n_rows + n) * KEY, tl.sum(d_out * unit, axis=0)[None, :], KEY, KW)
        put_line(d_shift + (program * n_rows + n) * KEY, tl.sum(d_out, axis=0)[None, :], KEY, KW)


@triton.jit
def finish_back(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
    log_alpha_in,
    read,
    grad_y,
    gu,
    d_seen,
    of_out,
    end_in,
    end_out,
    of_query,
    d_s,
    along,
    ones,
    d_q,
    d_k,
    d_eta,
    d_log_alpha,
    d_log_alpha_in,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    LINK: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    IN_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries and gates, and the rest of those of keys, from what the walk has left: sums over hidden units and, along
    [B, H, P, 2, K], the gradients of the logs of the decays over the piece; ones [B, H, T, 4]: of link SIMPLEX, of a query's sum."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        step = channels(eta, row, real, KEY, KW, ETA_WIDE)
        alpha = tl.exp(channels(log_alpha_in, row, real, KEY, KW, IN_WIDE))
        after = tl.exp(channels(log_alpha_in, next_row, behind, KEY, KW, IN_WIDE))
        w = square(d_s + program * n_tokens * 16, at, real)
        to_in, f_in = attended_back(w, query, alpha, after, KW, PRECISION), step * keys
        d_out = channels(grad_y, row, real, KEY, KW, True)
        if LINK == SIMPLEX:
            to_in, f_in = evened(to_in, KEY, KW), evened(f_in, KEY, KW)
            inside = (tl.arange(0, KW) < KEY)[None, :]
            d_out += tl.where(inside, column(ones + program * n_tokens * 4, at, real, 0), 0.0)
        to_in -= channels(end_in + tile, at, real, KEY, KW, True) * tl.cumprod(after, axis=0, reverse=True)
        to_query = attended(w, f_in, alpha, after, KW, PRECISION)
        to_query += channels(of_query + tile, at, real, KEY, KW, True) * tl.cumprod(alpha, axis=0)
        after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
        to_out = channels(of_out + tile, at, real, KEY, KW, True)
        to_out -= channels(end_out + tile, at, real, KEY, KW, True) * tl.cumprod(after, axis=0, reverse=True)
        put(d_q, row, real, to_query + d_out, KEY, KW, True)
        put(d_k, row, real, to_in * step + channels(d_k, row, real, KEY, KW, True), KEY, KW, True)
        factor, seen = channels(gu + tile, at, real, KEY, KW, True), channels(read, row, real, KEY, KW, True)
        put(d_eta, row, real, to_in * keys + to_out * factor, KEY, KW, ETA_WIDE)
        lines = along + (program * n_rows + n) * 2 * KEY
        of_in = line(lines, KEY, KW) + tl.cumsum(to_query * query - to_in * step * keys, axis=0, reverse=True)
        seen = seen * channels(d_seen + tile, at, real, KEY, KW, True) - to_out * step * factor
        gained = line(lines + KEY, KEY, KW) + tl.cumsum(seen, axis=0, reverse=True)
        if LINK == SIMPLEX:
            put(d_log_alpha_in, row, real, of_in, KEY, KW, IN_WIDE)
            put(d_log_alpha, row, real, gained, KEY, KW, ALPHA_WIDE)
        else:
            put(d_log_alpha, row, real, of_in + gained, KEY, KW, ALPHA_WIDE)
