"""Multi-Token Attention on a GPU: products by PyTorch, everything between them by Triton kernels on blocks of query rows.

Faster equal of `recollect.ops.multi_token.materialized` (its oracle), forward and backward, in fp64, fp32, bf16 and fp16. Memory
linear in the number of keys: a block's maps are scratch, and what is kept is a log-sum-exp a row. The backward pass recomputes block
after block, from the last to the first, and hands the gradient of the rows above a block up to it. In half precision, where no heads
are mixed before the softmax, the convolution there is a wider product instead (`recollect.ops.widened`). Results do not depend on the
order in which programs run, nor on autocast: the precision is that of the inputs. NOT YET MEASURED ON A GPU: checked by Triton's
interpreter, and compiled for NVIDIA GPUs in the tests.

Axis legend: B batch, T queries, S keys, H heads, Hkv key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.kernels.triton import softmax, stencil
from recollect.kernels.triton.decode import can_decode, decode
from recollect.kernels.triton.stencil import Frame, exact_products
from recollect.ops.multi_token import Mixing, Rows, Settings, blocked, dropout_mask, key_padding, read, scores, visible
from recollect.ops.operators import Inputs, operator
from recollect.ops.widened import widened

WIDENED = 128  # largest head whose convolution before the softmax may be a wider product (docs/kernels.md); 0: never
BLOCK_ENTRIES = 2**22  # of one map of a block: three maps of it fit the last-level cache of a large GPU


class Side(NamedTuple):
    """Convolution and head mixing on one side of the softmax."""

    kernel: Tensor | None
    matrix: Tensor | None
    left: int

    @property
    def halo(self) -> int:
        """Rows above a block that the convolution reads."""
        return 0 if self.kernel is None else self.kernel.shape[-2] - 1


class Call:
    """One call: inputs, both sides, and the blocks of its query rows."""

    def __init__(self, given: Inputs) -> None:
        q, k, v, mixing, start, rows, settings, _, band = given
        self.q, self.k, self.v, self.settings, self.rows, self.band = q, k, v, settings, rows, band
        self.batch, self.n_queries, self.n_heads, _ = q.shape
        self.earlier = k.shape[1] - q.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)

        def side(kernel: Tensor | None, matrix: Tensor | None) -> Side:
            left = 0 if kernel is None else key_padding(settings.pad_key, kernel.shape[-1])[0]
            kernel, matrix = (None if x is None else x.detach().to(self.dtype).contiguous() for x in (kernel, matrix))
            return Side(kernel, matrix, left)

        self.pre, self.post = side(mixing.kq_pre, mixing.head_pre), side(mixing.kq_post, mixing.head_post)
        if start is not None:
            start = start.expand(self.batch, self.n_queries).to(torch.int32).contiguous()
        self.frame = Frame(self.earlier, self.earlier, k.shape[1], start)

    def blocks(self) -> list[tuple[int, int]]:
        """(top, bottom) query rows of every block, of about BLOCK_ENTRIES entries a map."""
        n_rows = max(
            stencil.ROWS, BLOCK_ENTRIES // (self.batch * self.n_heads * self.k.shape[1]) // stencil.ROWS * stencil.ROWS
        )
        return [(top, min(top + n_rows, self.n_queries)) for top in range(0, self.n_queries, n_rows)]

    def at(self, query: int) -> Frame:
        """The frame of a map whose row 0 is a query's."""
        return self.frame.at(self.earlier + query)

    def map(self, n_rows: int, n_keys: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised map [B, H, rows, keys]."""
        return self.q.new_empty(self.batch, self.n_heads, n_rows, n_keys, dtype=dtype or self.dtype)

    def banded(self, top: int, n_rows: int, n_keys: int) -> tuple[Tensor, Tensor]:
        """Of the band's rows top .. top + n_rows: the keys of its entries [1, 1, rows, E], and which have none (there stands any)."""
        assert self.band is not None
        query = torch.arange(top, top + n_rows, device=self.q.device)[:, None]
        keys = (query - torch.arange(self.band.shape[-1], device=self.q.device))[None, None]
        return keys.clamp(0, n_keys - 1), keys < 0

    def above(self, x: Tensor, n_rows: int, carried: Tensor | None) -> Tensor:
        """x with the rows before the first query on top: carried ones, zeros above them."""
        if not n_rows:
            return x
        top = x.new_zeros(*x.shape[:2], n_rows, x.shape[3])
        if carried is not None and carried.shape[2]:
            top[:, :, -carried.shape[2] :] = carried[:, :, -n_rows:, : x.shape[3]]
        return torch.cat((top, x), 2)


class Maps(NamedTuple):
    """The maps of a block's rows; `raw` and `weights` with the rows above that the convolutions read.

    raw: logits of single tokens, in the model's precision, unmasked; weights: softmax; mid_pre, mid_post: outputs of the convolutions
    where a matrix needs them; final: weights that values are read with; dropped: the dropout mask.
    """

    raw: Tensor
    weights: Tensor
    mid_pre: Tensor | None
    final: Tensor
    mid_post: Tensor | None
    dropped: Tensor | None


def block_maps(call: Call, top: int, bottom: int, lse: Tensor, *, known: bool) -> Maps:
    """Every map of the query rows top .. bottom; `known`: the log-sum-exp is, and what the backward pass needs is kept."""
    pre, post, settings = call.pre, call.post, call.settings
    n_keys, n_rows = call.earlier + bottom, bottom - top
    first_weight = max(0, top - post.halo)
    first_raw = max(0, first_weight - pre.halo)
    raw = scores(call.q[:, first_raw:bottom], call.k[:, :n_keys], settings.scale)
    raw = call.above(raw, pre.halo - (first_weight - first_raw), call.rows.raw)
    weights = call.map(bottom - first_weight, n_keys)
    mid_pre = torch.empty_like(weights) if known and pre.matrix is not None else None
    frame, precision = call.at(first_weight), call.q.dtype
    stencil.apply_side(raw[:, :, pre.halo :], weights, frame, *pre, precision, fill=float("-inf"), keep=mid_pre)
    if call.band is not None:
        keys, none = call.banded(first_weight, bottom - first_weight, n_keys)
        band = call.band[:, :, first_weight:bottom].masked_fill(none, 0)
        weights.scatter_add_(3, keys.expand_as(band), -band)
    sums = lse[:, :, first_weight:bottom].contiguous()
    softmax.softmax_(weights, sums, frame, known=known)
    if not known:
        lse[:, :, first_weight:bottom] = sums
    weights = call.above(weights, post.halo - (top - first_weight), call.rows.weights)
    mid_post = None
    if post.kernel is None and post.matrix is None:
        final = weights.to(precision)
    else:
        final = call.map(n_rows, n_keys, precision)
        mid_post = call.map(n_rows, n_keys) if known and post.matrix is not None else None
        stencil.apply_side(weights[:, :, post.halo :], final, call.at(top), *post, precision, keep=mid_post)
    dropped = None
    if settings.dropout_p:
        dropped = dropout_mask(final.to(call.dtype), settings, call.earlier + top)
        final = (final * dropped).to(precision)
    skip = 0 if mid_pre is None else mid_pre.shape[2] - n_rows
    return Maps(raw, weights, None if mid_pre is None else mid_pre[:, :, skip:], final, mid_post, dropped)


def forward(call: Call) -> tuple[Tensor, Tensor, Rows]:
    """Outputs [B, T, H, V], log-sum-exps [B, H, T] and the rows to carry on with."""
    lse = call.q.new_empty(call.batch, call.n_heads, call.n_queries, dtype=call.dtype)
    out = call.q.new_empty(call.batch, call.n_queries, call.n_heads, call.v.shape[-1])
    last = Rows()
    for top, bottom in call.blocks():
        maps = block_maps(call, top, bottom, lse, known=False)
        out[:, top:bottom] = read(maps.final, call.v[:, : call.earlier + bottom])
        if bottom == call.n_queries:
            last = last_rows(call, maps)
    return out, lse, last


def last_rows(call: Call, maps: Maps) -> Rows:
    """The last c_q - 1 rows of both maps; raw logits as they are seen, zeros elsewhere."""

    def last(x: Tensor, halo: int, *, mask: bool) -> Tensor:
        rows = x[:, :, x.shape[2] - halo :].to(call.dtype)
        if not mask or not halo:
            return rows.clone()
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        frame = call.frame.at(call.frame.n_positions - halo)
        stencil.apply_side(rows.contiguous(), out, frame, None, None, 0, call.q.dtype)
        return out

    raw = None if call.rows.raw is None else last(maps.raw, call.pre.halo, mask=True)
    return Rows(raw, None if call.rows.weights is None else last(maps.weights, call.post.halo, mask=False))


class Gradients:
    """Accumulated gradients of one call, and the rows that a block hands to the block above it."""

    def __init__(self, call: Call, out: Tensor, raw: Tensor | None, weights: Tensor | None) -> None:
        self.out, self.raw, self.weights = out, raw, weights
        self.q, self.k, self.v = torch.empty_like(call.q), *(torch.zeros_like(x, dtype=call.dtype) for x in (call.k, call.v))
        self.band = None if call.band is None else torch.empty_like(call.band, memory_format=torch.contiguous_format)
        self.handed: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        """Sum up the gradient of a kernel or matrix over blocks."""
        self.sums[name] = self.sums[name] + part if name in self.sums else part


def backward(call: Call, lse: Tensor, grads: Gradients) -> None:
    """Every block from the last to the first; fills `grads`."""
    for top, bottom in reversed(call.blocks()):
        maps = block_maps(call, top, bottom, lse, known=True)
        grad = weight_gradient(call, top, bottom, maps, grads)
        grad = side_backward(call, top, bottom, "post", grad, maps.weights, maps.mid_post, grads)
        grad = plus_returned(call, top, bottom, grad, grads.weights)
        softmax.softmax_backward_(maps.weights[:, :, call.post.halo :], grad, call.at(top))
        skip = maps.raw.shape[2] - (bottom - top) - call.pre.halo
        grad = side_backward(call, top, bottom, "pre", grad, maps.raw[:, :, skip:], maps.mid_pre, grads)
        grad = plus_returned(call, top, bottom, grad, grads.raw)
        if grads.band is not None:
            keys, none = call.banded(top, bottom - top, grad.shape[3])
            part = grads.band[:, :, top:bottom]
            part.copy_(-grad.gather(3, keys.expand_as(part)).masked_fill(none, 0))
        query_gradient(call, top, bottom, grad.to(call.q.dtype), grads)


def grouped(x: Tensor, n_groups: int) -> Tensor:
    """Maps [B, H, rows, S] as [B, Hkv, G rows, S], or rows of heads [B, rows, H, K] as [B, Hkv, G rows, K]."""
    return x.reshape(x.shape[0], n_groups, -1, x.shape[-1])


def weight_gradient(call: Call, top: int, bottom: int, maps: Maps, grads: Gradients) -> Tensor:
    """The gradient of the final weights [B, H, rows, S], unmasked; adds the values' own."""
    n_keys, groups = call.earlier + bottom, call.v.shape[2]
    out = grouped(grads.out[:, top:bottom].transpose(1, 2), groups)
    grads.v[:, :n_keys] += (grouped(maps.final, groups).mT @ out).transpose(1, 2)
    grad = (out @ call.v[:, :n_keys].permute(0, 2, 3, 1)).view(maps.final.shape).to(call.dtype)
    return grad if maps.dropped is None else grad * maps.dropped


def side_backward(
    call: Call, top: int, bottom: int, name: str, grad: Tensor, x: Tensor, mid: Tensor | None, grads: Gradients
) -> Tensor:
    """Through head mixing and convolution of one side: from the gradient of its output to that of its input x, whose first rows lie
    above the block; adds those of its kernel and matrix, and hands up what belongs to the rows above."""
    side = call.post if name == "post" else call.pre
    frame = call.at(top)
    if side.matrix is not None and mid is not None:
        grad, part = stencil.mix_backward(grad, mid, side.matrix, frame, call.q.dtype)
        grads.add(f"matrix_{name}", part)
    if side.kernel is not None:
        part = stencil.kernel_gradient(grad, x[:, :, side.halo :], side.kernel, frame, side.left, call.q.dtype)
        grads.add(f"kernel_{name}", part)
    if side.halo:  # the transpose reads downwards: rows of the block below, which see more keys, and the block above this one's
        n_keys = min(call.k.shape[1], call.earlier + bottom + side.halo)
        below = grads.handed.get(name, grad.new_zeros(*grad.shape[:2], side.halo, n_keys))
        grad = torch.cat((F.pad(grad, (0, n_keys - grad.shape[3])), below[..., :n_keys]), 2)
        grads.handed[name] = grad[:, :, : side.halo].clone()
    out = call.map(bottom - top, call.earlier + bottom)
    stencil.apply_side(grad, out, frame, side.kernel, None, side.left, call.q.dtype, flip=True)
    return out


def plus_returned(call: Call, top: int, bottom: int, grad: Tensor, extra: Tensor | None) -> Tensor:
    """The gradient of a map's rows plus, where carried rows are themselves differentiated, theirs."""
    if extra is None or not extra.shape[2]:
        return grad
    first = call.n_queries - extra.shape[2]
    low = max(top, first, 0)
    if low >= bottom:
        return grad
    part = torch.zeros_like(grad)
    part[:, :, low - top :] = extra[:, :, low - first : bottom - first, : grad.shape[3]]
    seen = torch.empty_like(part)
    stencil.apply_side(part, seen, call.at(top), None, None, 0, call.q.dtype)
    return grad + seen


def query_gradient(call: Call, top: int, bottom: int, grad: Tensor, grads: Gradients) -> None:
    """From the gradient of the raw logits to those of the block's queries and of the keys."""
    n_keys, groups = call.earlier + bottom, call.k.shape[2]
    rows = grouped(grad * call.settings.scale, groups)
    queries = rows @ call.k[:, :n_keys].transpose(1, 2)
    grads.q[:, top:bottom] = queries.view(call.batch, call.n_heads, bottom - top, -1).transpose(1, 2)
    grads.k[:, :n_keys] += (rows.mT @ grouped(call.q[:, top:bottom].transpose(1, 2), groups)).transpose(1, 2)


def _ahead(call: Inputs) -> tuple[Tensor, Tensor, Rows]:
    """Outputs, log-sum-exps and the rows to carry on with."""
    with exact_products(call.q):
        return forward(Call(call))


def _back(given: Inputs, lse: Tensor, grad_out: Tensor, grad_rows: Rows) -> list[Tensor]:
    """Gradients of q, k, v, the learned parts and the band."""
    call = Call(given)
    grads = Gradients(call, grad_out, *grad_rows)
    with exact_products(given.q):
        backward(call, lse, grads)
    names = ("kernel_pre", "matrix_pre", "kernel_post", "matrix_post")
    parts = [grads.sums[name].to(x.dtype) for name, x in zip(names, given.mixing, strict=True) if x is not None]
    band = [] if grads.band is None else [grads.band]
    return [grads.q, grads.k.to(given.k.dtype), grads.v.to(given.v.dtype), *parts, *band]


_run = operator("multi_token", _ahead, _back, keeps=True, of_rows=False)


def fused(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """The Triton form: one new token by itself; gradients of *carried* rows go through `blocked` instead."""
    if can_decode(q, mixing, settings, k, v, *rows):
        return decode(q, k, v, mixing, settings, start, rows)
    if torch.is_grad_enabled() and any(row is not None and row.requires_grad for row in rows):
        return blocked(q, k, v, mixing, settings, start, rows)
    if is_widened(q, k, mixing, start):
        return _widened(q, k, v, mixing, settings, rows)
    return _run(Inputs(q, k, v, mixing, start, rows, settings, 0))


def is_widened(q: Tensor, k: Tensor, mixing: Mixing, start: Tensor | None) -> bool:
    """Whether the convolution before the softmax becomes a product: no heads are mixed there, tensor cores multiply the inputs as they
    are, and there are no documents and no earlier keys."""
    kernel = mixing.kq_pre
    if kernel is None or kernel.dim() != 3 or mixing.head_pre is not None or start is not None or q.shape[1] != k.shape[1]:
        return False
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= WIDENED


def _widened(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, rows: Rows) -> tuple[Tensor, Rows]:
    """The same without a convolution before the softmax, of wider queries and keys."""
    assert mixing.kq_pre is not None
    dtype, halo = torch.promote_types(q.dtype, torch.float32), mixing.kq_pre.shape[-2] - 1
    with exact_products(q):
        wide = widened(q, k, mixing.kq_pre.to(dtype), settings.scale, settings.pad_key)
        n_rows = min(halo, q.shape[1])
        raw = scores(q[:, q.shape[1] - n_rows :], k, settings.scale).to(dtype)
        raw = raw.masked_fill(~visible(n_rows, k.shape[1], device=q.device), 0)
    mixing, last = mixing._replace(kq_pre=None), F.pad(raw, (0, 0, halo - n_rows, 0))
    out, carried = _run(Inputs(wide.q, wide.k, v, mixing, None, rows._replace(raw=None), settings, 0, wide.band))
    return out, carried._replace(raw=None if rows.raw is None else last)
