"""Intervals and summaries against published values and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recollect.evaluation.statistics import interval_of_mean, pooled, summarize, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_newcombe(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, Table I, method 3: a wrong centre or half-width shows in the fourth digit."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(1, 10), (3.5, 12), (500, 1000), (999, 1000)])
def test_wilson_ends_solve_the_score_test(successes: float, n: int, confidence: float) -> None:
    """At either end |p - rate| is exactly z standard deviations of p; z by bisection on erf, not by the library."""
    low, high = 0.0, 10.0
    for _ in range(200):
        z = (low + high) / 2
        low, high = (z, high) if math.erf(z / math.sqrt(2)) < confidence else (low, z)
    for end in wilson(successes, n, confidence=confidence):
        assert abs(end - successes / n) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_wilson_is_exact_and_symmetric_at_the_borders() -> None:
    """No errors must give a lower end of exactly 0, and swapping success and failure must mirror the interval."""
    assert wilson(0, 50).low == 0.0
    assert wilson(50, 50).high == 1.0
    assert 1 - wilson(3, 50).low == pytest.approx(wilson(47, 50).high, abs=1e-15)
    assert wilson(0, 1).high < 1


def test_wilson_covers_as_promised() -> None:
    """Coverage of the nominal 95 % interval, averaged over rates, computed exactly from the binomial distribution."""
    n, rates = 40, np.linspace(0.01, 0.99, 99)
    intervals = [wilson(k, n) for k in range(n + 1)]
    weights = np.array([[math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)] for p in rates])
    inside = np.array([[low <= p <= high for low, high in intervals] for p in rates])
    assert (weights * inside).sum(axis=1).mean() == pytest.approx(0.95, abs=0.01)


def test_interval_of_mean_matches_newcombe() -> None:
    """Newcombe 1998, Statistics in Medicine 17, Table II, method 10: of 56/70 - 48/80, as twice the mean of 56/70 and 32/80, less 1."""
    low, high = interval_of_mean([56 / 70, 32 / 80], [wilson(56, 70), wilson(32, 80)])
    assert (2 * low - 1, 2 * high - 1) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_interval_of_mean_of_one_is_its_own_and_of_many_stays_a_share() -> None:
    """Ends outside [0, 1], or an interval that a single data set has not, would show that mean +- 2 standard errors came back."""
    assert interval_of_mean([0.3], [wilson(3, 10)]) == pytest.approx(wilson(3, 10))
    assert interval_of_mean([1.0] * 5, [wilson(9, 9)] * 5).high == 1.0
    low, high = interval_of_mean([0.0] * 5, [wilson(0, 9)] * 5)
    assert low == 0.0
    assert high == pytest.approx(wilson(0, 9).high / math.sqrt(5))
    with pytest.raises(ValueError, match="one interval per value"):
        interval_of_mean([0.5, 0.5], [wilson(1, 2)])


def test_pooled_equals_one_large_sample() -> None:
    """Seeds are pooled by counts: weighting seeds of unequal test sizes equally would shift the interval."""
    assert pooled([0.5, 0.1], [10, 1000]) == wilson(105, 1010)
    assert pooled([0.1 + 0.2], [10]) == pytest.approx(wilson(3, 10), abs=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(1, 0),
        lambda: wilson(-1, 5),
        lambda: wilson(6, 5),
        lambda: wilson(1, 5, confidence=1.0),
        lambda: pooled([], []),
        lambda: pooled([0.1], [10, 10]),
        lambda: pooled([1.1], [10]),
        lambda: summarize([]),
        lambda: summarize([1.0, math.nan]),
    ],
)
def test_statistics_refuse_what_has_no_meaning(call) -> None:
    """A nonsense argument must not become a plausible number in a report."""
    with pytest.raises(ValueError, match=r"must|need"):
        call()


def test_summary_matches_numpy() -> None:
    """The standard deviation is the sample's (n - 1), as papers report it."""
    values = [0.3, 0.1, 0.25]
    summary = summarize(values)
    assert (summary.n, summary.min, summary.max) == (3, 0.1, 0.3)
    assert summary.mean == pytest.approx(np.mean(values), abs=1e-15)
    assert summary.std == pytest.approx(np.std(values, ddof=1), abs=1e-15)


def test_summary_of_one_value_claims_no_spread() -> None:
    """One seed has no standard deviation; 0 would claim certainty."""
    assert summarize([0.2]).std is None


def test_summary_mean_stays_inside_the_range() -> None:
    """The floating-point mean of equal values must not fall outside them."""
    assert summarize([0.1] * 3).mean == 0.1
