"""Runs that cannot start or go on: the sentence says why, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recollect.data.settings import SourceSettings
from recollect.data.tokenizer import train_tokenizer
from recollect.training import trainer
from recollect.training.folder import Busy, locked
from recollect.training.loop import NonFiniteLoss
from recollect.training.recipe.load import load_run
from recollect.training.recipe.settings import ModelSettings
from recollect.training.trainer import CHECKPOINTS, run_training
from tests.training.runs import (
    checkpoints,
    finish,
    stop_after,
    tiny_run,
    write_text,
)

pytestmark = pytest.mark.usefixtures("unmeasured")


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


def test_a_first_start_that_failed_does_not_cost_the_folder(tmp_path: Path) -> None:
    """A typo in a path must not turn the folder into another run's, which holds nothing."""
    wrong = tiny_run(tmp_path, data={"sources": [SourceSettings(paths=[str(tmp_path / "nofile.txt")])]})
    with pytest.raises(ValueError, match="no such file"):
        run_training(wrong, say=lambda line: None)
    finish(tiny_run(tmp_path))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"tensor_parallel": 2, "strategy": "fsdp"}, "need a multiple of 2 processes; there is 1"),
        ({"sequence_parallel": 2, "strategy": "ddp"}, "need a multiple of 2 processes; there is 1"),
        ({"device": "cuda:3"}, "engine.device is cuda:3, but torch finds"),
    ],
)
def test_processes_and_devices_that_are_not_there_are_refused(tmp_path: Path, engine: dict[str, Any], message: str) -> None:
    """Prevents a division by zero, and torch's own assertion, in place of a sentence."""
    with pytest.raises(ValueError, match=message):
        run_training(tiny_run(tmp_path, engine=engine), say=lambda line: None)


def test_compilation_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents forty lines of the compiler's traceback at the first step."""
    monkeypatch.setattr(trainer.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"engine.compile needs a C\+\+ compiler"):
        run_training(tiny_run(tmp_path, engine={"compile": True}), say=lambda line: None)


def test_a_run_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    """Prevents a recursion without end: YAML's aliases allow a list inside itself."""
    (tmp_path / "r.yaml").write_text("model: &a {options: *a}\n")
    with pytest.raises(ValueError, match="an alias stands inside what it stands for"):
        load_run(tmp_path / "r.yaml")


def test_another_tokenizer_of_as_many_tokens_is_refused(tmp_path: Path) -> None:
    """A model's ids mean nothing to another tokenizer; their number alone tells nothing."""
    write_text(tmp_path / "text.jsonl")
    write_text(tmp_path / "other.jsonl", seed=1, n_documents=90)
    files = [
        train_tokenizer(tmp_path / f"{name}.jsonl", vocab_size=280, out=tmp_path / f"{name}.json") for name in ("text", "other")
    ]
    if files[0].read_text() == files[1].read_text():
        files[1].write_text(files[0].read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
    first = tiny_run(tmp_path, out="first", data={"tokenizer": str(files[0])})
    run_training(first, say=lambda line: None)
    second = tiny_run(tmp_path, out="second", data={"tokenizer": str(files[1])})
    second = dataclasses.replace(second, model=ModelSettings(start_from=first.out))
    with pytest.raises(ValueError, match="was trained with the tokenizer beside it"):
        run_training(second, say=lambda line: None)


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
