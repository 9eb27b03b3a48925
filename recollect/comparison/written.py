"""Tasks in text as data for byte-level models: what is read is given, what is to be written is asked, byte by byte.

Axis legend: n examples, T time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.comparison.options import check_types
from recollect.data.text import DOCUMENT_START, VOCAB_SIZE, decode
from recollect.evaluation.metrics import Score
from recollect.tasks import IGNORE, Batch, stream_seed
from recollect.tasks.text import TEXT_TASKS, Question, TextTask, n_bytes

LEARN = ("answers", "everything")
PROBE = 256  # questions whose longest is taken for the length, where the task has none of its own


@dataclasses.dataclass(frozen=True)
class WrittenOptions:
    """Options of a task in text besides its own fields.

    Attributes:
        shortest: training texts have lengths from this to the task's `length`, drawn anew at every step: a model that has learned
            short texts has something to go on with; 0: all have the full length.
        learn: "answers": only what is to be written is learned; "everything": the prompts too, as a language model would.
    """

    shortest: int = 0
    learn: str = "answers"


OPTIONS = {field.name: field for field in dataclasses.fields(WrittenOptions)}


class WrittenWorkload:
    """A `TextTask` in bytes. An example is right if every byte of its target is the likeliest one: greedy decoding would write it."""

    metric = "error"
    fingerprint = ""
    vocab_size = VOCAB_SIZE

    def __init__(self, task: TextTask, options: WrittenOptions) -> None:
        """
        Raises:
            ValueError: an unknown way to learn, or a shortest length that the task does not have or cannot have.
        """
        if options.learn not in LEARN:
            raise ValueError(f"learn is {' or '.join(LEARN)}; got {options.learn!r}")
        own = int(getattr(task, "length", 0))
        if options.shortest and not 0 < options.shortest <= own:
            raise ValueError(f"shortest is 1 to the task's length of {own}, or 0; got {options.shortest}")
        self.task, self.options = task, options
        if options.shortest:
            self._of_length(options.shortest).sample(1, seed=0, measure=_measure)  # refuses lengths that no prompt fits
        self.chance: float | None = task.chance
        self.length = own or max(len(_bytes(task, question)) for question in task.sample(PROBE, seed=1))

    def train_batch(self, n: int, *, run_seed: int, step: int) -> Batch:
        seed = stream_seed("train", run_seed, step)
        task = self.task
        if self.options.shortest:
            length = int(np.random.default_rng(seed).integers(self.options.shortest, self.length + 1))
            task = self._of_length(length)
        return self._batch(task, task.sample(n, seed=seed, measure=_measure), learn=self.options.learn)

    def held_out(self, n: int, *, batch_size: int) -> Iterator[Batch]:
        for index in itertools.count():
            size = min(batch_size, n - index * batch_size)
            if size <= 0:
                return
            # Always drawn in full and then cut, so that the first examples do not depend on n.
            questions = self.task.sample(batch_size, seed=stream_seed("test", index), measure=_measure)
            yield self._batch(self.task, questions[:size], learn="answers")

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        asked = labels != IGNORE
        return ((predictions == labels) | ~asked).all(dim=1).to(torch.float64)

    def n_bytes(self, labels: Tensor) -> int:
        return 0

    def result(self, score: Score) -> float:
        return score.error

    def text(self, tokens: Tensor) -> str:
        return decode(tokens)

    def _of_length(self, length: int) -> TextTask:
        return dataclasses.replace(self.task, length=length)  # type: ignore[type-var]  # text tasks are dataclasses

    @staticmethod
    def _batch(task: TextTask, questions: Sequence[Question], *, learn: str) -> Batch:
        rows = [_bytes(task, question) for question in questions]
        longest = max(len(row) for row in rows) - 1
        inputs = torch.full((len(rows), longest), DOCUMENT_START)
        labels = torch.full((len(rows), longest), IGNORE)
        for b, (row, question) in enumerate(zip(rows, questions, strict=True)):
            tokens = torch.from_numpy(row.astype(np.int64))
            first = n_bytes(question.prompt) if learn == "answers" else 0
            inputs[b, : len(row) - 1] = tokens[:-1]  # padding on the right: nothing before it sees it
            labels[b, first : len(row) - 1] = tokens[first + 1 :]
        return Batch(inputs, labels, [dict(question.tags) for question in questions])


def make_written(name: str, options: Mapping[str, Any]) -> WrittenWorkload:
    """The workload of a registered `TextTask`.

    Raises:
        ValueError: an unknown option, or a value that the task refuses.
    """
    cls = TEXT_TASKS[name]
    known = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for option in options:
        if option not in known | OPTIONS.keys():
            raise ValueError(
                f"task {name!r} has no option {option!r}. Its options: {', '.join(sorted(known | OPTIONS.keys()))}"
            )
    own = {key: value for key, value in options.items() if key not in OPTIONS}
    rest = {key: value for key, value in options.items() if key in OPTIONS}
    check_types(cls, own, of=f"task {name!r}")
    check_types(WrittenOptions, rest, of=f"task {name!r}")
    return WrittenWorkload(cls(**own), WrittenOptions(**rest))


def _bytes(task: TextTask, question: Question) -> np.ndarray[Any, Any]:
    """Document start, prompt and target [T]."""
    text = (question.prompt + task.target(question)).encode()
    return np.concatenate([[DOCUMENT_START], np.frombuffer(text, np.uint8)])


def _measure(text: str) -> int:
    return n_bytes(text) + 1
