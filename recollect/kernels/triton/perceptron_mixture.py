"""The perceptron memory's tokens under the rule with momentum: S_t = mu_t S_{t-1} - eta_t g_t, Z_t = alpha_t Z_{t-1} + S_t.

Every gate is one number per token. In a piece both states are linear in what it starts from and in its gradients:

    Z_t = keep_t Z + boost_t S - sum over i <= t of weight[t, i] g_i,    S_t = slow_t S - sum over i <= t of pulled[t, i] g_i

These kernels take the place of those in `perceptron_tokens`: all pieces at once, before and after the walk.
NOT YET MEASURED ON A GPU.

Axis legend: B batch, T time, H heads, K key dim, P pieces; t, i, j tokens of a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    SIZE,
    channels,
    descent,
    line,
    normalised,
    normalised_back,
    own_piece,
    product,
    put,
    put_line,
    put_square,
    square,
    tokens_of,
)


@triton.jit
def _number(gate, row, real):
    """[16]: a gate that is one number per token, 0 beyond."""
    return tl.load(gate + row, mask=real, other=0.0)


@triton.jit
def _between(alpha):
    """[t, i] = alpha_{i+1} ... alpha_t for i <= t, else 0."""
    t, i = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.where(t >= i, tl.cumprod(tl.where(t > i, alpha[:, None], 1.0), axis=0), 0.0)


@triton.jit
def _between_back(g, PRECISION: tl.constexpr):
    """The gradient of log alpha from that of log `_between`, g."""
    t, m = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    before = product(g, tl.where(t < m, 1.0, 0.0).to(g.dtype), PRECISION)  # [t, m]: the sum over i < m
    return tl.sum(tl.where(t >= m, before, 0.0), axis=0)


@triton.jit
def _last(x):
    """The last row of a tile [16, N], which is that of the last token: behind it nothing decays and nothing is written."""
    return tl.sum(tl.where((tl.arange(0, SIZE) == SIZE - 1)[:, None], x, 0.0), axis=0)


@triton.jit
def _mixture(eta, log_alpha, log_momentum, row, real, PRECISION: tl.constexpr):
    """entered [t, j], pulled and weight [t, i], keep, slow and boost [t]; entered: what is left in Z_t of S_j."""
    kept, slowed = _number(log_alpha, row, real), _number(log_momentum, row, real)
    entered = tl.where(real[None, :], _between(tl.exp(kept)), 0.0)
    pulled = _between(tl.exp(slowed)) * _number(eta, row, real)[None, :]
    keep, slow = tl.exp(tl.cumsum(kept, axis=0)), tl.exp(tl.cumsum(slowed, axis=0))  # as in `whole`
    boost = tl.sum(entered * slow[None, :], axis=1)
    return entered, pulled, product(entered, pulled, PRECISION), keep, slow, boost


@triton.jit
def prepare_mixed(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
    log_momentum,
    decayed,
    in_end,
    rest,
    s,
    total,
    mix,
    late,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `prepare`; mix [B, H, T, 4]: keep, boost, and weight and pulled of the last token; late [B, H, P, 2]: its boost and
    slow."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        _, pulled, weight, keep, slow, boost = _mixture(eta, log_alpha, log_momentum, row, real, PRECISION)
        left, pulled = _last(weight), _last(pulled)
        put(decayed + tile, at, real, query * keep[:, None], KEY, KW, True)
        put(in_end + tile, at, real, keys * left[:, None], KEY, KW, True)
        put(rest + tile, at, real, tl.zeros_like(keys) + left[:, None], KEY, KW, True)
        put_square(s + program * n_tokens * 16, at, real, product(query, tl.trans(keys), PRECISION) * weight)
        for half in tl.static_range(2):
            put_line(
                total + ((program * n_rows + n) * 2 + half) * KEY, _last(tl.zeros_like(keys) + keep[:, None])[None, :], KEY, KW
            )
        to = mix + (program * n_tokens + at) * 4
        tl.store(to, keep, mask=real)
        tl.store(to + 1, boost, mask=real)
        tl.store(to + 2, left, mask=real)
        tl.store(to + 3, pulled, mask=real)
        last = tl.arange(0, SIZE) == SIZE - 1
        tl.store(late + (program * n_rows + n) * 2, tl.sum(tl.where(last, boost, 0.0)))
        tl.store(late + (program * n_rows + n) * 2 + 1, tl.sum(tl.where(last, slow, 0.0)))


@triton.jit
def finish_mixed(
    order,
    entries,
    ends,
    q,
    eta,
    log_alpha,
    log_momentum,
    scale,
    shift,
    gu,
    a,
    read,
    y,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `finish`; `read` holds what W_out gives for the piece's first state and last change."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry = entries + (batch * n_rows + n) * 6
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, _, weight, _, _, _ = _mixture(eta, log_alpha, log_momentum, row, real, PRECISION)
        factor = channels(gu + program * n_tokens * KEY, at, real, KEY, KW, True)
        seen = channels(read, row, real, KEY, KW, True)
        seen -= product(square(a + program * n_tokens * 16, at, real) * weight, factor, PRECISION)
        unit, _ = normalised(seen, KEY, KW)
        gain, offset = line(scale + head * KEY, KEY, KW), line(shift + head * KEY, KEY, KW)
        put(read, row, real, seen, KEY, KW, True)
        put(y, row, real, channels(q, row, real, KEY, KW, True) + gain * unit + offset, KEY, KW, True)


@triton.jit
def prepare_mixed_back(
    order,
    entries,
    ends,
    k,
    v,
    eta,
    log_alpha,
    log_momentum,
    delta,
    scale,
    shift,
    written,
    read,
    a,
    grad_y,
    gu,
    d_seen,
    moved,
    of_out,
    d_a,
    d_scale,
    d_shift,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    BIAS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    DELTA_WIDE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `prepare_back`; of_out is of gu."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        gain, offset = line(scale + head * KEY, KEY, KW), line(shift + head * KEY, KEY, KW)
        keys, values = channels(k, row, real, KEY, KW, True), channels(v, row, real, KEY, KW, True)
        if HAS_DELTA:
            threshold = channels(delta, row, real, KEY, KW, DELTA_WIDE)
        else:
            threshold = keys
        u = channels(written, row, real, KEY, KW, True)
        factor = descent(u, keys, values, threshold, gain, offset, KEY, KW, BIAS, SHARPNESS)
        put(gu + tile, at, real, factor, KEY, KW, True)

        _, _, weight, keep, _, _ = _mixture(eta, log_alpha, log_momentum, row, real, PRECISION)
        d_out = channels(grad_y, row, real, KEY, KW, True)
        unit, rate = normalised(channels(read, row, real, KEY, KW, True), KEY, KW)
        d = normalised_back(d_out * gain, unit, rate, KEY, KW)
        put(d_seen + tile, at, real, d, KEY, KW, True)
        put(moved + tile, at, real, d * keep[:, None], KEY, KW, True)
        outer = square(a + program * n_tokens * 16, at, real) * weight
        put(of_out + tile, at, real, -product(tl.trans(outer), d, PRECISION), KEY, KW, True)
        put_square(d_a + program * n_tokens * 16, at, real, -product(d, tl.trans(factor), PRECISION) * weight)
        put_line(d_scale + (program * n_rows + n) * KEY, tl.sum(d_out * unit, axis=0)[None, :], KEY, KW)
        put_line(d_shift + (program * n_rows + n) * KEY, tl.sum(d_out, axis=0)[None, :], KEY, KW)


@triton.jit
def finish_mixed_back(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
    log_momentum,
    a,
    grad_y,
    gu,
    d_seen,
    end_in,
    end_out,
    of_query,
    late_in,
    late_out,
    late_query,
    d_s,
    along,
    d_mix,
    d_late,
    d_q,
    d_k,
    d_eta,
    d_log_alpha,
    d_log_momentum,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `finish_back`; d_mix and d_late: as `walk_back` leaves them."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        t, last = tl.arange(0, SIZE), tl.arange(0, SIZE) == SIZE - 1
        lower = t[:, None] >= t[None, :]
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        factor, seen = channels(gu + tile, at, real, KEY, KW, True), channels(d_seen + tile, at, real, KEY, KW, True)
        entered, pulled, weight, keep, slow, boost = _mixture(eta, log_alpha, log_momentum, row, real, PRECISION)
        inner = square(d_s + program * n_tokens * 16, at, real)
        in_z, in_s = channels(end_in + tile, at, real, KEY, KW, True), channels(late_in + tile, at, real, KEY, KW, True)
        out_z, out_s = channels(end_out + tile, at, real, KEY, KW, True), channels(late_out + tile, at, real, KEY, KW, True)
        of_z, of_s = channels(of_query + tile, at, real, KEY, KW, True), channels(late_query + tile, at, real, KEY, KW, True)
        to_key = (
            product(tl.trans(inner * weight), query, PRECISION) - in_z * _last(weight)[:, None] - in_s * _last(pulled)[:, None]
        )
        to_query = product(inner * weight, keys, PRECISION) + of_z * keep[:, None] + of_s * boost[:, None]
        put(d_q, row, real, to_query + channels(grad_y, row, real, KEY, KW, True), KEY, KW, True)
        put(d_k, row, real, to_key + channels(d_k, row, real, KEY, KW, True), KEY, KW, True)

        d_weight = inner * product(query, tl.trans(keys), PRECISION)
        d_weight -= product(seen, tl.trans(factor), PRECISION) * square(a + program * n_tokens * 16, at, real)
        d_weight = tl.where(lower, d_weight, 0.0)
        d_weight -= tl.where(last[:, None], tl.sum(in_z * keys + out_z * factor, axis=1)[None, :], 0.0)
        of_mix = d_mix + (program * n_tokens + at) * 4
        to_keep = tl.load(of_mix, mask=real, other=0.0) + tl.sum(of_z * query, axis=1)
        to_boost = tl.load(of_mix + 1, mask=real, other=0.0) + tl.sum(of_s * query, axis=1)
        to_boost += tl.where(last, tl.load(d_late + (program * n_rows + n) * 2), 0.0)
        d_entered = product(d_weight, tl.trans(pulled), PRECISION) + to_boost[:, None] * slow[None, :]
        d_pulled = product(tl.trans(entered), d_weight, PRECISION)
        d_pulled -= tl.where(last[:, None], tl.sum(in_s * keys + out_s * factor, axis=1)[None, :], 0.0)
        to_slow = tl.sum(entered * to_boost[:, None], axis=0)
        to_slow += tl.where(last, tl.load(d_late + (program * n_rows + n) * 2 + 1), 0.0)
        lines = along + (program * n_rows + n) * 2 * KEY
        of_keep = to_keep * keep + tl.where(last, tl.sum(line(lines, KEY, KW) + line(lines + KEY, KEY, KW)), 0.0)
        to_alpha = tl.cumsum(of_keep, axis=0, reverse=True) + _between_back(d_entered * entered, PRECISION)
        to_mu = tl.cumsum(to_slow * slow, axis=0, reverse=True) + _between_back(d_pulled * pulled, PRECISION)
        between = _between(tl.exp(_number(log_momentum, row, real)))
        tl.store(d_eta + row, tl.sum(d_pulled * between, axis=0), mask=real)
        tl.store(d_log_alpha + row, to_alpha, mask=real)
        tl.store(d_log_momentum + row, to_mu, mask=real)
