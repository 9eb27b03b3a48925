"""Tasks in text as bytes to train on: what is asked, how long it is, and that a compare can be run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.comparison import Request, compare
from recollect.comparison.workload import make_workload
from recollect.comparison.written import WrittenWorkload
from recollect.data.text import DOCUMENT_START, decode
from recollect.data.tokenizer import load_tokenizer
from recollect.tasks import IGNORE

TASKS: dict[str, dict[str, Any]] = {
    "ruler": {"length": 600, "answer_tokens": 40},
    "needles": {"length": 300, "start": "random"},
    "babilong": {"instruction": False, "examples": False, "answer_format": False},
}


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_asked_byte_by_byte(name: str) -> None:
    """Prevents labels that are off by one, that ask for the prompt, or that miss the full stop that ends an answer."""
    work = make_workload(name, TASKS[name])
    assert isinstance(work, WrittenWorkload)
    batch = work.train_batch(8, run_seed=0, step=0)
    assert batch.inputs[:, 0].eq(DOCUMENT_START).all()
    for inputs, labels in zip(batch.inputs, batch.labels, strict=True):
        asked = (labels != IGNORE).nonzero()[:, 0]
        assert asked.diff().eq(1).all()
        prompt = decode(inputs[: asked[0] + 1])
        answer = decode(labels)
        assert work.task.solve(prompt) == answer
        assert torch.equal(inputs[asked[1:]], labels[asked[:-1]])
        assert inputs[asked[-1] + 1 :].eq(DOCUMENT_START).all()


def test_everything_can_be_learned_too() -> None:
    """Prevents a language-modelling loss that is shifted, or that counts padding."""
    work = make_workload("needles", {**TASKS["needles"], "learn": "everything"})
    batch = work.train_batch(4, run_seed=0, step=0)
    asked = (batch.labels[:, :-1] != IGNORE) & (batch.labels[:, 1:] != IGNORE)  # the last byte is asked, never read
    assert torch.equal(batch.labels[:, :-1][asked], batch.inputs[:, 1:][asked])
    (held_out,) = work.held_out(4, batch_size=4)
    assert ((held_out.labels != IGNORE).sum(dim=1) < 10).all()


def test_training_lengths_are_drawn_and_held_out_ones_are_not() -> None:
    """Prevents a curriculum that reaches the test, or never reaches the full length."""
    work = make_workload("needles", {**TASKS["needles"], "shortest": 180})
    lengths = [work.train_batch(2, run_seed=0, step=step).inputs.shape[1] for step in range(40)]
    assert min(lengths) < 200
    assert max(lengths) > 260
    assert all(batch.inputs.shape[1] > 240 for batch in work.held_out(8, batch_size=4))


def test_training_lengths_grow() -> None:
    """Prevents a curriculum that begins with long texts, or never ends."""
    work = make_workload("needles", {**TASKS["needles"], "shortest": 180, "grow": 40})
    lengths = [
        max(work.train_batch(1, run_seed=0, step=step).inputs.shape[1] for step in range(n, n + 8)) for n in (0, 16, 200)
    ]
    assert lengths[0] < 205 < lengths[1] < 255 < lengths[2]


def test_texts_without_a_length_grow_too() -> None:
    """Prevents stories that are long from the first step, or other ones in every process."""
    options = {**TASKS["babilong"], "vocab_size": 512, "shortest": 40, "grow": 40}
    work = make_workload("babilong", options)
    first = work.train_batch(16, run_seed=0, step=0)
    assert first.inputs.shape[1] < 42
    assert torch.equal(first.inputs, make_workload("babilong", options).train_batch(16, run_seed=0, step=0).inputs)
    assert work.train_batch(16, run_seed=0, step=100).inputs.shape[1] > 60
    with pytest.raises(ValueError, match=r"fewer than one in 16 .* their median is"):
        make_workload("babilong", {**options, "shortest": 15})


def test_words_are_tokens(tmp_path: Path) -> None:
    """Prevents labels at the wrong tokens, lengths in bytes, and a vocabulary that differs from process to process."""
    options = {**TASKS["needles"], "length": 100, "shortest": 80, "vocab_size": 600}
    work, again = (make_workload("needles", options) for _ in range(2))
    assert work.fingerprint == again.fingerprint != make_workload("needles", {**options, "vocab_size": 500}).fingerprint
    batch = work.train_batch(8, run_seed=0, step=0)
    assert batch.inputs.max() < work.vocab_size <= 600
    assert 60 < batch.inputs.shape[1] <= 100
    tokenizer = load_tokenizer(str(work.tokenizer_file(tmp_path)))
    for inputs, labels in zip(batch.inputs, batch.labels, strict=True):
        asked = (labels != IGNORE).nonzero()[:, 0]
        assert asked.diff().eq(1).all()
        assert torch.equal(inputs[asked[1:]], labels[asked[:-1]])
        prompt = tokenizer.decode(inputs[: asked[0] + 1])
        assert len(tokenizer.encode_batch([prompt])[0]) == asked[0]  # the prompt as a model would get it, and the start
        assert work.task.solve(prompt) == tokenizer.decode(labels)


def test_held_out_questions_are_the_same_for_everyone() -> None:
    """Prevents a test set that depends on its size or coincides with what is trained on."""
    work = make_workload("needles", TASKS["needles"])
    few, many = next(work.held_out(3, batch_size=8)), next(work.held_out(8, batch_size=8))
    n = few.inputs.shape[1]
    assert torch.equal(few.inputs, many.inputs[:3, :n])
    trained = work.train_batch(8, run_seed=0, step=0)
    assert not {decode(row) for row in many.inputs} & {decode(row) for row in trained.inputs}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lenth": 5}, "no option 'lenth'"),
        ({"length": 300, "shortest": 400}, "shortest is 1 to the task's length of 300"),
        ({"length": 300, "shortest": 20}, "raise length"),
        ({"learn": "nothing"}, "learn is answers or everything"),
        ({"grow": 10}, "grow is a number of steps, and needs shortest"),
        ({"vocab_size": 100}, "vocab_size is at least 257"),
        ({"n_needles": "two"}, "must be an integer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """Prevents an option that fails in a worker, hours later, or not at all."""
    with pytest.raises(ValueError, match=message):
        make_workload("needles", options)


def test_mixers_can_be_compared_on_a_task_in_text(tmp_path: Path) -> None:
    """Prevents a workload that the comparison, its report or its checkpoints cannot take."""
    options = {"start": "random", "length": 120, "shortest": 100, "vocab_size": 400}
    request = Request(
        task="needles",
        mixers=["attention", "gated_delta_net"],
        budget="2steps",
        task_options=options,
        width=16,
        heads=2,
        layers=1,
        batch_size=2,
        n_eval=4,
        n_eval_curve=2,
    )
    outcome = compare(request, out=tmp_path / "out", jobs=1)
    assert not outcome.failed
    assert "error" in (tmp_path / "out" / "table.txt").read_text()
    tokenizer = load_tokenizer(tmp_path / "out" / "runs" / "attention-seed0" / "model")
    assert tokenizer.fingerprint == make_workload("needles", options).fingerprint
