"""The perceptron memory's walk over the pieces of one head of one batch element, forward: one program.

Its matrices lie in scratch that a level-two cache holds, as [2, O, K]: W_in, and W_out transposed. Every piece passes twice over the
hidden units, BO at a time; what the passes multiply with is read anew for each BO, which leaves registers to the products. Scratch that
other threads of the program have written is read behind a barrier.

Two states are in use, the one where the chunk began (gradients are taken there) and the one being written: the first piece of a chunk
writes to the place of the last chunk's, and nothing is copied.
NOT YET MEASURED ON A GPU.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    SCALED,
    SIMPLEX,
    block,
    channels,
    column,
    copy,
    descent,
    factor_of,
    gelu,
    hidden,
    line,
    norm_of,
    product,
    put,
    put_block,
    put_hidden,
    put_line,
    put_square,
    shrink,
    square,
    tokens_of,
)
from recollect.kernels.triton.perceptron_simplex import framed, less_some, softmaxed


@triton.jit
def walk(
    order,
    entries,
    ends,
    q,
    k,
    v,
    delta,
    scale,
    shift,
    radius,
    decayed,
    in_end,
    rest,
    gu,
    s,
    total,
    mix,
    late,
    states,
    room,
    last,
    last_anchor,
    saved,
    written,
    read,
    factors,
    open_kept,
    kept,
    means,
    linked,
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
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    LEARN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """decayed .. total: as `prepare` leaves them, gu for what is written with; s becomes the second layer's scores.
    With MOMENTUM, a state is followed by its last change: 4 matrices, else 2; mix and late: as `prepare_mixed` leaves them.
    states [B, H, 3, 2 or 4, O, K]: the current one, that of the open chunk's start, that of a document's start, the first two used up;
    room [B, H, 16, O]; last, last_anchor [B, H, 2 or 4, O, K]: the first two states as they are at the end;
    factors [B, H, P, 4]: of link SCALED, of both matrices, and their norms. Of link SIMPLEX: open_kept [B, H, 2, K] the log of the
    decay in the open chunk before the call, kept [B, H, P, 2, K] the decay in the chunk before the piece, means [B, H, T] over the
    hidden units that a key gives, linked [B, H, 2, 2, O, K] room for the chunk's weights and the piece's frame."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, program % n_heads
    AREA: tl.constexpr = HIDDEN * KEY
    FULL: tl.constexpr = 4 * AREA if MOMENTUM else 2 * AREA
    tile = program * n_tokens * KEY
    states += program * 3 * FULL
    saved += program * n_slots * FULL
    room += program * 16 * HIDDEN
    s += program * n_tokens * 16
    mix += program * n_tokens * 4
    here = tl.full((), 0, tl.int32)
    point = tl.full((), 1, tl.int32)
    by_in, by_out = tl.full((), 1.0, scale.dtype.element_ty), tl.full((), 1.0, scale.dtype.element_ty)
    norm_in, norm_out = by_in, by_out
    if LINK == SIMPLEX:
        linked += program * 4 * AREA
        kept += program * n_rows * 2 * KEY
        kept_in = tl.exp(line(open_kept + program * 2 * KEY, KEY, KW))
        kept_out = tl.exp(line(open_kept + (program * 2 + 1) * KEY, KEY, KW))
    for n in range(tl.load(ends + batch * 2)):
        entry = entries + (batch * n_rows + n) * 6
        flags, slot = tl.load(entry + 2), tl.load(entry + 3).to(tl.int64)
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        here = tl.where(flags >= 2, 2, here)
        point = tl.where(flags % 2 == 1, here, point)
        there = tl.where(flags % 2 == 1, tl.where(here == 0, 1, 0), here)
        origin, source, target = states + point * FULL, states + here * FULL, states + there * FULL
        if THRESHOLD > 0 and (flags == 1) & (n > 0):
            shrink(source, 2 * HIDDEN, KEY, KW, BO, THRESHOLD)
            tl.debug_barrier()

        if LINK == SCALED:
            if (flags % 2 == 1) | (n == 0):
                norm_in = norm_of(origin, HIDDEN, KEY, KW, BO, EXPONENT)
                norm_out = norm_of(origin + AREA, HIDDEN, KEY, KW, BO, EXPONENT)
                by_in, by_out = (
                    factor_of(norm_in, tl.load(radius + head * 2), EXPONENT),
                    factor_of(norm_out, tl.load(radius + head * 2 + 1), EXPONENT),
                )
            to = factors + (program * n_rows + n) * 4
            tl.store(to, by_in)
            tl.store(to + 1, by_out)
            tl.store(to + 2, norm_in)
            tl.store(to + 3, norm_out)
        weights, frame = origin, source
        if LINK == SIMPLEX:
            if (flags % 2 == 1) | (n == 0):
                softmaxed(origin, linked, HIDDEN, KEY, KW, BO)
                tl.debug_barrier()
            if flags % 2 == 1:
                kept_in, kept_out = kept_in * 0 + 1, kept_out * 0 + 1
            else:
                framed(source, origin, linked, linked + 2 * AREA, kept_in, kept_out, HIDDEN, KEY, KW, BO)
                tl.debug_barrier()
            weights, frame = linked, linked + tl.where(flags % 2 == 1, 0, 2) * AREA
            put_line(kept + n * 2 * KEY, kept_in, KEY, KW)
            put_line(kept + n * 2 * KEY + KEY, kept_out, KEY, KW)
        keys = channels(k, row, real, KEY, KW, True)
        u, mean = tl.zeros_like(keys), tl.zeros((16, 1), keys.dtype)
        shift_w, shift_r = tl.zeros_like(mean), tl.zeros_like(mean)
        for o in range(0, HIDDEN, BO):
            pre = product(keys, tl.trans(block(weights, o, KEY, KW, BO)), PRECISION) * by_in
            if LINK == SIMPLEX:
                pre += tl.sum(keys, axis=1)[:, None]
            put_hidden(room, o, pre, HIDDEN, BO)
            act, _, _ = gelu(pre)
            if LINK == SIMPLEX:
                mean += tl.sum(act, axis=1)[:, None] / HIDDEN
                act, shift_w = less_some(act, shift_w, o)
            u += product(act, block(weights + AREA, o, KEY, KW, BO), PRECISION) * by_out
        if LINK == SIMPLEX:
            tl.store(means + (program * n_tokens + at)[:, None], mean, mask=real[:, None])
        if HAS_DELTA:
            threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
        else:
            threshold = keys
        gain, offset = line(scale + head * KEY, KEY, KW), line(shift + head * KEY, KEY, KW)
        values = channels(v, row, real, KEY, KW, True)
        factor = descent(u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS)
        put(gu + tile, at, real, factor, KEY, KW, True)
        if LEARN:
            put(written, row, real, u, KEY, KW, True)
        tl.debug_barrier()

        a = tl.zeros((16, 16), keys.dtype)
        seen = tl.zeros_like(keys)
        for o in range(0, HIDDEN, BO):
            factor = channels(gu + tile, at, real, KEY, KW, True)
            inner, totals = square(s, at, real), total + (program * n_rows + n) * 2 * KEY
            keep_in, keep_out = line(totals, KEY, KW), line(totals + KEY, KEY, KW)
            act, slope, _ = gelu(hidden(room, o, HIDDEN, BO))
            gp = product(factor, tl.trans(block(weights + AREA, o, KEY, KW, BO)), PRECISION) * (slope * by_out)
            w_in, w_out = block(source, o, KEY, KW, BO), block(source + AREA, o, KEY, KW, BO)
            if LEARN and slot >= 0:
                put_block(saved + slot * FULL, o, w_in, KEY, KW, BO)
                put_block(saved + slot * FULL + AREA, o, w_out, KEY, KW, BO)
            r_in, r_out = w_in, w_out
            if LINK == SIMPLEX:
                r_in, r_out = block(frame, o, KEY, KW, BO), block(frame + AREA, o, KEY, KW, BO)
            pre = product(channels(decayed + tile, at, real, KEY, KW, True), tl.trans(r_in), PRECISION)
            if LINK == SIMPLEX:
                pre += tl.sum(channels(q, row, real, KEY, KW, True), axis=1)[:, None]
            if MOMENTUM:
                m_in, m_out = block(source + 2 * AREA, o, KEY, KW, BO), block(source + 3 * AREA, o, KEY, KW, BO)
                if LEARN and slot >= 0:
                    put_block(saved + slot * FULL + 2 * AREA, o, m_in, KEY, KW, BO)
                    put_block(saved + slot * FULL + 3 * AREA, o, m_out, KEY, KW, BO)
                pre += product(channels(q, row, real, KEY, KW, True) * column(mix, at, real, 1), tl.trans(m_in), PRECISION)
            act_r, _, _ = gelu((pre - product(inner, gp, PRECISION)) * by_in)
            if LINK == SIMPLEX:
                act_r, shift_r = less_some(act_r, shift_r, o)
                a += product(act_r, tl.trans(act - mean), PRECISION)
            else:
                a += product(act_r, tl.trans(act), PRECISION)
            if MOMENTUM:
                seen += product(act_r * column(mix, at, real, 0), w_out, PRECISION)
                seen += product(act_r * column(mix, at, real, 1), m_out, PRECISION)
            else:
                seen += product(act_r, r_out, PRECISION)
            f_in = channels(in_end + tile, at, real, KEY, KW, True)
            f_out = factor * channels(rest + tile, at, real, KEY, KW, True)
            w_in = keep_in * w_in - product(tl.trans(gp), f_in, PRECISION)
            w_out = keep_out * w_out - product(tl.trans(act), f_out, PRECISION)
            if MOMENTUM:
                boost, slow = tl.load(late + (program * n_rows + n) * 2), tl.load(late + (program * n_rows + n) * 2 + 1)
                w_in, w_out = w_in + boost * m_in, w_out + boost * m_out
                f_in, f_out = (
                    channels(k, row, real, KEY, KW, True) * column(mix, at, real, 3),
                    factor * column(mix, at, real, 3),
                )
                put_block(target + 2 * AREA, o, slow * m_in - product(tl.trans(gp), f_in, PRECISION), KEY, KW, BO)
                put_block(target + 3 * AREA, o, slow * m_out - product(tl.trans(act), f_out, PRECISION), KEY, KW, BO)
            put_block(target, o, w_in, KEY, KW, BO)
            put_block(target + AREA, o, w_out, KEY, KW, BO)
        tl.debug_barrier()
        put(read, row, real, seen, KEY, KW, True)
        put_square(s, at, real, a)
        if LINK == SIMPLEX:
            totals = total + (program * n_rows + n) * 2 * KEY
            kept_in, kept_out = kept_in * line(totals, KEY, KW), kept_out * line(totals + KEY, KEY, KW)
        here = there
    full = tl.load(ends + batch * 2 + 1) != 0
    if THRESHOLD > 0 and full:
        shrink(states + here * FULL, 2 * HIDDEN, KEY, KW, BO, THRESHOLD)
        tl.debug_barrier()
    point = tl.where(full, here, point)
    copy(states + here * FULL, last + program * FULL, FULL // KEY, KEY, KW, BO)
    copy(states + point * FULL, last_anchor + program * FULL, FULL // KEY, KEY, KW, BO)
