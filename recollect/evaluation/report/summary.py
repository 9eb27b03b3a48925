"""Results in lines: one per group, and one over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from recollect.evaluation.statistics import Interval
from recollect.evaluation.suites.base import Metric, Result, Suite

ALL = "all"


class Cell(NamedTuple):
    """A metric over a group's results."""

    value: float
    interval: Interval | None


class Line(NamedTuple):
    """group: dimension -> value, empty for all results together; n: results; cells: one per metric of the suite."""

    group: dict[str, Any]
    n: int
    cells: tuple[Cell, ...]


def lines(suite: Suite, results: Sequence[Result], by: Sequence[str] | None = None) -> list[Line]:
    """One line per group in the order of first appearance, then one of everything, where there are several groups.

    Args:
        suite: whose metrics are computed.
        results: at least one.
        by: dimensions to tell apart; None: all of the suite's that take more than one value or are measured.
    """
    by = [key for key in suite.dimensions if key in (*varying(suite, results), *suite.measured)] if by is None else by
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result.group.get(key, "") for key in by), []).append(result)
    found = [_line(suite.metrics, dict(zip(by, key, strict=True)), some) for key, some in groups.items()]
    return found if len(found) == 1 else [*found, _line(suite.metrics, {}, results)]


def with_margins(suite: Suite, results: Sequence[Result]) -> list[Line]:
    """The lines of a table: of every group; where several dimensions vary, of every value of each of them; of everything."""
    by = [key for key in varying(suite, results) if key not in suite.measured]
    found = lines(suite, results)
    if len(by) < 2:
        return found
    return [*found[:-1], *(line for key in by for line in lines(suite, results, [key])[:-1]), found[-1]]


def varying(suite: Suite, results: Sequence[Result]) -> list[str]:
    """The suite's dimensions that take more than one value."""
    return [key for key in suite.dimensions if len({str(result.group.get(key, "")) for result in results}) > 1]


def show(metric: Metric, cell: Cell) -> str:
    """A number as people read it."""
    if not math.isfinite(cell.value):
        return "inf" if cell.value > 0 else "-"
    if metric.unit != "%":
        return f"{cell.value:.3f}" if abs(cell.value) < 1000 else f"{cell.value:,.0f}"
    text = f"{100 * cell.value:.1f}"
    if cell.interval is None:
        return text
    return f"{text} ({100 * cell.interval.low:.1f} to {100 * cell.interval.high:.1f})"


def _line(metrics: Sequence[Metric], group: dict[str, Any], results: Sequence[Result]) -> Line:
    values = [result.values for result in results]
    return Line(group, len(results), tuple(Cell(metric.compute(values), metric.interval(values)) for metric in metrics))
