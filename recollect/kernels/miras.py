"""Which Miras scans the compiled perceptron memory runs, and how they are handed to it. Oracle: `backend="chunked"`."""

from __future__ import annotations

from torch import Tensor

from recollect.kernels.memory import Perceptron, Settings, can_run, perceptron_scan
from recollect.ops.miras.scan import Call
from recollect.ops.miras.spec import MirasSpec, MirasState


def can_scan(call: Call) -> bool:
    """Two gelu layers with norm and residual, gradient descent, no retention or plain decay, a bias that is built in."""
    spec = call.spec
    if spec.memory.name != "mlp" or (spec.memory.options[0], *spec.memory.options[2:]) != (2, "gelu", True, True):
        return False
    if spec.retention.name not in ("none", "l2", "l2_coupled") or spec.rule.name != "gd" or spec.gradient_at != "previous":
        return False
    bias = _bias(spec)
    return spec.chunk_size > 1 and bias is not None and can_run(call.inputs.q, call.parameters.fast[0].shape[1], bias)


def native(call: Call) -> tuple[Tensor, MirasState]:
    """The compiled form."""
    spec, inputs, state = call.spec, call.inputs, call.state
    bias = _bias(spec)
    assert bias is not None
    assert state.anchor is not None
    sharpness = float(spec.bias.options[0]) if bias == "l1" else 1.0
    y, dual, anchor, phase = perceptron_scan(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.eta,
        inputs.log_alpha,
        Perceptron(*state.dual),
        Perceptron(*state.anchor),
        (call.parameters.slow[0], call.parameters.slow[1]),
        state.phase,
        Settings(spec.chunk_size, bias, sharpness),
        delta=inputs.bias[0] if inputs.bias else None,
        start=None if call.reset is None else Perceptron(*call.parameters.fast),
        reset=call.reset,
        valid=call.valid,
    )
    return y, MirasState(tuple(dual), tuple(anchor), None, None, None, phase)


def _bias(spec: MirasSpec) -> str | None:
    """The kernel's name of the attentional bias, None if it is not built in."""
    name, options = spec.bias.name, spec.bias.options
    if name in ("l2", "l1"):
        return name
    if name == "lp" and options[0] == 3:
        return "lp3"
    return "huber" if name == "huber" and options[0] == "coordinate" else None
