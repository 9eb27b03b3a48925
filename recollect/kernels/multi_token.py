"""Multi-Token Attention on the CPU by compiled kernels: a walk over strips of the map (attention.c) around the stencil (stencil.c).

Faster equal of `recollect.ops.multi_token.materialized` (its oracle), forward and backward, fp32 and fp64, and bfloat16, whose
products are those of bfloat16 where the processor has them and q, k and v are all in it, else of fp32. Error: that of the same
computation in the same precision (exp is accurate to about 2 ulp in fp32). The backward pass recomputes each strip of the map from its
logits' log-sum-exp; beside inputs, outputs, their gradients and copies in the layout of the products, memory is a few strips of rows
for each thread.

Axis legend: B batch, T queries, S keys, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.kernels.compile import attention, stencil
from recollect.kernels.decode import decode
from recollect.kernels.layout import Plan, Side, SideStruct
from recollect.kernels.missing import unbuilt
from recollect.ops.multi_token import Mixing, Rows, Settings, blocked
from recollect.ops.operators import Inputs, operator


def meant(q: Tensor, mixing: Mixing) -> bool:
    """For a CPU."""
    return q.device.type == "cpu"


def meant_to_decode(q: Tensor, mixing: Mixing) -> bool:
    """For one new token on a CPU, without gradients."""
    return q.device.type == "cpu" and not _wanted(q, *mixing) and not torch.compiler.is_compiling()


def _wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them is."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def lacks(q: Tensor, mixing: Mixing) -> str:
    """Why it cannot run, "" where it can: a CPU, a compiler, kernels per head of at most 16 x 32 taps, 2 to 32 heads mixed."""
    kernels = [k for k in (mixing.kq_pre, mixing.kq_post) if k is not None]
    matrices = [m for m in (mixing.head_pre, mixing.head_post) if m is not None]
    if any(x.device.type != "cpu" for x in (q, *kernels, *matrices)):
        return f"it runs on a CPU, q is on {q.device.type}"
    if any(k.dim() != 3 for k in kernels):
        return "it has no kernels merged over pairs of heads, [H, c_h, c_q, c_k]"
    if any(not 1 <= k.shape[1] <= 16 or not 1 <= k.shape[2] <= 32 for k in kernels):
        return "it has kernels of at most 16 queries x 32 keys"
    if any(not 2 <= m.shape[1] <= 32 for m in matrices):
        return "it mixes 2 to 32 heads"
    for kernel, matrix in ((mixing.kq_pre, mixing.head_pre), (mixing.kq_post, mixing.head_post)):
        c_q, c_k = (0, 0) if kernel is None else kernel.shape[1:]
        c_h = 1 if matrix is None else matrix.shape[1]
        if torch.compiler.is_compiling():  # where sizes may be symbols, each is told by what it equals
            c_q, c_k, c_h = (next(n for n in range(33) if n == size) for size in (c_q, c_k, c_h))
        if not _built(c_q, c_k, c_h, q.dtype == torch.float64):
            return unbuilt()
    return ""


def _built(c_q: int, c_k: int, c_h: int, double: bool) -> bool:
    """Whether the code of a side can be built."""
    return attention(torch.float64 if double else torch.float32) is not None and stencil(c_q, c_k, c_h, double) is not None


_built._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it and does not look inside, see ops/plugins.py


def _forward(call: Inputs) -> tuple[Tensor, Tensor, Rows]:
    """Outputs, a log-sum-exp a row, the rows to carry on with."""
    plan = Plan(call.q, call.k, call.v, call.mixing, call.settings, call.start)
    lse = plan.new(plan.batch, plan.n_heads, plan.n_queries)
    heads = plan.new(plan.n_maps, plan.n_queries, plan.v.shape[-1])
    inputs = {"packed": plan.pack(plan.k), "woven_v": plan.woven(plan.v)}
    last = [
        None if given is None else plan.new(plan.batch, plan.n_heads, side.halo, plan.n_keys)
        for given, side in zip(call.rows, (plan.pre, plan.post), strict=True)
    ]
    point(plan, lse=lse, out=heads, last_raw=last[0], last_weights=last[1], **inputs, **carried(plan, call.rows))
    plan.run(backward=False)
    shaped = heads.view(plan.batch, plan.n_heads, plan.n_queries, -1)[..., : call.v.shape[-1]].transpose(1, 2)
    return shaped.to(call.q.dtype, memory_format=torch.contiguous_format), lse, Rows(*last)


def _backward(call: Inputs, lse: Tensor, grad_out: Tensor, grad_rows: Rows) -> list[Tensor]:
    """Gradients of q, k, v and the learned parts, strip by strip."""
    q, k, v = call.q, call.k, call.v
    plan = Plan(q, k, v, call.mixing, call.settings, call.start)
    returned = {"grad_raw": last_rows(plan, grad_rows.raw), "grad_weights": last_rows(plan, grad_rows.weights)}
    plan.call.n_raw, plan.call.n_weights = (0 if x is None else x.shape[1] for x in returned.values())
    grad_q = plan.new(*plan.q.shape)
    (given_k, grad_k), (given_v, grad_v) = (plan.gradients(x.shape[2]) for x in (plan.k, plan.v))
    found = {"grad_q": grad_q, "grad_k": addresses(given_k), "grad_v": addresses(given_v)}
    sums = [*side_gradients(plan, plan.pre, plan.call.pre), *side_gradients(plan, plan.post, plan.call.post)]
    rows = plan.heads(grad_out)
    summed = {"woven_k": plan.woven(plan.k), "turned_q": plan.turned(plan.q), "turned_grad": plan.turned(rows)}
    inputs = {"packed": plan.pack(plan.k, plan.v), "lse": lse, "grad_out": rows, **summed}
    above = carried(plan, call.rows)
    point(plan, **inputs, **above, **returned, **found)
    plan.run(backward=True)
    whole = grad_q.mul_(plan.settings.scale), total(grad_k), total(grad_v)
    parts = [back(plan, x, like) for x, like in zip(whole, (q, k, v), strict=True)]
    learned = zip(sums, call.mixing, strict=True)
    return [*parts, *(x.sum((0, 1)).to(like.dtype) for x, like in learned if x is not None and like is not None)]


def point(plan: Plan, **tensors: Tensor | None) -> None:
    """Set fields of the call to the addresses of tensors, which live as long as the plan."""
    for name, x in tensors.items():
        if x is not None:
            assert x.is_contiguous()
            plan.kept.append(x)
            setattr(plan.call, name, x.data_ptr())


def carried(plan: Plan, rows: Rows) -> dict[str, Tensor | None]:
    """The rows above the first query, by the names of the call's fields."""
    return {
        "carried_raw": plan.carried(rows.raw, plan.pre.halo),
        "carried_weights": plan.carried(rows.weights, plan.post.halo),
    }


def side_gradients(plan: Plan, side: Side, given: SideStruct) -> list[Tensor | None]:
    """Zeros for the gradients of a side's kernel and matrix, [segments, B, *shape], and their addresses in the call."""
    found: list[Tensor | None] = []
    for name, x in (("kernel_grad", side.kernel), ("matrix_grad", side.matrix)):
        found.append(None if x is None else x.new_zeros(plan.call.segments, plan.batch, *x.shape))
        if found[-1] is not None:
            setattr(given, name, found[-1].data_ptr())
    return found


def addresses(tensors: list[Tensor]) -> Tensor:
    """int64, for a field of the call that points at several."""
    return torch.tensor([x.data_ptr() for x in tensors])


def total(segments: list[Tensor]) -> Tensor:
    """The sum of what every segment gives to the keys it sees, in place of the last one's, which sees them all."""
    *others, last = segments
    for x in others:
        last[:, : x.shape[1]] += x
    return last


def back(plan: Plan, x: Tensor, like: Tensor) -> Tensor:
    """A gradient [BH, L, K'] in the layout and dtype of its input [B, L, Hx, K], whose heads may have been shared."""
    grouped = x.view(plan.batch, like.shape[2], -1, like.shape[1], x.shape[-1])[..., : like.shape[3]]
    own = grouped[:, :, 0] if grouped.shape[2] == 1 else grouped.sum(2)
    return own.transpose(1, 2).to(like.dtype)


def last_rows(plan: Plan, grad: Tensor | None) -> Tensor | None:
    """The gradient [BH, n, S] of returned rows, of those that are the call's own."""
    return None if grad is None else grad[:, :, -min(grad.shape[2], plan.n_queries) :].flatten(0, 1).to(plan.dtype).contiguous()


_in_strips = operator("multi_token_native", _forward, _backward, keeps=True, of_rows=False)


def native(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """The compiled form; of one token without gradients, `decode`. Gradients of *carried* rows go through `blocked` instead."""
    if _wanted(*rows):
        return blocked(q, k, v, mixing, settings, start, rows)
    if q.shape[1] == 1 and meant_to_decode(q, mixing) and not _wanted(k, v):
        return decode(q, k, v, mixing, settings, start, rows)
    return _in_strips(Inputs(q, k, v, mixing, start, rows, settings, 0))
