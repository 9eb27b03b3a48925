"""The perceptron memory's forward kernel: one program walks the pieces of one head of one batch element.

Its matrices lie in scratch that a level-two cache holds, as [2, O, K]: W_in, and W_out transposed. Two states are in use, the one where
the chunk began (gradients are taken there) and the one being written, so that the first piece of a chunk writes to the place of the
last chunk's and nothing is copied. A piece passes twice over the hidden units, BO at a time.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    attended,
    block,
    channels,
    descent,
    gelu,
    hidden,
    normalised,
    product,
    put,
    put_block,
    put_hidden,
    scores,
    tokens_of,
    whole,
)


@triton.jit
def forward_kernel(
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
    states,
    room,
    y,
    last,
    saved,
    written,
    read,
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
    LEARN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """states [B, H, 3, 2, O, K]: the current one, that of the open chunk's start, that of a document's start, the first two used up;
    room [B, H, 16, O]; last [B, H, 2, 2, O, K]: the first two as they are at the end."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, program % n_heads
    AREA: tl.constexpr = HIDDEN * KEY
    c = tl.arange(0, KW)
    gain = tl.load(scale + head * KEY + c, mask=c < KEY, other=0.0)[None, :]
    offset = tl.load(shift + head * KEY + c, mask=c < KEY, other=0.0)[None, :]
    states += program * 6 * AREA
    saved += program * n_slots * 2 * AREA
    room += program * 16 * HIDDEN
    order += batch * n_tokens
    here = tl.full((), 0, tl.int32)
    point = tl.full((), 1, tl.int32)
    for n in range(tl.load(ends + batch * 2)):
        entry = entries + (batch * n_rows + n) * 6
        begin, count, flags, slot = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3).to(tl.int64)
        place, real = tokens_of(order, begin, count, 0)
        row = (batch * n_tokens + place) * n_heads + head
        next_place, behind = tokens_of(order, begin, count, 1)
        next_row = (batch * n_tokens + next_place) * n_heads + head
        here = tl.where(flags >= 2, 2, here)
        point = tl.where(flags % 2 == 1, here, point)
        there = tl.where(flags % 2 == 1, tl.where(here == 0, 1, 0), here)
        origin, source, target = states + point * 2 * AREA, states + here * 2 * AREA, states + there * 2 * AREA

        keys = channels(k, row, real, KEY, KW, True)
        u = tl.zeros_like(keys)
        for o in range(0, HIDDEN, BO):
            pre = product(keys, tl.trans(block(origin, o, KEY, KW, BO)), PRECISION)
            put_hidden(room, o, pre, HIDDEN, BO)
            act, _, _ = gelu(pre)
            u += product(act, block(origin + AREA, o, KEY, KW, BO), PRECISION)
        tl.debug_barrier()

        if HAS_DELTA:
            threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
        else:
            threshold = keys
        values = channels(v, row, real, KEY, KW, True)
        gu = descent(u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS)
        step = channels(eta, row, real, KEY, KW, ETA_WIDE)
        alpha = tl.exp(channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE))
        after = tl.exp(channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE))
        decay, to_end = tl.cumprod(alpha, axis=0), tl.cumprod(after, axis=0, reverse=True)
        total = whole(alpha, to_end)[None, :]
        f_in, f_out = step * keys, step * gu
        in_end, out_end = f_in * to_end, f_out * to_end
        query = channels(q, row, real, KEY, KW, True)
        decayed = query * decay
        s = scores(query, f_in, alpha, after, KW, PRECISION)

        a = tl.zeros_like(s)
        seen = tl.zeros_like(keys)
        for o in range(0, HIDDEN, BO):
            act, slope, _ = gelu(hidden(room, o, HIDDEN, BO))
            gp = product(gu, tl.trans(block(origin + AREA, o, KEY, KW, BO)), PRECISION) * slope
            w_in, w_out = block(source, o, KEY, KW, BO), block(source + AREA, o, KEY, KW, BO)
            if LEARN and slot >= 0:
                put_block(saved + slot * 2 * AREA, o, w_in, KEY, KW, BO)
                put_block(saved + slot * 2 * AREA + AREA, o, w_out, KEY, KW, BO)
            pre = product(decayed, tl.trans(w_in), PRECISION) - product(s, gp, PRECISION)
            act_r, _, _ = gelu(pre)
            a += product(act_r, tl.trans(act), PRECISION)
            seen += product(act_r, w_out, PRECISION)
            put_block(target, o, total * w_in - product(tl.trans(gp), in_end, PRECISION), KEY, KW, BO)
            put_block(target + AREA, o, total * w_out - product(tl.trans(act), out_end, PRECISION), KEY, KW, BO)
        tl.debug_barrier()

        seen = seen * decay - attended(a, f_out, alpha, after, KW, PRECISION)
        unit, _ = normalised(seen, KEY, KW)
        put(y, row, real, query + gain * unit + offset, KEY, KW, True)
        if LEARN:
            put(written, row, real, u, KEY, KW, True)
            put(read, row, real, seen, KEY, KW, True)
        here = there
    point = tl.where(tl.load(ends + batch * 2 + 1) != 0, here, point)
    last += program * 4 * AREA
    for o in range(0, HIDDEN, BO):
        for half in tl.static_range(2):
            at = half * AREA
            put_block(last + at, o, block(states + here * 2 * AREA + at, o, KEY, KW, BO), KEY, KW, BO)
            put_block(last + 2 * AREA + at, o, block(states + point * 2 * AREA + at, o, KEY, KW, BO), KEY, KW, BO)
