"""Results in lines: one per group, and one over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from recollect.evaluation.statistics import Interval, interval_of_mean
from recollect.evaluation.suites.base import Metric, Result, Suite

ALL = "all"


class Cell(NamedTuple):
    """A metric over a group's results."""

    value: float
    interval: Interval | None


class Line(NamedTuple):
    """group: dimension -> value, empty for all results together; n: results; cells: one per metric of the suite; chance: the first
    metric of guesses at the same questions, None where they cannot be guessed at."""

    group: dict[str, Any]
    n: int
    cells: tuple[Cell, ...]
    chance: float | None = None


def lines(suite: Suite, results: Sequence[Result], by: Sequence[str] | None = None) -> list[Line]:
    """One line per group in the order of first appearance, then one of everything, where there are several groups.

    Args:
        suite: whose metrics are computed.
        results: at least one.
        by: dimensions to tell apart; None: all of the suite's that take more than one value or are measured.
    """
    by = [key for key in suite.dimensions if key in (*varying(suite, results), *suite.measured)] if by is None else by
    groups = _split(results, by)
    found = [_line(suite, dict(zip(by, key, strict=True)), some) for key, some in groups.items()]
    return found if len(found) == 1 else [*found, _line(suite, {}, results)]


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


def total(suite: Suite) -> str:
    """What the line of everything is called."""
    return f"mean of {suite.average}s" if suite.average else ALL


def show(metric: Metric, cell: Cell) -> str:
    """A number as people read it."""
    text = number(metric, cell.value)
    if cell.interval is None or not math.isfinite(cell.value):
        return text
    return f"{text} ({number(metric, cell.interval.low)} to {number(metric, cell.interval.high)})"


def number(metric: Metric, value: float | None) -> str:
    """A value of a metric, without its interval; "-" for none."""
    if value is None or not math.isfinite(value):
        return "inf" if value == math.inf else "-"
    if metric.unit == "%":
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _split(results: Sequence[Result], by: Sequence[str]) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result.group.get(key, "") for key in by), []).append(result)
    return groups


def _line(suite: Suite, group: dict[str, Any], results: Sequence[Result]) -> Line:
    """Over the results pooled; where the suite says what to average over, the mean of as many lines."""
    parts = list(_split(results, [suite.average] if suite.average else []).values())
    if len(parts) > 1:
        return _mean(group, [_line(suite, group, part) for part in parts])
    values = [result.values for result in results]
    guesses = [result.guess for result in results if result.guess is not None]
    chance = suite.metrics[0].compute(guesses) if len(guesses) == len(results) else None
    cells = tuple(Cell(metric.compute(values), metric.interval(values)) for metric in suite.metrics)
    return Line(group, len(results), cells, chance)


def _mean(group: dict[str, Any], parts: Sequence[Line]) -> Line:
    """A line of the means, each part counting alike."""
    cells = []
    for some in zip(*(part.cells for part in parts), strict=True):
        values = [cell.value for cell in some]
        intervals = [cell.interval for cell in some if cell.interval is not None]
        whole = interval_of_mean(values, intervals) if len(intervals) == len(values) else None
        cells.append(Cell(fmean(values), whole))
    floors = [part.chance for part in parts if part.chance is not None]
    return Line(group, sum(part.n for part in parts), tuple(cells), fmean(floors) if len(floors) == len(parts) else None)
