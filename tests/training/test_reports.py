"""What a run leaves to look at: curves, TensorBoard, the journal's lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recollect.training.trainer import CHECKPOINTS, run_training
from tests.training.runs import (
    finish,
    losses,
    stop_after,
    tiny_run,
    validation,
)


def test_a_run_writes_curves_and_tensorboard_files(tmp_path: Path) -> None:
    """Reports that only work on somebody's terminal are no reports."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run = tiny_run(tmp_path, logging={"tensorboard": True})
    finish(run)
    assert (Path(run.out) / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = accumulator(str(Path(run.out) / "tensorboard")).Reload()
    assert {event.step: event.value for event in written.Scalars("train/loss")} == pytest.approx(losses(run))
    assert {event.step: event.value for event in written.Scalars("validation/loss")} == pytest.approx(validation(run))


def test_a_resumed_run_draws_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    """Steps that a killed process did, and the next one did again, would make the curve run back and forth."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run = tiny_run(tmp_path, logging={"tensorboard": True})
    run_training(run, should_stop=stop_after(5), say=lambda line: None)
    shutil.rmtree(Path(run.out) / CHECKPOINTS)  # as a kill before the first checkpoint leaves it
    finish(run)
    written = accumulator(str(Path(run.out) / "tensorboard")).Reload()
    assert [event.step for event in written.Scalars("train/loss")] == list(range(1, 9))


def test_reports_are_json_and_tell_the_truth(tmp_path: Path) -> None:
    """Tokens, learning rate and the mean loss are what other programs plot."""
    run = tiny_run(tmp_path, optimiser={"schedule": "linear", "warmup": 0.0})
    finish(run)
    events = [json.loads(line) for line in (Path(run.out) / "progress.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["tokens"] for event in steps] == [96 * n for n in range(1, 9)]
    assert [event["lr"] for event in steps] == pytest.approx([3e-3 * (1 - n / 8) for n in range(8)])
    assert all(event["tokens_per_second"] > 0 and event["eta_seconds"] >= 0 for event in steps)
