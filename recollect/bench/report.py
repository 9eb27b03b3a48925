"""A suite's rows as tables, for the terminal and in Markdown, and as a picture of time and memory over the length."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.table import Table

from recollect.bench.clock import growth
from recollect.bench.contenders import UNMEASURED
from recollect.bench.floor import Rates
from recollect.bench.rows import DONE, SKIPPED, WRONG, Row, Rows
from recollect.bench.runner import pretty
from recollect.bench.setting import Setting
from recollect.comparison.report import units
from recollect.comparison.report.curves import PALETTE
from recollect.training.checkpoint import replace_file

MARKERS = "osD^vP"
UNITS = {1e6: "us", 1e3: "ms", 1.0: "s"}


class Grid(NamedTuple):
    """A table before it is drawn: title, heads of the columns, rows of texts (a line end within one is a second line)."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def write(out: Path, setting: Setting, rows: Rows, names: Sequence[str], rates: Rates) -> list[Any]:
    """Write OUT/SUITE.md and, where anything was measured, .png and .svg, each whole or not at all.

    Args:
        names: contenders to show, in this order.
    Returns:
        tables and notes for `terminal.show`.
    Raises:
        OSError: a file cannot be written.
    """
    grids = [grid for grid in (time_grid(setting, rows, names), memory_grid(setting, rows, names)) if grid.rows]
    said = notes(rows, names)
    head = header(setting, rates)
    text = "\n\n".join(
        [f"**{setting.suite}**: {head}", *map(markdown, grids), *(["\n".join(f"- {n}" for n in said)] * bool(said))]
    )
    replace_file(out / f"{setting.suite}.md", (text + "\n").encode())
    if measured(rows, names):
        figure = draw(setting, rows, names)
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150)
            replace_file(out / f"{setting.suite}.{kind}", buffer.getvalue())
    return [head, *map(for_terminal, grids), *(f"  {note}" for note in said)]


def measured(rows: Rows, names: Sequence[str]) -> bool:
    """Whether there is a time of any of these contenders."""
    return any(rows.points(name, "seconds") for name in names)


def header(setting: Setting, rates: Rates) -> str:
    """What was measured, and on what."""
    machine: Any = setting.described()["machine"]
    where = f"{machine['gpu']}" if setting.kind == "cuda" else f"{machine['processor']}, {setting.threads} threads"
    return (
        f"{sizes(setting)}, median of {setting.repeats} rounds in "
        f"turn (lowest-highest); {where}, torch {machine['torch']}; products {rates.flops / 1e9:,.0f} GFLOP/s, "
        f"copy {rates.bytes / 1e9:,.0f} GB/s"
    )


def sizes(setting: Setting) -> str:
    """Precision and sizes in words."""
    said = [setting.dtype, f"B = {setting.batch}", f"shape {setting.shape}" * bool(setting.shape)]
    said += [
        f"{setting.layers} layer{'s' * (setting.layers > 1)} of" * bool(setting.layers)
        + f" {setting.heads} heads of {setting.head_dim}"
    ]
    said += [f"vocabulary {setting.vocabulary:,}" * bool(setting.layers)]
    said += ["" if setting.chunk is None else f"chunks of {setting.chunk}"]
    return ", ".join(text.strip() for text in said if text)


def time_grid(setting: Setting, rows: Rows, names: Sequence[str]) -> Grid:
    """Time (of "train" tokens per second) by length, growth, achieved over floor at the longest, error against the oracle."""
    lengths = _lengths(rows, names)
    what = {
        "train": "tokens per second of training steps: forward + backward + AdamW",
        "decode": f"time of one token after a context, a {'model' if setting.layers else 'layer alone'}",
    }.get(setting.suite, "forward + backward")
    lines = []
    for name in names:
        points = rows.points(name, "seconds")
        check = rows.at(name, None)
        if points or (check is not None and check["status"] == WRONG):
            cells = [_time(setting, rows.at(name, length)) for length in lengths]
            lines.append(
                [name, *cells, _growth(points), _of_floor(rows.at(name, max(points))) if points else "", _error(check)]
            )
    heads = ["contender", *(f"{length:,}" for length in lengths), "time ~ T^", "roofline", "error"]
    return Grid(f"{setting.suite}: {what}", heads, lines)


def memory_grid(setting: Setting, rows: Rows, names: Sequence[str]) -> Grid:
    """Peak memory beyond the inputs, of "decode" the state, by length, and its growth."""
    measure = "state_bytes" if setting.suite == "decode" else "peak_bytes"
    lengths = _lengths(rows, names)
    lines = []
    for name in names:
        points = rows.points(name, measure)
        if points:
            cells = [units.size(points[length]) if length in points else _why(rows.at(name, length)) for length in lengths]
            lines.append([name, *cells, _growth(points)])
    what = "state" if setting.suite == "decode" else "peak memory of a step beyond its inputs"
    return Grid(f"{setting.suite}: {what}", ["contender", *(f"{length:,}" for length in lengths), "bytes ~ T^"], lines)


def notes(rows: Rows, names: Sequence[str]) -> list[str]:
    """What must be known beside the numbers: remarks, why a contender stopped, which were not there."""
    said: list[str] = []
    absent: dict[str, list[str]] = {}
    for name in names:
        for row in rows.of(name):
            if row["status"] == SKIPPED:
                reason = f"{row['reason']}; {UNMEASURED}" if UNMEASURED in row.get("note", "") else row["reason"]
                absent.setdefault(reason, []).append(name)
            elif row["length"] is None:
                remark = "; ".join(text for text in (row.get("note"), _remark(row)) if text)
                said += [f"{name}: {remark}"] * bool(remark)
            elif row["status"] != DONE:
                said.append(f"{name} at {row['length']:,}: {row['reason']}")
    said += apart(rows, names)
    return [*said, *(f"not here: {', '.join(some)} ({reason})" for reason, some in absent.items())]


def apart(rows: Rows, names: Sequence[str]) -> list[str]:
    """Which contenders of a length were timed in different runs, not in turn: a sentence for each way they were divided."""
    divided: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for length in _lengths(rows, names):
        timed = {name: row for name in names if (row := rows.at(name, length)) is not None and row["status"] == DONE}
        runs: dict[tuple[str, ...], list[str]] = {}
        for name, row in timed.items():
            runs.setdefault(tuple(row.get("among", ())), []).append(name)
        if len(runs) > 1:
            divided.setdefault(tuple(map(tuple, runs.values())), []).append(length)
    return [
        f"at {', '.join(f'{length:,}' for length in lengths)} timed in different runs, not in turn: "
        f"{' | '.join(', '.join(run) for run in runs)}; between these the machine may have changed"
        for runs, lengths in divided.items()
    ]


def for_terminal(grid: Grid) -> Table:
    """For `terminal.show`."""
    table = Table(box=box.SIMPLE_HEAD, title=grid.title, title_justify="left")
    for i, head in enumerate(grid.heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(grid: Grid) -> str:
    """The table in Markdown."""
    rule = ["---", *["---:"] * (len(grid.heads) - 1)]
    rows = [[cell.replace("\n", " ") for cell in row] for row in (grid.heads, rule, *grid.rows)]
    return f"{grid.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(setting: Setting, rows: Rows, names: Sequence[str]) -> Figure:
    """Time at the left, memory at the right, both axes logarithmic; bands from the lowest to the highest round."""
    figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    panels: Any = figure.subplots(1, 2)
    measure = "state_bytes" if setting.suite == "decode" else "peak_bytes"
    shown = [name for name in names if rows.points(name, "seconds")]
    for i, name in enumerate(shown):
        turn = i // len(PALETTE)
        look: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[turn % len(MARKERS)], "markersize": 4}
        look["linestyle"] = ("-", "--", ":")[turn % 3]
        seconds = rows.points(name, "seconds")
        panels[0].plot(list(seconds), list(seconds.values()), label=name, linewidth=1.6, **look)
        low, high = ([rows.points(name, end)[length] for length in seconds] for end in ("low", "high"))
        panels[0].fill_between(list(seconds), low, high, color=look["color"], alpha=0.15, linewidth=0)
        found = rows.points(name, measure)
        panels[1].plot(list(found), list(found.values()), linewidth=1.6, **look)
    titles = ("seconds per token", "state") if setting.suite == "decode" else ("seconds per step", "peak memory")
    _dress(panels[0], titles[0], _lengths(rows, shown), LogLocator(subs=(1.0, 2.0, 5.0), numticks=12), pretty)
    _dress(panels[1], titles[1], _lengths(rows, shown), LogLocator(base=2, numticks=9), units.size)
    figure.suptitle(f"{setting.suite}: {sizes(setting)}, {setting.kind}", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    return figure


def _dress(panel: Any, title: str, lengths: Sequence[int], ticks: LogLocator, form: Callable[[float], str]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    names = [f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length) for length in lengths]
    panel.set_xticks(lengths, names)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(ticks)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens")
    panel.set_title(title, loc="left", fontsize=10)
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


# --- one cell -----------------------------------------------------------------------------------------------------------------


def _lengths(rows: Rows, names: Sequence[str]) -> list[int]:
    return sorted({length for name in names for length in rows.points(name, "seconds")})


def _time(setting: Setting, row: Row | None) -> str:
    if row is None or row["status"] != DONE:
        return _why(row)
    if setting.suite == "train":
        tokens = row["tokens_per_second"] * row["seconds"]
        return f"{units.count(tokens / row['seconds'])}\n{units.count(tokens / row['high'])}-{units.count(tokens / row['low'])}"
    scale = next(scale for scale in (1e6, 1e3, 1.0) if row["high"] * scale < 1000 or scale == 1.0)
    return f"{pretty(row['seconds'])}\n{row['low'] * scale:.3g}-{row['high'] * scale:.3g} {UNITS[scale]}"


def _why(row: Row | None) -> str:
    """A cell without a number: why it ended here, in two words at most; nothing after that."""
    if row is None or row["status"] == DONE:
        return ""
    return "memory" if row["reason"].startswith("out of memory") else "time" if "limit" in row["reason"] else row["status"]


def _growth(points: dict[int, float]) -> str:
    found = growth(points)
    return "" if found is None else f"{found:.2f}"


def _of_floor(row: Row | None) -> str:
    if row is None or not row.get("floor_seconds"):
        return ""
    return f"{units.percent(row['floor_seconds'] / row['seconds'])} %"


def _error(check: Row | None) -> str:
    if check is None or check.get("error") is None:
        return "WRONG" if check is not None and check["status"] == WRONG else "-"
    return f"{check['error']:.0e}" + (" WRONG" if check["status"] == WRONG else "")


def _remark(row: Row) -> str:
    if row["status"] == DONE:
        return str(row["reason"])
    return f"{'wrong, not timed' if row['status'] == WRONG else row['status']}: {row['reason']}"
