"""The Miras recurrence of a matrix memory on a GPU: gradient descent in chunks, forward and backward.

    y_t = W_t q_t,    W_t = W_{t-1} diag(alpha_t) - phi(W k_t - v_t) (eta_t k_t)^T,    W the matrix at the chunk's start

Where a full chunk ends, entries may come nearer to zero (elastic nets); weights may be W times a factor of the chunk (Moneta's scale).

Its oracle is `backend="chunked"`, in fp32 and fp64. Pieces of 16 tokens are products of matrices (`matrix_walk`); what needs no matrix
of the memory is done for all pieces at once, before and after the walk (`matrix_tokens`). Sums over programs are taken by PyTorch from
a place for each: equal inputs give equal bits. NOT YET MEASURED ON A GPU: checked by Triton's interpreter, and compiled for NVIDIA GPUs
in the tests.

Axis legend: B batch, T time, H heads, K key dim, V value dim, P pieces, S saved states, N blocks of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from recollect.kernels.memory import LINKS, Settings
from recollect.kernels.triton import BIASES, OVER_CHANNELS, numbers
from recollect.kernels.triton.matrix_tokens import finish_back, prepare
from recollect.kernels.triton.matrix_walk import walk, walk_back
from recollect.kernels.triton.pieces import SEGMENT, TOKENS, cut
from recollect.kernels.triton.stencil import accumulator

ROWS, WARPS = 32, 4  # of a walk: rows of the matrix in one program, where rows need not meet


class _Plan:
    """What the kernels are compiled for and how many programs they have."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        eta: Tensor,
        log_alpha: Tensor,
        delta: Tensor | None,
        start: Tensor | None,
        link: int,
        entries: Tensor,
    ) -> None:
        batch, length, n_heads, key = q.shape
        self.sizes = (length, n_heads, entries.shape[1])
        self.n_programs, self.n_pieces = batch * n_heads, entries.shape[1]
        self.every: dict[str, Any] = {
            "KEY": key,
            "KW": _width(key),
            "LINK": link,
            "PRECISION": accumulator(q.dtype)[1],
            "num_stages": 1,  # what a loop reads the one before may have written: nothing is to be loaded ahead
        }
        self.gates = {"ETA_WIDE": eta.shape[-1] > 1, "ALPHA_WIDE": log_alpha.shape[-1] > 1}
        self.value = v.shape[-1]
        self.wide = delta is not None and delta.shape[-1] > 1
        self.given = {
            "HAS_DELTA": delta is not None,
            "HAS_START": start is not None,
            "DELTA_WIDE": self.wide,
        }

    def walks(self, bias: int, sharpness: float, retention: float) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid of a walk, and its options: rows meet where a bias or the link takes a norm over them."""
        width = _width(self.value)
        rows = (
            width
            if bias in {BIASES[name] for name in OVER_CHANNELS} or self.every["LINK"] == LINKS["scaled"]
            else min(ROWS, width)
        )
        kinds = {"VALUE": self.value, "BV": rows, "BIAS": bias, "SHARPNESS": sharpness}
        grid = (self.n_programs, triton.cdiv(self.value, rows))
        kinds |= numbers(self.every["LINK"], retention)
        return grid, {**self.every, **self.given, **kinds, "num_warps": WARPS if rows <= ROWS else 2 * WARPS}

    def prepared(
        self, table: tuple[Tensor, ...], q: Tensor, k: Tensor, eta: Tensor, log_alpha: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`prepare`'s decayed queries, eta k decayed to the piece's end, scores and decays over the pieces."""
        batch, length, n_heads, key = q.shape
        decayed, in_end = q.new_empty(2, batch, n_heads, length, key)
        scores, total = q.new_empty(batch, n_heads, length, TOKENS), q.new_empty(batch, n_heads, self.n_pieces, key)
        prepare[(self.n_programs * self.n_pieces,)](
            *(*table, q, k, eta, log_alpha, decayed, in_end, scores, total, *self.sizes), **self.every, **self.gates
        )
        return decayed, in_end, scores, total


def _width(channels: int) -> int:
    """Columns of a tile: a power of two, and no fewer than tensor cores take."""
    return max(TOKENS, int(triton.next_power_of_2(channels)))


@torch.library.custom_op("recollect::matrix_scan", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    state: Tensor,
    anchor: Tensor,
    start: Tensor | None,
    radius: Tensor | None,
    open_kept: Tensor | None,
    order: Tensor,
    entries: Tensor,
    ends: Tensor,
    n_slots: int,
    padded: bool,
    link: int,
    bias: int,
    sharpness: float,
    retention: float,
) -> list[Tensor]:
    tokens = [(q if x is None else x).contiguous() for x in (q, k, v, eta, log_alpha, delta)]
    query, keys, values, steps, decays, thresholds = tokens
    plan, table = _Plan(q, v, eta, log_alpha, delta, start, link, entries), (order, entries, ends)
    y = torch.zeros_like(values) if padded else torch.empty_like(values)
    last, last_anchor = (state.new_empty(state.shape) for _ in range(2))
    saved = state.new_empty(*state.shape[:2], n_slots, *state.shape[2:])
    written = values.new_empty(values.shape if n_slots else 0)
    factors = q.new_empty(*state.shape[:2], entries.shape[1] if radius is not None else 0, 2)
    simplex = state.shape[0] if open_kept is not None else 0
    kept_before = q.new_empty(simplex, *plan.sizes[1:], q.shape[-1])
    grid, options = plan.walks(bias, sharpness, retention)
    walk[grid](
        *(*table, keys, values, thresholds, *plan.prepared(table, query, keys, steps, decays)),
        *(state.contiguous() if x is None else x.contiguous() for x in (state, anchor, start, radius, open_kept)),
        *(last, last_anchor, saved, written, factors, kept_before, y, *plan.sizes, n_slots),
        **options,
        LEARN=n_slots > 0,
    )
    return [y, last, last_anchor, saved, written, factors, kept_before]


@_forward.register_fake
def _(q, k, v, eta, log_alpha, delta, state, anchor, start, radius, open_kept, order, entries, ends, n_slots, *others):
    last, last_anchor = (state.new_empty(state.shape) for _ in range(2))
    saved = state.new_empty(*state.shape[:2], n_slots, *state.shape[2:])
    factors = q.new_empty(*state.shape[:2], entries.shape[1] if radius is not None else 0, 2)
    written, simplex = v.new_empty(v.shape if n_slots else 0), state.shape[0] if open_kept is not None else 0
    kept_before = q.new_empty(simplex, state.shape[1], entries.shape[1], q.shape[-1])
    return [v.new_empty(v.shape), last, last_anchor, saved, written, factors, kept_before]


@torch.library.custom_op("recollect::matrix_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    grad_anchor: Tensor,
    last: Tensor,
    saved: Tensor,
    written: Tensor,
    factors: Tensor,
    kept_before: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    anchor: Tensor,
    start: Tensor | None,
    radius: Tensor | None,
    open_kept: Tensor | None,
    order: Tensor,
    entries: Tensor,
    ends: Tensor,
    padded: bool,
    link: int,
    bias: int,
    sharpness: float,
    retention: float,
) -> list[Tensor]:
    tokens = [(q if x is None else x).contiguous() for x in (q, k, v, eta, log_alpha, delta)]
    query, keys, values, steps, decays, thresholds = tokens
    plan, table = _Plan(q, v, eta, log_alpha, delta, start, link, entries), (order, entries, ends)
    batch, length, n_heads, key = q.shape
    grid, options = plan.walks(bias, sharpness, retention)
    n_blocks = grid[1]
    empty = torch.zeros_like if padded else torch.empty_like
    d_q, d_k, d_v, d_eta, d_log_alpha, d_delta = (empty(x) for x in tokens)
    if delta is not None and not plan.wide:
        d_delta = empty(thresholds.expand(n_blocks, *thresholds.shape).contiguous())
    states = anchor.new_empty(*anchor.shape[:2], SEGMENT + 1, *anchor.shape[2:])
    d_start = anchor.new_zeros(anchor.shape if start is not None else 0)
    d_radius, d_kept = q.new_empty(anchor.shape[:2]), q.new_empty(n_blocks, batch, n_heads, key)
    full = (ends[:, 1] != 0).view(-1, 1, 1, 1)
    d_state = (grad_last + grad_anchor.masked_fill(~full, 0)).contiguous()
    if options["THRESHOLD"] > 0:
        d_state = d_state.masked_fill(full & (last == 0), 0)
    d_anchor = grad_anchor.masked_fill(full, 0).contiguous()
    left = [q.new_empty(n_blocks, batch, n_heads, length, width) for width in (key, key, key, TOKENS)]
    left.append(q.new_empty(n_blocks, batch, n_heads, plan.n_pieces, key))
    prepared = plan.prepared(table, query, keys, steps, decays)
    walk_back[grid](
        *(*table, keys, values, thresholds),
        *(anchor.contiguous() if x is None else x.contiguous() for x in (anchor, start, radius)),
        *(saved, written, factors, kept_before, *prepared, grad_y.contiguous(), states),
        *(d_v, d_delta, d_start, d_radius, d_kept, d_state, d_anchor, *left, *plan.sizes, saved.shape[2]),
        **options,
    )
    summed = [x.sum(0) for x in left]
    finish_back[(plan.n_programs * plan.n_pieces,)](
        *(*table, query, keys, steps, decays, *summed, d_q, d_k, d_eta, d_log_alpha, *plan.sizes), **plan.every, **plan.gates
    )
    found = [d_q, d_k, d_v, d_eta, d_log_alpha]
    if delta is not None:
        found.append(d_delta if plan.wide else d_delta.sum(0))
    found += [d_state, d_anchor]
    optional = ((start, d_start), (radius, d_radius), (open_kept, d_kept))
    return [*found, *(x.sum(0) for given, x in optional if given is not None)]


@_backward.register_fake
def _(grad_y, grad_last, grad_anchor, last, saved, written, factors, kept_before, *given):
    *inputs, anchor, start, radius, open_kept, _, _, _, _, _, _, _, _ = given
    return [x.new_empty(x.shape) for x in (*inputs, anchor, anchor, start, radius, open_kept) if x is not None]


def _keep(ctx, inputs, output):
    *tensors, _, ctx.padded, ctx.link, ctx.bias, ctx.sharpness, ctx.retention = inputs
    del tensors[6]  # the state: it is what was saved first
    ctx.save_for_backward(output[1], *output[3:], *tensors)


def _differentiate(ctx, grads):
    saved = ctx.saved_tensors
    found = iter(_backward(*grads[:3], *saved, ctx.padded, ctx.link, ctx.bias, ctx.sharpness, ctx.retention))
    given = [*saved[5:12], *saved[11:15]]
    return *(None if x is None else next(found) for x in given), *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_keep)


def matrix_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    state: Tensor,
    anchor: Tensor,
    phase: Tensor,
    settings: Settings,
    *,
    delta: Tensor | None = None,
    start: Tensor | None = None,
    radius: Tensor | None = None,
    kept: Tensor | None = None,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and states of a matrix memory.

    Args:
        q, k: [B, T, H, K], v: [B, T, H, V], of one dtype, fp32 or fp64.
        eta, log_alpha: [B, T, H, 1 or K]; log_alpha <= 0, any size.
        state: the matrix before the first token, [B, H, V, K].
        anchor: the one at the start of the open chunk, likewise (read only where phase > 0).
        phase: int64 [B], tokens already in the open chunk.
        settings: chunk size, bias, link, and retention: of link "identity" by how much a full chunk ends with entries nearer to zero
            (those below it at zero), of "scaled" q.
        delta: threshold of the bias "huber" or "huber_norm", [B, T, H, 1 or V].
        start: the matrix at the start of a document, [H, V, K]; needed with `reset`.
        radius: of link "scaled", [H]: in a chunk the weights are the matrix times min(1, radius / |matrix|_q)^(q - 2), the norm with
            1e-8 added and taken at the chunk's start; a negative radius: (|radius| / |matrix|_q)^(q - 2).
        kept: of link "simplex", [B, H, 1]: the log of the decay in the open chunk before the call. In a chunk the weights are
            K softmax(rows) - 1 of the matrix at its start, and reads frame what it has gained since; log_alpha: one number per token.
        reset, valid: bool [B, T]: first token of a document; False where the token is padding.
    Returns:
        y [B, T, H, V], 0 at padding; the matrix after the last token; that at the start of its chunk; the new phase.
    """
    pieces = cut(phase, q.shape[1], settings.chunk_size, reset, valid)
    open_kept = None if kept is None else kept.expand(*kept.shape[:2], q.shape[-1])
    inputs = (q, k, v, eta, log_alpha, delta, state, anchor, start, radius, open_kept)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, last_anchor, *_ = _forward(
        *inputs,
        *(pieces.order, pieces.entries, pieces.ends, max(pieces.n_slots, 1) if learning else 0, valid is not None),
        *(LINKS[settings.link], BIASES[settings.bias], settings.sharpness, settings.retention),
    )
    return y, last, last_anchor, pieces.phase
