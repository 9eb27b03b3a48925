"""`run_training`: what lies in the folder afterwards, exact resumption with every feature, and refusals that say why."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from recollect.data.settings import SourceSettings
from recollect.data.tokenizer import load_tokenizer, train_tokenizer
from recollect.data.validation import validation_rows
from recollect.mixers import MIXERS, entry
from recollect.models import RecollectForCausalLM
from recollect.training import reports
from recollect.training.folder import Busy, locked
from recollect.training.loop import NonFiniteLoss
from recollect.training.parallel import Scored
from recollect.training.recipe.load import load_run
from recollect.training.recipe.settings import RunSettings
from recollect.training.trainer import CHECKPOINTS, run_training
from tests.training.runs import (
    finish,
    journal,
    losses,
    model_bits,
    out_again,
    stop_after,
    tiny_run,
    validation,
    write_text,
)

# AdamW divides by the root of the second moment, so rounding in a gradient near zero moves a weight by a whole step; with so large
# an eps a rounding error stays one.
SMOOTH = {"lr": 0.3, "eps": 1.0, "clip": 10.0}
DROPOUT = [{"mixer": "mta", "dropout": 0.2}] * 2


@pytest.fixture(autouse=True)
def _no_time_lost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither measure the machine nor draw curves, except where that is looked at."""
    if "reporting" not in request.fixturenames:
        monkeypatch.setattr(reports, "matmul_rate", lambda *_: 1e9)
        monkeypatch.setattr(reports, "draw_curves", lambda *_, **__: None)


@pytest.fixture
def reporting() -> None:
    """Marks tests of what `_no_time_lost` leaves out."""


def interrupted(run: RunSettings, name: str, stops: Sequence[int] = (3, 2)) -> RunSettings:
    """The same run in another folder, stopped and continued."""
    again = out_again(run, name)
    for stop in stops:
        run_training(again, should_stop=stop_after(stop), say=lambda line: None)
    finish(again)
    return again


def assert_exact_resumption(run: RunSettings) -> None:
    whole = finish(run)
    again = interrupted(run, "again")
    assert losses(again) == losses(run)
    assert validation(again) == validation(run)
    assert model_bits(again) == whole


def checkpoints(run: RunSettings) -> list[str]:
    return sorted(path.name for path in (Path(run.out) / CHECKPOINTS).iterdir())


def say_into(lines: list[str]) -> dict[str, Any]:
    return {"say": lines.append}


# What a run leaves behind


def test_the_model_folder_holds_the_trained_weights(tmp_path: Path) -> None:
    """Saving the model of step 0, or one whose tied head or own option is lost, would make every later use silently wrong: the
    loaded model must have the validation loss that the run reported at its end."""
    run = tiny_run(tmp_path, layers=["mta", "memora"], eval_rows=100)
    finish(run)
    model = AutoModelForCausalLM.from_pretrained(Path(run.out) / "model")
    tokenizer = load_tokenizer("bytes")
    (batches,) = validation_rows(run.data, tokenizer, 100, folder=tmp_path / "tokens").values()
    with torch.no_grad():
        nats = sum(float(Scored(model)(*batch)) for batch in batches)
    n_tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert nats / n_tokens == pytest.approx(validation(run)[8], abs=1e-5)
    assert validation(run)[8] < validation(run)[0] - 0.3


def test_nothing_temporary_stays(tmp_path: Path) -> None:
    """A user who lists the folder sees what the documentation lists, and nothing else."""
    run = tiny_run(tmp_path, saving={"every_steps": 2})
    finish(run)
    assert {path.name for path in Path(run.out).iterdir()} <= {".lock", "run.yaml", "progress.jsonl", "checkpoints", "model"}
    assert checkpoints(run) == ["step-00000006", "step-00000008"]


@pytest.mark.usefixtures("reporting")
def test_a_run_writes_curves_and_tensorboard_files(tmp_path: Path) -> None:
    """Reports that only work on somebody's terminal are no reports."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run = tiny_run(tmp_path, logging={"tensorboard": True})
    finish(run)
    assert (Path(run.out) / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = accumulator(str(Path(run.out) / "tensorboard")).Reload()
    assert {event.step: event.value for event in written.Scalars("train/loss")} == pytest.approx(losses(run))
    assert {event.step: event.value for event in written.Scalars("validation/loss")} == pytest.approx(validation(run))


@pytest.mark.usefixtures("reporting")
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


# Interrupted and continued


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
    run_training(again, **say_into(said))
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


# The same numbers another way


def test_gradient_accumulation_changes_no_loss(tmp_path: Path) -> None:
    """Rows with few labels would weigh more if micro-batches were averaged instead of summed."""
    settings: dict[str, Any] = {"layers": ["mta", "yaad"], "optimiser": SMOOTH}
    run = tiny_run(tmp_path, **settings)
    finish(run)
    for micro_batch in (1, 3):
        other = tiny_run(tmp_path, out=f"micro{micro_batch}", **settings, engine={"micro_batch": micro_batch})
        finish(other)
        assert losses(other) == pytest.approx(losses(run), rel=1e-6)
        assert validation(other) == pytest.approx(validation(run), rel=1e-6)


@pytest.mark.parametrize("mixer", ["mamba2", "yaad"])
def test_gradient_accumulation_changes_no_carried_memory(tmp_path: Path, mixer: str) -> None:
    """Every micro-batch goes on with its own lanes' memories."""
    settings: dict[str, Any] = {"layers": mixer, "data": {"carry": True}, "optimiser": {**SMOOTH, "lr": 0.03}}
    run = tiny_run(tmp_path, **settings)
    other = tiny_run(tmp_path, out="micro", **settings, engine={"micro_batch": 1})
    finish(run)
    finish(other)
    assert losses(other) == pytest.approx(losses(run), rel=1e-6)
    assert losses(run)[8] < losses(run)[1] - 0.1


@pytest.mark.parametrize(("layers", "carry"), [(["mta", "memora"], False), ("memora", True), ("mamba2", True)])
def test_recomputing_activations_changes_no_loss(tmp_path: Path, layers: Any, carry: bool) -> None:
    """Hugging Face's checkpointing drops caches without a word, and a state that moves on twice is another model."""
    runs = [
        tiny_run(tmp_path, out=f"run{on}", layers=layers, data={"carry": carry}, engine={"checkpoint_activations": on})
        for on in (False, True)
    ]
    for run in runs:
        finish(run)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-6)


def test_carrying_memories_makes_a_difference_and_only_within_documents(tmp_path: Path) -> None:
    """A memory that is dropped between steps would be missed by every other test here; so the model sees one document of a row and
    a half, and the loss of its second row is compared with a model that reads the document at once."""
    text = "abcdefghij" * 40
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    common: dict[str, Any] = {"layers": "memora", "steps": 4, "batch_tokens": 24, "eval_every": 0}
    frozen: dict[str, Any] = {"lr": 1e-12, "weight_decay": 0.0}
    run = tiny_run(tmp_path, **common, data={"carry": True, "holdout": 0.0}, optimiser=frozen)
    finish(run)
    model = RecollectForCausalLM.from_pretrained(Path(run.out) / "model").eval()
    tokens = torch.tensor([[256, *text.encode()]])
    with torch.no_grad():
        logits = model(tokens[:, :96], use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:97], reduction="none").view(4, 24).mean(1)
    assert list(losses(run).values()) == pytest.approx(nats.tolist(), abs=1e-5)


def test_inner_warmup_changes_miras_models_only(tmp_path: Path) -> None:
    """A warm-up that reaches no memory, or that never ends."""
    for layers, same in (("mta", True), ("yaad", False)):
        plain = tiny_run(tmp_path, out=f"{layers}-plain", layers=layers, steps=4)
        warm = tiny_run(tmp_path, out=f"{layers}-warm", layers=layers, steps=4, optimiser={"inner_warmup": 3})
        assert (finish(plain) == finish(warm)) is same
        over = tiny_run(tmp_path, out=f"{layers}-over", layers=layers, steps=1, optimiser={"inner_warmup": 0})
        assert losses_of_one(over) == losses(plain)[1]


def losses_of_one(run: RunSettings) -> float:
    finish(run)
    return losses(run)[1]


# Learning


@pytest.mark.parametrize("settings", [{}, {"engine": {"precision": "bf16"}}, {"optimiser": {"name": "muon", "lr": 3e-3}}])
def test_training_learns(tmp_path: Path, settings: dict[str, Any]) -> None:
    """bf16 must train the fp32 weights (updates of 1e-3 vanish in bf16), and Muon must go downhill."""
    run = tiny_run(tmp_path, **{"steps": 40, "optimiser": {"lr": 1e-2}, "eval_every": 0, **settings})
    finish(run)
    assert validation(run)[40] < validation(run)[0] - 1.5
    assert {tensor.dtype for tensor in saved(run).values()} == {torch.float32}


def saved(run: RunSettings) -> dict[str, Tensor]:
    return RecollectForCausalLM.from_pretrained(Path(run.out) / "model").state_dict()


def test_start_from_goes_on_with_the_weights_and_nothing_else(tmp_path: Path) -> None:
    """Step 0 of the new run has the loss of the last step of the old one; shape and mixers are the saved model's."""
    first = tiny_run(tmp_path, out="first")
    finish(first)
    model = {"layers": None, "hidden_size": None, "n_layers": None, "n_heads": None, "intermediate_size": None}
    second = tiny_run(tmp_path, out="second", model={**model, "start_from": first.out}, seed=5)
    finish(second)
    assert validation(second)[0] == pytest.approx(validation(first)[8], abs=1e-6)
    assert validation(second)[8] < validation(second)[0]
    again = tiny_run(tmp_path, out="again", model={**model, "start_from": str(Path(first.out) / "model")}, seed=5)
    finish(again)
    assert model_bits(again) == model_bits(second)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_train_only_moves_what_it_names(tmp_path: Path, optimiser: str) -> None:
    """Weight decay of a frozen matrix would move it, too; and a run of few trained parameters is resumed like any other."""
    globs = ["*.mixer.*weight", "*mixer_norm*"]
    settings: dict[str, Any] = {"model": {"train_only": globs}, "optimiser": {"name": optimiser, "decay_all": True}}
    run = tiny_run(tmp_path, **settings)
    torch.manual_seed(0)
    untouched = tiny_run(tmp_path, out="start", **{**settings, "optimiser": {"lr": 1e-30, "weight_decay": 0.0}}, steps=1)
    assert_exact_resumption(run)
    finish(untouched)
    before, after = saved(untouched), saved(run)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".mixer." in name or "mixer_norm" in name for name in moved)
    assert not any("embed" in name or "mlp" in name or "lm_head" in name for name in moved)


def test_validation_sources_are_told_apart(tmp_path: Path) -> None:
    """Text of the kind that was trained on is easier than noise; the common loss is the mean over all tokens."""
    like = write_text(tmp_path / "like.jsonl", n_documents=4, seed=9)
    noise = tmp_path / "noise.txt"
    noise.write_text("".join(chr(33 + (i * 37 + i * i * 11) % 90) for i in range(240)))
    sources = [SourceSettings(paths=[str(like)], name="like"), SourceSettings(paths=[str(noise)], name="noise")]
    run = tiny_run(tmp_path, steps=20, optimiser={"lr": 1e-2}, eval_every=10, data={"validation": sources}, eval_rows=10)
    finish(run)
    last = [event for event in journal(run) if event["event"] == "evaluation"][-1]
    assert last["step"] == 20
    assert last["loss/like"] < last["loss/noise"] - 0.5
    assert min(last["loss/like"], last["loss/noise"]) < last["loss"] < max(last["loss/like"], last["loss/noise"])
    assert last["bits_per_byte/noise"] == pytest.approx(
        last["loss/noise"] / math.log(2), rel=1e-6
    )  # noise has one byte per token


def test_without_holdout_and_validation_nothing_is_evaluated(tmp_path: Path) -> None:
    """No validation text is no error."""
    run = tiny_run(tmp_path, data={"holdout": 0.0})
    finish(run)
    assert validation(run) == {}


def test_bits_per_byte_of_a_tokenizer_counts_bytes(tmp_path: Path) -> None:
    """Bits per token, called bits per byte, would make a large vocabulary look bad."""
    text = write_text(tmp_path / "text.jsonl")
    train_tokenizer([str(text)], vocab_size=300, out=tmp_path / "tokenizer.json")
    run = tiny_run(tmp_path, data={"tokenizer": str(tmp_path / "tokenizer.json")})
    finish(run)
    last = [event for event in journal(run) if event["event"] == "evaluation"][-1]
    assert last["bits_per_byte"] < 0.8 * last["loss"] / math.log(2)
    assert (Path(run.out) / "model" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


# Refusals


def test_the_folder_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    """Going on with other settings would be neither run; the folder stays as it was."""
    run = tiny_run(tmp_path)
    run_training(run, should_stop=stop_after(2), say=lambda line: None)
    before = (Path(run.out) / "run.yaml").read_bytes()
    other = dataclasses.replace(run, optimiser=dataclasses.replace(run.optimiser, lr=0.5))
    with pytest.raises(ValueError, match=r"holds another run \(optimiser.lr: 0.003 -> 0.5\)"):
        run_training(other, say=lambda line: None)
    assert (Path(run.out) / "run.yaml").read_bytes() == before
    finish(run)


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


def test_checkpoints_of_an_unknown_configuration_are_not_started_over(tmp_path: Path) -> None:
    """A new version of the package has one more setting, so no fingerprint of an older one fits: days of work must not be replaced by
    a run from step 0, with one line in a log."""
    run = tiny_run(tmp_path, saving={"every_steps": 1})
    run_training(run, should_stop=stop_after(3), say=lambda line: None)
    for path in (Path(run.out) / CHECKPOINTS).glob("*/state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "fingerprint": "of-an-older-version"}))
    with pytest.raises(ValueError, match="another configuration"):
        run_training(run, say=lambda line: None)
    assert checkpoints(run) == ["step-00000002", "step-00000003"]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    """`out=~` must not turn somebody's home into a run."""
    run = tiny_run(tmp_path)
    Path(run.out).mkdir()
    (Path(run.out) / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other files .*thesis.tex.* and no run"):
        run_training(run, say=lambda line: None)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """Two processes that write the same checkpoints."""
    run = tiny_run(tmp_path)
    run_training(run, should_stop=stop_after(1), say=lambda line: None)
    before = {path: path.stat().st_mtime_ns for path in Path(run.out).rglob("*") if path.is_file() and path.name != ".lock"}
    with locked(Path(run.out)), pytest.raises(Busy, match="in use by another"):
        run_training(run, say=lambda line: None)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"holdout": 0.0}, "too little text.*add text or lower seq_len"),
        ({"holdout": 0.1}, "too little text.*holdout"),
        ({"holdout": 0.0, "carry": True, "seq_len": 2}, "too little text.*lanes"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    """A sentence, before anything is trained."""
    (tmp_path / "text.jsonl").write_text('{"text": "ab"}\n')
    run = tiny_run(tmp_path, layers="memora", data=data)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run_training(run, say=lambda line: None)


def test_rows_that_micro_batches_do_not_divide_are_refused_with_carry(tmp_path: Path) -> None:
    """A memory of three rows cannot be continued with one."""
    with pytest.raises(ValueError, match="micro_batch=3 must divide the 4 rows"):
        run_training(
            tiny_run(tmp_path, layers="memora", data={"carry": True}, engine={"micro_batch": 3}), say=lambda line: None
        )


@pytest.mark.parametrize("mixer", ["attention", "mta"])
def test_carrying_keys_and_values_is_refused(tmp_path: Path, mixer: str) -> None:
    """A cache of keys and values grows by every row of the run, without end."""
    with pytest.raises(ValueError, match=r"carry.*attention|carry.*mta"):
        run_training(tiny_run(tmp_path, layers=mixer, data={"carry": True}), say=lambda line: None)


def test_a_tokenizer_that_does_not_fit_the_saved_model_is_refused(tmp_path: Path) -> None:
    """Its tokens would be looked up in the wrong rows of the embedding."""
    first = tiny_run(tmp_path, out="first", steps=1)
    finish(first)
    train_tokenizer([str(tmp_path / "text.jsonl")], vocab_size=300, out=tmp_path / "tokenizer.json")
    model = {"layers": None, "hidden_size": None, "n_layers": None, "n_heads": None, "intermediate_size": None}
    second = tiny_run(
        tmp_path, out="second", model={**model, "start_from": first.out}, data={"tokenizer": str(tmp_path / "tokenizer.json")}
    )
    with pytest.raises(ValueError, match=r"257 tokens, the tokenizer 300; .*data.tokenizer"):
        run_training(second, say=lambda line: None)


def test_changed_text_is_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    """Positions in another text mean nothing."""
    run = tiny_run(tmp_path)
    run_training(run, should_stop=stop_after(2), say=lambda line: None)
    write_text(tmp_path / "text.jsonl", seed=1)
    with pytest.raises(ValueError, match="holds other text"):
        run_training(run, say=lambda line: None)
    write_text(tmp_path / "text.jsonl", seed=0)
    finish(run)


def test_a_broken_saved_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """A cut-off download is the user's to mend: a ValueError or OSError that names it, which the command line can tell."""
    first = tiny_run(tmp_path, out="first", steps=1)
    finish(first)
    weights = Path(first.out) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = {"layers": None, "hidden_size": None, "n_layers": None, "n_heads": None, "intermediate_size": None}
    with pytest.raises((ValueError, OSError), match="first"):
        run_training(tiny_run(tmp_path, out="second", model={**model, "start_from": first.out}), say=lambda line: None)


def test_divergence_stops_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """Checkpoints of NaN would overwrite those worth having."""
    run = tiny_run(
        tmp_path, steps=30, optimiser={"lr": 1e30, "clip": 0.0, "warmup": 0.0}, saving={"every_steps": 1, "keep_last": 40}
    )
    with pytest.raises(NonFiniteLoss, match="diverged at step"):
        run_training(run, say=lambda line: None)
    for name in checkpoints(run):
        assert json.loads((Path(run.out) / CHECKPOINTS / name / "state.json").read_text())["progress"]["step"] == int(name[5:])
    assert not (Path(run.out) / "model").exists()


def test_divergence_ends_the_command_with_status_3(tmp_path: Path) -> None:
    """A scheduler starts a job again that ended with another status; this one would diverge again."""
    from tests.training.processes import command

    run = tiny_run(tmp_path, optimiser={"lr": 1e30, "clip": 0.0, "warmup": 0.0}, steps=30)
    done = subprocess.run(command(run), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert "diverged at step" in done.stderr
    assert "learning rate" in done.stderr
    assert sys.executable not in done.stderr
