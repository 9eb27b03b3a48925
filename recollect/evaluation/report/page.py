"""The report of an evaluation as one HTML file that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from recollect import pages
from recollect.evaluation.report import table
from recollect.evaluation.report.summary import Line, number, show
from recollect.evaluation.suites.base import Metric, Result, Suite

EXAMPLES = 12
LONGEST = 6000  # characters of a text that is shown
FOLDED = 300  # characters of a text that is not folded


def html(
    suite: Suite, results: Sequence[Result], found: Sequence[Line], plan: dict[str, Any], picture: bytes, command: str
) -> str:
    """The whole page; every text that came from a file or a model is escaped."""
    last = found[-1]
    metric = suite.metrics[0]
    notes = [f"{metric.name}: {'higher' if metric.higher_is_better else 'lower'} is better."]
    if last.cells[0].interval is not None:
        notes.append("In brackets: 95 % Wilson intervals over the examples. They say nothing of other training seeds.")
    if last.chance is not None:
        notes.append(
            f"Uniform guesses among the admissible answers score {number(metric, last.chance)} {metric.unit}".strip() + "."
        )
    name = f"{metric.name} %" if metric.unit == "%" else metric.name
    lines = [pages.row(first, others) for first, *others in (table.cells(suite, found, line) for line in found)]
    return pages.page(
        title=f"{suite.name}: {plan.get('path', '')}",
        eyebrow=f"recollect evaluate: {suite.name}",
        headline=f"{suite.name}: {metric.name} {_said(metric, last)} for {plan.get('path', 'the model')}",
        header=pages.command(command),
        main=[
            pages.section(
                "results",
                "Results",
                pages.table("Results", table.titles(suite, found), lines, show_caption=False),
                pages.notes(notes),
            ),
            pages.section("picture", "Picture", pages.picture(picture, f"{name} by {', '.join(suite.dimensions)}")),
            pages.section("rows", "Examples", *examples(results)),
            pages.section("plan", "Configuration", pages.folded("What was evaluated (evaluation.json)", plan)),
        ],
        css=pages.asset(__package__, "evaluation.css"),
    )


def examples(results: Sequence[Result]) -> list[str]:
    """Some of the rows, evenly over all that have a text."""
    return [_example(result) for result in _spread(results)] or [pages.note("This suite shows no texts.")]


def _spread(results: Sequence[Result]) -> list[Result]:
    """Some results that have a text, evenly over all of them."""
    shown = [result for result in results if result.shown]
    step = max(1, len(shown) // EXAMPLES)
    return shown[::step][:EXAMPLES]


def _example(result: Result) -> str:
    group = ", ".join(f"{key} {value}" for key, value in result.group.items())
    values = ", ".join(f"{key} {value:.4g}" for key, value in result.values.items())
    texts = "".join(f"<dt>{escape(name)}</dt><dd>{_text(text)}</dd>" for name, text in result.shown.items())
    return f"<article class='row'>{pages.note(f'{group} · {values}')}<dl>{texts}</dl></article>"


def _said(metric: Metric, line: Line) -> str:
    """The headline metric with its unit: "12.0 % (8.1 to 17.3)"."""
    value, bracket, rest = show(metric, line.cells[0]).partition(" (")
    return f"{value} {metric.unit}".strip() + bracket + rest


def _text(text: str) -> str:
    """A text; a long one folded behind its end, which is where the question stands."""
    whole = f"<pre>{escape(_shortened(text))}</pre>"
    if len(text) <= FOLDED:
        return whole
    return f"<details><summary>... {escape(text[-FOLDED:].strip())}</summary>{whole}</details>"


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
