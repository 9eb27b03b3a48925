"""Learning curves as a picture: a thin line per seed, a strong one for their mean, in PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from recollect.comparison.report import units
from recollect.comparison.report.records import Comparison
from recollect.comparison.report.summary import Row, mean_curve, rows
from recollect.comparison.report.table import title

# Okabe and Ito's colours for all kinds of colour vision, darkened where white paper would swallow them.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#B3589A", "#A87900", "#3A93C5", "#5F6368")
ERROR_TICKS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)
SKIPPED = 0.2  # share of the training that does not set the range of the bits-per-byte axis


def floor(comparison: Comparison) -> float:
    """Where no error at all is drawn on a logarithmic axis: half an example."""
    return 0.5 / max(comparison.n_eval, 1)


def draw(comparison: Comparison) -> Figure:
    """The figure, 8 x 4.5 inches."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    low = floor(comparison) if comparison.metric == "error" else -math.inf
    drawn: list[tuple[int, float]] = []
    ends = []
    for i, row in enumerate(rows(comparison)):
        color = PALETTE[i % len(PALETTE)]
        for run in row.runs:
            points = [(point.step, max(point.score, low)) for point in run.points if math.isfinite(point.score)]
            axes.plot(*_columns(points), color=color, linewidth=0.8, alpha=0.45)
            drawn += points
        means = [(point[0], max(point[3], low)) for point in mean_curve(row.runs)]
        axes.plot(*_columns(means), color=color, linewidth=2.2, marker="o" if len(means) == 1 else None)
        if means:
            ends.append((means[-1][1], _end(row, mean_curve(row.runs)[-1][3], comparison.metric), color))
    _style(axes, title(comparison), last=max((step for step, _ in drawn), default=1))
    if comparison.metric == "error":
        _error_axis(axes, low, lowest=min((score for _, score in drawn), default=1.0))
    else:
        _bits_axis(axes, drawn)
    _chance(axes, comparison)
    figure.draw_without_rendering()  # fixes the transformation by which labels are placed
    _label(axes, ends)
    if not ends:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color="#666666")
    return figure


def save(comparison: Comparison, png: Path, svg: Path) -> None:
    """Write both files; the same results give the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "recollect", "font.family": "DejaVu Sans", "font.size": 10}):
        figure = draw(comparison)
        figure.savefig(png, dpi=160, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _end(row: Row, value: float, metric: str) -> str:
    return f"{row.label}  {units.score(value, metric)}{' %' if metric == 'error' else ''}"


def _style(axes: Axes, heading: str, *, last: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.tick_params(color="#999999", labelcolor="#444444")
    axes.set_axisbelow(True)
    axes.set_xlim(0, last)
    axes.set_xlabel("training steps", color="#444444")
    axes.set_title(heading, loc="left", fontsize=10.5, color="#222222", wrap=True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))


def _error_axis(axes: Axes, low: float, *, lowest: float) -> None:
    """Logarithmic, down to 1 % at least; its end reads "0" where it is `low`, the place of no error at all."""
    bottom = max(low, min(lowest / 1.6, 0.01))
    ticks = [1.0, *(tick for tick in ERROR_TICKS if tick > max(low * 1.5, bottom)), low]
    axes.set_ylabel("held-out error", color="#444444")
    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.85, 1.25)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick >= bottom]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == low else f"{100 * value:.3g} %"))


def _bits_axis(axes: Axes, drawn: Sequence[tuple[int, float]]) -> None:
    """Linear, over what the curves do after a fifth of the steps: the fall before would flatten what sets mixers apart."""
    axes.set_ylabel("bits per byte (held out)", color="#444444")
    last = max((step for step, _ in drawn), default=0)
    later = [score for step, score in drawn if step >= SKIPPED * last]
    if later:
        pad = 0.06 * (max(later) - min(later)) or 0.1
        axes.set_ylim(min(later) - pad, max(later) + pad)


def _chance(axes: Axes, comparison: Comparison) -> None:
    level = comparison.chance_score
    if level is not None:
        axes.axhline(level, color="#777777", linewidth=1, linestyle=(0, (1, 3)))
        axes.annotate(
            "chance",
            (0, level),
            xycoords=("axes fraction", "data"),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color="#777777",
        )


def _label(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each mixer's name beside the end of its mean line, moved apart where names would touch."""
    ends = sorted(ends)
    heights = [float(axes.transData.transform((0, score))[1]) * 72 / axes.figure.dpi for score, _, _ in ends]
    for (score, text, color), height, place in zip(ends, heights, apart(heights, gap=14.0), strict=True):
        axes.annotate(
            text,
            (1, score),
            xycoords=("axes fraction", "data"),
            xytext=(8, place - height),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )


def apart(heights: Sequence[float], *, gap: float) -> list[float]:
    """The places nearest to ascending `heights` (least squares) that keep `gap` between neighbours and the order."""
    groups: list[list[float]] = []  # each a run of labels that touch: [sum of (height - its offset in the run), size]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] + gap * groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, size = groups.pop()
            groups[-1][0] += total - gap * groups[-1][1] * size
            groups[-1][1] += size
    return [total / size + gap * i for total, size in groups for i in range(int(size))]
