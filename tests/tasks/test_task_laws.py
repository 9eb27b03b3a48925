"""Laws of every registered task, and mutants: deliberately broken tasks that a law must catch.

A law is a function of a task that raises AssertionError where the task breaks it. A new task is tested by being registered; it
must say here how a uniform guess looks (GUESSES), and may add option sets (VARIANTS).
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.tasks import IGNORE, TASKS, Batch, FindBlock, Recall, Task, build_task, stream_seed

N = 500

VARIANTS: dict[str, list[dict]] = {
    "find-block": [
        {},
        {"answer": "first"},
        {"answer": "last"},
        {"n_blocks": 52},
        {"n_letters": 8, "n_blocks": 35},
        {"n_letters": 3, "n_question": 1, "n_blocks": 4, "answer": "first"},
    ],
    "recall": [
        {},
        {"random_non_queries": True, "n_pairs": 8, "vocab_size": 256},
        {"variant": "forgetting", "random_non_queries": True},
        {"variant": "compositional"},
        {"variant": "compositional", "n_pairs": 9, "random_non_queries": True},
    ],
}


def find_block_guess(task: Task, inputs: list[int], labels: list[int], draw: random.Random) -> dict[int, int]:
    """Answer from a block picked blindly."""
    assert isinstance(task, FindBlock)
    step = task.n_letters + 1
    start = 1 + step * draw.randrange(task.n_blocks)
    block = inputs[start : start + task.n_letters]
    said = {"all": block, "first": block[:1], "last": block[-1:]}[task.answer] + [29]
    return dict(zip(range(task.length - len(said), task.length), said, strict=True))


def recall_guess(task: Task, inputs: list[int], labels: list[int], draw: random.Random) -> dict[int, int]:
    """Answer every query with a value picked blindly among the written ones."""
    assert isinstance(task, Recall)
    size = 3 if task.variant == "compositional" else 2
    written = task.n_pairs + (task.n_pairs // 2 if task.variant == "forgetting" else 0)
    values = inputs[size - 1 : size * written : size]
    return {t: draw.choice(values) for t, label in enumerate(labels) if label != IGNORE}


GUESSES: dict[str, Callable[[Task, list[int], list[int], random.Random], dict[int, int]]] = {
    "find-block": find_block_guess,
    "recall": recall_guess,
}


def law_shapes(task: Task) -> None:
    """inputs and labels are int64 [n, length]; inputs and asked labels lie in the vocabulary; every example asks something."""
    inputs, labels, tags = task.sample(N, seed=1)
    assert inputs.shape == labels.shape == (N, task.length)
    assert inputs.dtype == labels.dtype == torch.int64
    assert len(tags) == N
    asked = labels != IGNORE
    assert bool(asked.any(dim=1).all())
    for tokens in (inputs, labels[asked]):
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < task.vocab_size


def law_seed_decides(task: Task) -> None:
    """The same seed gives the same batch, whatever the global generators; another seed gives another one."""
    first = task.sample(20, seed=7)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (a task that used it would show here)
    again, other = task.sample(20, seed=7), task.sample(20, seed=8)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    assert first.tags == again.tags
    assert not torch.equal(first.inputs, other.inputs)


def law_solver_is_exact(task: Task) -> None:
    """The solver's labels are the labels, and score 1."""
    inputs, labels, _ = task.sample(N, seed=2)
    solved = task.solve(inputs.clone())
    assert torch.equal(solved, labels)
    assert task.correct(solved, labels).tolist() == [1.0] * N


def law_teacher_forcing(task: Task) -> None:
    """Where the next position is asked too, the next input is this label: the answer so far is given."""
    inputs, labels, _ = task.sample(N, seed=3)
    together = (labels[:, :-1] != IGNORE) & (labels[:, 1:] != IGNORE)
    assert torch.equal(inputs[:, 1:][together], labels[:, :-1][together])


def law_last_token_does_not_tell(task: Task) -> None:
    """The best table (position, token read) -> label, learned on other examples, stays far from solving the task."""
    counts: dict[tuple[int, int], Counter] = defaultdict(Counter)
    inputs, labels, _ = task.sample(4 * N, seed=4)
    for row, t in (labels != IGNORE).nonzero().tolist():
        counts[t, int(inputs[row, t])][int(labels[row, t])] += 1
    inputs, labels, _ = task.sample(N, seed=5)
    predictions = torch.zeros_like(labels)
    for row, t in (labels != IGNORE).nonzero().tolist():
        seen = counts[t, int(inputs[row, t])]
        predictions[row, t] = max(seen, key=seen.__getitem__, default=0)
    assert float(task.correct(predictions, labels).mean()) < task.chance + 0.3 < 0.9


def law_streams_are_disjoint(task: Task) -> None:
    """No example of several thousand training ones is among several hundred test ones, and none repeats."""
    train = [row for step in range(6) for row in map(tuple, task.sample(N, seed=stream_seed("train", 0, step)).inputs.tolist())]
    test = [row for i in range(2) for row in map(tuple, task.sample(N, seed=stream_seed("test", i)).inputs.tolist())]
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)


def law_chance(task: Task) -> None:
    """A uniform guess scores `chance`, to five standard errors of the sample."""
    draw = random.Random(6)
    inputs, labels, _ = task.sample(4 * N, seed=6)
    predictions = torch.zeros_like(labels)
    for row, (tokens, wanted) in enumerate(zip(inputs.tolist(), labels.tolist(), strict=True)):
        for t, token in GUESSES[task.name](task, tokens, wanted, draw).items():
            predictions[row, t] = token
    scores = task.correct(predictions, labels)
    assert 0 < task.chance < 1
    assert abs(float(scores.mean()) - task.chance) < 5 * float(scores.std()) / (4 * N) ** 0.5


def law_score(task: Task) -> None:
    """The score is float64 [n] in [0, 1], 0 where nothing asked is right, and blind to positions that are not asked."""
    _, labels, _ = task.sample(20, seed=9)
    wrong = torch.where(labels == IGNORE, 0, (labels + 1) % task.vocab_size)
    assert task.correct(wrong, labels).tolist() == [0.0] * 20
    elsewhere = torch.where(labels == IGNORE, 1, labels)
    score = task.correct(elsewhere, labels)
    assert score.dtype == torch.float64
    assert score.tolist() == [1.0] * 20


def law_rows_are_alone(task: Task) -> None:
    """The solver treats each row by itself."""
    inputs = task.sample(20, seed=10).inputs
    assert torch.equal(task.solve(inputs)[3:4], task.solve(inputs[3:4]))


def law_unique_answer(task: Task) -> None:
    """find-block: exactly one block holds the question, found with sets of characters."""
    if not isinstance(task, FindBlock):
        return
    for row in task.sample(N, seed=11).inputs.tolist():
        text = "".join("abcdefghijklmnopqrstuvwxyz.#^"[token] for token in row)[1:]
        body, tail = text.split("#")
        assert sum(set(tail[: task.n_question]) <= set(block) for block in body.split(".")) == 1


LAWS = [
    law_shapes,
    law_seed_decides,
    law_solver_is_exact,
    law_teacher_forcing,
    law_last_token_does_not_tell,
    law_streams_are_disjoint,
    law_chance,
    law_score,
    law_rows_are_alone,
    law_unique_answer,
]


def every_task() -> Iterator[Task]:
    for name in sorted(TASKS):
        for options in VARIANTS.get(name, [{}]):
            yield build_task(name, **options)


@pytest.mark.parametrize("task", list(every_task()), ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_task_law(law: Callable[[Task], None], task: Task) -> None:
    """Each law's docstring says what it demands."""
    law(task)


def test_every_task_says_how_it_is_guessed() -> None:
    """Prevents a registered task whose chance level nobody checks."""
    assert sorted(GUESSES) == sorted(TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_is_a_frozen_dataclass_with_working_defaults(name: str) -> None:
    """Prevents a task that cannot be set from the command line, hashed into a configuration or read in a report."""
    task = build_task(name)
    assert task.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.length = 3
    assert task == build_task(name)
    example = task.sample(1, seed=0)
    assert len(task.text(example.inputs[0])) > 0
    assert len(task.text(example.labels[0])) > 0
    with pytest.raises(ValueError, match="at least 1"):
        task.sample(0, seed=0)
    with pytest.raises(ValueError, match=f"task '{name}' has no option 'colour'.*Its options"):
        build_task(name, colour=1)


def test_unknown_task_names_the_nearest() -> None:
    """Prevents a bare KeyError for a typing mistake."""
    with pytest.raises(ValueError, match="did you mean 'find-block'"):
        build_task("find-blok")
    with pytest.raises(ValueError, match="did you mean 'n_blocks'"):
        build_task("find-block", n_block=3)


def test_stream_seeds_of_training_and_test_never_meet() -> None:
    """Prevents a test example that was trained on: parity keeps the streams apart, and distinct parts give distinct seeds."""
    train = {stream_seed("train", run, step) for run in range(20) for step in range(100)}
    test = {stream_seed("test", i) for i in range(2000)}
    assert len(train) == len(test) == 2000
    assert {seed % 2 for seed in train} == {0}
    assert {seed % 2 for seed in test} == {1}
    with pytest.raises(ValueError, match="'train' or 'test'"):
        stream_seed("validation", 1)


# Mutants: one deliberate bug each, with the law that must catch it.


class SecondHolder(FindBlock):
    """Every block that is not the target may hold the question: they are not drawn again."""

    def sample(self, n: int, *, seed: int) -> Batch:
        inputs, labels, tags = super().sample(n, seed=seed)
        for row, tag in enumerate(tags):
            start = 1 + (tag["answer_block"] + 1) % self.n_blocks * (self.n_letters + 1)
            inputs[row, start : start + self.n_letters] = inputs[row, -self.n_letters :].flip(0)
        return Batch(inputs, labels, tags)


class LateLabels(FindBlock):
    """Labels one position late, so that the input tells them."""

    def sample(self, n: int, *, seed: int) -> Batch:
        inputs, labels, tags = super().sample(n, seed=seed)
        return Batch(inputs, labels.roll(1, dims=1).index_fill(1, torch.tensor([0]), IGNORE), tags)


class GlobalDice(FindBlock):
    """Data from the global generator."""

    def sample(self, n: int, *, seed: int) -> Batch:
        return super().sample(n, seed=int(np.random.randint(1 << 30)))  # noqa: NPY002


class SeedIgnored(FindBlock):
    """The same data for every seed."""

    def sample(self, n: int, *, seed: int) -> Batch:
        return super().sample(n, seed=0)


class ParityLost(FindBlock):
    """Training and test seeds fold onto few streams."""

    def sample(self, n: int, *, seed: int) -> Batch:
        return super().sample(n, seed=seed % 4 // 2)


class FirstValue(Recall):
    """The first value of a key is the label, also where it was written again."""

    def sample(self, n: int, *, seed: int) -> Batch:
        inputs, labels, tags = super().sample(n, seed=seed)
        for row, tag in enumerate(tags):
            for t in tag["queries"]:
                at = inputs[row, : self.length // 2].tolist().index(int(inputs[row, t]))
                labels[row, t] = inputs[row, at + 1]
        return Batch(inputs, labels, tags)


class SameTable(Recall):
    """Every sequence has the same pairs: the last token tells the answer."""

    def sample(self, n: int, *, seed: int) -> Batch:
        inputs, labels, tags = super().sample(n, seed=seed)
        inputs = torch.where(inputs >= self.vocab_size // 2, 0, inputs)
        inputs[:, 1 : 2 * self.n_pairs : 2] = inputs[:, 0 : 2 * self.n_pairs : 2] + self.vocab_size // 2
        return Batch(inputs, torch.where(labels == IGNORE, IGNORE, inputs + self.vocab_size // 2), tags)


class WrongChance(FindBlock):
    """The chance level promised is that of another text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "chance", 1 / 26)


class LoudScore(FindBlock):
    """Positions that are not asked count."""

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return (predictions == labels).to(torch.float64).mean(dim=1)


class BatchSolver(FindBlock):
    """Every row is answered with the first row's block."""

    def solve(self, inputs: Tensor) -> Tensor:
        return super().solve(inputs)[:1].expand_as(inputs)


MUTANTS: list[tuple[Task, Callable[[Task], None]]] = [
    (SecondHolder(), law_unique_answer),
    (LateLabels(), law_teacher_forcing),
    (LateLabels(), law_solver_is_exact),
    (GlobalDice(), law_seed_decides),
    (SeedIgnored(), law_seed_decides),
    (SeedIgnored(), law_streams_are_disjoint),
    (ParityLost(), law_streams_are_disjoint),
    (FirstValue(variant="forgetting"), law_solver_is_exact),
    (SameTable(), law_last_token_does_not_tell),
    (WrongChance(), law_chance),
    (LoudScore(), law_score),
    (BatchSolver(), law_rows_are_alone),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda value: getattr(value, "__name__", type(value).__name__))
def test_law_catches_mutant(mutant: Task, law: Callable[[Task], None]) -> None:
    """Prevents a law that nothing can break."""
    with pytest.raises(AssertionError):
        law(mutant)
