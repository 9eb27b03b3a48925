"""BabiLong: a bAbI story whose sentences are scattered over a long text, a question about it, and the published metric.

... the mill. Mary went to the office. Had anyone seen the drum since noon? Mary took the milk. Nothing happened at ...
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from recollect.tasks.babi import LABELS, Story, answer, choices, events, last_question, read_stories
from recollect.tasks.babi_simulation import tell
from recollect.tasks.babilong_prompts import PARTS, default_parts
from recollect.tasks.files import read_text
from recollect.tasks.haystack import grammar_sentences, insert, split_sentences
from recollect.tasks.templates import replace_templates
from recollect.tasks.text import Measure, Question, TextTask, n_bytes, register_text_task

PROMPT_TOKENS = 300
MIN_SENTENCE_TOKENS = 10
TOKENS_PER_LINE = 8
# Own stories that fail in a row before we give up; of a file, every row is tried once.
MAX_TRIES = 500
MAX_BACKGROUNDS = 20
MAX_EMPTY_PASSAGES = 200

Window = tuple[float, float]


def correct(qa: int, said: str, answer: str, question: str) -> bool:
    """The published metric: in the first sentence said, the answer is the only label of the task that the question lacks.

    Labels (`LABELS[qa]`) are looked for as substrings, whatever their case. The first sentence ends at the first full stop, or
    before "<context>" or "<example>", where models begin to make up further examples.

    Source: booydar/babilong, babilong/metrics.py. Its cut at "Question" comes after lower-casing and so never happens; we
    leave it out.
    """
    first = said.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    labels = {label.lower() for label in LABELS[qa]}
    return {label for label in labels if label in first and label not in question.lower()} == {answer.lower()}


def draw_gaps(
    rng: np.random.Generator, n_facts: int, sizes: Sequence[int], *, facts_size: int, window: Window | None = None
) -> list[int]:
    """The gaps between background sentences into which facts go, ascending: drawn uniformly, with replacement, then sorted.

    Args:
        n_facts: facts to place.
        sizes: tokens of the N background sentences in order; gap i is in front of sentence i.
        facts_size: tokens of all facts.
        window: (start, end) as shares of the whole text. Without it, all N + 1 gaps; with it, the gaps in front of a sentence
            with at least start * total and less than end * total - facts_size background tokens before it.
    Raises:
        ValueError: no gap lies in the window.
    Source: booydar/babilong, babilong/babilong_utils.py, NoiseInjectionDataset.
    """
    allowed = np.arange(len(sizes) + 1)
    if window is not None:
        total = sum(sizes) + facts_size
        before = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        allowed = np.flatnonzero((before >= int(total * window[0])) & (before < int(total * window[1]) - facts_size))
        if not len(allowed):
            raise ValueError(f"no gap between sentences lies in window={window} of this text; widen it or raise length")
    return np.sort(rng.choice(allowed, n_facts)).tolist()


def cut_to_fit(sentence: str, room: int, measure: Measure) -> str:
    """The longest beginning of a sentence with measure(" " + beginning) <= room.

    Where no beginning up to there has just `room` tokens, one a few characters longer or shorter that has is taken instead:
    a character more can make a text one token shorter or two longer.
    """

    def size(n: int) -> int:
        return measure(" " + sentence[:n])

    fits = bisect_right(range(1, len(sentence) + 1), room, key=size)
    if fits and size(fits) != room:
        near = range(max(1, fits - 16), min(len(sentence), fits + 16) + 1)
        fits = next((n for n in reversed(near) if size(n) == room), fits)
    return sentence[:fits]


def fill(passages: Iterator[list[str]], wanted: int, measure: Measure) -> list[str]:
    """Consecutive sentences of `wanted` tokens together, each measured with a blank in front; the last one is cut to fit.

    Sentences below 10 tokens are passed over, as are (which the original does not) those that state a fact themselves.

    Raises:
        ValueError: the passages hold no usable sentence.
    """
    taken: list[str] = []
    empty = 0
    while wanted > 0:
        before = len(taken)
        for sentence in next(passages):
            size = measure(" " + sentence)
            if size < MIN_SENTENCE_TOKENS or events(sentence):
                continue
            taken.append(sentence if size <= wanted else cut_to_fit(sentence, wanted, measure))
            wanted -= size
            if wanted <= 0:
                break
        empty = 0 if len(taken) > before else empty + 1
        if empty == MAX_EMPTY_PASSAGES:
            raise ValueError(
                f"no sentence of {MIN_SENTENCE_TOKENS} tokens in {empty} passages of the background; give longer texts with "
                "full stops"
            )
    return [sentence for sentence in taken if sentence]


def passages_of_books(rng: np.random.Generator, books: Sequence[Path], size: int) -> Iterator[list[str]]:
    """Endless passages: a uniform book, from a uniform character on, `size` characters of it as sentences, both ends dropped."""
    while True:
        book = books[int(rng.integers(len(books)))]
        text = _read_book(book, book.stat().st_mtime_ns)
        start = int(rng.integers(max(1, len(text))))
        yield split_sentences(text[start : start + size])[1:-1]


def passages_of_grammar(rng: np.random.Generator, size: int) -> Iterator[list[str]]:
    """Endless passages of our own small grammar, about `size` characters each."""
    while True:
        yield grammar_sentences(8 + size // 60, seed=int(rng.integers(2**63)))


@lru_cache(maxsize=128)
def _read_book(path: Path, _modified: int) -> str:
    return read_text("background", str(path))


def list_books(path: str) -> list[Path]:
    """The *.txt files of a folder in order of their names, or the one file.

    Raises:
        ValueError: no such file or folder, or a folder without *.txt files.
    """
    where = Path(path)
    if not where.exists():
        raise ValueError(f"background={path!r} does not exist; give a text file or a folder of *.txt files")
    books = sorted(where.glob("*.txt")) if where.is_dir() else [where]
    if not books:
        raise ValueError(f"background={path!r} holds no *.txt file")
    return books


@register_text_task
@dataclass(frozen=True, kw_only=True)
class BabiLong(TextTask):
    """Facts of a story, in order, between the sentences of a background text of a given length; a question; a one-word answer.

    The text has L = length - 300 tokens, facts and background together, every sentence measured with a blank in front. Unlike
    the original, L is smaller where instruction, examples, question and frame take more than 300 (a byte-level model), so that
    a prompt never exceeds `length`. Stories with more than L / 8 lines, the question being one, are passed over.

    Differences from the original: wording of prompts and own stories; rows and background are drawn afresh and at random for
    every example, where it walks through the rows in order and goes on reading where the last example's background ended;
    sentences are split by our own rule instead of Punkt, with white space collapsed; background that states a fact is skipped;
    the prompt ends with "Answer:". Of the rows of qa5's train file, 20 of 9,999 have two gifts that fit the question and name
    the one that `solve` (the later counts) does not.

    Attributes:
        qa: 1 a person's room, 2 a thing's room, 3 a thing's room before another, 4 which room lies north of one, 5 who gave
            what to whom.
        length: tokens of the prompt; 0 = the facts alone, without background.
        facts: a file of bAbI rows as JSON lines {"facts": [..], "question", "answer", "support"}; None = stories of our own
            simulation (`babi_simulation.tell`). Rows are drawn without replacement, then all over again.
        background: a text file, or a folder of *.txt files (the original: PG-19's test books); None = a small grammar's text.
        window: facts only between these shares of the text, e.g. (0.25, 0.5).
        instruction, examples, answer_format: whether these parts of the prompt are there.
        templates: a JSON object whose "instruction", "examples", "answer_format" and "frame" (with {context} and {question})
            replace ours; braces that are no fields are doubled. `solve` looks for facts behind the last "<context>".
        answer_tokens: tokens that a model may write.
        chance: mean over stories of 1 / (labels of the sort asked for that the question does not name).
    Raises:
        ValueError: an option outside its range, a file that is missing or of another form.
    Source: Kuratov et al. 2024, arXiv 2406.10149; booydar/babilong.
    """

    name: ClassVar[str] = "babilong"
    qa: int = 1
    length: int = 0
    facts: str | None = None
    background: str | None = None
    window: Window | None = None
    instruction: bool = True
    examples: bool = True
    answer_format: bool = True
    templates: str | None = None
    answer_tokens: int = 20
    chance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.qa not in LABELS:
            raise ValueError(f"qa is 1 to {len(LABELS)}; got {self.qa!r}")
        if self.length < 0 or self.answer_tokens < 1:
            raise ValueError(
                f"length is at least 0 and answer_tokens at least 1; got length={self.length}, answer_tokens={self.answer_tokens}"
            )
        if self.window is not None:
            if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1:
                raise ValueError(f"window is (start, end) with 0 <= start < end <= 1; got {self.window}")
            if self.length == 0:
                raise ValueError("window places facts in a background; length=0 has none")
        if self.background is not None:
            list_books(self.background)
        self._parts()
        # Of our own stories, qa5 asks in five equally likely forms: 3 things, 3 x (4 people but one), 2 x 4 people.
        own = {1: 1 / 6, 2: 1 / 6, 3: 1 / 5, 4: 1 / 5, 5: (3 / 3 + 2 / 4) / 5}[self.qa]
        rows = [] if self.facts is None else read_stories(self.qa, self.facts)
        chance = sum(1 / len(choices(self.qa, row.question)) for row in rows) / len(rows) if rows else own
        object.__setattr__(self, "chance", chance)

    def sample(self, n: int, *, seed: int, measure: Measure = n_bytes) -> list[Question]:
        """n examples. `measure` counts tokens without those that a tokenizer puts around a text.

        Tags: `qa`, `length`, `question`, `choices` (what a guess may say), `n_facts`, `support` (facts that prove the answer),
        `depths` (where in the text they begin, as a share of its characters) and `depth` (the last of them).

        Raises:
            ValueError: n < 1; a prompt alone longer than `length`; no story fits the length or the window.
        """
        if n < 1:
            raise ValueError(f"n, the number of examples, is at least 1; got {n}")
        rng = np.random.default_rng(seed)
        parts = self._parts()
        stories, tries = self._stories(rng)
        found: list[Question] = []
        failed = 0
        while len(found) < n:
            question = self._ask(rng, next(stories), parts, measure)
            if question is not None:
                found.append(question)
            failed = 0 if question is not None else failed + 1
            if failed == tries:
                raise ValueError(
                    f"none of {tries} stories of qa{self.qa} fits length={self.length} (with window={self.window}); raise length, "
                    "widen window, or leave parts of the prompt out"
                )
        return found

    def _stories(self, rng: np.random.Generator) -> tuple[Iterator[Story], int]:
        """Endless stories, and after how many that do not fit no other will."""
        rows = () if self.facts is None else read_stories(self.qa, self.facts)

        def endless() -> Iterator[Story]:
            while True:
                yield from (rows[i] for i in rng.permutation(len(rows))) if rows else (tell(self.qa, rng),)

        # A row may stand at the end of one pass and at the beginning of the next.
        return endless(), 2 * len(rows) or MAX_TRIES

    def _parts(self) -> dict[str, str]:
        """The frame, and the parts in use joined as "head"."""
        default = default_parts(self.qa)
        fields: dict[str, tuple[set[str], set[str]]] = {name: (set(), set()) for name in PARTS}
        loaded = replace_templates(self.templates, default, fields | {"frame": ({"context", "question"}, set())})
        used = {"instruction": self.instruction, "examples": self.examples, "answer_format": self.answer_format}
        # Ours hold no doubled braces; a file's parts are templates, too.
        head = [loaded[name].format() for name in PARTS if used[name] and loaded[name]]
        return {"head": "".join(part + "\n" for part in head), "frame": loaded["frame"]}

    def _ask(self, rng: np.random.Generator, story: Story, parts: dict[str, str], measure: Measure) -> Question | None:
        """The example made of a story, None where it does not fit."""

        def prompt_of(context: str) -> str:
            return parts["head"] + parts["frame"].format(context=context, question=story.question)

        if self.length == 0:
            return self._question(story, list(story.facts), list(range(len(story.facts))), prompt_of)
        around = measure(prompt_of(""))
        total = self.length - max(PROMPT_TOKENS, around)
        if total <= 0:
            taken = (
                f"the prompt around it takes {around}"
                if around > PROMPT_TOKENS
                else f"the prompt has {PROMPT_TOKENS} to itself"
            )
            raise ValueError(
                f"length={self.length} leaves no room for a text: {taken}; raise length, or leave out parts of the prompt"
            )
        facts_size = sum(measure(" " + fact) for fact in story.facts)
        start, end = self.window or (0.0, 1.0)
        if len(story.facts) + 1 > total // TOKENS_PER_LINE or facts_size > int(total * end) - int(total * start):
            return None
        wanted = total - facts_size
        while True:
            background, gaps = self._mix(rng, len(story.facts), facts_size, wanted, measure)
            at = [gap + i for i, gap in enumerate(gaps)]
            question = self._question(story, insert(background, story.facts, gaps), at, prompt_of)
            over = measure(question.prompt) - self.length
            if over <= 0 or wanted == 0:
                return question if over <= 0 else None
            # The measure of the whole is more than the sum of its parts.
            wanted = max(0, wanted - over)

    def _mix(
        self, rng: np.random.Generator, n_facts: int, facts_size: int, wanted: int, measure: Measure
    ) -> tuple[list[str], list[int]]:
        """Background of `wanted` tokens, and a gap in it for every fact; drawn again where no gap lies in the window."""
        for attempt in range(MAX_BACKGROUNDS):
            background = fill(self._passages(rng, 10 * wanted), wanted, measure)
            sizes = [measure(" " + sentence) for sentence in background]
            try:
                return background, draw_gaps(rng, n_facts, sizes, facts_size=facts_size, window=self.window)
            except ValueError:
                if attempt == MAX_BACKGROUNDS - 1:
                    raise
        raise AssertionError("unreachable")

    def _passages(self, rng: np.random.Generator, size: int) -> Iterator[list[str]]:
        if self.background is None:
            # The grammar's sentences are all of use, so a tenth is enough for measures that count bytes.
            return passages_of_grammar(rng, size // 10)
        return passages_of_books(rng, list_books(self.background), size)

    def _question(self, story: Story, pieces: list[str], at: list[int], prompt_of: Callable[[str], str]) -> Question:
        """The example whose text is `pieces`; fact i of the story is piece at[i]."""
        context = " ".join(pieces)
        begins = np.cumsum([0] + [len(piece) + 1 for piece in pieces])
        depths = [float(begins[at[i]]) / len(context) for i in story.support]
        tags = {
            "qa": self.qa,
            "length": self.length,
            "question": story.question,
            "choices": choices(self.qa, story.question),
            "n_facts": len(story.facts),
            "support": story.support,
            "depths": depths,
            "depth": depths[-1] if depths else None,
        }
        return Question(prompt_of(context), (story.answer,), tags)

    def solve(self, prompt: str) -> str:
        """The answer by rule, with a full stop: every fact of the prompt is read, the last question of the kind `qa` answered.

        Raises:
            ValueError: the prompt has no such question, or no facts that answer it.
        """
        question = last_question(self.qa, prompt)
        if question is None:
            raise ValueError(f"the prompt asks no question of qa{self.qa}: ...{prompt[-80:]!r}")
        # The question goes: "Who gave the milk to Bill?" would read as a gift.
        context = prompt[max(0, prompt.rfind("<context>")) :].replace(question, " ")
        return _as_said(answer(self.qa, events(context), question)[0], prompt)

    def score(self, said: str, question: Question) -> float:
        """1.0 where `correct`, else 0.0."""
        return float(any(correct(self.qa, said, answer, question.tags["question"]) for answer in question.answers))

    def target(self, question: Question) -> str:
        """The label with a full stop: what the metric wants, shorter than the sentence that `answer_format` asks for in qa1-3."""
        return _as_said(question.answers[0], question.prompt)


def _as_said(label: str, prompt: str) -> str:
    return ("" if prompt[-1:].isspace() else " ") + label + "."
