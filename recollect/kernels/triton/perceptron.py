"""The Miras recurrence of a two-layer perceptron memory on a GPU: gradient descent, forward and backward.

    y_t = q_t + LayerNorm(W_out,t gelu(W_in,t q_t)),    W_t = diag(alpha_t) W_{t-1} - eta_t * gradient at the chunk's first matrices

Equal of `recollect.kernels.memory` and of `backend="chunked"`, its oracle, in fp32 and fp64. One program holds one head of one batch
element and walks its tokens in pieces of 16, so that everything is products of matrices; see `perceptron_forward` and
`perceptron_backward`. Sums over programs are taken by PyTorch from a place for each: equal inputs give equal bits. NOT YET MEASURED
ON A GPU: checked by Triton's interpreter, and compiled for NVIDIA GPUs in the tests.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces, S saved states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from recollect.kernels.memory import BIASES, Perceptron, Settings
from recollect.kernels.triton.perceptron_backward import backward_kernel
from recollect.kernels.triton.perceptron_forward import forward_kernel
from recollect.kernels.triton.pieces import SEGMENT, TOKENS, cut
from recollect.kernels.triton.stencil import accumulator

HIDDEN_UNITS = 32  # that a program takes at a time


def _options(
    q: Tensor, hidden: int, eta: Tensor, log_alpha: Tensor, delta: Tensor | None, bias: int, sharpness: float
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "KEY": q.shape[-1],
        "KW": triton.next_power_of_2(q.shape[-1]),
        "HIDDEN": hidden,
        "BO": HIDDEN_UNITS if hidden % HIDDEN_UNITS == 0 else TOKENS,
        "BIAS": bias,
        "SHARPNESS": sharpness,
        "ETA_WIDE": eta.shape[-1] > 1,
        "ALPHA_WIDE": log_alpha.shape[-1] > 1,
        "DELTA_WIDE": delta is not None and delta.shape[-1] > 1,
        "HAS_DELTA": delta is not None,
        "PRECISION": accumulator(q.dtype)[1],
        "num_stages": 1,  # the matrices change between loops: nothing is to be loaded ahead
    }


@torch.library.custom_op("recollect::perceptron_scan", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    state: Tensor,
    anchor: Tensor,
    start: Tensor | None,
    order: Tensor,
    entries: Tensor,
    ends: Tensor,
    n_slots: int,
    padded: bool,
    bias: int,
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, n_heads, _ = q.shape
    hidden = state.shape[-2]
    tokens = [(q if x is None else x).contiguous() for x in (q, k, v, eta, log_alpha, delta, scale, shift)]
    states = state.new_empty(batch, n_heads, 3, *state.shape[2:])
    for n, part in enumerate((state, anchor, start)):
        if part is not None:
            states[:, :, n] = part
    room = q.new_empty(batch, n_heads, TOKENS, hidden)
    y = torch.zeros_like(tokens[0]) if padded else torch.empty_like(tokens[0])
    last = state.new_empty(batch, n_heads, 2, *state.shape[2:])
    saved = state.new_empty(batch, n_heads, n_slots, *state.shape[2:])
    written, read = (torch.empty_like(y) if n_slots else y.new_empty(0) for _ in range(2))
    forward_kernel[(batch * n_heads,)](
        *(
            order,
            entries,
            ends,
            *tokens,
            states,
            room,
            y,
            last,
            saved,
            written,
            read,
            length,
            n_heads,
            entries.shape[1],
            n_slots,
        ),
        **_options(q, hidden, eta, log_alpha, delta, bias, sharpness),
        LEARN=n_slots > 0,
    )
    return y, last, saved, written, read


@_forward.register_fake
def _(
    q, k, v, eta, log_alpha, delta, scale, shift, state, anchor, start, order, entries, ends, n_slots, padded, bias, sharpness
):
    y, heads = q.new_empty(q.shape), state.shape[:2]
    last, saved = (state.new_empty(*heads, n, *state.shape[2:]) for n in (2, n_slots))
    return y, last, saved, *(q.new_empty(q.shape if n_slots else 0) for _ in range(2))


@torch.library.custom_op("recollect::perceptron_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    saved: Tensor,
    written: Tensor,
    read: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    anchor: Tensor,
    start: Tensor | None,
    order: Tensor,
    entries: Tensor,
    ends: Tensor,
    padded: bool,
    bias: int,
    sharpness: float,
) -> list[Tensor]:
    batch, length, n_heads, _ = q.shape
    hidden = anchor.shape[-2]
    tokens = [(q if x is None else x).contiguous() for x in (q, k, v, eta, log_alpha, delta, scale, shift)]
    whole = [anchor.contiguous() if start is None else start.contiguous(), anchor.contiguous()]
    states = anchor.new_empty(batch, n_heads, SEGMENT + 1, *anchor.shape[2:])
    room = q.new_empty(batch, n_heads, SEGMENT, 4, TOKENS, hidden)
    d_tokens = [torch.zeros_like(x) if padded else torch.empty_like(x) for x in tokens[: 5 + (delta is not None)]]
    partial = [q.new_empty(batch, *x.shape) for x in (scale, shift)]
    d_start = anchor.new_zeros(anchor.shape if start is not None else 0)
    full = (ends[:, 1] != 0).view(-1, 1, 1, 1, 1)
    d_anchor = grad_last[:, :, 1]
    d_state = (grad_last[:, :, 0] + d_anchor.masked_fill(~full, 0)).contiguous()
    d_anchor = d_anchor.masked_fill(full, 0).contiguous()
    places = [*d_tokens, *([] if delta is not None else [d_tokens[0]]), *partial, d_start, d_state, d_anchor]
    backward_kernel[(batch * n_heads,)](
        *(order, entries, ends, *tokens, *whole, saved, written, read, grad_y.contiguous(), states, room, *places),
        *(length, n_heads, entries.shape[1], saved.shape[2]),
        **_options(q, hidden, eta, log_alpha, delta, bias, sharpness),
        HAS_START=start is not None,
    )
    found = [*d_tokens, *(x.sum(0) for x in partial), d_state, d_anchor]
    return found if start is None else [*found, d_start.sum(0)]


@_backward.register_fake
def _(grad_y, grad_last, saved, written, read, *given):
    *inputs, anchor, start, _, _, _, _, _, _ = given
    return [x.new_empty(x.shape) for x in (*inputs, anchor, anchor, start) if x is not None]


def _keep(ctx, inputs, output):
    *tensors, _, ctx.padded, ctx.bias, ctx.sharpness = inputs
    del tensors[8]  # the state: it is what was saved first
    ctx.save_for_backward(*output[2:], *tensors)


def _differentiate(ctx, grad_y, grad_last, *_):
    saved = ctx.saved_tensors
    grads = iter(_backward(grad_y, grad_last, *saved, ctx.padded, ctx.bias, ctx.sharpness))
    given = [*saved[3:11], saved[11], *saved[11:13]]
    return *(None if x is None else next(grads) for x in given), *(None,) * 7


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
) -> tuple[Tensor, Perceptron, Perceptron, None, Tensor]:
    """As `recollect.kernels.memory.perceptron_scan`, link "identity" and rule "gd"."""
    assert log_momentum is None
    assert momentum is None
    assert radius is None
    assert rows is None
    pieces = cut(phase, q.shape[1], settings.chunk_size, reset, valid)
    shared = [x.expand(*q.shape[:3], x.shape[-1]) for x in (eta, log_alpha)]
    packed = [None if x is None else torch.stack((x.first, x.last.mT), dim=-3) for x in (state, anchor, start)]
    inputs = (q, k, v, *shared, delta, *slow, *packed)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, *_ = _forward(
        *inputs,
        *(pieces.order, pieces.entries, pieces.ends, max(pieces.n_slots, 1) if learning else 0, valid is not None),
        *(BIASES[settings.bias], settings.sharpness),
    )
    now, then = (Perceptron(x[:, :, 0], x[:, :, 1].mT) for x in last.unbind(2))
    return y, now, then, None, pieces.phase
