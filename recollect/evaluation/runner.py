"""Asking a model a suite: batch by batch, every answer kept as soon as it is there, and never asked again."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recollect import state
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.suites.base import Item, Result, Suite, slices
from recollect.training.checkpoint import replace_file
from recollect.training.folder import LOCK, changes, locked
from recollect.training.journal import append_line, drop_partial_line, read_lines

PLAN, ROWS = "evaluation.json", "rows.jsonl"


class Evaluation(NamedTuple):
    """What is known after a run.

    out: its folder; results: of all items, in the suite's order; n_asked: items asked now; n_kept: items answered earlier; seconds: of
    this run.
    """

    out: Path
    results: list[Result]
    n_asked: int
    n_kept: int
    seconds: float


def evaluate(
    model: LanguageModel,
    suite: Suite,
    out: Path | None,
    *,
    about: dict[str, Any],
    at_once: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask everything that `out` has no answer to yet.

    Args:
        model: in evaluation mode.
        suite: what to ask.
        out: folder for evaluation.json (what was evaluated) and rows.jsonl (one line per item); a run that was interrupted goes on.
            None: evaluations/SUITE-HASH, which the same evaluation finds again.
        about: what else identifies the run, such as the model's path; it is written down and shown.
        at_once: items between two writes; None: the suite's batches.
        limit: ask the first n items only; a later run without it goes on.
        progress: called with (answered, total).
    Raises:
        ValueError: `out` holds another evaluation or other files; what suite and model refuse. Finished rows stay.
        Busy: another process writes there.
        OSError: `out` cannot be written.
    """
    for name, value in (("at_once", at_once), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is at least 1; got {value}")
    plan = describe(model, suite.name, suite.fingerprint(), about)
    items = suite.items(model)[:limit]  # before the folder is claimed: what is refused leaves none behind
    if not items:
        raise ValueError(f"suite {suite.name!r} has nothing to ask")
    with claimed(out, suite.name, plan) as out:
        drop_partial_line(out / ROWS)
        known = {row["id"]: row for row in read_lines(out / ROWS)}
        begun = time.monotonic()
        todo = [item for item in items if item.id not in known]
        n_done = len(items) - len(todo)
        progress(n_done, len(items))
        for batch in slices(todo, at_once) if at_once else suite.batches(model, todo):
            for item, results in zip(batch, suite.answer(model, batch), strict=True):
                known[item.id] = _keep(out, item, results)
            n_done += len(batch)
            progress(n_done, len(items))
        results = [Result(**result) for item in items for result in known[item.id]["results"]]
    return Evaluation(out, results, len(todo), len(items) - len(todo), time.monotonic() - begun)


def describe(model: LanguageModel, suite: str, options: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that the results depend on, as it is in evaluation.json."""
    plan = {
        "suite": suite,
        "options": options,
        "model": {"weights": state.digest(model.model.state_dict())[:16], "tokenizer": model.tokenizer_name},
        "context": model.max_length,
        **about,
    }
    return dict(json.loads(json.dumps(plan, default=str)))  # as it will be read again


def _keep(out: Path, item: Item, results: Sequence[Result]) -> dict[str, Any]:
    row = {"id": item.id, "results": [result._asdict() for result in results]}
    append_line(out / ROWS, json.dumps(row, ensure_ascii=False), durable=False)
    return row


@contextlib.contextmanager
def claimed(out: Path | None, name: str, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder of an evaluation, locked: `out`, or evaluations/NAME-HASH, with its plan in it. What is refused before it wrote
    anything leaves no folder behind.

    Raises:
        ValueError: it holds another evaluation, or other files.
        Busy: another process writes there.
    """
    out = out or Path("evaluations") / f"{name}-{state.fingerprint(plan)[:8]}"
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _claim(out, plan)
        try:
            yield out
        except ValueError:
            if is_new and {file.name for file in out.iterdir()} <= {PLAN, LOCK}:
                shutil.rmtree(out)
            raise


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or see that the folder's own is this one."""
    path = out / PLAN
    if not path.is_file():
        strangers = sorted(file.name for file in out.iterdir() if not file.name.startswith("."))
        if strangers:
            raise ValueError(f"--out {out} holds other files ({', '.join(strangers[:3])}); give a new or empty folder")
        replace_file(path, json.dumps(plan, indent=2, ensure_ascii=False).encode())
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; give another --out") from error
    different = [f"{name}: {old!r}, now {new!r}" for name, old, new in changes(stored, plan)]
    if different:
        raise ValueError(
            f"--out {out} holds another evaluation ({'; '.join(different[:3])}); give another --out or remove that folder"
        )
