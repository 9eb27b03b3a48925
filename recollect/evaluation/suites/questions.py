"""Suites of generated questions with written answers: needles, RULER, BabiLong, CLUTRR, and any `TextTask`."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.suites.base import Item, Metric, Result, Suite, digests, register_suite, share
from recollect.tasks.babilong import BabiLong
from recollect.tasks.kinship import Kinship
from recollect.tasks.needle import RULER, Needles, Ruler
from recollect.tasks.text import Measure, Question, TextTask

SHOWN = 2000  # characters of a prompt that are kept at either end


class Questions(Suite):
    """Prompts of seeded tasks, answers decoded greedily, the task's own metric.

    A subclass says which tasks are asked (`tasks`) and under which dimensions.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (share("score"),)
    n: int
    seed: int

    @abc.abstractmethod
    def tasks(self) -> Iterator[tuple[dict[str, Any], TextTask]]:
        """(group, task) of every setting; `n` questions of each are asked.

        Raises:
            ValueError: an option that a task refuses.
        """

    def group(self, question: Question) -> dict[str, Any]:
        """Dimensions that only the question knows, such as its depth."""
        return {}

    def measure(self, model: LanguageModel) -> Measure:
        """What a length is: tokens of the prompt, with those that a tokenizer puts before it."""
        return model.n_tokens

    def items(self, model: LanguageModel) -> list[Item]:
        """One per question: (group, task, question). Lengths are measured in the model's own tokens.

        Raises:
            ValueError: a question that is longer than the model's context, or an option that a task refuses.
        """
        found = []
        for group, task in self.tasks():
            _check_fits(model, getattr(task, "length", 0), f"length {getattr(task, 'length', 0)}")
            name = ",".join(f"{key}={value}" for key, value in group.items())
            for i, question in enumerate(task.sample(self.n, seed=self.seed, measure=self.measure(model))):
                if model.max_length is not None:  # a prompt that lost its beginning would be scored as if it were whole
                    n_tokens = model.n_tokens(question.prompt) + task.answer_tokens
                    _check_fits(model, n_tokens, f"question {i} of {name}, {n_tokens} tokens with room for its answer,")
                found.append(Item(f"{name}:{i}", ({**group, **self.group(question)}, task, question)))
        return found

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
        said: dict[str, str] = {}
        for n_tokens in {item.ask[1].answer_tokens for item in items}:
            some = [item for item in items if item.ask[1].answer_tokens == n_tokens]
            said |= zip(
                (item.id for item in some), model.generate([item.ask[2].prompt for item in some], n_tokens), strict=True
            )
        asked = [(*item.ask, said[item.id]) for item in items]
        return [[_result(group, task, question, answer)] for group, task, question, answer in asked]

    def fingerprint(self) -> dict[str, Any]:
        found: dict[str, Any] = asdict(self)  # type: ignore[call-overload]  # every suite is a dataclass
        for key, value in found.items():
            if isinstance(value, str) and Path(value).exists():
                found[key] = digests([value])
        return found


@register_suite
@dataclass(frozen=True, kw_only=True)
class RulerSuite(Questions):
    """RULER's needle tasks, by task and length.

    Attributes:
        only: names of `recollect.tasks.needle.RULER`.
        lengths: tokens of prompt and answer.
        n: questions per task and length (RULER: 500).
        seed: of the generator.
        text: file with the essay; default: sentences of a small grammar of our own.
        adjectives, nouns, templates: files; see `recollect.tasks.needle.Ruler`.
        answer_tokens: tokens that the model may write (RULER: 128).
    """

    name: ClassVar[str] = "ruler"
    dimensions: ClassVar[tuple[str, ...]] = ("task", "length")
    only: tuple[str, ...] = tuple(RULER)
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    n: int = 100
    seed: int = 42
    text: str | None = None
    adjectives: str | None = None
    nouns: str | None = None
    templates: str | None = None
    answer_tokens: int = 128

    def __post_init__(self) -> None:
        _check_n(self.n, self.lengths)
        for name in self.only:
            if name not in RULER:
                raise ValueError(f"RULER has no needle task {name!r}; it has {', '.join(RULER)}")

    def tasks(self) -> Iterator[tuple[dict[str, Any], TextTask]]:
        for name in self.only:
            for length in self.lengths:
                task = Ruler(
                    **RULER[name],
                    text=self.text if RULER[name]["haystack"] == "essay" else None,
                    adjectives=self.adjectives,
                    nouns=self.nouns,
                    templates=self.templates,
                    length=length,
                    answer_tokens=self.answer_tokens,
                )
                yield {"task": name, "length": length}, task


@register_suite
@dataclass(frozen=True, kw_only=True)
class NeedlesSuite(Questions):
    """Needles in a haystack as in the Multi-Token Attention paper: by their number, length of the text and depth.

    Attributes:
        needles: numbers of needles.
        lengths: tokens of prompt and answer.
        depths: percentages at which the needle that is asked for stands.
        n: questions per number, length and depth.
        seed: of the generator.
        placing, digits, text, cities, templates: see `recollect.tasks.needle.Needles`.
    """

    name: ClassVar[str] = "needles"
    dimensions: ClassVar[tuple[str, ...]] = ("needles", "length", "depth")
    needles: tuple[int, ...] = (2, 4, 6)
    lengths: tuple[int, ...] = (2048, 4096)
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    n: int = 20
    seed: int = 0
    placing: str = "asked"
    digits: int = 1
    text: str | None = None
    cities: str | None = None
    templates: str | None = None

    def __post_init__(self) -> None:
        _check_n(self.n, self.lengths)

    def tasks(self) -> Iterator[tuple[dict[str, Any], TextTask]]:
        for n_needles in self.needles:
            for length in self.lengths:
                for depth in self.depths:
                    yield (
                        {"needles": n_needles, "length": length, "depth": depth},
                        Needles(
                            n_needles=n_needles,
                            length=length,
                            depths=(depth,),
                            placing=self.placing,
                            n_digits=self.digits,
                            text=self.text,
                            cities=self.cities,
                            templates=self.templates,
                        ),
                    )


@register_suite
@dataclass(frozen=True, kw_only=True)
class BabiLongSuite(Questions):
    """BabiLong: facts of a story between the sentences of a long text, by question type and length.

    Attributes:
        qa: question types, 1 to 5.
        lengths: tokens of the prompt; 0: the facts alone. The published 1024 has no room for QA3's prompt where a token is a byte.
        n: questions per type and length (the leaderboard: 100).
        seed: of the generator.
        facts: folder with bAbI's qa1_train.jsonl ...; default: stories of our own simulation.
        background: text file or folder of books; default: sentences of a small grammar.
        instruction, examples, answer_format: parts of the prompt.
        templates: file; see `recollect.tasks.babilong.BabiLong`.
    """

    name: ClassVar[str] = "babilong"
    dimensions: ClassVar[tuple[str, ...]] = ("qa", "length")
    qa: tuple[int, ...] = (1, 2, 3, 4, 5)
    lengths: tuple[int, ...] = (0, 2048, 4096)
    n: int = 100
    seed: int = 0
    facts: str | None = None
    background: str | None = None
    instruction: bool = True
    examples: bool = True
    answer_format: bool = True
    templates: str | None = None

    def __post_init__(self) -> None:
        _check_n(self.n, self.lengths, least=0)

    def measure(self, model: LanguageModel) -> Measure:
        """Tokens, none put before: sentence by sentence is measured."""
        return lambda text: len(model.encode(text))

    def tasks(self) -> Iterator[tuple[dict[str, Any], TextTask]]:
        for qa in self.qa:
            for length in self.lengths:
                yield (
                    {"qa": qa, "length": length},
                    BabiLong(
                        qa=qa,
                        length=length,
                        facts=None if self.facts is None else str(Path(self.facts) / f"qa{qa}_train.jsonl"),
                        background=self.background,
                        instruction=self.instruction,
                        examples=self.examples,
                        answer_format=self.answer_format,
                        templates=self.templates,
                    ),
                )


@register_suite
@dataclass(frozen=True, kw_only=True)
class ClutrrSuite(Questions):
    """CLUTRR: the relation of two people from a story about their family, by the number of relations to be composed.

    Attributes:
        k: numbers of relations, 2 to 10.
        n: questions per k.
        seed: of the generator.
        files: a CLUTRR file or a folder of them (JSON lines); default: stories of our own.
        noise, shuffle, instruction, templates: see `recollect.tasks.kinship.Kinship`.
    """

    name: ClassVar[str] = "clutrr"
    dimensions: ClassVar[tuple[str, ...]] = ("k",)
    k: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10)
    n: int = 100
    seed: int = 0
    files: str | None = None
    noise: str = "clean"
    shuffle: bool = True
    instruction: bool = True
    templates: str | None = None

    def __post_init__(self) -> None:
        _check_n(self.n, self.k, least=2)

    def tasks(self) -> Iterator[tuple[dict[str, Any], TextTask]]:
        for k in self.k:
            task = Kinship(
                k_min=k,
                k_max=k,
                files=self.files,
                noise=self.noise,
                shuffle=self.shuffle,
                instruction=self.instruction,
                templates=self.templates,
            )
            yield {"k": k}, task


def _result(group: dict[str, Any], task: TextTask, question: Question, said: str) -> Result:
    shown = {"prompt": _ends(question.prompt), "said": said, "right": " | ".join(question.answers)}
    return Result(group, {"score": task.score(said, question)}, shown, {"score": task.chance_at(question)})


def _check_fits(model: LanguageModel, n_tokens: int, what: str) -> None:
    if model.max_length is not None and n_tokens > model.max_length:
        raise ValueError(
            f"{what} is longer than the {model.max_length} tokens that the model may see; ask for shorter texts, "
            "or raise --context if the model was made for more"
        )


def _check_n(n: int, lengths: Sequence[int], *, least: int = 1) -> None:
    if n < 1 or not lengths or min(lengths) < least:
        raise ValueError(f"n is at least 1, and sizes are at least {least}; got n={n}, sizes {tuple(lengths)}")


def _ends(text: str) -> str:
    if len(text) <= 2 * SHOWN:
        return text
    return f"{text[:SHOWN]}\n[... {len(text) - 2 * SHOWN:,} characters ...]\n{text[-SHOWN:]}"
