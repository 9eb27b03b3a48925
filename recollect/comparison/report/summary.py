"""From runs to what a reader wants to know: one row per mixer, the finding in a sentence, and what must be said beside it.

Only finished runs enter means, ranges and intervals; every other run is named with how far it came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from recollect.comparison.report import units
from recollect.comparison.report.records import Comparison, Point, Run
from recollect.evaluation.statistics import Interval, Summary, pooled, summarize


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mixer.

    score, interval, loss are over the finished seeds, None where there are none; the costs are means over these, or over what
    the unfinished runs have spent so far.
    """

    label: str
    runs: tuple[Run, ...]
    score: Summary | None
    interval: Interval | None
    loss: float
    parameters: int
    step: float
    steps: int | None
    tokens: float
    seconds: float
    tokens_per_second: float
    state_bytes: float
    best: bool

    @property
    def n_finished(self) -> int:
        return self.score.n if self.score else 0


def rows(comparison: Comparison) -> list[Row]:
    """One row per mixer in the plan's order; the lowest mean is marked `best` where means differ."""
    planned = {mixer["label"]: int(mixer.get("parameters") or 0) for mixer in comparison.plan["mixers"]}
    made = [_row(label, comparison.runs[label], comparison.metric, planned[label]) for label in comparison.labels]
    means = [row.score.mean for row in made if row.score]
    if len(set(means)) < 2:
        return made
    return [_mark(row) if row.score and row.score.mean == min(means) else row for row in made]


def headline(comparison: Comparison, table: Sequence[Row]) -> str:
    """What was found, in one sentence, from the numbers alone. It claims no winner where the seeds overlap."""
    ranked = sorted((row for row in table if row.score), key=lambda row: row.score.mean if row.score else math.inf)
    if not ranked:
        started = sum(run.status != "not started" for row in table for run in row.runs)
        return f"No run has finished yet; {started} of {sum(len(row.runs) for row in table)} have started."
    best = ranked[0]
    others = ranked[1:]
    # The plain Transformer is the yardstick where it takes part; otherwise the runner-up.
    plain = {mixer["label"] for mixer in comparison.plan["mixers"] if mixer.get("mixer", mixer["label"]) == "attention"}
    other = next((row for row in others if row.label in plain), others[0] if others else None)
    if comparison.metric == "error":
        return _error_headline(comparison, best, other)
    return _bits_headline(best, other)


def notes(comparison: Comparison, table: Sequence[Row]) -> list[str]:
    """What a reader must know beside the numbers: the level of a guess, how to read the interval, what did not finish."""
    said = []
    if comparison.chance_score is not None:
        value = units.score(comparison.chance_score, comparison.metric)
        said.append(
            f"Chance level: a guess is wrong on {value} %." if comparison.metric == "error" else f"Chance level: {value}."
        )
    if any(row.interval for row in table):
        said.append(
            "95 %: Wilson interval over the held-out examples of all seeds together. It does not cover the luck of a seed; "
            "the range shows that."
        )
    if comparison.skipped_lines:
        said.append(f"{comparison.skipped_lines} lines of results.jsonl are cut off or of another plan and were left out.")
    return said


def describe(run: Run, metric: str) -> str:
    """One run in words: its score, or how far it came and why it stopped."""
    last = run.last
    value = f"{units.score(last.score, metric)}{' %' if metric == 'error' else ''}" if last else ""
    if run.status == "finished":
        return value
    at = f" at step {last.step:,}{f' of {run.steps:,}' if run.steps else ''} ({value})" if last else ""
    return f"{run.status}{at}{': ' + run.reason if run.reason else ''}"


def incomplete(table: Sequence[Row]) -> list[Run]:
    """The runs that did not finish, in order."""
    return [run for row in table for run in row.runs if run.status != "finished"]


def mean_curve(row_runs: Sequence[Run]) -> list[tuple[float, float, float, float, float]]:
    """Means over seeds of (step, tokens, seconds, score, loss): of the finished runs, or of all where none has finished.

    Only steps that all of these have evaluated count: a mean over changing sets of seeds would jump where one of them stops.
    """
    chosen = [run for run in row_runs if run.status == "finished"] or [run for run in row_runs if run.points]
    curves = [{point.step: point for point in run.points} for run in chosen]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    means = []
    for step in shared:
        points = [curve[step] for curve in curves]
        if all(math.isfinite(point.score) for point in points):
            fields = zip(*((p.step, p.tokens, p.seconds, p.score, p.loss) for p in points), strict=True)
            step_, tokens, seconds, score, loss = (fmean(field) for field in fields)
            means.append((step_, tokens, seconds, score, loss))
    return means


def _row(label: str, runs: tuple[Run, ...], metric: str, parameters: int) -> Row:
    finished = [run.points[-1] for run in runs if run.status == "finished"]
    spent = finished or [run.points[-1] for run in runs if run.points]
    scores = [point.score for point in finished]
    interval = None
    if metric == "error" and finished and all(point.n_eval > 0 and 0 <= point.score <= 1 for point in finished):
        interval = pooled(scores, [point.n_eval for point in finished])
    return Row(
        label=label,
        runs=runs,
        score=summarize(scores) if scores else None,
        interval=interval,
        loss=_mean([point.loss for point in finished]),
        parameters=parameters or max((point.parameters for point in spent), default=0),
        step=_mean([point.step for point in spent]),
        steps=runs[0].steps if runs else None,
        tokens=_mean([point.tokens for point in spent]),
        seconds=_mean([point.seconds for point in spent]),
        tokens_per_second=_mean([_rate(point) for point in spent]),
        state_bytes=_mean([point.state_bytes for point in spent]),
        best=False,
    )


def _mark(row: Row) -> Row:
    return Row(**{**vars(row), "best": True})


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _rate(point: Point) -> float:
    """Tokens per second over the whole run; the line's own figure may be of the last interval only."""
    return point.tokens / point.seconds if point.tokens and point.seconds > 0 else point.tokens_per_second


def _seeds(row: Row) -> str:
    return "one seed" if row.n_finished == 1 else f"mean of {row.n_finished} seeds"


def _apart(best: Row, other: Row) -> bool:
    """Whether the worst seed of `best` beats the best seed of `other`; single seeds need disjoint intervals too."""
    assert best.score
    assert other.score
    if best.score.max >= other.score.min:
        return False
    if (best.n_finished > 1 and other.n_finished > 1) or not best.interval or not other.interval:
        return True
    return best.interval.high < other.interval.low


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def _error_headline(comparison: Comparison, best: Row, other: Row | None) -> str:
    assert best.score
    chance = comparison.chance_score
    value = f"{units.percent(best.score.mean)} %"
    if chance is not None and (best.score.mean >= chance or (best.interval and best.interval.high >= chance)):
        who = "No mixer does" if other else f"{best.label} does not do"
        return f"{who} better than a guess, which is wrong on {units.percent(chance)} %: {best.label} is wrong on {value}."
    if best.score.max == 0:
        total = sum(run.points[-1].n_eval for run in best.runs if run.status == "finished")
        start = f"{best.label} makes no mistake on {total:,} held-out examples"
    else:
        start = f"{best.label} is wrong on {value} of the held-out examples ({_seeds(best)})"
    if other is None:
        return f"{start}{f'; a guess is wrong on {units.percent(chance)} %' if chance is not None else ''}."
    assert other.score
    against = f"{other.label} on {units.percent(other.score.mean)} %"
    if not _apart(best, other):
        return f"{start}, {against}; these results overlap, so the order is not settled."
    if best.score.mean > 0:
        return f"{start}, {against}: {_times(other.score.mean / best.score.mean)} times as many."
    return f"{start}; {other.label} is wrong on {units.percent(other.score.mean)} %."


def _bits_headline(best: Row, other: Row | None) -> str:
    assert best.score
    start = f"{best.label} needs {best.score.mean:.3f} bits per byte of held-out text ({_seeds(best)})"
    if other is None:
        return f"{start}."
    assert other.score
    if not _apart(best, other):
        return f"{start}, {other.label} {other.score.mean:.3f}; their seeds overlap, so the order is not settled."
    saved = 100 * (1 - best.score.mean / other.score.mean)
    return f"{start}, {saved:.1f} % fewer than {other.label} with {other.score.mean:.3f}."
