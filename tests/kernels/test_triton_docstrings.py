"""What the files of Triton kernels say about themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from recollect.kernels import triton

MEASURED: tuple[str, ...] = ()  # files whose kernels a GPU has run, with the result in docs/kernels.md
FILES = [path for path in sorted(Path(triton.__file__).parent.glob("*.py")) if "@triton.jit" in path.read_text()]


def test_there_are_files_with_kernels() -> None:
    """Prevents the next test from looking at nothing."""
    assert len(FILES) > 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_say_that_no_gpu_has_run_them(path: Path) -> None:
    """Prevents a reader from taking the speed of a kernel that no GPU has run for known, and the opposite once one has."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert ("NOT YET MEASURED ON A GPU" in text) == (path.stem not in MEASURED)
