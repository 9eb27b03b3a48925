"""Suites of tasks in symbols, for models that were trained on them: recall over length and pairs against state size, find-block."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch

from recollect.evaluation.language_model import LanguageModel, check_finite
from recollect.evaluation.metrics import spread
from recollect.evaluation.suites.base import Item, Metric, Result, Suite, register_suite, share, slices
from recollect.models.memory import state_bytes
from recollect.tasks import FindBlock, Recall, Task, stream_seed
from recollect.training.loss import labelled_logits

SLICES = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64))


class Symbols(Suite):
    """Held-out examples of tasks in symbols, scored as `recollect compare` does: the task's own metric on teacher-forced argmax."""

    metrics: ClassVar[tuple[Metric, ...]] = (share("accuracy", "score"),)
    n: int

    @abc.abstractmethod
    def tasks(self, model: LanguageModel) -> Iterator[tuple[dict[str, Any], Task]]:
        """(group, task) of every setting."""

    def items(self, model: LanguageModel) -> list[Item]:
        """One per example: (group, task, inputs [T], labels [T])."""
        found = []
        for group, task in self.tasks(model):
            n_symbols = model.model.config.vocab_size
            if n_symbols != task.vocab_size:
                raise ValueError(
                    f"the model has {n_symbols} symbols, {task.name} {task.vocab_size}: ask a model of `recollect compare {task.name}`"
                )
            batch = task.sample(self.n, seed=stream_seed("test", 0))
            name = ",".join(f"{key}={value}" for key, value in group.items())
            held = {**group, "state_bytes": state_bytes(model.model, batch.inputs[:1]) or "unknown"}
            found += [Item(f"{name}:{i}", (held, task, batch.inputs[i], batch.labels[i])) for i in range(self.n)]
        return found

    @torch.no_grad()
    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
        results = []
        for task, alike in groupby(items, lambda item: item.ask[1]):
            for some in slices(list(alike), max(1, model.batch_tokens // task.length)):
                results += _scored(model, task, some)
        return results


@register_suite
@dataclass(frozen=True, kw_only=True)
class RecallSuite(Symbols):
    """Multi-query associative recall: accuracy over length and pairs, beside the bytes of the state that they must fit into.

    Attributes:
        slices: lengths and pairs, as 64x4; default: those of 64x4, 64x8, 64x16, 128x32 and 256x64 that the model has symbols for.
        variant: "plain", "forgetting" or "compositional".
        n: examples per slice.
    """

    name: ClassVar[str] = "recall"
    dimensions: ClassVar[tuple[str, ...]] = ("length", "pairs", "state_bytes")
    measured: ClassVar[tuple[str, ...]] = ("state_bytes",)
    slices: tuple[str, ...] = ()
    variant: str = "plain"
    n: int = 200

    def tasks(self, model: LanguageModel) -> Iterator[tuple[dict[str, Any], Task]]:
        vocab_size = model.model.config.vocab_size
        held = [f"{length}x{pairs}" for length, pairs in SLICES if pairs < vocab_size // 2]  # half of the symbols are keys
        for each in self.slices or held:
            length, cross, pairs = each.partition("x")
            if not (cross and length.isdigit() and pairs.isdigit()):
                raise ValueError(f"a slice is LENGTHxPAIRS, as 64x4; got {each!r}")
            task = Recall(length=int(length), n_pairs=int(pairs), variant=self.variant, vocab_size=vocab_size)
            yield {"length": int(length), "pairs": int(pairs)}, task


@register_suite
@dataclass(frozen=True, kw_only=True)
class FindBlockSuite(Symbols):
    """Find the block that holds the question's letters, over the number of blocks.

    Attributes:
        blocks: numbers of blocks.
        letters, question, say (its `answer`): see `recollect.tasks.FindBlock`; as the model was trained.
        n: examples per number.
    """

    name: ClassVar[str] = "find-block"
    dimensions: ClassVar[tuple[str, ...]] = ("blocks", "state_bytes")
    measured: ClassVar[tuple[str, ...]] = ("state_bytes",)
    blocks: tuple[int, ...] = (4, 6, 8, 12)
    letters: int = 5
    question: int = 2
    say: str = "all"
    n: int = 200

    def tasks(self, model: LanguageModel) -> Iterator[tuple[dict[str, Any], Task]]:
        for n_blocks in self.blocks:
            task = FindBlock(n_blocks=n_blocks, n_letters=self.letters, n_question=self.question, answer=self.say)
            yield {"blocks": n_blocks}, task


def _scored(model: LanguageModel, task: Task, items: Sequence[Item]) -> list[list[Result]]:
    """The results of examples of one task."""
    inputs, labels = (torch.stack([item.ask[i] for item in items]) for i in (2, 3))
    logits, _ = labelled_logits(model.model, inputs, labels)
    check_finite(torch.isfinite(logits))
    said = spread(logits.argmax(-1).cpu(), labels)
    results = []
    for item, score, *row in zip(items, task.correct(said, labels).tolist(), inputs, said, labels, strict=True):
        shown = dict(zip(("prompt", "said", "right"), map(task.text, row), strict=True))
        results.append([Result(item.ask[0], {"score": score}, shown, {"score": task.chance})])
    return results
