"""Accuracy against the size of the state: the points are the runs'."""

from __future__ import annotations

from pathlib import Path

from recollect.comparison.report.records import Point as Evaluation
from recollect.comparison.report.records import Run
from recollect.reproduction.after import plotted
from recollect.reproduction.experiment import Plotting
from recollect.reproduction.measured import Trained
from recollect.reproduction.plot import Point, draw, points


def run(seed: int, error: float, state: int, status: str = "finished") -> Run:
    last = Evaluation(
        step=10,
        score=error,
        loss=0.0,
        seconds=1.0,
        tokens=1,
        tokens_per_second=1.0,
        state_bytes=state,
        n_eval=8,
        parameters=5,
        final=True,
    )
    return Run(label="m", seed=seed, steps=10, points=(last,), status=status, reason="", folder=Path())  # type: ignore[arg-type]


WIDE = {"A": [run(0, 0.0, 4096), run(1, 0.5, 4096)], "B": [run(0, 0.25, 512, "failed")]}
NARROW = {"A": [run(0, 0.75, 1024), run(1, 0.75, 1024)], "B": [run(0, 0.5, 256)]}


def test_points_are_ordered_by_size_and_leave_out_failed_runs() -> None:
    """Prevents lines that run backwards, errors drawn as accuracies, and numbers of a run that failed."""
    found = points([WIDE, NARROW])
    assert found == {"A": [Point(1024, [0.25, 0.25]), Point(4096, [1.0, 0.5])], "B": [Point(256, [0.5])]}


def test_the_picture_has_a_line_per_mixer() -> None:
    """Prevents shares where the axis says per cent."""
    axes = draw(points([WIDE, NARROW]), "title").axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines["A"].get_xdata()) == [1024, 4096]
    assert list(lines["A"].get_ydata()) == [25.0, 75.0]
    assert set(lines) == {"A", "B"}


def test_the_sizes_are_columns(tmp_path: Path) -> None:
    """Prevents sizes under another comparison's head."""
    trained = [Trained(WIDE, 8), Trained(NARROW, 8)]
    columns, (path,), _ = plotted(Plotting(of=("wide error", "narrow error")), trained, tmp_path)
    assert [column.head for column in columns] == ["wide state, KiB", "narrow state, KiB"]
    assert columns[1].cells == {"A": [1.0, 1.0], "B": [0.25]}
    assert path.read_bytes().startswith(b"\x89PNG")
