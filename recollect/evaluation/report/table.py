"""Lines as a table: for the terminal, a text file, Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from recollect import terminal
from recollect.evaluation.report.summary import ALL, Line, number, show, total
from recollect.evaluation.suites.base import Suite


def titles(suite: Suite, found: Sequence[Line]) -> list[str]:
    """The heads of the columns. "chance" is what guesses score in the first metric; it is there if anything can be guessed at."""
    names = [f"{metric.name} %" if metric.unit == "%" else metric.name for metric in suite.metrics]
    chance = f"chance {suite.metrics[0].unit}".strip()
    return [*_dimensions(found), "n", *names, *([chance] if _can_be_guessed(found) else [])]


def cells(suite: Suite, found: Sequence[Line], line: Line) -> list[str]:
    """One line's texts, in the order of `titles`."""
    keys = _dimensions(found)
    rest = [key for key in keys if key not in (*line.group, *suite.measured)]
    shown = rest if line.group else keys[:1]  # of everything, one word is enough
    name = ALL if line.group else total(suite)
    group = [str(line.group.get(key, name if key in shown else "")) for key in keys]
    numbers = [show(metric, cell) for metric, cell in zip(suite.metrics, line.cells, strict=True)]
    chance = [number(suite.metrics[0], line.chance)] if _can_be_guessed(found) else []
    return [*group, f"{line.n:,}", *numbers, *chance]


def table(suite: Suite, found: Sequence[Line]) -> Table:
    """For `terminal.show`."""
    result = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(titles(suite, found)):
        result.add_column(name, justify="left" if i < len(_dimensions(found)) else "right", no_wrap=True)
    for line in found:
        result.add_row(*cells(suite, found, line))
    return result


def plain(suite: Suite, found: Sequence[Line]) -> str:
    """The table as text without colours."""
    return terminal.text(table(suite, found))


def markdown(suite: Suite, found: Sequence[Line]) -> str:
    """The table in Markdown."""
    heads = titles(suite, found)
    n = len(_dimensions(found))
    rule = ["---" if i < n else "---:" for i in range(len(heads))]
    rows = [heads, rule, *(cells(suite, found, line) for line in found)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _dimensions(found: Sequence[Line]) -> list[str]:
    return max((list(line.group) for line in found), key=len)


def _can_be_guessed(found: Sequence[Line]) -> bool:
    return any(line.chance is not None for line in found)
