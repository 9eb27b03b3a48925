"""A run that was stopped, killed or damaged ends with the bits of one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from recollect.data.settings import SourceSettings
from recollect.mixers import MIXERS, entry
from recollect.training.recipe.load import load_run
from recollect.training.trainer import CHECKPOINTS, run_training
from tests.training.runs import (
    assert_exact_resumption,
    checkpoints,
    finish,
    losses,
    model_bits,
    out_again,
    stop_after,
    tiny_run,
    validation,
    write_text,
)

pytestmark = pytest.mark.usefixtures("unmeasured")

DROPOUT = [{"mixer": "mta", "dropout": 0.2}] * 2


@pytest.mark.parametrize(
    "layers",
    [DROPOUT, "yaad", "memora", "mamba2", "gated_delta_net", [{"mixer": "attention", "dropout": 0.3}, {"mixer": "titans"}]],
    ids=["mta", "yaad", "memora", "mamba2", "gated_delta_net", "attention+titans"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, layers: Any) -> None:
    """Catches a row read twice or never (the next batch is read ahead), a lost moment, dropout that starts over."""
    assert_exact_resumption(tiny_run(tmp_path, layers=layers, steps=7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "carry"),
    [
        (name, carry)
        for name in sorted(MIXERS)
        for carry in (False, True)
        if not carry or entry(name).state.startswith("constant")
    ],
)
def test_resumed_equals_uninterrupted_for_every_mixer(tmp_path: Path, mixer: str, carry: bool) -> None:
    """A mixer with a buffer or a state that a checkpoint does not hold."""
    assert_exact_resumption(tiny_run(tmp_path, layers=mixer, steps=7, data={"carry": carry}))


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (DROPOUT, {"engine": {"micro_batch": 3}}),
        (DROPOUT, {"optimiser": {"name": "muon", "muon_lr": 1e-2}}),
        (DROPOUT, {"engine": {"precision": "bf16"}}),
        (DROPOUT, {"engine": {"checkpoint_activations": True}}),
        ("memora", {"data": {"carry": True}, "engine": {"micro_batch": 2}}),
        ("gated_delta_net", {"data": {"carry": True}, "engine": {"precision": "bf16"}}),
        ("yaad", {"data": {"carry": True, "cut_documents": False}}),
        ("yaad", {"optimiser": {"inner_warmup": 6}}),
        ("mta", {"data": {"cut_documents": False, "holdout": 0.0}}),
        ("mta", {"saving": {"every_steps": 1, "keep_best": 1}, "eval_every": 2}),
        ("mta", {"steps": 40, "eval_every": 20}),  # about six epochs of what `holdout` leaves
    ],
    ids=[
        "micro",
        "muon",
        "bf16",
        "recompute",
        "carry",
        "carry-bf16",
        "carry-uncut",
        "inner-warmup",
        "uncut",
        "saving",
        "epochs",
    ],
)
def test_resumed_equals_uninterrupted_with(tmp_path: Path, layers: Any, settings: dict[str, Any]) -> None:
    """Every feature that keeps something of its own from step to step."""
    if settings.get("steps") == 40:
        write_text(tmp_path / "text.jsonl", n_documents=8)
    assert_exact_resumption(tiny_run(tmp_path, layers=layers, **{"steps": 7, **settings}))


def test_the_journal_has_every_step_once_after_a_fall_back(tmp_path: Path) -> None:
    """A broken newest checkpoint is skipped and named, training goes on from the one before, and the learning curve forgets what is
    done again."""
    run = tiny_run(tmp_path, saving={"every_steps": 2})
    whole = finish(run)
    again = out_again(run, "again")
    run_training(again, should_stop=stop_after(5), say=lambda line: None)
    newest = Path(again.out) / CHECKPOINTS / checkpoints(again)[-1]
    (weights,) = (newest / "model").iterdir()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    said = list[str]()
    run_training(again, say=said.append)
    assert any("skipped the checkpoint step-00000005" in line and "checksum" in line for line in said)
    assert any("going on from step 4" in line for line in said)
    assert losses(again) == losses(run)
    assert validation(again) == validation(run)
    assert model_bits(again) == whole


@pytest.mark.parametrize("keep_last", [1, 2])
def test_broken_checkpoints_do_not_displace_new_ones(tmp_path: Path, keep_last: int) -> None:
    """Two broken checkpoints of steps 5 and 6 counted as the newest two: everything saved before step 6 was removed as soon as it was
    written, and a run that is stopped every few steps never got on."""
    run = tiny_run(tmp_path, saving={"every_steps": 1, "keep_last": keep_last})
    run_training(run, should_stop=stop_after(6), say=lambda line: None)
    for path in (Path(run.out) / CHECKPOINTS).iterdir():
        (path / "state.json").write_text("{")
    for step in (2, 4, 6, 8):
        assert run_training(run, should_stop=stop_after(2), say=lambda line: None).step == step


def test_the_best_checkpoint_is_one_that_was_evaluated(tmp_path: Path) -> None:
    """A checkpoint written between evaluations carries the loss of the evaluation before it; it must not take the place of the one
    that has this loss."""
    saving = {"every_steps": 1, "keep_last": 1, "keep_best": 1}
    run = tiny_run(tmp_path, steps=12, eval_every=4, saving=saving)
    run_training(run, should_stop=stop_after(7), say=lambda line: None)
    assert checkpoints(run) == ["step-00000004", "step-00000007"]


def test_keep_best_keeps_the_lowest_validation_loss(tmp_path: Path) -> None:
    """Overfitting: the last checkpoint is not the best one."""
    text = write_text(tmp_path / "small.jsonl", n_documents=2, seed=1)
    other = write_text(tmp_path / "other.jsonl", n_documents=8, seed=2)
    other.write_text(other.read_text().upper().replace("TEXT", "text"))  # what is learned of the one is wrong for the other
    data = {"sources": [SourceSettings(paths=[str(text)])], "validation": [SourceSettings(paths=[str(other)])]}
    run = tiny_run(tmp_path, steps=24, eval_every=3, data=data, optimiser={"lr": 1e-2}, saving={"keep_last": 1, "keep_best": 1})
    finish(run)
    curve = {step: loss for step, loss in validation(run).items() if step}
    best = min(curve, key=curve.__getitem__)
    assert best != 24
    assert checkpoints(run) == [f"step-{best:08d}", "step-00000024"]


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    """The scheduler that starts a job again after its end must not harm it."""
    run = tiny_run(tmp_path)
    before = finish(run)
    curve = losses(run)
    assert finish(run) == before
    assert losses(run) == curve


def test_a_lost_model_folder_is_written_again(tmp_path: Path) -> None:
    """A kill between the last checkpoint and the model leaves a finished run without a model."""
    run = tiny_run(tmp_path)
    before = finish(run)
    shutil.rmtree(Path(run.out) / "model")
    assert finish(run) == before


def test_what_changes_no_weight_may_change_between_parts(tmp_path: Path) -> None:
    """More checkpoints, other reports, another micro-batch, a moved folder: the run goes on."""
    run = tiny_run(tmp_path, layers="gated_delta_net")
    whole = finish(run)
    part = out_again(run, "part")
    run_training(part, should_stop=stop_after(3), say=lambda line: None)
    Path(part.out).rename(tmp_path / "moved")
    moved = tiny_run(
        tmp_path,
        out="moved",
        layers="gated_delta_net",
        saving={"every_steps": 1, "keep_last": 5},
        logging={"every_seconds": 100.0},
        eval_every=1,
        data={"shards": str(tmp_path / "other-tokens")},
    )
    assert finish(moved) == whole
    assert set(validation(moved)) == {0, 4, 5, 6, 7, 8}


def test_a_run_of_python_goes_on_from_its_file(tmp_path: Path) -> None:
    """2 and 2.0 are one warm-up: the folder took it for the same run, and the checkpoints for another's, so that it began anew."""
    run = tiny_run(tmp_path, optimiser={"warmup": 2})
    run_training(run, should_stop=stop_after(3), say=lambda line: None)
    said = list[str]()
    run_training(load_run(Path(run.out) / "run.yaml"), say=said.append)
    assert any(line == "going on from step 3" for line in said)
    assert not any("skipped" in line for line in said)
