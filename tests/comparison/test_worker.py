"""A run that is killed, orphaned or told to stop ends with the bits of one that was left alone."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recollect.comparison.folder import run_folder
from recollect.comparison.plan import make_plan
from recollect.comparison.pool import environment
from recollect.comparison.worker import find_run, run, time_steps
from recollect.training.journal import DISK_FULL, DONE, FAILED, STOPPED, Event, read_lines
from tests.comparison.small import small, stored_run

STEPS = 60


def journal_of(folder: Path) -> list[Event]:
    return read_lines(folder / "progress.jsonl")


def results_of(folder: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["error"]) for e in journal_of(folder) if e["event"] == "evaluation"]


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("model/model.safetensors", "inspection.safetensors", "inspection.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_interrupted_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL, then the parent's end, then SIGTERM, each at a random step; dropout is on."""
    plan = make_plan(small(budget=f"{STEPS}steps"))
    alone, broken = stored_run(tmp_path / "alone", plan), stored_run(tmp_path / "broken", plan)
    assert run(alone) == DONE

    rng = random.Random(os.urandom(8))
    steps = sorted(rng.sample(range(1, STEPS - 10), 3))
    journal = broken / "progress.jsonl"
    for step, how in zip(steps, ("kill", "orphan", "terminate"), strict=True):
        before = journal.stat().st_ino if journal.exists() else None
        process = subprocess.Popen(
            [sys.executable, "-m", "recollect.comparison.worker", str(broken), "--attached", "--checkpoint-seconds", "0.02"],
            stdin=subprocess.PIPE,
            env=environment(1),
        )
        reached = 0
        # The journal is written anew when a worker has begun: an earlier one may have passed `step` already.
        while (reached < step or journal.stat().st_ino == before) and process.poll() is None:
            time.sleep(0.002)
            reached = max([e["step"] for e in journal_of(broken) if e["event"] in ("step", "evaluation")], default=0)
            reached = max([reached, *(int(p.name[5:]) for p in (broken / "checkpoint").glob("step-*"))])
        assert process.stdin is not None
        if how == "kill":
            process.kill()
        elif how == "terminate":
            process.terminate()
        else:
            process.stdin.close()
        status = process.wait(timeout=60)
        process.stdin.close()
        assert status == (-9 if how == "kill" else STOPPED), f"stopped at steps {steps}"
    assert run(broken) == DONE
    assert journal_of(broken)[-1]["event"] == "done"
    assert results_of(broken) == results_of(alone), f"stopped at steps {steps}"
    assert files_of(broken) == files_of(alone), f"stopped at steps {steps}"


def test_the_log_of_a_clean_run_is_empty(tmp_path: Path) -> None:
    """Warnings on every run would hide the one that matters."""
    folder = stored_run(tmp_path, make_plan(small(budget="1steps")))
    ended = subprocess.run(
        [sys.executable, "-m", "recollect.comparison.worker", str(folder)], env=environment(1), capture_output=True, check=True
    )
    assert ended.stderr == b""
    assert ended.stdout == b""


def test_divergence_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    """The journal, which the parent reads, says step, loss, gradient norm and learning rate."""
    folder = stored_run(tmp_path, make_plan(small(lr=1e30, clip=0, warmup=0)))
    assert run(folder) == FAILED
    last = journal_of(folder)[-1]
    assert last["event"] == "failed"
    assert "training diverged at step" in last["reason"]
    assert not (folder / "model").exists()


def test_a_full_disk_is_a_failure_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored_run(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("recollect.training.loop.save_checkpoint", full)
    assert run(folder) == DISK_FULL
    assert journal_of(folder)[-1]["reason"].startswith("the disk is full")


def test_half_precision_is_that_of_the_products(tmp_path: Path) -> None:
    """The weights that are kept stay in fp32, the first evaluation is that of fp32, and training is another one, close by."""
    ends = {}
    for precision in ("fp32", "bf16"):
        folder = stored_run(tmp_path / precision, make_plan(small(precision=precision)))
        assert run(folder) == DONE
        weights = load_file(folder / "model" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        ends[precision] = results_of(folder)
    assert ends["fp32"][0] == ends["bf16"][0]
    assert ends["fp32"][-1] != ends["bf16"][-1]
    assert ends["bf16"][-1][1] == pytest.approx(ends["fp32"][-1][1], rel=0.05)
    with pytest.raises(ValueError, match="--precision is fp32 or bf16"):
        make_plan(small(precision="fp8"))


def test_changed_data_are_noticed(tmp_path: Path) -> None:
    """Half a run on one text and half on another would be neither."""
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh" * 100)
    plan = make_plan(small(task="text", task_options={}, data=[str(text)], seq_len=16))
    folder = stored_run(tmp_path / "out", plan)
    text.write_text("abcdefgx" * 100)
    assert run(folder) == FAILED
    assert "data have changed" in journal_of(folder)[-1]["reason"]


def test_a_folder_belongs_to_its_run(tmp_path: Path) -> None:
    folder = stored_run(tmp_path)
    assert find_run(folder)[1:] == ("mta", 0)
    with pytest.raises(ValueError, match="no run of the comparison"):
        find_run(run_folder(tmp_path, "mta", 7))


def test_timing_writes_nothing(tmp_path: Path) -> None:
    """It runs before the steps are known; a checkpoint or a journal of it would be taken for the run's."""
    folder = stored_run(tmp_path)
    timed = time_steps(folder, seconds=0.05)
    assert all(timed[name] > 0 for name in ("step", "example", "spent"))
    assert list(folder.iterdir()) == []


def test_evaluations_use_the_planned_number_of_examples(tmp_path: Path) -> None:
    folder = stored_run(tmp_path)
    assert run(folder) == DONE
    seen = [(e["step"], e["n_eval"], e["final"]) for e in journal_of(folder) if e["event"] == "evaluation"]
    assert seen == [(0, 8, False), (8, 8, False), (16, 8, False), (24, 24, True)]


def test_a_workers_threads_are_the_plans_and_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two spinning threads on busy cores cost up to 300 times; what the user has set stays."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(2)["OMP_WAIT_POLICY"] == "passive"
    assert environment(2)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert environment(2)["OMP_WAIT_POLICY"] == "active"
