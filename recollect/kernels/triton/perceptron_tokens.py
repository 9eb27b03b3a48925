"""What the perceptron memory computes for its tokens without its matrices: all pieces at once, before and after the walk over them.

One program has one piece of one head. What lies between these kernels and the walk is [B, H, T, K] or [B, H, T, 16], tokens in order.

Axis legend: B batch, T time, H heads, K key dim, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    SCALED,
    attended,
    attended_back,
    channels,
    descent,
    line,
    normalised,
    normalised_back,
    put,
    put_line,
    put_square,
    scores,
    square,
    tokens_of,
    whole,
)


@triton.jit
def prepare(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
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
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries decayed from the piece's start, eta k and eta decayed to its end, the first layer's scores, the decay over the piece."""
    program, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        step = channels(eta, row, real, KEY, KW, ETA_WIDE)
        alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
        after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
        to_end = tl.cumprod(after, axis=0, reverse=True)
        put(decayed + tile, at, real, query * tl.cumprod(alpha, axis=0), KEY, KW, True)
        put(in_end + tile, at, real, step * keys * to_end, KEY, KW, True)
        put(rest + tile, at, real, step * to_end, KEY, KW, True)
        put_square(s + program * n_tokens * 16, at, real, scores(query, step * keys, alpha, after, KW, PRECISION))
        put_line(total + (program * n_rows + n) * KEY, whole(alpha, to_end), KEY, KW)


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
    program, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
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
    program, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
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
    d_q,
    d_k,
    d_eta,
    d_log_alpha,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries and gates, and the rest of those of keys, from what the walk has left: sums over hidden units and, along
    [B, H, P, K], the gradient of the log of the decay over the piece."""
    program, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        step = channels(eta, row, real, KEY, KW, ETA_WIDE)
        alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
        after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
        w = square(d_s + program * n_tokens * 16, at, real)
        to_in = attended_back(w, query, alpha, after, KW, PRECISION)
        to_end = tl.cumprod(after, axis=0, reverse=True)
        to_in -= channels(end_in + tile, at, real, KEY, KW, True) * to_end
        to_out = channels(of_out + tile, at, real, KEY, KW, True) - channels(end_out + tile, at, real, KEY, KW, True) * to_end
        to_query = attended(w, step * keys, alpha, after, KW, PRECISION)
        to_query += channels(of_query + tile, at, real, KEY, KW, True) * tl.cumprod(alpha, axis=0)
        gates = to_in * keys + to_out * channels(gu + tile, at, real, KEY, KW, True)
        steps = to_query * query - step * gates
        steps += channels(d_seen + tile, at, real, KEY, KW, True) * channels(read, row, real, KEY, KW, True)
        steps = line(along + (program * n_rows + n) * KEY, KEY, KW) + tl.cumsum(steps, axis=0, reverse=True)
        put(d_q, row, real, to_query + channels(grad_y, row, real, KEY, KW, True), KEY, KW, True)
        put(d_k, row, real, to_in * step + channels(d_k, row, real, KEY, KW, True), KEY, KW, True)
        put(d_eta, row, real, gates, KEY, KW, ETA_WIDE)
        put(d_log_alpha, row, real, steps, KEY, KW, ALPHA_WIDE)
