"""One new token of Multi-Token Attention on a CPU: what lies between its products, by the compiled form's functions (stencil.c).

The products with keys and values are PyTorch's, which reads a cache where it lies; `attention.c` would copy all of it first. The logits
of the query stand below the carried rows in a map with zeros around it, and so do its weights; the rows to carry on with are views of
these maps. Oracle: `recollect.ops.multi_token.materialized`. Error: that of the same computation in the same precision.

Axis legend: B batch, H heads, S keys, R rows of a map, W its padded width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recollect.kernels.compile import POINTER, SIZE
from recollect.kernels.layout import WIDEST, Side, padding, side, starts
from recollect.ops.attention import visible
from recollect.ops.multi_token import Mixing, Rows, Settings, dropout_mask, read, scores

LINEAR, SOFTMAX = 0, 1  # as in map.h


class Strip(ctypes.Structure):
    """The C struct of the same name; here of one row."""

    _fields_ = (*((name, SIZE) for name in ("rows", "first", "ld", "pad", "end", "left")), ("start", POINTER))


FORWARD = ctypes.CFUNCTYPE(
    None, POINTER, POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, POINTER, SIZE, ctypes.c_int, POINTER, SIZE
)  # strip, in, its stride, kernel, matrix, out, its stride, mid, its stride, mode, log-sum-exp, its stride; strides from head to head


def decode(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """As `materialized`, of one query a batch element and without gradients."""
    n_keys, dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    pre = side(mixing.kq_pre, mixing.head_pre, settings.pad_key, dtype)
    post = side(mixing.kq_post, mixing.head_post, settings.pad_key, dtype)
    pad = padding(pre, post)
    raw = scores(q, k, settings.scale).to(dtype)
    if start is not None:
        start = starts(start, q.shape[0], 1, n_keys)
        raw = raw.masked_fill(~visible(1, n_keys, start=start[:, :1], device=q.device), 0)
    seen = slice(pad, pad + n_keys)
    logits, weights = _map(raw, rows.raw, pre, pad), _map(raw, rows.weights, post, pad)
    logits[:, :, -1, seen] = raw[:, :, 0]
    _apply(pre, logits, weights[:, :, -1], n_keys, pad, start, SOFTMAX)
    final = weights[:, :, -1]
    if post.kernel is not None or post.matrix is not None:
        final = torch.empty_like(final, memory_format=torch.contiguous_format)
        _apply(post, weights, final, n_keys, pad, start, LINEAR)
    out = final[:, :, None, seen]
    if settings.dropout_p:
        out = out * dropout_mask(out, settings, n_keys - 1)
    carried = (None if own.kernel is None else x[:, :, 1:, seen] for own, x in ((pre, logits), (post, weights)))
    return read(out.to(q.dtype), v), Rows(*carried)


def _map(raw: Tensor, above: Tensor | None, own: Side, pad: int) -> Tensor:
    """[B, H, R, W]: the carried rows, room for the query's, zeros around them. raw: [B, H, 1, S]."""
    *shape, _, n_keys = raw.shape
    x = raw.new_empty(*shape, own.halo + 1, -(-n_keys // WIDEST) * WIDEST + 2 * pad)
    x[..., :pad], x[..., pad + n_keys :] = 0, 0
    if above is not None:
        x[:, :, :-1, pad : pad + n_keys] = above
    return x


def _apply(own: Side, x: Tensor, out: Tensor, n_keys: int, pad: int, start: Tensor | None, mode: int) -> None:
    """One side of a query: map x [B, H, R, W] to its row out [B, H, W]."""
    strip = Strip(rows=1, first=n_keys - 1, ld=x.shape[3], pad=pad, end=x.shape[3] - pad, left=own.reach[0])
    run, given = FORWARD(("forward", own.code)), ctypes.addressof(strip)
    sums, step, out_step = x.new_empty(own.group), x.stride(1), out.stride(1)
    for b in range(x.shape[0]):
        strip.start = None if start is None else _at(start, b)
        for head in range(0, x.shape[1], own.group):
            kernel = None if own.kernel is None else _at(own.kernel, head)
            matrix = None if own.matrix is None else _at(own.matrix, head // own.group)
            row, to = _at(x, b, head, 0, pad), _at(out, b, head, pad)
            run(given, row, step, kernel, matrix, to, out_step, None, 0, mode, sums.data_ptr(), 1)


def _at(x: Tensor, *index: int) -> int:
    """The address of x[index]."""
    return x.data_ptr() + x.element_size() * sum(i * step for i, step in zip(index, x.stride(), strict=False))
