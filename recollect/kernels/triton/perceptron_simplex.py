"""The perceptron memory's link SIMPLEX (Memora): weights at a chunk's start are I softmax(matrix) - 1 along its rows of length I.

W_in's rows are K long, W_out's O. The 1 is added to products where it counts: once for W_in; never for W_out, where the norm takes it
away. Reads inside a chunk multiply with a frame, kept * weights + (what the matrix has gained, less the mean of each row), kept being
the decay since the chunk's start.
NOT YET MEASURED ON A GPU.

Axis legend: K key dim, O hidden size. Both matrices are [O, K]; lines are [1, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import block, put_block


@triton.jit
def evened(x, KEY: tl.constexpr, KW: tl.constexpr):
    """Each row less its mean."""
    inside = (tl.arange(0, KW) < KEY)[None, :]
    return tl.where(inside, x - (tl.sum(x, axis=1) / KEY)[:, None], 0.0)


@triton.jit
def less_some(act, shift, o):
    """Activations [16, BO] less one number per token [16, 1], and that number: about their mean, which would only add rounding, W_out's
    rows having sums of zero. It is the mean of the first BO hidden units, and `shift` from then on."""
    shift = tl.where(o == 0, tl.sum(act, axis=1)[:, None] / act.shape[1], shift)
    return act - shift, shift


@triton.jit
def softmaxed(x, out, HIDDEN: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr):
    """The weights `out` of both matrices x."""
    AREA: tl.constexpr = HIDDEN * KEY
    inside = (tl.arange(0, KW) < KEY)[None, :]
    most = tl.full((1, KW), float("-inf"), x.dtype.element_ty)
    for o in range(0, HIDDEN, BO):
        rows = tl.where(inside, block(x, o, KEY, KW, BO), float("-inf"))
        powers = tl.exp(rows - tl.max(rows, axis=1)[:, None])
        put_block(out, o, powers * (KEY / tl.sum(powers, axis=1))[:, None] - 1, KEY, KW, BO)
        most = tl.maximum(most, tl.max(block(x + AREA, o, KEY, KW, BO), axis=0)[None, :])
    total = tl.zeros_like(most)
    for o in range(0, HIDDEN, BO):
        total += tl.sum(tl.exp(block(x + AREA, o, KEY, KW, BO) - most), axis=0)[None, :]
    for o in range(0, HIDDEN, BO):
        put_block(out + AREA, o, tl.exp(block(x + AREA, o, KEY, KW, BO) - most) * (HIDDEN / total) - 1, KEY, KW, BO)


@triton.jit
def softmaxed_back(
    weights,
    d_weights,
    d_anchor,
    d_state,
    fresh,
    HIDDEN: tl.constexpr,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    BO: tl.constexpr,
):
    """The gradient of weights (used up) to the matrices where their chunk began: with d_anchor into d_state if it began here, else into
    d_anchor."""
    AREA: tl.constexpr = HIDDEN * KEY
    column = tl.zeros((1, KW), weights.dtype.element_ty)
    for o in range(0, HIDDEN, BO):
        w, g = block(weights + AREA, o, KEY, KW, BO) + 1, block(d_weights + AREA, o, KEY, KW, BO)
        column += tl.sum(w * g, axis=0)[None, :]
    tl.debug_barrier()
    for o in range(0, 2 * HIDDEN, BO):
        w, g = block(weights, o, KEY, KW, BO) + 1, block(d_weights, o, KEY, KW, BO)
        put_block(d_weights, o, g * 0, KEY, KW, BO)  # of g, so that no thread stores what another has yet to load
        mean = tl.where(o < HIDDEN, (tl.sum(w * g, axis=1) / KEY)[:, None], column / HIDDEN)
        g = w * (g - mean) + block(d_anchor, o, KEY, KW, BO)
        put_block(d_anchor, o, tl.where(fresh, 0.0, g), KEY, KW, BO)
        if fresh:
            put_block(d_state, o, block(d_state, o, KEY, KW, BO) + g, KEY, KW, BO)


@triton.jit
def framed(
    x, origin, weights, out, kept_in, kept_out, HIDDEN: tl.constexpr, KEY: tl.constexpr, KW: tl.constexpr, BO: tl.constexpr
):
    """The frame `out` of a state x inside the chunk that began at origin."""
    AREA: tl.constexpr = HIDDEN * KEY
    column = tl.zeros((1, KW), x.dtype.element_ty)
    for o in range(0, HIDDEN, BO):
        gained = block(x + AREA, o, KEY, KW, BO) - kept_out * block(origin + AREA, o, KEY, KW, BO)
        column += tl.sum(gained, axis=0)[None, :]
    for o in range(0, HIDDEN, BO):
        gained = evened(block(x, o, KEY, KW, BO) - kept_in * block(origin, o, KEY, KW, BO), KEY, KW)
        put_block(out, o, gained + kept_in * block(weights, o, KEY, KW, BO), KEY, KW, BO)
        gained = block(x + AREA, o, KEY, KW, BO) - kept_out * block(origin + AREA, o, KEY, KW, BO) - column / HIDDEN
        put_block(out + AREA, o, gained + kept_out * block(weights + AREA, o, KEY, KW, BO), KEY, KW, BO)


@triton.jit
def framed_back(
    d_frame,
    origin,
    weights,
    d_state,
    d_anchor,
    d_weights,
    kept_in,
    kept_out,
    HIDDEN: tl.constexpr,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    BO: tl.constexpr,
):
    """The gradient of a frame to its state, its chunk's first state and weights; returns those of the logs of what is kept."""
    AREA: tl.constexpr = HIDDEN * KEY
    column = tl.zeros((1, KW), d_frame.dtype.element_ty)
    to_in, to_out = tl.zeros_like(column), tl.zeros_like(column)
    for o in range(0, HIDDEN, BO):
        column += tl.sum(block(d_frame + AREA, o, KEY, KW, BO), axis=0)[None, :]
    for o in range(0, HIDDEN, BO):
        g = block(d_frame, o, KEY, KW, BO)
        even = evened(g, KEY, KW)
        to_in += tl.sum(g * block(weights, o, KEY, KW, BO) - even * block(origin, o, KEY, KW, BO), axis=0)[None, :] * kept_in
        put_block(d_weights, o, block(d_weights, o, KEY, KW, BO) + kept_in * g, KEY, KW, BO)
        put_block(d_state, o, block(d_state, o, KEY, KW, BO) + even, KEY, KW, BO)
        put_block(d_anchor, o, block(d_anchor, o, KEY, KW, BO) - kept_in * even, KEY, KW, BO)
        g = block(d_frame + AREA, o, KEY, KW, BO)
        even = g - column / HIDDEN
        of_out = g * block(weights + AREA, o, KEY, KW, BO) - even * block(origin + AREA, o, KEY, KW, BO)
        to_out += tl.sum(of_out, axis=0)[None, :] * kept_out
        put_block(d_weights + AREA, o, block(d_weights + AREA, o, KEY, KW, BO) + kept_out * g, KEY, KW, BO)
        put_block(d_state + AREA, o, block(d_state + AREA, o, KEY, KW, BO) + even, KEY, KW, BO)
        put_block(d_anchor + AREA, o, block(d_anchor + AREA, o, KEY, KW, BO) - kept_out * even, KEY, KW, BO)
    return to_in, to_out
