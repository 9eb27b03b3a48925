"""What a few seeds and a finite test set allow one to say: binomial intervals and summaries over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class Summary(NamedTuple):
    """Values of one quantity over seeds; `std` is the sample standard deviation (n - 1), None for a single value."""

    n: int
    mean: float
    min: float
    max: float
    std: float | None


def wilson(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a binomial proportion. Unlike mean +- 2 std it is right near 0 and 1, where good models end.

    Args:
        successes: number of successes in [0, n]; fractions are allowed (a rate times n).
        n: number of trials, >= 1.
        confidence: coverage, in (0, 1).
    Returns:
        The proportions p with |successes / n - p| <= z sqrt(p (1 - p) / n).
    Raises:
        ValueError: an argument is out of range.
    Source: Wilson 1927, JASA 22 (158).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n = {n}; got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1; got {confidence}")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = successes / n
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and n the ends are exact; the formula leaves rounding there.
    return Interval(0.0 if successes == 0 else max(0.0, center - half), 1.0 if successes == n else min(1.0, center + half))


def pooled(rates: Sequence[float], counts: Sequence[int], *, confidence: float = 0.95) -> Interval:
    """Wilson interval of the error of several seeds taken together: all their test examples as one sample.

    It says how well the test set determines the error of *these* trained models, not how much another seed would differ: the
    spread over seeds is often far wider, so report it beside this.

    Args:
        rates: share of successes per seed, in [0, 1].
        counts: test examples per seed, >= 1.
        confidence: coverage, in (0, 1).
    Raises:
        ValueError: no seeds, lengths differ, or a value is out of range.
    """
    if not rates or len(rates) != len(counts):
        raise ValueError(f"need one rate and one count per seed, at least one; got {len(rates)} rates and {len(counts)} counts")
    for rate, count in zip(rates, counts, strict=True):
        if not 0 <= rate <= 1 or count < 1:
            raise ValueError(f"a rate must be in [0, 1] and its count at least 1; got rate {rate} and count {count}")
    total = sum(counts)
    successes = math.fsum(rate * count for rate, count in zip(rates, counts, strict=True))
    return wilson(min(successes, total), total, confidence=confidence)


def interval_of_mean(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Interval of the mean of independent quantities, each counting alike, from the intervals of theirs.

    Distances from value to end add like standard errors, below and above apart; so, unlike mean +- 2 standard errors, it lies
    between the means of the lower and of the upper ends, and of one quantity it is that one's own.

    Args:
        values: one per quantity, at least one.
        intervals: theirs, all of one confidence, which is that of the result.
    Raises:
        ValueError: no values, or another number of intervals.
    Source: Zou and Donner 2008, Statistics in Medicine 27 (10), for sums; of Wilson intervals: Newcombe 1998, ibid. 17 (8).
    """
    if not values or len(values) != len(intervals):
        raise ValueError(f"need one interval per value, at least one; got {len(values)} values and {len(intervals)} intervals")
    mean, n = fmean(values), len(values)
    below = math.hypot(*(value - each.low for value, each in zip(values, intervals, strict=True)))
    above = math.hypot(*(each.high - value for value, each in zip(values, intervals, strict=True)))
    return Interval(mean - below / n, mean + above / n)


def summarize(values: Sequence[float]) -> Summary:
    """Mean, range and sample standard deviation of one finite value per seed.

    Raises:
        ValueError: no values, or one is not finite (a diverged run has no place in a mean; report it beside).
    """
    if not values:
        raise ValueError("need at least one value to summarize")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite; got {list(values)}")
    spread = stdev(values) if len(values) > 1 else None
    # The mean of equal values may round past them; a mean outside [min, max] would look like a mistake.
    mean = min(max(fmean(values), min(values)), max(values))
    return Summary(len(values), mean, min(values), max(values), spread)
