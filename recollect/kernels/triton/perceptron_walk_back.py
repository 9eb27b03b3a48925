"""The perceptron memory's walk over the pieces of one head of one batch element, backward: one program.

A segment is computed again from the state saved at its first piece, then its pieces are differentiated from the last to the first, each
in two passes over the hidden units as in `perceptron_walk`. The equations are those of memory.c.
NOT YET MEASURED ON A GPU.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    IDENTITY,
    LEAST,
    SCALED,
    SIMPLEX,
    block,
    channels,
    column,
    copy,
    descent_back,
    entry_power,
    gelu,
    hidden,
    line,
    product,
    put,
    put_block,
    put_hidden,
    put_line,
    put_square,
    shrunk,
    square,
    tokens_of,
)
from recollect.kernels.triton.perceptron_simplex import framed, framed_back, less_some, softmaxed, softmaxed_back

SEGMENT = tl.constexpr(4)


@triton.jit
def _scaled_back(
    x,
    d_weights,
    d_anchor,
    d_state,
    fresh,
    norm,
    radius,
    factor,
    to_factor,
    HIDDEN: tl.constexpr,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    BO: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """The gradients of one matrix' weights (used up) and factor to the matrix x where its chunk began: in d_state if it began here,
    else in d_anchor. Returns that of the radius."""
    along = to_factor
    for o in range(0, HIDDEN, BO):
        along += tl.sum(block(x, o, KEY, KW, BO) * block(d_weights, o, KEY, KW, BO))
    size = norm + LEAST
    along = tl.where(radius <= size, (EXPONENT - 2) * factor * along, 0.0)
    inverse = tl.where(norm > 0, 1 / tl.where(norm > 0, norm, 1.0), 0.0)
    for o in range(0, HIDDEN, BO):
        unit = block(x, o, KEY, KW, BO) * inverse
        g = block(d_weights, o, KEY, KW, BO)
        put_block(d_weights, o, g * 0, KEY, KW, BO)  # of g, so that no thread stores what another has yet to load
        g = factor * g - along / size * unit * entry_power(unit, EXPONENT - 2) + block(d_anchor, o, KEY, KW, BO)
        put_block(d_anchor, o, tl.where(fresh, 0.0, g), KEY, KW, BO)
        if fresh:
            put_block(d_state, o, block(d_state, o, KEY, KW, BO) + g, KEY, KW, BO)
    return along / radius


@triton.jit
def walk_back(
    order,
    entries,
    ends,
    q,
    k,
    v,
    eta,
    delta,
    scale,
    shift,
    radius,
    factors,
    start,
    anchor,
    saved,
    written,
    decayed,
    in_end,
    rest,
    gu,
    moved,
    of_out,
    s,
    d_a,
    total,
    mix,
    late,
    d_seen,
    late_in,
    late_out,
    late_query,
    d_mix,
    d_late,
    states,
    room,
    d_k,
    d_v,
    d_delta,
    d_scale,
    d_shift,
    d_radius,
    d_factors,
    d_start,
    d_state,
    d_anchor,
    d_weights,
    kept_before,
    means,
    linked,
    d_kept,
    n_tokens,
    n_heads,
    n_rows,
    n_slots,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    HIDDEN: tl.constexpr,
    BO: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LINK: tl.constexpr,
    BIAS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    EXPONENT: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """decayed .. total: as `prepare` and `prepare_back` leave them. They become what `finish_back` reads: decayed is then of_query,
    in_end end_in, rest end_out, d_a d_s, and total along.
    With MOMENTUM also late_in, late_out and late_query: end_in, end_out and of_query of the last change in the state's place; d_mix
    [B, H, T, 4] of a token's keep and boost by the second layer, d_late [B, H, P, 2] of the piece's boost and slow.
    states [B, H, 5, 2 or 4, O, K]: at the start of each piece of a segment and of the chunk open there; room [B, H, 4, 4, 16, O];
    d_scale, d_shift [B, H, K], d_radius [B, H, 2]; d_factors [B, H, P], of the second factor by the reads;
    d_start, d_state, d_anchor [B, H, 2 or 4, O, K], the last two holding those of the last states; d_weights: zeros, for the chunk's
    weights where they are not its first state, else d_anchor. Of link SIMPLEX: kept_before, means: kept and means of `walk`; linked
    [B, H, 6, 2, O, K] room for weights, as states, and for a frame; d_weights then [B, H, 2, 2, O, K], the second for the frame's;
    d_kept [B, H, 2, K] of open_kept, and d_mix of a query's sum."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, program % n_heads
    AREA: tl.constexpr = HIDDEN * KEY
    FULL: tl.constexpr = 4 * AREA if MOMENTUM else 2 * AREA
    WIDTH: tl.constexpr = 16 * HIDDEN
    tile, c = program * n_tokens * KEY, tl.arange(0, KW)[None, :]
    gain, offset = line(scale + head * KEY, KEY, KW), line(shift + head * KEY, KEY, KW)
    to_gain, to_offset = tl.zeros_like(gain), tl.zeros_like(gain)
    states += program * 5 * FULL
    saved += program * n_slots * FULL
    anchor += program * FULL
    start += head * FULL
    room += program * 16 * WIDTH
    s += program * n_tokens * 16
    d_a += program * n_tokens * 16
    mix += program * n_tokens * 4
    d_mix += program * n_tokens * 4
    late += program * n_rows * 2
    d_late += program * n_rows * 2
    total += program * n_rows * 2 * KEY
    d_state += program * FULL
    d_anchor += program * FULL
    if LINK == SIMPLEX:
        d_weights += program * 4 * AREA
        linked += program * 12 * AREA
        kept_before += program * n_rows * 2 * KEY
    else:
        d_weights += program * FULL
    later_in, later_out = tl.zeros_like(gain), tl.zeros_like(gain)
    d_start += program * FULL
    factors += program * n_rows * 4
    radius += head * 2
    one = tl.full((), 1.0, scale.dtype.element_ty)
    by_in, by_out = one, one
    to_by_in, to_by_out, to_radius_in, to_radius_out = one * 0, one * 0, one * 0, one * 0
    entries += batch * n_rows * 6
    high = tl.load(ends + batch * 2)
    while high > 0:
        low = tl.load(entries + (high - 1) * 6 + 4)
        slot, chunk_at = tl.load(entries + low * 6 + 3).to(tl.int64), tl.load(entries + low * 6 + 5)
        if slot >= 0:
            copy(saved + slot * FULL, states, FULL // KEY, KEY, KW, BO)
        if HAS_START and slot < 0:
            copy(start, states, FULL // KEY, KEY, KW, BO)
        if chunk_at < 0:
            copy(anchor, states + SEGMENT * FULL, FULL // KEY, KEY, KW, BO)
        elif chunk_at < low:
            slot = tl.load(entries + chunk_at * 6 + 3).to(tl.int64)
            if slot >= 0:
                copy(saved + slot * FULL, states + SEGMENT * FULL, FULL // KEY, KEY, KW, BO)
            if HAS_START and slot < 0:
                copy(start, states + SEGMENT * FULL, FULL // KEY, KEY, KW, BO)
        tl.debug_barrier()

        for n in range(low, high):
            entry = entries + n * 6
            chunk_at = tl.load(entry + 5)
            at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
            began = tl.where(chunk_at >= low, chunk_at - low, SEGMENT)
            origin = states + began * FULL
            weights = origin
            source, kept = states + (n - low) * FULL, room + (n - low) * 4 * WIDTH
            if LINK == SIMPLEX:
                weights = linked + began * 2 * AREA
                if (n == low) | (chunk_at == n):
                    softmaxed(origin, weights, HIDDEN, KEY, KW, BO)
                    tl.debug_barrier()
            if LINK == SCALED:
                by_in, by_out = tl.load(factors + n * 4), tl.load(factors + n * 4 + 1)
            for o in range(0, HIDDEN, BO):
                keys = channels(k, row, real, KEY, KW, True)
                pre = product(keys, tl.trans(block(weights, o, KEY, KW, BO)), PRECISION) * by_in
                if LINK == SIMPLEX:
                    pre += tl.sum(keys, axis=1)[:, None]
                factor = channels(gu + tile, at, real, KEY, KW, True)
                back = product(factor, tl.trans(block(weights + AREA, o, KEY, KW, BO)), PRECISION) * by_out
                put_hidden(kept, o, pre, HIDDEN, BO)
                put_hidden(kept + WIDTH, o, back, HIDDEN, BO)
                if n + 1 < high:
                    settles = tl.load(entries + (n + 1) * 6 + 2) == 1  # a full chunk ends with this piece
                    act, slope, _ = gelu(pre)
                    keep_in, keep_out = line(total + n * 2 * KEY, KEY, KW), line(total + n * 2 * KEY + KEY, KEY, KW)
                    gp = tl.trans(back * slope)
                    gained = product(gp, channels(in_end + tile, at, real, KEY, KW, True), PRECISION)
                    w_in = keep_in * block(source, o, KEY, KW, BO) - gained
                    gained = product(tl.trans(act), factor * channels(rest + tile, at, real, KEY, KW, True), PRECISION)
                    w_out = keep_out * block(source + AREA, o, KEY, KW, BO) - gained
                    if MOMENTUM:
                        boost, slow, pulled = tl.load(late + n * 2), tl.load(late + n * 2 + 1), column(mix, at, real, 3)
                        m_in, m_out = block(source + 2 * AREA, o, KEY, KW, BO), block(source + 3 * AREA, o, KEY, KW, BO)
                        w_in, w_out = w_in + boost * m_in, w_out + boost * m_out
                        m_in = slow * m_in - product(gp, channels(k, row, real, KEY, KW, True) * pulled, PRECISION)
                        m_out = slow * m_out - product(tl.trans(act), factor * pulled, PRECISION)
                        put_block(source + FULL + 2 * AREA, o, m_in, KEY, KW, BO)
                        put_block(source + FULL + 3 * AREA, o, m_out, KEY, KW, BO)
                    if THRESHOLD > 0 and settles:
                        w_in, w_out = shrunk(w_in, THRESHOLD), shrunk(w_out, THRESHOLD)
                    put_block(source + FULL, o, w_in, KEY, KW, BO)
                    put_block(source + FULL + AREA, o, w_out, KEY, KW, BO)
            tl.debug_barrier()

        for behind in range(high - low):
            n = high - 1 - behind
            entry = entries + n * 6
            flags, chunk_at = tl.load(entry + 2), tl.load(entry + 5)
            at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
            began = tl.where(chunk_at >= low, chunk_at - low, SEGMENT)
            origin = states + began * FULL
            weights, d_frame = origin, d_state
            source, kept = states + (n - low) * FULL, room + (n - low) * 4 * WIDTH
            frame = source
            if LINK == SIMPLEX:
                weights = linked + began * 2 * AREA
                frame, d_frame = linked + tl.where(flags % 2 == 1, began, SEGMENT + 1) * 2 * AREA, d_weights
                kept_in = line(kept_before + n * 2 * KEY, KEY, KW)
                kept_out = line(kept_before + n * 2 * KEY + KEY, KEY, KW)
                if flags % 2 == 0:
                    framed(source, origin, weights, frame, kept_in, kept_out, HIDDEN, KEY, KW, BO)
                    d_frame = d_weights + 2 * AREA
                    for o in range(0, 2 * HIDDEN, BO):
                        put_block(d_frame, o, tl.zeros((BO, KW), gain.dtype), KEY, KW, BO)
                    tl.debug_barrier()
                mean = tl.load(means + (program * n_tokens + at)[:, None], mask=real[:, None], other=0.0)
                mean_r, shift_r, ones = tl.zeros_like(mean), tl.zeros_like(mean), tl.zeros((16,), gain.dtype)

            if LINK == SCALED:
                by_in, by_out = tl.load(factors + n * 4), tl.load(factors + n * 4 + 1)
                to_by_out += tl.load(d_factors + program * n_rows + n)
            end_in, end_out = tl.zeros((16, KW), gain.dtype), tl.zeros((16, KW), gain.dtype)
            of_query, d_gu = tl.zeros((16, KW), gain.dtype), tl.zeros((16, KW), gain.dtype)
            d_s, along_in, along_out = tl.zeros((16, 16), gain.dtype), later_in, later_out
            if MOMENTUM:
                m_end_in, m_end_out, m_query = tl.zeros_like(end_in), tl.zeros_like(end_in), tl.zeros_like(end_in)
                to_keep, to_boost = tl.zeros((16,), gain.dtype), tl.zeros((16,), gain.dtype)
                of_boost, of_slow = one * 0, one * 0
            for o in range(0, HIDDEN, BO):
                act, slope, _ = gelu(hidden(kept, o, HIDDEN, BO))
                gp = hidden(kept + WIDTH, o, HIDDEN, BO) * slope
                keep_in, keep_out = line(total + n * 2 * KEY, KEY, KW), line(total + n * 2 * KEY + KEY, KEY, KW)
                query, inner = channels(decayed + tile, at, real, KEY, KW, True), square(s, at, real)
                w_in, g_in = block(source, o, KEY, KW, BO), block(d_state, o, KEY, KW, BO)
                r_in = w_in
                if LINK == SIMPLEX:
                    r_in = block(frame, o, KEY, KW, BO)
                raw = product(query, tl.trans(r_in), PRECISION) - product(inner, gp, PRECISION)
                if LINK == SIMPLEX:
                    raw += tl.sum(channels(q, row, real, KEY, KW, True), axis=1)[:, None]
                if MOMENTUM:
                    m_in, m_out = block(source + 2 * AREA, o, KEY, KW, BO), block(source + 3 * AREA, o, KEY, KW, BO)
                    boosted = channels(q, row, real, KEY, KW, True) * column(mix, at, real, 1)
                    raw += product(boosted, tl.trans(m_in), PRECISION)
                act_r, slope_r, _ = gelu(raw * by_in)
                if LINK == SIMPLEX:
                    act_r, shift_r = less_some(act_r, shift_r, o)
                d_gp = -product(channels(in_end + tile, at, real, KEY, KW, True), tl.trans(g_in), PRECISION)
                end_in += product(gp, g_in, PRECISION)
                if MOMENTUM:
                    boost, slow, pulled = tl.load(late + n * 2), tl.load(late + n * 2 + 1), column(mix, at, real, 3)
                    h_in = block(d_state + 2 * AREA, o, KEY, KW, BO)
                    d_gp -= product(channels(k, row, real, KEY, KW, True) * pulled, tl.trans(h_in), PRECISION)
                    m_end_in += product(gp, h_in, PRECISION)
                    of_boost += tl.sum(g_in * m_in)
                    of_slow += tl.sum(h_in * m_in)
                    h_in = h_in * slow + g_in * boost
                along_in += tl.sum(g_in * w_in, axis=0)[None, :] * keep_in
                g_in = g_in * keep_in

                w_out, g_out = block(source + AREA, o, KEY, KW, BO), block(d_state + AREA, o, KEY, KW, BO)
                reads, outer = channels(moved + tile, at, real, KEY, KW, True), square(d_a, at, real)
                f_out = channels(gu + tile, at, real, KEY, KW, True)
                d_act = product(tl.trans(outer), act_r, PRECISION)
                d_act -= product(f_out * channels(rest + tile, at, real, KEY, KW, True), tl.trans(g_out), PRECISION)
                end_out += product(act, g_out, PRECISION)
                if MOMENTUM:
                    h_out = block(d_state + 3 * AREA, o, KEY, KW, BO)
                    d_act -= product(f_out * pulled, tl.trans(h_out), PRECISION)
                    m_end_out += product(act, h_out, PRECISION)
                    of_boost += tl.sum(g_out * m_out)
                    of_slow += tl.sum(h_out * m_out)
                    h_out = h_out * slow + g_out * boost
                    plain = channels(d_seen + tile, at, real, KEY, KW, True)
                    of_keep, of_late = product(plain, tl.trans(w_out), PRECISION), product(plain, tl.trans(m_out), PRECISION)
                    to_keep += tl.sum(of_keep * act_r, axis=1)
                    to_boost += tl.sum(of_late * act_r, axis=1)
                    d_pre = of_keep * column(mix, at, real, 0) + of_late * column(mix, at, real, 1)
                    plain = plain * column(mix, at, real, 1)
                    put_block(d_state + 3 * AREA, o, h_out + product(tl.trans(act_r), plain, PRECISION), KEY, KW, BO)
                elif LINK == SIMPLEX:
                    mean_r += tl.sum(act_r, axis=1)[:, None] / HIDDEN
                    d_pre = product(reads, tl.trans(block(frame + AREA, o, KEY, KW, BO)), PRECISION)
                else:
                    d_pre = product(reads, tl.trans(w_out), PRECISION)
                put_hidden(kept + 3 * WIDTH, o, d_act, HIDDEN, BO)
                if LINK == SIMPLEX:
                    d_pre += product(outer, act - mean, PRECISION)
                else:
                    d_pre += product(outer, act, PRECISION)
                d_pre = d_pre * slope_r
                if LINK == SCALED:
                    to_by_in += tl.sum(d_pre * raw)
                    d_pre = d_pre * by_in
                along_out += tl.sum(g_out * w_out, axis=0)[None, :] * keep_out
                g_out, of_frame = g_out * keep_out, product(tl.trans(act_r), reads, PRECISION)
                if LINK == SIMPLEX:
                    put_block(d_state + AREA, o, g_out, KEY, KW, BO)
                    put_block(d_frame + AREA, o, block(d_frame + AREA, o, KEY, KW, BO) + of_frame, KEY, KW, BO)
                else:
                    put_block(d_state + AREA, o, g_out + of_frame, KEY, KW, BO)

                if MOMENTUM:
                    m_query += product(d_pre, m_in, PRECISION)
                    put_block(d_state + 2 * AREA, o, h_in + product(tl.trans(d_pre), boosted, PRECISION), KEY, KW, BO)
                of_query += product(d_pre, r_in, PRECISION)
                of_frame = product(tl.trans(d_pre), query, PRECISION)
                if LINK == SIMPLEX:
                    ones += tl.sum(d_pre, axis=1)
                    put_block(d_state, o, g_in, KEY, KW, BO)
                    put_block(d_frame, o, block(d_frame, o, KEY, KW, BO) + of_frame, KEY, KW, BO)
                else:
                    put_block(d_state, o, g_in + of_frame, KEY, KW, BO)
                d_gp -= product(tl.trans(inner), d_pre, PRECISION)
                put_hidden(kept + 2 * WIDTH, o, d_gp, HIDDEN, BO)
                d_s -= product(d_pre, tl.trans(gp), PRECISION)
                d_gu += product(d_gp * slope, block(weights + AREA, o, KEY, KW, BO), PRECISION) * by_out
            tl.debug_barrier()

            if LINK == SIMPLEX:
                tl.store(d_mix + at * 4, ones, mask=real)
                shared = tl.sum(square(d_a, at, real) * mean_r, axis=0)[:, None]
                if flags % 2 == 0:
                    to_in, to_out = framed_back(
                        d_frame, origin, weights, d_state, d_anchor, d_weights, kept_in, kept_out, HIDDEN, KEY, KW, BO
                    )
                    later_in, later_out = later_in + to_in, later_out + to_out
                    tl.debug_barrier()
            to_end, factor = channels(rest + tile, at, real, KEY, KW, True), channels(gu + tile, at, real, KEY, KW, True)
            reads = channels(of_out + tile, at, real, KEY, KW, True)
            if MOMENTUM:
                d_gu += reads - end_out * to_end - m_end_out * column(mix, at, real, 3)
                put(late_in + tile, at, real, m_end_in, KEY, KW, True)
                put(late_out + tile, at, real, m_end_out, KEY, KW, True)
                put(late_query + tile, at, real, m_query, KEY, KW, True)
                tl.store(d_mix + at * 4, to_keep, mask=real)
                tl.store(d_mix + at * 4 + 1, to_boost, mask=real)
                tl.store(d_late + n * 2, of_boost)
                tl.store(d_late + n * 2 + 1, of_slow)
            else:
                along_in -= tl.sum(end_in * channels(in_end + tile, at, real, KEY, KW, True), axis=0)[None, :]
                along_out -= tl.sum(end_out * to_end * factor, axis=0)[None, :]
                d_gu += reads * channels(eta, row, real, KEY, KW, ETA_WIDE) - end_out * to_end
            tl.debug_barrier()
            put(in_end + tile, at, real, end_in, KEY, KW, True)
            put(rest + tile, at, real, end_out, KEY, KW, True)
            put(decayed + tile, at, real, of_query, KEY, KW, True)
            put_square(d_a, at, real, d_s)
            put_line(total + n * 2 * KEY, along_in, KEY, KW)
            put_line(total + n * 2 * KEY + KEY, along_out, KEY, KW)

            keys, values = channels(k, row, real, KEY, KW, True), channels(v, row, real, KEY, KW, True)
            if HAS_DELTA:
                threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
            else:
                threshold = keys
            u = channels(written, row, real, KEY, KW, True)
            d_u, d_r, d_threshold, of_gain = descent_back(
                d_gu, u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS
            )
            to_gain += of_gain
            to_offset += tl.sum(d_r, axis=0)[None, :]
            put(d_v, row, real, -d_r, KEY, KW, True)
            if HAS_DELTA:
                put(d_delta, row, real, d_threshold, KEY, KW, DELTA_WIDE)

            for o in range(0, HIDDEN, BO):
                act, slope, curve = gelu(hidden(kept, o, HIDDEN, BO))
                back, d_gp = hidden(kept + WIDTH, o, HIDDEN, BO), hidden(kept + 2 * WIDTH, o, HIDDEN, BO)
                d_act = hidden(kept + 3 * WIDTH, o, HIDDEN, BO)
                if LINK == SIMPLEX:
                    d_act -= shared
                d_act += product(d_u, tl.trans(block(weights + AREA, o, KEY, KW, BO)), PRECISION) * by_out
                d_pre = d_gp * back * curve + d_act * slope
                d_r += product(d_pre, block(weights, o, KEY, KW, BO), PRECISION) * by_in
                if LINK == SIMPLEX:
                    d_r += tl.where(c < KEY, tl.sum(d_pre, axis=1)[:, None], 0.0)
                g_in = block(d_weights, o, KEY, KW, BO)
                g_in += product(tl.trans(d_pre), channels(k, row, real, KEY, KW, True), PRECISION)
                if LINK == SIMPLEX:
                    act -= mean
                g_out = block(d_weights + AREA, o, KEY, KW, BO) + product(tl.trans(act), d_u, PRECISION)
                g_out += product(tl.trans(d_gp * slope), channels(gu + tile, at, real, KEY, KW, True), PRECISION)
                if LINK != IDENTITY:
                    put_block(d_weights, o, g_in, KEY, KW, BO)
                    put_block(d_weights + AREA, o, g_out, KEY, KW, BO)
                else:
                    if flags % 2 == 1:  # a chunk starts: its first state is this state
                        put_block(d_state, o, block(d_state, o, KEY, KW, BO) + g_in, KEY, KW, BO)
                        put_block(d_state + AREA, o, block(d_state + AREA, o, KEY, KW, BO) + g_out, KEY, KW, BO)
                    put_block(d_anchor, o, tl.where(flags % 2 == 1, 0.0, g_in), KEY, KW, BO)
                    put_block(d_anchor + AREA, o, tl.where(flags % 2 == 1, 0.0, g_out), KEY, KW, BO)
            if LINK == SCALED and ((flags % 2 == 1) | (n == 0)):
                tl.debug_barrier()
                fresh = flags % 2 == 1
                norm, rho = tl.load(factors + n * 4 + 2), tl.load(radius)
                to_radius_in += _scaled_back(
                    origin, d_weights, d_anchor, d_state, fresh, norm, rho, by_in, to_by_in, HIDDEN, KEY, KW, BO, EXPONENT
                )
                norm, rho = tl.load(factors + n * 4 + 3), tl.load(radius + 1)
                to_radius_out += _scaled_back(
                    origin + AREA,
                    d_weights + AREA,
                    d_anchor + AREA,
                    d_state + AREA,
                    fresh,
                    norm,
                    rho,
                    by_out,
                    to_by_out,
                    HIDDEN,
                    KEY,
                    KW,
                    BO,
                    EXPONENT,
                )
                to_by_in, to_by_out = one * 0, one * 0
            if LINK == SIMPLEX and ((flags % 2 == 1) | (n == 0)):
                tl.debug_barrier()
                softmaxed_back(weights, d_weights, d_anchor, d_state, flags % 2 == 1, HIDDEN, KEY, KW, BO)
                if flags % 2 == 1:
                    later_in, later_out = later_in * 0, later_out * 0
            put(d_k, row, real, d_r, KEY, KW, True)
            tl.debug_barrier()
            if THRESHOLD > 0 and (flags == 1) & (n > 0):
                for o in range(0, 2 * HIDDEN, BO):
                    g = tl.where(block(source, o, KEY, KW, BO) == 0, 0.0, block(d_state, o, KEY, KW, BO))
                    put_block(d_state, o, g, KEY, KW, BO)
                tl.debug_barrier()
            if HAS_START and flags >= 2:
                for o in range(0, FULL // KEY, BO):
                    g = block(d_state, o, KEY, KW, BO)
                    put_block(d_start, o, block(d_start, o, KEY, KW, BO) + g, KEY, KW, BO)
                    tl.debug_barrier()
                    put_block(d_state, o, tl.zeros_like(g), KEY, KW, BO)
                tl.debug_barrier()
        high = low
    put_line(d_scale + program * KEY, to_gain, KEY, KW)
    put_line(d_shift + program * KEY, to_offset, KEY, KW)
    if LINK == SCALED:
        tl.store(d_radius + program * 2, to_radius_in)
        tl.store(d_radius + program * 2 + 1, to_radius_out)
    if LINK == SIMPLEX:
        put_line(d_kept + program * 2 * KEY, later_in, KEY, KW)
        put_line(d_kept + program * 2 * KEY + KEY, later_out, KEY, KW)
