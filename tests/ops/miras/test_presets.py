"""Every preset through `scan` equals an independent transcription of its own paper's recurrence: outputs and final memory, fp64.

Axis legend: B batch, T time, H heads, V value dim, O and I output and input axis of one weight matrix.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import pytest

from recollect.ops.miras import presets
from tests.laws import EXACT, assert_near
from tests.ops.miras.cases import CHUNK_SIZES, DEEP_CASES, MATRIX_CASES, Case
from tests.ops.miras.equality import BACKENDS, Outcome, expected, run

ALL_CASES: dict[str, Callable[[], Case]] = {
    **MATRIX_CASES,
    **{f"{name}-chunk{size}": functools.partial(make, size) for name, make in DEEP_CASES.items() for size in CHUNK_SIZES},
}


@functools.cache
def prepared(name: str) -> tuple[Case, Outcome]:
    """A case and its transcription's outcome, computed once for both backends."""
    case = ALL_CASES[name]()
    return case, expected(case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL_CASES)
def test_preset_matches_its_papers_recurrence(name: str, backend: str) -> None:
    """Prevents a preset that is near its model but not it: a gate on the wrong axis, a decay after the write, a missing step size."""
    case, wanted = prepared(name)
    got = run(case, backend)
    assert_near(got.y, wanted.y, EXACT, f"{name}, {backend}: y")
    assert sorted(got.memory) == sorted(wanted.memory)
    for part, tensor in wanted.memory.items():
        assert_near(got.memory[part], tensor, EXACT, f"{name}, {backend}: {part}")


def test_every_preset_has_a_transcription() -> None:
    """Prevents a preset that is added without a test of what it computes."""
    known = {name for name, member in inspect.getmembers(presets, inspect.isfunction) if member.__module__ == presets.__name__}
    tested = {prepared(name)[0].preset for name in MATRIX_CASES} | {DEEP_CASES[name](1).preset for name in DEEP_CASES}
    assert {name for name in known if not name.startswith("_")} == tested
