"""Seconds of several runs in turn, and what a series of them says."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Median, lowest and highest of a series, in seconds."""

    median: float
    low: float
    high: float


def synchroniser(device: str) -> Callable[[], None]:
    """What waits until a device has done its work: nothing to wait for on a CPU."""
    return partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None


def once(
    run: Callable[[], object], *, wait: Callable[[], None] = lambda: None, now: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call."""
    wait()
    begin = now()
    run()
    wait()
    return now() - begin


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: bool = True,
    wait: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run, in turn A B C A B C ...: drift of the machine hits all alike.

    Args:
        runs: by name.
        repeats: rounds, at least 1.
        warm_up: run each once before the first round.
        wait: called before and after each run, so that a GPU's work is in the time.
        now: the clock, in seconds.
    """
    if warm_up:
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(once(run, wait=wait, now=now))
    return seconds


def timing(seconds: Sequence[float]) -> Timing:
    """Of at least one run."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest) of the round-by-round ratios of two interleaved series."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def growth(points: Mapping[int, float]) -> float | None:
    """The exponent g of value = c length^g by least squares in log-log; None for fewer than two lengths.

    Args:
        points: length -> a positive value.
    """
    if len(points) < 2:
        return None
    x = [math.log(length) for length in points]
    y = [math.log(value) for value in points.values()]
    middle, level = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread


def foreseen(points: Mapping[int, float], length: int) -> float | None:
    """The value at a longer length, from the last one and the growth of the last two (0 to 3; 1 where only one is known).

    Args:
        points: length -> a value, of shorter lengths; of none, the result is None.
    """
    last = sorted(points)[-2:]
    if not last:
        return None
    found = growth({known: max(points[known], 1e-12) for known in last})
    exponent = 1.0 if found is None else min(3.0, max(0.0, found))
    return points[last[-1]] * (length / last[-1]) ** exponent
