"""Triton kernels on attention maps [B, H, rows, S]: softmax of rows in place, both passes. A row at position p has keys 0 .. p.

NOT YET MEASURED ON A GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recollect.kernels.triton.stencil import Frame, accumulator

ROW_KEYS = 1024  # keys that a program takes at a time


@triton.jit
def _softmax(x, lse, n_rows, n_keys, first, x_head, x_row, KNOWN: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr):
    """Logits of one row into weights, in place; its log-sum-exp is written, or known."""
    row, head = tl.program_id(0) % n_rows, (tl.program_id(0) // n_rows).to(tl.int64)
    x += head * x_head + row * x_row
    last = tl.minimum(first + row + 1, n_keys)
    column = tl.arange(0, N)
    if KNOWN:
        total = tl.load(lse + head * n_rows + row)
    else:
        top, sum_ = tl.full((), float("-inf"), ACC), tl.zeros((), ACC)
        for low in range(0, last, N):
            part = tl.load(x + low + column, mask=low + column < last, other=float("-inf")).to(ACC)
            above = tl.maximum(top, tl.max(part))
            known = tl.where(above == float("-inf"), 0.0, above)
            sum_ = sum_ * tl.exp(top - known) + tl.sum(tl.exp(part - known))
            top = above
        total = top + tl.log(sum_)
        tl.store(lse + head * n_rows + row, total)
    for low in range(0, n_keys, N):
        part = tl.load(x + low + column, mask=low + column < last, other=float("-inf")).to(ACC)
        tl.store(x + low + column, tl.exp(part - total).to(x.dtype.element_ty), mask=low + column < n_keys)


@triton.jit
def _softmax_backward(weights, grad, n_rows, n_keys, first, w_head, w_row, g_head, g_row, N: tl.constexpr, ACC: tl.constexpr):
    """Gradient of one row's weights into that of its logits, in place."""
    row, head = tl.program_id(0) % n_rows, (tl.program_id(0) // n_rows).to(tl.int64)
    weights += head * w_head + row * w_row
    grad += head * g_head + row * g_row
    last = tl.minimum(first + row + 1, n_keys)
    column = tl.arange(0, N)
    dot = tl.zeros((), ACC)
    for low in range(0, last, N):
        inside = low + column < last
        weight = tl.load(weights + low + column, mask=inside, other=0.0).to(ACC)
        dot += tl.sum(weight * tl.load(grad + low + column, mask=inside, other=0.0).to(ACC))
    for low in range(0, n_keys, N):
        inside = low + column < last
        weight = tl.load(weights + low + column, mask=inside, other=0.0).to(ACC)
        part = tl.load(grad + low + column, mask=inside, other=0.0).to(ACC)
        tl.store(grad + low + column, (weight * (part - dot)).to(grad.dtype.element_ty), mask=low + column < n_keys)


def softmax_(x: Tensor, lse: Tensor, frame: Frame, *, known: bool) -> None:
    """Logits [B, H, rows, S] into weights, in place; lse [B, H, rows] is written, or read if known."""
    batch, n_heads, n_rows, n_keys = x.shape
    _softmax[(n_rows * batch * n_heads,)](
        *(x, lse, n_rows, n_keys, frame.first, x.stride(1), x.stride(2)),
        KNOWN=known,
        N=min(ROW_KEYS, triton.next_power_of_2(n_keys)),
        ACC=accumulator(x.dtype)[0],
    )


def softmax_backward_(weights: Tensor, grad: Tensor, frame: Frame) -> None:
    """The gradient of weights [B, H, rows, S] into that of their logits, in place."""
    batch, n_heads, n_rows, n_keys = grad.shape
    _softmax_backward[(n_rows * batch * n_heads,)](
        *(weights, grad, n_rows, n_keys, frame.first, weights.stride(1), weights.stride(2), grad.stride(1), grad.stride(2)),
        N=min(ROW_KEYS, triton.next_power_of_2(n_keys)),
        ACC=accumulator(grad.dtype)[0],
    )
