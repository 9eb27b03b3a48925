"""The Miras recurrence, token by token: the oracle of the chunked form.

Nothing is shared with it but the four choices themselves. Gradients are vector-Jacobian products of the read (not the memory's
hand-written factors), the weights are whole matrices at every token, and a window's gradients are taken again at every token.

Axis legend: B batch, T time, H heads, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.ops.miras.inputs import Inputs, choose, named, on_axis, reduced
from recollect.ops.miras.memories import Parameters, dense
from recollect.ops.miras.rules import newton_schulz
from recollect.ops.miras.spec import MirasSpec, MirasState, Tail

Matrices = tuple[Tensor, ...]


def sequential(
    spec: MirasSpec,
    inputs: Inputs,
    state: MirasState,
    start: MirasState | None,
    parameters: Parameters,
    *,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, MirasState]:
    """y [B, T, H, V] and the state after the last token; `start` is the state at the start of a document (None: none starts here)."""
    outputs = []
    for t in range(inputs.q.shape[1]):
        before = state if reset is None else choose(reset[:, t], start, state)
        y, after = _token(spec, inputs.at(t), before, parameters)
        if valid is not None:
            y, after = y.masked_fill(~valid[:, t, None, None], 0.0), choose(valid[:, t], after, state)
        outputs.append(y)
        state = after
    return torch.stack(outputs, dim=1), state


def _token(spec: MirasSpec, now: Inputs, state: MirasState, parameters: Parameters) -> tuple[Tensor, MirasState]:
    """One token [B, H, ...]: write, then read."""
    retention, rule, axes = spec.retention, spec.rule, spec.memory.axes
    anchor = state.dual if state.anchor is None else state.anchor
    alpha = [on_axis(now.log_alpha, axis, retention.row_constant, log=True).exp() for axis in axes]
    point = [a * z for a, z in zip(alpha, anchor, strict=True)] if spec.gradient_at == "decayed" else list(anchor)
    gradients, tail = _gradients(spec, _link(spec, point, parameters), now, state.tail, parameters)

    dual, momenta = [], []
    for m, (z, g) in enumerate(zip(state.dual, gradients, strict=True)):
        gates = {"eta": on_axis(now.eta, axes[m])}
        if now.log_momentum is not None:
            gates["momentum"] = now.log_momentum[..., None, None].exp()
        delta, s = rule.update(g, gates, None if state.momentum is None else state.momentum[m])
        dual.append(alpha[m] * z + delta)
        momenta.append(s)
    momentum = None if state.momentum is None else tuple(s for s in momenta if s is not None)
    kept = None if state.kept is None else tuple(old + _log_alpha(spec, now, m) for m, old in enumerate(state.kept))

    n_tokens = state.phase + 1
    full = (n_tokens == spec.chunk_size)[:, None, None, None]
    if rule.n_iterations:
        assert momentum is not None
        pushed = [
            z + on_axis(now.eta, axes[m]) * newton_schulz(s, rule.n_iterations)
            for m, (z, s) in enumerate(zip(dual, momentum, strict=True))
        ]
        dual = [torch.where(full, p, z) for p, z in zip(pushed, dual, strict=True)]
    settled = list(dual)
    if retention.settle is not None:
        settled = [retention.settle(a, z, n_tokens) for a, z in zip(anchor, dual, strict=True)]
    exact = spec.chunk_size == 1 or spec.read == "exact"
    if exact:
        weights = _link(spec, settled, parameters)
    else:
        logs = (None,) * len(axes) if kept is None else kept
        weights = [
            _framed(spec, a, z, log, initial, axis)
            for a, z, log, initial, axis in zip(anchor, dual, logs, parameters.fast, axes, strict=True)
        ]
    y = spec.memory.read(dense(weights, diagonal=spec.memory.diagonal), parameters.slow, now.q[:, :, None])[:, :, 0]

    if state.anchor is None:
        return y, MirasState(tuple(settled), None, None, momentum, tail, state.phase)
    dual = [torch.where(full, s, z) for s, z in zip(settled, dual, strict=True)]
    anchor = tuple(torch.where(full, s, a) for s, a in zip(settled, anchor, strict=True))
    kept = None if kept is None else tuple(torch.where(full[..., 0], 0.0, log) for log in kept)
    return y, MirasState(tuple(dual), anchor, kept, momentum, tail, n_tokens % spec.chunk_size)


def _gradients(
    spec: MirasSpec, weights: list[Tensor], now: Inputs, tail: Tail | None, parameters: Parameters
) -> tuple[list[Tensor], Tail | None]:
    """d loss / d weights, summed over the window, and the window's next tail."""
    k, v, gates = now.k[:, :, None], now.v[:, :, None], tuple(g[:, :, None] for g in now.bias)
    gamma = None if now.gamma is None else now.gamma[:, :, None]
    if tail is not None:
        k, v = torch.cat((tail.k.transpose(1, 2), k), dim=2), torch.cat((tail.v.transpose(1, 2), v), dim=2)
        gates = tuple(torch.cat((old.transpose(1, 2), new), dim=2) for old, new in zip(tail.gates, gates, strict=True))
        assert gamma is not None
        gamma = torch.cat((tail.gamma.transpose(1, 2), gamma), dim=2)
        tail = Tail(
            k[:, :, 1:].transpose(1, 2),
            v[:, :, 1:].transpose(1, 2),
            gamma[:, :, 1:].transpose(1, 2),
            tuple(g[:, :, 1:].transpose(1, 2) for g in gates),
        )

    def predict(matrices: tuple[Tensor, ...]) -> Tensor:
        return spec.memory.read(dense(matrices, diagonal=spec.memory.diagonal), parameters.slow, k)

    prediction, pull = torch.func.vjp(predict, tuple(weights))  # type: ignore[misc]
    signal = spec.bias.grad(prediction, v, **named(spec.bias.gates, gates))
    signal = signal if gamma is None else signal * gamma[..., None]
    (gradients,) = pull(signal)
    return list(gradients), tail


def _link(spec: MirasSpec, dual: list[Tensor], parameters: Parameters) -> list[Tensor]:
    return [spec.retention.link(z, initial) for z, initial in zip(dual, parameters.fast, strict=True)]


def _log_alpha(spec: MirasSpec, now: Inputs, m: int) -> Tensor:
    """log alpha [B, H, 1 or channels] as matrix m decays."""
    return reduced(now.log_alpha, spec.memory.axes[m], spec.retention.row_constant, log=True)


def _framed(spec: MirasSpec, anchor: Tensor, z: Tensor, kept: Tensor | None, initial: Tensor, axis: str) -> Tensor:
    """The weights as a chunk reads them, linear in what was added since the anchor."""
    frame = spec.retention.frame(anchor, initial)
    if kept is None:  # nothing but the sum is read
        return z if frame.fixed is None else z + frame.fixed
    remaining = on_axis(kept, axis).exp()
    return frame.weights(remaining, z - remaining * anchor)
