"""The report as one HTML file that needs no network: it reads without scripts; they draw the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from recollect.comparison.report import curves, inspections, published, units
from recollect.comparison.report.records import Comparison, Run
from recollect.comparison.report.summary import Row, describe, headline, incomplete, mean_curve, notes, rows
from recollect.comparison.report.table import columns, title
from recollect.evaluation.report.page import asset

SCRIPTS = ("core.js", "chart.js", "heat.js", "maps.js")


def html(comparison: Comparison) -> str:
    """The whole page. All text that came from files is escaped; numbers travel as JSON."""
    table = rows(comparison)
    inspected, problems = inspections.load(comparison)
    cards = inspections.examples(inspected)
    said = [*(["* Lowest mean."] if any(row.best for row in table) else []), *notes(comparison, table), *problems]
    return Template(_asset("page.html")).substitute(
        title=escape(f"{comparison.plan['task']}: {', '.join(comparison.labels)}"),
        css=asset("page.css"),
        js="\n".join(_asset(name) for name in SCRIPTS),
        eyebrow=escape(title(comparison)),
        headline=escape(headline(comparison, table)).replace(" %", "&nbsp;%"),
        meta=_meta(comparison),
        table=_results(comparison, table),
        seeds=_seeds(comparison, table),
        notes="".join(f"<li>{escape(note)}</li>" for note in said),
        incomplete=_incomplete(comparison, table),
        published=_published() if comparison.plan["task"] == "find-block" else "",
        examples="".join(_example(card, comparison.metric) for card in cards)
        or _nothing("No example predictions were stored for these runs."),
        plan=escape(json.dumps(comparison.plan, indent=2, ensure_ascii=False, default=str)),
        data=_json(_data(comparison, table, inspected)),
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON for a script element: `<` and `&` written so that no text can end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


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
    line = " · ".join(escape(part) for part in parts if part)
    words = " ".join(f"<span>{escape(word)}</span>" for word in str(plan.get("command") or "").split())
    return f"<p class='meta'>{line}</p>{f'<code>{words}</code>' if words else ''}"


def _cells(texts: Sequence[str], tag: str = "td") -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _swatch(index: int) -> str:
    return f"<i class='swatch' style='--c:var(--s{index % len(curves.PALETTE)})'></i>"


def _table(caption: str, titles: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in titles)
    return (
        f"<div class='box'><p>{escape(caption)}</p>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(caption)}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def _results(comparison: Comparison, table: Sequence[Row]) -> str:
    shown = columns(comparison.metric)
    lines = [
        f"<tr{' class=best' if row.best else ''}><th scope='row'>{_swatch(i)}{escape(row.label)}{' *' if row.best else ''}</th>"
        f"{_cells([_dash(column.cell(row)) for column in shown])}</tr>"
        for i, row in enumerate(table)
    ]
    return _table("Result over seeds", ["mixer", *(column.title for column in shown)], lines)


def _dash(text: str) -> str:
    """ "3.1 to 5.2" -> "3.1–5.2": the page can afford the sign that the terminal may lack."""
    return "–" if text == "-" else text.replace(" to ", "–")  # noqa: RUF001 (an en dash is meant)


def _seeds(comparison: Comparison, table: Sequence[Row]) -> str:
    lines = []
    for i, row in enumerate(table):
        cells = [
            f"<td>{escape(units.score(run.points[-1].score, comparison.metric))}</td>"
            if run.status == "finished"
            else f"<td class='open'>{escape(run.status)}</td>"
            for run in row.runs
        ]
        lines.append(f"<tr><th scope='row'>{_swatch(i)}{escape(row.label)}</th>{''.join(cells)}</tr>")
    unit = "error %" if comparison.metric == "error" else "bits per byte"
    return _table(f"Every seed, {unit}", ["mixer", *(f"seed {seed}" for seed in comparison.plan["seeds"])], lines)


def _incomplete(comparison: Comparison, table: Sequence[Row]) -> str:
    runs = incomplete(table)
    if not runs:
        return ""
    said = (f"{run.label} seed {run.seed}: {describe(run, comparison.metric)}" for run in runs)
    return f"<ul class='warn'>{''.join(f'<li>{escape(text)}</li>' for text in said)}</ul>"


def _published() -> str:
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th>{_cells([f'{mean} ± {std}' for mean, std in cells])}</tr>"
        for name, cells in published.FIND_BLOCK.items()
    ]
    caption = published.TITLE.replace("+-", "±")
    table = _table(caption, ["model", *published.COLUMNS], lines)
    return f"<div class='aside'>{table}<p class='note'>{escape(published.NOTE)}</p></div>"


def _example(card: Mapping[str, Any], metric: str) -> str:
    """One example: what the model read (the target marked where it stands in it once), and what each mixer said.

    A text may go on in many ways, so continuations are shown without a verdict.
    """
    prompt, target, judged = card["prompt"], card["target"], metric == "error"
    text = _marked(prompt, target) if judged else escape(prompt)
    answers = "".join(_answer(answer, target, judged) for answer in card["answers"])
    tags = ", ".join(f"{key} {value}" for key, value in card["tags"].items()) if isinstance(card["tags"], Mapping) else ""
    note = f"<p class='note'>{escape(tags)}</p>" if tags else ""
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


def _nothing(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"
