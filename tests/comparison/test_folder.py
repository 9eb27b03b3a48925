"""Nothing of somebody else's is touched, no result is written twice."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from recollect.comparison.folder import Results, default_folder, explain, is_done, look, run_folder, store
from recollect.comparison.plan import make_plan
from recollect.training.folder import Busy, locked
from recollect.training.journal import Journal
from tests.comparison.small import small


def test_a_free_folder_is_free(tmp_path: Path) -> None:
    assert look(tmp_path, make_plan(small())) is None
    assert look(tmp_path / "new", make_plan(small())) is None


def test_the_same_comparison_is_found_again(tmp_path: Path) -> None:
    plan = make_plan(small(), command="first")
    store(tmp_path, plan)
    assert look(tmp_path, make_plan(small(), command="second")) == plan
    assert default_folder(plan) == default_folder(make_plan(small()))


def test_another_comparison_is_refused_with_the_difference(tmp_path: Path) -> None:
    store(tmp_path, make_plan(small()))
    with pytest.raises(ValueError, match=r"another comparison \(training.lr: 0.01 -> 0.001\)"):
        look(tmp_path, make_plan(small(lr=1e-3)))


def test_strangers_are_refused_and_left_alone(tmp_path: Path) -> None:
    """A folder with other files, a file, a plan of something else."""
    plan = make_plan(small())
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"other files \(thesis.txt\)"):
        look(tmp_path, plan)
    with pytest.raises(ValueError, match="is a file"):
        look(tmp_path / "thesis.txt", plan)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ValueError, match=r"comparison\.json cannot be read"):
        look(tmp_path, plan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.json", "thesis.txt"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """Two parents would append the same results twice."""
    with locked(tmp_path), pytest.raises(Busy, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_results_are_written_once_and_whole(tmp_path: Path) -> None:
    """A resumed parent hears old evaluations again; a crash may have cut the last line off."""
    plan = make_plan(small())
    event = {"event": "evaluation", "step": 8, "seconds": 2.0, "tokens": 100, "error": 0.5, "loss": 1.0, "final": False}
    Results(tmp_path, plan).add("mta", 0, event)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"mixer": "mt')
    again = Results(tmp_path, plan)
    again.add("mta", 0, event)
    again.add("mta", 0, {**event, "step": 16})
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [8, 16]
    assert rows[0]["tokens_per_second"] == 50
    assert rows[0]["config_hash"] == plan.config_hash
    assert rows[0]["steps"] == 24
    assert list(rows[0]) == sorted(rows[0])


def test_a_run_is_done_when_its_journal_ends_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "mta", 0)
    folder.mkdir(parents=True)
    assert not is_done(tmp_path, "mta", 0)
    journal = Journal(folder / "progress.jsonl")
    journal.write({"event": "evaluation", "step": 1})
    assert not is_done(tmp_path, "mta", 0)
    journal.write({"event": "done", "step": 1})
    assert is_done(tmp_path, "mta", 0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_full_disk_is_called_that(error: Exception) -> None:
    assert explain(error).startswith("the disk is full")
