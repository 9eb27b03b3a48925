"""What a synthetic task is: data from a seed, an exact solver that proves it answerable, a score. And the registry of tasks.

Axis legend: n examples, T time, C vocabulary.
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

IGNORE = -100


class Batch(NamedTuple):
    """Examples of one task.

    inputs: int64 [n, T].
    labels: int64 [n, T]; labels[:, t] is the token to predict after reading inputs[:, : t + 1], IGNORE (-100) where nothing is
        asked.
    tags: one dict per example, what is known of it (which variant, how many pairs, where the answer stands).
    """

    inputs: Tensor
    labels: Tensor
    tags: list[dict[str, Any]]


class Task(abc.ABC):
    """A task; concrete ones are frozen dataclasses whose fields are the options (`recollect compare` sets them by name).

    Attributes:
        name: what users type.
        vocab_size: number of symbols C.
        length: tokens T of an example.
        chance: share of the examples that a uniform guess among the plausible answers gets right.
    """

    name: ClassVar[str]
    vocab_size: int
    length: int
    chance: float

    @abc.abstractmethod
    def sample(self, n: int, *, seed: int) -> Batch:
        """n examples, a pure function of (self, n, seed)."""

    @abc.abstractmethod
    def solve(self, inputs: Tensor) -> Tensor:
        """The labels [n, T] computed from inputs [n, T] by rule: what a perfect model would say. Reads nothing but `inputs`."""

    @abc.abstractmethod
    def text(self, tokens: Tensor) -> str:
        """A readable form of one example's tokens [T], for reports."""

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Per-example score in [0, 1]: predictions int64 [n, T], labels [n, T] -> float64 [n]. Default: every label right."""
        asked = labels != IGNORE
        return ((predictions == labels) | ~asked).all(dim=1).to(torch.float64)


def stream_seed(kind: str, *parts: int) -> int:
    """A seed for a stream of data: `stream_seed("train", run_seed, step)` and `stream_seed("test", i)` never coincide.

    Training seeds are even and test seeds odd, so the two sets are disjoint by construction.
    """
    if kind not in ("train", "test"):
        raise ValueError(f"kind is 'train' or 'test'; got {kind!r}")
    word = int(np.random.SeedSequence([0 if kind == "train" else 1, *parts]).generate_state(1, np.uint64)[0]) >> 2
    return word * 2 + (kind == "test")


TASKS: dict[str, type[Task]] = {}
K = TypeVar("K", bound=type[Task])


def register_task(cls: K) -> K:
    """Class decorator: make a Task known under its `name`."""
    TASKS[cls.name] = cls
    return cls


def build_task(name: str, **options: Any) -> Task:
    """Build a registered task with options (fields of its dataclass).

    Raises:
        ValueError: unknown task or option (the nearest is named), or a value the task refuses.
    """
    import dataclasses

    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown task {name!r}{hint} Known tasks: {', '.join(sorted(TASKS))}")
    make: Callable[..., Task] = TASKS[name]
    known = [f.name for f in dataclasses.fields(TASKS[name]) if f.init]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"task {name!r} has no option {option!r}{hint} Its options: {', '.join(known)}")
    return make(**options)
