"""find-block against its definition, read off the text with plain string operations; never through the solver."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from recollect.tasks import IGNORE, Batch, FindBlock

CASES = [
    FindBlock(),
    FindBlock(answer="first"),
    FindBlock(answer="last", n_letters=4, n_question=3, n_blocks=6),
    FindBlock(n_blocks=52),
    FindBlock(n_letters=8, n_blocks=35),
    FindBlock(n_letters=8, n_blocks=34, answer="last"),
    FindBlock(n_letters=13, n_question=13, n_blocks=3),
    FindBlock(n_letters=2, n_question=1, n_blocks=500),
]


def word(tokens: list[int]) -> str:
    """The text of tokens by the alphabet's definition, apart from the task's own `text`."""
    return "".join("abcdefghijklmnopqrstuvwxyz.#<>"[token] for token in tokens)


def check_definition(task: FindBlock, inputs: Tensor, labels: Tensor) -> None:
    """One example obeys the paper's definition, checked letter by letter.

    Raises:
        AssertionError: it does not.
    """
    assert inputs.shape == labels.shape == (task.length,)
    text = word(inputs.tolist())
    assert text[0] == "<"
    assert text.count("#") == 1
    body, tail = text[1:].split("#")
    question, said = tail[: task.n_question], tail[task.n_question :]
    blocks = body.split(".")
    assert len(blocks) == len(set(blocks)) == task.n_blocks
    assert all(len(block) == len(set(block)) == task.n_letters and block.isalpha() for block in blocks)
    assert len(set(question)) == task.n_question
    assert question.isalpha()
    holders = [block for block in blocks if set(question) <= set(block)]
    assert len(holders) == 1
    answer = {"all": holders[0], "first": holders[0][0], "last": holders[0][-1]}[task.answer]
    assert said == answer
    asked = [t for t, label in enumerate(labels.tolist()) if label != IGNORE]
    assert asked == list(range(task.length - len(answer) - 1, task.length))
    assert text[asked[0]] == question[-1]
    assert word(labels[asked].tolist()) == answer + ">"


@pytest.mark.parametrize("task", CASES, ids=str)
def test_find_block_matches_definition(task: FindBlock) -> None:
    """Prevents cut blocks, two blocks with the question, labels beside the answer."""
    batch = task.sample(100, seed=3)
    for inputs, labels, tag in zip(*batch, strict=True):
        check_definition(task, inputs, labels)
        block = word(inputs.tolist())[1:].split("#")[0].split(".")[tag["answer_block"]]
        assert set(tag["question"]) <= set(block)
        assert tag["n_blocks"] == task.n_blocks


@pytest.mark.parametrize(("n_letters", "n_blocks", "n_characters"), [(5, 52, 311), (8, 34, 305), (8, 35, 314)])
def test_find_block_reaches_paper_sizes(n_letters: int, n_blocks: int, n_characters: int) -> None:
    """The paper's text has 311 characters before "#" for N = 5; for N = 8 no block may be cut (its generator cut at 308)."""
    task = FindBlock(n_letters=n_letters, n_blocks=n_blocks)
    inputs = task.sample(1, seed=0).inputs[0].tolist()
    assert word(inputs).index("#") == 1 + n_characters
    assert task.length == len(inputs) == 1 + n_characters + 1 + 2 + n_letters
    assert task.vocab_size == 32


def test_find_block_example_reads_as_text() -> None:
    """Prevents a report in which the picture of an example is not the example."""
    task = FindBlock(n_letters=2, n_blocks=2, answer="first")
    batch = task.sample(1, seed=5)
    assert task.text(batch.inputs[0]) == "^" + word(batch.inputs[0].tolist())[1:]
    assert task.text(batch.labels[0]) == " " * (task.length - 2) + word([int(batch.labels[0, -2])]) + "$"


def test_find_block_target_and_letters_are_uniform() -> None:
    """Prevents a target that prefers a place, or a question that prefers letters: both could be guessed without reading."""
    n = 8000
    batch = FindBlock().sample(n, seed=11)
    places = Counter(tag["answer_block"] for tag in batch.tags)
    letters = Counter(letter for tag in batch.tags for letter in tag["question"])
    order = sum(tag["question"][0] < tag["question"][1] for tag in batch.tags)
    # Five standard deviations of a binomial count.
    assert all(abs(places[place] - n / 8) < 5 * (n * 7 / 64) ** 0.5 for place in range(8))
    assert all(abs(letters[letter] - n / 13) < 5 * (n / 13) ** 0.5 for letter in "abcdefghijklmnopqrstuvwxyz")
    assert abs(order - n / 2) < 5 * (n / 4) ** 0.5


def test_find_block_other_blocks_are_uniform() -> None:
    """Prevents biased redrawing: with N = 2, L = 1 each of the 600 strings without the question's letter is as likely."""
    n, task = 4000, FindBlock(n_letters=2, n_question=1, n_blocks=26)
    batch = task.sample(n, seed=2)
    counts: Counter[str] = Counter()
    for inputs, tag in zip(batch.inputs.tolist(), batch.tags, strict=True):
        blocks = word(inputs)[1:].split("#")[0].split(".")
        asked = ord(tag["question"]) - ord("a")
        # Letters relative to the question's, so that all examples count over the same 25 letters.
        counts.update(
            "".join(chr((ord(c) - ord("a") - asked) % 26 + 97) for c in block)
            for place, block in enumerate(blocks)
            if place != tag["answer_block"]
        )
    expected = n * 25 / 600
    assert len(counts) == 600
    assert max(abs(count - expected) for count in counts.values()) < 5.5 * expected**0.5


@pytest.mark.parametrize("n_blocks", [26, 20])
def test_find_block_fills_up_to_every_distinct_block(n_blocks: int) -> None:
    """Prevents an endless redrawing or a wrong count at the most blocks that exist: 25 one-letter blocks and the target."""
    task = FindBlock(n_letters=1, n_question=1, n_blocks=n_blocks)
    for inputs, labels in zip(*task.sample(20, seed=1)[:2], strict=True):
        check_definition(task, inputs, labels)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"answer": "middle"}, "all, first, last"),
        ({"n_letters": 0}, "n_letters is 1 to 13"),
        ({"n_letters": 14}, "n_letters is 1 to 13"),
        ({"n_letters": 3, "n_question": 4}, "n_question is 1 to n_letters=3"),
        ({"n_question": 0}, "n_question is 1 to"),
        ({"n_blocks": 1}, "n_blocks is 2 to"),
        ({"n_letters": 1, "n_question": 1, "n_blocks": 27}, "n_blocks is 2 to 26"),
    ],
)
def test_find_block_refuses_impossible_options(options: dict, says: str) -> None:
    """Prevents an endless loop or a silent nonsense task."""
    with pytest.raises(ValueError, match=says):
        FindBlock(**options)


def test_find_block_solver_ignores_the_answer_and_checks_the_text() -> None:
    """Prevents a solver that copies the teacher-forced answer, or that answers a text without a unique answer."""
    task = FindBlock()
    inputs, labels, _ = task.sample(50, seed=4)
    blind = inputs.clone()
    blind[:, -task.n_letters :] = 30
    assert torch.equal(task.solve(blind), labels)
    with pytest.raises(ValueError, match="inputs must be"):
        task.solve(inputs[:, 1:])
    twice = inputs.clone()
    twice[:, 1:6] = twice[:, 7:12] = inputs[:, -5:]
    with pytest.raises(ValueError, match="exactly one block"):
        task.solve(twice)


def _second_holder(task: FindBlock, batch: Batch) -> Batch:
    """Another block gets the target's letters, in reverse."""
    inputs = batch.inputs.clone()
    for row, tag in enumerate(batch.tags):
        other = (tag["answer_block"] + 1) % task.n_blocks
        start = 1 + other * (task.n_letters + 1)
        inputs[row, start : start + task.n_letters] = inputs[row, -task.n_letters :].flip(0)
    return batch._replace(inputs=inputs)


def _same_block_twice(task: FindBlock, batch: Batch) -> Batch:
    """Two blocks that are not the target are equal."""
    inputs, step = batch.inputs.clone(), task.n_letters + 1
    for row, tag in enumerate(batch.tags):
        a, b = [1 + place * step for place in range(task.n_blocks) if place != tag["answer_block"]][:2]
        inputs[row, a : a + task.n_letters] = inputs[row, b : b + task.n_letters]
    return batch._replace(inputs=inputs)


def _cut_block(task: FindBlock, batch: Batch) -> Batch:
    """The last block loses a letter to its left neighbour: the length is kept, the block is not whole."""
    inputs = batch.inputs.clone()
    end = 1 + task.n_blocks * (task.n_letters + 1)
    inputs[:, end - 2] = 26
    return batch._replace(inputs=inputs)


def _late_labels(task: FindBlock, batch: Batch) -> Batch:
    """Labels one position late: the input at that position is the answer."""
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, 1:] = batch.labels[:, :-1]
    return batch._replace(labels=labels)


def _unsorted_answer(task: FindBlock, batch: Batch) -> Batch:
    """The answer has the right letters in another order, in the inputs and in the labels."""
    inputs, labels, n = batch.inputs.clone(), batch.labels.clone(), task.n_letters
    inputs[:, -n:] = inputs[:, -n:].roll(1, dims=1)
    labels[:, -n - 1 : -1] = labels[:, -n - 1 : -1].roll(1, dims=1)
    return Batch(inputs, labels, batch.tags)


MUTANTS = [_second_holder, _same_block_twice, _cut_block, _late_labels, _unsorted_answer]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda f: f.__name__)
def test_find_block_definition_check_catches_mutants(mutate) -> None:
    """Prevents a check that lets a broken generator through."""
    task = FindBlock()
    broken = mutate(task, task.sample(20, seed=9))
    for inputs, labels, _ in zip(*broken, strict=True):
        with pytest.raises(AssertionError):
            check_definition(task, inputs, labels)
