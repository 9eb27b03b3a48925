"""Reading a comparison's folder: the plan, and every run with what it reached. Partial folders are read as far as they go."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recollect.training.journal import Event, read_lines

Status = Literal["finished", "unfinished", "failed", "not started"]


class Point(NamedTuple):
    """One evaluation of one run.

    score: share of the held-out examples that are wrong, or bits per byte; loss: nats per labelled token; both may be NaN or
    infinite. seconds: training time so far.
    """

    step: int
    score: float
    loss: float
    seconds: float
    tokens: int
    tokens_per_second: float
    state_bytes: int
    n_eval: int
    parameters: int
    final: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """One mixer with one seed: its evaluations in order of steps, how it ended (`reason` says why it failed), and the forms of ops
    that it ran, "OP: FORM"."""

    label: str
    seed: int
    steps: int | None
    points: tuple[Point, ...]
    status: Status
    reason: str
    folder: Path
    forms: tuple[str, ...] = ()

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a folder of `recollect compare` holds.

    Attributes:
        plan: comparison.json as it stands.
        metric: "error" or "bits_per_byte".
        labels: the mixers' labels, in the order of the plan.
        runs: for each label, one run per planned seed, in order; none is left out.
        skipped_lines: lines of results.jsonl that are no whole evaluation of this plan.
    """

    plan: Mapping[str, Any]
    metric: str
    labels: tuple[str, ...]
    runs: Mapping[str, tuple[Run, ...]]
    skipped_lines: int

    @property
    def chance_score(self) -> float | None:
        """The metric of a guess: 1 - chance for the error; None where the plan knows none."""
        chance = self.plan.get("chance")
        if chance is None:
            return None
        return 1 - float(chance) if self.metric == "error" else float(chance)

    @property
    def n_eval(self) -> int:
        """Held-out examples per evaluation (of the last evaluation seen; the plan's where nothing ran)."""
        points = [run.last for runs in self.runs.values() for run in runs if run.last]
        return points[-1].n_eval if points else int(self.plan.get("n_eval") or 0)


def read(out: Path) -> Comparison:
    """Read the folder that `recollect compare --out OUT` wrote.

    Args:
        out: the folder; must hold comparison.json. Everything else may be missing or cut off.
    Raises:
        ValueError: comparison.json is missing or is no plan.
    """
    plan = _read_plan(out / "comparison.json")
    metric = plan["metric"]
    labels = tuple(mixer["label"] for mixer in plan["mixers"])
    seeds = [int(seed) for seed in plan["seeds"]]
    found: dict[tuple[str, int], dict[int, Point]] = {(label, seed): {} for label in labels for seed in seeds}
    skipped = 0
    for line in _lines(out / "results.jsonl"):
        point = _point(line, metric, plan.get("config_hash"))
        if point is None or point[0] not in found:
            skipped += 1
            continue
        found[point[0]][point[1].step] = point[1]  # a resumed run may repeat a step: the later line counts
    runs = {label: tuple(_run(out, plan, label, seed, found[label, seed]) for seed in seeds) for label in labels}
    return Comparison(plan=plan, metric=metric, labels=labels, runs=runs, skipped_lines=skipped)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path.parent} holds no comparison.json; give the --out folder of a `recollect compare` run"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not a whole JSON file: {error}") from error
    missing = [key for key in ("task", "metric", "mixers", "seeds") if not isinstance(plan, dict) or key not in plan]
    if missing:
        raise ValueError(f"{path} is no comparison plan: it lacks {', '.join(missing)}")
    if plan["metric"] not in ("error", "bits_per_byte"):
        raise ValueError(f"{path}: metric must be 'error' or 'bits_per_byte'; got {plan['metric']!r}")
    return plan


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _point(line: str, metric: str, config_hash: str | None) -> tuple[tuple[str, int], Point] | None:
    """((label, seed), Point) of one line of results.jsonl; None for a cut-off line or one of another plan."""
    try:
        row = json.loads(line)
        if config_hash is not None and row.get("config_hash", config_hash) != config_hash:
            return None
        return (row["mixer"], int(row["seed"])), Point(
            step=int(row["step"]),
            score=_number(row[metric]),
            loss=_number(row.get("loss")),
            seconds=_number(row.get("seconds")),
            tokens=int(row.get("tokens") or 0),
            tokens_per_second=_number(row.get("tokens_per_second")),
            state_bytes=int(row.get("state_bytes") or 0),
            n_eval=int(row.get("n_eval") or 0),
            parameters=int(row.get("parameters") or 0),
            final=bool(row.get("final", False)),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _run(out: Path, plan: Mapping[str, Any], label: str, seed: int, points: Mapping[int, Point]) -> Run:
    folder = out / "runs" / f"{label}-seed{seed}"
    ordered = tuple(points[step] for step in sorted(points))
    events = read_lines(folder / "progress.jsonl")
    steps = plan.get("steps")
    status: Status
    reason = ""
    if ordered and ordered[-1].final:
        status = "finished"
        if not math.isfinite(ordered[-1].score):
            status, reason = "failed", f"the result is {ordered[-1].score}"
    elif reason := _failure(folder, events):
        status = "failed"
    else:
        status = "unfinished" if ordered or folder.is_dir() else "not started"
    return Run(
        label=label,
        seed=seed,
        steps=steps.get(label) if isinstance(steps, Mapping) else steps,
        points=ordered,
        status=status,
        reason=reason,
        folder=folder,
        forms=tuple(
            dict.fromkeys(str(form) for event in events if event.get("event") == "forms" for form in event.get("forms") or ())
        ),
    )


def _failure(folder: Path, events: Sequence[Event]) -> str:
    """Why an unfinished run failed: the end of its journal, else the exception that ends its log; "" if it was only stopped."""
    if events and events[-1].get("event") == "failed":
        return str(events[-1].get("reason") or "no reason given")
    lines = _lines(folder / "log.txt")
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        return ""
    # The exception is the first line after the traceback's frames that is not indented; its message may go on below.
    after = [line for line in lines[starts[-1] + 1 :] if not line.startswith((" ", "\t"))]
    return after[0].strip() if after else "it crashed; see log.txt"
