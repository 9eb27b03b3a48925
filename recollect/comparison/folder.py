"""The folder of a comparison: who may write there, where things lie, the results file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from recollect.comparison.plan import Plan, differences
from recollect.training.checkpoint import replace_file
from recollect.training.folder import LOCK, is_disk_full
from recollect.training.journal import Event, append_line, clean, drop_partial_line, read_lines

DISK_FULL_TEXT = "the disk is full; free some space and run the same command again"
PLAN, RESULTS = "comparison.json", "results.jsonl"


def default_folder(plan: Plan) -> Path:
    """The same request finds its own folder again."""
    return Path("comparisons") / f"{plan.task}-{plan.config_hash[:8]}"


def run_folder(out: Path, label: str, seed: int) -> Path:
    return out / "runs" / f"{label}-seed{seed}"


def look(out: Path, plan: Plan) -> Plan | None:
    """The plan stored in `out` if it is this comparison; None if `out` is free. Writes nothing.

    Raises:
        ValueError: `out` holds another comparison, or files that are none.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if not out.exists():
        return None
    try:
        stored = Plan.from_json((out / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        strangers = sorted(p.name for p in out.iterdir() if p.name != LOCK)
        if strangers:
            raise ValueError(
                f"--out {out} holds other files ({_some(strangers)}) and no comparison; give a new or empty folder"
            ) from None
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"--out {out}: {PLAN} cannot be read: {error}; give another folder") from error
    if stored.config_hash != plan.config_hash:
        what = "; ".join(differences(stored, plan)[:4])
        raise ValueError(f"--out {out} holds another comparison ({what}); give another --out, or remove that folder")
    return stored


def store(out: Path, plan: Plan) -> None:
    """Write the plan, whole or not at all."""
    replace_file(out / PLAN, plan.to_json().encode())


def forget(out: Path) -> None:
    """Remove a plan that has no results."""
    shutil.rmtree(out / "runs", ignore_errors=True)
    (out / PLAN).unlink(missing_ok=True)


class Results:
    """`results.jsonl`: one line per evaluation, written by the parent only; a line that is there already is not repeated."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.path, self.plan = out / RESULTS, plan
        drop_partial_line(self.path)
        self.known = {(row.get("mixer"), row.get("seed"), row.get("step")) for row in read_lines(self.path)}

    def add(self, label: str, seed: int, event: Event) -> None:
        """Record an evaluation of a worker's journal.

        Raises:
            OSError: the disk is full or not writable.
        """
        key = (label, seed, event["step"])
        if key in self.known:
            return
        append_line(self.path, json.dumps(clean(self._row(label, seed, event)), sort_keys=True), durable=True)
        self.known.add(key)

    def _row(self, label: str, seed: int, event: Event) -> dict[str, Any]:
        seconds = event["seconds"]
        return {
            "task": self.plan.task,
            "mixer": label,
            "seed": seed,
            "steps": self.plan.steps_of(label),
            "tokens_per_second": event["tokens"] / seconds if seconds else None,
            "parameters": self.plan.mixer(label)["parameters"],
            "config_hash": self.plan.config_hash,
            **{key: value for key, value in event.items() if key != "event"},
        }


def is_done(out: Path, label: str, seed: int) -> bool:
    """Whether a run has finished: its last evaluation is recorded and its model is saved."""
    events = read_lines(run_folder(out, label, seed) / "progress.jsonl")
    return bool(events) and events[-1].get("event") == "done"


def explain(error: BaseException) -> str:
    """What went wrong, in words for a person: the type is left out where the message says it all."""
    if is_disk_full(error):
        return DISK_FULL_TEXT
    if isinstance(error, MemoryError):
        return "there is not enough memory; try a smaller --batch-size, --width or --seq-len"
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return text or type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
