"""Decayed and delta-rule recurrences on a matrix state, token by token with the state in registers: forward and backward in Triton.

    r_t = S_{t-1} a_t,  S_t = S_{t-1} D_t + (strength_t r_t) b_t^T + v_t k_t^T,  y_t = S_t q_t

Faster equal of the token loops in `recollect.ops.linear_scan` and `recollect.ops.delta_scan` (their oracles). One program holds some
rows of one head's state. Memory is linear in T, and the backward pass stores no state: with G_t the gradient of S_t it runs G
backwards (gradients of v, k, b and of what was read), then S forwards again (gradients of q and a). The gradient of a log decay needs
both at one token; with c_t = the sum over rows of G_t S_t,

    d log D_t = c_t - b_t db_t - k_t dk_t,     c_{t-1} = d log D_t + a_t da_t + q_{t-1} dq_{t-1},

so it is a cumulative sum of what the two passes leave. Its terms nearly cancel, and their roundings add up. So every `SPAN` tokens it
starts anew: the first pass keeps G there, the second makes c of it. NOT YET MEASURED ON A GPU: checked by Triton's interpreter, and
compiled for NVIDIA GPUs in the tests.

Axis legend: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of the state in one program
SPAN = 16  # tokens of a cumulative sum
NO_DECAY, PER_HEAD, PER_KEY, PER_VALUE = range(4)


@triton.jit
def _rows(x, token, row, V: tl.constexpr, WIDE: tl.constexpr):
    """Entries of a vector over rows at a token; one number a token unless WIDE."""
    if WIDE:
        entries = tl.load(x + token * V + row, mask=row < V, other=0.0)
    else:
        entries = tl.load(x + token)
    return entries


@triton.jit
def _columns(x, token, key, K: tl.constexpr):
    """[1, K] of a vector over keys at a token."""
    return tl.load(x + token * K + key, mask=key < K, other=0.0)[None, :]


@triton.jit
def _decayed(state, decay, token, row, key, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr):
    """The state [rows, K] times a token's decay."""
    if DECAY == 1:
        state = state * tl.load(decay + token)
    elif DECAY == 2:
        state = state * _columns(decay, token, key, K)
    elif DECAY == 3:
        state = state * _rows(decay, token, row, V, True)[:, None]
    return state


@triton.jit
def _written(
    state, added, k, v, b, decay, token, row, key, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr
):
    """The state after a token whose delta rule adds `added` along b."""
    state = _decayed(state, decay, token, row, key, K, V, DECAY)
    if DELTA:
        state += added[:, None] * _columns(b, token, key, K)
    return state + _rows(v, token, row, V, True)[:, None] * _columns(k, token, key, K)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    a,
    b,
    decay,
    strength,
    reset,
    state,
    y,
    read,
    last,
    n_tokens,
    n_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    N: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row, key = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, KW)
    inside = (row < V)[:, None] & (key < K)[None, :]
    place = head * V * K + row[:, None] * K + key[None, :]
    s = tl.load(state + place, mask=inside, other=0.0)
    for t in range(n_tokens):
        token = (head // n_heads * n_tokens + t) * n_heads + head % n_heads
        if HAS_RESET:
            s = tl.where(tl.load(reset + head // n_heads * n_tokens + t) != 0, 0.0, s)
        added = 0.0
        if DELTA:
            seen = tl.sum(s * _columns(a, token, key, K), axis=1)
            tl.store(read + token * V + row, seen, mask=row < V)
            added = seen * _rows(strength, token, row, V, WIDE)
        s = _written(s, added, k, v, b, decay, token, row, key, K, V, DECAY, DELTA)
        out = tl.sum(s * _columns(q, token, key, K), axis=1)
        tl.store(y + token * V + row, out, mask=row < V)
    tl.store(last + place, s, mask=inside)


@triton.jit
def _reverse_kernel(
    grad_y,
    q,
    k,
    v,
    a,
    b,
    decay,
    strength,
    reset,
    read,
    grad_last,
    grad_v,
    grad_k,
    grad_b,
    grad_added,
    grad_state,
    held,
    n_tokens,
    n_heads,
    n_entries,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    N: tl.constexpr,
    EVERY: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """The state's gradient from the last token to the first; sums over rows are partial, one slice a program. held [B, H, N, V, K]:
    that of the state after the last token of each span but for what the token itself reads."""
    head = tl.program_id(0).to(tl.int64)
    row, key = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, KW)
    inside = (row < V)[:, None] & (key < K)[None, :]
    place = head * V * K + row[:, None] * K + key[None, :]
    slice_ = tl.program_id(1).to(tl.int64) * n_entries
    g = tl.load(grad_last + place, mask=inside, other=0.0)
    for back in range(n_tokens):
        t = n_tokens - 1 - back
        token = (head // n_heads * n_tokens + t) * n_heads + head % n_heads
        if DECAY != 0 and (t % EVERY == EVERY - 1) | (back == 0):
            span = (head * tl.cdiv(n_tokens, EVERY) + t // EVERY) * (V * K)
            tl.store(held + span + row[:, None] * K + key[None, :], g, mask=inside)
        out = _rows(grad_y, token, row, V, True)
        g += out[:, None] * _columns(q, token, key, K)
        written = _rows(v, token, row, V, True)
        to_v = tl.sum(g * _columns(k, token, key, K), axis=1)
        tl.store(grad_v + token * V + row, to_v, mask=row < V)
        tl.store(grad_k + slice_ + token * K + key, tl.sum(g * written[:, None], axis=0), mask=key < K)
        if DELTA:
            power = _rows(strength, token, row, V, WIDE)
            added = power * _rows(read, token, row, V, True)
            to_added = tl.sum(g * _columns(b, token, key, K), axis=1)
            tl.store(grad_added + token * V + row, to_added, mask=row < V)
            tl.store(grad_b + slice_ + token * K + key, tl.sum(g * added[:, None], axis=0), mask=key < K)
        g = _decayed(g, decay, token, row, key, K, V, DECAY)
        if DELTA:
            g += (power * to_added)[:, None] * _columns(a, token, key, K)
        if HAS_RESET:
            g = tl.where(tl.load(reset + head // n_heads * n_tokens + t) != 0, 0.0, g)
    tl.store(grad_state + place, g, mask=inside)


@triton.jit
def _again_kernel(
    grad_y,
    k,
    v,
    b,
    decay,
    strength,
    reset,
    read,
    grad_added,
    state,
    grad_q,
    grad_a,
    held,
    ends,
    n_tokens,
    n_heads,
    n_entries,
    K: tl.constexpr,
    V: tl.constexpr,
    KW: tl.constexpr,
    N: tl.constexpr,
    EVERY: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """The states once more, for the gradients of what reads them, q and a, and their products with what is held, `ends`: summed over
    keys [B, H, N, V] for decays per value, else over rows, one slice a program [B, H, N, K]."""
    head = tl.program_id(0).to(tl.int64)
    row, key = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, KW)
    inside = (row < V)[:, None] & (key < K)[None, :]
    slice_ = tl.program_id(1).to(tl.int64) * n_entries
    s = tl.load(state + head * V * K + row[:, None] * K + key[None, :], mask=inside, other=0.0)
    for t in range(n_tokens):
        token = (head // n_heads * n_tokens + t) * n_heads + head % n_heads
        if HAS_RESET:
            s = tl.where(tl.load(reset + head // n_heads * n_tokens + t) != 0, 0.0, s)
        added = 0.0
        if DELTA:
            power = _rows(strength, token, row, V, WIDE)
            to_read = power * _rows(grad_added, token, row, V, True)
            tl.store(grad_a + slice_ + token * K + key, tl.sum(s * to_read[:, None], axis=0), mask=key < K)
            added = power * _rows(read, token, row, V, True)
        s = _written(s, added, k, v, b, decay, token, row, key, K, V, DECAY, DELTA)
        out = _rows(grad_y, token, row, V, True)
        tl.store(grad_q + slice_ + token * K + key, tl.sum(s * out[:, None], axis=0), mask=key < K)
        if DECAY != 0 and (t % EVERY == EVERY - 1) | (t == n_tokens - 1):
            n_spans = tl.cdiv(n_tokens, EVERY)
            span = head * n_spans + t // EVERY
            kept = tl.load(held + span * (V * K) + row[:, None] * K + key[None, :], mask=inside, other=0.0)
            if DECAY == 3:
                tl.store(ends + span * V + row, tl.sum(s * kept, axis=1), mask=row < V)
            else:
                part = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) * n_spans + span) * K
                tl.store(ends + part + key, tl.sum(s * kept, axis=0), mask=key < K)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    strength: Tensor | None,
    reset: Tensor | None,
    on_values: bool,
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """[q, k, v, a, b] and [decay, strength, reset] as the kernels read them, with q in the place of what is missing, and what the
    kernels are compiled for."""
    if log_decay is None:
        decay = NO_DECAY
    elif log_decay.dim() == 3:
        decay = PER_HEAD
    else:
        decay = PER_VALUE if on_values else PER_KEY
    options = {
        "K": q.shape[-1],
        "V": v.shape[-1],
        "KW": triton.next_power_of_2(q.shape[-1]),
        "N": ROWS,
        "DECAY": decay,
        "DELTA": a is not None,
        "WIDE": strength is not None and strength.shape[-1] > 1,
        "HAS_RESET": reset is not None,
    }
    gates = (None if log_decay is None else log_decay.exp(), strength, None if reset is None else reset.to(torch.int8))
    tokens, made = ([(q if x is None else x).contiguous() for x in some] for some in ((q, k, v, a, b), gates))
    return tokens, made, options


@torch.library.custom_op("recollect::recurrence", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    strength: Tensor | None,
    reset: Tensor | None,
    state: Tensor,
    on_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, gates, options = _arguments(q, k, v, a, b, log_decay, strength, reset, on_values)
    batch, n_tokens, n_heads, _ = q.shape
    state, y = state.contiguous(), v.new_empty(v.shape)
    read, last = v.new_empty(v.shape if a is not None else 0), torch.empty_like(state)
    grid = (batch * n_heads, triton.cdiv(v.shape[-1], ROWS))
    _forward_kernel[grid](*tokens, *gates, state, y, read, last, n_tokens, n_heads, **options)
    return y, read, last


@_forward.register_fake
def _(q, k, v, a, b, log_decay, strength, reset, state, on_values):
    read = v.new_empty(0) if a is None else v.new_empty(v.shape)
    return v.new_empty(v.shape), read, state.new_empty(state.shape)


@torch.library.custom_op("recollect::recurrence_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    y: Tensor,
    read: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    strength: Tensor | None,
    reset: Tensor | None,
    state: Tensor,
    on_values: bool,
) -> list[Tensor]:
    tokens, gates, options = _arguments(q, k, v, a, b, log_decay, strength, reset, on_values)
    grad_y, grad_last, state = (x.contiguous() for x in (grad_y, grad_last, state))
    batch, n_tokens, n_heads, _ = q.shape
    n_slices = triton.cdiv(v.shape[-1], ROWS)
    grid, sizes = (batch * n_heads, n_slices), (n_tokens, n_heads, q.numel())
    grad_v, grad_added, grad_state = v.new_empty(v.shape), v.new_empty(v.shape), torch.empty_like(state)
    options["EVERY"], spans = SPAN, (batch, n_heads, triton.cdiv(n_tokens, SPAN) if log_decay is not None else 0)
    held, ends = (
        v.new_empty(*spans, *state.shape[2:]),
        v.new_empty(1 if on_values else n_slices, *spans, state.shape[3 - on_values]),
    )
    to_q, to_k, to_a, to_b = (q.new_empty(n_slices, *q.shape) for _ in range(4))
    _reverse_kernel[grid](
        *(grad_y, *tokens, *gates, read, grad_last, grad_v, to_k, to_b, grad_added, grad_state, held, *sizes), **options
    )
    _, whole_k, whole_v, _, whole_b = tokens
    _again_kernel[grid](
        *(grad_y, whole_k, whole_v, whole_b, *gates, read, grad_added, state, to_q, to_a, held, ends, *sizes), **options
    )
    grad_q, grad_k = to_q.sum(0), to_k.sum(0)
    found = [grad_q, grad_k, grad_v]
    grad_a = grad_b = grad_q.new_zeros(())
    if a is not None and b is not None:
        grad_a, grad_b = to_a.sum(0), to_b.sum(0)
        found += [grad_a, grad_b]
    if log_decay is not None:
        if on_values:
            power = 1.0 if strength is None else strength
            reads = [(y, grad_y), (v, -grad_v)] + ([] if a is None else [(read, -power * grad_added)])
            before = 0.0 if a is None else read * power * grad_added
        else:
            reads = [(q, grad_q), (k, -grad_k)] + ([] if b is None else [(b, -grad_b)])
            before = 0.0 if a is None else a * grad_a
        found.append(_decay_gradient(reads, before, ends.sum(0).transpose(1, 2), log_decay, reset))
    if strength is not None:
        part = grad_added * read
        found.append(part if strength.shape[-1] > 1 else part.sum(-1, keepdim=True))
    return [*found, grad_state]


def _decay_gradient(
    reads: list[tuple[Tensor, Tensor]], before: Tensor | float, ends: Tensor, log_decay: Tensor, reset: Tensor | None
) -> Tensor:
    """The gradient of the log decays, as in this file's head: sums over the tokens from each one to its span's end.

    Args:
        reads: (vector, its gradient) pairs [B, T, H, channels], negative where the state is written; before: the same for what reads
            the state before the token. ends: [B, N, H, channels], the state at each span's end times its gradient.
    """
    steps = sum(x.double() * grad for x, grad in reads)  # nearly cancel: what is left is small beside them
    assert isinstance(steps, Tensor)
    n_tokens, missing = steps.shape[1], -steps.shape[1] % SPAN
    spans = F.pad(steps + before, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, SPAN))
    total = (spans.flip(2).cumsum(2).flip(2) + ends[:, :, None]).flatten(1, 2)[:, :n_tokens] - before
    total = (total.sum(-1) if log_decay.dim() == 3 else total).to(log_decay.dtype)
    return total if reset is None else total.masked_fill(reset.view(*reset.shape, *[1] * (total.dim() - 2)), 0.0)


@_backward.register_fake
def _(grad_y, grad_last, y, read, q, k, v, a, b, log_decay, strength, reset, state, on_values):
    return [x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay, strength, state) if x is not None]


def _keep(ctx, inputs, output):
    *tensors, ctx.on_values = inputs
    ctx.save_for_backward(*output[:2], *tensors)


def _differentiate(ctx, grad_y, _, grad_last):
    saved = ctx.saved_tensors
    grads = iter(_backward(grad_y, grad_last, *saved, ctx.on_values))
    tokens = saved[2:-2]
    return *(None if x is None else next(grads) for x in tokens), None, next(grads), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    strength: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    on_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of this file's head.

    Args:
        q, k, a, b: [B, T, H, K]; v: [B, T, H, V]; all fp32, or all fp64. a and b: None without a delta rule.
        log_decay: [B, T, H], or [B, T, H, K] or, with on_values, [B, T, H, V]; None: no decay.
        strength: [B, T, H, 1 or V]; None without a delta rule.
        state: [B, H, V, K]; reset: bool [B, T] or None.
    Returns:
        y [B, T, H, V] and the last state.
    """
    y, _, last = _forward(q, k, v, a, b, log_decay, strength, reset, state, on_values)
    return y, last
