"""A comparison small enough to run in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from recollect.comparison import Request
from recollect.comparison.folder import run_folder, store
from recollect.comparison.plan import Plan, make_plan

REQUEST = Request(
    task="find-block",
    mixers=["attention", "mta"],
    budget="24steps",
    task_options={"n_blocks": 3, "n_letters": 2, "n_question": 1},
    layers=1,
    width=16,
    heads=2,
    intermediate=16,
    batch_size=4,
    dropout=0.1,
    eval_every=8,
    n_eval=24,
    n_eval_curve=8,
    device="cpu",
)


def small(**changes: Any) -> Request:
    return dataclasses.replace(REQUEST, **changes)


def stored_run(out: Path, plan: Plan | None = None, label: str = "mta") -> Path:
    """A run's folder below a stored plan, ready for a worker."""
    out.mkdir(parents=True, exist_ok=True)
    store(out, plan or make_plan(REQUEST))
    folder = run_folder(out, label, 0)
    folder.mkdir(parents=True)
    return folder
