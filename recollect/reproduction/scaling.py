"""The stage that draws what training costs: bits per byte against FLOPs, and against the length of the training texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from recollect.comparison.report.curves import PALETTE
from recollect.comparison.report.records import Run
from recollect.evaluation.statistics import summarize
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.reproduction.measured import Trained
from recollect.training.trainer import MODEL

NOTE = (
    "FLOPs are those of matrix products, forward and backward, as PyTorch counts them in the plain form of every mixer; what is no "
    "product, such as the scan of Mamba, is not counted."
)


def flops(seeds: Sequence[Run], length: int) -> float | None:
    """FLOPs of training one model on one token, in texts of `length` tokens; None where no seed has finished.

    Every weight is on the "meta" device, where only the plain forms run and nothing is computed.
    """
    folder = next((each.folder for each in seeds if each.status == "finished"), None)
    if folder is None:
        return None
    config = RecollectConfig.from_pretrained(folder / MODEL)
    with torch.device("meta"):
        model = RecollectForCausalLM(config)
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops() / length


def draw(trained: Sequence[Trained], counts: Sequence[Mapping[str, float | None]]) -> Figure:
    """Left: the mean of the seeds at every evaluation of the comparison with the longest texts, over the FLOPs spent. Right: at the
    end of each comparison, over its length; every seed as a mark.

    Args:
        trained: comparisons, shortest texts first.
        counts: FLOPs per token of each, by name.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(trained[-1].runs):
        colour = PALETTE[i % len(PALETTE)]
        count = counts[-1].get(name)
        if count is not None:
            left.plot(*_over_flops(trained[-1].runs[name], count), label=name, color=colour, linewidth=1.8)
        ends = [(each.length, _ends(each.runs[name])) for each in trained if name in each.runs]
        ends = [(length, scores) for length, scores in ends if scores]
        right.plot(
            [length for length, _ in ends], [summarize(scores).mean for _, scores in ends], color=colour, marker="o", label=name
        )
        for length, scores in ends:
            right.plot([length] * len(scores), scores, "_", color=colour)
    for axes, label in ((left, "FLOPs of training"), (right, "tokens of a training text")):
        _finish(axes, label)
    left.set_xscale("log")
    right.set_xscale("log", base=2)
    left.set_ylabel("bits per byte")
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _over_flops(seeds: Sequence[Run], count: float) -> tuple[list[float], list[float]]:
    """(FLOPs, mean score) at the evaluations that every finished seed has."""
    found = [{point.tokens: point.score for point in each.points} for each in seeds if each.status == "finished"]
    tokens = sorted(set.intersection(*map(set, found))) if found else []
    return [n * count for n in tokens], [summarize([each[n] for each in found]).mean for n in tokens]


def _ends(seeds: Sequence[Run]) -> list[float]:
    return [each.last.score for each in seeds if each.status == "finished" and each.last]


def _finish(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
