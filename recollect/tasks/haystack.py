"""Haystacks: sentences of any text or of a small grammar, cut to a measured length, and needles put between them.

An essay is words with one blank between them; a sentence starts where a word that ends one (. ? !) is followed by a word that
may start one (a capital or a quotation mark).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recollect.tasks.files import read_text
from recollect.tasks.needle_words import ADJECTIVES, NOUNS, say
from recollect.tasks.text import Measure, Question

# 40 equally spaced percentages, both ends included, rounded.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))

_END = re.compile(r"""[.?!]["'\u2019\u201d\u00bb)\]]*$""")
_START = re.compile(r"""[(\[_]*["'\u2018\u201c\u00abA-ZÀ-ÖØ-Þ]""")
# Words with a full stop that ends no sentence; single capitals ("J. Smith") are such words too.
_SHORT = re.compile(
    r"""[(\[_"'\u2018\u201c]*(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Rev|Capt|Col|Gen|Lt|Hon|Esq|Messrs|vs|etc|cf|[ei]\.[eg])\."""
)


@dataclass(frozen=True, eq=False)
class Essay:
    """A text as words, read round and round.

    Attributes:
        words: W words in order.
        starts: bool [W]; a sentence starts at this word (for the first one: after the last word, when the text is repeated).
    """

    words: tuple[str, ...]
    starts: NDArray[np.bool_]

    def start(self, share: float) -> int:
        """The word at which a sentence starts: the one `share` (in [0, 1)) of the way through all sentences of the text."""
        at = np.r_[0, np.flatnonzero(self.starts[1:]) + 1]
        return int(at[int(share * len(at))])

    def sentences(self, n_words: int, *, start: int = 0) -> list[str]:
        """The sentences of the n words from word `start` on; the last one may be cut, the first one be the end of one."""
        words, starts, end = self.words, self.starts, start + n_words
        if end > len(words):
            copies = -(-end // len(words))
            words, starts = words * copies, np.tile(starts, copies)
        return _cut(words[start:end], starts[start:end])


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, all white space collapsed to single blanks.

    A border is a word ending in . ? or ! (closing quotes and brackets may follow) before a word that begins with a capital or an
    opening quote. Titles ("Mr."), a few abbreviations and single capitals end no sentence. Published haystacks were split with
    NLTK's Punkt model, which also learns abbreviations; the two differ at such words only.
    """
    words = tuple(text.split())
    return _cut(words, _sentence_starts(words))


def read_essay(path: str | None) -> Essay:
    """The text of a file as an Essay, or, without one, 6,000 of `grammar_sentences`, always the same.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    if path is None:
        return _own_essay()
    try:
        stamp = Path(path).stat().st_mtime_ns
    except OSError:
        stamp = -1  # read_text says what is wrong
    return _essay_of_file(path, stamp)


@lru_cache(maxsize=4)
def _essay_of_file(path: str, stamp: int) -> Essay:
    words = tuple(read_text("text", path).split())
    if not words:
        raise ValueError(f"text={path!r} is empty; a haystack needs words")
    return Essay(words, _sentence_starts(words))


@lru_cache(maxsize=1)
def _own_essay() -> Essay:
    words = tuple(" ".join(grammar_sentences(6000, seed=0)).split())
    return Essay(words, _sentence_starts(words))


def _sentence_starts(words: Sequence[str]) -> NDArray[np.bool_]:
    """bool [W]: the word before this one (round the end) ends a sentence, and this one may start one."""
    ends = [bool(_END.search(word)) and not _SHORT.fullmatch(word) for word in words]
    return np.array([ends[i - 1] and bool(_START.match(word)) for i, word in enumerate(words)], dtype=bool)


def _cut(words: Sequence[str], starts: NDArray[np.bool_]) -> list[str]:
    """Words [n] as sentences; the first word always starts one."""
    if not words:
        return []
    at = [0, *(np.flatnonzero(starts[1:]) + 1).tolist(), len(words)]
    return [" ".join(words[a:b]) for a, b in pairwise(at)]


_GRAMMAR = {
    "person": "Ada Bruno Clara Edgar Flora Hugo Ines Jasper Lena Magnus Nora Oskar Petra Rufus Selma Viktor",
    "place": "attic bakery barn chapel courtyard ferry forge kitchen library market mill pier quarry school station village",
    "time": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday spring summer autumn winter noon dawn midnight",
    "did": "borrowed carried dropped examined fetched forgot hid lost mended moved noticed repaired sketched sold stored wanted",
    "adjective": " ".join(ADJECTIVES),
    "noun": " ".join(NOUNS),
}
_SENTENCES = (
    "{person} {did} the {adjective} {noun} near the {place}.",
    "The {noun} beside the {place} looked {adjective}, and nobody asked why.",
    "Before {time}, {person} and {person2} walked from the {place} to the {place2}.",
    "Had anyone seen the {adjective} {noun} since {time}?",
    "Nothing happened at the {place} until {person} {did} a {noun}.",
    "In the {place}, a {noun} stood between two {adjective} boxes.",
    "People said that the {adjective} {noun} belonged to {person}, but {person2} never believed it.",
    "It rained over the {place} again.",
    "Each {noun} was counted twice, once by {person} and once by {person2}, and still the {adjective} one was missing.",
    "What a {adjective} {place} this was!",
    "When {time} came, the road to the {place} was {adjective} and long.",
    "{person} laughed, {did} something, and left the {place} without the {noun}.",
)


def grammar_sentences(n: int, *, seed: int) -> list[str]:
    """n sentences of a small grammar of our own: grammatical, dull, with a question or an exclamation now and then."""
    rng = np.random.default_rng(seed)
    words = {name: text.split() for name, text in _GRAMMAR.items()}
    words |= {"person2": words["person"], "place2": words["place"]}
    sentences = []
    for _ in range(n):
        picked = {name: some[rng.integers(len(some))] for name, some in words.items()}
        text = _SENTENCES[rng.integers(len(_SENTENCES))].format(**picked)
        sentences.append(re.sub(r"\ba (?=[aeiou])", "an ", text))
    return sentences


def most_units(size: Callable[[int], int], budget: int, *, least: int) -> int:
    """The largest number of units (words, lines) whose text is within the budget, found by doubling and bisection.

    Args:
        size: measured length of the text with n units; grows with n, if not at every step. Called about 2 log2(n) times.
        budget: what size(n) must not exceed.
        least: the fewest units allowed, >= 0.
    Returns:
        n >= least with size(n) <= budget.
    Raises:
        ValueError: size(least) is over the budget, or size stops growing below it (a measure that cuts its text).
    """
    smallest = size(least)
    if smallest > budget:
        raise ValueError(f"the shortest possible text measures {smallest}, {smallest - budget} more than fit")
    fits, step, before = least, max(1, least), smallest
    while True:
        tried, measured = fits + step, size(fits + step)
        if measured > budget:
            break
        if measured <= before and step >= 256:
            raise ValueError(
                f"measure says {measured} for {fits} and for {tried} units; it must grow with the text, not cut it"
            )
        fits, step, before = tried, step * 2, measured
    over = fits + step
    while over - fits > 1:
        middle = (fits + over) // 2
        if size(middle) <= budget:
            fits = middle
        else:
            over = middle
    return fits


def gap_at(depth: float, n: int) -> int:
    """The gap at a depth in percent: in front of piece int(n depth / 100) of n; 100 is behind the last.

    The quotient is taken first, as RULER does: where n depth / 100 is whole, rounding may put the needle one piece earlier.
    """
    return int(n * (depth / 100))


def insert(pieces: Sequence[str], needles: Iterable[str], gaps: Iterable[int]) -> list[str]:
    """Pieces with every needle in front of pieces[gap]; a gap of len(pieces) is the end; equal gaps keep the needles' order."""
    placed: list[str] = []
    done = 0
    for gap, needle in sorted(zip(gaps, needles, strict=True), key=lambda pair: pair[0]):
        placed += pieces[done:gap]
        placed.append(needle)
        done = gap
    return placed + list(pieces[done:])


def fill(
    n: int,
    write: Callable[[int, int, np.random.Generator], Question],
    *,
    seed: int,
    measure: Measure,
    length: int,
    answer_tokens: int,
    least: int,
    give_up: Callable[[int, int], int],
) -> list[Question]:
    """n examples whose prompts leave room for the answer: measure(prompt) + answer_tokens <= length.

    The number of units is found once, on a sample that depends on no seed; a sample that is longer gives some up.

    Args:
        write: (units of haystack, i, generator) to example i. It has to draw what it asks before what depends on the units.
        seed: example i has a generator of its own, from (seed, i).
        least: the fewest units of which an example can be made.
        give_up: (units, measured excess) to the units, >= 1, that a sample which is too long loses.
    Returns:
        the examples, with the tags `length` (asked for) and `size` (measured length of the prompt) besides those of `write`.
    Raises:
        ValueError: n < 1; not even the least haystack fits; an answer longer than `answer_tokens`.
    """
    if n < 1:
        raise ValueError(f"n, the number of examples, is at least 1; got {n}")
    room = length - answer_tokens
    if room < 1:
        raise ValueError(f"length={length} leaves no room for a prompt beside answer_tokens={answer_tokens}; raise length")

    def generator(i: int, seed: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))

    try:
        most = most_units(lambda units: measure(write(units, 0, generator(0, 0)).prompt), room, least=least)
    except ValueError as error:
        raise ValueError(f"length={length} with answer_tokens={answer_tokens}: {error}; raise length") from error
    questions = []
    for i in range(n):
        units, question = most, write(most, i, generator(i, seed))
        while (size := measure(question.prompt)) > room:
            if units == least:
                raise ValueError(f"length={length} is too short: example {i} needs {size + answer_tokens}; raise length")
            units = max(least, units - give_up(units, size - room))
            question = write(units, i, generator(i, seed))
        if (answer := measure(say(question.answers))) > answer_tokens:
            raise ValueError(f"the answer {say(question.answers)!r} measures {answer}; raise answer_tokens={answer_tokens}")
        questions.append(question._replace(tags={**question.tags, "length": length, "size": size}))
    return questions
