"""Steps that fit into a time."""

from __future__ import annotations

import dataclasses

import pytest

from recollect.comparison.budget import Cost, choose_steps, makespan
from recollect.comparison.plan import Plan, make_plan
from tests.comparison.small import small

COSTS = {"attention": Cost(start=3, step=0.01, example=0.001), "mta": Cost(start=3, step=0.03, example=0.002)}


def planned(budget: str = "10m", **changes: object) -> Plan:
    return make_plan(small(budget=budget, eval_every=None, **changes))


def test_makespan_is_that_of_a_list_schedule() -> None:
    """Two jobs: 3 and 2 begin, 4 follows the 2, 1 the 3."""
    assert makespan([3, 2, 4, 1], 2) == 6
    assert makespan([3, 2, 4, 1], 1) == 10
    assert makespan([3, 2], 8) == 3


def test_equal_data_fills_the_time_with_equal_steps() -> None:
    """The same steps for all: the schedule ends within the budget and a tenth more steps would not."""
    plan = planned(seeds=3)
    steps = choose_steps(plan, COSTS, seconds=600, jobs=2)
    assert isinstance(steps, int)

    def ends(n: int) -> float:
        return makespan([COSTS[label].run(plan, n) for label, _ in plan.runs()], 2)

    assert ends(steps) < 600
    assert ends(int(steps * 1.25)) > 600
    assert str(steps)[2:].strip("0") == ""


def test_equal_time_gives_the_faster_mixer_more_steps() -> None:
    plan = planned(equal="time")
    steps = choose_steps(plan, COSTS, seconds=600, jobs=1)
    assert isinstance(steps, dict)
    seconds = {label: COSTS[label].run(plan, n) for label, n in steps.items()}
    assert steps["attention"] > 2 * steps["mta"]
    assert seconds["attention"] == pytest.approx(seconds["mta"], rel=0.1)
    assert sum(seconds.values()) < 600


def test_time_that_is_spent_counts() -> None:
    plan = planned()
    all_steps, fewer = (choose_steps(plan, COSTS, seconds=600, spent=spent, jobs=1) for spent in (0, 300))
    assert isinstance(all_steps, int)
    assert isinstance(fewer, int)
    assert fewer < 0.6 * all_steps


@pytest.mark.parametrize("equal", ["data", "time"])
def test_a_budget_that_is_too_short_says_what_is_needed(equal: str) -> None:
    plan = dataclasses.replace(planned("20s"), equal=equal)
    with pytest.raises(ValueError, match=r"'20s' is too short: 10 steps of every run need about \d+ s"):
        choose_steps(plan, COSTS, seconds=20, spent=10, jobs=1)
