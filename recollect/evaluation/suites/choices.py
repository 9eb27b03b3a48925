"""Suites of questions with given answers, from local files: commonsense multiple choice and LAMBADA."""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from recollect.data.files import find_files
from recollect.evaluation.choices import DATASETS, few_shot, pick, to_choices
from recollect.evaluation.lambada import last_word
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.suites.base import Item, Metric, Result, Suite, digests, per_token, register_suite, share
from recollect.tasks.files import numbered_lines

SUFFIXES = (".jsonl",)


class Local(Suite):
    """Questions that are rows of files, and the same for every model."""

    @abc.abstractmethod
    def read(self) -> list[Item]:
        """One per row.

        Raises:
            ValueError: a missing or malformed file.
        """

    def items(self, model: LanguageModel) -> list[Item]:
        return self.read()


@register_suite
@dataclass(frozen=True, kw_only=True)
class Commonsense(Local):
    """Multiple choice: the option whose text the model finds likeliest (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA,
    MMLU).

    Attributes:
        data: JSON-lines files with the questions, folders of them or globs.
        dataset: which data set they are, of `recollect.evaluation.choices.DATASETS`; default: what each file's name begins with.
        convention: "harness" (lm-evaluation-harness), "oe_eval" or "oe_eval_letters" (OLMo).
        shots: solved examples before every question, the first rows of the file, which are then not asked; of MMLU with a file per
            subject.
    """

    name: ClassVar[str] = "commonsense"
    metrics: ClassVar[tuple[Metric, ...]] = (share("accuracy", "acc"), share("normalised", "acc_norm"))
    dimensions: ClassVar[tuple[str, ...]] = ("dataset",)
    average: ClassVar[str] = "dataset"  # as in the papers' tables: HellaSwag asks 20 times as much as OpenBookQA
    data: tuple[str, ...]
    dataset: str | None = None
    convention: str = "harness"
    shots: int = 0

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots is 0 or more; got {self.shots}")

    def read(self) -> list[Item]:
        """One per question: a `Choice`."""
        found = []
        for path in self._paths():
            dataset = self.dataset or _dataset_of(path)
            rows = read_rows(path)
            try:
                examples = few_shot(to_choices(rows[: self.shots], dataset, convention=self.convention))
                choices = to_choices(rows[self.shots :], dataset, convention=self.convention, shots=examples)
                subjects = sorted({choice.tags["subject"] for choice in choices if "subject" in choice.tags})
                if self.shots and len(subjects) > 1:
                    raise ValueError(
                        f"solved examples are of the question's subject, and here are {', '.join(subjects[:3])}: give a file for each"
                    )
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            found += [Item(f"{path}:{i}", (dataset, choice)) for i, choice in enumerate(choices)]
        return found

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
        found = iter(model.log_likelihoods([pair for item in items for pair in item.ask[1].pairs]))
        results = []
        for item in items:
            dataset, choice = item.ask
            log_probs = [next(found).log_prob for _ in choice.pairs]
            best = max(range(len(log_probs)), key=log_probs.__getitem__)
            shown = {
                "question": choice.contexts[choice.gold],
                "said": choice.continuations[best],
                "right": choice.continuations[choice.gold],
            }
            picked = pick(choice, log_probs)
            guess = dict.fromkeys(picked._fields, 1 / len(log_probs))
            results.append([Result({"dataset": dataset}, dict(picked._asdict()), shown, guess)])
        return results

    def fingerprint(self) -> dict[str, Any]:
        return asdict(self) | {"data": digests(self._paths())}

    def _paths(self) -> list[Path]:
        """Folders whose names begin with _ hold something else."""
        return [path for path in find_files(self.data, suffixes=SUFFIXES) if not path.parent.name.startswith("_")]


@register_suite
@dataclass(frozen=True, kw_only=True)
class Lambada(Local):
    """LAMBADA: the last word of a passage. A guess is one of the different words before it, as in the paper.

    Attributes:
        data: JSON-lines files of {"text"}, folders of them or globs; the file's name tells the standard set from the OpenAI one.
    """

    name: ClassVar[str] = "lambada"
    metrics: ClassVar[tuple[Metric, ...]] = (share("accuracy", "greedy"), per_token("perplexity", math.exp))
    dimensions: ClassVar[tuple[str, ...]] = ("file",)
    data: tuple[str, ...]

    def read(self) -> list[Item]:
        """One per passage: (file, context, continuation)."""
        found = []
        for path in find_files(self.data, suffixes=SUFFIXES):
            for i, row in enumerate(read_rows(path)):
                try:
                    found.append(Item(f"{path}:{i}", (path.stem, *last_word(row))))
                except ValueError as error:
                    raise ValueError(f"{path}, line {i + 1}: {error}") from error
        return found

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
        found = model.log_likelihoods([(item.ask[1], item.ask[2]) for item in items])
        results = []
        for item, each in zip(items, found, strict=True):
            file, passage, right = item.ask
            # The perplexity is of words: a word counts once, however many tokens it has.
            values = {"greedy": float(each.greedy), "log_prob": each.log_prob, "n_tokens": 1.0}
            words = set(passage.split())
            guess = {"greedy": (right.strip() in words) / max(1, len(words))}
            results.append([Result({"file": file}, values, {"passage": passage, "right": right}, guess)])
        return results

    def fingerprint(self) -> dict[str, Any]:
        return {"data": digests(find_files(self.data, suffixes=SUFFIXES))}


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        ValueError: no such file, or a line that is no JSON object (with its number).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    rows: list[Mapping[str, Any]] = []
    for number, line in numbered_lines(text):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _dataset_of(path: Path) -> str:
    known = {"siqa": "social_iqa", "socialiqa": "social_iqa", **{name: name for name in DATASETS}}
    for name in sorted(known, key=len, reverse=True):
        if path.name.startswith(name):
            return known[name]
    raise ValueError(f"which data set is {path}? Name it: --option dataset=... ({', '.join(DATASETS)})")
