"""Needles in haystacks: the RULER family and the many-needle test of the Multi-Token Attention paper.

A needle is one sentence that ties a value to a key. The haystack is text around it; the prompt ends with a question about a key
and the beginning of its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from recollect.tasks.haystack import DEPTHS, fill, gap_at, insert, read_essay
from recollect.tasks.needle_words import (
    ADJECTIVES,
    CITIES,
    KINDS,
    NEEDLES_TEMPLATES,
    NOUNS,
    RULER_TEMPLATES,
    TEMPLATE_FIELDS,
    check_choice,
    check_findable,
    draw,
    draw_distinct,
    find_values,
    join_keys,
    read_words,
    say,
)
from recollect.tasks.templates import replace_templates
from recollect.tasks.text import Measure, Question, TextTask, n_bytes, register_text_task

HAYSTACKS = ("noise", "essay", "needle")
STARTS = ("first", "random")
PLACINGS = ("asked", "spread")

# RULER's names, and `niah_single_words`: an essay with a word for a value, which RULER allows and does not name.
RULER: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {"haystack": "essay"},
    "niah_single_3": {"haystack": "essay", "values": "uuids"},
    "niah_single_words": {"haystack": "essay", "values": "words"},
    "niah_multikey_1": {"haystack": "essay", "n_keys": 4},
    "niah_multikey_2": {"haystack": "needle"},
    "niah_multikey_3": {"haystack": "needle", "keys": "uuids", "values": "uuids"},
    "niah_multivalue": {"haystack": "essay", "n_values": 4},
    "niah_multiquery": {"haystack": "essay", "n_keys": 4, "n_queries": 4},
}
# What papers call them. The W stands for a word or for RULER's third task; no source settles it, so report both.
S_NIAH = {
    "S-NIAH-PK": ("niah_single_1",),
    "S-NIAH-N": ("niah_single_2",),
    "S-NIAH-W": ("niah_single_3", "niah_single_words"),
}


def string_match_all(said: str, answers: tuple[str, ...]) -> float:
    """RULER's metric: the share of the references that occur, upper or lower case, anywhere in what was said."""
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


@register_text_task
@dataclass(frozen=True, kw_only=True)
class Ruler(TextTask):
    """RULER's needle tasks: one or several keys and values in noise, essays or other needles.

    The published ones are `Ruler(**RULER["niah_multikey_1"], length=8192)` and so on. Parts, places, lengths and metric are RULER's:
        noise: N equal lines, each needle a line of its own before a line drawn uniformly (no two before the same).
        needle: N lines, each a needle with random key and value; the rest as for noise.
        essay: the first N words of a text, repeated when N is longer; the needles at different ones of 40 equally spaced depths
            0 .. 100 %: in front of sentence int(n_sentences depth / 100), all joined by blanks.
        length: N is found once, by bisection: the largest with measure(prompt) + answer_tokens <= length; a sample that is too
            long is written again with 500 words (essay) or 25 lines (5 for lengths below 4096) less.

    Differences. The wording is ours. A sample gives up at most a quarter of N at a time: 500 words or 5 lines would leave short
    texts empty. Keys, and values, of a sample differ from one another, and no line of a "needle" haystack has one of its keys:
    else a question has two answers. Needles are shuffled for every sample anew; RULER's order is the same for all. Answers to
    one key come in the text's order. Sentences are split by rule, not by NLTK.

    Attributes:
        haystack: "noise", "essay" or "needle".
        keys, values: "numbers" (7 digits), "words" (adjective-noun) or "uuids".
        n_keys: keys that needles tell of; for "needle", besides the haystack's own.
        n_values: needles (values) per key.
        n_queries: keys asked for, 1 to n_keys.
        length: room for prompt and answer, in the units of the measure.
        text: file with the essay; None: sentences of a small grammar of our own. Only for "essay".
        start: where in the text a sample begins: "first" word (RULER) or the start of a "random" sentence (better for training).
        adjectives, nouns: files, a word a line, for keys and values that are words (RULER: wonderwords); None: lists of our own.
        templates: JSON file with some of `RULER_TEMPLATES` in other words.
        answer_tokens: RULER allows 128.
        chance: a uniform guess among the values in the text, n_queries / n_keys; 0 where all of them are asked for, and for
            "needle", where it depends on the length and only `chance_at` knows it: n_queries n_values / tags["n_needles"].
    Raises:
        ValueError: an option outside its range, or a file that cannot be used.
    Source: Hsieh et al. 2024, arXiv 2404.06654; NVIDIA/RULER, scripts/data/synthetic/niah.py and scripts/synthetic.yaml.
    """

    name: ClassVar[str] = "ruler"
    haystack: str = "noise"
    keys: str = "words"
    values: str = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    length: int = 4096
    text: str | None = None
    start: str = "first"
    adjectives: str | None = None
    nouns: str | None = None
    templates: str | None = None
    answer_tokens: int = 128
    chance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        check_choice("haystack", self.haystack, HAYSTACKS)
        check_choice("keys", self.keys, KINDS)
        check_choice("values", self.values, KINDS)
        check_choice("start", self.start, STARTS)
        if min(self.n_keys, self.n_values) < 1 or not 1 <= self.n_queries <= self.n_keys:
            raise ValueError(
                f"n_keys and n_values are at least 1, n_queries is 1 to n_keys; got n_keys={self.n_keys}, "
                f"n_values={self.n_values}, n_queries={self.n_queries}"
            )
        if self._n_needles > len(DEPTHS) and self.haystack == "essay":
            raise ValueError(f"an essay has {len(DEPTHS)} depths for needles; n_keys x n_values asks for {self._n_needles}")
        if self.haystack != "essay" and (self.text is not None or self.start != "first"):
            raise ValueError(f"text and start belong to haystack='essay'; haystack is {self.haystack!r}")
        if self.haystack == "essay":
            read_essay(self.text)
        adjectives, nouns = self._words
        if len(adjectives) * len(nouns) <= self._n_needles:
            raise ValueError(
                f"{len(adjectives)} adjectives and {len(nouns)} nouns make too few words for {self._n_needles} needles "
                "(n_keys x n_values); give longer lists"
            )
        _templates(self.templates, RULER_TEMPLATES)
        among_others = self.n_queries < self.n_keys and self.haystack != "needle"
        object.__setattr__(self, "chance", self.n_queries / self.n_keys if among_others else 0.0)

    @property
    def _words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return read_words("adjectives", self.adjectives, ADJECTIVES), read_words("nouns", self.nouns, NOUNS)

    @property
    def _n_needles(self) -> int:
        return self.n_keys * self.n_values

    @property
    def _prompt_name(self) -> str:
        return "one" if self.n_queries * self.n_values == 1 else "many"

    @property
    def _kinds(self) -> dict[str, str]:
        return {"kind": self.values[:-1], "kinds": self.values}

    def sample(self, n: int, *, seed: int, measure: Measure = n_bytes) -> list[Question]:
        """n examples; the first m of them are `sample(m)`.

        Tags: `depth` of the first answer's needle in percent, `depths` of all answers', `n_needles` in the text, `n_haystack`
        (N: words or lines), `length` (asked for) and `size` (measured length of the prompt).

        Raises:
            ValueError: n < 1; not even the shortest haystack fits; an answer longer than `answer_tokens`.
        """
        writer = _Writer(self)
        return fill(
            n,
            lambda units, i, rng: writer.write(units, rng),
            seed=seed,
            measure=measure,
            length=self.length,
            answer_tokens=self.answer_tokens,
            least=1 if self.haystack == "essay" else self._n_needles,
            give_up=self._give_up,
        )

    def _give_up(self, units: int, excess: int) -> int:
        published = 500 if self.haystack == "essay" else 25 if self.length >= 4096 else 5
        return min(published, max(1, units // 4))

    def solve(self, prompt: str) -> str:
        """Find every needle, keep those of the keys asked for: their values in the order of the question, then of the text.

        Raises:
            ValueError: the prompt does not end with this task's question, or no needle has a key that it asks for.
        """
        templates = _templates(self.templates, RULER_TEMPLATES)
        known = tuple(self._kinds.items())
        return say(find_values(prompt, templates[self._prompt_name], templates["needle"], known=known))

    def score(self, said: str, question: Question) -> float:
        """RULER's string_match_all."""
        return string_match_all(said, question.answers)

    def chance_at(self, question: Question) -> float:
        """A uniform guess among the values in the text; 0 where all of them are asked for."""
        n_asked, n_told = len(question.answers), question.tags["n_needles"]
        return n_asked / n_told if n_asked < n_told else 0.0

    def target(self, question: Question) -> str:
        """A blank, the answers joined by commas, a full stop."""
        return say(question.answers)


class _Writer:
    """Writes the samples of one Ruler, its files read once."""

    def __init__(self, task: Ruler) -> None:
        self.task = task
        self.words = task._words
        self.templates = _templates(task.templates, RULER_TEMPLATES)
        self.essay = read_essay(task.text) if task.haystack == "essay" else None

    def write(self, units: int, rng: np.random.Generator) -> Question:
        """A sample with `units` of haystack. Keys, values and what is asked depend on `rng` alone, so a shorter text asks the same."""
        task = self.task
        keys = draw_distinct(rng, task.keys, task.n_keys, *self.words)
        values = draw_distinct(rng, task.values, task._n_needles, *self.words)
        # The first keys are asked for: no key differs from another but by its places, and those are shuffled.
        order = rng.permutation(task._n_needles).tolist()
        pieces, gaps, depths, joint = self._haystack(units, keys, rng)
        needles = [self._needle(keys[i // task.n_values], values[i]) for i in order]
        told = [place for key in range(task.n_queries) for place, i in enumerate(order) if i // task.n_values == key]
        prompt = self.templates[task._prompt_name].format(
            context=joint.join(insert(pieces, needles, gaps)),
            query=join_keys(keys[: task.n_queries]),
            **task._kinds,
        )
        n_needles = task._n_needles + (units if task.haystack == "needle" else 0)
        at = [depths[place] for place in told]
        tags = {"depth": at[0], "depths": at, "n_needles": n_needles, "n_haystack": units}
        return Question(prompt, tuple(values[order[place]] for place in told), tags)

    def _haystack(self, units: int, keys: list[str], rng: np.random.Generator) -> tuple[list[str], list[int], list[int], str]:
        """Pieces, the needles' gaps between them in order, their depths in percent, and what joins all."""
        task = self.task
        if self.essay is not None:
            start = self.essay.start(rng.random()) if task.start == "random" else 0
            pieces = self.essay.sentences(units, start=start)
            depths = sorted(rng.choice(DEPTHS, task._n_needles, replace=False).tolist())
            return pieces, [gap_at(depth, len(pieces)) for depth in depths], depths, " "
        gaps = sorted(rng.choice(units, task._n_needles, replace=False).tolist())
        depths = [round(100 * gap / units) for gap in gaps]
        if task.haystack == "noise":
            return [self.templates["noise"]] * units, gaps, depths, "\n"
        lines: list[str] = []
        while len(lines) < units:
            key = draw(rng, task.keys, *self.words)
            if key not in keys:
                lines.append(self._needle(key, draw(rng, task.values, *self.words)))
        return lines, gaps, depths, "\n"

    def _needle(self, key: str, value: str) -> str:
        return self.templates["needle"].format(key=key, value=value, **self.task._kinds)


@register_text_task
@dataclass(frozen=True, kw_only=True)
class Needles(TextTask):
    """Many needles in a haystack: numbers of cities in a running text, the number of one city is asked for.

    As the Multi-Token Attention paper runs it: 2, 4, 6 (its figures: up to 10) needles in windows of 2K and 4K tokens, five
    depths, the needles' order drawn anew for every sample, 500 samples per setting, accuracy averaged over the depths. The paper
    does not say where the needles stand that are not asked for, nor how an answer is graded; `placing` has both usual readings,
    the grading is ours, and so is the wording. Its one printed needle has a one-digit number: hence the default.

    A sample has as many words as keep measure(prompt) + answer_tokens <= length, found once; a longer one gives up a few.

    Attributes:
        n_needles: cities with a number, 1 to 10 ** n_digits (9 x 10 ** (n_digits - 1) above one digit).
        depths: percentages, 0 before the first sentence, 100 behind the last; sample i takes depth i modulo their number.
        placing: "asked": the needle asked for stands at the depth, the others at uniform places; "spread": the first needle stands
            at the depth, the others follow at equal distances over the rest, and any of them may be the one asked for.
        n_digits: digits of a number, the first not 0 when there are several.
        length: room for prompt and answer, in the units of the measure.
        text: file with the haystack; None: sentences of a small grammar of our own.
        start: where in the text a sample begins: "first" word or the start of a "random" sentence (better for training).
        cities: file with one name a line; None: a list of our own.
        templates: JSON file with some of `NEEDLES_TEMPLATES` in other words.
        chance: a uniform guess among the numbers in the text, 1 / n_needles; for a single needle, among all numbers.
    Raises:
        ValueError: an option outside its range, or a file that cannot be used.
    Source: Golovneva et al. 2025, arXiv 2504.00927, figures 3, 4 and 8; "spread" is the test with several needles of
        gkamradt/LLMTest_NeedleInAHaystack.
    """

    name: ClassVar[str] = "needles"
    n_needles: int = 2
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    placing: str = "asked"
    n_digits: int = 1
    length: int = 2048
    text: str | None = None
    start: str = "first"
    cities: str | None = None
    templates: str | None = None
    answer_tokens: int = 16
    chance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        check_choice("placing", self.placing, PLACINGS)
        check_choice("start", self.start, STARTS)
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths are percentages, 0 to 100, at least one; got {self.depths}")
        if not 1 <= self.n_digits <= 18:
            raise ValueError(f"n_digits is 1 to 18; got {self.n_digits}")
        low, high = self._numbers
        n_most = min(high - low, len(self._cities))
        if not 1 <= self.n_needles <= n_most:
            raise ValueError(
                f"n_needles is 1 to {n_most} with {high - low} numbers of n_digits={self.n_digits} and {len(self._cities)} "
                f"cities; got {self.n_needles}"
            )
        read_essay(self.text)
        _templates(self.templates, NEEDLES_TEMPLATES)
        object.__setattr__(self, "chance", 1 / (self.n_needles if self.n_needles > 1 else high - low))

    @property
    def _cities(self) -> tuple[str, ...]:
        return read_words("cities", self.cities, CITIES)

    @property
    def _numbers(self) -> tuple[int, int]:
        """The range of numbers, the end not included."""
        return (10 ** (self.n_digits - 1) if self.n_digits > 1 else 0), 10**self.n_digits

    def sample(self, n: int, *, seed: int, measure: Measure = n_bytes) -> list[Question]:
        """n examples; the first m of them are `sample(m)`.

        Tags: `depth` in percent, `rank` of the asked needle among all (0 is the first in the text), `n_needles`, `n_haystack`
        (words), `length` (asked for) and `size` (measured length of the prompt).

        Raises:
            ValueError: n < 1; not even the shortest haystack fits; an answer longer than `answer_tokens`.
        """
        writer = _CityWriter(self)
        return fill(
            n,
            lambda units, i, rng: writer.write(units, self.depths[i % len(self.depths)], rng),
            seed=seed,
            measure=measure,
            length=self.length,
            answer_tokens=self.answer_tokens,
            least=1,
            give_up=lambda units, excess: max(1, excess * units // self.length),
        )

    def solve(self, prompt: str) -> str:
        """Find every needle and say the number of the city asked for.

        Raises:
            ValueError: the prompt does not end with this task's question, or no needle has the city.
        """
        templates = _templates(self.templates, NEEDLES_TEMPLATES)
        return say(find_values(prompt, templates["one"], templates["needle"]))

    def score(self, said: str, question: Question) -> float:
        """1 if the first whole number said is the one asked for: a list of numbers, or a text that runs on, gains nothing."""
        number = re.search(r"\d+", said)
        return float(number is not None and number[0] == question.answers[0])

    def target(self, question: Question) -> str:
        """A blank, the number, a full stop."""
        return say(question.answers)


def _templates(path: str | None, default: dict[str, str]) -> dict[str, str]:
    templates = replace_templates(path, default, TEMPLATE_FIELDS)
    check_findable(f"templates={path!r}", templates)
    return templates


class _CityWriter:
    """Writes the samples of one Needles, its files read once."""

    def __init__(self, task: Needles) -> None:
        self.task = task
        self.cities = task._cities
        self.templates = _templates(task.templates, NEEDLES_TEMPLATES)
        self.essay = read_essay(task.text)

    def write(self, units: int, depth: float, rng: np.random.Generator) -> Question:
        """A sample with `units` words of haystack; what it asks depends on `rng` alone. The first city is the one asked for."""
        task, n = self.task, self.task.n_needles
        cities = [self.cities[i] for i in rng.choice(len(self.cities), n, replace=False)]
        low, high = task._numbers
        numbers = [str(low + number) for number in rng.choice(high - low, n, replace=False)]
        order = rng.permutation(n).tolist()
        elsewhere = rng.random(n)
        start = self.essay.start(rng.random()) if task.start == "random" else 0
        sentences = self.essay.sentences(units, start=start)
        if task.placing == "asked":
            gaps = [gap_at(depth, len(sentences)), *(elsewhere[1:] * (len(sentences) + 1)).astype(int).tolist()]
        else:
            gaps = [gap_at(depth + slot * (100 - depth) / n, len(sentences)) for slot in order]
        # `insert` keeps the order of needles that share a gap, so they go in shuffled.
        by_place = sorted(range(n), key=lambda i: (gaps[i], order[i]))
        needles = [self.templates["needle"].format(key=cities[i], value=numbers[i]) for i in by_place]
        context = " ".join(insert(sentences, needles, [gaps[i] for i in by_place]))
        tags = {"depth": depth, "rank": by_place.index(0), "n_needles": n, "n_haystack": units}
        return Question(self.templates["one"].format(context=context, query=cities[0]), (numbers[0],), tags)
