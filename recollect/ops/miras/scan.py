"""Run a Miras spec over a sequence: one call for every memory, bias, retention and rule.

Axis legend: B batch, T time, H heads, K key dim, V value dim, S cached keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops import forms, plugins
from recollect.ops.miras.checks import check_gates, check_parameters, check_shapes, check_state
from recollect.ops.miras.chunked import chunked
from recollect.ops.miras.closed import delta_rule, hebbian, own_scan
from recollect.ops.miras.inputs import Inputs, reduced
from recollect.ops.miras.memories import Parameters
from recollect.ops.miras.sequential import sequential
from recollect.ops.miras.slots import lay_out, whole
from recollect.ops.miras.spec import MirasSpec, MirasState, Tail, held
from recollect.ops.tiles import products_dtype


class Call(NamedTuple):
    """One scan with everything checked and in one precision. `start` is the state at the start of a document (None: none starts
    here), which is `learned` if the caller gave parameters; `products` is the dtype that matrix products may be taken in, `backend`
    the form that the caller named."""

    spec: MirasSpec
    inputs: Inputs
    state: MirasState
    start: MirasState | None
    parameters: Parameters
    reset: Tensor | None
    valid: Tensor | None
    decay_floor: float | None
    learned: bool
    products: torch.dtype
    backend: str | None


Backend = Callable[[Call], tuple[Tensor, MirasState]]
BACKENDS: dict[str, Backend] = {}
# Of a faster equal, by its name: why it cannot run a call, "" where it can; and whether it is meant for it (`forms.choose`).
LACKS: dict[str, Callable[[Call], str]] = {}
PREFERRED: list[tuple[str, Callable[[Call], bool]]] = []


def scan(
    spec: MirasSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: MirasState | None = None,
    *,
    parameters: Parameters | None = None,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    decay_floor: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MirasState]:
    """Write every token into the memory, then read it: y_t = read(W_t; q_t).

    Args:
        spec: the four choices; see `MirasSpec`.
        q, k: [B, T, H, K]; v: [B, T, H, V]. With rule multi_step(n): k [B, T, n, H, K], v [B, T, n, H, V].
        gates: by name, each [B, T, H] or, acting on channels, [B, T, H, channels].
            "eta" > 0: the step size, 1 if left out; [B, T, n, H] for multi_step, value channels for the implicit rule.
            "alpha" in [0, 1], or its logarithm "log_alpha": what is kept, 1 if left out. At 0 it takes no gradient.
            "momentum" in [0, 1], or "log_momentum", likewise. "gamma": the weight of a token in a window. The bias' own ("delta").
            "write" [B, T, H, K], delta rule only: the key under which the value is written, in place of eta k (RWKV-7).
        state: what the previous call returned; None: the start of the sequence.
        parameters: what is learned of the memory, from `spec.memory.init`; None: zeros, for memories of one matrix or vector.
        reset: bool [B, T], True at the first token of a document: the memory is as before the first token.
        valid: bool [B, T], False at padding: it changes nothing, and y is 0 there.
        decay_floor: the most negative log alpha that one token can have, if known: fewer, larger matrix products.
        backend: None: the fastest that can run; "chunked": matrix products; "native" (CPU) and "triton" (GPU): a compiled
            kernel, for specs that have one; "sequential": token by token, the oracle.
    Returns:
        y [B, T, H, V] in q's dtype, and the state after the last token (fp32; fp64 for fp64 input).
        Chunks of one token always read exactly. Softmax attention takes padding on the left only.
    Raises:
        ValueError: shapes that do not fit, gates that the spec does not have, parameters left out that the memory needs.
        RuntimeError: a backend that cannot run this spec here.
    Source: Behrouz et al. 2025, arXiv 2504.13173, section 3 and Eq. 28. It prints no read: after the write is TTT's, arXiv 2407.04620.
    """
    if backend is not None and backend not in backends():
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(sorted(backends()))}")
    if spec.rule.n_steps > 1 or k.dim() == 5:
        return _several_steps(spec, q, k, v, gates, state, parameters, reset, valid, decay_floor, backend)
    check_shapes(q, k, v, reset, valid)
    exact, products = torch.promote_types(q.dtype, torch.float32), products_dtype(q, k, v)
    inputs, write = _inputs(spec, q.to(exact), k.to(exact), v.to(exact), gates)
    if state is not None:
        state = check_state(spec, inputs, state)
    learned = parameters is not None
    closed = spec.memory.kind != "parametric" or spec.rule.kind != "gradient" or write is not None or spec.rule.implicit
    if closed and backend not in (None, "chunked", "sequential"):
        raise RuntimeError(
            f"backend {backend!r} cannot run memory {spec.memory.name!r} with rule {spec.rule.name!r}; pass backend='chunked'"
        )
    if spec.memory.kind != "parametric" or spec.rule.kind != "gradient":
        if learned:
            raise ValueError(f"memory {spec.memory.name!r} with rule {spec.rule.name!r} starts empty: leave parameters out")
        y, after = own_scan(spec, inputs, state, reset, valid, backend)
        return y.to(q.dtype), after
    if write is not None or spec.rule.implicit:
        if learned and reset is not None:
            raise ValueError("documents of this form of the delta rule start from zeros: leave parameters or reset out")
        if learned and state is None:
            state = _start(spec, inputs, check_parameters(spec, inputs, parameters))
        y, after = delta_rule(spec, inputs, write, state, reset, valid, decay_floor, products, backend)
        return y.to(q.dtype), after
    parameters = check_parameters(spec, inputs, parameters)
    start = None if state is not None and reset is None else _start(spec, inputs, parameters)  # decoding needs none
    if state is None:
        assert start is not None
        state = start
    call = Call(spec, inputs, state, start, parameters, reset, valid, decay_floor, learned, products, backend)
    y, after = _choose(call, backend)(call)
    return y.to(q.dtype), after


def backends() -> dict[str, Backend]:
    """Every form of the scan by name, the plugins' included."""
    plugins.load()
    return BACKENDS


def _choose(call: Call, backend: str | None) -> Backend:
    """The form that will run: `backend` if named, else as `forms.choose` has it."""
    known, op = backends(), f"scan of memory {call.spec.memory.name!r}"
    if backend is None:
        n_tokens = call.inputs.q.shape[0] * call.inputs.q.shape[1]
        backend = forms.choose(op, (call,), PREFERRED, LACKS, plain="chunked", n_tokens=n_tokens)
    elif backend in LACKS and (why := LACKS[backend](call)):
        raise forms.refuse(op, backend, why, "chunked")
    return known[backend]


def _chunked(call: Call) -> tuple[Tensor, MirasState]:
    """Matrix products: the exact forms of linear memories where there is one, else chunks."""
    spec, inputs, state, reset, valid = call.spec, call.inputs, call.state, call.reset, call.valid
    zeros = reset is None or not call.learned  # what the forms below take documents to start from
    if spec.hebbian and zeros:
        return hebbian(spec, inputs, state, reset, valid, call.decay_floor, call.products, call.backend)
    if spec.linear and spec.bias.name == "l2" and spec.chunk_size == 1 and spec.rule.name in ("gd", "multi_step") and zeros:
        return delta_rule(spec, inputs, None, state, reset, valid, call.decay_floor, call.products, call.backend)
    batch_size, n_tokens = inputs.q.shape[:2]
    if reset is None and valid is None and (state is call.start or not spec.stale):
        slots = whole(n_tokens, batch_size, spec.chunk_size, inputs.q.device)
    else:
        slots = lay_out(state.phase, n_tokens, spec.chunk_size, valid, reset)
    return chunked(spec, inputs, state, call.start, call.parameters, slots, floor=call.decay_floor)


def _sequential(call: Call) -> tuple[Tensor, MirasState]:
    """Token by token."""
    return sequential(call.spec, call.inputs, call.state, call.start, call.parameters, reset=call.reset, valid=call.valid)


def initial_state(
    spec: MirasSpec, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], *, parameters: Parameters | None = None
) -> MirasState:
    """The state before the first token of a sequence like this one (whose T may be 0): what `scan` starts from without a state.

    Args:
        spec, q, k, v, gates, parameters: as `scan` takes them; of the tensors only sizes, precision and device matter.
    Raises:
        ValueError: as `scan` does.
    """
    if k.dim() == 5:
        k, v, gates = k[:, :, 0], v[:, :, 0], {**gates, **({"eta": gates["eta"][:, :, 0]} if "eta" in gates else {})}
    exact = torch.promote_types(q.dtype, torch.float32)
    inputs, _ = _inputs(spec, q.to(exact), k.to(exact), v.to(exact), gates)
    n_rows, _, n_heads, key_dim = inputs.k.shape
    value_dim = inputs.v.shape[-1]
    if spec.memory.kind == "growing":
        return held((inputs.k[:, :0], inputs.v[:, :0]))
    if spec.memory.kind == "slots":
        sizes = [(spec.memory.n_slots, key_dim), (spec.memory.n_slots, value_dim)]
        return held(tuple(inputs.k.new_zeros(n_rows, n_heads, *size) for size in sizes))
    if spec.rule.kind == "least_squares":
        sizes = [(value_dim, key_dim), (key_dim, key_dim)]
        return held(tuple(inputs.k.new_zeros(n_rows, n_heads, *size) for size in sizes))
    return _start(spec, inputs, check_parameters(spec, inputs, parameters))


def _start(spec: MirasSpec, like: Inputs, parameters: Parameters) -> MirasState:
    """The state before the first token, for the batch, dtype and device of `like`."""
    batch_size, _, n_heads, _ = like.k.shape
    phase = torch.zeros(batch_size, dtype=torch.int64, device=like.k.device)
    dual = tuple(spec.retention.start(initial).expand(batch_size, *initial.shape).clone() for initial in parameters.fast)
    anchor = dual if spec.stale else None
    channels = like.log_alpha.shape[-1]
    kept, tail, width = None, None, spec.rule.window - 1
    if spec.framed:
        kept = tuple(
            reduced(like.k.new_zeros(batch_size, n_heads, channels), axis, spec.retention.row_constant)
            for axis in spec.memory.axes
        )
    momentum = tuple(torch.zeros_like(z) for z in dual) if spec.rule.momentum else None
    if width:
        empty = like.map(lambda part: part.new_zeros(batch_size, width, *part.shape[2:]))
        tail = Tail(empty.k, empty.v, empty.k.new_zeros(batch_size, width, n_heads), _harmless(like.bias, width))
    return MirasState(dual, anchor, kept, momentum, tail, phase)


def _harmless(gates: tuple[Tensor, ...], width: int) -> tuple[Tensor, ...]:
    """The bias' gates of tokens that do not exist: ones, which no bias divides by."""
    return tuple(gate.new_ones(gate.shape[0], width, *gate.shape[2:]) for gate in gates)


# --- what comes in ----------------------------------------------------------------------------------------------------------


def _inputs(spec: MirasSpec, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> tuple[Inputs, Tensor | None]:
    """Everything under its name and in the dtype of q, and RWKV-7's write key."""
    allowed = {*spec.bias.gates, *spec.rule.gates}
    allowed |= {"eta"} if spec.memory.kind == "parametric" else set()
    allowed |= {"alpha", "log_alpha"} if spec.retention.decays else set()
    allowed |= {"log_momentum"} if "momentum" in spec.rule.gates else set()
    allowed |= (
        {"write"} if spec.linear and spec.bias.name == "l2" and spec.chunk_size == 1 and spec.rule.name == "gd" else set()
    )
    given = {} if spec.retention.couple is None else dict(spec.retention.couple(gates))
    given = {**gates, **given}
    for name, gate in gates.items():
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(
                f"this spec (bias {spec.bias.name!r}, retention {spec.retention.name!r}, rule {spec.rule.name!r}) has no gate "
                f"{name!r}{hint} its gates: {', '.join(sorted(allowed))}"
            )
        if gate.shape[:3] != q.shape[:3] or gate.dim() not in (3, 4):
            raise ValueError(
                f"gate {name!r} is [B, T, H] or [B, T, H, channels] with {list(q.shape[:3])}; got {list(gate.shape)}"
            )

    def channels(name: str, default: float) -> Tensor:
        gate = given.get(name)
        if gate is None:
            return q.new_full((*q.shape[:3], 1), default)
        return (gate if gate.dim() == 4 else gate.unsqueeze(-1)).to(q.dtype)

    def per_head(name: str, default: float) -> Tensor:
        gate = given.get(name)
        if gate is not None and gate.dim() != 3:
            raise ValueError(f"gate {name!r} is one number per head, [B, T, H]; got {list(gate.shape)}")
        return q.new_full(q.shape[:3], default) if gate is None else gate.to(q.dtype)

    for name in ("alpha", "momentum"):
        if name in gates and f"log_{name}" in gates:
            raise ValueError(f"give {name!r} or its logarithm 'log_{name}', not both")
    log_alpha = channels("log_alpha", 0.0) if "alpha" not in given else _log(channels("alpha", 1.0))
    log_momentum, gamma = None, None
    if spec.rule.momentum:
        log_momentum = per_head("log_momentum", 0.0) if "momentum" not in given else _log(per_head("momentum", 1.0))
    if "gamma" in spec.rule.gates:
        gamma = per_head("gamma", 1.0)
    missing = [name for name in spec.bias.gates if name not in given]
    if missing:
        raise ValueError(f"bias {spec.bias.name!r} needs the gate {missing[0]!r}, [B, T, H] or [B, T, H, V]")
    eta, bias = channels("eta", 1.0), tuple(channels(name, 0.0) for name in spec.bias.gates)
    inputs = Inputs(q, k, v, eta, log_alpha, log_momentum, gamma, bias)
    check_gates(spec, inputs)
    write = given.get("write")
    if write is not None and write.shape != k.shape:
        raise ValueError(f"gate 'write' is [B, T, H, K] = {list(k.shape)}; got {list(write.shape)}")
    return inputs, None if write is None else write.to(q.dtype)


def _log(gate: Tensor) -> Tensor:
    """Logarithm of a gate in [0, 1]; 0 becomes the smallest number there is, and takes no gradient."""
    return gate.clamp_min(torch.finfo(gate.dtype).tiny).log()


def _several_steps(
    spec: MirasSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: MirasState | None,
    parameters: Parameters | None,
    reset: Tensor | None,
    valid: Tensor | None,
    decay_floor: float | None,
    backend: str | None,
) -> tuple[Tensor, MirasState]:
    """n steps per token are n tokens: alpha acts before the first, and the last one reads."""
    n_steps = spec.rule.n_steps
    if k.dim() != 5 or v.dim() != 5 or k.shape[2] != n_steps or v.shape[2] != n_steps:
        raise ValueError(
            f"rule {spec.rule.name!r} with {n_steps} steps per token takes k [B, T, {n_steps}, H, K] and v [B, T, {n_steps}, H, V]; "
            f"got k {tuple(k.shape)}, v {tuple(v.shape)}"
        )

    def spread(name: str, gate: Tensor) -> Tensor:
        if name == "eta":
            return gate.flatten(1, 2)
        every = gate.unsqueeze(2).expand(-1, -1, n_steps, *gate.shape[2:])
        if name in ("alpha", "log_alpha"):
            rest = torch.full_like(gate, float(name == "alpha")).unsqueeze(2).expand(-1, -1, n_steps - 1, *gate.shape[2:])
            every = torch.cat((gate.unsqueeze(2), rest), dim=2)
        return every.flatten(1, 2)

    one = MirasSpec(
        memory=spec.memory,
        bias=spec.bias,
        retention=spec.retention,
        rule=spec.rule._replace(n_steps=1),
        chunk_size=spec.chunk_size * (n_steps if spec.chunk_size > 1 else 1),
        gradient_at=spec.gradient_at,
        read=spec.read,
    )
    first = torch.arange(q.shape[1] * n_steps, device=q.device) % n_steps == 0
    y, after = scan(
        one,
        q.repeat_interleave(n_steps, dim=1),
        k.flatten(1, 2),
        v.flatten(1, 2),
        {name: spread(name, gate) for name, gate in gates.items()},
        state,
        parameters=parameters,
        reset=None if reset is None else reset.repeat_interleave(n_steps, dim=1) & first,
        valid=None if valid is None else valid.repeat_interleave(n_steps, dim=1),
        decay_floor=decay_floor,
        backend=backend,
    )
    return y[:, n_steps - 1 :: n_steps], after


BACKENDS.update(chunked=_chunked, sequential=_sequential)
