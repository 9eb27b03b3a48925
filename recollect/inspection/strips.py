"""One number per token and head, and reading a recurrence piece by piece.

Axis legend: B batch (1), T time, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEASUREMENTS = 256  # a memory is measured about so often along a text
TIMED = ("q", "k", "v", "eta", "log_decay", "x", "dt", "b", "c", "reset", "valid")  # arguments with a time axis, the second
READ_NORM = ("Read norm", "|y_t|: what the memory answers to the query, before the layer's own norm and gate.")


class Strip(NamedTuple):
    """key: unique in its layer; what: a sentence; values [H, T], nan where undefined; measured: the tokens after which it was
    measured, the others showing the last measurement before them; None: every token."""

    key: str
    title: str
    what: str
    values: Tensor
    measured: list[int] | None = None


def strip(key: str, title: str, what: str, values: Tensor, measured: Sequence[int] | None = None) -> Strip:
    """A strip of values [T, H]."""
    some = None if measured is None or len(measured) == len(values) else list(measured)
    return Strip(key, title, what, values.detach().float().T.cpu().contiguous(), some)


def forward_fill(found: Sequence[Tensor], ends: Sequence[int], length: int) -> Tensor:
    """Measurements [1, H] taken after the tokens `ends` -> [T, H]: every token has the last one at or before it, nan before any."""
    values = found[0].new_full((length, found[0].shape[1]), math.nan)
    for one, end, until in zip(found, ends, [*ends[1:], length], strict=True):
        values[end:until] = one[0]
    return values


def pieces(arguments: dict[str, Any], length: int, size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first, end, the arguments of these tokens) of consecutive pieces of a recurrence's call.

    Args:
        arguments: of one of `recording.OPS`.
        length: T.
        size: tokens of a piece; None: so many that there are about MEASUREMENTS.
    """
    size = size or math.ceil(length / MEASUREMENTS)

    def cut(value: Any, first: int, last: int) -> Any:
        return None if value is None else value[:, first:last]

    for first in range(0, length, size):
        last = min(first + size, length)
        piece = {name: cut(value, first, last) if name in TIMED else value for name, value in arguments.items()}
        if "gates" in arguments:
            piece["gates"] = {name: cut(gate, first, last) for name, gate in arguments["gates"].items()}
        yield first, last, piece


def per_head(gate: Tensor, several_steps: bool = False) -> Tensor:
    """A gate [1, T, (steps,) H, (channels)] -> [T, H]: its mean over steps and channels."""
    gate = gate[0].float()
    if several_steps:
        gate = gate.mean(1)
    return gate if gate.dim() == 2 else gate.mean(-1)


def norm_of(parts: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of several matrices [B, H, ...] together: [B, H]."""
    return torch.stack([part.float().flatten(2).square().sum(-1) for part in parts]).sum(0).sqrt()
