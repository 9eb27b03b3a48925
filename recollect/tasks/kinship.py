"""Kinship: a story states how people are related, one sentence for each pair; say what two others of them are to each other.

[Ada] learned chess from her father [Tom]. [Tom] and his sister [Ida] painted the fence.        [Ida] is [Ada]'s aunt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from string import Formatter
from typing import ClassVar

import numpy as np

from recollect.tasks.clutrr import NOISES, Row, read_rows
from recollect.tasks.family import KIND_OF, RELATIONS, derive, pick
from recollect.tasks.kinship_stories import invent
from recollect.tasks.templates import check_fields, replace_templates
from recollect.tasks.text import Measure, Question, TextTask, n_bytes, register_text_task

MIN_K, MAX_K, MAX_NOISE = 2, 10, 10

# A sentence holds a and b with "b is a's relation"; {his} is his or her, of a.
TEMPLATES = {
    "instruction": "The story tells how some people are related. Work out the relation that it does not state. Possible answers: "
    + ", ".join(RELATIONS)
    + ".",
    "frame": "Story: {story}\nQuestion: What is {b} to {a}?\nAnswer: {b} is {a}'s",
    "sentences": "\n".join(
        (
            "{b} is {a}'s {relation}.",
            "{a} wrote a long letter to {his} {relation} {b}.",
            "{a} asked {his} {relation} {b} to water the plants.",
            "Every summer, {a} visits {his} {relation} {b} by the sea.",
            "{b}, who is the {relation} of {a}, plays the violin.",
            "The old bicycle of {a} once belonged to {his} {relation} {b}.",
            "{a} and {his} {relation} {b} painted the fence.",
            "Nobody makes {a} laugh like {his} {relation} {b}.",
            "{a} learned chess from {his} {relation} {b}.",
            "At the station, {a} waited an hour for {his} {relation} {b}.",
            "{a} borrowed a ladder from {b}, {his} {relation}.",
            "{a} keeps a photograph of {his} {relation} {b} on the desk.",
        )
    ),
}
_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "instruction": (set(), set()),
    "frame": ({"story", "a", "b"}, set()),
    "sentences": ({"a", "b", "relation"}, {"his"}),
}

_ANY_RELATION = "|".join(sorted(KIND_OF, key=len, reverse=True))
_SAID = re.compile(
    r"(?<![\w-])(?:" + "|".join(sorted(RELATIONS, key=len, reverse=True)).replace("-", "[- ]") + r")(?![\w-])", re.IGNORECASE
)


def first_relation(said: str) -> str | None:
    """The first of the 18 relations that a text names, as a whole word and as long as possible; None without one.

    "mother-in-law" and "mother in law" are neither "mother" nor "law"; "grandmother" is not "mother".
    """
    found = _SAID.search(said)
    return found[0].lower().replace(" ", "-") if found else None


@register_text_task
@dataclass(frozen=True, kw_only=True)
class Kinship(TextTask):
    """Compose k stated relations along a chain of k + 1 people, told in any order, to the one between its ends.

    Own stories are true of a family that was grown first: its people's relations by definition, not by rule. The relation
    asked for is uniform over the 18; the chain is found as in CLUTRR; a story is told anew until the 16 rules, along every way
    from one to the other through what is told, allow the one answer only.

    Noise:
        clean: the chain alone.
        supporting: for n_noise pairs of neighbours (drawn with replacement), the two relations through a third person as well.
        irrelevant: for n_noise people of the chain (likewise), what somebody else is to them.
        disconnected: n_noise relations among people who have nothing to do with the others.

    Differences from CLUTRR: our own sentences, one a fact, instead of crowd-written ones; the target's distribution; how much
    noise; the metric reads the answer out of what a model says. Where `files` are given, stories are theirs; `solve` cannot
    read those.

    Attributes:
        k_min, k_max: 2 to 10; a sample holds every k equally often, to within one.
        noise: "clean", "supporting", "irrelevant" or "disconnected".
        n_noise: 1 to 10; default k // 2. Own stories only.
        shuffle: sentences in random order, else the chain in order and then the noise. Of files: `story`, else `clean_story`.
        files: a CLUTRR file as JSON lines, or a folder of them, of which rows with these k and this noise are drawn, without
            replacement, then all over again; None = own stories.
        instruction: whether the prompt begins with it.
        templates: a JSON object whose "instruction", "frame" (with {story}, {a} and {b}) and "sentences" (one a line, each
            with {a}, {b} and {relation}, and {his} if wanted) replace ours; braces that are no fields are doubled.
        answer_tokens: tokens that a model may write.
        chance: 1 / 18.
    Raises:
        ValueError: an option outside its range; a file that is missing, of another form, or without a row of these k.
    Source: Sinha et al. 2019, arXiv 1908.06177; facebookresearch/clutrr.
    """

    name: ClassVar[str] = "kinship"
    k_min: int = 2
    k_max: int = 10
    noise: str = "clean"
    n_noise: int | None = None
    shuffle: bool = True
    files: str | None = None
    instruction: bool = True
    templates: str | None = None
    answer_tokens: int = 20
    chance: float = field(init=False, default=1 / len(RELATIONS))

    def __post_init__(self) -> None:
        if not MIN_K <= self.k_min <= self.k_max <= MAX_K:
            raise ValueError(f"k_min <= k_max are {MIN_K} to {MAX_K}; got k_min={self.k_min}, k_max={self.k_max}")
        if self.noise not in NOISES:
            raise ValueError(f"noise is one of {', '.join(NOISES)}; got {self.noise!r}")
        if self.n_noise is not None:
            if self.noise == "clean" or self.files is not None:
                raise ValueError(f"n_noise belongs to own stories with noise; noise is {self.noise!r}, files is {self.files!r}")
            if not 1 <= self.n_noise <= MAX_NOISE:
                raise ValueError(f"n_noise is 1 to {MAX_NOISE}; got {self.n_noise}")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens is at least 1; got {self.answer_tokens}")
        self._loaded()
        if self.files is not None:
            self._rows()

    def sample(self, n: int, *, seed: int, measure: Measure = n_bytes) -> list[Question]:
        """n examples; `measure` is not used, a story is as long as it is.

        Tags: `k`, `noise`, `a`, `b` (what is b to a?), `chain` (the k relations from a to b).

        Raises:
            ValueError: n < 1; no story with so much noise.
        """
        if n < 1:
            raise ValueError(f"n, the number of examples, is at least 1; got {n}")
        rng = np.random.default_rng(seed)
        templates = self._loaded()
        if self.files is not None:
            rows = self._rows()
            order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-n // len(rows)))])[:n]
            return [self._of_row(rows[i], templates) for i in order]
        n_k = self.k_max - self.k_min + 1
        ks = rng.permutation(np.resize(rng.permutation(n_k), n)) + self.k_min
        return [self._tell(rng, k, templates) for k in ks.tolist()]

    def _loaded(self) -> dict[str, str]:
        loaded = replace_templates(self.templates, TEMPLATES, _FIELDS)
        for line in loaded["sentences"].splitlines():
            check_fields(f"templates={self.templates!r}, the sentence {line!r}", line, *_FIELDS["sentences"])
        pieces = loaded["frame"].split("{story}")
        if len(pieces) != 2 or not any(map(_asks, pieces)):
            raise ValueError(f"templates={self.templates!r}: frame holds {{story}} once, and {{a}} and {{b}} on one side of it")
        return loaded

    def _rows(self) -> list[Row]:
        rows = read_rows(str(self.files))
        found = [row for row in rows if self.k_min <= row.k <= self.k_max and row.noise == self.noise]
        if not found:
            has = ", ".join(f"{noise} k={k}" for noise, k in sorted({(row.noise, row.k) for row in rows}))
            raise ValueError(f"files={self.files!r} has no {self.noise} row with k={self.k_min} to {self.k_max}; it has {has}")
        return found

    def _of_row(self, row: Row, templates: dict[str, str]) -> Question:
        story = row.story if self.shuffle else row.clean_story
        tags = {"k": row.k, "noise": row.noise, "a": row.a, "b": row.b, "chain": row.chain}
        return Question(self._prompt(templates, story, row.a, row.b), (row.target,), tags)

    def _tell(self, rng: np.random.Generator, k: int, templates: dict[str, str]) -> Question:
        """An own story with a chain of k."""
        word = pick(rng, RELATIONS)
        n_noise = k // 2 if self.n_noise is None else self.n_noise
        story = invent(rng, word, k, noise=self.noise, n_noise=n_noise)
        order = rng.permutation(len(story.facts)) if self.shuffle else range(len(story.facts))
        sentences = templates["sentences"].splitlines()
        told = []
        for a, relation, b in (story.facts[i] for i in order):
            his = "her" if a in story.women else "his"
            told.append(pick(rng, sentences).format(a=f"[{a}]", b=f"[{b}]", relation=relation, his=his))
        chain = tuple(relation for _, relation, _ in story.facts[:k])
        tags = {"k": k, "noise": self.noise, "a": story.a, "b": story.b, "chain": chain}
        return Question(self._prompt(templates, " ".join(told), story.a, story.b), (word,), tags)

    def _prompt(self, templates: dict[str, str], story: str, a: str, b: str) -> str:
        head = templates["instruction"].format() + "\n" if self.instruction and templates["instruction"] else ""
        return head + templates["frame"].format(story=story, a=f"[{a}]", b=f"[{b}]")

    def solve(self, prompt: str) -> str:
        """The relation asked for, with a full stop, from the sentences of the prompt alone.

        Raises:
            ValueError: the prompt does not end in the question of these templates, its story has no sentence of theirs (stories
                of files), or the rules do not settle the answer.
        """
        templates = self._loaded()
        before, behind = templates["frame"].split("{story}")
        asked = re.search(_pattern(behind) + r"\Z" if _asks(behind) else _pattern(before), prompt)
        if asked is None:
            raise ValueError(f"the prompt does not ask as these templates do: ...{prompt[-80:]!r}")
        facts = []
        for line in templates["sentences"].splitlines():
            facts += [(found["a"], found["relation"], found["b"]) for found in re.finditer(_pattern(line), prompt)]
        if not facts:
            raise ValueError("the story has no sentence of these templates; stories of files have no solver")
        answers = derive(facts, asked["a"], asked["b"])
        if len(answers) != 1:
            raise ValueError(f"the story does not settle the answer: {', '.join(sorted(answers)) or 'no relation'}")
        return _as_said(next(iter(answers)), prompt)

    def score(self, said: str, question: Question) -> float:
        """1.0 where the first relation said is the right one, else 0.0."""
        return float(first_relation(said) in question.answers)

    def target(self, question: Question) -> str:
        """The relation with a full stop."""
        return _as_said(question.answers[0], question.prompt)


def _asks(template: str) -> bool:
    return {"a", "b"} <= {name for _, name, _, _ in Formatter().parse(template)}


def _pattern(template: str) -> str:
    """A pattern of the texts that a template makes, with groups for {a}, {b} and {relation}."""
    groups = {"a": r"\[(?P<a>[^\]\s]+)\]", "b": r"\[(?P<b>[^\]\s]+)\]", "relation": rf"(?P<relation>{_ANY_RELATION})"}
    parts, seen = [], set()
    for literal, name, _, _ in Formatter().parse(template):
        parts.append(re.escape(literal))
        if name == "his":
            parts.append("(?:his|her)")
        elif name is not None and name in seen:
            parts.append(f"(?P={name})" if name == "relation" else rf"\[(?P={name})\]")
        elif name is not None:
            parts.append(groups[name])
            seen.add(name)
    return "".join(parts)


def _as_said(relation: str, prompt: str) -> str:
    return ("" if prompt[-1:].isspace() else " ") + relation + "."
