"""What a run of an experiment has measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recollect.comparison.report.records import Run

Say = Callable[[str], None]
Runs = Mapping[str, Sequence[Run]]  # name of a model -> its runs, in order of the seeds


class Trained(NamedTuple):
    """A comparison that has ended. length: tokens of its training texts."""

    runs: Runs
    length: int


class Column(NamedTuple):
    """One measured column.

    head: of the table; unit: "%" or ""; cells: model -> one value per seed, in order of the seeds; None for a run that failed.
    higher_is_better: the direction.
    """

    head: str
    unit: str
    cells: dict[str, list[float | None]]
    higher_is_better: bool


class Made(NamedTuple):
    """What a stage made of models that were trained earlier: columns; PNGs that it drew; what a reader must know."""

    columns: Sequence[Column]
    pictures: Sequence[Path] = ()
    notes: Sequence[str] = ()


class Measured(NamedTuple):
    """A whole run.

    seconds: of training in all; parameters: of the smallest and the largest model; overrides: settings that were given in place of the
    experiment's own; pictures: PNGs; notes: what a reader must know.
    """

    columns: list[Column]
    seconds: float
    parameters: tuple[int, int]
    overrides: Mapping[str, Any]
    pictures: Sequence[Path] = ()
    notes: Sequence[str] = ()
