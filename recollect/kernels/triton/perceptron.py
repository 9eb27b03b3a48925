"""The Miras recurrence of a two-layer perceptron memory on a GPU: gradient descent, with momentum too, forward and backward.

    y_t = q_t + LayerNorm(W_out,t gelu(W_in,t q_t)),    W_t = diag(alpha_t) W_{t-1} - eta_t * gradient at the chunk's first matrices

Equal of `recollect.kernels.memory` and of `backend="chunked"`, its oracle, in fp32 and fp64. One program has one head of one batch
element and walks its tokens in pieces of 16, so that everything is products of matrices (`perceptron_walk`); what needs no matrix of
the memory is done for all pieces at once, before and after the walk (`perceptron_tokens`). Sums over programs are taken by PyTorch from
a place for each: equal inputs give equal bits. NOT YET MEASURED ON A GPU: checked by Triton's interpreter, and compiled for NVIDIA GPUs
in the tests.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces, S saved states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from recollect.kernels.memory import LINKS, Perceptron, Settings
from recollect.kernels.triton import BIASES, numbers
from recollect.kernels.triton.perceptron_mixture import finish_mixed, finish_mixed_back, prepare_mixed, prepare_mixed_back
from recollect.kernels.triton.perceptron_tokens import finish, finish_back, prepare, prepare_back
from recollect.kernels.triton.perceptron_walk import walk
from recollect.kernels.triton.perceptron_walk_back import walk_back
from recollect.kernels.triton.pieces import SEGMENT, TOKENS, cut
from recollect.kernels.triton.stencil import accumulator

HIDDEN_UNITS, WARPS = 32, 8  # of a walk: hidden units at a time


def _options(
    q: Tensor,
    hidden: int,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    n_matrices: int,
    link: int,
    bias: int,
    sharpness: float,
    retention: float,
) -> tuple[dict[str, Any], ...]:
    """What kernels are compiled for: all; those with gates, of W_out or both matrices; with bias and link; those that walk."""
    every = {
        "KEY": q.shape[-1],
        "KW": triton.next_power_of_2(q.shape[-1]),
        "PRECISION": accumulator(q.dtype)[1],
        "num_stages": 1,  # what a loop reads the one before has written: nothing is to be loaded ahead
    }
    wide_alpha = log_alpha.shape[-1] > 1
    gates = {"ETA_WIDE": eta.shape[-1] > 1, "ALPHA_WIDE": wide_alpha}
    inner = {**gates, "IN_WIDE": wide_alpha and link != LINKS["simplex"], "LINK": link}
    wide = delta is not None and delta.shape[-1] > 1
    kinds = {"LINK": link, "BIAS": bias, "SHARPNESS": sharpness, "DELTA_WIDE": wide, "HAS_DELTA": delta is not None}
    units = HIDDEN_UNITS if hidden % HIDDEN_UNITS == 0 else TOKENS
    return (
        every,
        gates,
        inner,
        kinds,
        {**numbers(link, retention), "MOMENTUM": n_matrices == 4, "HIDDEN": hidden, "BO": units, "num_warps": WARPS},
    )


@torch.library.custom_op("recollect::perceptron_scan", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    log_momentum: Tensor | None,
    delta: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    radius: Tensor | None,
    log_alpha_in: Tensor | None,
    open_kept: Tensor | None,
    state: Tensor,
    anchor: Tensor,
    start: Tensor | None,
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
    batch, length, n_heads, _ = q.shape
    n_matrices, hidden = state.shape[2:4]
    tokens = [
        (q if x is None else x).contiguous()
        for x in (q, k, v, eta, log_alpha, log_momentum, delta, scale, shift, radius, open_kept)
    ]
    query, keys, values, steps, decays, slowing, thresholds, *norm, radii, open_logs = tokens
    table, sizes = (order, entries, ends), (length, n_heads, entries.shape[1])
    states = state.new_empty(batch, n_heads, 3, *state.shape[2:])
    for n, part in enumerate((state, anchor, start)):
        if part is not None:
            states[:, :, n] = part
    room = q.new_empty(batch, n_heads, TOKENS, hidden)
    y = torch.zeros_like(query) if padded else torch.empty_like(query)
    last, last_anchor = (state.new_empty(state.shape) for _ in range(2))
    saved = state.new_empty(batch, n_heads, n_slots, *state.shape[2:])
    simplex = int(open_kept is not None)
    kept, means = (
        q.new_empty(simplex * batch, n_heads, entries.shape[1], 2, q.shape[-1]),
        q.new_empty(simplex * batch, n_heads, length),
    )
    linked = state.new_empty(simplex * batch, n_heads, 2, *state.shape[2:])
    read, written = torch.empty_like(y), torch.empty_like(y) if n_slots else y.new_empty(0)
    decayed, in_end, rest, gu = q.new_empty(4, batch, n_heads, length, q.shape[-1])
    scores = q.new_empty(batch, n_heads, length, TOKENS)
    factors = q.new_empty(batch, n_heads, entries.shape[1] if radius is not None else 0, 4)
    total = q.new_empty(batch, n_heads, sizes[-1], 2, q.shape[-1])
    mix, late = q.new_empty(batch, n_heads, length, 4), q.new_empty(batch, n_heads, sizes[-1], 2)
    every, gates, inner, kinds, walks = _options(q, hidden, eta, log_alpha, delta, n_matrices, link, bias, sharpness, retention)
    heads, grid = (batch * n_heads,), (batch * n_heads * sizes[-1],)
    decays_in = decays if log_alpha_in is None else log_alpha_in.contiguous()
    before, gated = (query, keys, steps, decays), (decayed, in_end, rest, scores, total)
    if log_momentum is None:
        prepare[grid](*table, *before, decays_in, *gated, *sizes, **every, **inner)
    else:
        prepare_mixed[grid](*table, *before, slowing, *gated, mix, late, *sizes, **every)
    walk[heads](
        *(*table, query, keys, values, thresholds, *norm, radii, decayed, in_end, rest, gu, scores, total, mix, late),
        *(states, room, last, last_anchor, saved, written, read, factors, open_logs, kept, means, linked, *sizes, n_slots),
        **{**every, **kinds, **walks},
        LEARN=n_slots > 0,
    )
    if log_momentum is None:
        finish[grid](*table, query, steps, decays, *norm, gu, scores, factors, read, y, *sizes, **every, **gates, LINK=link)
    else:
        finish_mixed[grid](*table, query, steps, decays, slowing, *norm, gu, scores, read, y, *sizes, **every)
    return [y, last, last_anchor, saved, written, read, scores, factors, kept, means]


@_forward.register_fake
def _(q, k, v, eta, log_alpha, log_momentum, delta, scale, shift, radius, log_alpha_in, open_kept, state, *others):
    _, _, _, entries, _, n_slots, *_ = others
    (batch, length, n_heads, width), n_rows = q.shape, entries.shape[1]
    scaled, simplex = radius is not None, batch if open_kept is not None else 0
    last, last_anchor = (state.new_empty(state.shape) for _ in range(2))
    saved, scores = state.new_empty(batch, n_heads, n_slots, *state.shape[2:]), q.new_empty(batch, n_heads, length, TOKENS)
    written, factors = q.new_empty(q.shape if n_slots else 0), q.new_empty(batch, n_heads, n_rows if scaled else 0, 4)
    kept, means = q.new_empty(simplex, n_heads, n_rows, 2, width), q.new_empty(simplex, n_heads, length)
    return [q.new_empty(q.shape), last, last_anchor, saved, written, q.new_empty(q.shape), scores, factors, kept, means]


@torch.library.custom_op("recollect::perceptron_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    grad_anchor: Tensor,
    last: Tensor,
    saved: Tensor,
    written: Tensor,
    read: Tensor,
    scores_out: Tensor,
    factors: Tensor,
    kept: Tensor,
    means: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    log_momentum: Tensor | None,
    delta: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    radius: Tensor | None,
    log_alpha_in: Tensor | None,
    open_kept: Tensor | None,
    anchor: Tensor,
    start: Tensor | None,
    order: Tensor,
    entries: Tensor,
    ends: Tensor,
    padded: bool,
    link: int,
    bias: int,
    sharpness: float,
    retention: float,
) -> list[Tensor]:
    batch, length, n_heads, _ = q.shape
    n_matrices, hidden = anchor.shape[2:4]
    tokens = [
        (q if x is None else x).contiguous()
        for x in (q, k, v, eta, log_alpha, log_momentum, delta, scale, shift, radius, open_kept)
    ]
    query, keys, values, steps, decays, slowing, thresholds, *norm, radii, _ = tokens
    grad_y = grad_y.contiguous()
    table, sizes = (order, entries, ends), (length, n_heads, entries.shape[1])
    states = anchor.new_empty(batch, n_heads, SEGMENT + 1, *anchor.shape[2:])
    room = q.new_empty(batch, n_heads, SEGMENT, 4, TOKENS, hidden)
    empty = torch.zeros_like if padded else torch.empty_like
    d_q, d_k, d_v, d_eta, d_log_alpha, d_log_momentum, d_delta = (empty(x) for x in tokens[:7])
    of_pieces = q.new_zeros(2, batch, n_heads, sizes[-1], q.shape[-1])
    d_factors, d_radius = q.new_empty(batch, n_heads, sizes[-1]), q.new_empty(batch, n_heads, 2)
    of_heads = q.new_empty(2, batch, n_heads, q.shape[-1])
    d_start = anchor.new_zeros(anchor.shape if start is not None else 0)
    full = (ends[:, 1] != 0).view(-1, 1, 1, 1, 1)
    d_state = (grad_last + grad_anchor.masked_fill(~full, 0)).contiguous()
    every, gates, inner, kinds, walks = _options(q, hidden, eta, log_alpha, delta, n_matrices, link, bias, sharpness, retention)
    if walks["THRESHOLD"] > 0:  # not of the last change, if there is one
        d_state[:, :, :2] = d_state[:, :, :2].masked_fill(full & (last[:, :, :2] == 0), 0)
    d_anchor = grad_anchor.masked_fill(full, 0).contiguous()
    simplex = open_kept is not None
    d_weights = d_anchor
    if link != LINKS["identity"]:
        d_weights = anchor.new_zeros(batch, n_heads, 1 + simplex, *anchor.shape[2:])
    linked = anchor.new_empty(batch * simplex, n_heads, SEGMENT + 2, *anchor.shape[2:])
    d_kept, d_decays_in = q.new_empty(batch, n_heads, 2, q.shape[-1]), empty(q[..., :1].contiguous())

    late_ends = q.new_empty(3 if n_matrices == 4 else 0, batch, n_heads, length, q.shape[-1])
    decayed, in_end, rest, gu, d_seen, moved, of_out = q.new_empty(7, batch, n_heads, length, q.shape[-1])
    scores, d_scores = q.new_empty(2, batch, n_heads, length, TOKENS)
    total = q.new_empty(batch, n_heads, sizes[-1], 2, q.shape[-1])
    mix, late = q.new_empty(batch, n_heads, length, 4), q.new_empty(batch, n_heads, sizes[-1], 2)
    d_mix, d_late = torch.empty_like(mix), torch.empty_like(late)
    heads, grid = (batch * n_heads,), (batch * n_heads * sizes[-1],)
    decays_in = decays if log_alpha_in is None else log_alpha_in.contiguous()
    before, gated = (query, keys, steps, decays), (decayed, in_end, rest, scores, total)
    written_with, reads = (thresholds, *norm, written, read, scores_out), (gu, d_seen, moved, of_out, d_scores, *of_pieces)
    if log_momentum is None:
        prepare[grid](*table, *before, decays_in, *gated, *sizes, **every, **inner)
        prepare_back[grid](
            *(*table, keys, values, steps, decays, *written_with, factors, grad_y, *reads, d_factors, *sizes),
            **{**every, **gates, **kinds},
        )
    else:
        prepare_mixed[grid](*table, *before, slowing, *gated, mix, late, *sizes, **every)
        own = {name: value for name, value in kinds.items() if name != "LINK"}
        prepare_mixed_back[grid](
            *(*table, keys, values, steps, decays, slowing, *written_with, grad_y, *reads, *sizes), **{**every, **own}
        )
    first = anchor if start is None else start
    walk_back[heads](
        *(
            *table,
            query,
            keys,
            values,
            steps,
            thresholds,
            *norm,
            radii,
            factors,
            first.contiguous(),
            anchor.contiguous(),
            saved,
        ),
        *(written, decayed, in_end, rest, gu, moved, of_out, scores, d_scores, total),
        *(mix, late, d_seen, *(late_ends if n_matrices == 4 else (q, q, q)), d_mix, d_late, states, room),
        *(d_k, d_v, d_delta, *of_heads, d_radius, d_factors, d_start, d_state, d_anchor, d_weights),
        *(kept, means, linked, d_kept, *sizes, saved.shape[2]),
        **{**every, **kinds, **walks},
        ETA_WIDE=gates["ETA_WIDE"],
        HAS_START=start is not None,
    )
    if log_momentum is None:
        finish_back[grid](
            *(*table, *before, decays_in, read, grad_y, gu, d_seen, of_out, in_end, rest, decayed, d_scores, total),
            *(d_mix, d_q, d_k, d_eta, d_log_alpha, d_decays_in, *sizes),
            **every,
            **inner,
        )
    else:
        finish_mixed_back[grid](
            *(*table, *before, slowing, scores_out, grad_y, gu, d_seen, in_end, rest, decayed, *late_ends, d_scores, total),
            *(d_mix, d_late, d_q, d_k, d_eta, d_log_alpha, d_log_momentum, *sizes),
            **every,
        )
    d_scale, d_shift = (
        per_piece.sum((0, 2)) + per_head.sum(0) for per_piece, per_head in zip(of_pieces, of_heads, strict=True)
    )
    optional = ((log_momentum, d_log_momentum), (delta, d_delta))
    found = [d_q, d_k, d_v, d_eta, d_log_alpha, *(x for given, x in optional if given is not None)]
    found += [
        d_scale,
        d_shift,
        *([] if radius is None else [d_radius.sum(0)]),
        *([d_decays_in, d_kept] if simplex else []),
        d_state,
        d_anchor,
    ]
    return found if start is None else [*found, d_start.sum(0)]


@_backward.register_fake
def _(grad_y, grad_last, grad_anchor, last, saved, written, read, scores_out, factors, kept, means, *given):
    *inputs, anchor, start, _, _, _, _, _, _, _, _ = given
    return [x.new_empty(x.shape) for x in (*inputs, anchor, anchor, start) if x is not None]


def _keep(ctx, inputs, output):
    *tensors, _, ctx.padded, ctx.link, ctx.bias, ctx.sharpness, ctx.retention = inputs
    del tensors[12]  # the state: it is what was saved first
    ctx.save_for_backward(output[1], *output[3:], *tensors)


def _differentiate(ctx, grads):
    grad_y, grad_last, grad_anchor, *_ = grads
    saved = ctx.saved_tensors
    settings = (ctx.padded, ctx.link, ctx.bias, ctx.sharpness, ctx.retention)
    found = iter(_backward(grad_y, grad_last, grad_anchor, *saved, *settings))
    given = [*saved[8:20], saved[20], *saved[20:22]]
    return *(None if x is None else next(found) for x in given), *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_keep)


def perceptron_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    state: Perceptron,
    anchor: Perceptron,
    slow: tuple[Tensor, Tensor],
    phase: Tensor,
    settings: Settings,
    *,
    delta: Tensor | None = None,
    log_momentum: Tensor | None = None,
    momentum: Perceptron | None = None,
    radius: Tensor | None = None,
    rows: tuple[Tensor, Tensor, Tensor] | None = None,
    start: Perceptron | None = None,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Perceptron, Perceptron, Perceptron | None, Tensor]:
    """As `recollect.kernels.memory.perceptron_scan`."""
    pieces = cut(phase, q.shape[1], settings.chunk_size, reset, valid)
    shared = [x.expand(*q.shape[:3], x.shape[-1]) for x in (eta, log_alpha)]
    packed = [None if x is None else torch.stack((x.first, x.last.mT), dim=-3) for x in (state, anchor, start)]
    if momentum is not None:
        changes = (
            torch.stack((momentum.first, momentum.last.mT), dim=-3),
            *(None if x is None else torch.zeros_like(x) for x in packed[1:]),
        )
        packed = [
            None if x is None or change is None else torch.cat((x, change), dim=-3)
            for x, change in zip(packed, changes, strict=True)
        ]
    log_alpha_in, kept = None, None
    if rows is not None:
        log_alpha_in = rows[0].expand(*q.shape[:3], 1)
        kept = torch.stack([x.expand(*x.shape[:2], q.shape[-1]) for x in rows[1:]], dim=2)
    inputs = (q, k, v, *shared, log_momentum, delta, *slow, radius, log_alpha_in, kept, *packed)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, last_anchor, *_ = _forward(
        *inputs,
        *(pieces.order, pieces.entries, pieces.ends, max(pieces.n_slots, 1) if learning else 0, valid is not None),
        *(LINKS[settings.link], BIASES[settings.bias], settings.sharpness, settings.retention),
    )
    now, then = (Perceptron(x[:, :, 0], x[:, :, 1].mT) for x in (last, last_anchor))
    change = None if momentum is None else Perceptron(last[:, :, 2], last[:, :, 3].mT)
    return y, now, then, change, pieces.phase
