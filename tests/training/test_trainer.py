"""`run_training`: what lies in the folder afterwards, and what every setting does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from recollect.data.settings import SourceSettings
from recollect.data.tokenizer import load_tokenizer, train_tokenizer
from recollect.data.validation import validation_rows
from recollect.models import RecollectForCausalLM
from recollect.training.journal import read_lines
from recollect.training.parallel import Scored
from recollect.training.recipe.settings import RunSettings
from recollect.training.trainer import run_training
from tests.training.runs import (
    assert_exact_resumption,
    checkpoints,
    finish,
    journal,
    losses,
    model_bits,
    tiny_run,
    validation,
    write_text,
)

pytestmark = pytest.mark.usefixtures("unmeasured")

# AdamW divides by the root of the second moment, so rounding in a gradient near zero moves a weight by a whole step; with so large
# an eps a rounding error stays one.
SMOOTH = {"lr": 0.3, "eps": 1.0, "clip": 10.0}


def losses_of_one(run: RunSettings) -> float:
    finish(run)
    return losses(run)[1]


def saved(run: RunSettings) -> dict[str, Tensor]:
    return RecollectForCausalLM.from_pretrained(Path(run.out) / "model").state_dict()


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


@pytest.mark.parametrize("settings", [{}, {"engine": {"precision": "bf16"}}, {"optimiser": {"name": "muon", "lr": 3e-3}}])
def test_training_learns(tmp_path: Path, settings: dict[str, Any]) -> None:
    """bf16 must train the fp32 weights (updates of 1e-3 vanish in bf16), and Muon must go downhill."""
    run = tiny_run(tmp_path, **{"steps": 40, "optimiser": {"lr": 1e-2}, "eval_every": 0, **settings})
    finish(run)
    assert validation(run)[40] < validation(run)[0] - 1.5
    assert {tensor.dtype for tensor in saved(run).values()} == {torch.float32}


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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layers", ["attention", "mta", "yaad"])
def test_a_compiled_run_has_the_losses_of_the_other(tmp_path: Path, layers: str) -> None:
    """Sixteen recipes set `engine.compile`: a graph that drops a state or a mask would train another model."""
    curves = []
    for compiled in (False, True):
        run = tiny_run(tmp_path, out=f"run-{compiled}", layers=layers, steps=3, eval_every=0, engine={"compile": compiled})
        run_training(run, say=lambda line: None)
        curves.append([event["loss"] for event in read_lines(Path(run.out) / "progress.jsonl") if event["event"] == "step"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
