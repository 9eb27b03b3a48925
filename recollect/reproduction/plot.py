"""The stage that draws what a size of state buys: accuracy against bytes, a line per mixer over its widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from recollect.comparison.report import units
from recollect.comparison.report.curves import PALETTE
from recollect.comparison.report.records import Run
from recollect.evaluation.statistics import summarize

MARKERS = "osD^vP"


class Point(NamedTuple):
    """One mixer at one width: bytes of state for one text, and the accuracy of every seed that has one."""

    n_bytes: int
    accuracies: list[float]


def points(trained: Sequence[Mapping[str, Sequence[Run]]]) -> dict[str, list[Point]]:
    """name -> a point per comparison in which a run of it has finished, smallest state first.

    Args:
        trained: name -> its runs, of each comparison.
    """
    found: dict[str, list[Point]] = {}
    for runs in trained:
        for name, some in runs.items():
            last = [run.last for run in some if run.status == "finished" and run.last is not None]
            if last:
                found.setdefault(name, []).append(Point(last[0].state_bytes, [1 - point.score for point in last]))
    return {name: sorted(some) for name, some in found.items()}


def draw(found: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """The mean of the seeds joined by lines, every seed as a mark."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, (name, some) in enumerate(found.items()):
        look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i // len(PALETTE) % len(MARKERS)]}
        sizes = [point.n_bytes for point in some]
        axes.plot(sizes, [100 * summarize(point.accuracies).mean for point in some], label=name, linewidth=1.8, **look)
        for point in some:
            axes.plot([point.n_bytes] * len(point.accuracies), [100 * a for a in point.accuracies], "_", color=look["color"])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.size(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("state for one text")
    axes.set_ylabel("accuracy %")
    axes.set_ylim(-2, 102)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
