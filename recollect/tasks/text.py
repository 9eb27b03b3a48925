"""Tasks in plain text: a prompt is read, an answer is written. Seeded generators with an exact solver and the published metric.

A `TextTask` knows nothing of tokens: how long a text is says the caller's `measure`, usually a model's own tokenizer.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

Measure = Callable[[str], int]


def n_bytes(text: str) -> int:
    """Length in UTF-8 bytes: the measure of a byte-level model."""
    return len(text.encode())


class Question(NamedTuple):
    """One example.

    prompt: what the model reads, to the last character before its answer (which begins with a blank where the text needs one).
    answers: the references; what a task does with several of them is its metric's business.
    tags: what is known of the example: at which depth the answer stands, how many hops it takes, the length aimed at.
    """

    prompt: str
    answers: tuple[str, ...]
    tags: dict[str, Any]


class TextTask(abc.ABC):
    """A task in text; concrete ones are frozen dataclasses whose fields are the options.

    Attributes:
        name: what users type.
        chance: expected score of a uniform guess among the plausible answers.
        answer_tokens: tokens that a model may write before it is cut off.
    """

    name: ClassVar[str]
    chance: float
    answer_tokens: int

    @abc.abstractmethod
    def sample(self, n: int, *, seed: int, measure: Measure = n_bytes) -> list[Question]:
        """n examples, a pure function of (self, n, seed, measure).

        Raises:
            ValueError: no text of the wanted length can be made.
        """

    @abc.abstractmethod
    def solve(self, prompt: str) -> str:
        """The answer by rule, as a perfect model would write it after the prompt. Reads nothing but `prompt`."""

    @abc.abstractmethod
    def score(self, said: str, question: Question) -> float:
        """The published metric, in [0, 1], of what a model wrote after the prompt."""

    def chance_at(self, question: Question) -> float:
        """`chance` at this one question, for tasks that have it differ from question to question."""
        return self.chance

    @abc.abstractmethod
    def target(self, question: Question) -> str:
        """The continuation to train on: it scores 1, and ends so that a reader knows that it has ended."""


TEXT_TASKS: dict[str, type[TextTask]] = {}
K = TypeVar("K", bound=type[TextTask])


def register_text_task(cls: K) -> K:
    """Class decorator: make a TextTask known under its `name`."""
    TEXT_TASKS[cls.name] = cls
    return cls
