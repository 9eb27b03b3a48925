"""One new token of Multi-Token Attention on a GPU: what lies between its products, over the carried rows where they are.

Faster equal of `recollect.ops.multi_token.materialized` on one query, without gradients. The new row of raw logits [B, H, S] is a
product by PyTorch; then one launch convolves it with the c_q - 1 carried rows, mixes heads and masks, PyTorch takes the softmax, one
more launch does the same after it, and values are read by a product. A program has 128 keys of every head of a group: it reads c_q rows
of them (c_k - 1 more keys, from the first-level cache) and writes one, 4 (c_q + 1) bytes a key and head, and does 2 c_q c_k operations.
No row is padded, joined or copied but those that are carried on. NOT YET MEASURED ON A GPU: checked by Triton's interpreter, and
compiled for NVIDIA GPUs in the tests.

Axis legend: B batch, S keys, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recollect.kernels.triton.stencil import accumulator, exact_products
from recollect.ops.multi_token import Mixing, Rows, Settings, key_padding, read, scores

KEYS = 128  # of a program


@triton.jit
def _row(
    x,
    before,
    y,
    taps,
    matrix,
    start,
    n_heads,
    n_keys,
    before_head,
    before_row,
    LEFT: tl.constexpr,
    C_Q: tl.constexpr,
    C_K: tl.constexpr,
    MERGED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HAS_KERNEL: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
    HAS_START: tl.constexpr,
    FILL: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """BN keys of the last row, of every head of a group: y_o = sum_m matrix[o, m] sum_p taps[m, p] * (before_p above x_p)."""
    groups, blocks = n_heads // GROUP, tl.cdiv(n_keys, BN)
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks // groups).to(tl.int64)
    group = tl.program_id(0) // blocks % groups
    key = block * BN + tl.arange(0, BN)
    first = 0
    if HAS_START:
        first = tl.load(start + batch)
    seen = (key >= first) & (key < n_keys)
    member = tl.arange(0, GROUP_WIDTH)
    mixed = tl.zeros((GROUP_WIDTH, BN), dtype=ACC)
    for m in range(GROUP):
        head = group * GROUP + m
        part = tl.zeros((BN,), dtype=ACC)
        if HAS_KERNEL:
            for p in range(MERGED):
                other = batch * n_heads + head // MERGED * MERGED + p
                for back in range(C_Q):
                    line = x + other * n_keys
                    if back > 0:
                        line = before + other * before_head + (C_Q - 1 - back) * before_row
                    # A convolution does not cross the start of the query's document.
                    lowest = tl.where(n_keys - 1 - back >= first, 0, n_keys)
                    for tap in range(C_K):
                        source = key + tap - LEFT
                        value = tl.load(line + source, mask=(source >= lowest) & (source < n_keys), other=0.0).to(ACC)
                        weight = tl.load(taps + ((head * MERGED + p) * C_Q + C_Q - 1 - back) * C_K + tap).to(ACC)
                        part += value * weight
        else:
            part += tl.load(x + (batch * n_heads + head) * n_keys + key, mask=seen, other=0.0).to(ACC)
        if HAS_KERNEL:
            part = tl.where(seen, part, 0.0)
        if HAS_MATRIX:
            weight = tl.load(matrix + (group * GROUP + member) * GROUP + m, mask=member < GROUP, other=0.0).to(ACC)
            mixed += weight[:, None] * part[None, :]
        else:
            value = tl.where(seen, part, FILL).to(y.dtype.element_ty)
            tl.store(y + (batch * n_heads + head) * n_keys + key, value, mask=key < n_keys)
    if HAS_MATRIX:
        value = tl.where(seen[None, :], mixed, FILL).to(y.dtype.element_ty)
        place = (batch * n_heads + group * GROUP + member)[:, None] * n_keys + key[None, :]
        tl.store(y + place, value, mask=(member < GROUP)[:, None] & (key < n_keys)[None, :])


def side(
    x: Tensor, before: Tensor | None, kernel: Tensor | None, matrix: Tensor | None, start: Tensor | None, left: int, fill: float
) -> Tensor:
    """Convolution and head mixing of the last row of a map.

    Args:
        x: [B, H, S], contiguous, zeros where the query does not see a key; before: [B, H, c_q - 1, S], keys contiguous.
        kernel: [H, c_q, c_k] or [H, c_h, c_q, c_k]; matrix: [G, c_h, c_h]; start: int [B]; left: keys reached to the left.
        fill: what is written where the query does not see a key.
    Returns:
        [B, H, S].
    """
    if kernel is None and matrix is None and fill == 0:
        return x
    batch, n_heads, n_keys = x.shape
    c_q, c_k = (1, 1) if kernel is None else kernel.shape[-2:]
    group = 1 if matrix is None else matrix.shape[1]
    above = x[:, :, None] if before is None or c_q == 1 else before
    y = torch.empty_like(x)
    _row[(triton.cdiv(n_keys, KEYS) * batch * n_heads // group,)](
        *(x, above, y, y if kernel is None else kernel, y if matrix is None else matrix, y if start is None else start),
        *(n_heads, n_keys, above.stride(1), above.stride(2)),
        LEFT=left,
        C_Q=c_q,
        C_K=c_k,
        MERGED=kernel.shape[1] if kernel is not None and kernel.dim() == 4 else 1,
        GROUP=group,
        GROUP_WIDTH=triton.next_power_of_2(group),
        HAS_KERNEL=kernel is not None,
        HAS_MATRIX=matrix is not None,
        HAS_START=start is not None,
        FILL=fill,
        BN=KEYS,
        ACC=accumulator(x.dtype)[0],
    )
    return y


@torch.library.custom_op("recollect::multi_token_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kq_pre: Tensor | None,
    head_pre: Tensor | None,
    kq_post: Tensor | None,
    head_post: Tensor | None,
    start: Tensor | None,
    raw: Tensor | None,
    weights: Tensor | None,
    scale: float,
    pad_key: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    first = None if start is None else start[:, 0].expand(q.shape[0]).to(torch.int32).contiguous()

    def parts(kernel: Tensor | None, matrix: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
        left = 0 if kernel is None else key_padding(pad_key, kernel.shape[-1])[0]
        kernel, matrix = (None if x is None else x.to(dtype).contiguous() for x in (kernel, matrix))
        return kernel, matrix, first, left

    with exact_products(q):
        row = scores(q, k, scale)[:, :, 0].to(dtype)
        if first is not None:
            row = row.masked_fill(torch.arange(k.shape[1], device=q.device) < first[:, None, None], 0)
        row = row.contiguous()
        soft = side(row, raw, *parts(kq_pre, head_pre), fill=float("-inf")).softmax(-1)
        final = side(soft, weights, *parts(kq_post, head_post), fill=0.0)
        out = read(final.to(q.dtype)[:, :, None], v)
    return out, _carried_on(raw, row), _carried_on(weights, soft)


def _carried_on(before: Tensor | None, row: Tensor) -> Tensor:
    """The rows of the next call: the oldest goes, the new one comes; an empty tensor where none are carried."""
    if before is None:
        return row.new_empty(0)
    return torch.cat((before.to(row.dtype), row[:, :, None]), dim=2)[:, :, 1:].contiguous()


@_decode.register_fake
def _(q, k, v, kq_pre, head_pre, kq_post, head_post, start, raw, weights, scale, pad_key):
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = (q.new_empty(0, dtype=dtype) if x is None else x.new_empty(x.shape, dtype=dtype) for x in (raw, weights))
    return q.new_empty(*q.shape[:3], v.shape[-1]), *rows


def decode(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """q [B, 1, H, K] against keys and values [B, S, Hkv, ...]; no dropout, no gradients."""
    out, raw, weights = _decode(q, k, v, *mixing, start, *rows, settings.scale, settings.pad_key)
    return out, Rows(None if rows.raw is None else raw, None if rows.weights is None else weights)


def can_decode(q: Tensor, mixing: Mixing, settings: Settings, *given: Tensor | None) -> bool:
    """One query, no dropout, and nothing that gradients are wanted of."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *mixing, *given))
    return q.shape[1] == 1 and not settings.dropout_p and not wanted
