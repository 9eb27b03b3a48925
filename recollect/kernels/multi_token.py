"""Multi-Token Attention on the CPU by compiled kernels: products on the causal part (products.c) around the stencil (stencil.c).

Faster equal of `recollect.ops.multi_token.materialized` (its oracle), forward and backward, fp32 and fp64. Error: that of the
same computation in the same precision (exp is accurate to about 2 ulp in fp32). Blocks of query rows in turn; the backward pass
recomputes each block from its logits' log-sum-exp, from the last block to the first, handing c_q - 1 gradient rows up.

Axis legend: B batch, T queries, S keys, H heads, K key dim, V value dim, R rows of a block, W padded width of a map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.kernels.compile import products
from recollect.kernels.layout import Block, Plan, Side, compiled, pointer
from recollect.ops.attention import visible
from recollect.ops.multi_token import Mixing, Rows, Settings, blocked, dropout_mask

LINEAR, SOFTMAX, SOFTMAX_KNOWN = 0, 1, 2
SLOTS = 4  # partial sums of a matrix gradient per group: fixed, so that the result does not depend on the number of threads


def can_run(q: Tensor, mixing: Mixing) -> bool:
    """CPU, a compiler, kernels per head (not merged over head pairs) of at most 16 x 32 taps, 2 to 32 heads mixed."""
    kernels = [k for k in (mixing.kq_pre, mixing.kq_post) if k is not None]
    matrices = [m for m in (mixing.head_pre, mixing.head_post) if m is not None]
    if any(x.device.type != "cpu" for x in (q, *kernels, *matrices)) or torch.compiler.is_compiling():
        return False
    if any(k.dim() != 3 or not 1 <= k.shape[1] <= 16 or not 1 <= k.shape[2] <= 32 for k in kernels):
        return False
    if any(not 2 <= m.shape[1] <= 32 for m in matrices):
        return False
    double = q.dtype == torch.float64
    sides = ((mixing.kq_pre, mixing.head_pre), (mixing.kq_post, mixing.head_post))
    return products(double) is not None and all(compiled(*parts, double) is not None for parts in sides)


def logits_and_weights(
    plan: Plan, block: Block, rows: Rows, lse: Tensor, *, known: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """raw [BH, halo + R, W], softmax weights [BH, halo_post + R, W], and the pre-convolution's output if its matrix needs it."""
    pre, post, top = plan.pre, plan.post, block.top
    raw = block.map("raw", plan.halo + block.n_rows)
    missing = max(0, plan.halo - top)
    plan.above(raw, missing, block, rows.raw)
    block.logits(plan.q, top - plan.halo + missing, plan.packed_k, raw[:, missing:])
    weights = block.map("weights", post.halo + block.n_rows)
    missing = max(0, post.halo - top)
    plan.above(weights, missing, block, rows.weights)
    row = top - post.halo + missing
    mid = block.map("mid_pre", post.halo + block.n_rows) if known and pre.matrix is not None else None
    pre.code.forward(
        block.geometry(row, block.bottom - row, group=pre.group, left=pre.left),
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
            block.geometry(block.top, block.n_rows, group=post.group, left=post.left),
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
    def forward(ctx, settings, start, q, k, v, kq_pre, head_pre, kq_post, head_post, raw, weights):
        plan = Plan(q, k, v, Mixing(kq_pre, head_pre, kq_post, head_post), settings, start)
        lse = plan.q.new_empty(plan.n_maps, plan.n_queries)
        heads = plan.q.new_empty(plan.n_maps, plan.n_queries, plan.v.shape[-1])
        last_raw = last_weights = None
        for block in plan.blocks():
            raws, soft, _ = logits_and_weights(plan, block, Rows(raw, weights), lse, known=False)
            out, _, _ = final_weights(plan, block, soft, keep=False)
            block.read(out, plan.v, heads)
            if block.bottom == plan.n_queries:
                last_raw = last_rows(plan, block, raws, plan.pre.halo, raw)
                last_weights = last_rows(plan, block, soft, plan.post.halo, weights)
        ctx.save_for_backward(q, k, v, kq_pre, head_pre, kq_post, head_post, raw, weights, lse)
        ctx.settings, ctx.start = settings, start
        shaped = (
            heads.view(plan.batch, plan.n_heads, plan.n_queries, -1)[..., : v.shape[-1]].transpose(1, 2).to(q.dtype, copy=True)
        )
        return shaped, last_raw, last_weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_raw, grad_weights):
        q, k, v, kq_pre, head_pre, kq_post, head_post, raw, weights, lse = ctx.saved_tensors
        plan = Plan(q, k, v, Mixing(kq_pre, head_pre, kq_post, head_post), ctx.settings, ctx.start)
        grads = Gradients(plan, grad_out, grad_raw, grad_weights)
        for block in reversed(plan.blocks()):
            backward_block(plan, block, Rows(raw, weights), lse, grads)
        parts = grads.finish(q, k, v)
        return None, None, *parts, None, None


class Gradients:
    """Accumulated gradients of one call in kernel layout, and the rows that a block hands to the block above it."""

    def __init__(self, plan: Plan, grad_out: Tensor, grad_raw: Tensor | None, grad_weights: Tensor | None) -> None:
        self.plan = plan
        self.out = plan.heads(grad_out)
        self.raw = None if grad_raw is None else seen_rows(plan, grad_raw).flatten(0, 1)
        self.weights = None if grad_weights is None else grad_weights.flatten(0, 1)
        self.packed_v = plan.panels(plan.v)
        self.q, self.k, self.v = torch.empty_like(plan.q), torch.zeros_like(plan.k), torch.zeros_like(plan.v)
        self.handed: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        """Sum up the gradient of a kernel or matrix over blocks."""
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor | None]:
        """Gradients of q, k, v [B, L, Hx, K] and of the four mixing parameters, in the inputs' dtypes."""
        plan = self.plan

        def back(x: Tensor, like: Tensor) -> Tensor:
            grouped = x.view(plan.batch, like.shape[2], -1, like.shape[1], x.shape[-1])[..., : like.shape[3]]
            total = grouped[:, :, 0] if grouped.shape[2] == 1 else grouped.sum(2)
            return total.transpose(1, 2).to(like.dtype)

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
    raw, weights, mid_pre = logits_and_weights(plan, block, rows, lse, known=True)
    out, mid_post, dropped = final_weights(plan, block, weights, keep=True)
    block.accumulate(out, grads.out, grads.v)
    # Gradient of the final weights. Below the block's rows there is room for what the next block hands up.
    below = post.halo if post.kernel is not None else pre.halo
    grad = block.map("grad_post" if post.kernel is not None else "grad_pre", block.n_rows + below)
    block.logits(grads.out, block.top, grads.packed_v, grad)
    if dropped is not None:
        block.columns(grad[:, : block.n_rows]).mul_(dropped)
    mix_backward(plan, block, post, "post", grad, mid_post, grads)
    soft = weights[:, post.halo :]
    grad_soft = grad
    if post.kernel is not None:
        hand_up(block, "post", grad, post.halo, grads)
        grad_soft = block.map("grad_pre", block.n_rows + pre.halo)
    extra = returned(block, grads.weights)
    convolution_backward(plan, block, post, "post", grad, weights, grad_soft, soft if extra is None else None, grads)
    if extra is not None:  # someone also differentiates the carried rows
        block.columns(grad_soft)[:, extra[0]] += extra[1]
        rows_grad = grad_soft[:, : block.n_rows]
        rows_grad.sub_((rows_grad * soft).sum(-1, keepdim=True)).mul_(soft)
    mix_backward(plan, block, pre, "pre", grad_soft, mid_pre, grads)
    grad_raw = grad_soft
    if pre.kernel is not None:
        hand_up(block, "pre", grad_soft, pre.halo, grads)
        grad_raw = block.map("grad_raw", block.n_rows)
        convolution_backward(plan, block, pre, "pre", grad_soft, raw[:, post.halo :], grad_raw, None, grads)
        if (extra := returned(block, grads.raw)) is not None:
            block.columns(grad_raw)[:, extra[0]] += extra[1]
    block.read(grad_raw, plan.k, grads.q)
    block.accumulate(grad_raw, plan.q, grads.k)


def mix_backward(plan: Plan, block: Block, part: Side, name: str, grad: Tensor, mid: Tensor | None, grads: Gradients) -> None:
    """Head mixing backward, in place on the block's rows of grad; sums the matrix's gradient."""
    if part.matrix is None or mid is None:
        return
    geometry = block.geometry(block.top, block.n_rows, group=part.group)
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
    geometry = block.geometry(block.top, block.n_rows, left=part.left)
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


def seen_rows(plan: Plan, grad_raw: Tensor) -> Tensor:
    """The gradient [B, H, halo, S] of the returned raw rows without what they do not see: those entries are constant zeros."""
    n_rows, n_keys = min(grad_raw.shape[2], plan.n_queries), grad_raw.shape[3]
    start = None if plan.start is None else plan.start[:, plan.n_queries - n_rows : plan.n_queries]
    seen = visible(n_rows, n_keys, start=start, device=grad_raw.device)
    return grad_raw[:, :, grad_raw.shape[2] - n_rows :].masked_fill(~seen, 0)


def returned(block: Block, extra: Tensor | None) -> tuple[slice, Tensor] | None:
    """The block's rows that are among the returned ones, and the part of their gradient `extra` [BH, n, S] that belongs to them."""
    if extra is None:
        return None
    first = block.plan.n_queries - extra.shape[1]
    low = max(block.top, first)
    if low >= block.bottom:
        return None
    return slice(low - block.top, block.n_rows), extra[:, low - first : block.bottom - first, : block.n_keys]


def last_rows(plan: Plan, block: Block, x: Tensor, halo: int, like: Tensor | None) -> Tensor | None:
    """The last `halo` rows of a map as carried rows [B, H, halo, S]."""
    if like is None:
        return None
    kept = block.columns(x)[:, x.shape[1] - halo :]
    return kept.reshape(plan.batch, plan.n_heads, halo, block.n_keys).clone()


def native(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """The compiled form. Gradients of *carried* rows go through `blocked` instead."""
    if torch.is_grad_enabled() and any(row is not None and row.requires_grad for row in rows):
        return blocked(q, k, v, mixing, settings, start, rows)
    out, raw, weights = _Native.apply(settings, start, q, k, v, *mixing, *rows)
    return out, Rows(raw, weights)
