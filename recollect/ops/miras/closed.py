"""Specs with an exact form of their own, which needs no chunks: linear memories, gated slots, least squares, softmax attention.

Axis legend: B batch, T time, H heads, K key dim, V value dim, S cached keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.ops.attention import softmax_attention
from recollect.ops.growing import appended
from recollect.ops.linear_scan import delta_rule_scan, delta_scan, gated_linear_scan, least_squares_scan, slot_scan
from recollect.ops.miras.inputs import Inputs
from recollect.ops.miras.spec import MirasSpec, MirasState, held


def _scalar(gate: Tensor) -> Tensor:
    """[B, T, H, 1] -> [B, T, H]; channel-wise gates stay."""
    return gate.squeeze(-1) if gate.shape[-1] == 1 else gate


def _log_decay(spec: MirasSpec, inputs: Inputs) -> Tensor | None:
    """The decay as the scans take it, None where the spec has none."""
    return _scalar(inputs.log_alpha) if spec.retention.decays else None


def hebbian(
    spec: MirasSpec,
    inputs: Inputs,
    state: MirasState,
    reset: Tensor | None,
    valid: Tensor | None,
    floor: float | None,
    products: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, MirasState]:
    """A matrix written without being read: decayed linear attention."""
    k, log_decay = inputs.k * inputs.eta, _log_decay(spec, inputs)
    y, s = gated_linear_scan(
        inputs.q,
        k,
        inputs.v,
        log_decay,
        state.dual[0],
        reset=reset,
        valid=valid,
        floor=floor,
        products=products,
        backend=backend,
    )
    return y, held((s,))


def delta_rule(
    spec: MirasSpec,
    inputs: Inputs,
    write: Tensor | None,
    state: MirasState | None,
    reset: Tensor | None,
    valid: Tensor | None,
    floor: float | None,
    products: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, MirasState]:
    """A matrix, the l2 bias, one token per gradient: M <- M alpha - (M k - v) (eta k)^T, k decayed first if the gradient is."""
    k, v, eta, log_decay = inputs.k, inputs.v, inputs.eta, _log_decay(spec, inputs)
    before = None if state is None else state.dual[0]
    exact = write is None and not spec.rule.implicit and eta.shape[-1] == 1
    if exact and (spec.gradient_at == "decayed" or log_decay is None):
        eta = eta.squeeze(-1)
        y, s = delta_rule_scan(
            inputs.q, k, v, eta, log_decay, before, reset=reset, valid=valid, floor=floor, products=products, backend=backend
        )
        return y, held((s,))
    read = k * inputs.log_alpha.exp() if spec.gradient_at == "decayed" else k
    strength = None
    if spec.rule.implicit:
        eta = eta / (1 + eta * k.square().sum(-1, keepdim=True))
    if eta.shape[-1] > 1 and spec.rule.implicit:
        strength, v, erase = eta, eta * v, k
    else:
        erase = eta * k
    y, s = delta_scan(
        inputs.q,
        erase if write is None else write,
        v,
        read,
        -erase,
        log_decay,
        before,
        strength=strength,
        reset=reset,
        valid=valid,
        floor=floor,
        products=products,
        backend=backend,
    )
    return y, held((s,))


def own_scan(
    spec: MirasSpec, inputs: Inputs, state: MirasState | None, reset: Tensor | None, valid: Tensor | None, backend: str | None
) -> tuple[Tensor, MirasState]:
    """Gated slots, least squares, softmax attention."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if spec.memory.kind == "growing":
        return _softmax(inputs, state, reset, valid)
    if spec.memory.kind == "slots":
        shape = (*q.shape[:3], spec.memory.n_slots)
        if inputs.log_alpha.shape != shape:
            raise ValueError(f"memory 'slots' needs the gate 'log_alpha' {list(shape)}; got {list(inputs.log_alpha.shape)}")
        before = None if state is None else (state.dual[0], state.dual[1])
        y, pair = slot_scan(q, k, v, inputs.log_alpha, before, reset=reset, valid=valid, backend=backend)
        return y, held(pair)
    for name, gate in (("eta", inputs.eta), ("log_alpha", inputs.log_alpha)):
        if gate.shape[-1] != 1:
            raise ValueError(f"least squares takes gate {name!r} as one number per head, [B, T, H]; got {list(gate.shape)}")
    y, pair = least_squares_scan(
        q,
        k,
        v,
        inputs.log_alpha[..., 0],
        None if state is None else (state.dual[0], state.dual[1]),
        eta=inputs.eta[..., 0],
        ridge=spec.rule.ridge,
        reset=reset,
        valid=valid,
        backend=backend,
    )
    return y, held(pair)


def _softmax(inputs: Inputs, state: MirasState | None, reset: Tensor | None, valid: Tensor | None) -> tuple[Tensor, MirasState]:
    """All pairs so far; `phase` is the index of the current document's first one."""
    k, v, n_tokens = inputs.k, inputs.v, inputs.q.shape[1]
    n_cached = 0
    first = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
    if state is not None:
        n_cached, first = state.dual[0].shape[1], state.phase
        k, v = appended(state.dual[0], k), appended(state.dual[1], v)
    index = torch.arange(n_cached, n_cached + n_tokens, device=k.device).expand(k.shape[0], -1)
    fresh = torch.zeros_like(index, dtype=torch.bool) if reset is None else reset
    if valid is not None:
        fresh = fresh | ~valid
        fresh[:, 1:] |= ~valid[:, :-1]
    start = torch.cat((first[:, None], torch.where(fresh, index, 0)), dim=1).cummax(1).values[:, 1:]
    y = softmax_attention(inputs.q, k, v, start=start)
    last = start[:, -1]
    if valid is not None:
        y, last = y.masked_fill(~valid[:, :, None, None], 0.0), torch.where(valid[:, -1], last, n_cached + n_tokens)
    return y, held((k, v), last)
