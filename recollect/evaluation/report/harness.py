"""What tasks of lm-evaluation-harness found: its own results and samples, a table, a picture and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from recollect import pages, terminal
from recollect.evaluation.report import figure
from recollect.evaluation.report.page import examples
from recollect.evaluation.runner import PLAN
from recollect.evaluation.suites.base import Result
from recollect.training.checkpoint import replace_file

TITLES = ("task", "metric", "value", "standard error", "n")
Samples: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]  # rows of each task
HEADLINE = 3  # results that it names


class Score(NamedTuple):
    """A line of the table.

    metric: with the filter of the answers in brackets, if there is one. error: standard error over the examples. n: examples.
    None: the harness does not say. is_main: the first of its task, and all of RULER's, whose metrics are lengths.
    """

    task: str
    metric: str
    value: float
    error: float | None
    n: int | None
    higher_is_better: bool | None
    is_main: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Its texts, in the order of `TITLES`."""
        error = "-" if self.error is None else f"{self.error:.2g}"
        return self.task, self.metric, f"{self.value:.4g}", error, "-" if self.n is None else f"{self.n:,}"


def write(out: Path, results: Mapping[str, Any], *, command: str = "") -> Table:
    """Write into `out` results.json (all but the samples), samples.jsonl (a line per example), table.txt, table.md, figure.png,
    figure.svg and report.html; each replaces its older version in one move.

    Args:
        out: folder of an evaluation.
        results: of `recollect.evaluation.harness.run_harness`.
        command: how to run it again; shown on the page.
    Returns:
        The table, for `terminal.show`.
    Raises:
        OSError: a file cannot be written.
    """
    plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    found, samples = scores(results), results.get("samples", {})
    _record(out, results, samples)
    drawn = draw(found, f"lm-evaluation-harness: {plan.get('path', '')}")
    pictures = figure.files(drawn)
    table = _table(found)
    files = {
        "table.txt": terminal.text(table).encode(),
        "table.md": _markdown(found).encode(),
        **pictures,
        "report.html": html(found, samples, plan, pictures["figure.svg"], command).encode(),
    }
    for name, data in files.items():
        replace_file(out / name, data)
    return table


def _record(out: Path, results: Mapping[str, Any], samples: Samples) -> None:
    """What the harness gave, before anything is made of it."""
    rest = {key: value for key, value in results.items() if key != "samples"}
    rows = [{"task": task, **row} for task, some in samples.items() for row in some]
    lines = [json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows]
    replace_file(out / "results.json", json.dumps(rest, indent=2, default=str, ensure_ascii=False).encode())
    replace_file(out / "samples.jsonl", "".join(lines).encode())


def scores(results: Mapping[str, Any]) -> list[Score]:
    """Every metric of every task and group, in the harness's order."""
    found: list[Score] = []
    for task, values in results.get("results", {}).items():
        better = results.get("higher_is_better", {}).get(task, {})
        first = len(found)
        for key, value in values.items():
            name, comma, how = key.partition(",")
            if not comma or name.endswith("_stderr") or not _is_score(name, value):
                continue
            error = values.get(f"{name}_stderr,{how}")
            metric = (f"length {name}" if name.isdigit() else name) + ("" if how == "none" else f" ({how})")
            known = error if isinstance(error, float) else None  # "N/A" of metrics that have none
            is_main = len(found) == first or name.isdigit()
            found.append(Score(task, metric, value, known, values.get("sample_len"), better.get(name), is_main))
    return found


def _is_score(name: str, value: object) -> bool:
    """Whether a metric has a number; not the -1 that RULER's have at lengths that were not asked."""
    return isinstance(value, (int, float)) and not (name.isdigit() and value == -1)


def draw(found: Sequence[Score], title: str) -> Figure:
    """A bar per task, with its standard error: a panel per metric, of the main ones."""
    panels: dict[str, list[Score]] = {}
    for score in found:
        if score.is_main:
            panels.setdefault(score.metric, []).append(score)
    heights = [0.8 + 0.3 * len(some) for some in panels.values()]
    figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights}) if panels else ()
    for (panel,), (metric, some) in zip(grid, panels.items(), strict=True):
        values = [score.value if math.isfinite(score.value) else math.nan for score in some]  # nan leaves the place empty
        panel.barh(range(len(some)), values, color=matplotlib.colormaps["tab10"](0), height=0.7)
        for at, score in enumerate(some):
            if score.error is not None:
                panel.hlines(at, score.value - score.error, score.value + score.error, color="black", linewidth=1)
        panel.set_yticks(range(len(some)), [score.task for score in some], fontsize=8)
        panel.invert_yaxis()
        if some[0].higher_is_better is not False and max(values) <= 1:
            panel.set_xlim(0, 1)
        panel.set_xlabel(metric, fontsize=8)
        panel.tick_params("x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def html(
    found: Sequence[Score],
    samples: Samples,
    plan: Mapping[str, Any],
    picture: bytes,
    command: str,
) -> str:
    """The whole page; every text that came from a file or a model is escaped."""
    model = plan.get("path", "the model")
    main = [f"{score.task} {score.metric}: {score.cells[2]}" for score in found if score.is_main]
    best = "; ".join(main) if 0 < len(main) <= HEADLINE else f"{len(main)} results of lm-evaluation-harness"
    lines = [pages.row(score.task, score.cells[1:]) for score in found]
    return pages.page(
        title=f"lm-evaluation-harness: {model}",
        eyebrow="recollect evaluate: harness",
        headline=f"{best} for {model}",
        header=pages.command(command),
        main=[
            pages.section(
                "results", "Results", pages.table("Results", TITLES, lines, show_caption=False), pages.notes(_notes(found))
            ),
            pages.section("picture", "Picture", pages.picture(picture, "main metric of each task, with its standard error")),
            pages.section(
                "rows", "Examples", *examples([_example(task, row) for task, rows in samples.items() for row in rows])
            ),
            pages.section("plan", "Configuration", pages.folded("What was evaluated (evaluation.json)", plan)),
        ],
        css=pages.asset(__package__, "evaluation.css"),
    )


def _notes(found: Sequence[Score]) -> list[str]:
    """Which way is better, by metric, and what the errors are of."""
    names = {True: "Higher", False: "Lower"}
    better = {word: sorted({score.metric for score in found if score.higher_is_better is way}) for way, word in names.items()}
    return [
        *(f"{word} is better: {', '.join(metrics)}." for word, metrics in better.items() if metrics),
        "Standard errors are the harness's, over the examples. They say nothing of other training seeds.",
    ]


def _example(task: str, row: Mapping[str, Any]) -> Result:
    """A row of the harness as our page shows rows."""
    values = {name: float(row[name]) for name in row["metrics"] if _is_score(name, row[name])}
    return Result({"task": task}, values, shown(row))


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row of the harness was asked, what the model said, and what is right: texts, as far as its kind of request has them.

    Of several continuations the model "said" the one of the highest likelihood. Of a single one it is known whether greedy decoding
    would have written it, not what else.
    """
    asked, answers, target = row["arguments"], row["filtered_resps"], row["target"]
    first = asked[0]
    if len(first) == 1:
        return {"text": first[0]}
    if not all(isinstance(each[1], str) for each in asked):  # but the options of a text that is generated
        return {"question": first[0], "said": str(answers[0]), "right": _joined(target)}
    if len(asked) == 1:
        return {"question": first[0], "said": first[1] if answers[0][1] else "(something else)", "right": first[1]}
    if any(
        each[0] != first[0] for each in asked
    ):  # WinoGrande's options stand in the question; which is right, its rows do not say
        options = ["".join(each) for each in asked]
        return {"options": "\n".join(options), "said": _likeliest(options, answers)}
    options = [each[1] for each in asked]
    right = options[target] if isinstance(target, int) and target < len(options) else _joined(target)
    return {"question": first[0], "said": _likeliest(options, answers), "right": right}


def _likeliest(options: Sequence[str], answers: Sequence[tuple[float, bool]]) -> str:
    return max(zip(options, answers, strict=True), key=lambda each: each[1][0])[0]


def _joined(target: Any) -> str:
    return " | ".join(map(str, target)) if isinstance(target, (list, tuple)) else str(target)


def _table(found: Sequence[Score]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(TITLES):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for score in found:
        table.add_row(*score.cells)
    return table


def _markdown(found: Sequence[Score]) -> str:
    rows = [TITLES, ("---", "---", "---:", "---:", "---:"), *(score.cells for score in found)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
