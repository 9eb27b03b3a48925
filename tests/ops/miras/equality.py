"""The equality table: every preset against its transcription. `python -m tests.ops.miras.equality` prints it in Markdown.

Axis legend: B batch, T time, H heads, V value dim, O and I output and input axis of one weight matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.miras import scan
from tests.ops.miras.cases import BATCH, CHUNK_SIZES, DEEP_CASES, HEADS, MATRIX_CASES, Case
from tests.ops.miras.transcriptions import Result

BACKENDS = ("sequential", "chunked")


class Outcome(NamedTuple):
    """y [B, T, H, V], and by name what is carried, the weights and the momentum, each [B, H, O, I]."""

    y: Tensor
    memory: dict[str, Tensor]


def expected(case: Case) -> Outcome:
    """The transcription of every row and head."""
    heads = [[case.expected(b, h) for h in range(HEADS)] for b in range(BATCH)]
    y = torch.stack([torch.stack([head.y for head in row], dim=1) for row in heads])
    memory = {}
    for group in ("carried", "weights", "momentum"):
        for n in range(len(_group(heads[0][0], group))):
            memory[f"{group}[{n}]"] = torch.stack([torch.stack([_group(head, group)[n] for head in row]) for row in heads])
    return Outcome(y, memory)


def _group(result: Result, group: str) -> list[Tensor]:
    return result._asdict()[group] or []


def run(case: Case, backend: str) -> Outcome:
    """The same through `scan`."""
    y, state = scan(case.spec, *case.inputs, case.gates, parameters=case.parameters, backend=backend)
    growing = case.spec.memory.kind == "growing"  # keys and values, batch and time first
    memory = {f"carried[{n}]": z.transpose(1, 2) if growing else z for n, z in enumerate(state.dual)}
    if case.spec.retention.name in ("lq", "kl"):
        assert case.parameters is not None
        pairs = zip(state.dual, case.parameters.fast, strict=True)
        memory.update({f"weights[{n}]": case.spec.retention.link(z, start) for n, (z, start) in enumerate(pairs)})
    memory.update({f"momentum[{n}]": s for n, s in enumerate(state.momentum or ())})
    return Outcome(y, memory)


def error(actual: Tensor, wanted: Tensor) -> float:
    """Largest absolute error, relative to the largest expected magnitude where that is above 1."""
    return float((actual - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def table() -> str:
    """Preset, source, form, largest error of the outputs and of the memory, over both backends."""
    lines = ["| preset | source | form | max error of y | max error of the memory |", "|---|---|---|---|---|"]
    made = [(name, "any", make()) for name, make in MATRIX_CASES.items()]
    made += [(name, f"chunk {size}", make(size)) for name, make in DEEP_CASES.items() for size in CHUNK_SIZES]
    for name, form, case in made:
        wanted = expected(case)
        outcomes = [run(case, backend) for backend in BACKENDS]
        of_y = max(error(got.y, wanted.y) for got in outcomes)
        of_memory = max(error(got.memory[part], wanted.memory[part]) for got in outcomes for part in wanted.memory)
        lines.append(f"| `{name}` | {case.source} | {form} | {of_y:.1e} | {of_memory:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
