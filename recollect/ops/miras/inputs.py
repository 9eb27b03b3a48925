"""The tensors of a scan under their names, in one precision, with the gates that were left out filled in.

Axis legend: B batch, T time, H heads, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.ops.miras.memories import Memory


class Inputs(NamedTuple):
    """q, k [B, T, H, K]; v [B, T, H, V]; eta, log_alpha and the bias' own gates [B, T, H, 1 or channels]; log_momentum and gamma
    [B, T, H], None where the rule has no such gate."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    log_momentum: Tensor | None
    gamma: Tensor | None
    bias: tuple[Tensor, ...]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        """`fn` of every tensor."""
        mapped = tree_map(fn, self)
        assert isinstance(mapped, Inputs)
        return mapped

    def step(self, n: int) -> Inputs:
        """One step along the first axis."""
        return self.map(lambda part: part[n])

    def at(self, t: int) -> Inputs:
        """One step along the second axis: token t [B, H, ...]."""
        return self.map(lambda part: part[:, t])


def reduced(gate: Tensor, axis: str, row_constant: bool = False, *, log: bool = False) -> Tensor:
    """A gate [..., channels] as a matrix uses it: its mean over channels [..., 1] where its channels are no axis of the matrix.

    Args:
        axis: the matrix' gate axis ("input", "output" or "mean").
        row_constant: the gate must not vary along a row (Memora's alpha: the softmax runs along it).
        log: the gate is a logarithm; the mean is of what it is the logarithm of.
    """
    if gate.shape[-1] == 1 or axis == "output" or (axis == "input" and not row_constant):
        return gate
    if log:
        return gate.logsumexp(-1, keepdim=True) - torch.tensor(gate.shape[-1], dtype=gate.dtype).log().item()
    return gate.mean(-1, keepdim=True)


def on_axis(gate: Tensor, axis: str, row_constant: bool = False, *, log: bool = False) -> Tensor:
    """`reduced`, with the axes of a matrix: [..., channels] -> [..., 1, I], [..., O, 1] or [..., 1, 1]."""
    gate = reduced(gate, axis, row_constant, log=log)
    return gate.unsqueeze(-1) if axis == "output" else gate.unsqueeze(-2)


def check_channels(name: str, gate: Tensor, memory: Memory, key_dim: int, value_dim: int) -> None:
    """Refuse a channel-wise gate whose channels are not those of the axes that it acts on."""
    n_channels = gate.shape[-1]
    for (rows, columns), axis in zip(memory.shapes(key_dim, value_dim), memory.axes, strict=True):
        expected = {"input": columns, "output": rows, "mean": n_channels}[axis]
        if n_channels not in (1, expected):
            raise ValueError(
                f"gate {name!r} has {n_channels} channels; it acts on the {axis} axis of a [{rows}, {columns}] matrix of memory "
                f"{memory.name!r}: give it {expected} channels, or one number per head ([B, T, H])"
            )


def tree_map(fn: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """`fn` of the tensors in the same place of nested tuples; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return fn(tree, *others)
    parts = [tree_map(fn, *pieces) for pieces in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def choose(flags: Tensor, yes: Any, no: Any) -> Any:
    """Nested tuples of tensors, row by row: `yes` where `flags` [B] is True, else `no`."""
    return tree_map(lambda a, b: torch.where(flags.view(-1, *(1,) * (a.dim() - 1)), a, b), yes, no)


def named(names: tuple[str, ...], gates: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    """The bias' gates by name."""
    return dict(zip(names, gates, strict=True))
