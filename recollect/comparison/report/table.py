"""The result as a table: for a terminal of any width (rich), as plain text, and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from recollect.comparison import published
from recollect.comparison.report import units
from recollect.comparison.report.records import Comparison
from recollect.comparison.report.summary import Row, describe, headline, incomplete, notes, rows

PLAIN_WIDTH = 160  # characters: every column in one table, as editors show a text file


class Column(NamedTuple):
    """A heading and what a row shows under it."""

    title: str
    cell: Callable[[Row], str]


def columns(metric: str) -> list[Column]:
    """The columns after the mixer's name."""

    def over_seeds(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: cell(row) if row.score else "-"

    def span(row: Row) -> str:
        assert row.score
        low, high = (units.score(value, metric) for value in (row.score.min, row.score.max))
        return low if row.score.n == 1 else f"{low} to {high}"

    def interval(row: Row) -> str:
        return f"{units.percent(row.interval.low)} to {units.percent(row.interval.high)}" if row.interval else "-"

    def spread(row: Row) -> str:
        return f"{row.score.std:.3f}" if row.score and row.score.std is not None else "-"

    def step(row: Row) -> str:
        whole = row.n_finished or row.steps is None
        return units.count(row.step) if whole else f"{units.count(row.step)} of {units.count(row.steps or 0)}"

    first = [Column("error %" if metric == "error" else "bits/byte", over_seeds(lambda row: _mean(row, metric)))]
    second = [Column("95 %", interval)] if metric == "error" else [Column("std", spread)]
    return [
        *first,
        Column("min to max", over_seeds(span)),
        *second,
        Column("seeds", lambda row: f"{row.n_finished} of {len(row.runs)}"),
        Column("loss", over_seeds(lambda row: units.small(row.loss))),
        Column("parameters", lambda row: f"{row.parameters:,}" if row.parameters else "-"),
        Column("steps", step),
        Column("tokens", lambda row: units.count(row.tokens)),
        Column("time", lambda row: units.duration(row.seconds)),
        Column("tokens/s", lambda row: units.count(row.tokens_per_second)),
        Column("state", lambda row: units.size(row.state_bytes) if row.state_bytes > 0 else "-"),
    ]


def title(comparison: Comparison) -> str:
    """The task with its options, and the budget: "find-block (n_blocks 8, length 5), 3 seeds, budget 1500 steps"."""
    plan = comparison.plan
    options = ", ".join(f"{key} {value}" for key, value in (plan.get("task_options") or {}).items() if _short(value))
    n_seeds = len(plan["seeds"])
    parts = [f"{plan['task']}{f' ({options})' if options else ''}", "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"]
    if plan.get("budget"):
        parts.append(f"budget {plan['budget']}")
    return ", ".join(parts)


class ResultTable:
    """The whole report for a terminal. Columns that do not fit beside each other go into further tables below, never cut."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.rows = rows(comparison)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        metric = self.comparison.metric
        yield Text(title(self.comparison), style="bold")
        first = Column("mixer", lambda row: f"{row.label} *" if row.best else row.label)
        bold = [row.best for row in self.rows]
        for group in _pack(first, columns(metric), self.rows, options.max_width):
            cells = [[column.cell(row) for column in group] for row in self.rows]
            yield _table([column.title for column in group], cells, bold, options.max_width)
        yield _table(
            ["seed by seed", *_seed_titles(self.comparison)], _seed_cells(self.comparison, self.rows), bold, options.max_width
        )
        for run in incomplete(self.rows):
            yield Text(f"{run.label} seed {run.seed}: {describe(run, metric)}", style="yellow")
        yield Padding(Text(headline(self.comparison, self.rows), style="bold"), (1, 0))
        for note in [*(["* lowest mean."] if any(bold) else []), *notes(self.comparison, self.rows)]:
            yield Text(note, style="dim")
        if self.comparison.plan["task"] == "find-block":
            yield from _published(options.max_width)


def plain(comparison: Comparison, *, width: int = PLAIN_WIDTH) -> str:
    """The same report as plain ASCII text, `width` characters at most per line."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(ResultTable(comparison))
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).translate({ord("─"): "-"}) + "\n"


def markdown_table(comparison: Comparison) -> str:
    """Markdown for a README: the table with the lowest mean in bold, every seed, what did not finish, the notes."""
    table = rows(comparison)
    shown = columns(comparison.metric)
    lines = [f"**{_escape(title(comparison))}**", ""]
    lines += _markdown(
        ["mixer", *(column.title for column in shown), "each seed"],
        [
            [_strong(row.label, row.best), *(column.cell(row) for column in shown), _each(row, comparison.metric)]
            for row in table
        ],
    )
    lines += ["", _escape(headline(comparison, table)), ""]
    unfinished = [f"{run.label} seed {run.seed}: {describe(run, comparison.metric)}" for run in incomplete(table)]
    lines += [f"- {_escape(note)}" for note in [*unfinished, *notes(comparison, table)]]
    if comparison.plan["task"] == "find-block":
        lines += ["", f"**{published.TITLE}**", ""]
        body = [[name, *(f"{mean} +- {std}" for mean, std in cells)] for name, cells in published.FIND_BLOCK.items()]
        lines += [*_markdown(["model", *published.COLUMNS], body), "", published.NOTE]
    return "\n".join(lines) + "\n"


def _mean(row: Row, metric: str) -> str:
    assert row.score
    return units.score(row.score.mean, metric)


def _short(value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) and len(str(value)) <= 24


GAP = 2  # spaces between columns


def _name_width(names: Sequence[str], width: int) -> int:
    """Room for the first column: a mixer with options may have a name longer than a narrow terminal; such names fold."""
    return min(max(len(name) for name in names), max(12, width // 3))


def _pack(first: Column, rest: Sequence[Column], table: Sequence[Row], width: int) -> list[list[Column]]:
    """Split the columns into groups that fit `width`, each opening with the mixer's name."""

    def taken(column: Column) -> int:
        return max(len(column.title), *(len(column.cell(row)) for row in table), 1) + GAP

    names = _name_width([first.title, *(first.cell(row) for row in table)], width)

    groups: list[list[Column]] = []
    room = 0
    for column in rest:
        if not groups or taken(column) > room:
            groups.append([first])
            room = width - names
        groups[-1].append(column)
        room -= taken(column)
    return groups


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]], bold: Sequence[bool], width: int) -> RenderableType:
    """One rich table, names left and numbers right; columns that do not fit `width` go into further tables below."""
    names = _name_width([line[0] for line in [titles, *cells]], width)
    widest = max((len(line[i]) + GAP for line in [titles, *cells] for i in range(1, len(titles))), default=1)
    limit = len(titles) - 1
    if names + sum(max(len(line[i]) for line in [titles, *cells]) + GAP for i in range(1, len(titles))) > width:
        limit = max(1, (width - names) // widest)
    parts = []
    for start in range(1, len(titles), limit):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
        table.add_column(Text(titles[0]), max_width=names, overflow="fold")
        for text in titles[start : start + limit]:
            table.add_column(Text(text), justify="right", no_wrap=True)
        for line, strong in zip(cells, bold, strict=True):
            chosen = [line[0], *line[start : start + limit]]
            table.add_row(*(Text(text) for text in chosen), style="bold green" if strong else None)
        parts.append(Padding(table, (1, 0, 0, 0)))
    return Group(*parts)


def _seed_titles(comparison: Comparison) -> list[str]:
    return [f"seed {seed}" for seed in comparison.plan["seeds"]]


def _seed_cells(comparison: Comparison, table: Sequence[Row]) -> list[list[str]]:
    metric = comparison.metric
    return [
        [
            row.label,
            *(units.score(run.points[-1].score, metric) if run.status == "finished" else run.status for run in row.runs),
        ]
        for row in table
    ]


def _each(row: Row, metric: str) -> str:
    return ", ".join(units.score(run.points[-1].score, metric) if run.status == "finished" else run.status for run in row.runs)


def _published(width: int) -> RenderResult:
    yield Padding(Text(published.TITLE, style="bold"), (1, 0, 0, 0))
    cells = [[name, *(f"{mean} +- {std}" for mean, std in values)] for name, values in published.FIND_BLOCK.items()]
    yield _table(["model", *published.COLUMNS], cells, [False] * len(cells), width)
    yield Text(published.NOTE, style="dim")


def _markdown(titles: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in titles[1:])]
    return ["| " + " | ".join(_cell(text) for text in line) + " |" for line in [titles, rule, *body]]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _escape(text: str) -> str:
    return text.replace("\n", " ").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _strong(text: str, best: bool) -> str:
    return f"**{_escape(text)}**" if best else _escape(text)
