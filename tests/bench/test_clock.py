"""The statistics on series that are known, with a clock that does not run by itself."""

from __future__ import annotations

import numpy as np
import pytest

from recollect.bench.clock import foreseen, growth, interleaved, ratio, timing


def test_runs_take_turns() -> None:
    """Prevents all rounds of one run before the next, where drift of the machine looks like a difference."""
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert "".join(order) == "ab" + "abab"


def test_seconds_are_those_of_the_clock_with_the_wait_inside() -> None:
    """Prevents timing the launch of a GPU's work instead of the work."""
    time = [0.0]

    def work(seconds: float) -> None:
        time[0] += seconds

    found = interleaved({"a": lambda: work(1.0)}, repeats=3, wait=lambda: work(10.0), now=lambda: time[0])
    assert found == {"a": [11.0, 11.0, 11.0]}


def test_median_and_spread() -> None:
    """Prevents a mean, which one disturbed round moves."""
    assert timing([5.0, 1.0, 100.0, 2.0]) == (3.5, 1.0, 100.0)
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 1.37])
def test_the_exponent_of_a_power_is_found(exponent: float) -> None:
    """Prevents a fit in the wrong logarithm, or of the value on a linear axis."""
    points = {length: 3e-4 * length**exponent for length in (512, 1024, 4096, 65536)}
    assert growth(points) == pytest.approx(exponent, abs=1e-12)


def test_the_exponent_is_that_of_least_squares() -> None:
    """Prevents a slope between the first and the last point, by numpy's fit as the other opinion."""
    points = {16: 1.0, 32: 5.0, 64: 6.0, 128: 20.0}
    slope, _ = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)
    assert growth(points) == pytest.approx(slope)
    assert growth({16: 1.0}) is None


def test_what_is_foreseen_follows_the_growth() -> None:
    """Prevents waiting for a quadratic step at a length that the last two already rule out."""
    assert foreseen({}, 64) is None
    assert foreseen({16: 1.0}, 64) == pytest.approx(4.0)
    assert foreseen({16: 1.0, 32: 4.0}, 128) == pytest.approx(64.0)
    assert foreseen({16: 4.0, 32: 1.0}, 128) == pytest.approx(1.0), "noise is no reason to hope"
