"""Which Miras scans the kernels of perceptron and matrix memories run, and how they are handed to them. Oracle: `backend="chunked"`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recollect.kernels import memory
from recollect.kernels.memory import Perceptron, Settings, perceptron_scan
from recollect.kernels.triton import BIASES, lacks_matrix, lacks_memory
from recollect.ops.miras.biases import AttentionalBias
from recollect.ops.miras.inputs import reduced
from recollect.ops.miras.retentions import NORM_EPS, Retention, q_norm
from recollect.ops.miras.scan import Call
from recollect.ops.miras.spec import MirasSpec, MirasState


def meant(call: Call) -> bool:
    """For a perceptron memory on a CPU."""
    return call.spec.memory.name == "mlp" and call.inputs.q.device.type == "cpu"


def meant_on_gpu(call: Call) -> bool:
    """For a perceptron on a GPU, and one matrix that has no closed form."""
    spec = call.spec
    return call.inputs.q.is_cuda and (spec.memory.name == "mlp" or (spec.memory.name == "matrix" and _walked(spec)))


def lacks(call: Call) -> str:
    """Why the compiled form cannot run, "" where it can: two gelu layers with norm and residual, gradient descent (with momentum), a
    retention and a bias that are built in."""
    if why := _unknown(call):
        return why
    return memory.lacks(call.inputs.q, call.parameters.fast[0].shape[1], *_built_in(call))


def lacks_on_gpu(call: Call) -> str:
    """The same of the Triton kernels, and one matrix in chunks of several tokens."""
    if call.spec.memory.name == "matrix":
        return _unknown_matrix(call) or lacks_matrix(call.inputs.q, call.inputs.v)
    return _unknown(call) or lacks_memory(call.inputs.q, call.parameters.fast[0].shape[1], *_built_in(call))


def native(call: Call) -> tuple[Tensor, MirasState]:
    """The compiled form."""
    return _scanned(call, perceptron_scan)


def triton(call: Call) -> tuple[Tensor, MirasState]:
    """The Triton kernels; triton is imported on first use."""
    if call.spec.memory.name == "matrix":
        return _scanned_matrix(call)
    from recollect.kernels.triton.perceptron import perceptron_scan

    return _scanned(call, perceptron_scan)


def _scanned(
    call: Call, run: Callable[..., tuple[Tensor, Perceptron, Perceptron, Perceptron | None, Tensor]]
) -> tuple[Tensor, MirasState]:
    """The call as `recollect.kernels.memory.perceptron_scan` takes it, and what comes back as a state."""
    spec, inputs, state = call.spec, call.inputs, call.state
    bias, link, rule = _built_in(call)
    assert state.anchor is not None
    log_momentum = call.inputs.log_momentum
    if spec.rule.momentum and log_momentum is None:
        log_momentum = torch.zeros_like(inputs.eta[..., 0])
    y, dual, anchor, momentum, phase = run(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.eta,
        inputs.log_alpha,
        Perceptron(*state.dual),
        Perceptron(*state.anchor),
        (call.parameters.slow[0], call.parameters.slow[1]),
        state.phase,
        _settings(spec, bias, link, rule),
        delta=inputs.bias[0] if inputs.bias else None,
        log_momentum=log_momentum,
        momentum=None if state.momentum is None else Perceptron(*state.momentum),
        radius=_radius(call) if link == "scaled" else None,
        rows=_rows(call) if link == "simplex" else None,
        start=None if call.reset is None else Perceptron(*call.parameters.fast),
        reset=call.reset,
        valid=call.valid,
    )
    return y, MirasState(tuple(dual), tuple(anchor), _kept(call, phase), momentum and tuple(momentum), None, phase)


def _scanned_matrix(call: Call) -> tuple[Tensor, MirasState]:
    """The same of a matrix memory."""
    from recollect.kernels.triton.matrix import matrix_scan

    spec, inputs, state = call.spec, call.inputs, call.state
    bias = _bias(spec)
    assert bias is not None
    assert state.anchor is not None
    v, initial, log_alpha, link = inputs.v, call.parameters.fast[0], inputs.log_alpha, _link(spec) or "identity"
    kept, beside = None, None
    # What the kernel does not know is a part of values and outputs: towards_initial's first matrix (it has the change), and of the
    # weights K softmax - 1 + 1 of kl the last 1.
    if spec.retention.name == "towards_initial":
        v, beside = v - torch.einsum("bthk,hvk->bthv", inputs.k, initial), torch.einsum("bthk,hvk->bthv", inputs.q, initial)
    if link == "simplex":
        assert state.kept is not None
        log_alpha, kept = reduced(log_alpha, "input", row_constant=True, log=True), state.kept[0]
        v, beside = v - inputs.k.sum(-1, keepdim=True), inputs.q.sum(-1, keepdim=True)
    y, dual, anchor, phase = matrix_scan(
        inputs.q,
        inputs.k,
        v,
        inputs.eta,
        log_alpha,
        state.dual[0],
        state.anchor[0],
        state.phase,
        _settings(spec, bias, link),
        delta=inputs.bias[0] if inputs.bias else None,
        start=None if call.reset is None else spec.retention.start(initial),
        radius=_radius(call)[:, 0] if link == "scaled" else None,
        kept=kept,
        reset=call.reset,
        valid=call.valid,
    )
    if beside is not None:
        y = y + (beside if call.valid is None else beside * call.valid[:, :, None, None])
    return y, MirasState((dual,), (anchor,), _kept(call, phase), None, None, phase)


def _walked(spec: MirasSpec) -> bool:
    """Whether one matrix is written by gradients that read it, in chunks of several tokens: all else has a closed form."""
    return spec.bias.reads and spec.stale


def _unknown_matrix(call: Call) -> str:
    """Which part of the spec the kernel of one matrix does not know; "" if none."""
    spec = call.spec
    if not _walked(spec):
        return "it has chunks of several tokens and biases that read; the others have a closed form"
    if spec.rule.name != "gd":
        return f"it has no rule {spec.rule.name!r} for one matrix"
    if _link(spec) is None and spec.retention.name != "towards_initial":
        return _no("retention", spec.retention)
    return "" if _bias(spec) else _no("bias", spec.bias)


def _unknown(call: Call) -> str:
    """Which part of the spec the kernels of perceptrons do not know; "" if none."""
    spec = call.spec
    if spec.memory.name != "mlp" or (spec.memory.options[0], *spec.memory.options[2:]) != (2, "gelu", True, True):
        return "it has memories of two gelu layers with norm and residual"
    if _bias(spec) is None:
        return _no("bias", spec.bias)
    if _link(spec) is None:
        return _no("retention", spec.retention)
    if spec.gradient_at != "previous" or spec.chunk_size == 1:
        return "it takes gradients at the chunk's first matrices, in chunks of several tokens"
    scalar = call.inputs.eta.shape[-1] == 1 and call.inputs.log_alpha.shape[-1] == 1
    if spec.rule.momentum and (not scalar or spec.retention.couple is not None):
        return "it has momentum with one gate a token and a decay of its own"
    return ""


def _no(kind: str, part: AttentionalBias | Retention) -> str:
    """What is not built in, with what it was made of."""
    return f"it has no {kind} {part.name!r}" + (f" with {part.options}" if part.options else "")


def _built_in(call: Call) -> tuple[str, str, str]:
    """The kernels' names of the bias, the link and the rule, all known."""
    bias, link = _bias(call.spec), _link(call.spec)
    assert bias is not None
    assert link is not None
    return bias, link, call.spec.rule.name


def _settings(spec: MirasSpec, bias: str, link: str, rule: str = "gd") -> Settings:
    """What is the same at every token, by the kernels' names."""
    sharpness = float(spec.bias.options[0]) if bias in ("l1", "lp", "l_infinity") else 1.0
    retention = _exponent(spec.retention) if link == "scaled" else _threshold(spec)
    return Settings(spec.chunk_size, bias, sharpness, link, rule, retention)


def _threshold(spec: MirasSpec) -> float:
    """By how much a full chunk ends with entries nearer to zero."""
    return spec.chunk_size * float(spec.retention.options[0] or 0) if spec.retention.name == "elastic_net" else 0.0


def _radius(call: Call) -> Tensor:
    """Where each matrix starts to shrink, [H, number of matrices]: what was asked for, or the l_q norm of what is learned of it; of
    the paper's, which always scales, -1."""
    fast, (_, mode, given) = call.parameters.fast, call.spec.retention.options
    if mode == "paper" or given is not None:
        return fast[0].new_full((len(fast[0]), len(fast)), -1.0 if mode == "paper" else float(given or 0))
    norms = [q_norm(initial, _exponent(call.spec.retention)) + NORM_EPS for initial in fast]
    return torch.cat(norms, dim=-1).squeeze(-2)


def _exponent(retention: Retention) -> float:
    """q of lq."""
    return float(retention.options[0] or 0)


def _rows(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The decay of the first matrix, one number per token, and of both since the start of the open chunk."""
    assert call.state.kept is not None
    first, last = call.state.kept
    return reduced(call.inputs.log_alpha, "input", row_constant=True, log=True), first, last


def _kept(call: Call, phase: Tensor) -> tuple[Tensor, ...] | None:
    """The decay since the start of the chunk that is open after the call, as `MirasState` has it."""
    spec, before, log_alpha, valid = call.spec, call.state.kept, call.inputs.log_alpha, call.valid
    if before is None:
        return None
    if valid is None:
        log_alpha = log_alpha[:, -spec.chunk_size :]
        valid = log_alpha.new_ones(log_alpha.shape[:2], dtype=torch.bool)
    later = valid.flip(1).cumsum(1).flip(1)  # tokens from this one to the last
    inside = (valid & (later <= phase[:, None]))[:, :, None, None]
    held = (later[:, 0] < phase)[:, None, None]  # the chunk was open before the call

    def of(old: Tensor, axis: str) -> Tensor:
        gate = reduced(log_alpha, axis, spec.retention.row_constant, log=True)
        return torch.where(inside, gate, 0).sum(1) + torch.where(held, old, 0)

    return tuple(of(old, axis) for old, axis in zip(before, spec.memory.axes, strict=True))


def _bias(spec: MirasSpec) -> str | None:
    """The kernels' name of the attentional bias, None if none of them has it."""
    name, options = spec.bias.name, spec.bias.options
    if name == "huber":
        return {"coordinate": "huber", "norm": "huber_norm"}.get(str(options[0]))
    if name == "lp":
        return "l2" if options[0] == 2 else "lp3" if options[0] == 3 else "lp"
    return name if name in BIASES else None


def _link(spec: MirasSpec) -> str | None:
    """The kernel's name of the retention's map from dual to weights, None if it is not built in."""
    if spec.retention.name in ("none", "l2", "l2_coupled"):
        return "identity"
    if spec.read != "linear":
        return None
    if spec.retention.name == "elastic_net":
        return "identity"
    if spec.retention.name == "kl" and spec.retention.options == (None,):
        return "simplex"
    if spec.retention.name != "lq" or spec.retention.options[1] == "ftrl":
        return None
    return "identity" if _exponent(spec.retention) == 2 else "scaled"
