"""What the perceptron memory's kernels compute on one piece of 16 tokens, with no matrix of the memory at hand.

A piece's decays act between every two of its tokens, channel by channel: P[t, i] = alpha_{i+1} ... alpha_t. Quotients of running
products would overflow; halving does not. Of two tokens in the two halves of a block of 2, 4, 8 or 16, the decay between them is a
running product up to the middle times one from there on: a sum over pairs is four products of matrices, one for each size of block.
NOT YET MEASURED ON A GPU.

Axis legend: t, i tokens of a piece (16 rows of a tile); columns are K channels, padded with zeros to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

L2, LP3, HUBER, L1, HUBER_NORM, LP, L_INFINITY, PSEUDO_HUBER, VALUE_SHIFT = (tl.constexpr(n) for n in range(9))
EPS = tl.constexpr(1e-6)  # of norms and of biases
IDENTITY, SCALED, SIMPLEX = (tl.constexpr(n) for n in range(3))  # links
LEAST = tl.constexpr(1e-8)  # of a matrix' norm
ROOT, CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # of gelu
SIZE = tl.constexpr(16)  # tokens of a piece


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b, summed in their own precision."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def shrunk(w, THRESHOLD: tl.constexpr):
    """Entries nearer to zero by a threshold, those below it at zero; what is no number stays none."""
    return w - tl.where(w > THRESHOLD, THRESHOLD, tl.where(w < -THRESHOLD, -THRESHOLD, w))


@triton.jit
def own_piece(n_rows):
    """The head (of all batch elements) and the piece of a program. One axis of the grid for both: the others end at 65,535."""
    flat = tl.program_id(0).to(tl.int64)
    return flat // n_rows, flat % n_rows


@triton.jit
def tokens_of(order, entry, batch, head, n_tokens, n_heads, step: tl.constexpr):
    """The tokens of a piece, `step` behind each: their places in the order, their rows in [B, T, H], and whether they exist."""
    t = tl.arange(0, SIZE) + step
    begin = tl.load(entry)
    real = t < tl.load(entry + 1)
    place = tl.load(order + batch * n_tokens + begin + t, mask=real, other=0)
    return begin + t, (batch * n_tokens + place) * n_heads + head, real


@triton.jit
def square(x, at, real):
    """[16, 16] of a piece's rows of x, zeros beyond."""
    return tl.load(x + at[:, None] * SIZE + tl.arange(0, SIZE)[None, :], mask=real[:, None], other=0.0)


@triton.jit
def put_square(x, at, real, value):
    """Store what `square` reads."""
    tl.store(x + at[:, None] * SIZE + tl.arange(0, SIZE)[None, :], value, mask=real[:, None])


@triton.jit
def column(x, at, real, n: tl.constexpr):
    """[16, 1]: entry n of 4 of a piece's tokens, zeros beyond."""
    return tl.load(x + at * 4 + n, mask=real, other=0.0)[:, None]


@triton.jit
def line(x, KEY: tl.constexpr, KW: tl.constexpr):
    """[1, KW]: one vector of channels."""
    c = tl.arange(0, KW)
    return tl.load(x + c, mask=c < KEY, other=0.0)[None, :]


@triton.jit
def put_line(x, value, KEY: tl.constexpr, KW: tl.constexpr):
    """Store what `line` reads."""
    c = tl.arange(0, KW)[None, :]
    tl.store(x + c, value, mask=c < KEY)


@triton.jit
def channels(x, row, real, KEY: tl.constexpr, KW: tl.constexpr, WIDE: tl.constexpr):
    """[16, KW] of rows of x, zeros beyond: their channels, or one number in all of them unless WIDE."""
    c = tl.arange(0, KW)
    inside = real[:, None] & (c < KEY)[None, :]
    if WIDE:
        entries = tl.load(x + row[:, None] * KEY + c[None, :], mask=inside, other=0.0)
    else:
        entries = tl.where(inside, tl.load(x + row, mask=real, other=0.0)[:, None], 0.0)
    return entries


@triton.jit
def put(x, row, real, value, KEY: tl.constexpr, KW: tl.constexpr, WIDE: tl.constexpr):
    """Store a tile where `channels` reads one; the sum over channels unless WIDE."""
    c = tl.arange(0, KW)
    if WIDE:
        tl.store(x + row[:, None] * KEY + c[None, :], value, mask=real[:, None] & (c < KEY)[None, :])
    else:
        tl.store(x + row, tl.sum(value, axis=1), mask=real)


@triton.jit
def block(x, o, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr):
    """[BO, KW]: a matrix' rows of BO hidden units from o on."""
    c = tl.arange(0, KW)[None, :]
    return tl.load(x + (o + tl.arange(0, BO))[:, None] * KEY + c, mask=c < KEY, other=0.0)


@triton.jit
def put_block(x, o, value, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr):
    """Store what `block` reads."""
    c = tl.arange(0, KW)[None, :]
    tl.store(x + (o + tl.arange(0, BO))[:, None] * KEY + c, value, mask=c < KEY)


@triton.jit
def hidden(x, o, HIDDEN: tl.constexpr, BO: tl.constexpr):
    """[16, BO]: BO hidden units of every token, from o on."""
    return tl.load(x + tl.arange(0, SIZE)[:, None] * HIDDEN + (o + tl.arange(0, BO))[None, :])


@triton.jit
def put_hidden(x, o, value, HIDDEN: tl.constexpr, BO: tl.constexpr):
    """Store what `hidden` reads."""
    tl.store(x + tl.arange(0, SIZE)[:, None] * HIDDEN + (o + tl.arange(0, BO))[None, :], value)


@triton.jit
def whole(logs):
    """[1, KW]: the decay over the piece, whose tokens' logs these are. Not a product of theirs: its roundings, mostly the same at every
    token, would grow with the length."""
    return tl.exp(tl.sum(logs, axis=0))[None, :]


@triton.jit
def _spans(alpha, after, HALF: tl.constexpr, KW: tl.constexpr):
    """Decays in blocks of HALF tokens: from before the block's first token to t, and from i to its last."""
    blocks: tl.constexpr = SIZE // HALF
    if HALF == 1:
        up, down = alpha, tl.full((SIZE, KW), 1.0, alpha.dtype)
    else:
        last = tl.arange(0, SIZE) % HALF == HALF - 1
        down = tl.where(last[:, None], 1.0, after)
        up = tl.reshape(tl.cumprod(tl.reshape(alpha, (blocks, HALF, KW)), axis=1), (SIZE, KW))
        down = tl.reshape(tl.cumprod(tl.reshape(down, (blocks, HALF, KW)), axis=1, reverse=True), (SIZE, KW))
    return up, down


@triton.jit
def _halves(HALF: tl.constexpr):
    """[t, i]: is t in the second half of a block of 2 HALF tokens whose first half has i?"""
    t, i = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return (t // (2 * HALF) == i // (2 * HALF)) & (t // HALF % 2 == 1) & (i // HALF % 2 == 0)


@triton.jit
def _same():
    """[t, i]: is it the same token?"""
    return tl.arange(0, SIZE)[:, None] == tl.arange(0, SIZE)[None, :]


@triton.jit
def scores(x, f, alpha, after, KW: tl.constexpr, PRECISION: tl.constexpr):
    """[t, i] = x_t . P[t, i] f_i for i <= t; after_t = alpha_{t+1}, 1 at the last token."""
    out = tl.where(_same(), tl.sum(x * f, axis=1)[:, None], 0.0)
    for level in tl.static_range(4):
        up, down = _spans(alpha, after, 2**level, KW)
        out += tl.where(_halves(2**level), product(x * up, tl.trans(f * down), PRECISION), 0.0)
    return out


@triton.jit
def attended(w, f, alpha, after, KW: tl.constexpr, PRECISION: tl.constexpr):
    """out_t = sum over i <= t of w[t, i] P[t, i] f_i."""
    out = tl.sum(tl.where(_same(), w, 0.0), axis=1)[:, None] * f
    for level in tl.static_range(4):
        up, down = _spans(alpha, after, 2**level, KW)
        out += up * product(tl.where(_halves(2**level), w, 0.0), f * down, PRECISION)
    return out


@triton.jit
def attended_back(w, x, alpha, after, KW: tl.constexpr, PRECISION: tl.constexpr):
    """out_i = sum over t >= i of w[t, i] P[t, i] x_t."""
    out = tl.sum(tl.where(_same(), w, 0.0), axis=0)[:, None] * x
    for level in tl.static_range(4):
        up, down = _spans(alpha, after, 2**level, KW)
        out += down * product(tl.trans(tl.where(_halves(2**level), w, 0.0)), x * up, PRECISION)
    return out


@triton.jit
def gelu(x):
    """x sigmoid(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3); first and second derivative."""
    xx = x * x
    s = 1 / (1 + tl.exp(x * (xx * CUBE + 1) * -ROOT))
    w, z1 = s * (1 - s), (xx * (3 * CUBE) + 1) * ROOT
    curve = w * (2 * z1 + x * ((1 - 2 * s) * z1 * z1 + x * (6 * ROOT * CUBE)))
    return x * s, s + x * w * z1, curve


@triton.jit
def normalised(u, KEY: tl.constexpr, KW: tl.constexpr):
    """(u - mean) / sqrt(variance + eps) of each row, and one over that root."""
    inside = (tl.arange(0, KW) < KEY)[None, :]
    x = tl.where(inside, u - (tl.sum(u, axis=1) / KEY)[:, None], 0.0)
    rate = 1 / tl.sqrt(tl.sum(x * x, axis=1) / KEY + EPS)
    return x * rate[:, None], rate


@triton.jit
def normalised_back(d, unit, rate, KEY: tl.constexpr, KW: tl.constexpr):
    """The gradient of u from that of `normalised`."""
    inside = (tl.arange(0, KW) < KEY)[None, :]
    mean, along = tl.sum(d, axis=1) / KEY, tl.sum(d * unit, axis=1) / KEY
    return tl.where(inside, rate[:, None] * (d - mean[:, None] - unit * along[:, None]), 0.0)


@triton.jit
def _worst(r, KEY: tl.constexpr, TEMPERATURE: tl.constexpr):
    """The softmax of (r, -r) / temperature over the channels of each row: its two halves, their sum and their difference."""
    inside = (tl.arange(0, r.shape[1]) < KEY)[None, :]
    most = tl.max(tl.abs(r), axis=1)[:, None]
    up = tl.where(inside, tl.exp((r - most) / TEMPERATURE), 0.0)
    down = tl.where(inside, tl.exp((-r - most) / TEMPERATURE), 0.0)
    total = tl.sum(up + down, axis=1)[:, None]
    return (up + down) / total, (up - down) / total


@triton.jit
def phi(r, delta, KEY: tl.constexpr, BIAS: tl.constexpr, SHARPNESS: tl.constexpr):
    """The bias' gradient at residuals r. SHARPNESS: the number that a bias has, LP's exponent, L_INFINITY's temperature."""
    if BIAS == LP3:
        value = r * tl.sqrt(r * r + EPS)
    elif BIAS == L1:
        value = 2 / (1 + tl.exp(-2 * SHARPNESS * r)) - 1
    elif BIAS == HUBER:
        value = tl.maximum(tl.minimum(r, delta), -delta)
    elif BIAS == HUBER_NORM:
        size, threshold = tl.sqrt(tl.sum(r * r, axis=1) + EPS), tl.sum(delta, axis=1) / KEY
        value = r * tl.minimum(threshold / size, 1.0)[:, None]
    elif BIAS == LP:
        value = r * tl.exp((SHARPNESS / 2 - 1) * tl.log(r * r + EPS))
    elif BIAS == L_INFINITY:
        _, value = _worst(r, KEY, SHARPNESS)
    elif BIAS == PSEUDO_HUBER:
        ratio = r / tl.maximum(delta, EPS)
        value = r / tl.sqrt(1 + ratio * ratio)
    elif BIAS == VALUE_SHIFT:
        size, radius = tl.sqrt(tl.sum(r * r, axis=1) + EPS), tl.sum(delta, axis=1) / KEY
        value = r * (1 + radius / size)[:, None]
    else:
        value = r
    return value


@triton.jit
def phi_back(d, r, delta, KEY: tl.constexpr, BIAS: tl.constexpr, SHARPNESS: tl.constexpr):
    """Gradients of r and delta from that of `phi`."""
    d_delta = tl.zeros_like(d)
    if BIAS == LP3:
        size = tl.sqrt(r * r + EPS)
        d_r = d * (size + r * r / size)
    elif BIAS == L1:
        s = 1 / (1 + tl.exp(-2 * SHARPNESS * r))
        d_r = d * (4 * SHARPNESS) * s * (1 - s)
    elif BIAS == HUBER:
        above, below = r > delta, r < -delta
        d_r = tl.where(above | below, 0.0, d)
        d_delta = tl.where(above, d, tl.where(below, -d, 0.0))
    elif BIAS == HUBER_NORM:
        size, threshold = tl.sqrt(tl.sum(r * r, axis=1) + EPS), tl.sum(delta, axis=1) / KEY
        beyond = (size > threshold)[:, None]
        along = (tl.sum(r * d, axis=1) / size)[:, None]
        d_r = tl.where(beyond, (threshold / size)[:, None] * (d - r * along / size[:, None]), d)
        d_delta = tl.where(beyond, along / KEY, 0.0) + d_delta
    elif BIAS == LP:
        square = r * r + EPS
        d_r = d * tl.exp((SHARPNESS / 2 - 1) * tl.log(square)) * (1 + (SHARPNESS - 2) * (r * r / square))
    elif BIAS == L_INFINITY:
        both, value = _worst(r, KEY, SHARPNESS)
        d_r = (both * d - value * tl.sum(value * d, axis=1)[:, None]) / SHARPNESS
    elif BIAS == PSEUDO_HUBER:
        ratio = r / tl.maximum(delta, EPS)
        rate = 1 / tl.sqrt(1 + ratio * ratio)
        slope = ratio * rate
        d_r = d * rate * rate * rate
        d_delta = tl.where(delta >= EPS, d * slope * slope * slope, 0.0)
    elif BIAS == VALUE_SHIFT:
        size, radius = tl.sqrt(tl.sum(r * r, axis=1) + EPS), tl.sum(delta, axis=1) / KEY
        share, along = (radius / size)[:, None], (tl.sum(r * d, axis=1) / size)[:, None]
        d_r = d + share * (d - r * along / size[:, None])
        d_delta = along / KEY + d_delta
    else:
        d_r = d
    return d_r, d_delta


@triton.jit
def descent(u, k, v, delta, scale, shift, KEY: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr, SHARPNESS: tl.constexpr):
    """The gradient of u, W_out's outputs for keys: of the bias at k + scale norm(u) + shift - v."""
    unit, rate = normalised(u, KEY, KW)
    g = scale * phi(k + scale * unit + shift - v, delta, KEY, BIAS, SHARPNESS)
    return normalised_back(g, unit, rate, KEY, KW)


@triton.jit
def descent_back(
    d, u, k, v, delta, scale, shift, KEY: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr, SHARPNESS: tl.constexpr
):
    """From the gradient of `descent` to those of u, of the residual, delta and scale (summed over tokens); shift has the residual's."""
    inside = (tl.arange(0, KW) < KEY)[None, :]
    unit, rate = normalised(u, KEY, KW)
    r = k + scale * unit + shift - v
    value = phi(r, delta, KEY, BIAS, SHARPNESS)
    g = scale * value
    gu = normalised_back(g, unit, rate, KEY, KW)
    a = d * rate[:, None]
    mean, along = (tl.sum(a, axis=1) / KEY)[:, None], (tl.sum(a * unit, axis=1) / KEY)[:, None]
    of_rate = (tl.sum(d * gu, axis=1) * rate / KEY)[:, None]
    d_g = tl.where(inside, a - mean - unit * along, 0.0)
    d_r, d_delta = phi_back(scale * d_g, r, delta, KEY, BIAS, SHARPNESS)
    d_delta = tl.where(inside, d_delta, 0.0)
    d_unit = scale * d_r - a * (tl.sum(g * unit, axis=1) / KEY)[:, None] - g * along
    d_u = normalised_back(d_unit, unit, rate, KEY, KW) - of_rate * unit
    return d_u, d_r, d_delta, tl.sum(d_g * value + d_r * unit, axis=0)[None, :]


@triton.jit
def entry_power(unit, EXPONENT: tl.constexpr):
    """|x|^EXPONENT of entries x in units of the largest one, EXPONENT > 0."""
    if EXPONENT == 2:
        found = unit * unit
    else:
        found = tl.where(unit == 0, 0.0, tl.exp(EXPONENT * tl.log(tl.where(unit == 0, 1.0, tl.abs(unit)))))
    return found


@triton.jit
def norm_of_units(largest, total, EXPONENT: tl.constexpr):
    """The l_q norm, q = EXPONENT, from the largest entry's size and the sum of powers in units of it (at least 1, or all is 0)."""
    if EXPONENT == 4:
        norm = largest * tl.sqrt(tl.sqrt(total))
    else:
        norm = largest * tl.exp(tl.log(tl.maximum(total, 1.0)) / EXPONENT)
    return norm


@triton.jit
def norm_of(x, HIDDEN: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr, EXPONENT: tl.constexpr):
    """The l_q norm of a matrix, q = EXPONENT: in units of its largest entry, whose power may not be a number."""
    most = tl.zeros((BO, KW), x.dtype.element_ty)
    total = tl.zeros_like(most)
    for o in range(0, HIDDEN, BO):
        most = tl.maximum(most, tl.abs(block(x, o, KEY, KW, BO)))
    largest = tl.max(most)
    unit = tl.where(largest == 0, 1.0, largest)
    for o in range(0, HIDDEN, BO):
        entry = block(x, o, KEY, KW, BO) / unit
        total += entry * entry * entry_power(entry, EXPONENT - 2)
    return norm_of_units(largest, tl.sum(total), EXPONENT)


@triton.jit
def factor_of(norm, radius, EXPONENT: tl.constexpr):
    """What link SCALED multiplies a matrix of this norm with; a negative radius: whether or not the norm is below it."""
    ratio = tl.abs(radius) / (norm + LEAST)
    ratio = tl.where(radius > 0, tl.minimum(ratio, 1.0), ratio)
    return entry_power(ratio, EXPONENT - 2)


@triton.jit
def shrink(x, ROWS: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr, THRESHOLD: tl.constexpr):
    """Bring the entries of ROWS rows of a memory nearer to zero, in place."""
    for o in range(0, ROWS, BO):
        put_block(x, o, shrunk(block(x, o, KEY, KW, BO), THRESHOLD), KEY, KW, BO)


@triton.jit
def copy(source, target, ROWS: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr):
    """The matrices of a state."""
    for o in range(0, ROWS, BO):
        put_block(target, o, block(source, o, KEY, KW, BO), KEY, KW, BO)
