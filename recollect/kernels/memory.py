"""The Miras recurrence of a two-layer perceptron memory on the CPU, compiled (memory.c): gradient descent, with momentum too.

Faster equal of the plain chunked scan (its oracle), forward and backward, fp32 and fp64. The backward pass keeps the inputs, one
state per 64 tokens or chunk and two vectors per token, and recomputes the rest. Work is spread over batch elements and heads.

Axis legend: B batch, T time, H heads, K key dim, O hidden size, P pieces of at most 16 tokens.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.kernels.compile import POINTER, SIZE, memory
from recollect.kernels.missing import unbuilt

_NAMES = ("l2", "lp3", "huber", "l1", "huber_norm", "lp", "l_infinity", "pseudo_huber", "value_shift")
BIASES = {name: number for number, name in enumerate(_NAMES)}  # of every kernel
LINKS = {"identity": 0, "scaled": 1, "simplex": 2}  # what the weights are of what decays
RULES = {"gd": 0, "momentum": 1}
PIECE = 16  # tokens: key dim and hidden size are multiples of it
ENTRY_COLUMNS = 5  # int32 numbers of a row of the table


class Perceptron(NamedTuple):
    """The two matrices of a memory, first [..., O, K] and last [..., K, O]."""

    first: Tensor
    last: Tensor


class Settings(NamedTuple):
    """What is the same at every token: tokens of a chunk, bias, link and rule by their names above, the number that a bias has
    (`sharpness`: l1's, or p of lp, or the temperature of l_infinity), and that of a retention: of link "scaled" q; of "identity" by
    how much a full chunk ends with entries nearer to zero, those below it at zero."""

    chunk_size: int
    bias: str = "l2"
    sharpness: float = 10.0
    link: str = "identity"
    rule: str = "gd"
    retention: float = 0.0


def can_run(q: Tensor, hidden: int, bias: str, link: str = "identity", rule: str = "gd") -> bool:
    """Whether nothing is lacking."""
    return not lacks(q, hidden, bias, link, rule)


def lacks(q: Tensor, hidden: int, bias: str, link: str = "identity", rule: str = "gd") -> str:
    """Why it cannot run, "" where it can: CPU, fp32 or fp64, a compiler, sizes that are multiples of 16 and at most 128 (key dim) and
    1024 (hidden), names known above. Momentum goes with the identity link only.
    """
    key = q.shape[-1]
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64):
        return f"it runs on a CPU in fp32 or fp64, q is {q.dtype} on {q.device.type}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it"
    if rule not in RULES or (rule == "momentum" and link != "identity"):
        return f"it has no rule {rule!r} with weights that are {link!r}"
    if bias not in BIASES:
        return f"it has no bias {bias!r}"
    if key % PIECE or hidden % PIECE or not 0 < key <= 128 or not 0 < hidden <= 1024:
        return f"it takes multiples of {PIECE}, K up to 128 and hidden sizes up to 1024; these are {key} and {hidden}"
    if memory(key, hidden, BIASES[bias], LINKS[link], RULES[rule], q.dtype == torch.float64) is None:
        return unbuilt()
    return ""


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
    """Outputs and states of y_t = q_t + LayerNorm(W_last,t gelu(W_first,t q_t)), the matrices written by decaying gradient descent.

    Args:
        q, k, v: [B, T, H, K] of one dtype, for which `can_run` holds.
        eta, log_alpha: [B, T, H, 1 or K]; log_alpha <= 0, any size. They act on the matrices' K axes.
        state: matrices before the first token, [B, H, O, K] and [B, H, K, O].
        anchor: those at the start of the open chunk (read only where phase > 0).
        slow: scale and shift of the norm, [H, K].
        phase: int64 [B], tokens already in the open chunk.
        delta: threshold of bias "huber" or "pseudo_huber" (of every channel), "huber_norm" (of the norm over channels) or
            "value_shift" (the mean over channels counts for both), [B, T, H, 1 or K], not negative.
        log_momentum: log of what is kept of the last change, [B, T, H], <= 0; rule "momentum", where eta and log_alpha have one
            channel.
        momentum: the last change of each matrix, as `state`; rule "momentum".
        radius: of link "scaled", [H, 2]: in a chunk the weights are the matrices times min(1, radius / |matrix|_q)^(q - 2), the norm
            with 1e-8 added and taken at the chunk's start, for each matrix alone; a negative radius: (|radius| / |matrix|_q)^(q - 2).
        rows: of link "simplex": log of alpha for the first matrix [B, T, H, 1] (log_alpha is for the last one only), and log of the
            decay of the first and last matrix since the open chunk's start, [B, H, 1] and [B, H, log_alpha's channels]. The weights
            are, at a chunk's start, I softmax(matrix) along its rows of length I; inside it they decay to 1 and take what the matrix
            gains, less the mean of each row.
        start: matrices at the start of a document, [H, O, K] and [H, K, O]; needed with `reset`.
        reset, valid: bool [B, T]: first token of a document; False where the token is padding.
    Returns:
        y [B, T, H, K], 0 at padding; the matrices after the last token; those at the start of its chunk; the last change (None
        without momentum); the new phase.
    """
    width = q.shape[-1]
    shared = tuple(x.expand(*q.shape[:3], x.shape[-1]) for x in (eta, log_alpha))
    kind = (BIASES[settings.bias], LINKS[settings.link], RULES[settings.rule])
    code = memory(width, state.first.shape[-2], *kind, q.dtype == torch.float64)
    assert code is not None
    table = _Table.of(code, q, phase, settings.chunk_size, reset, valid)
    extra = (None, None, None) if rows is None else (rows[0].expand(*q.shape[:3], 1), *rows[1:])
    matrices = (*state, *anchor, *(momentum or (None, None)), *(start or (None, None)))
    y, *states = _Native.apply(
        table, settings, torch.is_grad_enabled(), q, k, v, *shared, delta, log_momentum, *matrices, *slow, radius, *extra
    )
    carried = Perceptron(*states[4:]) if momentum else None
    return y, Perceptron(*states[:2]), Perceptron(*states[2:4]), carried, table.phase


class _Call(ctypes.Structure):
    """The C struct `Call`."""

    _fields_ = (
        *(
            (name, SIZE)
            for name in ("batch", "heads", "length", "rows", "segments", "eta_channels", "alpha_channels", "delta_channels")
        ),
        ("threads", ctypes.c_int),
        ("sharpness", ctypes.c_double),
        ("retention", ctypes.c_double),
        *((name, POINTER) for name in ("order", "n_entries", "closed", "table")),
        *((name, POINTER) for name in ("q", "k", "v", "eta", "log_alpha", "delta", "log_momentum", "scale", "shift", "radius")),
        *((name, POINTER) for name in ("log_alpha_first", "kept_first", "kept_last", "start_first", "start_last")),
        *((name, POINTER) for name in ("first", "last", "anchor_first", "anchor_last")),
        *((name, POINTER) for name in ("momentum_first", "momentum_last", "y")),
        *((name, POINTER) for name in ("saved", "written", "read")),
    )


class _Gradients(ctypes.Structure):
    """The C struct `Gradients`."""

    _fields_ = tuple(
        (name, POINTER)
        for name in (
            *("y", "q", "k", "v", "eta", "log_alpha", "delta", "log_momentum", "scale", "shift", "radius"),
            *("log_alpha_first", "kept_first", "kept_last"),
            *("start_first", "start_last", "first", "last", "anchor_first", "anchor_last", "momentum_first", "momentum_last"),
        )
    )


class _Table(NamedTuple):
    """How the tokens of each batch element are cut: order [B, T], entries [B, T, 5], their number and whether the last chunk is full
    [B] (all int32), segments per head, the phase after."""

    code: ctypes.CDLL
    order: Tensor
    entries: Tensor
    n_entries: Tensor
    closed: Tensor
    segments: int
    phase: Tensor
    padded: bool

    @classmethod
    def of(
        cls, code: ctypes.CDLL, q: Tensor, phase: Tensor, chunk_size: int, reset: Tensor | None, valid: Tensor | None
    ) -> _Table:
        batch, length = q.shape[:2]
        order, closed, n_entries = (torch.empty(shape, dtype=torch.int32) for shape in ((batch, length), (batch,), (batch,)))
        entries = torch.empty(batch, length, ENTRY_COLUMNS, dtype=torch.int32)
        after = phase.detach().clone().contiguous()
        flags = [None if x is None else x.contiguous() for x in (valid, reset)]
        tensors = (*flags, after, order, entries, n_entries, closed)
        segments = code.plan(batch, length, chunk_size, *map(_pointer, tensors))
        return cls(code, order, entries, n_entries, closed, segments, after, valid is not None)


# Where things lie among the inputs of `_Native`: per token; states, anchors and momentum; of new documents; learned; of link "simplex".
_TOKENS, _STATES, _STARTS, _SLOW, _ROWS = slice(0, 7), slice(7, 13), slice(13, 15), slice(15, 18), slice(18, None)


class _Native(torch.autograd.Function):
    """Forward keeps the inputs, states at segments' starts and what the norms take; backward replays segment by segment."""

    @staticmethod
    def forward(ctx: Any, table: _Table, settings: Settings, learning: bool, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        tensors = [None if x is None else x.detach().contiguous() for x in inputs]
        q, first = tensors[0], tensors[_STATES][0]
        assert q is not None
        assert first is not None
        y = torch.zeros_like(q) if table.padded else torch.empty_like(q)
        kept: tuple[Tensor | None, ...] = (None, None, None)
        if learning and any(ctx.needs_input_grad):
            kept = (
                q.new_empty(*first.shape[:2], table.segments, 2 * (1 + (settings.rule == "momentum")), *first.shape[2:]),
                torch.empty_like(q),
                torch.empty_like(q),
            )
        states = [None if x is None else x.clone() for x in tensors[_STATES]]
        table.code.forward(ctypes.byref(_call(table, settings, tensors, states, y, kept)))
        shrinking = settings.link == "identity" and settings.retention > 0
        ctx.save_for_backward(*tensors, *kept, *(states[:2] if shrinking else (None, None)))
        ctx.table, ctx.settings = table, settings
        return y, *(x for x in states if x is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_states: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: checkpointing allows no second time
        tensors, kept, shrunk = list(saved[:-5]), saved[-5:-2], saved[-2:]
        table = ctx.table
        empty = torch.zeros_like if table.padded else torch.empty_like
        d_tokens = [None if x is None else empty(x) for x in tensors[_TOKENS]]
        given: list[Tensor | None] = [x.clone(memory_format=torch.contiguous_format) for x in d_states]
        for n, last in enumerate(shrunk):
            if last is not None:  # a chunk that the call's end made full left entries at zero, of the anchor too
                at_zero = (last == 0) & (table.closed != 0).view(-1, 1, 1, 1)
                given[n], given[2 + n] = (x.masked_fill(at_zero, 0) for x in (d_states[n], d_states[2 + n]))
        states = given + [None] * (len(tensors[_STATES]) - len(given))
        starts, slow = (
            [None if x is None else x.new_empty(len(d_y), *x.shape) for x in tensors[part]] for part in (_STARTS, _SLOW)
        )
        rows = [None if x is None else empty(x) for x in tensors[_ROWS]]
        call = _call(table, ctx.settings, tensors, tensors[_STATES], None, kept)
        d_y = d_y.contiguous()
        gradients = _Gradients(*map(_pointer, (d_y, *d_tokens, *slow, *rows, *starts, *states)))
        table.code.backward(ctypes.byref(call), ctypes.byref(gradients))
        shared = (None if x is None else x.sum(0) for x in (*starts, *slow))
        return None, None, None, *d_tokens, *states, *shared, *rows


def _call(
    table: _Table,
    settings: Settings,
    tensors: list[Tensor | None],
    states: list[Tensor | None],
    y: Tensor | None,
    kept: tuple[Tensor | None, ...],
) -> _Call:
    """The arguments of the C functions; every tensor has to outlive it."""
    q, _, _, eta, log_alpha, delta, _ = tensors[_TOKENS]
    assert q is not None
    assert eta is not None
    assert log_alpha is not None
    starts, slow = tensors[_STARTS], [*tensors[_SLOW], *tensors[_ROWS]]
    return _Call(
        *(*q.shape[:1], q.shape[2], q.shape[1], q.shape[1], table.segments),
        *(eta.shape[-1], log_alpha.shape[-1], 1 if delta is None else delta.shape[-1]),
        *(min(torch.get_num_threads(), q.shape[0] * q.shape[2]), settings.sharpness),
        settings.retention,
        *map(_pointer, (table.order, table.n_entries, table.closed, table.entries)),
        *map(_pointer, (*tensors[_TOKENS], *slow, *starts, *states, y, *kept)),
    )


def _pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's first element, None for none."""
    return None if x is None else x.data_ptr()
