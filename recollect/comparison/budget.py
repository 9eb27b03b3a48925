"""From a time budget to a number of steps, once: the steps go into the plan, so a resumed or repeated run has the same ones.

Wall time of the whole comparison is what the budget means. Every mixer is timed for a moment under the real conditions (as
many processes at once as there will be), then the schedule of runs over jobs is laid out for a number of steps, and the largest
number that fits is taken, rounded down to two digits.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from recollect.comparison.plan import Plan
from recollect.comparison.pool import POLL_SECONDS, Worker

LEAST_STEPS = 10
REPORT_SECONDS = 6.0  # drawing the report at the end
SAFETY = 0.92  # machines slow down when warm, and checkpoints and inspections take a moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a mixer costs, in seconds of one job: to start a process, per training step, per held-out example."""

    start: float
    step: float
    example: float

    def run(self, plan: Plan, steps: int) -> float:
        """Seconds of a whole run."""
        examples = plan.n_eval + plan.n_eval_curve * (1 + steps // plan.eval_interval(steps))
        return self.start + steps * self.step + examples * self.example


def measure(out: Path, plan: Plan, *, jobs: int, seconds: float, say: Callable[[str], None]) -> dict[str, Cost]:
    """Time every mixer of the plan (stored in `out`), `jobs` processes at once.

    Raises:
        RuntimeError: a mixer does not train at all; the message is its own.
    """
    labels = [mixer["label"] for mixer in plan.mixers]
    costs: dict[str, Cost] = {}
    for first in range(0, len(labels), jobs):
        group = labels[first : first + jobs]
        say(f"timing {', '.join(group)}")
        # A last group that is not full is timed beside copies, for the cores to be as busy as they will be.
        copies = [group[i % len(group)] for i in range(min(jobs, len(plan.runs())))]
        costs.update(_time_group(out, plan, copies, seconds))
    return costs


def _time_group(out: Path, plan: Plan, labels: Sequence[str], seconds: float) -> dict[str, Cost]:
    workers: list[Worker] = []
    try:
        begun = time.monotonic()
        for label in labels:
            workers.append(Worker(out, plan, (label, plan.seeds[0]), arguments=["--time", f"{seconds:.2f}"], capture=True))
        ended: dict[int, float] = {}
        while len(ended) < len(workers):
            time.sleep(POLL_SECONDS)
            for index, worker in enumerate(workers):
                if index not in ended and worker.process.poll() is not None:
                    ended[index] = time.monotonic() - begun
        costs: dict[str, Cost] = {}
        for index, worker in enumerate(workers):
            if worker.process.returncode != 0:
                raise RuntimeError(f"{worker.key[0]} cannot be trained: {_last_line(worker.folder / 'log.txt')}")
            assert worker.process.stdout is not None
            timed = json.loads(worker.process.stdout.read())
            start = max(0.5, ended[index] - timed["spent"])
            cost = Cost(start=start, step=timed["step"], example=timed["example"])
            known = costs.get(worker.key[0])
            costs[worker.key[0]] = cost if known is None or cost.step > known.step else known
        return costs
    finally:
        for worker in workers:
            worker.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"see {log}"


def choose_steps(
    plan: Plan, costs: Mapping[str, Cost], *, seconds: float, spent: float = 0.0, jobs: int
) -> int | dict[str, int]:
    """The most steps whose schedule ends within `seconds`: one number, or with `equal == "time"` one per mixer.

    Args:
        plan: with a time budget.
        costs: of every mixer, by label.
        seconds: wall time of the whole comparison.
        spent: how much of it is over.
        jobs: runs at a time.
    Raises:
        ValueError: not even ten steps fit.
    """
    usable = (seconds - spent) * SAFETY - REPORT_SECONDS

    def ends(steps: Mapping[str, int]) -> float:
        return makespan([costs[label].run(plan, steps[label]) for label, _ in plan.runs()], jobs)

    if plan.equal == "time":
        n_runs = len(plan.runs())
        share = usable / -(-n_runs // min(jobs, n_runs))
        steps = {label: _largest(partial(_fits, cost, plan, share)) for label, cost in costs.items()}
    else:
        steps = dict.fromkeys(costs, _largest(lambda n: ends(dict.fromkeys(costs, n)) <= usable))
    if min(steps.values()) < LEAST_STEPS:
        needed = spent + (ends(dict.fromkeys(costs, LEAST_STEPS)) + REPORT_SECONDS) / SAFETY
        raise ValueError(
            f"the budget {plan.budget!r} is too short: {LEAST_STEPS} steps of every run need about {needed:.0f} s here"
        )
    rounded = {label: _two_digits(n) for label, n in steps.items()}
    return rounded if plan.equal == "time" else next(iter(rounded.values()))


def makespan(durations: Sequence[float], jobs: int) -> float:
    """When the last of `durations` ends if each is begun, in order, by the first free one of `jobs`."""
    free = [0.0] * max(1, min(jobs, len(durations)))
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n with fits(n), up to ten million; 0 if there is none."""
    low, high = 0, 1
    while high < 10_000_000 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(cost: Cost, plan: Plan, share: float, steps: int) -> bool:
    return cost.run(plan, steps) <= share


def _two_digits(n: int) -> int:
    """Rounded down: 1437 -> 1400."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return n // unit * unit
