"""What the mixers are compared on: a synthetic task or a stream of text, behind one face.

Axis legend: n examples, T time.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from recollect.comparison.options import check_types
from recollect.comparison.written import make_written
from recollect.data import TextWindows, load_tokenizer
from recollect.data.tokenizer import tokenizer_file
from recollect.evaluation.metrics import Score, share_right
from recollect.tasks import TASKS, TEXT_TASKS, Batch, Task, build_task, stream_seed


@dataclasses.dataclass(frozen=True)
class _TextOptions:
    """Options of the task "text": tokens of an example, share of the text held out."""

    seq_len: int
    holdout: float


TEXT_OPTIONS = tuple(field.name for field in dataclasses.fields(_TextOptions))


class Workload(Protocol):
    """Data and how it is scored.

    Attributes:
        metric: "error" or "bits_per_byte".
        chance: share right of a guess, None where that has no meaning.
        vocab_size: symbols.
        length: tokens T of an example.
        fingerprint: identifies the data (empty for a task: its options say it all).
    """

    metric: str
    chance: float | None
    vocab_size: int
    length: int
    fingerprint: str

    def train_batch(self, n: int, *, run_seed: int, step: int) -> Batch:
        """Training data of one step: the same for every mixer."""

    def held_out(self, n: int, *, batch_size: int) -> Iterator[Batch]:
        """n held-out examples (fewer if there are no more), the same ones for every mixer and seed."""

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Per-example score [n] in [0, 1]."""

    def n_bytes(self, labels: Tensor) -> int:
        """Bytes of text that the asked ones of labels [n, T] stand for; 0 if they are no text."""

    def result(self, score: Score) -> float:
        """The number that `metric` names."""

    def text(self, tokens: Tensor) -> str:
        """Readable form of tokens [T]."""

    def tokenizer_file(self, folder: Path) -> Path | None:
        """The file of the tokenizer that goes with a model, written into a folder if it is nowhere yet; None for bytes, symbols."""


class TaskWorkload:
    """A registered synthetic task: endless training data, a fixed held-out set that no training seed can produce."""

    metric = "error"
    fingerprint = ""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.chance: float | None = task.chance
        self.vocab_size = task.vocab_size
        self.length = task.length

    def train_batch(self, n: int, *, run_seed: int, step: int) -> Batch:
        return self.task.sample(n, seed=stream_seed("train", run_seed, step))

    def held_out(self, n: int, *, batch_size: int) -> Iterator[Batch]:
        for index in itertools.count():
            size = min(batch_size, n - index * batch_size)
            if size <= 0:
                return
            # Always drawn in full and then cut, so that the first examples do not depend on n.
            batch = self.task.sample(batch_size, seed=stream_seed("test", index))
            yield Batch(batch.inputs[:size], batch.labels[:size], batch.tags[:size])

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return self.task.correct(predictions, labels)

    def n_bytes(self, labels: Tensor) -> int:
        return 0

    def result(self, score: Score) -> float:
        return score.error

    def text(self, tokens: Tensor) -> str:
        return self.task.text(tokens)

    def tokenizer_file(self, folder: Path) -> Path | None:
        return None


class TextWorkload:
    """Running text: windows of the training part against the held-out part, in bits per byte."""

    metric = "bits_per_byte"
    chance: float | None = None

    def __init__(self, data: TextWindows, tokenizer_file: Path | None = None) -> None:
        self.data, self._tokenizer_file = data, tokenizer_file
        self.vocab_size = data.tokenizer.vocab_size
        self.length = data.length
        self.fingerprint = data.fingerprint

    def train_batch(self, n: int, *, run_seed: int, step: int) -> Batch:
        return self.data.train_batch(n, seed=stream_seed("train", run_seed, step))

    def held_out(self, n: int, *, batch_size: int) -> Iterator[Batch]:
        return self.data.evaluation_batches(batch_size, n_windows=n)

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return share_right(predictions, labels)

    def n_bytes(self, labels: Tensor) -> int:
        return self.data.n_bytes(labels)

    def result(self, score: Score) -> float:
        return score.bits_per_byte

    def text(self, tokens: Tensor) -> str:
        return self.data.text(tokens)

    def tokenizer_file(self, folder: Path) -> Path | None:
        return self._tokenizer_file


def make_workload(task: str, task_options: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> Workload:
    """The workload of a plan.

    Args:
        task: "text", a registered task, or a registered task in text.
        task_options: fields of the task, or options of the text stream.
        data: for text: {"paths": [...], "evaluation_paths": [...], "tokenizer": "bytes" or its file}.
    Raises:
        ValueError, OSError: unknown task or option, unreadable or unsuitable data.
    """
    if task in TEXT_TASKS:
        return make_written(task, task_options)
    if task != "text":
        if task not in TASKS:
            known = sorted([*TASKS, *TEXT_TASKS, "text"])
            near = difflib.get_close_matches(task, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown task {task!r}{hint} Known tasks: {', '.join(known)}")
        check_types(TASKS[task], task_options, of=f"task {task!r}")
        return TaskWorkload(build_task(task, **task_options))
    for option in task_options:
        if option not in TEXT_OPTIONS:
            near = difflib.get_close_matches(option, TEXT_OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"task 'text' has no option {option!r}{hint} Its options: {', '.join(TEXT_OPTIONS)}")
    check_types(_TextOptions, task_options, of="task 'text'")
    data = data or {}
    tokenizer = data.get("tokenizer", "bytes")
    windows = TextWindows(
        data.get("paths", ()),
        evaluation_paths=data.get("evaluation_paths") or None,
        tokenizer=load_tokenizer(tokenizer),
        **task_options,
    )
    return TextWorkload(windows, tokenizer_file(tokenizer))
