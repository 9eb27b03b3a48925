"""The whole command as a function: train, report, go on, fail in part."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recollect.comparison import compare
from recollect.comparison.folder import run_folder
from recollect.comparison.plan import differences, make_plan, moved
from recollect.comparison.run import default_jobs
from recollect.training.folder import locked
from tests.comparison.small import small

BROKEN = """
from recollect.mixers import register
from recollect.mixers.attention import Attention, AttentionConfig

@register("breaks_in_training", config=AttentionConfig, summary="s", source="s", state="s")
class BreaksInTraining(Attention):
    def forward(self, x, state=None, *, mask=None, document_ids=None):
        if self.training:
            raise RuntimeError("this mixer breaks in training")
        return super().forward(x, state, mask=mask, document_ids=document_ids)
"""


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_compare_trains_reports_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    """Also with one run that fails: it is named with its reason, the other one is finished and reported."""
    (tmp_path / "broken_mixer.py").write_text(BROKEN)
    request = small(mixers=["attention", "breaks_in_training"], imports=[str(tmp_path / "broken_mixer.py")])
    out, console = tmp_path / "out", quiet()
    outcome = compare(request, out=out, jobs=2, console=console)
    assert outcome.failed == {("breaks_in_training", 0): "this mixer breaks in training"}
    assert said(console).count("this mixer breaks in training") == 1
    assert [(row["step"], row["final"]) for row in rows_of(out) if row["mixer"] == "attention"] == [
        (0, False),
        (8, False),
        (16, False),
        (24, True),
    ]
    for name in ("table.txt", "curves.png", "curves.svg", "report.html"):
        assert (out / name).stat().st_size > 0
    assert outcome.report == out / "report.html"
    assert (run_folder(out, "attention", 0) / "model" / "model.safetensors").is_file()

    before = {path: path.stat().st_mtime_ns for path in run_folder(out, "attention", 0).rglob("*")}
    again = compare(request, out=out, jobs=2)
    assert list(again.failed) == [("breaks_in_training", 0)]
    assert {path: path.stat().st_mtime_ns for path in run_folder(out, "attention", 0).rglob("*")} == before
    assert len([row for row in rows_of(out) if row["mixer"] == "attention"]) == 4


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another recollect process"):
        compare(small(), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_another_comparison_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(make_plan(small(lr=0.5)).to_json())
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(ValueError, match="holds another comparison"):
        compare(small(), out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"comparison.json": before}


def test_other_data_are_named_without_their_hash(tmp_path: Path) -> None:
    """A user reads the message; 64 hex digits say nothing to one."""
    plans = []
    for name in "ab":
        (tmp_path / name).write_text(f"{name} text of its own. " * 50)
        plans.append(make_plan(small(task="text", task_options={}, data=[str(tmp_path / name)], seq_len=16)))
    assert differences(*plans) == ["other data"]


def test_moved_data_are_found_again(tmp_path: Path) -> None:
    """The same text under another path is the same comparison, and the worker reads it where it lies now."""
    text = "To be, or not to be, that is the question. " * 50
    plans = []
    for name in ("old.txt", "new.txt"):
        (tmp_path / name).write_text(text)
        plans.append(make_plan(small(task="text", task_options={}, data=[str(tmp_path / name)], seq_len=16)))
        (tmp_path / name).unlink()
    assert plans[0].config_hash == plans[1].config_hash
    assert moved(plans[0], plans[1]).data["paths"] == [str(tmp_path / "new.txt")]
    assert moved(plans[0], plans[1]).created == plans[0].created


def test_jobs_are_as_many_as_runs_at_most() -> None:
    assert default_jobs(make_plan(small(mixers=["mta"]))) == 1
    assert default_jobs(make_plan(small(threads=1000))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("equal", ["data", "time"])
def test_a_time_budget_is_kept_and_its_steps_too(tmp_path: Path, equal: str) -> None:
    """The steps are fixed once; a second call has the same ones."""
    import time

    begun = time.monotonic()
    request = small(budget="60s", equal=equal, eval_every=None)
    compare(request, out=tmp_path, jobs=1)
    assert time.monotonic() - begun < 75
    steps = json.loads((tmp_path / "comparison.json").read_text())["steps"]
    compare(request, out=tmp_path, jobs=1)
    assert json.loads((tmp_path / "comparison.json").read_text())["steps"] == steps
    assert isinstance(steps, dict) == (equal == "time")


def test_a_budget_that_is_too_short_leaves_no_plan_behind(tmp_path: Path) -> None:
    """Or the same command with a longer budget would be refused."""
    with pytest.raises(ValueError, match="too short"):
        compare(small(budget="1s"), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
