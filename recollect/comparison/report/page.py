"""The report as one HTML file that needs no network: it reads without scripts; they draw the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recollect import pages
from recollect.comparison import published
from recollect.comparison.report import curves, inspections, units
from recollect.comparison.report.records import Comparison, Run
from recollect.comparison.report.summary import Row, describe, headline, incomplete, mean_curve, notes, rows
from recollect.comparison.report.table import columns, title

SCRIPTS = ("chart.js", "kernels.js", "maps.js")
CURVES = "A thin line per seed, a strong one for their mean. Point at the picture, or focus it and use the arrow keys, to read values."
KERNELS = """A key-query kernel mixes the attention scores of neighbouring queries (rows) and keys (columns) into one; an untouched
model has a single 1 at query 0, key 0. A head-mixing matrix mixes the maps of several heads (columns) into each head (rows)."""
MAPS = """Each row of a map is one query and each column one key it may look at. Choose a row by pointing at a map or with the
slider: below, the row is painted onto the text that it reads."""


def html(comparison: Comparison) -> str:
    """The whole page. All text that came from files is escaped; numbers travel as JSON."""
    table = rows(comparison)
    inspected, problems = inspections.load(comparison)
    said = [*(["* Lowest mean."] if any(row.best for row in table) else []), *notes(comparison, table), *problems]
    return pages.page(
        title=f"{comparison.plan['task']}: {', '.join(comparison.labels)}",
        eyebrow=f"recollect compare: {title(comparison)}",
        headline=headline(comparison, table),
        header=_meta(comparison) + pages.command(str(comparison.plan.get("command") or "")),
        main=[
            pages.section(
                "results",
                "Results",
                _incomplete(comparison, table),
                _results(comparison, table),
                _seeds(comparison, table),
                pages.notes(said),
                _published() if comparison.plan["task"] == "find-block" else "",
            ),
            pages.section("curves", "Learning curves", f"<div id='plot'>{_WITHOUT_SCRIPTS}</div>", lead=CURVES),
            pages.section("examples", "Example predictions", *_examples(comparison, inspected)),
            _drawn("kernels", "Learned kernels", KERNELS, "kernel-controls", "kernel-grid"),
            _drawn("maps", "What one example attends to", MAPS, "map-controls", "map-panels"),
            pages.section(
                "plan", "Configuration", _forms(table), pages.folded("The whole plan (comparison.json)", comparison.plan)
            ),
        ],
        data=_data(comparison, table, inspected),
        scripts=[pages.asset(__package__, name) for name in SCRIPTS],
    )


_WITHOUT_SCRIPTS = f"<noscript>{pages.note('Scripts are off; curves.svg beside this page shows the curves.')}</noscript>"


def _drawn(name: str, heading: str, lead: str, controls: str, pictures: str) -> str:
    """A section that a script fills and shows."""
    boxes = f"<div class='controls' id='{controls}'></div><div id='{pictures}'></div>"
    return pages.section(name, heading, boxes, lead=lead, hidden=True)


def _finite(value: float, digits: int = 6) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _data(comparison: Comparison, table: Sequence[Row], inspected: Sequence[inspections.Inspection]) -> dict[str, Any]:
    """What the scripts draw. A point is [step, tokens, seconds, score, loss]; None where a number is not finite."""
    level = comparison.chance_score
    return {
        "metric": comparison.metric,
        "chance": None if level is None else _finite(level),
        "floor": curves.floor(comparison),
        "mixers": [
            {
                "label": row.label,
                "runs": [{"seed": run.seed, "points": _points(run)} for run in row.runs if run.points],
                "mean": [[_finite(value) for value in point] for point in mean_curve(row.runs)],
            }
            for row in table
        ],
        "inspections": [
            {
                "label": item.label,
                "seed": item.seed,
                "query": inspections.first_query(item),
                "tokens": [str(token) for token in item.content.get("map_tokens") or []],
                "maps": inspections.maps(item),
                "kernels": inspections.kernels(item, comparison.plan),
            }
            for item in inspected
        ],
    }


def _points(run: Run) -> list[list[float | None]]:
    return [[p.step, p.tokens, _finite(p.seconds), _finite(p.score), _finite(p.loss)] for p in run.points]


def _meta(comparison: Comparison) -> str:
    plan = comparison.plan
    model = plan.get("model") or {}
    shape = [
        f"{model[key]} {word}"
        for key, word in (("num_hidden_layers", "layers"), ("num_attention_heads", "heads"))
        if key in model
    ]
    shape += [f"width {model['hidden_size']}"] if "hidden_size" in model else []
    parts = [
        ", ".join(shape),
        f"{comparison.n_eval:,} held-out examples" if comparison.metric == "error" and comparison.n_eval else "",
    ]
    parts.append(str(plan.get("created") or "").replace("T", " ")[:16])
    return f"<p class='meta'>{escape(' · '.join(part for part in parts if part))}</p>"


def _swatch(index: int) -> str:
    return f"<i class='swatch' style='--c:var(--s{index % len(curves.PALETTE)})'></i>"


def _results(comparison: Comparison, table: Sequence[Row]) -> str:
    shown = columns(comparison.metric)
    lines = [
        pages.row(
            row.label + (" *" if row.best else ""),
            [_dash(column.cell(row)) for column in shown],
            kind="best" if row.best else "",
            before=_swatch(i),
        )
        for i, row in enumerate(table)
    ]
    return pages.table("Result over seeds", ["mixer", *(column.title for column in shown)], lines)


def _dash(text: str) -> str:
    """ "3.1 to 5.2" -> "3.1–5.2": the page can afford the sign that the terminal may lack."""
    return "–" if text == "-" else text.replace(" to ", "–")  # noqa: RUF001 (an en dash is meant)


def _seeds(comparison: Comparison, table: Sequence[Row]) -> str:
    def cell(run: Run) -> str | pages.Cell:
        finished = run.status == "finished"
        return units.score(run.points[-1].score, comparison.metric) if finished else pages.Cell(run.status, "open")

    lines = [pages.row(row.label, [cell(run) for run in row.runs], before=_swatch(i)) for i, row in enumerate(table)]
    unit = "error %" if comparison.metric == "error" else "bits per byte"
    return pages.table(f"Every seed, {unit}", ["mixer", *(f"seed {seed}" for seed in comparison.plan["seeds"])], lines)


def _forms(table: Sequence[Row]) -> str:
    """Which forms of the ops each mixer ran: a plain one where a compiled one could not is several times slower."""
    ran = [(row.label, sorted({form for run in row.runs for form in run.forms}), _swatch(i)) for i, row in enumerate(table)]
    lines = [pages.row(label, ["; ".join(forms)], before=swatch) for label, forms, swatch in ran if forms]
    return pages.table("Forms of the operations that ran", ["mixer", "forms"], lines) if lines else ""


def _incomplete(comparison: Comparison, table: Sequence[Row]) -> str:
    said = [f"{run.label} seed {run.seed}: {describe(run, comparison.metric)}" for run in incomplete(table)]
    return pages.notes(said, "warn") if said else ""


def _published() -> str:
    lines = [pages.row(name, [f"{mean} ± {std}" for mean, std in cells]) for name, cells in published.FIND_BLOCK.items()]
    table = pages.table(published.TITLE.replace("+-", "±"), ["model", *published.COLUMNS], lines)
    return f"<div class='aside'>{table}{pages.note(published.NOTE)}</div>"


def _examples(comparison: Comparison, inspected: Sequence[inspections.Inspection]) -> list[str]:
    cards = inspections.examples(inspected)
    return [_example(card, comparison.metric) for card in cards] or [
        pages.note("No example predictions were stored for these runs.")
    ]


def _example(card: Mapping[str, Any], metric: str) -> str:
    """One example: what the model read (the target marked where it stands in it once), and what each mixer said.

    A text may go on in many ways, so continuations are shown without a verdict.
    """
    prompt, target, judged = card["prompt"], card["target"], metric == "error"
    text = _marked(prompt, target) if judged else escape(prompt)
    answers = "".join(_answer(answer, target, judged) for answer in card["answers"])
    tags = ", ".join(f"{key} {value}" for key, value in card["tags"].items()) if isinstance(card["tags"], Mapping) else ""
    note = pages.note(tags) if tags else ""
    name, blank, kind = ("target", "<td></td>", "example") if judged else ("the text goes on", "", "example long")
    return (
        f"<article class='{kind}'><div><pre>{text}</pre>{note}</div>"
        f"<table><tr><th scope='row'>{name}</th><td><code>{escape(target)}</code></td>{blank}</tr>{answers}</table></article>"
    )


def _marked(prompt: str, target: str) -> str:
    """The prompt, the target (or all of it but an end sign) marked where it stands in it once; short ones do so by chance."""
    for wanted in (target, target[:-1]):
        if len(wanted) >= 3 and prompt.count(wanted) == 1:
            before, after = prompt.split(wanted)
            return f"{escape(before)}<mark>{escape(wanted)}</mark>{escape(after)}"
    return escape(prompt)


def _answer(answer: Mapping[str, Any], target: str, judged: bool) -> str:
    said, correct = answer["prediction"], answer["correct"]
    who = f"<th scope='row'>{escape(answer['label'])}<small> seed {answer['seed']}</small></th>"
    if not judged:
        return f"<tr>{who}<td><code>{escape(said)}</code></td></tr>"
    code = escape(said)
    if len(said) == len(target):
        code = "".join(escape(a) if a == b else f"<b>{escape(a)}</b>" for a, b in zip(said, target, strict=True))
    verdict = (
        "<td></td>" if correct is None else "<td class='right'>✓ right</td>" if correct else "<td class='wrong'>✗ wrong</td>"
    )
    return f"<tr>{who}<td><code>{code}</code></td>{verdict}</tr>"
