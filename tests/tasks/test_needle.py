"""Needle tasks against their definition: prompts are taken apart here, by hand, never by the solver or the writer."""

from __future__ import annotations

import json
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.tasks.haystack import split_sentences
from recollect.tasks.needle import RULER, S_NIAH, Needles, Ruler, string_match_all
from recollect.tasks.needle_words import ADJECTIVES, CITIES, NEEDLES_TEMPLATES, NOUNS, RULER_TEMPLATES, join_keys, split_keys
from recollect.tasks.text import Question, n_bytes

PUBLISHED_DEPTHS = np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()
TOLD = re.compile(r"One of the secret (numbers|words|uuids) kept under (\S+) reads: (\S+)\.")
LUCKY = re.compile(r"The lucky number of ([^.]+) is (\d+)\.")
VALUES = {"numbers": r"[1-9]\d{6}", "words": r"[a-z]+-[a-z]+", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


def n_words(text: str) -> int:
    return len(text.split())


def context_of(prompt: str, end: str) -> str:
    return prompt[prompt.index("\n") + 1 : prompt.rindex(end)]


def ruler_parts(prompt: str) -> tuple[str, list[str]]:
    """The context and the keys asked for."""
    context = context_of(prompt, "\nWhich secret ")
    asked = re.search(r"kept under ((?:(?! kept under ).)*) in the text above (?:is|are)\Z", prompt)
    assert asked is not None
    return context, [key.removeprefix("and ") for key in asked[1].split(", ")]


def check_essay(task: Ruler, context: str, tags: dict[str, Any], sentences: Callable[[int], list[str]]) -> None:
    """Needles stand at different published depths, in front of sentence int(n depth / 100) of the first N words.

    Raises:
        AssertionError: they do not.
    """
    plain = sentences(tags["n_haystack"])
    stripped = " ".join(TOLD.sub("", context).split())
    assert stripped == " ".join(plain)
    starts = np.cumsum([0] + [len(sentence) + 1 for sentence in plain])
    gaps = []
    for told in TOLD.finditer(context):
        before = " ".join(TOLD.sub("", context[: told.start()]).split())
        gaps.append(int(np.searchsorted(starts, len(before) + 1 if before else 0)))
        assert starts[gaps[-1]] == (len(before) + 1 if before else 0)
    at_depth = {depth: int(len(plain) * (depth / 100)) for depth in PUBLISHED_DEPTHS}
    free = Counter(at_depth.values())
    assert all(count <= free[gap] for gap, count in Counter(gaps).items())
    assert gaps == sorted(gaps)


def check_lines(task: Ruler, context: str, tags: dict[str, Any], keys: list[str]) -> None:
    """The haystack is N lines; needles are lines of their own, each before a haystack line of its own.

    Raises:
        AssertionError: it is not.
    """
    lines = context.split("\n")
    own = [TOLD.fullmatch(line) is not None and TOLD.fullmatch(line)[2] in keys for line in lines]
    assert len(lines) - sum(own) == tags["n_haystack"]
    assert not own[-1]
    assert not any(a and b for a, b in pairwise(own))
    hay = [line for line, needle in zip(lines, own, strict=True) if not needle]
    if task.haystack == "noise":
        assert set(hay) == {RULER_TEMPLATES["noise"]}
    else:
        assert all(TOLD.fullmatch(line) for line in hay)


def check_ruler(task: Ruler, question: Question, measure: Callable[[str], int] = n_bytes) -> None:
    """One sample obeys the definition.

    Raises:
        AssertionError: it does not.
    """
    context, asked = ruler_parts(question.prompt)
    told = [match.groups() for match in TOLD.finditer(context)]
    assert {kinds for kinds, _, _ in told} == {task.values}
    assert all(re.fullmatch(VALUES[task.keys], key) and re.fullmatch(VALUES[task.values], value) for _, key, value in told)
    assert len(told) == question.tags["n_needles"]
    assert len(asked) == len(set(asked)) == task.n_queries
    assert question.answers == tuple(value for query in asked for _, key, value in told if key == query)
    assert len(question.answers) == len(set(question.answers)) == task.n_queries * task.n_values
    assert question.tags["size"] == measure(question.prompt)
    assert question.tags["size"] + task.answer_tokens <= task.length == question.tags["length"]
    if task.haystack == "essay":
        assert sorted(Counter(key for _, key, _ in told).values()) == [task.n_values] * task.n_keys
        words = " ".join(OWN_TEXT).split()
        check_essay(task, context, question.tags, lambda n: re.split(r"(?<=[.?!]) (?=[A-Z])", " ".join(words[:n])))
    elif task.n_queries == task.n_keys:
        check_lines(task, context, question.tags, asked)


# The own essay, got from a sample whose needle is taken out again.
OWN_TEXT = [TOLD.sub("", ruler_parts(Ruler(haystack="essay", length=300_000).sample(1, seed=5)[0].prompt)[0])]


@pytest.mark.parametrize("length", [900, 2500, 9000])
@pytest.mark.parametrize("name", RULER)
def test_ruler_obeys_its_definition(name: str, length: int) -> None:
    """Wrong needles, answers, places or lengths: everything that makes a number incomparable with the published ones."""
    task = Ruler(**RULER[name], length=length)
    for question in task.sample(40, seed=3):
        check_ruler(task, question)
        assert task.solve(question.prompt) == task.target(question)
        assert task.score(task.target(question), question) == 1
    words = Ruler(**RULER[name], length=length // 2)
    for question in words.sample(10, seed=3, measure=n_words):
        check_ruler(words, question, n_words)


@pytest.mark.parametrize(
    "options",
    [
        {"haystack": "noise", "n_keys": 5, "n_queries": 5, "n_values": 2},
        {"haystack": "noise", "keys": "numbers", "values": "words", "n_keys": 2, "n_queries": 2},
        {"haystack": "essay", "n_keys": 10, "n_values": 4, "n_queries": 2, "keys": "uuids"},
        {"haystack": "needle", "n_keys": 3, "n_queries": 3},
    ],
)
def test_ruler_obeys_its_definition_for_unnamed_options(options: dict[str, Any]) -> None:
    """Options that no published name uses must not fall back on those of the names."""
    task = Ruler(**options, length=5000, answer_tokens=300)
    for question in task.sample(40, seed=4):
        check_ruler(task, question)
        assert task.solve(question.prompt) == task.target(question)


def test_ruler_names_have_the_published_options() -> None:
    """A slip in this table gives a result under the wrong name. Columns: haystack, keys, values, n_keys, n_values, n_queries."""
    published = {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_single_words": ("essay", "words", "words", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }
    built = {name: Ruler(**options) for name, options in RULER.items()}
    assert published == {
        name: (task.haystack, task.keys, task.values, task.n_keys, task.n_values, task.n_queries)
        for name, task in built.items()
    }
    assert {task.answer_tokens for task in built.values()} == {128}
    assert {name for names in S_NIAH.values() for name in names} <= set(RULER)


def within(counts: Counter, n: int, outcomes: int) -> bool:
    """Counts of n draws agree with a uniform law over so many outcomes: chi-square within 6 sigma of its mean."""
    expected = n / outcomes
    chi = sum((counts[outcome] - expected) ** 2 / expected for outcome in counts) + expected * (outcomes - len(counts))
    return len(counts) <= outcomes and abs(chi - (outcomes - 1)) < 6 * np.sqrt(2 * (outcomes - 1))


def test_ruler_essay_depths_are_uniform_over_forty() -> None:
    """Depths drawn from 0..99, or needles always in the first half, would favour one model over another."""
    made = Ruler(haystack="essay", length=700).sample(2000, seed=0)
    counts = Counter(question.tags["depth"] for question in made)
    assert set(counts) == set(PUBLISHED_DEPTHS)
    assert within(counts, 2000, 40)


def test_ruler_noise_places_are_uniform_over_the_lines() -> None:
    """`before a uniform line` includes the first and the last line, and never the end; rank them without the tags."""
    task = Ruler(haystack="noise", values="uuids", keys="uuids", length=2400)
    made = task.sample(3000, seed=0)
    lines = made[0].tags["n_haystack"]
    assert {question.tags["n_haystack"] for question in made} == {lines}
    places = Counter()
    for question in made:
        context, _ = ruler_parts(question.prompt)
        place = [TOLD.fullmatch(line) is not None for line in context.split("\n")].index(True)
        assert question.tags["depth"] == round(100 * place / lines)
        places[place] += 1
    assert set(places) == set(range(lines))
    assert within(places, 3000, lines)


def test_ruler_asks_for_any_needle() -> None:
    """If the needle asked for stood always first, "say the first value" would pass multikey; likewise for the order of queries."""
    task = Ruler(**RULER["niah_multikey_1"], length=1200)
    ranks, n = Counter(), 2000
    for question in task.sample(n, seed=0):
        context, asked = ruler_parts(question.prompt)
        ranks[[key for _, key, _ in TOLD.findall(context)].index(asked[0])] += 1
    assert within(ranks, n, 4)
    pairs = Counter()
    for question in Ruler(haystack="noise", n_keys=2, n_values=2, length=1500).sample(n, seed=0):
        context, asked = ruler_parts(question.prompt)
        pairs[tuple(key == asked[0] for _, key, _ in TOLD.findall(context))] += 1
    assert within(pairs, n, 6)
    orders = Counter()
    for question in Ruler(**RULER["niah_multiquery"], length=1200).sample(n, seed=0):
        context, asked = ruler_parts(question.prompt)
        orders[tuple(asked.index(key) for _, key, _ in TOLD.findall(context))] += 1
    assert within(orders, n, 24)


def test_ruler_depth_tags_say_where_the_answers_stand() -> None:
    """A heat map by depth is built on this tag; in a multi-key task it must be the depth of the needle that is asked for."""
    task = Ruler(haystack="essay", n_keys=4, n_queries=2, n_values=2, length=4000)
    for question in task.sample(50, seed=0):
        context, _ = ruler_parts(question.prompt)
        order = [value for _, _, value in TOLD.findall(context)]
        by_place = [
            depth for _, depth in sorted(zip((order.index(a) for a in question.answers), question.tags["depths"], strict=True))
        ]
        assert by_place == sorted(by_place)
        assert question.tags["depth"] == question.tags["depths"][0]
        for answer, depth in zip(question.answers, question.tags["depths"], strict=True):
            assert depth in PUBLISHED_DEPTHS
            share = context.index(answer) / len(context)
            assert abs(share - depth / 100) < 0.2


def test_ruler_values_follow_their_laws() -> None:
    """Numbers must span all seven digits, UUIDs be version 4, words use the whole lists."""
    numbers = [int(q.answers[0]) for q in Ruler(length=600).sample(2000, seed=0)]
    assert min(numbers) < 1_050_000
    assert 9_950_000 < max(numbers) < 10_000_000
    assert abs(np.mean(numbers) - 5_500_000) < 6 * 2_598_076 / np.sqrt(2000)
    uuids = [uuid.UUID(q.answers[0]) for q in Ruler(length=600, values="uuids").sample(500, seed=0)]
    assert {u.version for u in uuids} == {4}
    assert len(set(uuids)) == 500
    words = [q.answers[0].split("-") for q in Ruler(length=600, values="words").sample(3000, seed=0)]
    assert {a for a, _ in words} == set(ADJECTIVES)
    assert {b for _, b in words} == set(NOUNS)


def test_ruler_length_is_the_longest_that_fits() -> None:
    """A search that stops early tests a shorter context than its name says. Equal sizes: one more line must not fit."""
    for length in (1024, 4096, 16_000):
        task = Ruler(keys="uuids", values="uuids", length=length)
        sizes = {question.tags["size"] for question in task.sample(5, seed=1)}
        line = len(RULER_TEMPLATES["noise"]) + 1
        assert len(sizes) == 1
        assert length - 128 - line < sizes.pop() <= length - 128


@pytest.mark.parametrize(
    ("options", "length", "step"),
    [
        ({"haystack": "essay"}, 40_000, 500),
        ({"haystack": "noise"}, 16_000, 25),
        ({"haystack": "noise"}, 4_090, 5),
        ({"haystack": "needle"}, 16_000, 25),
        ({"haystack": "needle"}, 4_095, 5),
    ],
)
def test_ruler_gives_up_published_steps(options: dict[str, Any], length: int, step: int) -> None:
    """RULER's samples that overflow lose a fixed amount of hay; a finer step would give longer samples than RULER's."""
    # Half of the samples overflow if the first one of seed 0, on which N is found, fills its length to the last byte.
    full = Ruler(**options, length=length).sample(1, seed=0)[0].tags["size"] + 128
    made = Ruler(**options, length=full).sample(60, seed=2)
    units = sorted({question.tags["n_haystack"] for question in made})
    assert len(units) > 1
    assert set(np.diff(units).tolist()) == {step}


def test_ruler_short_texts_give_up_a_quarter_at_most() -> None:
    """RULER's steps of 500 words would empty a text of 100 words, or never end."""
    made = Ruler(haystack="essay", length=1200).sample(200, seed=2)
    units = sorted({question.tags["n_haystack"] for question in made})
    assert len(units) > 1
    assert all(4 * (b - a) <= b for a, b in pairwise(units))


def test_string_match_all_by_hand() -> None:
    """The metric is a share, blind to case, and neither needs an order nor stops at a full stop."""
    assert string_match_all(" 12 and 34.", ("12", "34")) == 1
    assert string_match_all("34. Then 12", ("12", "34")) == 1
    assert string_match_all(" CALM-harp", ("calm-harp", "x", "Y", "z")) == 0.25
    assert string_match_all("x123y", ("123",)) == 1
    assert string_match_all("", ("1", "2")) == 0


def blind(prompt: str, told: re.Pattern[str], n: int, draw: random.Random) -> str:
    """n different values of the text, picked without reading the question."""
    return " " + ", ".join(draw.sample([match[-1] for match in told.findall(prompt)], n)) + "."


@pytest.mark.parametrize(
    "task",
    [
        Ruler(**RULER["niah_multikey_1"], length=1200),
        Ruler(haystack="noise", n_keys=5, n_queries=2, n_values=2, length=2500),
        Needles(n_needles=2, length=900),
        Needles(n_needles=6, length=900, placing="spread", n_digits=3),
    ],
    ids=["multikey", "five keys", "two cities", "six cities"],
)
def test_needle_chance_is_what_a_blind_reader_scores(task: Ruler | Needles) -> None:
    """A floor that is too low makes a model that copies any needle look as if it could read."""
    draw = random.Random(0)
    made = task.sample(1500, seed=6)
    told = TOLD if isinstance(task, Ruler) else LUCKY
    scores = [task.score(blind(question.prompt, told, len(question.answers), draw), question) for question in made]
    assert abs(np.mean(scores) - task.chance) < 5 * np.std(scores) / np.sqrt(len(scores))
    assert 0 < task.chance < 1


def test_ruler_chance_is_zero_where_there_is_no_choice() -> None:
    """One needle, all asked for: reporting a floor of 1 would hide every result."""
    floors = {name: Ruler(**options).chance for name, options in RULER.items()}
    assert floors.pop("niah_multikey_1") == 0.25
    assert set(floors.values()) == {0.0}


def test_ruler_question_has_one_answer_among_crowded_keys(tmp_path: Path) -> None:
    """With few words the distractors of a "needle" haystack would repeat the asked key with another value."""
    (tmp_path / "a.txt").write_text("red\nblue\n\n red \nad hoc\n")
    (tmp_path / "n.txt").write_text("boat\nhouse\n")
    files = {"adjectives": str(tmp_path / "a.txt"), "nouns": str(tmp_path / "n.txt")}
    task = Ruler(haystack="needle", n_keys=4, n_queries=2, length=3000, **files)
    for question in task.sample(50, seed=0):
        told = re.findall(r"kept under (.+) reads: (\d+)\.", question.prompt)
        assert {key for key, _ in told} <= {f"{a}-{n}" for a in ("red", "blue", "ad hoc") for n in ("boat", "house")}
        assert len(told) > 20
        asked = question.prompt.split(" kept under ")[-1].removesuffix(" in the text above are").split(", and ")
        assert question.answers == tuple(dict(told)[key] for key in asked)
        assert sum(key in asked for key, _ in told) == 2
        assert task.solve(question.prompt) == task.target(question)
    with pytest.raises(ValueError, match="3 adjectives and 2 nouns make too few words for 6 needles"):
        Ruler(n_keys=6, **files)


def test_ruler_with_the_published_words(real_data: Callable[[str], Path]) -> None:
    """The published lists have words with blanks, hyphens and accents; a pattern of plain letters would lose them."""
    files = {
        "adjectives": str(real_data("niah/wonderwords_adjectivelist.txt")),
        "nouns": str(real_data("niah/wonderwords_nounlist.txt")),
    }
    for name in ("niah_multikey_2", "niah_multiquery", "niah_single_words"):
        task = Ruler(**RULER[name], length=30_000, **files)
        for question in task.sample(40, seed=0):
            assert task.solve(question.prompt) == task.target(question)


def test_needle_tasks_on_a_book(real_data: Callable[[str], Path]) -> None:
    """Real text has quotes, headings and odd characters; without its needles the context must be the book's first words."""
    path = real_data("pg19/10006.txt")
    words = path.read_text(encoding="utf-8").split()
    ruler = Ruler(haystack="essay", text=str(path), length=30_000)
    cities = Needles(n_needles=10, text=str(path), length=4096)
    for question in ruler.sample(20, seed=0):
        context, _ = ruler_parts(question.prompt)
        check_essay(ruler, context, question.tags, lambda n: split_sentences(" ".join(words[:n])))
        assert ruler.solve(question.prompt) == ruler.target(question)
    for question in cities.sample(20, seed=0):
        context = question.prompt[: question.prompt.index("\n\nWhat is")]
        assert LUCKY.sub("", context).split() == words[: question.tags["n_haystack"]]
        assert cities.solve(question.prompt) == cities.target(question)


@pytest.mark.parametrize(
    "make", [lambda start: Ruler(haystack="essay", start=start, length=900), lambda start: Needles(start=start)]
)
def test_needle_start_chooses_the_text(make: Callable[[str], Ruler | Needles]) -> None:
    """ "first" is one text for all samples, as published; "random" must begin with a sentence, and not always with the same."""

    def openings(start: str) -> set[str]:
        contexts = [q.prompt.split("\n")[0 if isinstance(make(start), Needles) else 1] for q in make(start).sample(40, seed=0)]
        return {" ".join(LUCKY.sub("", TOLD.sub("", context)).split())[:50] for context in contexts}

    assert len(openings("first")) == 1
    assert len(openings("random")) > 35
    assert all(text[0].isupper() for text in openings("random"))


def city_parts(prompt: str) -> tuple[list[str], list[tuple[str, str, int]], str]:
    """The haystack's sentences, (city, number, sentences before it) in order, and the city asked for."""
    context, question = prompt.split("\n\n")
    told = [
        (match[1], match[2], len(re.findall(r"[.?!](?= |$)", LUCKY.sub("", context[: match.start()]))))
        for match in LUCKY.finditer(context)
    ]
    asked = re.fullmatch(r"What is the lucky number of (.+)\? The lucky number of \1 is", question)
    assert asked is not None
    return re.split(r"(?<=[.?!]) +(?=[A-Z])", " ".join(LUCKY.sub("", context).split())), told, asked[1]


@pytest.mark.parametrize("placing", ["asked", "spread"])
@pytest.mark.parametrize("n_needles", [1, 2, 4, 6, 10])
def test_needles_obeys_its_definition(n_needles: int, placing: str) -> None:
    """Wrong counts, a number told twice, or a needle off its depth would spoil the heat map of depth by length."""
    task = Needles(n_needles=n_needles, placing=placing, length=3000)
    made = task.sample(100, seed=1)
    assert [question.tags["depth"] for question in made] == [0, 25, 50, 75, 100] * 20
    for question in made:
        sentences, told, asked = city_parts(question.prompt)
        depth = question.tags["depth"]
        assert len(told) == len({city for city, _, _ in told}) == len({number for _, number, _ in told}) == n_needles
        assert {city for city, _, _ in told} <= set(CITIES)
        assert {number for _, number, _ in told} <= set("0123456789")
        assert question.answers == tuple(number for city, number, _ in told if city == asked)
        assert [city for city, _, _ in told].index(asked) == question.tags["rank"]
        before = [gap for _, _, gap in told]
        if placing == "asked":
            assert before[question.tags["rank"]] in (gap_of(depth, sentences), last_gap(depth, sentences))
        else:
            slots = [depth + i * (100 - depth) / n_needles for i in range(n_needles)]
            assert all(abs(gap - len(sentences) * slot / 100) <= 1 + 1e-9 for gap, slot in zip(before, slots, strict=True))
        assert question.tags["size"] == n_bytes(question.prompt) <= 3000 - 16
        assert task.solve(question.prompt) == task.target(question) == f" {question.answers[0]}."
        assert task.score(task.target(question), question) == 1


def gap_of(depth: float, sentences: list[str]) -> int:
    return int(len(sentences) * depth / 100)


def last_gap(depth: float, sentences: list[str]) -> int:
    """Sentence ends before the end of the text: the last sentence is cut and has no full stop."""
    return len(sentences) - 1 if depth == 100 and sentences[-1][-1] not in ".?!" else gap_of(depth, sentences)


def test_needles_order_is_shuffled() -> None:
    """In one fixed order of needles the model could learn the place instead of the city."""
    spread = Counter(q.tags["rank"] for q in Needles(n_needles=6, placing="spread", length=1200).sample(3000, seed=0))
    assert within(spread, 3000, 6)
    asked = Counter(q.tags["rank"] for q in Needles(n_needles=6, depths=(50,), length=6000).sample(1000, seed=0))
    # The rank at half depth is binomial: each of the five others stands before it or not.
    assert abs(sum(rank * count for rank, count in asked.items()) / 1000 - 2.5) < 0.3
    assert set(asked) == set(range(6))
    ends = Needles(n_needles=6, depths=(0, 100), length=12_000).sample(200, seed=0)
    assert np.mean([question.tags["rank"] for question in ends[::2]]) < 0.1
    assert np.mean([question.tags["rank"] for question in ends[1::2]]) > 4.9


def test_needles_other_places_are_uniform() -> None:
    """Distractors that avoided an end, or clung to the answer, would make some depths easier."""
    places = []
    for question in Needles(n_needles=4, depths=(50,), length=6000).sample(1000, seed=0):
        sentences, told, asked = city_parts(question.prompt)
        places += [gap / len(sentences) for city, _, gap in told if city != asked]
    assert abs(np.mean(places) - 0.5) < 0.03
    assert within(Counter(min(4, int(5 * place)) for place in places), len(places), 5)


def test_needles_fill_the_window() -> None:
    """A sample that gave up RULER's 500 words would stand in the wrong column of the heat map."""
    for length, measure, slack in ((2048, n_bytes, 150), (1500, n_words, 12)):
        sizes = [q.tags["size"] for q in Needles(n_needles=6, length=length).sample(200, seed=0, measure=measure)]
        assert length - 16 - slack < min(sizes) <= max(sizes) <= length - 16


def test_needles_score_reads_the_first_number_only() -> None:
    """A model that lists all digits, or runs on with other cities, contains every one-digit answer."""
    task = Needles()
    question = Question("", ("8",), {})
    assert [task.score(said, question) for said in (" 8.", " 8", "8\n7", ": 8, not 7")] == [1, 1, 1, 1]
    assert [task.score(said, question) for said in ("", " 18.", " 88", "0 1 2 3 4 5 6 7 8", "seven")] == [0] * 5


def test_needles_numbers_have_the_digits_asked_for() -> None:
    """A leading zero, or a range that ends early, would make numbers of another length."""
    for n_digits, low, high in ((1, 0, 9), (2, 10, 99), (7, 1_000_000, 9_999_999)):
        made = Needles(n_needles=6, n_digits=n_digits, length=700).sample(600, seed=0)
        numbers = [int(number) for question in made for _, number, _ in city_parts(question.prompt)[1]]
        assert low <= min(numbers) <= low + (high - low) // 50
        assert high - (high - low) // 50 <= max(numbers) <= high


def own_templates(path: Path, **templates: str) -> str:
    path.write_text(json.dumps(templates))
    return str(path)


def test_templates_of_a_file_replace_the_wording(tmp_path: Path) -> None:
    """Users bring the literal wording of a paper; every part must come from the file, and the solver must follow."""
    path = own_templates(
        tmp_path / "ruler.json",
        needle="Remember {{{kind}}} ({key}) -> {value}!",
        noise="Tick. Tock.",
        one="Q?\n{context}\n[{query}] {kind} of {query}:",
        many="Qs?\n{context}\n{kinds} of {query} are",
    )
    task = Ruler(templates=path, length=500)
    question = task.sample(1, seed=0)[0]
    key = question.prompt.split("number of ")[1][:-1]
    lines = question.prompt.split("\n")
    assert lines[0] == "Q?"
    assert set(lines[1:-1]) == {"Tick. Tock.", f"Remember {{number}} ({key}) -> {question.answers[0]}!"}
    assert lines[-1] == f"[{key}] number of {key}:"
    assert task.solve(question.prompt) == f" {question.answers[0]}."
    many = Ruler(templates=path, length=5000, n_keys=3, n_queries=2, n_values=2)
    for question in many.sample(20, seed=0):
        assert many.solve(question.prompt) == many.target(question)
    cities = Needles(n_needles=3, templates=own_templates(tmp_path / "cities.json", needle="[{value} <- {key};"))
    for question in cities.sample(20, seed=0):
        assert re.search(r"\[\d <- [^;]+;", question.prompt)
        assert cities.solve(question.prompt) == cities.target(question)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ('{"needle": "{key} is"}', r"'needle' lacks the field {value}"),
        ('{"needle": "The {key} is {value}"}', "must have text before, between and behind its fields"),
        ('{"needle": "{key} is {value}."}', "must have text before, between and behind its fields"),
        ('{"needle": "The {key}{value}."}', "must have text before, between and behind its fields"),
        ('{"needle": "{key} is {value} {colour}."}', r"unknown field {colour} (known: key, kind, kinds, value)"),
        ('{"one": "{query}? {context} Well:"}', "must hold {context} once, and {query} behind it"),
        ('{"one": "{context} {query} {context}?"}', "must hold {context} once"),
        ('{"one": "{context} {query!r}"}', "a field is a name in braces and nothing else"),
        ('{"one": "{context} {query} {"}', "write {{ and }} for braces that are not fields"),
        ('{"neddle": "x"}', "unknown name 'neddle'; known: needle, noise, one, many"),
        ('["needle"]', "must be one JSON object of strings"),
        ('{"needle": 3}', "must be one JSON object of strings"),
        ("{needle", "is not JSON"),
    ],
)
def test_templates_that_cannot_work_are_refused(tmp_path: Path, templates: str, message: str) -> None:
    """A template without its fields would make samples that nobody, not even the solver, can answer."""
    (tmp_path / "t.json").write_text(templates)
    with pytest.raises(ValueError, match=re.escape(message)):
        Ruler(templates=str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ruler(haystack="hay"), "haystack is one of noise, essay, needle; got 'hay'"),
        (lambda: Ruler(values="number"), "values is one of numbers, words, uuids; got 'number'"),
        (lambda: Ruler(n_queries=2), "n_queries is 1 to n_keys; got n_keys=1"),
        (lambda: Ruler(n_keys=0), "n_keys and n_values are at least 1"),
        (lambda: Ruler(haystack="essay", n_keys=7, n_values=6), "an essay has 40 depths for needles; .* asks for 42"),
        (lambda: Ruler(text="essay.txt"), "text and start belong to haystack='essay'; haystack is 'noise'"),
        (lambda: Ruler(haystack="essay", text="/no/essay.txt"), "text='/no/essay.txt' cannot be read"),
        (lambda: Ruler(nouns="/no/nouns.txt"), "nouns='/no/nouns.txt' cannot be read"),
        (lambda: Ruler(length=250).sample(1, seed=0), "length=250 with answer_tokens=128: .*; raise length"),
        (lambda: Ruler(values="uuids", n_values=4).sample(1, seed=0), "raise answer_tokens=128"),
        (lambda: Ruler().sample(0, seed=0), "at least 1; got 0"),
        (lambda: Ruler().solve("Where is it?"), "does not end with this task's question"),
        (
            lambda: Needles().solve("x\n\nWhat is the lucky number of Rome? The lucky number of Rome is"),
            "tells of 'Rome'; .* nothing",
        ),
        (lambda: Needles(n_needles=11), "n_needles is 1 to 10 with 10 numbers of n_digits=1"),
        (lambda: Needles(n_needles=0), "n_needles is 1 to 10"),
        (lambda: Needles(n_digits=0), "n_digits is 1 to 18; got 0"),
        (lambda: Needles(depths=()), "depths are percentages"),
        (lambda: Needles(depths=(101,)), "depths are percentages"),
        (lambda: Needles(placing="here"), "placing is one of asked, spread"),
        (lambda: Needles(length=60).sample(1, seed=0), "length=60 with answer_tokens=16"),
    ],
)
def test_needle_options_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    """A slip in an option needs one clear sentence, not a traceback from the depths or samples that mean nothing."""
    with pytest.raises(ValueError, match=message):
        make()


def test_word_files_that_cannot_work_are_refused(tmp_path: Path) -> None:
    """A city with a full stop would end its needle early; an empty list has nothing to draw from."""
    (tmp_path / "cities.txt").write_text("Rome\nSt. Louis\n")
    with pytest.raises(ValueError, match=r"cities='.*cities.txt' has the line 'St. Louis'; a word holds no full stop"):
        Needles(cities=str(tmp_path / "cities.txt"))
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"cities='.*none.txt' holds no words"):
        Needles(cities=str(tmp_path / "none.txt"))
    (tmp_path / "two.txt").write_text("New York\nRome\n")
    task = Needles(cities=str(tmp_path / "two.txt"))
    assert {city for q in task.sample(20, seed=0) for city, _, _ in city_parts(q.prompt)[1]} == {"New York", "Rome"}
    with pytest.raises(ValueError, match="n_needles is 1 to 2 with 10 numbers of n_digits=1 and 2 cities; got 3"):
        Needles(n_needles=3, cities=str(tmp_path / "two.txt"))


def test_own_words_are_plain_and_many() -> None:
    """Doubled words would skew the law; a word with a hyphen would make two pairs alike."""
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 64
        assert all(re.fullmatch(r"[a-z]+", word) for word in words)
    assert len(set(CITIES)) == len(CITIES) >= 40
    assert not set(NEEDLES_TEMPLATES) - {"needle", "one"}


@pytest.mark.parametrize("keys", [["a-b"], ["a-b", "c d-e"], ["a", "b", "and-c"]])
def test_split_keys_inverts_join_keys(keys: list[str]) -> None:
    """A list of two or of three keys has its "and" in another place; the solver must find all of them."""
    assert split_keys(join_keys(keys)) == keys
    assert join_keys(["a", "b", "c"]) == "a, b, and c"
