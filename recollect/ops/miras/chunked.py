"""The Miras recurrence in chunks: the gradients of a whole chunk at one point, as matrix products.

Within a chunk the recurrence is linear, so Z_t is a decayed Z_0 minus a weighted sum of outer products G_i F_i^T. Two forms:

- dual: no matrix is built per token. A product with the weights of token t is a product with the chunk's first weights minus an
  attention over the chunk: x_t . F_i, weighted by the decay between i and t, summed over G_i; layer by layer through the memory.
- dense: the matrices of every token, one after another. For chunks of one token, `read="exact"`, rules that change the dual at chunk
  ends only, and gates that the dual form has no product for.

Source: arXiv 2504.13173, Eq. 28-32; the dual form of TTT, arXiv 2407.04620, appendix A, with channel-wise gates and several layers.

Axis legend: B batch, T time, N chunks, L slots of a chunk, H heads, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recollect.ops.decay import SAFE_EXPONENT, cumulative_log_decay, decayed_scores, decayed_sum
from recollect.ops.miras.inputs import Inputs, choose, named, on_axis, reduced
from recollect.ops.miras.memories import Factors, Parameters, dense
from recollect.ops.miras.retentions import Frame
from recollect.ops.miras.rules import Mixture, mixture, newton_schulz
from recollect.ops.miras.slots import Slots
from recollect.ops.miras.spec import MirasSpec, MirasState, Tail

Matrices = tuple[Tensor, ...]

SEGMENT = 64  # tokens between the states that the backward pass keeps; what is between them is computed again
KEPT_SEGMENTS = 8  # sequences of at most as many segments keep everything instead


def chunked(
    spec: MirasSpec,
    inputs: Inputs,
    state: MirasState,
    start: MirasState | None,
    parameters: Parameters,
    slots: Slots,
    *,
    floor: float | None = None,
) -> tuple[Tensor, MirasState]:
    """y [B, T, H, V] and the state after the last token.

    Args:
        inputs: in the precision of the computation.
        state, start: before the first token; at the start of a document (None: none starts here).
        slots: where the tokens stand.
        floor: the most negative log alpha that one token can have, if known.
    """
    arranged = inputs.map(slots.arrange)
    gating = None
    if dual_form(spec, inputs):
        gating = [_gating(spec, arranged, slots, axis, floor) for axis in spec.memory.axes]

    def run(state: MirasState, first: int, last: int) -> tuple[Tensor, MirasState]:
        """Chunks first .. last - 1."""
        outputs = []
        for n in range(first, last):
            if slots.reset is not None:
                state = choose(slots.reset[:, n], start, state)
            here = _Chunk(arranged.step(n), slots, n)
            y, state = _dense(spec, here, state, parameters) if gating is None else _dual(spec, here, state, parameters, gating)
            outputs.append(y)
        return torch.stack(outputs), state

    group = max(1, SEGMENT // slots.length)
    if not torch.is_grad_enabled() or slots.n_chunks <= KEPT_SEGMENTS * group:
        y, state = run(state, 0, slots.n_chunks)
    else:
        parts = []
        for first in range(0, slots.n_chunks, group):
            part, state = checkpoint(
                run, state, first, min(first + group, slots.n_chunks), use_reentrant=False, preserve_rng_state=False
            )
            parts.append(part)
        y = torch.cat(parts)
    return slots.collect(y), state._replace(phase=slots.phase)


def dual_form(spec: MirasSpec, inputs: Inputs) -> bool:
    """Whether the chunk's reads and carry are matrix products: static facts only."""
    rule, scalar = spec.rule, inputs.eta.shape[-1] == 1 and inputs.log_alpha.shape[-1] == 1
    return (
        spec.chunk_size > 1
        and not spec.memory.diagonal
        and not rule.n_iterations
        and (spec.retention.exact or spec.read == "linear")
        and (scalar or not (rule.momentum or rule.window > 1))
    )


class _Chunk(NamedTuple):
    """Chunk n: its inputs [B, H, L, ...] and its place in the layout."""

    inputs: Inputs
    slots: Slots
    n: int

    def before(self) -> Tensor | int:
        """Tokens of the chunk before this call: int64 [B], or 0."""
        return 0 if self.slots.before is None else self.slots.before[:, self.n]

    def filled(self) -> Tensor | int:
        """Tokens of this call in the chunk: int64 [B], or their number."""
        return self.slots.size(self.n) if self.slots.filled is None else self.slots.filled[:, self.n]

    def complete(self, chunk_size: int) -> Tensor | bool:
        """Whether the chunk ends in this call: bool [B], or one for all rows."""
        return self.slots.size(self.n) == chunk_size if self.slots.complete is None else self.slots.complete[:, self.n]


# --- the write --------------------------------------------------------------------------------------------------------------


def _factors(spec: MirasSpec, weights: Sequence[Tensor], chunk: _Chunk, tail: Tail | None, slow: Sequence[Tensor]) -> Factors:
    """The gradients' factors at `weights`, of the window's earlier tokens and the chunk's: G [B, H, W-1+L, O], F [B, H, W-1+L, I]."""
    k, v, gamma, gates = chunk.inputs.k, chunk.inputs.v, chunk.inputs.gamma, chunk.inputs.bias
    if tail is not None:
        k, v = torch.cat((tail.k.transpose(1, 2), k), dim=2), torch.cat((tail.v.transpose(1, 2), v), dim=2)
        gates = tuple(torch.cat((old.transpose(1, 2), new), dim=2) for old, new in zip(tail.gates, gates, strict=True))
        assert gamma is not None
        gamma = torch.cat((tail.gamma.transpose(1, 2), gamma), dim=2)

    def phi(prediction: Tensor) -> Tensor:
        slope = spec.bias.grad(prediction, v, **named(spec.bias.gates, gates))
        return slope if gamma is None else gamma[..., None] * slope

    return spec.memory.pullback(weights, slow, k, phi)


def _next_tail(chunk: _Chunk, tail: Tail | None) -> Tail | None:
    """The last W - 1 tokens after the chunk; slots without a token are passed over."""
    if tail is None:
        return None
    width, count = tail.gamma.shape[1], chunk.filled()
    inputs = chunk.inputs
    assert inputs.gamma is not None

    def follow(old: Tensor, new: Tensor) -> Tensor:
        both = torch.cat((old, new.transpose(1, 2)), dim=1)
        if isinstance(count, int):
            return both[:, count : count + width]
        index = count[:, None] + torch.arange(width, device=old.device)
        return both.gather(1, index.view(*index.shape, *(1,) * (old.dim() - 2)).expand(-1, -1, *old.shape[2:]))

    gates = tuple(follow(old, new) for old, new in zip(tail.gates, inputs.bias, strict=True))
    return Tail(follow(tail.k, inputs.k), follow(tail.v, inputs.v), follow(tail.gamma, inputs.gamma), gates)


def _settle(spec: MirasSpec, chunk: _Chunk, anchor: Matrices, dual: Matrices) -> tuple[Matrices, Matrices | None]:
    """The dual and the next gradient point after a chunk: where it is complete, retention has its non-linear say."""
    if not spec.stale and spec.chunk_size > 1:
        return dual, None
    complete = chunk.complete(spec.chunk_size)
    settled = dual
    if spec.retention.settle is not None:
        settled = tuple(spec.retention.settle(a, z, spec.chunk_size) for a, z in zip(anchor, dual, strict=True))
    if isinstance(complete, bool):
        return (settled, settled) if complete else (dual, anchor)
    return choose(complete, settled, dual), choose(complete, settled, anchor)


def _next_kept(spec: MirasSpec, chunk: _Chunk, kept: Matrices | None) -> Matrices | None:
    """The decay since the gradient point, 0 in log where the chunk is complete."""
    if kept is None:
        return None
    log_alpha = [reduced(chunk.inputs.log_alpha, axis, spec.retention.row_constant, log=True) for axis in spec.memory.axes]
    return _reset_kept(spec, chunk, tuple(old + log.sum(2) for old, log in zip(kept, log_alpha, strict=True)))


def _reset_kept(spec: MirasSpec, chunk: _Chunk, kept: Matrices) -> Matrices:
    complete = chunk.complete(spec.chunk_size)
    zero = tuple(torch.zeros_like(log) for log in kept)
    if isinstance(complete, bool):
        return zero if complete else kept
    reset = choose(complete, zero, kept)
    assert isinstance(reset, tuple)
    return reset


# --- the dual form ----------------------------------------------------------------------------------------------------------


class _Scalar(NamedTuple):
    """Gates that are one number per head: a weight per pair of tokens. keep, boost [N, B, H, L, 1]; see `Mixture`."""

    mix: Mixture
    eta: Tensor | None  # channel-wise step sizes, [N, B, H, L, O or I], which are no part of `mix`
    axis: str

    def scale(self, n: int, g: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        if self.eta is None:
            return g, f
        return (self.eta[n] * g, f) if self.axis == "output" else (g, self.eta[n] * f)

    def product(self, n: int, x: Tensor, base: Tensor, momentum: Tensor | None, g: Tensor, f: Tensor) -> Tensor:
        y = self.mix.keep[n].unsqueeze(-1) * (x @ base.mT) - ((x @ f.mT) * self.mix.weights[n]) @ g
        return y if momentum is None or self.mix.boost is None else y + self.mix.boost[n].unsqueeze(-1) * (x @ momentum.mT)

    def advance(self, n: int, z: Tensor, momentum: Tensor | None, g: Tensor, f: Tensor) -> tuple[Tensor, Tensor | None]:
        mix = self.mix
        after = mix.keep[n][..., -1, None, None] * z - (mix.weights[n][..., -1, :, None] * g).mT @ f
        if momentum is None or mix.boost is None or mix.momentum_keep is None or mix.momentum_weights is None:
            return after, None
        after = after + mix.boost[n][..., -1, None, None] * momentum
        return after, mix.momentum_keep[n][..., None, None] * momentum - (mix.momentum_weights[n][..., None] * g).mT @ f


class _Channels(NamedTuple):
    """A decay per channel of one axis, c its cumulative log [N, B, H, L, channels]: a factor of either side.

    up = exp(c) and down = exp(-c) where the floor of the decay allows them, else None (`recollect.ops.decay` then takes care).
    """

    c: Tensor
    up: Tensor
    down: Tensor | None
    eta: Tensor
    axis: str

    def scale(self, n: int, g: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.eta[n] if self.down is None else self.down[n]  # down has eta in it
        return (factor * g, f) if self.axis == "output" else (g, factor * f)

    def product(self, n: int, x: Tensor, base: Tensor, momentum: Tensor | None, g: Tensor, f: Tensor) -> Tensor:
        up, c = self.up[n], self.c[n]
        if self.axis == "input":
            raised = x * up
            scores = decayed_scores(x, f, c) if self.down is None else (raised @ f.mT).tril()
            return raised @ base.mT - scores @ g
        scores = (x @ f.mT).tril()
        if self.down is None:
            return up * (x @ base.mT) - decayed_sum(scores, g, c)
        return up * (x @ base.mT - scores @ g)

    def advance(self, n: int, z: Tensor, momentum: Tensor | None, g: Tensor, f: Tensor) -> tuple[Tensor, Tensor | None]:
        last = self.up[n][..., -1:, :]
        side = last.mT if self.axis == "output" else last
        if self.down is not None:
            return side * (z - g.mT @ f), None
        rest = (self.c[n][..., -1:, :] - self.c[n]).exp()
        g, f = (rest * g, f) if self.axis == "output" else (g, rest * f)
        return side * z - g.mT @ f, None


def _gating(spec: MirasSpec, inputs: Inputs, slots: Slots, axis: str, floor: float | None) -> _Scalar | _Channels:
    """How one matrix decays, for all chunks at once."""
    log_alpha = reduced(inputs.log_alpha, axis, spec.retention.row_constant, log=True)
    eta = reduced(inputs.eta, axis)
    if log_alpha.shape[-1] == 1:
        one = eta.shape[-1] == 1
        real = slots.mask() if spec.rule.momentum else None
        mix = mixture(
            spec.rule,
            log_alpha[..., 0],
            eta[..., 0] if one else torch.ones_like(log_alpha[..., 0]),
            log_momentum=inputs.log_momentum,
            real=None if real is None else real.unsqueeze(2),
        )
        return _Scalar(mix, None if one else eta, axis)
    c = cumulative_log_decay(log_alpha, dim=-2)
    safe = floor is not None and -floor * slots.length <= SAFE_EXPONENT[c.dtype]
    return _Channels(c, c.exp(), eta * (-c).exp() if safe else None, eta, axis)


def _dual(
    spec: MirasSpec, chunk: _Chunk, state: MirasState, parameters: Parameters, gating: list[_Scalar | _Channels]
) -> tuple[Tensor, MirasState]:
    """One chunk in the dual form."""
    n = chunk.n
    anchor = state.dual if state.anchor is None else state.anchor
    frames = [spec.retention.frame(a, initial) for a, initial in zip(anchor, parameters.fast, strict=True)]
    for m in spec.memory.offset_free:
        frames[m] = frames[m]._replace(fixed=None) if frames[m].even else frames[m]
    weights = [
        frame.moving if frame.fixed is None else frame.moving + frame.fixed for frame in frames
    ]  # the link, at the anchor
    raw = _factors(spec, weights, chunk, state.tail, parameters.slow)
    factors = [gate.scale(n, g, f) for gate, (g, f) in zip(gating, raw, strict=True)]
    reads = [_base(spec, state, frame, m) for m, frame in enumerate(frames)]

    def apply(m: int, x: Tensor) -> Tensor:
        (g, f), base = factors[m], reads[m]
        momentum = None if state.momentum is None else state.momentum[m]
        if base.centred:
            f = f - f.mean(-1, keepdim=True)
            momentum = None if momentum is None else momentum - momentum.mean(-1, keepdim=True)
        if base.scale is not None:
            g = base.scale * g
            momentum = None if momentum is None else base.scale * momentum
        y = gating[m].product(n, x, base.moving, momentum, g, f)
        return y if base.fixed is None else y + x @ base.fixed.mT

    y = spec.memory.read(apply, parameters.slow, chunk.inputs.q)
    after = [
        gate.advance(n, z, s, g, f)
        for gate, z, s, (g, f) in zip(gating, state.dual, state.momentum or (None,) * len(factors), factors, strict=True)
    ]
    after_momentum = None if state.momentum is None else tuple(s for _, s in after if s is not None)
    dual, next_anchor = _settle(spec, chunk, anchor, tuple(z for z, _ in after))
    tail = _next_tail(chunk, state.tail)
    return y, MirasState(
        dual,
        None if state.anchor is None else next_anchor,
        _next_kept(spec, chunk, state.kept),
        after_momentum,
        tail,
        state.phase,
    )


def _base(spec: MirasSpec, state: MirasState, frame: Frame, m: int) -> Frame:
    """The frame of matrix m, moved from the gradient point to where the call stands in the chunk."""
    z = state.dual[m]
    if spec.retention.exact or state.kept is None:
        return Frame(z, frame.fixed)
    assert state.anchor is not None
    if z is state.anchor[m]:
        return frame
    remaining = on_axis(state.kept[m], spec.memory.axes[m]).exp()
    moving = frame._replace(fixed=None).weights(remaining, z - remaining * state.anchor[m])
    return frame._replace(moving=moving)


# --- the dense form ---------------------------------------------------------------------------------------------------------


def _dense(spec: MirasSpec, chunk: _Chunk, state: MirasState, parameters: Parameters) -> tuple[Tensor, MirasState]:
    """One chunk with the matrices of every token; the gradients are still taken together, at the chunk's one point."""
    slots, axes = chunk.slots, spec.memory.axes
    anchor = state.dual if state.anchor is None else state.anchor
    log_alpha = [reduced(chunk.inputs.log_alpha, axis, spec.retention.row_constant, log=True) for axis in axes]
    point = anchor
    if spec.gradient_at == "decayed":  # chunks of one token
        point = tuple(on_axis(log[:, :, 0], axis).exp() * z for log, axis, z in zip(log_alpha, axes, anchor, strict=True))
    weights = [spec.retention.link(a, initial) for a, initial in zip(point, parameters.fast, strict=True)]
    factors = _factors(spec, weights, chunk, state.tail, parameters.slow)
    mask = None if slots.real is None else slots.mask()
    frames: list[Frame] = []
    if spec.chunk_size > 1 and spec.read == "linear":
        frames = [spec.retention.frame(a, initial) for a, initial in zip(anchor, parameters.fast, strict=True)]

    outputs, now = [], state
    for t in range(slots.size(chunk.n)):
        after = _write(spec, chunk, now, anchor, [log[:, :, t] for log in log_alpha], factors, t)
        now = after if mask is None else choose(mask[chunk.n, :, t], after, now)
        read = dense(_weights(spec, chunk, now, anchor, frames, parameters, t), diagonal=spec.memory.diagonal)
        outputs.append(spec.memory.read(read, parameters.slow, chunk.inputs.q[:, :, t : t + 1]))
    y = torch.cat(outputs, dim=2)
    if y.shape[2] < slots.length:
        y = torch.cat((y, y.new_zeros(*y.shape[:2], slots.length - y.shape[2], y.shape[3])), dim=2)
    dual, next_anchor = _settle(spec, chunk, anchor, now.dual)
    kept = None if now.kept is None else _reset_kept(spec, chunk, now.kept)
    return y, MirasState(
        dual, None if state.anchor is None else next_anchor, kept, now.momentum, _next_tail(chunk, state.tail), state.phase
    )


def _write(
    spec: MirasSpec, chunk: _Chunk, now: MirasState, anchor: Matrices, log_alpha: list[Tensor], factors: Factors, t: int
) -> MirasState:
    """Token t of the chunk enters the dual."""
    rule, inputs = spec.rule, chunk.inputs
    dual, momentum = [], []
    for m, axis in enumerate(spec.memory.axes):
        eta = on_axis(inputs.eta[:, :, t], axis)
        gates = {"eta": eta}
        if inputs.log_momentum is not None:
            gates["momentum"] = inputs.log_momentum[:, :, t, None, None].exp()
        g, f = (side[:, :, t : t + rule.window] for side in factors[m])
        gradient = (g * f).sum(2, keepdim=True) if spec.memory.diagonal else g.mT @ f
        delta, s = rule.update(gradient, gates, None if now.momentum is None else now.momentum[m])
        z = on_axis(log_alpha[m], axis).exp() * now.dual[m] + delta
        if s is not None:
            momentum.append(s)
            if rule.n_iterations:
                z = _push(spec, chunk, z, eta * newton_schulz(s, rule.n_iterations), t)
        dual.append(z)
    kept = None if now.kept is None else tuple(old + log for old, log in zip(now.kept, log_alpha, strict=True))
    return now._replace(dual=tuple(dual), momentum=tuple(momentum) if rule.momentum else None, kept=kept)


def _push(spec: MirasSpec, chunk: _Chunk, z: Tensor, step: Tensor, t: int) -> Tensor:
    """z plus the step of a chunk's end, where token t is its last."""
    seen = chunk.before() + t + 1
    if isinstance(seen, int):
        return z + step if seen == spec.chunk_size else z
    return torch.where((seen == spec.chunk_size)[:, None, None, None], z + step, z)


def _weights(
    spec: MirasSpec, chunk: _Chunk, now: MirasState, anchor: Matrices, frames: list[Frame], parameters: Parameters, t: int
) -> list[Tensor]:
    """The weights that token t reads: through the chunk's frames, or, without any, exactly."""
    retention = spec.retention
    if frames:
        bases = [_base(spec, now, frame, m) for m, frame in enumerate(frames)]
        return [base.moving if base.fixed is None else base.moving + base.fixed for base in bases]
    dual = now.dual
    if retention.settle is not None:
        seen = chunk.before() + t + 1
        dual = tuple(retention.settle(a, z, seen) for a, z in zip(anchor, dual, strict=True))
    return [retention.link(z, initial) for z, initial in zip(dual, parameters.fast, strict=True)]
