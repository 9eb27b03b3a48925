"""Measured beside published: tables for the terminal, a Markdown file and a page."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table

from recollect import pages, terminal
from recollect.evaluation.statistics import summarize
from recollect.reproduction.experiment import Experiment, Published, Scale
from recollect.reproduction.measured import Column, Measured
from recollect.training.checkpoint import replace_file

SENTENCE = 32  # characters, at most, of a line of words in a table


def write(out: Path, experiment: Experiment, scale: Scale, measured: Measured) -> list[RenderableType]:
    """Write table.txt, table.md and report.html into `out`.

    Returns:
        The same for `terminal.show`.
    Raises:
        OSError: a file cannot be written.
    """
    shown = _shown(experiment, scale, measured)
    replace_file(out / "table.txt", terminal.text(*shown).encode())
    replace_file(out / "table.md", _markdown(experiment, scale, measured).encode())
    replace_file(out / "report.html", _html(experiment, scale, measured).encode())
    return shown


def cell(values: Sequence[float | None], unit: str) -> str:
    """Mean and every seed: "1.2 (0.9, 1.5)"; a run that has no result is a dash."""
    each = [_number(value, unit) for value in values]
    if len(values) == 1:
        return each[0]
    whole = [value for value in values if value is not None and math.isfinite(value)]
    mean = _number(summarize(whole).mean if len(whole) == len(values) else None, unit)
    return f"{mean} ({', '.join(each)})"


def _number(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if unit == "%":
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def notes(experiment: Experiment, scale: Scale, measured: Measured) -> list[str]:
    """What a reader must know before comparing."""
    low, high = measured.parameters
    changed = ", ".join(f"{name} {value}" for name, value in measured.overrides.items())
    size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    several = any(len(values) > 1 for column in measured.columns for values in column.cells.values())
    seeds = "In brackets: every seed. " if several else ""
    return [
        f"Measured here: {experiment.size[scale]}{f' Changed for this run: {changed}.' if changed else ''}",
        f"The models have {size} parameters; {measured.seconds / 60:.0f} minutes of training in all.",
        f"{seeds}Published numbers are of other sizes and data: compare orders, not values.",
        *measured.notes,
        *(f"Drawn: {path}" for path in measured.pictures),
    ]


def _columns(measured: Measured) -> tuple[list[str], list[tuple[str, list[str]]]]:
    heads = [f"{column.head} %" if column.unit == "%" else column.head for column in measured.columns]
    names = list(dict.fromkeys(name for column in measured.columns for name in column.cells))
    return heads, [(name, [_of(column, name) for column in measured.columns]) for name in names]


def _of(column: Column, name: str) -> str:
    return cell(column.cells[name], column.unit) if name in column.cells else ""


def _published_rows(table: Published) -> list[tuple[str, list[str]]]:
    return [(name, ["" if value is None else str(value) for value in values]) for name, values in table.rows.items()]


def _published(experiment: Experiment, measured: Measured) -> list[Published]:
    """The published tables, the first with what was measured beside its rows, where there are words for it."""
    tables = list(experiment.published)
    if experiment.beside is None:
        return tables

    def mean(head: str, model: str) -> float:
        cells = [column.cells.get(model, []) for column in measured.columns if column.head == head]
        whole = [math.nan if value is None else value for value in cells[0]] if cells else []
        return sum(whole) / len(whole) if whole else math.nan

    words = experiment.beside(mean)
    rows = {name: (*values, words.get(name)) for name, values in tables[0].rows.items()}
    return [dataclasses.replace(tables[0], columns=(*tables[0].columns, "measured here"), rows=rows), *tables[1:]]


def _shown(experiment: Experiment, scale: Scale, measured: Measured) -> list[RenderableType]:
    heads, rows = _columns(measured)
    parts: list[RenderableType] = [f"{experiment.name}, scale {scale}: {experiment.about}\n\nmeasured"]
    parts.append(_table([re.sub(r"([:,]) ", r"\1\n", head) for head in heads], rows, no_wrap=True))
    parts += notes(experiment, scale, measured)
    for table in _published(experiment, measured):
        parts += [f"\npublished: {table.title}", _table(table.columns, _published_rows(table)), table.note]
    return parts


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, no_wrap: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for i, head in enumerate(heads):
        width = None if no_wrap else min(SENTENCE, max(len(text) for text in (head, *(cells[i] for _, cells in rows))))
        table.add_column(head, justify="right", no_wrap=no_wrap, width=width)
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _markdown(experiment: Experiment, scale: Scale, measured: Measured) -> str:
    def of(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
        lines = [["model", *heads], ["---", *["---:"] * len(heads)], *([name, *cells] for name, cells in rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    parts = [f"### {experiment.name}, scale {scale}: {experiment.about}\n", of(*_columns(measured))]
    parts.append("\n".join(notes(experiment, scale, measured)) + "\n")
    for table in _published(experiment, measured):
        parts.append(f"{table.title}:\n\n{of(list(table.columns), _published_rows(table))}\n{table.note}\n")
    return "\n".join(parts)


def _html(experiment: Experiment, scale: Scale, measured: Measured) -> str:
    def of(caption: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
        return pages.table(caption, ["model", *heads], [pages.row(name, cells) for name, cells in rows])

    published = [
        of(table.title, table.columns, _published_rows(table)) + pages.note(table.note)
        for table in _published(experiment, measured)
    ]
    return pages.page(
        title=experiment.name,
        eyebrow=f"recollect reproduce: {experiment.name}, scale {scale}",
        headline=experiment.about,
        header=f"<p class='meta'>{escape(experiment.size[scale])}</p>",
        main=[
            pages.section(
                "measured",
                "Measured",
                of("Measured here", *_columns(measured)),
                pages.notes(notes(experiment, scale, measured)),
            ),
            *([pages.section("pictures", "Pictures", *map(_picture, measured.pictures))] if measured.pictures else []),
            pages.section("published", "Published", *published),
        ],
    )


def _picture(path: Path) -> str:
    return pages.picture(path.read_bytes(), f"{path.parent.name}: {path.stem}")
