"""The results in one picture: curves over positions, else a heat map over two numeric dimensions, else bars with their intervals.

What guesses score is a dotted line at every bar and a second number in the cells of a heat map. Curves are without: in bits per byte
a guess is so far off that beside it all models look alike.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from recollect.evaluation.report.summary import Line, lines, number, total, varying
from recollect.evaluation.suites.base import Metric, Result, Suite

PANELS, CURVES = 5, 10  # panels of heat maps side by side; curves that have colours


def draw(suite: Suite, results: Sequence[Result], title: str) -> Figure:
    """The picture. Heat maps are over the last two dimensions in numbers, one panel per value of the others; of more than `CURVES`
    domains only the mean is drawn."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    dimensions = [key for key in varying(suite, results) if key not in suite.measured]
    numeric = [key for key in dimensions if all(isinstance(result.group.get(key), (int, float)) for result in results)]
    if suite.along in dimensions:
        _curves(figure, suite, results, [key for key in dimensions if key != suite.along])
    elif len(numeric) >= 2:
        _heat_maps(figure, suite, results, numeric[-2:], [key for key in dimensions if key not in numeric[-2:]])
    else:
        _bars(figure, suite, lines(suite, results))
    return figure


def files(drawn: Figure) -> dict[str, bytes]:
    """A picture as figure.png and figure.svg."""
    found = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        drawn.savefig(buffer, format=kind, dpi=150)
        found[f"figure.{kind}"] = buffer.getvalue()
    return found


def _heat_maps(figure: Figure, suite: Suite, results: Sequence[Result], axes: list[str], others: list[str]) -> None:
    panels = _parts(results, lambda result: ", ".join(f"{key} {result.group.get(key)}" for key in others))
    n_rows = -(-len(panels) // PANELS)
    figure.set_figheight(1.5 + 3 * n_rows)
    grid = figure.subplots(n_rows, -(-len(panels) // n_rows), squeeze=False, sharey=True)
    metric = suite.metrics[0]
    image: Any = None
    down, across = axes[1], axes[0]
    for panel in grid.flat[len(panels) :]:
        panel.set_visible(False)
    for panel, (name, some) in zip(grid.flat, panels.items(), strict=False):
        rows = sorted({result.group[down] for result in results})
        columns = sorted({result.group[across] for result in results})
        cells = {(line.group[down], line.group[across]): line for line in lines(suite, some, by=[down, across]) if line.group}
        values = np.array([[_value(cells.get((row, column)), metric) for column in columns] for row in rows])
        image = panel.imshow(values, cmap="viridis", vmin=0, vmax=100 if metric.unit == "%" else None, aspect="auto")
        for i, j in np.ndindex(*values.shape):
            if np.isfinite(values[i, j]):
                dark = metric.unit == "%" and values[i, j] < 50
                style: Any = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
                panel.text(j, i, f"{values[i, j]:.0f}", fontsize=7, **style)
                floor = cells[rows[i], columns[j]].chance
                if floor is not None:
                    panel.text(j, i, f"\n\n{number(metric, floor)}", fontsize=5, **style)
        panel.set_xticks(range(len(columns)), [f"{column:,}" for column in columns], rotation=45, fontsize=7)
        panel.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=7)
        panel.set_xlabel(across, fontsize=8)
        panel.set_title(name, fontsize=8)
    for row in grid:
        row[0].set_ylabel(down, fontsize=8)
    can_be_guessed = any(result.guess is not None for result in results)
    figure.colorbar(image, ax=list(grid.flat), label=_label(metric) + (" (small: of a guess)" if can_be_guessed else ""))


def _curves(figure: Figure, suite: Suite, results: Sequence[Result], others: list[str]) -> None:
    panel: Any = figure.subplots()
    metric = suite.metrics[0]
    stretches = list(dict.fromkeys(result.group[suite.along] for result in results))
    parts = _parts(results, lambda result: " ".join(str(result.group.get(key)) for key in others))

    def curve(some: Sequence[Result], **style: Any) -> None:
        found = {line.group.get(suite.along): line for line in lines(suite, some, by=[suite.along])}
        panel.plot(stretches, [_value(found.get(stretch), metric) for stretch in stretches], marker="o", markersize=3, **style)

    for name, some in parts.items() if 1 < len(parts) <= CURVES else ():
        curve(some, label=name)
    curve(results, label="all", **({"color": "black", "linewidth": 2} if len(parts) > 1 else {}))
    if len(parts) > 1:
        panel.legend(fontsize=8, frameon=False)
    panel.tick_params("x", rotation=30, labelsize=7)
    panel.set_xlabel(suite.along)
    panel.set_ylabel(_label(metric))
    panel.spines[["top", "right"]].set_visible(False)


def _bars(figure: Figure, suite: Suite, found: Sequence[Line]) -> None:
    panel: Any = figure.subplots()
    metric, scale = suite.metrics[0], 100 if suite.metrics[0].unit == "%" else 1
    names = [" ".join(str(value) for value in line.group.values()) or total(suite) for line in found]
    values = [scale * line.cells[0].value for line in found]
    panel.bar(range(len(found)), values, color=matplotlib.colormaps["tab10"](0), width=0.7)
    for i, line in enumerate(found):
        if line.cells[0].interval is not None:
            panel.vlines(i, scale * line.cells[0].interval.low, scale * line.cells[0].interval.high, color="black", linewidth=1)
    floors = {i: scale * line.chance for i, line in enumerate(found) if line.chance is not None}
    if floors:
        begins, ends = [i - 0.45 for i in floors], [i + 0.45 for i in floors]
        panel.hlines(list(floors.values()), begins, ends, color="black", linestyle=":", label="chance")
        panel.legend(fontsize=8, frameon=False)
    panel.set_xticks(
        range(len(found)), names, rotation=30 if len(found) > 4 else 0, ha="right" if len(found) > 4 else "center", fontsize=7
    )
    panel.set_ylabel(_label(metric))
    if metric.unit == "%":
        panel.set_ylim(0, 100)
    panel.spines[["top", "right"]].set_visible(False)


def _parts(results: Sequence[Result], name: Callable[[Result], str]) -> dict[str, list[Result]]:
    """The results of each name, in the order of first appearance."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(name(result), []).append(result)
    return found


def _value(line: Line | None, metric: Metric) -> float:
    if line is None:
        return float("nan")
    return line.cells[0].value * (100 if metric.unit == "%" else 1)


def _label(metric: Metric) -> str:
    return f"{metric.name} %" if metric.unit == "%" else metric.name
