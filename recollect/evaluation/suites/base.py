"""What a suite is: items that a model is asked, results that stand for themselves, metrics over them. And the registry of suites."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, get_type_hints

from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.statistics import Interval, wilson

Values = Mapping[str, float]


class Item(NamedTuple):
    """One thing to ask.

    id: unique in the suite; finished ones are not asked again.
    ask: what `Suite.answer` needs of it.
    """

    id: str
    ask: Any


class Result(NamedTuple):
    """One row of the table of results; an item may give several (a book gives one per stretch of positions).

    group: the dimensions that tables are made by, such as {"length": 2048, "depth": 25}.
    values: numbers that the metrics are computed from.
    shown: texts for whoever looks at the row: what was asked, said and right.
    guess: the values, as far as the headline metric needs them, that a uniform guess among the admissible answers is expected to
        have; None where nobody could list these.
    """

    group: dict[str, Any]
    values: dict[str, float]
    shown: dict[str, str]
    guess: dict[str, float] | None = None


class Metric(NamedTuple):
    """A number over several results.

    name: as in the table; unit: "%" prints a share as per cent, "" as it is.
    compute: values of the results -> number.
    interval: the same -> a confidence interval, or None where there is none to give.
    higher_is_better: the direction.
    """

    name: str
    unit: str
    compute: Callable[[Sequence[Values]], float]
    interval: Callable[[Sequence[Values]], Interval | None]
    higher_is_better: bool = True


def share(name: str, key: str = "score") -> Metric:
    """Mean of values[key] in [0, 1], in per cent, with its Wilson interval."""

    def mean(values: Sequence[Values]) -> float:
        return math.fsum(value[key] for value in values) / len(values)

    return Metric(name, "%", mean, lambda values: wilson(min(len(values), mean(values) * len(values)), len(values)))


def per_token(name: str, of: Callable[[float], float] = lambda nats: nats) -> Metric:
    """`of` the mean nats per token, of values log_prob and n_tokens: `math.exp` makes it the perplexity."""

    def compute(values: Sequence[Values]) -> float:
        n = sum(value["n_tokens"] for value in values)
        try:
            return of(-math.fsum(value["log_prob"] for value in values) / n) if n else math.nan
        except OverflowError:
            return math.inf

    return Metric(name, "", compute, lambda values: None, higher_is_better=False)


def per_byte(name: str = "bits/byte") -> Metric:
    """Bits per byte of text, of values log_prob and n_bytes."""

    def compute(values: Sequence[Values]) -> float:
        n = sum(value["n_bytes"] for value in values)
        return -math.fsum(value["log_prob"] for value in values) / n / math.log(2) if n else math.nan

    return Metric(name, "", compute, lambda values: None, higher_is_better=False)


class Suite(abc.ABC):
    """A set of questions with their metrics; concrete ones are frozen dataclasses whose fields are the options.

    Attributes:
        name: what users type.
        metrics: the first one is the headline.
        dimensions: keys of a result's group, in the order of the table's columns.
        along: the one that pictures are curves over, if there is one.
        measured: those of them that are measured on the model, and so shown even where all results have the same.
        average: the one over whose values a total is the mean, each counting alike; "": a total pools its results.
        at_once: items of a batch, unless `batches` has its own rule.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    dimensions: ClassVar[tuple[str, ...]]
    along: ClassVar[str] = ""
    measured: ClassVar[tuple[str, ...]] = ()
    average: ClassVar[str] = ""
    at_once: ClassVar[int] = 32

    @abc.abstractmethod
    def items(self, model: LanguageModel) -> list[Item]:
        """What to ask, in a fixed order: a pure function of the suite, its files and the model's tokenizer.

        Raises:
            ValueError: a missing or malformed file, or an option that this model cannot satisfy.
        """

    @abc.abstractmethod
    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
        """The results of each item: a pure function of model and items, whatever items are asked together."""

    def batches(self, model: LanguageModel, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Items, in their order, in batches that are answered together and then written."""
        return slices(items, self.at_once)

    def fingerprint(self) -> dict[str, Any]:
        """What the results depend on besides the model: the options. Suites that read files add what is in them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def slices(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive ones, `size` together."""
    return (items[first : first + size] for first in range(0, len(items), size))


def digests(paths: Iterable[str | Path]) -> list[list[str]]:
    """[path, start of the sha256 of what is in it] of files that a suite reads, in folders all of them: for its fingerprint.

    Raises:
        ValueError: a file cannot be read.
    """
    found = []
    within = [sorted(Path(path).rglob("*")) if Path(path).is_dir() else [path] for path in paths]
    for path in (file for files in within for file in files if not Path(file).is_dir()):
        try:
            found.append([str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]])
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return found


SUITES: dict[str, type[Suite]] = {}
K = TypeVar("K", bound=type[Suite])


def register_suite(cls: K) -> K:
    """Class decorator: make a Suite known under its `name`."""
    SUITES[cls.name] = cls
    return cls


REQUIRED = dataclasses.MISSING


def options_of(suite: type[Suite]) -> dict[str, Any]:
    """Options of a suite and their defaults; REQUIRED where there is none."""
    return {field.name: field.default for field in dataclasses.fields(suite) if field.init}  # type: ignore[arg-type]


def build_suite(name: str, **options: Any) -> Suite:
    """A registered suite with options (fields of its dataclass).

    Raises:
        ValueError: unknown suite or option (the nearest is named), an option that is missing, or a value that the suite refuses.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{_hint(name, SUITES)} Known suites: {', '.join(sorted([*SUITES, 'harness']))}")
    known = options_of(SUITES[name])
    for option in options:
        if option not in known:
            raise ValueError(f"suite {name!r} has no option {option!r}{_hint(option, known)} Its options: {', '.join(known)}")
    for key, value in known.items():
        if value is REQUIRED and key not in options:
            raise ValueError(f"suite {name!r} needs {key}: give --option {key}=...")
    hints = get_type_hints(SUITES[name])
    return SUITES[name](**{key: _as_typed(key, hints[key], value) for key, value in options.items()})


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def _as_typed(key: str, hint: Any, value: Any) -> Any:
    """A value of an option as its field is; "2,4" and 2 for one that is a tuple: (2, 4) and (2,)."""
    if getattr(hint, "__origin__", None) is not tuple:
        fits = {int: (int,), float: (int, float), bool: (bool,)}.get(hint)
        if fits and not (isinstance(value, fits) and isinstance(value, bool) == (hint is bool)):  # True is an int, and is none
            raise ValueError(f"option {key} is {KINDS[hint]}; got {value!r}")
        return value
    kind = hint.__args__[0]
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        if None in parts:
            raise TypeError
        return tuple(kind(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(
            f"option {key} is a list, each {KINDS.get(kind, kind.__name__)}, as {key}=1,2; got {value!r}"
        ) from None


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
