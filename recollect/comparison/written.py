"""Tasks in text as data for small models: what is read is given, what is to be written is asked, token by token.

Axis legend: n examples, T time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.comparison.options import check_types
from recollect.data.tokenizer import START, ByteTokenizer, FileTokenizer, learn_tokenizer, write_tokenizer
from recollect.evaluation.metrics import Score
from recollect.tasks import IGNORE, Batch, stream_seed
from recollect.tasks.text import TEXT_TASKS, Question, TextTask

LEARN = ("answers", "everything")
PROBE = 256  # questions whose longest is taken for the length, where the task has none of its own
FITTING = 16  # of so many texts at least one is as short as the shortest
TEXTS, BYTES_PER_TOKEN = 1000, 6  # from which a vocabulary is learned: so many, with so much room


@dataclasses.dataclass(frozen=True)
class WrittenOptions:
    """Options of a task in text besides its own fields.

    Attributes:
        shortest: training texts have lengths from this to the task's `length`, drawn anew at every step: a model that has learned
            short texts has something to go on with; 0: all have the full length. Where texts have no length but their own, it matters
            with `grow` alone.
        grow: steps over which the longest length of a training text grows from `shortest` to the full one; 0: no growth.
        learn: "answers": only what is to be written is learned; "everything": the prompts too, as a language model would.
        vocab_size: tokens, at most, of a byte-level BPE learned from texts of the task's own, in which a word is about one token;
            lengths are counted in them; 0: bytes.
    """

    shortest: int = 0
    grow: int = 0
    learn: str = "answers"
    vocab_size: int = 0


OPTIONS = {field.name: field for field in dataclasses.fields(WrittenOptions)}


class WrittenWorkload:
    """A `TextTask` in tokens. An example is right if every token of its target is the likeliest one: greedy decoding would write it."""

    metric = "error"

    def __init__(self, task: TextTask, options: WrittenOptions) -> None:
        """
        Raises:
            ValueError: an unknown way to learn, a shortest length that the task does not have or cannot have, growth from nowhere, or a
                vocabulary smaller than the bytes.
        """
        if options.learn not in LEARN:
            raise ValueError(f"learn is {' or '.join(LEARN)}; got {options.learn!r}")
        own = int(getattr(task, "length", 0))
        if options.grow < 0 or (options.grow and not options.shortest):
            raise ValueError(f"grow is a number of steps, and needs shortest, the length to grow from; got {options.grow}")
        self.task, self.options = task, options
        self.tokenizer = _learned(task, options.vocab_size) if options.vocab_size else ByteTokenizer()
        self.fingerprint = self.tokenizer.fingerprint if options.vocab_size else ""
        self.vocab_size = self.tokenizer.vocab_size
        self.chance: float | None = task.chance
        probe = [] if own else [len(row) for row in self._tokens(task.sample(PROBE, seed=1, measure=self._measure))]
        self.length, self._has_length = own or max(probe), bool(own)
        shortest = options.shortest
        if shortest and not 0 < shortest <= self.length:
            raise ValueError(f"shortest is 1 to the task's length of {self.length}, or 0; got {shortest}")
        if shortest and own:
            self._of_length(shortest).sample(PROBE, seed=0, measure=self._measure)  # refuses what prompts do not fit
        elif shortest and sum(size <= shortest for size in probe) < PROBE / FITTING:
            raise ValueError(
                f"of {PROBE} texts fewer than one in {FITTING} have at most shortest={shortest} tokens; their median is "
                f"{sorted(probe)[PROBE // 2]}"
            )

    def train_batch(self, n: int, *, run_seed: int, step: int) -> Batch:
        seed, shortest = stream_seed("train", run_seed, step), self.options.shortest
        if not shortest:
            return self._batch(self.task.sample(n, seed=seed, measure=self._measure), learn=self.options.learn)
        grown = min(1.0, (step + 1) / self.options.grow) if self.options.grow else 1.0
        longest = shortest + round(grown * (self.length - shortest))
        if self._has_length:
            length = int(np.random.default_rng(seed).integers(shortest, longest + 1))
            questions = self._of_length(length).sample(n, seed=seed, measure=self._measure)
        else:
            questions = self._no_longer_than(longest, n, run_seed=run_seed, step=step)
        return self._batch(questions, learn=self.options.learn)

    def held_out(self, n: int, *, batch_size: int) -> Iterator[Batch]:
        for index in itertools.count():
            size = min(batch_size, n - index * batch_size)
            if size <= 0:
                return
            # Always drawn in full and then cut, so that the first examples do not depend on n.
            questions = self.task.sample(batch_size, seed=stream_seed("test", index), measure=self._measure)
            yield self._batch(questions[:size], learn="answers")

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        asked = labels != IGNORE
        return ((predictions == labels) | ~asked).all(dim=1).to(torch.float64)

    def n_bytes(self, labels: Tensor) -> int:
        return 0

    def result(self, score: Score) -> float:
        return score.error

    def text(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens)

    def tokenizer_file(self, folder: Path) -> Path | None:
        """The vocabulary, written into a folder; None for bytes."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return None
        file = folder / "tokenizer.json"
        write_tokenizer(self.tokenizer.description, file)
        return file

    def _of_length(self, length: int) -> TextTask:
        return dataclasses.replace(self.task, length=length)  # type: ignore[type-var]  # text tasks are dataclasses

    def _no_longer_than(self, longest: int, n: int, *, run_seed: int, step: int) -> list[Question]:
        """n questions of a task whose texts have no length but their own."""
        found: list[Question] = []
        for draw in itertools.count():
            questions = self.task.sample(n, seed=stream_seed("train", run_seed, step, draw), measure=self._measure)
            sizes = [len(row) for row in self._tokens(questions)]
            found += [question for question, size in zip(questions, sizes, strict=True) if size <= longest]
            if len(found) >= n:
                break
        return found[:n]

    def _measure(self, text: str) -> int:
        """Tokens of a text, its start included."""
        return len(self.tokenizer.encode_batch([text])[0]) + 1

    def _tokens(self, questions: Sequence[Question]) -> list[np.ndarray[Any, Any]]:
        """Start, prompt and target of each question [T]."""
        texts = self.tokenizer.encode_batch([question.prompt + self.task.target(question) for question in questions])
        return [np.concatenate([[self.tokenizer.start], text.astype(np.int64)]) for text in texts]

    def _batch(self, questions: Sequence[Question], *, learn: str) -> Batch:
        rows, prompts = self._tokens(questions), self.tokenizer.encode_batch([question.prompt for question in questions])
        longest = max(len(row) for row in rows) - 1
        inputs = torch.full((len(rows), longest), self.tokenizer.start)
        labels = torch.full((len(rows), longest), IGNORE)
        for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            tokens = torch.from_numpy(row)
            first = _common(row[1:], prompt) if learn == "answers" else 0
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


def _learned(task: TextTask, vocab_size: int) -> FileTokenizer:
    """A BPE of examples that no run trains on and none is tested on."""
    if length := int(getattr(task, "length", 0)):
        task = dataclasses.replace(task, length=BYTES_PER_TOKEN * length)  # type: ignore[type-var]  # text tasks are dataclasses
    questions = task.sample(TEXTS, seed=stream_seed("train", 0, 0, 0, 0))
    texts = (question.prompt + task.target(question) for question in questions)
    return FileTokenizer(learn_tokenizer(texts, vocab_size=vocab_size), start=START, where="vocab_size")


def _common(row: np.ndarray[Any, Any], prompt: np.ndarray[Any, Any]) -> int:
    """Leading tokens that a text and its prompt share: a token across the border belongs to what is asked."""
    n = min(len(row), len(prompt))
    differs = np.flatnonzero(row[:n] != prompt[:n])
    return int(differs[0]) if len(differs) else n
