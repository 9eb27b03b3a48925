"""Find the block that holds the question's letters: the motivating task of Multi-Token Attention.

    ^ hjnvt.qfjgt.bjtpq. ... .qoiax#pb bjtpq        the question "pb" asks for the one block with both a p and a b

Axis legend: n examples, T time, B blocks, N letters of a block, L letters of the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb, factorial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.tasks.base import IGNORE, Batch, Task, register_task
from recollect.tasks.draw import distinct

# 32 symbols; the last two are never sampled (padding, reserved).
SYMBOLS = "abcdefghijklmnopqrstuvwxyz.#^$_~"
N_ALPHABET = 26
SEPARATOR, MARK, BOS, EOS = (SYMBOLS.index(symbol) for symbol in ".#^$")
ANSWERS = ("all", "first", "last")
# A block is compared as one number in base 26; 26^13 is the largest power that an int64 holds.
MAX_LETTERS = 13


@register_task
@dataclass(frozen=True, kw_only=True)
class FindBlock(Task):
    """Blocks of N distinct letters joined by ".", then "#" and L letters that exactly one block holds: say that block.

    An example is BOS, the blocks, "#", the question, the answer; EOS is only predicted. Labels stand on the last question
    letter and on every answer letter (teacher forcing). Block strings of an example are distinct; the target's letters, the
    order of the question and the target's place are uniform.

    The paper's data are `n_letters=5, n_blocks=52`: 311 characters before the "#". For N = 8 its released generator cuts the
    text to 308 characters, inside the 35th block, which is the target once in 35 times and then cannot be said. Here blocks
    are always whole: take `n_letters=8` with `n_blocks=35` (the paper's number of blocks) or 34 (what fits its length).

    Attributes:
        n_letters: N, letters of a block, 1 to 13.
        n_question: L, letters of the question, 1 to N.
        answer: "all" letters of the block, in order; its "first" or its "last" one.
        n_blocks: B, blocks of the text, at least 2.
        chance: share right when a block of the text is picked uniformly and answered from. For "all" 1/B; for "first" and
            "last" another block may begin or end alike: 1/B + (1 - 1/B) P(alike).
    Raises:
        ValueError: an option outside its range, or more blocks than there are distinct block strings without the question.
    Source: Golovneva et al. 2025, arXiv 2504.00927, section 4.1 and appendix C.
    """

    name: ClassVar[str] = "find-block"
    n_letters: int = 5
    n_question: int = 2
    answer: str = "all"
    n_blocks: int = 8
    vocab_size: int = field(init=False, default=len(SYMBOLS))
    length: int = field(init=False, default=0)
    chance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.answer not in ANSWERS:
            raise ValueError(f"answer is one of {', '.join(ANSWERS)}; got {self.answer!r}")
        if not 1 <= self.n_letters <= MAX_LETTERS:
            raise ValueError(f"n_letters is 1 to {MAX_LETTERS}; got {self.n_letters}")
        if not 1 <= self.n_question <= self.n_letters:
            raise ValueError(
                f"n_question is 1 to n_letters={self.n_letters} (a block has no more letters); got {self.n_question}"
            )
        most = 1 + factorial(self.n_letters) * self._n_sets_without_question()
        if not 2 <= self.n_blocks <= most:
            raise ValueError(
                f"n_blocks is 2 to {most} for n_letters={self.n_letters} and n_question={self.n_question} "
                f"(there are no more distinct blocks); got {self.n_blocks}"
            )
        object.__setattr__(self, "length", 1 + self.n_blocks * (self.n_letters + 1) + self.n_question + self._n_answer)
        alike = 0.0 if self.answer == "all" else self._p_alike()
        object.__setattr__(self, "chance", 1 / self.n_blocks + (1 - 1 / self.n_blocks) * alike)

    @property
    def _n_answer(self) -> int:
        return self.n_letters if self.answer == "all" else 1

    def _n_sets_without_question(self) -> int:
        """Sets of N letters that lack at least one question letter."""
        return comb(N_ALPHABET, self.n_letters) - comb(N_ALPHABET - self.n_question, self.n_letters - self.n_question)

    def _p_alike(self) -> float:
        """Probability that one other block has the target's letter at a given place.

        Counts the letter sets without the whole question that hold the target's letter x, apart for x in the question (share
        L/N) and not. Neglects that blocks of one text are distinct, which matters only when n_blocks is close to its maximum.
        """
        n, q = self.n_letters, self.n_question
        with_letter = comb(N_ALPHABET - 1, n - 1)
        asked = with_letter - comb(N_ALPHABET - q, n - q)
        other = with_letter - (comb(N_ALPHABET - 1 - q, n - 1 - q) if n > q else 0)
        return (q * asked + (n - q) * other) / n / (n * self._n_sets_without_question())

    def sample(self, n: int, *, seed: int) -> Batch:
        """n examples: inputs and labels int64 [n, T], tags `answer_block` (0-based), `n_blocks`, `question`."""
        if n < 1:
            raise ValueError(f"n, the number of examples, is at least 1; got {n}")
        rng = np.random.default_rng(seed)
        n_blocks, n_letters = self.n_blocks, self.n_letters
        blocks = distinct(rng, n * n_blocks, population=N_ALPHABET, k=n_letters).reshape(n, n_blocks, n_letters)
        picks = distinct(rng, n, population=self.n_letters, k=self.n_question)
        question = np.take_along_axis(blocks[:, 0], picks, axis=1)
        _redraw_bad_blocks(rng, blocks, question)
        # Block 0 is the target and the others are exchangeable, so one swap is as good as a shuffle.
        rows, place = np.arange(n), rng.integers(self.n_blocks, size=n)
        blocks[rows, 0], blocks[rows, place] = blocks[rows, place], blocks[rows, 0]
        inputs, labels = self._assemble(blocks, question, place)
        asked = ["".join(SYMBOLS[i] for i in row) for row in question.tolist()]
        tags = [
            {"answer_block": block, "n_blocks": self.n_blocks, "question": letters}
            for block, letters in zip(place.tolist(), asked, strict=True)
        ]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), tags)

    def _assemble(
        self, blocks: NDArray[np.int64], question: NDArray[np.int64], place: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and labels [n, T] from blocks [n, B, N], question [n, L] and the target's place [n]."""
        n = len(blocks)
        answer = _part(blocks[np.arange(n), place], self.answer)
        text = np.full((n, self.n_blocks, self.n_letters + 1), SEPARATOR)
        text[..., :-1] = blocks
        text[:, -1, -1] = MARK
        inputs = np.concatenate([np.full((n, 1), BOS), text.reshape(n, -1), question, answer], axis=1)
        labels = np.full_like(inputs, IGNORE)
        labels[:, -self._n_answer - 1 : -1] = answer
        labels[:, -1] = EOS
        return inputs, labels

    def solve(self, inputs: Tensor) -> Tensor:
        """The labels [n, T] from inputs [n, T]; the answer letters in the inputs are not looked at.

        Raises:
            ValueError: wrong length, or a text in which not exactly one block holds the question.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self.length:
            raise ValueError(f"inputs must be [n, {self.length}] for these options; got {list(inputs.shape)}")
        mark = self.n_blocks * (self.n_letters + 1)
        blocks = inputs[:, 1 : mark + 1].unflatten(1, (self.n_blocks, -1))[..., :-1]
        question = inputs[:, mark + 1 : mark + 1 + self.n_question]
        holds = (blocks[..., None] == question[:, None, None, :]).any(dim=2).all(dim=2)
        if not bool((holds.sum(dim=1) == 1).all()):
            raise ValueError("not a find-block text: exactly one block must hold every question letter")
        target = blocks[torch.arange(len(blocks), device=inputs.device), holds.int().argmax(dim=1)]
        letters = {"all": target, "first": target[:, :1], "last": target[:, -1:]}[self.answer]
        labels = torch.full_like(inputs, IGNORE)
        labels[:, -self._n_answer - 1 : -1] = letters
        labels[:, -1] = EOS
        return labels

    def text(self, tokens: Tensor) -> str:
        """One character per token of [T]; "^" begins, "$" ends, a blank stands where a label is IGNORE."""
        return "".join(" " if i == IGNORE else SYMBOLS[i] for i in tokens.tolist())


def _part(target: NDArray[np.int64], answer: str) -> NDArray[np.int64]:
    return {"all": target, "first": target[:, :1], "last": target[:, -1:]}[answer]


def _redraw_bad_blocks(rng: np.random.Generator, blocks: NDArray[np.int64], question: NDArray[np.int64]) -> None:
    """Redraw, in place, blocks 1.. of [n, B, N] until none holds the whole question [n, L] and none equals another block.

    Only bad blocks are drawn again. Every admissible string is treated alike, so the result is uniform over distinct ones.
    """
    n_letters = blocks.shape[2]
    asked = np.bitwise_or.reduce(1 << question, axis=1)[:, None]
    powers = N_ALPHABET ** np.arange(n_letters, dtype=np.int64)
    while True:
        bad = (np.bitwise_or.reduce(1 << blocks, axis=2) & asked) == asked
        bad[:, 0] = False
        bad |= _repeats(blocks @ powers)
        n_bad = int(bad.sum())
        if n_bad == 0:
            return
        blocks[bad] = distinct(rng, n_bad, population=N_ALPHABET, k=n_letters)


def _repeats(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True [n, B] where a row of codes [n, B] has the same number further left; the first one stays False."""
    repeated = np.zeros(codes.shape, bool)
    ordered = np.sort(codes, axis=1)
    for row in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)):
        repeated[row] = True
        repeated[row, np.unique(codes[row], return_index=True)[1]] = False
    return repeated
