"""What a scan refuses at its border: tensors of wrong shape or precision, before any kernel reads them.

Axis legend: B batch, T time, H heads, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.ops.miras.inputs import Inputs, check_channels, reduced, tree_map
from recollect.ops.miras.memories import Parameters
from recollect.ops.miras.spec import MirasSpec, MirasState


def check_shapes(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, valid: Tensor | None) -> None:
    """q, k, v and the masks of a call."""
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3] or v.dim() != 4:
        raise ValueError(
            f"q and k are [B, T, H, K] and v is [B, T, H, V]; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.shape[1]:
        raise ValueError("a call needs at least one token; got T=0")
    for name, flags in (("reset", reset), ("valid", valid)):
        if flags is not None and (flags.shape != q.shape[:2] or flags.dtype != torch.bool):
            raise ValueError(f"{name} is bool [B, T] = {list(q.shape[:2])}; got {flags.dtype} {list(flags.shape)}")


def check_gates(spec: MirasSpec, inputs: Inputs) -> None:
    """Channels of the gates, whose first three axes have been checked."""
    key_dim, value_dim = inputs.q.shape[-1], inputs.v.shape[-1]
    if spec.rule.implicit and inputs.eta.shape[-1] not in (1, value_dim):
        raise ValueError(
            f"gate 'eta' of the implicit rule has one number per head or per value channel ({value_dim}); "
            f"got {inputs.eta.shape[-1]} channels"
        )
    if spec.memory.kind == "parametric" and not spec.rule.implicit:
        check_channels("eta", inputs.eta, spec.memory, key_dim, value_dim)
        check_channels("log_alpha", inputs.log_alpha, spec.memory, key_dim, value_dim)
    for name, gate in zip(spec.bias.gates, inputs.bias, strict=True):
        if gate.shape[-1] not in (1, value_dim):
            raise ValueError(
                f"gate {name!r} has one number per head or per value channel ({value_dim}); got {gate.shape[-1]} channels"
            )


def check_parameters(spec: MirasSpec, inputs: Inputs, parameters: Parameters | None) -> Parameters:
    """The memory's parameters in the precision of the computation; zeros if there are none and the memory can start from them."""
    n_heads, key_dim, value_dim = *inputs.k.shape[2:], inputs.v.shape[-1]
    shapes = [(n_heads, *shape) for shape in spec.memory.shapes(key_dim, value_dim)]
    if parameters is None:
        if spec.memory.initial_std:
            raise ValueError(
                f"memory {spec.memory.name!r} cannot start from zeros (its gradient would be 0): "
                "pass parameters=spec.memory.init(n_heads, key_dim, value_dim)"
            )
        return Parameters(tuple(inputs.k.new_zeros(shape) for shape in shapes))
    slow = [(n_heads, value_dim)] * spec.memory.n_slow
    given = [[tuple(part.shape) for part in parts] for parts in parameters]
    if given != [shapes, slow]:
        raise ValueError(
            f"parameters of memory {spec.memory.name!r} are matrices of shapes {shapes} and slow ones of {slow}; "
            f"got {given[0]} and {given[1]}"
        )
    cast = tree_map(lambda part: part.to(inputs.q.dtype), parameters)
    assert isinstance(cast, Parameters)
    return cast


def check_state(spec: MirasSpec, inputs: Inputs, state: MirasState) -> MirasState:
    """The state in the precision of the computation. One that another spec or batch has left would be read beyond its end, or
    silently as something else; one of higher precision would lose it."""
    n_rows, n_heads = inputs.k.shape[0], inputs.k.shape[2]
    for part in _tensors(state):
        if torch.promote_types(part.dtype, inputs.q.dtype) != inputs.q.dtype:
            raise ValueError(f"the state is {part.dtype} but the scan computes in {inputs.q.dtype}: cast one of them")
        if part.shape[0] != n_rows:
            raise ValueError(f"the state has {part.shape[0]} batch rows, q has {n_rows}")
    state = tree_map(lambda part: part.to(inputs.q.dtype) if part.is_floating_point() else part, state)
    if spec.memory.kind != "parametric" or spec.rule.kind != "gradient":
        return state
    shapes = [(n_rows, n_heads, *shape) for shape in spec.memory.shapes(inputs.k.shape[-1], inputs.v.shape[-1])]
    stale, moving = spec.stale, spec.rule.momentum
    kept = None
    if spec.framed:
        like = inputs.k.new_empty(n_rows, n_heads, inputs.log_alpha.shape[-1])
        kept = [tuple(reduced(like, axis, spec.retention.row_constant).shape) for axis in spec.memory.axes]
    expected = (shapes, shapes if stale else None, kept, shapes if moving else None)
    names = ("dual", "anchor", "kept", "momentum")
    for name, held, wanted in zip(names, state[:4], expected, strict=True):
        found = None if held is None else [tuple(x.shape) for x in held]
        if found != wanted:
            raise ValueError(
                f"state.{name} is {_words(wanted)} for this spec, batch and head sizes; got {_words(found)}: "
                "a state goes on with the spec and the gates that it comes from"
            )
    width = spec.rule.window - 1
    if (state.tail is not None) != bool(width) or (state.tail is not None and state.tail.k.shape[1] != width):
        raise ValueError(f"state.tail holds the last {width} tokens for rule {spec.rule.name!r}; this state has another window")
    return state


def _words(shapes: Any) -> str:
    return "None" if shapes is None else f"of shapes {shapes}"


def _tensors(tree: Any) -> list[Tensor]:
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree for tensor in _tensors(part)]
