"""Multi-Token Attention on the CPU: matrix products by torch, everything between them by the compiled stencil.

Faster equal of `recollect.ops.multi_token.materialized` (its oracle), forward and backward, fp32 and fp64. Error: that of the same
computation in the same precision (exp is accurate to about 2 ulp in fp32). Blocks of query rows in turn; the backward pass recomputes
each block from its logits' log-sum-exp and goes through the blocks from the last to the first, handing c_q - 1 gradient rows up.

Axis legend: B batch, T queries, S keys, H heads, K key dim, V value dim, R rows of a block, W padded width of a map.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.kernels.compile import Geometry, library
from recollect.ops.multi_token import Mixing, Rows, Settings, blocked, dropout_mask, key_padding

LINEAR, SOFTMAX, SOFTMAX_KNOWN = 0, 1, 2
SLOTS = 4  # partial sums of a matrix gradient per group: fixed, so that the result does not depend on the number of threads
BLOCK_BYTES = 2**23  # of one map of a block


class Side(NamedTuple):
    """Convolution and head mixing on one side of the softmax, with its compiled kernel. None where a part is missing."""

    kernel: Tensor | None
    matrix: Tensor | None
    code: ctypes.CDLL
    left: int

    @property
    def halo(self) -> int:
        """Rows above a block that the convolution reads."""
        return 0 if self.kernel is None else self.kernel.shape[1] - 1

    @property
    def group(self) -> int:
        """Heads mixed together, c_h."""
        return 1 if self.matrix is None else self.matrix.shape[1]


def side(kernel: Tensor | None, matrix: Tensor | None, pad_key: str, dtype: torch.dtype) -> Side | None:
    """Compile what one side needs; None where that is impossible (no compiler)."""
    c_q, c_k = (0, 0) if kernel is None else kernel.shape[1:]
    code = library(c_q, c_k, 1 if matrix is None else matrix.shape[1], dtype == torch.float64)
    if code is None:
        return None
    to = lambda t: None if t is None else t.detach().to(dtype).contiguous()  # noqa: E731
    return Side(to(kernel), to(matrix), code, key_padding(pad_key, c_k)[0] if c_k else 0)


def can_run(q: Tensor, mixing: Mixing) -> bool:
    """CPU, a compiler, kernels per head (not merged over head pairs) of at most 16 x 32 taps, at most 32 heads mixed."""
    kernels = [k for k in (mixing.kq_pre, mixing.kq_post) if k is not None]
    matrices = [m for m in (mixing.head_pre, mixing.head_post) if m is not None]
    small = all(k.dim() == 3 and k.shape[1] <= 16 and k.shape[2] <= 32 for k in kernels) and all(
        m.shape[1] <= 32 for m in matrices
    )
    if q.device.type != "cpu" or not small or torch.compiler.is_compiling():
        return False
    dtype = torch.promote_types(q.dtype, torch.float32)
    return all(
        side(kernel, matrix, "left", dtype) is not None
        for kernel, matrix in ((mixing.kq_pre, mixing.head_pre), (mixing.kq_post, mixing.head_post))
    )


class Block:
    """Buffers and geometry of one block: rows i0 .. i1 of the queries, W = padded width of its maps.

    Maps are [BH, rows, W] views of flat buffers that all blocks share. Row 0 of `raw` is query i0 - halo_pre - halo_post, row 0 of
    `weights` is query i0 - halo_post; rows before the first query hold what was carried, or zeros.
    """

    def __init__(self, plan: Plan, top: int, bottom: int) -> None:
        self.plan, self.top, self.bottom = plan, top, bottom
        self.n_rows, self.n_keys = bottom - top, plan.earlier + bottom
        self.width = 2 * plan.pad + -(-self.n_keys // 16) * 16

    def map(self, name: str, rows: int) -> Tensor:
        """A map [BH, rows, W] in the buffer of that name."""
        size = self.plan.n_maps * rows * self.width
        buffer = self.plan.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.plan.buffers[name] = self.plan.q.new_empty(size)
        return buffer[:size].view(self.plan.n_maps, rows, self.width)

    def geometry(self, part: Side, row: int, rows: int, group: int | None = None) -> Geometry:
        """Geometry of `rows` rows from query `row` on, tasks being groups of the side's heads (or of `group`)."""
        plan, size = self.plan, group or part.group
        start = None if plan.start is None else plan.start.data_ptr() + row * plan.start.element_size()
        stride = 0 if plan.start is None else plan.start.shape[1]
        per_batch = plan.n_heads // size
        return Geometry(
            *(plan.batch * per_batch, per_batch, rows, plan.earlier + row, self.width, plan.pad, part.left),
            *(start, stride, plan.threads),
        )

    def address(self, x: Tensor, row: int = 0) -> int:
        """Address of column 0 of a row of a map."""
        return x.data_ptr() + (row * self.width + self.plan.pad) * x.element_size()

    def columns(self, x: Tensor) -> Tensor:
        """The map without its padding: [BH, rows, n_keys]."""
        return x[:, :, self.plan.pad : self.plan.pad + self.n_keys]


class Plan:
    """One call: inputs in kernel layout, both sides, scratch buffers."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, pre: Side, post: Side, settings: Settings, start: Tensor | None
    ) -> None:
        self.batch, self.n_queries, self.n_heads, _ = q.shape
        self.earlier = k.shape[1] - q.shape[1]
        self.pre, self.post, self.settings = pre, post, settings
        self.n_maps, self.threads = self.batch * self.n_heads, torch.get_num_threads()
        widest = max((part.kernel.shape[2] for part in (pre, post) if part.kernel is not None), default=1)
        self.pad = -(-widest // 16) * 16
        self.halo = pre.halo + post.halo
        self.q = self.heads(q, self.halo, 0) * settings.scale
        self.k = self.heads(k, self.pad, self.pad + 16)
        self.v = self.heads(v, self.pad, self.pad + 16)
        # Rows past the end exist for kernels that look at the next block's documents.
        self.start = None if start is None else torch.cat((start, start[:, -1:].expand(-1, 32)), 1).to(torch.int64).contiguous()
        self.buffers: dict[str, Tensor] = {}

    def heads(self, x: Tensor, above: int, below: int) -> Tensor:
        """[B, L, Hx, K] -> [BH, above + L + below, K], rows of zeros around, key-value heads repeated to H."""
        batch, length, n_heads, size = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = x.new_zeros(batch, n_heads, self.n_heads // n_heads, above + length + below, size, dtype=dtype)
        out[:, :, :, above : above + length] = x.transpose(1, 2)[:, :, None]
        return out.view(self.n_maps, -1, size)

    def blocks(self) -> list[Block]:
        """Blocks of rows, of about BLOCK_BYTES a map."""
        row_bytes = self.n_maps * (self.earlier + self.n_queries + 2 * self.pad) * self.q.element_size()
        rows = max(32, BLOCK_BYTES // row_bytes // 6 * 6)
        return [Block(self, top, min(top + rows, self.n_queries)) for top in range(0, self.n_queries, rows)]

    def above(self, x: Tensor, rows: int, block: Block, carried: Tensor | None) -> None:
        """Fill the rows of map x that lie before the first query: carried rows [B, H, halo, S], zeros above them."""
        if not rows:
            return
        x[:, :rows].zero_()
        if carried is not None and carried.shape[2] and self.earlier:
            kept = carried.flatten(0, 1)[:, :, : block.n_keys]
            x[:, rows - kept.shape[1] : rows, self.pad : self.pad + kept.shape[2]] = kept


def logits_and_weights(
    plan: Plan, block: Block, rows: Rows, lse: Tensor, *, known: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """raw [BH, halo + R, W], softmax weights [BH, halo_post + R, W], and the pre-convolution's output if its matrix needs it."""
    pre, post, top = plan.pre, plan.post, block.top
    raw = block.map("raw", plan.halo + block.n_rows)
    torch.bmm(plan.q[:, top : block.bottom + plan.halo], plan.k[:, : block.width].transpose(1, 2), out=raw)
    missing = max(0, plan.halo - top)
    plan.above(raw, missing, block, rows.raw)
    row = top - plan.halo + missing
    geometry = block.geometry(pre, row, block.bottom - row)
    pre.code.mask(geometry, block.address(raw, missing), raw.stride(0))
    weights = block.map("weights", post.halo + block.n_rows)
    missing = max(0, post.halo - top)
    plan.above(weights, missing, block, rows.weights)
    row = top - post.halo + missing
    mid = block.map("mid_pre", post.halo + block.n_rows) if known and pre.matrix is not None else None
    pre.code.forward(
        block.geometry(pre, row, block.bottom - row),
        *(block.address(raw, missing), raw.stride(0), pointer(pre.kernel), pointer(pre.matrix)),
        *(block.address(weights, missing), weights.stride(0)),
        *(None if mid is None else block.address(mid, missing), weights.stride(0)),
        *(SOFTMAX_KNOWN if known else SOFTMAX, lse.data_ptr() + row * lse.element_size(), lse.stride(0)),
    )
    return raw, weights, None if mid is None else mid[:, post.halo :]


def final_weights(plan: Plan, block: Block, weights: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights that values are read with [BH, R, W], the convolution's output if kept, and the dropout mask that was applied."""
    post, mid = plan.post, None
    out = weights
    if post.kernel is not None or post.matrix is not None:
        out = block.map("out", block.n_rows)
        mid = block.map("mid_post", block.n_rows) if keep and post.matrix is not None else None
        post.code.forward(
            block.geometry(post, block.top, block.n_rows),
            *(block.address(weights), weights.stride(0), pointer(post.kernel), pointer(post.matrix)),
            *(block.address(out), out.stride(0), None if mid is None else block.address(mid), out.stride(0)),
            *(LINEAR, None, 0),
        )
    if not plan.settings.dropout_p:
        return out, mid, None
    shape = (plan.batch, plan.n_heads, block.n_rows, block.n_keys)
    mask = dropout_mask(out.new_empty(shape), plan.settings, plan.earlier + block.top).flatten(0, 1)
    if out is weights:
        out = block.map("out", block.n_rows).copy_(weights)
    block.columns(out).mul_(mask)
    return out, mid, mask


class _Native(torch.autograd.Function):
    """Forward keeps q, k, v, the parameters and a log-sum-exp a row; backward recomputes block by block."""

    @staticmethod
    def forward(ctx, settings, start, q, k, v, kq_pre, head_pre, kq_post, head_post, raw, weights):  # type: ignore[override]
        dtype = torch.promote_types(q.dtype, torch.float32)
        pre, post = side(kq_pre, head_pre, settings.pad_key, dtype), side(kq_post, head_post, settings.pad_key, dtype)
        assert pre is not None
        assert post is not None
        plan = Plan(q, k, v, pre, post, settings, start)
        lse = plan.q.new_empty(plan.n_maps, plan.n_queries)
        heads = plan.q.new_empty(plan.n_maps, plan.n_queries, v.shape[-1])
        last_raw = last_weights = None
        for block in plan.blocks():
            raws, soft, _ = logits_and_weights(plan, block, Rows(raw, weights), lse, known=False)
            out, _, _ = final_weights(plan, block, soft, keep=False)
            torch.bmm(block.columns(out), plan.v[:, plan.pad : plan.pad + block.n_keys], out=heads[:, block.top : block.bottom])
            if block.bottom == plan.n_queries:
                last_raw = last_rows(plan, block, raws, pre.halo, raw)
                last_weights = last_rows(plan, block, soft, post.halo, weights)
        ctx.save_for_backward(q, k, v, kq_pre, head_pre, kq_post, head_post, raw, weights, lse)
        ctx.settings, ctx.start = settings, start
        shaped = heads.view(plan.batch, plan.n_heads, plan.n_queries, -1).transpose(1, 2).to(q.dtype)
        return shaped, last_raw, last_weights

    @staticmethod
    def backward(ctx, grad_out, grad_raw, grad_weights):  # type: ignore[override]
        q, k, v, kq_pre, head_pre, kq_post, head_post, raw, weights, lse = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
        pre, post = side(kq_pre, head_pre, ctx.settings.pad_key, dtype), side(kq_post, head_post, ctx.settings.pad_key, dtype)
        assert pre is not None
        assert post is not None
        plan = Plan(q, k, v, pre, post, ctx.settings, ctx.start)
        grads = Gradients(plan, grad_out, grad_raw, grad_weights)
        for block in reversed(plan.blocks()):
            backward_block(plan, block, Rows(raw, weights), lse, grads)
        parts = grads.finish(q, k, v)
        return None, None, *parts, None, None


class Gradients:
    """Accumulated gradients of one call in kernel layout, and the rows that a block hands to the block above it."""

    def __init__(self, plan: Plan, grad_out: Tensor, grad_raw: Tensor | None, grad_weights: Tensor | None) -> None:
        self.plan = plan
        self.out = plan.heads(grad_out, 0, plan.post.halo + plan.pre.halo)
        self.raw = None if grad_raw is None else grad_raw.flatten(0, 1)
        self.weights = None if grad_weights is None else grad_weights.flatten(0, 1)
        length = plan.earlier + plan.n_queries
        self.q = plan.q.new_empty(plan.n_maps, plan.n_queries, plan.q.shape[-1])
        self.k = plan.q.new_zeros(plan.n_maps, length, plan.q.shape[-1])
        self.v = plan.q.new_zeros(plan.n_maps, length, plan.v.shape[-1])
        self.handed: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        """Sum up the gradient of a kernel or matrix over blocks."""
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor | None]:
        """Gradients of q, k, v [B, L, Hx, K] and of the four mixing parameters, in the inputs' dtypes."""
        plan = self.plan

        def back(x: Tensor, like: Tensor) -> Tensor:
            grouped = x.view(plan.batch, like.shape[2], -1, like.shape[1], like.shape[3])
            return grouped.sum(2).transpose(1, 2).to(like.dtype)

        parts: list[Tensor | None] = [back(self.q.mul_(plan.settings.scale), q), back(self.k, k), back(self.v, v)]
        for name, part in (("pre", plan.pre), ("post", plan.post)):
            kernel, matrix = self.sums.get(f"kernel_{name}"), self.sums.get(f"matrix_{name}")
            parts.append(None if kernel is None or part.kernel is None else kernel.view(plan.batch, *part.kernel.shape).sum(0))
            parts.append(
                None if matrix is None or part.matrix is None else matrix.sum(1).view(plan.batch, *part.matrix.shape).sum(0)
            )
        return parts


def backward_block(plan: Plan, block: Block, rows: Rows, lse: Tensor, grads: Gradients) -> None:
    """One block: recompute its maps, then gradients of values, weights, logits, queries and keys."""
    pre, post = plan.pre, plan.post
    last = block.bottom == plan.n_queries
    raw, weights, mid_pre = logits_and_weights(plan, block, rows, lse, known=True)
    out, mid_post, dropped = final_weights(plan, block, weights, keep=True)
    grad_out = grads.out[:, block.top : block.bottom]
    keys = slice(0, block.n_keys)
    grads.v[:, keys].baddbmm_(block.columns(out).transpose(1, 2), grad_out)
    # Gradient of the final weights; the rows below the block are overwritten by what the next block hands up.
    below = post.halo if post.kernel is not None else pre.halo
    grad = block.map("grad_post" if post.kernel is not None else "grad_pre", block.n_rows + below)
    padded = grads.out[:, block.top : block.bottom + below]
    torch.bmm(padded, plan.v[:, : block.width].transpose(1, 2), out=grad)
    if dropped is not None:
        block.columns(grad[:, : block.n_rows]).mul_(dropped)
    mix_backward(plan, block, post, "post", grad, mid_post, grads)
    soft = weights[:, post.halo :]
    grad_soft = grad
    if post.kernel is not None:
        hand_up(block, "post", grad, post.halo, grads)
        grad_soft = block.map("grad_pre", block.n_rows + pre.halo)
    extra = grads.weights if last else None
    convolution_backward(plan, block, post, "post", grad, weights, grad_soft, soft if extra is None else None, grads)
    if extra is not None:  # someone also differentiates the carried rows
        add_last(block, grad_soft[:, : block.n_rows], extra)
        rows_grad = grad_soft[:, : block.n_rows]
        rows_grad.sub_((rows_grad * soft).sum(-1, keepdim=True)).mul_(soft)
    mix_backward(plan, block, pre, "pre", grad_soft, mid_pre, grads)
    grad_raw = grad_soft
    if pre.kernel is not None:
        hand_up(block, "pre", grad_soft, pre.halo, grads)
        grad_raw = block.map("grad_raw", block.n_rows)
        convolution_backward(plan, block, pre, "pre", grad_soft, raw[:, post.halo :], grad_raw, None, grads)
        if last and grads.raw is not None:
            add_last(block, grad_raw, grads.raw)
    logits_grad = block.columns(grad_raw[:, : block.n_rows])
    own = slice(plan.halo + block.top, plan.halo + block.bottom)
    torch.bmm(logits_grad, plan.k[:, plan.pad : plan.pad + block.n_keys], out=grads.q[:, block.top : block.bottom])
    grads.k[:, keys].baddbmm_(logits_grad.transpose(1, 2), plan.q[:, own])


def mix_backward(plan: Plan, block: Block, part: Side, name: str, grad: Tensor, mid: Tensor | None, grads: Gradients) -> None:
    """Head mixing backward, in place on the block's rows of grad; sums the matrix's gradient."""
    geometry = block.geometry(part, block.top, block.n_rows)
    if part.matrix is None or mid is None:
        part.code.mask(geometry, block.address(grad), grad.stride(0))
        return
    transposed = part.matrix.transpose(1, 2).contiguous()
    sums = grad.new_empty(geometry.groups, SLOTS, part.group, part.group)
    part.code.mix_backward(
        geometry,
        *(
            block.address(grad),
            grad.stride(0),
            block.address(mid),
            mid.stride(0),
            transposed.data_ptr(),
            sums.data_ptr(),
            SLOTS,
        ),
    )
    grads.add(f"matrix_{name}", sums)


def convolution_backward(
    plan: Plan,
    block: Block,
    part: Side,
    name: str,
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor,
    soft: Tensor | None,
    grads: Gradients,
) -> None:
    """Convolution backward into grad_x (`grad` itself without a convolution), through the softmax where `soft` is given."""
    geometry = block.geometry(part, block.top, block.n_rows, group=1)
    if part.kernel is None:
        flipped = sums = None
    else:
        flipped = part.kernel.flip(1, 2).contiguous()
        sums = grad.new_empty(plan.n_maps, *part.kernel.shape[1:])
    part.code.convolution_backward(
        geometry,
        *(block.address(grad), grad.stride(0), block.address(x), x.stride(0), pointer(flipped), pointer(sums)),
        *(
            block.address(grad_x),
            grad_x.stride(0),
            None if soft is None else block.address(soft),
            0 if soft is None else soft.stride(0),
        ),
    )
    if sums is not None:
        grads.add(f"kernel_{name}", sums)


def hand_up(block: Block, name: str, grad: Tensor, halo: int, grads: Gradients) -> None:
    """Put the next block's first gradient rows below this block's, and keep this block's first for the one above."""
    if not halo:
        return
    handed = grads.handed.get(name)
    if handed is None:
        grad[:, block.n_rows :].zero_()
    else:
        grad[:, block.n_rows :] = handed[:, :, : block.width]
    grads.handed[name] = grad[:, :halo].clone()


def add_last(block: Block, grad: Tensor, extra: Tensor) -> None:
    """Add the gradient [BH, halo, S] of the returned rows to the block's last rows."""
    n = min(extra.shape[1], block.n_rows)
    block.columns(grad)[:, block.n_rows - n :] += extra[:, extra.shape[1] - n :]


def last_rows(plan: Plan, block: Block, x: Tensor, halo: int, like: Tensor | None) -> Tensor | None:
    """The last `halo` rows of a map as carried rows [B, H, halo, S]."""
    if like is None:
        return None
    kept = block.columns(x)[:, x.shape[1] - halo :]
    return kept.reshape(plan.batch, plan.n_heads, halo, block.n_keys).clone()


def pointer(x: Tensor | None) -> int | None:
    """Address of a contiguous tensor, None for None."""
    return None if x is None else x.data_ptr()


def native(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """The compiled form. Gradients of *carried* rows go through `blocked` instead."""
    if torch.is_grad_enabled() and any(row is not None and row.requires_grad for row in rows):
        return blocked(q, k, v, mixing, settings, start, rows)
    out, raw, weights = _Native.apply(settings, start, q, k, v, *mixing, *rows)
    return out, Rows(raw, weights)
