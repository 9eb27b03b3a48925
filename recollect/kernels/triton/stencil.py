"""Triton kernels on attention maps: convolution and head mixing, and their backward passes.

A map is [B, H, rows, S] with S contiguous. A convolution along keys is a product with a band (Toeplitz) matrix: a tile of BN keys
reads BN + c_k - 1, so that c_q small products a tile, and not c_q c_k multiplications an entry, do the work on tensor cores. The
tile and the bytes and operations that follow from it are derived in docs/kernels.md.

Batch elements and heads share the first axis of a grid with tiles or rows: the other two end at 65,535.

Which entries exist is arithmetic, not memory: query row i sees keys start_i .. i. Rows before the first query are carried ones.
NOT YET MEASURED ON A GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, KEYS = 32, 16  # of a tile


@triton.jit
def _seen(position, key, start, earlier, n_positions, n_keys, HAS_START: tl.constexpr):
    """[M, N]: does the row at a position see a key? Rows before `earlier` were carried: all that they hold was seen."""
    seen = (key[None, :] >= 0) & (key[None, :] < n_keys) & (key[None, :] <= position[:, None])
    if HAS_START:
        query = position - earlier
        first = tl.load(start + query, mask=(query >= 0) & (position < n_positions), other=0)
        seen = seen & (key[None, :] >= first[:, None])
    return seen


@triton.jit
def _convolved(
    x,
    taps,
    start,
    row,
    low,
    position,
    n_rows,
    earlier,
    n_positions,
    x_keys,
    x_row,
    LEFT: tl.constexpr,
    C_Q: tl.constexpr,
    C_K: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_START: tl.constexpr,
    KN: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head's kernel over one map: [M, KN], keys from `low` on. FLIP: its transpose, which reads rows below."""
    column = tl.arange(0, KW)
    reach: tl.constexpr = C_K - 1 - LEFT if FLIP else LEFT
    source = low + column - reach
    tap = column[:, None] - tl.arange(0, KN)[None, :]
    inside = (tap >= 0) & (tap < C_K)
    tap = C_K - 1 - tap if FLIP else tap
    out = tl.zeros((row.shape[0], KN), dtype=ACC)
    for back in range(C_Q):
        shift = back if FLIP else -back
        read = _seen(position + shift, source, start, earlier, n_positions, x_keys, HAS_START) & (row < n_rows)[:, None]
        if HAS_START:  # a convolution does not cross the start of the reader's document
            reader = position + back if FLIP else position
            query = reader - earlier
            first = tl.load(start + query, mask=(query >= 0) & (reader < n_positions), other=0)
            read = read & (reader - back >= first)[:, None]
        values = tl.load(x + (row + shift)[:, None] * x_row + source[None, :], mask=read, other=0.0)
        band = tl.load(taps + (C_Q - 1 - back) * C_K + tap, mask=inside, other=0.0)
        out += tl.dot(values.to(ACC), band.to(ACC), input_precision=PRECISION, out_dtype=ACC)
    return out


@triton.jit
def _stencil(
    x,
    y,
    mid,
    taps,
    matrix,
    start,
    n_heads,
    n_rows,
    n_keys,
    x_keys,
    first,
    earlier,
    n_positions,
    x_head,
    x_row,
    y_head,
    y_row,
    LEFT: tl.constexpr,
    C_Q: tl.constexpr,
    C_K: tl.constexpr,
    MERGED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_KERNEL: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
    HAS_START: tl.constexpr,
    KEEP: tl.constexpr,
    FLIP: tl.constexpr,
    FILL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of every head of a group: y_o = sum_m matrix[o, m] sum_p taps[m, p] * x_p."""
    groups = n_heads // GROUP
    n_tiles = tl.cdiv(n_keys, BN)
    low, some_group = tl.program_id(0) % n_tiles * BN, tl.program_id(0) // n_tiles
    batch, group = some_group.to(tl.int64) // groups, some_group % groups
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    key = low + tl.arange(0, BN)
    position = first + row
    start += batch * (n_positions - earlier)
    seen = _seen(position, key, start, earlier, n_positions, n_keys, HAS_START)
    stored = (row < n_rows)[:, None] & (key < n_keys)[None, :]
    place = row[:, None] * y_row + key[None, :]
    member = tl.arange(0, GROUP_WIDTH)
    mixed = tl.zeros((GROUP_WIDTH, BM, BN), dtype=ACC)
    for m in range(GROUP):
        head = group * GROUP + m
        if HAS_KERNEL:
            part = tl.zeros((BM, BN), dtype=ACC)
            for p in range(MERGED):
                base = head // MERGED * MERGED
                if FLIP:  # the transpose of a kernel from p to head is the one from head to p
                    kernel = taps + ((base + p) * MERGED + head - base) * (C_Q * C_K)
                else:
                    kernel = taps + (head * MERGED + p) * (C_Q * C_K)
                source = x + (batch * n_heads + base + p) * x_head
                part += _convolved(
                    source,
                    kernel,
                    start,
                    row,
                    low,
                    position,
                    n_rows,
                    earlier,
                    n_positions,
                    x_keys,
                    x_row,
                    LEFT,
                    C_Q,
                    C_K,
                    FLIP,
                    HAS_START,
                    BN,
                    KW,
                    ACC,
                    PRECISION,
                )
        else:
            source = x + (batch * n_heads + head) * x_head
            read = seen & (row < n_rows)[:, None]
            part = tl.load(source + row[:, None] * x_row + key[None, :], mask=read, other=0.0).to(ACC)
        if HAS_MATRIX:
            weight = tl.load(matrix + (group * GROUP + member) * GROUP + m, mask=member < GROUP, other=0.0).to(ACC)
            mixed += weight[:, None, None] * part[None, :, :]
            if KEEP:
                kept = tl.where(seen, part, 0.0).to(mid.dtype.element_ty)
                tl.store(mid + (batch * n_heads + head) * y_head + place, kept, mask=stored)
        else:
            value = tl.where(seen, part, FILL).to(y.dtype.element_ty)
            tl.store(y + (batch * n_heads + head) * y_head + place, value, mask=stored)
    if HAS_MATRIX:
        value = tl.where(seen[None, :, :], mixed, FILL).to(y.dtype.element_ty)
        heads = (batch * n_heads + group * GROUP + member)[:, None, None] * y_head
        tl.store(y + heads + place[None, :, :], value, mask=stored[None, :, :] & (member < GROUP)[:, None, None])


@triton.jit
def _mix_backward(
    grad,
    mid,
    out,
    sums,
    matrix,
    start,
    n_heads,
    n_rows,
    n_keys,
    first,
    earlier,
    n_positions,
    g_head,
    g_row,
    m_head,
    m_row,
    o_head,
    o_row,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_START: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row of every head of a group: out_m = sum_o matrix[o, m] grad_o, sums[o, m] = sum over keys of grad_o mid_m."""
    groups = n_heads // GROUP
    row, some_group = tl.program_id(0) % n_rows, tl.program_id(0) // n_rows
    batch, group = some_group.to(tl.int64) // groups, some_group % groups
    head = batch * n_heads + group * GROUP
    member = tl.arange(0, GROUP_WIDTH)
    position = first + row
    low_key = 0
    if HAS_START:
        low_key = tl.load(start + batch * (n_positions - earlier) + position - earlier)
    column = tl.arange(0, N)
    if GROUP_WIDTH >= 16:  # tensor cores take no smaller sides
        square = (member < GROUP)[:, None] & (member < GROUP)[None, :]
        place = (group * GROUP + member[None, :]) * GROUP + member[:, None]
        transposed = tl.load(matrix + place, mask=square, other=0.0).to(ACC)
    cross = tl.zeros((GROUP_WIDTH, GROUP_WIDTH), ACC)
    for low in range(0, n_keys, N):
        key = low + column
        inside = (key >= low_key) & (key <= position) & (key < n_keys)
        both = inside[None, :] & (member < GROUP)[:, None]
        middle = tl.load(mid + (head + member)[:, None] * m_head + row * m_row + key[None, :], mask=both, other=0.0).to(ACC)
        if GROUP_WIDTH >= 16:
            parts = tl.load(grad + (head + member)[:, None] * g_head + row * g_row + key[None, :], mask=both, other=0.0).to(ACC)
            total = tl.dot(transposed, parts, input_precision=PRECISION, out_dtype=ACC)
            cross += tl.dot(parts, tl.trans(middle), input_precision=PRECISION, out_dtype=ACC)
        else:
            total = tl.zeros((GROUP_WIDTH, N), ACC)
            for o in range(GROUP):
                part = tl.load(grad + (head + o) * g_head + row * g_row + key, mask=inside, other=0.0).to(ACC)
                weight = tl.load(matrix + (group * GROUP + o) * GROUP + member, mask=member < GROUP, other=0.0).to(ACC)
                total += weight[:, None] * part[None, :]
                cross += tl.where(member[:, None] == o, tl.sum(middle * part[None, :], axis=1)[None, :], 0.0)
        to = out + (head + member)[:, None] * o_head + row * o_row + key[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(key < n_keys)[None, :] & (member < GROUP)[:, None])
    place = (tl.program_id(0).to(tl.int64) * GROUP + member[:, None]) * GROUP + member[None, :]
    tl.store(sums + place, cross, mask=(member < GROUP)[:, None] & (member < GROUP)[None, :])


@triton.jit
def _kernel_gradient(
    grad,
    x,
    sums,
    start,
    n_heads,
    n_rows,
    n_keys,
    first,
    earlier,
    n_positions,
    g_head,
    g_row,
    x_head,
    x_row,
    LEFT: tl.constexpr,
    C_Q: tl.constexpr,
    C_K: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_START: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row of taps over one stripe of rows: sums of grad[i, j] x[i - back, j + b - LEFT], as diagonals of grad^T x."""
    n_stripes = tl.cdiv(n_rows, BM)
    back, stripe, pair = tl.program_id(1), tl.program_id(0) % n_stripes, tl.program_id(0).to(tl.int64) // n_stripes
    head, p = pair // MERGED, pair % MERGED
    batch = head // n_heads
    grad += head * g_head
    x += (head // MERGED * MERGED + p) * x_head
    start += batch * (n_positions - earlier)
    row = stripe * BM + tl.arange(0, BM)
    position = first + row
    column = tl.arange(0, KW)
    cross = tl.zeros((BN, KW), ACC)
    for low in range(0, n_keys, BN):
        key = low + tl.arange(0, BN)
        seen = _seen(position, key, start, earlier, n_positions, n_keys, HAS_START) & (row < n_rows)[:, None]
        part = tl.load(grad + row[:, None] * g_row + key[None, :], mask=seen, other=0.0).to(ACC)
        source = low + column - LEFT
        read = _seen(position - back, source, start, earlier, n_positions, n_keys, HAS_START) & (row < n_rows)[:, None]
        if HAS_START:
            begins = tl.load(start + position - earlier, mask=position < n_positions, other=0)
            read = read & (position - back >= begins)[:, None]
        values = tl.load(x + (row - back)[:, None] * x_row + source[None, :], mask=read, other=0.0).to(ACC)
        cross += tl.dot(tl.trans(part), values, input_precision=PRECISION, out_dtype=ACC)
    tap = column[None, :] - tl.arange(0, BN)[:, None]
    place = sums + ((pair * n_stripes + stripe) * C_Q + C_Q - 1 - back) * C_K
    for b in range(C_K):
        tl.store(place + b, tl.sum(tl.where(tap == b, cross, 0.0)))


class Frame(NamedTuple):
    """Where a map lies among positions and heads: what every kernel is told.

    first: position of the map's row 0; earlier: positions before the first query; start: int32 [B, T] or None.
    """

    first: int
    earlier: int
    n_positions: int
    start: Tensor | None

    def at(self, first: int) -> Frame:
        """The same for a map whose row 0 is at another position."""
        return self._replace(first=first)

    @property
    def where(self) -> tuple[int, int, int]:
        return self[:3]


def accumulator(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What sums are kept in, and how tensor cores multiply: in one product where the model's precision is below theirs, in three of
    parts for fp32."""
    if dtype == torch.float64:
        return tl.float64, "ieee"
    return tl.float32, "tf32x3" if dtype == torch.float32 else "tf32"


def exact_products(x: Tensor) -> torch.autocast:
    """PyTorch's products in the inputs' own precision. Autocast reaches into the forward pass and not into the backward one, whose
    logits, computed again, would not be those of the log-sum-exp: weights that do not sum to one, and gradients wrong by any factor."""
    return torch.autocast(x.device.type, enabled=False)


def apply_side(
    x: Tensor,
    y: Tensor,
    frame: Frame,
    kernel: Tensor | None,
    matrix: Tensor | None,
    left: int,
    precision: torch.dtype,
    *,
    fill: float = 0.0,
    keep: Tensor | None = None,
    flip: bool = False,
) -> None:
    """y = mix(conv(x)) for the rows of y; entries that a row does not see are `fill`.

    Args:
        x: [B, H, L, S], a view whose row 0 is y's; the rows that the convolution reads lie above it (below it with `flip`).
        y: [B, H, rows, S'], S' <= S.
        frame: of y. kernel: [H, c_q, c_k] or [H, c_h, c_q, c_k]; matrix: [G, c_h, c_h]; left: keys reached to the left.
        precision: of the model, which decides how products are rounded.
        keep: like y; gets the convolution's output where there is a matrix.
        flip: the transposed convolution (of a gradient).
    """
    batch, n_heads, n_rows, n_keys = y.shape
    c_q, c_k = (1, 1) if kernel is None else kernel.shape[-2:]
    group = 1 if matrix is None else matrix.shape[1]
    acc, dots = accumulator(precision)
    grid = (triton.cdiv(n_keys, KEYS) * (batch * n_heads // group), triton.cdiv(n_rows, ROWS))
    _stencil[grid](
        *(x, y, y if keep is None else keep, y if kernel is None else kernel, y if matrix is None else matrix),
        *(y if frame.start is None else frame.start, n_heads, n_rows, n_keys, x.shape[3], *frame.where),
        *(x.stride(1), x.stride(2), y.stride(1), y.stride(2)),
        LEFT=left,
        C_Q=c_q,
        C_K=c_k,
        MERGED=kernel.shape[1] if kernel is not None and kernel.dim() == 4 else 1,
        GROUP=group,
        GROUP_WIDTH=triton.next_power_of_2(group),
        HAS_KERNEL=kernel is not None,
        HAS_MATRIX=matrix is not None,
        HAS_START=frame.start is not None,
        KEEP=keep is not None,
        FLIP=flip,
        FILL=fill,
        BM=ROWS,
        BN=KEYS,
        KW=triton.next_power_of_2(KEYS + c_k - 1),
        ACC=acc,
        PRECISION=dots,
    )


def mix_backward(grad: Tensor, mid: Tensor, matrix: Tensor, frame: Frame, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient [B, H, rows, S] of what was mixed, and the matrix's [G, c_h, c_h], from mid, what was mixed.

    precision: of the model, which decides how products are rounded.
    """
    batch, n_heads, n_rows, n_keys = mid.shape
    groups, group, _ = matrix.shape
    out = mid.new_empty(mid.shape)
    sums = matrix.new_empty(batch, groups, n_rows, group, group, dtype=mid.dtype)
    acc, dots = accumulator(precision)
    _mix_backward[(n_rows * batch * groups,)](
        *(grad, mid, out, sums, matrix, matrix if frame.start is None else frame.start, n_heads, n_rows, n_keys, *frame.where),
        *(grad.stride(1), grad.stride(2), mid.stride(1), mid.stride(2), out.stride(1), out.stride(2)),
        GROUP=group,
        GROUP_WIDTH=triton.next_power_of_2(group),
        HAS_START=frame.start is not None,
        N=max(
            16, min(64 if group > 8 else 256, triton.next_power_of_2(n_keys))
        ),  # of more, products of 16 heads spill registers
        ACC=acc,
        PRECISION=dots,
    )
    return out, sums.sum((0, 2))


def kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, frame: Frame, left: int, precision: torch.dtype) -> Tensor:
    """The gradient of a convolution's kernel, in its shape: from grad [B, H, rows, S] of its output, and its input x.

    x is a view whose row 0 is grad's; the rows that the convolution reads lie above it.
    """
    batch, n_heads, n_rows, n_keys = grad.shape
    c_q, c_k = kernel.shape[-2:]
    merged = kernel.shape[1] if kernel.dim() == 4 else 1
    acc, dots = accumulator(precision)
    stripes = triton.cdiv(n_rows, ROWS)
    shape = (batch, n_heads * merged, stripes, c_q, c_k)
    sums = kernel.new_empty(shape, dtype=torch.promote_types(precision, torch.float32))
    _kernel_gradient[(stripes * batch * n_heads * merged, c_q)](
        *(grad, x, sums, grad if frame.start is None else frame.start, n_heads, n_rows, n_keys, *frame.where),
        *(grad.stride(1), grad.stride(2), x.stride(1), x.stride(2)),
        LEFT=left,
        C_Q=c_q,
        C_K=c_k,
        MERGED=merged,
        HAS_START=frame.start is not None,
        BM=ROWS,
        BN=KEYS,
        KW=triton.next_power_of_2(KEYS + c_k - 1),
        ACC=acc,
        PRECISION=dots,
    )
    return sums.sum((0, 2)).view(kernel.shape)
