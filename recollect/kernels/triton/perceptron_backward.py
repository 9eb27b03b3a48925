"""The perceptron memory's backward kernel: one program walks the segments of one head of one batch element from the last to the first.

A segment is computed again from the state saved at its first piece, then its pieces are differentiated from the last to the first, each
in two passes over the hidden units. The equations are those of memory.c.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    attended,
    attended_back,
    block,
    channels,
    descent,
    descent_back,
    gelu,
    hidden,
    normalised,
    normalised_back,
    product,
    put,
    put_block,
    put_hidden,
    scores,
    tokens_of,
    whole,
)

SEGMENT = tl.constexpr(4)


@triton.jit
def _copy(source, target, HIDDEN: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr):
    """Both matrices of a state."""
    for o in range(0, 2 * HIDDEN, BO):
        put_block(target, o, block(source, o, KEY, KW, BO), KEY, KW, BO)


@triton.jit
def backward_kernel(
    order,
    entries,
    ends,
    q,
    k,
    v,
    eta,
    log_alpha,
    delta,
    scale,
    shift,
    start,
    anchor,
    saved,
    written,
    read,
    grad_y,
    states,
    room,
    d_q,
    d_k,
    d_v,
    d_eta,
    d_log_alpha,
    d_delta,
    d_scale,
    d_shift,
    d_start,
    d_state,
    d_anchor,
    n_tokens,
    n_heads,
    n_rows,
    n_slots,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    HIDDEN: tl.constexpr,
    BO: tl.constexpr,
    BIAS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """states [B, H, 5, 2, O, K]: at the start of each piece of a segment and of the chunk open there; room [B, H, 4, 4, 16, O],
    d_scale, d_shift [B, H, K]; d_start, d_state, d_anchor [B, H, 2, O, K], the last two holding those of the last states."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, program % n_heads
    AREA: tl.constexpr = HIDDEN * KEY
    WIDTH: tl.constexpr = 16 * HIDDEN
    c = tl.arange(0, KW)
    gain = tl.load(scale + head * KEY + c, mask=c < KEY, other=0.0)[None, :]
    offset = tl.load(shift + head * KEY + c, mask=c < KEY, other=0.0)[None, :]
    to_gain, to_offset = tl.zeros_like(gain), tl.zeros_like(gain)
    states += program * 10 * AREA
    saved += program * n_slots * 2 * AREA
    anchor += program * 2 * AREA
    start += head * 2 * AREA
    room += program * 16 * WIDTH
    d_state += program * 2 * AREA
    d_anchor += program * 2 * AREA
    d_start += program * 2 * AREA
    order += batch * n_tokens
    entries += batch * n_rows * 6
    high = tl.load(ends + batch * 2)
    while high > 0:
        low = tl.load(entries + (high - 1) * 6 + 4)
        entry = entries + low * 6
        slot, chunk_at = tl.load(entry + 3).to(tl.int64), tl.load(entry + 5)
        if slot >= 0:
            _copy(saved + slot * 2 * AREA, states, HIDDEN, KEY, KW, BO)
        if HAS_START and slot < 0:
            _copy(start, states, HIDDEN, KEY, KW, BO)
        if chunk_at < 0:
            _copy(anchor, states + SEGMENT * 2 * AREA, HIDDEN, KEY, KW, BO)
        elif chunk_at < low:
            slot = tl.load(entries + chunk_at * 6 + 3).to(tl.int64)
            if slot >= 0:
                _copy(saved + slot * 2 * AREA, states + SEGMENT * 2 * AREA, HIDDEN, KEY, KW, BO)
            if HAS_START and slot < 0:
                _copy(start, states + SEGMENT * 2 * AREA, HIDDEN, KEY, KW, BO)
        tl.debug_barrier()

        for n in range(low, high):
            entry = entries + n * 6
            begin, count, chunk_at = tl.load(entry), tl.load(entry + 1), tl.load(entry + 5)
            place, real = tokens_of(order, begin, count, 0)
            row = (batch * n_tokens + place) * n_heads + head
            next_place, behind = tokens_of(order, begin, count, 1)
            next_row = (batch * n_tokens + next_place) * n_heads + head
            origin = states + tl.where(chunk_at >= low, chunk_at - low, SEGMENT) * 2 * AREA
            source, kept = states + (n - low) * 2 * AREA, room + (n - low) * 4 * WIDTH
            keys = channels(k, row, real, KEY, KW, True)
            values = channels(v, row, real, KEY, KW, True)
            u = channels(written, row, real, KEY, KW, True)
            if HAS_DELTA:
                threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
            else:
                threshold = keys
            gu = descent(u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS)
            step = channels(eta, row, real, KEY, KW, ETA_WIDE)
            alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
            after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
            to_end = tl.cumprod(after, axis=0, reverse=True)
            total = whole(alpha, to_end)[None, :]
            in_end, out_end = step * keys * to_end, step * gu * to_end
            for o in range(0, HIDDEN, BO):
                pre = product(keys, tl.trans(block(origin, o, KEY, KW, BO)), PRECISION)
                back = product(gu, tl.trans(block(origin + AREA, o, KEY, KW, BO)), PRECISION)
                put_hidden(kept, o, pre, HIDDEN, BO)
                put_hidden(kept + WIDTH, o, back, HIDDEN, BO)
                if n + 1 < high:
                    act, slope, _ = gelu(pre)
                    w_in = total * block(source, o, KEY, KW, BO) - product(tl.trans(back * slope), in_end, PRECISION)
                    w_out = total * block(source + AREA, o, KEY, KW, BO) - product(tl.trans(act), out_end, PRECISION)
                    put_block(source + 2 * AREA, o, w_in, KEY, KW, BO)
                    put_block(source + 3 * AREA, o, w_out, KEY, KW, BO)
            tl.debug_barrier()

        for back_to in range(high - low):
            n = high - 1 - back_to
            entry = entries + n * 6
            begin, count, flags, chunk_at = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 5)
            place, real = tokens_of(order, begin, count, 0)
            row = (batch * n_tokens + place) * n_heads + head
            next_place, behind = tokens_of(order, begin, count, 1)
            next_row = (batch * n_tokens + next_place) * n_heads + head
            origin = states + tl.where(chunk_at >= low, chunk_at - low, SEGMENT) * 2 * AREA
            source, kept = states + (n - low) * 2 * AREA, room + (n - low) * 4 * WIDTH
            query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
            values = channels(v, row, real, KEY, KW, True)
            u = channels(written, row, real, KEY, KW, True)
            if HAS_DELTA:
                threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
            else:
                threshold = keys
            gu = descent(u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS)
            step = channels(eta, row, real, KEY, KW, ETA_WIDE)
            alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
            after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
            decay, to_end = tl.cumprod(alpha, axis=0), tl.cumprod(after, axis=0, reverse=True)
            total = whole(alpha, to_end)[None, :]
            f_in, f_out = step * keys, step * gu
            in_end, out_end, decayed = f_in * to_end, f_out * to_end, query * decay
            s = scores(query, f_in, alpha, after, KW, PRECISION)

            d_out = channels(grad_y, row, real, KEY, KW, True)
            seen = channels(read, row, real, KEY, KW, True)
            unit, rate = normalised(seen, KEY, KW)
            to_gain += tl.sum(d_out * unit, axis=0)[None, :]
            to_offset += tl.sum(d_out, axis=0)[None, :]
            d_seen = normalised_back(d_out * gain, unit, rate, KEY, KW)
            d_a = -scores(d_seen, f_out, alpha, after, KW, PRECISION)
            moved = d_seen * decay

            # Sums over the hidden units: of what the state's gradient and the reads give.
            end_in, end_out, of_query, d_gu = tl.zeros_like(keys), tl.zeros_like(keys), tl.zeros_like(keys), tl.zeros_like(keys)
            a, d_s, along = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(gain)
            for o in range(0, HIDDEN, BO):
                act, slope, _ = gelu(hidden(kept, o, HIDDEN, BO))
                gp = hidden(kept + WIDTH, o, HIDDEN, BO) * slope
                w_in, g_in = block(source, o, KEY, KW, BO), block(d_state, o, KEY, KW, BO)
                act_r, slope_r, _ = gelu(product(decayed, tl.trans(w_in), PRECISION) - product(s, gp, PRECISION))
                a += product(act_r, tl.trans(act), PRECISION)
                d_gp = -product(in_end, tl.trans(g_in), PRECISION)
                end_in += product(gp, g_in, PRECISION)
                g_in = g_in * total
                along += tl.sum(g_in * w_in, axis=0)[None, :]

                w_out, g_out = block(source + AREA, o, KEY, KW, BO), block(d_state + AREA, o, KEY, KW, BO)
                d_act = product(moved, tl.trans(w_out), PRECISION) + product(d_a, act, PRECISION)
                d_act_w = product(tl.trans(d_a), act_r, PRECISION) - product(out_end, tl.trans(g_out), PRECISION)
                end_out += product(act, g_out, PRECISION)
                g_out = g_out * total
                along += tl.sum(g_out * w_out, axis=0)[None, :]
                put_block(d_state + AREA, o, g_out + product(tl.trans(act_r), moved, PRECISION), KEY, KW, BO)

                d_pre = d_act * slope_r
                of_query += product(d_pre, w_in, PRECISION)
                put_block(d_state, o, g_in + product(tl.trans(d_pre), decayed, PRECISION), KEY, KW, BO)
                d_gp -= product(tl.trans(s), d_pre, PRECISION)
                d_s -= product(d_pre, tl.trans(gp), PRECISION)
                d_gu += product(d_gp * slope, block(origin + AREA, o, KEY, KW, BO), PRECISION)
                put_hidden(kept + 2 * WIDTH, o, d_gp, HIDDEN, BO)
                put_hidden(kept + 3 * WIDTH, o, d_act_w, HIDDEN, BO)
            tl.debug_barrier()

            to_in, to_out = -end_in * to_end, -end_out * to_end
            along += tl.sum(to_in * f_in + to_out * f_out, axis=0)[None, :]
            to_query = of_query * decay + attended(d_s, f_in, alpha, after, KW, PRECISION)
            to_in += attended_back(d_s, query, alpha, after, KW, PRECISION)
            to_out -= attended_back(a, d_seen, alpha, after, KW, PRECISION)
            steps = d_seen * seen + to_query * query - to_in * f_in - to_out * f_out
            put(d_q, row, real, to_query + d_out, KEY, KW, True)
            put(d_eta, row, real, to_in * keys + to_out * gu, KEY, KW, ETA_WIDE)
            put(d_log_alpha, row, real, along + tl.cumsum(steps, axis=0, reverse=True), KEY, KW, ALPHA_WIDE)
            d_gu += to_out * step
            d_u, d_r, d_threshold, of_gain = descent_back(
                d_gu, u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS
            )
            to_gain += of_gain[None, :]
            to_offset += tl.sum(d_r, axis=0)[None, :]
            put(d_v, row, real, -d_r, KEY, KW, True)
            if HAS_DELTA:
                put(d_delta, row, real, d_threshold, KEY, KW, DELTA_WIDE)

            to_key = to_in * step + d_r
            for o in range(0, HIDDEN, BO):
                act, slope, curve = gelu(hidden(kept, o, HIDDEN, BO))
                back, d_gp = hidden(kept + WIDTH, o, HIDDEN, BO), hidden(kept + 2 * WIDTH, o, HIDDEN, BO)
                d_act_w = hidden(kept + 3 * WIDTH, o, HIDDEN, BO)
                d_act_w += product(d_u, tl.trans(block(origin + AREA, o, KEY, KW, BO)), PRECISION)
                d_pre = d_gp * back * curve + d_act_w * slope
                to_key += product(d_pre, block(origin, o, KEY, KW, BO), PRECISION)
                g_in = block(d_anchor, o, KEY, KW, BO) + product(tl.trans(d_pre), keys, PRECISION)
                g_out = block(d_anchor + AREA, o, KEY, KW, BO) + product(tl.trans(d_gp * slope), gu, PRECISION)
                g_out += product(tl.trans(act), d_u, PRECISION)
                if flags % 2 == 1:  # a chunk starts: its first state is this state
                    put_block(d_state, o, block(d_state, o, KEY, KW, BO) + g_in, KEY, KW, BO)
                    put_block(d_state + AREA, o, block(d_state + AREA, o, KEY, KW, BO) + g_out, KEY, KW, BO)
                put_block(d_anchor, o, tl.where(flags % 2 == 1, 0.0, g_in), KEY, KW, BO)
                put_block(d_anchor + AREA, o, tl.where(flags % 2 == 1, 0.0, g_out), KEY, KW, BO)
            put(d_k, row, real, to_key, KEY, KW, True)
            tl.debug_barrier()
            if HAS_START and flags >= 2:
                for o in range(0, 2 * HIDDEN, BO):
                    g = block(d_state, o, KEY, KW, BO)
                    put_block(d_start, o, block(d_start, o, KEY, KW, BO) + g, KEY, KW, BO)
                    tl.debug_barrier()
                    put_block(d_state, o, tl.zeros_like(g), KEY, KW, BO)
                tl.debug_barrier()
        high = low
    tl.store(d_scale + program * KEY + c[None, :], to_gain, mask=(c < KEY)[None, :])
    tl.store(d_shift + program * KEY + c[None, :], to_offset, mask=(c < KEY)[None, :])
