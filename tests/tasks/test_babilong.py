"""BabiLong: the published metric on published predictions, the mixing law, stories against the world that made them, bad input."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from recollect.tasks.babi import ITEMS, LABELS, ROOMS, answer, choices, events, read_stories
from recollect.tasks.babi_simulation import N_FACTS, tell
from recollect.tasks.babilong import BabiLong, correct, cut_to_fit, draw_gaps, fill
from recollect.tasks.text import n_bytes

# Percent right of microsoft/Phi-3-mini-128k-instruct at 0k, 1k, 4k and 16k tokens, full prompt, as published.
GOLDEN = {
    1: {"0k": 97.0, "1k": 84.8, "4k": 69.0, "16k": 60.1},
    2: {"0k": 57.0, "1k": 38.8, "4k": 37.5, "16k": 23.1},
    3: {"0k": 32.0, "1k": 40.8, "4k": 26.9, "16k": 23.5},
    4: {"0k": 53.0, "1k": 51.2, "4k": 45.6, "16k": 46.8},
    5: {"0k": 74.0, "1k": 72.0, "4k": 69.7, "16k": 67.7},
}


def n_words(text: str) -> int:
    """A measure that is no byte count and adds up exactly: words and signs, each with the blank before it."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def context_of(prompt: str) -> str:
    return prompt.split("<context>\n")[1].split("\n</context>")[0]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder of two books whose sentences are numbered: "Book A has a sentence of number seventeen written as 17 in it." """
    folder = tmp_path / "books"
    folder.mkdir()
    for letter in "AB":
        lines = [f"Book {letter} has one sentence and its number in this place is {i} and nothing else." for i in range(400)]
        lines[7::20] = ["Too short here." for _ in lines[7::20]]
        (folder / f"{letter}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """Twelve rows of kind 1 with 2 to 13 facts."""
    path = tmp_path / "qa1.jsonl"
    rows = [
        {
            "facts": [f"Mary went to the {ROOMS[i % 6]}." for i in range(n)],
            "question": "Where is Mary?",
            "answer": ROOMS[(n - 1) % 6],
            "support": [n - 1],
        }
        for n in range(2, 14)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("length", ["0k", "1k", "4k", "16k"])
@pytest.mark.parametrize("qa", range(1, 6))
def test_metric_gives_published_score(qa: int, length: str, real_data: Callable[[str], Path]) -> None:
    """Prevents a metric that is nearly the published one: predictions of a published model must score what was published."""
    path = real_data(f"babilong_golden/qa{qa}_{length}_instruction_yes_examples_yes_post_prompt_yes.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = [correct(qa, row["output"], row["target"], row["question"]) for row in rows]
    assert len(rows) >= 100
    assert round(100 * sum(right) / len(right), 1) == GOLDEN[qa][length]


@pytest.mark.parametrize(
    ("qa", "said", "wanted", "question", "right"),
    [
        (1, " The Kitchen", "kitchen", "Where is Mary?", True),
        (1, "garden, no: kitchen.", "kitchen", "Where is Mary?", False),
        (1, "kitchen. Before that the garden.", "kitchen", "Where is Mary?", True),
        (1, "I think. kitchen", "kitchen", "Where is Mary?", False),
        (1, "kitchen <context> garden", "kitchen", "Where is Mary?", True),
        (1, "kitchen <EXAMPLE> garden", "kitchen", "Where is Mary?", True),
        (1, "kitchen Question: was it the garden", "kitchen", "Where is Mary?", False),
        (1, "bedrooms", "bedroom", "Where is Mary?", True),
        (1, "", "kitchen", "Where is Mary?", False),
        (3, "Before the garden it was in the office", "office", "Where was the milk before the garden?", True),
        (3, "Before the garden it was in the garden", "office", "Where was the milk before the garden?", False),
        (5, "Mary gave the milk to Bill", "milk", "What did Mary give to Bill?", True),
        (5, "Fred", "Fred", "Who gave the milk to Bill?", True),
        (5, "the apple", "milk", "What did Mary give to Bill?", False),
        (1, "football in the office", "office", "Where is Mary?", True),
    ],
)
def test_metric_by_hand(qa: int, said: str, wanted: str, question: str, right: bool) -> None:
    """Prevents a lost rule: first sentence only, one label only, labels of the question and of other tasks do not count."""
    assert correct(qa, said, wanted, question) is right


@pytest.mark.parametrize(("qa", "exact"), [(1, 9981), (2, 10000), (3, 1925), (4, 8520), (5, 9979)])
def test_reader_answers_real_stories(qa: int, exact: int, real_data: Callable[[str], Path]) -> None:
    """Prevents a wrong rule: answers and supporting facts of bAbI's own rows, all but the 20 of qa5 with two fitting gifts."""
    rows = read_stories(qa, str(real_data(f"babi/qa{qa}_train.jsonl")))
    found = [answer(qa, events(" ".join(row.facts)), row.question) for row in rows]
    right = [reply == row.answer for (reply, _), row in zip(found, rows, strict=True)]
    assert sum(right) == exact
    assert sum(proof == tuple(sorted(row.support)) for (_, proof), row in zip(found, rows, strict=True)) == exact
    for (reply, _), row in zip(found, rows, strict=True):
        if reply != row.answer:
            giver, receiver = re.fullmatch(r"What did (\w+) give to (\w+)\?", row.question).groups()  # type: ignore[union-attr]
            gifts = re.findall(rf"{giver} (?:gave|handed|passed) the (\w+) to {receiver}", " ".join(row.facts))
            assert {reply, row.answer} <= set(gifts)


@pytest.mark.parametrize("qa", range(1, 6))
def test_own_stories_say_what_the_world_knows(qa: int) -> None:
    """Prevents stories whose text and answer part: the answer comes from the world, the reader sees nothing but the text."""
    rng = np.random.default_rng(qa)
    told = [tell(qa, rng) for _ in range(400)]
    for story in told:
        read = events(" ".join(story.facts))
        assert len(read) == len(story.facts)
        assert answer(qa, read, story.question)[0] == story.answer
        assert story.answer in choices(qa, story.question)
        assert N_FACTS[qa][0] <= len(story.facts) <= N_FACTS[qa][1]
        assert len(story.facts) % 2 == 0
    answers = Counter(story.answer for story in told)
    assert set(answers) == set(LABELS[qa])
    if qa < 5:
        assert max(answers.values()) < 400 / 6 * 1.7
    assert len({story.facts for story in told}) > (250 if qa != 4 else 150)


def test_own_stories_are_possible() -> None:
    """Prevents magic: nobody takes what another holds or what lies elsewhere, drops what they lack, gives to one far away."""
    rng = np.random.default_rng(9)
    for story in (tell(5, rng) for _ in range(300)):
        room: dict[str, str] = {}
        holder: dict[str, str] = {}
        lies: dict[str, str] = {}
        for kind, words in events(" ".join(story.facts)):
            if kind == "move":
                assert room.get(words[0]) != words[1]
                room[words[0]] = words[1]
                continue
            person, item = words[:2]
            assert person in room
            if kind == "take":
                assert item not in holder
                assert lies.get(item, room[person]) == room[person]
                holder[item] = person
                continue
            assert holder.pop(item) == person
            if kind == "give":
                assert room[words[2]] == room[person]
                assert words[2] != person
                holder[item] = words[2]
            else:
                lies[item] = room[person]


def test_chance_is_a_uniform_guess() -> None:
    """Prevents a chance level that no guesser reaches: the mean of 1 / choices over many stories of each kind."""
    for qa in range(1, 6):
        rng = np.random.default_rng(3)
        shares = [1 / len(choices(qa, tell(qa, rng).question)) for _ in range(400)]
        assert abs(np.mean(shares) - BabiLong(qa=qa).chance) < 4 * np.std(shares) / 400**0.5 + 1e-12


def test_gaps_are_uniform_with_replacement_and_sorted() -> None:
    """Prevents facts that change order, never meet, or never stand at the very beginning or end."""
    rng = np.random.default_rng(0)
    drawn = np.array([draw_gaps(rng, 3, [10] * 4, facts_size=9) for _ in range(4000)])
    assert (np.diff(drawn, axis=1) >= 0).all()
    counts = np.bincount(drawn.ravel(), minlength=5)
    assert len(counts) == 5
    assert np.abs(counts - 2400).max() < 5 * (12000 * 0.2 * 0.8) ** 0.5
    # Three uniform draws of five: all alike in 1/25 of all cases, all different in 12/25.
    kinds = Counter(len(set(row)) for row in drawn.tolist())
    assert abs(kinds[1] / 4000 - 1 / 25) < 0.02
    assert abs(kinds[3] / 4000 - 12 / 25) < 0.04


def test_window_is_the_published_one() -> None:
    """Prevents an off-by-one at the window's ends, by a loop over the sentences as the original has it."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        sizes = rng.integers(10, 40, size=20).tolist()
        facts_size = int(rng.integers(5, 60))
        total = sum(sizes) + facts_size
        allowed, so_far = [], 0
        for i, size in enumerate(sizes):
            if so_far >= int(total * 0.25) and so_far < int(total * 0.6) - facts_size:
                allowed.append(i)
            so_far += size
        found = {gap for _ in range(30) for gap in draw_gaps(rng, 4, sizes, facts_size=facts_size, window=(0.25, 0.6))}
        assert found <= set(allowed)
        assert len(found) > len(allowed) / 2
    with pytest.raises(ValueError, match="no gap between sentences"):
        draw_gaps(rng, 2, [10, 10], facts_size=5, window=(0.5, 0.6))


def endless(sentences: list[str]) -> Iterator[list[str]]:
    while True:
        yield sentences


def test_fill_takes_consecutive_sentences_of_the_exact_length() -> None:
    """Prevents backgrounds that are short, over, out of order, or hold a sentence under 10 tokens or a stated fact."""
    text = [f"Sentence number {i} of this text has rather more than ten words in it, has it not?" for i in range(9)]
    mixed = [*text[:3], "Too short.", "Yesterday it was that Mary went to the kitchen and stayed there for long.", *text[3:]]
    for wanted in range(1, 140):
        taken = fill(endless(mixed), wanted, n_words)
        assert sum(n_words(" " + sentence) for sentence in taken) == wanted
        assert taken[:-1] == text[: len(taken) - 1]
        assert text[len(taken) - 1].startswith(taken[-1])
    assert fill(endless(mixed), 0, n_words) == []
    assert sum(n_bytes(" " + sentence) for sentence in fill(endless(mixed), 500, n_bytes)) == 500
    with pytest.raises(ValueError, match="no sentence of 10 tokens"):
        fill(endless(["Short."]), 50, n_words)


def test_cut_finds_an_exact_length_where_one_more_letter_jumps() -> None:
    """Prevents cuts that fall short where merges make sizes jump: " understand" is 1 token, " understan" 10, " understandi" 12."""

    def merged(text: str) -> int:
        return len(re.findall(r" understand(?![a-z])|[\s\S]", text))

    sentence = "We understand it, standing under a lamp, understanding nothing and understand more."
    exact = 0
    for room in range(1, merged(" " + sentence)):
        cut = cut_to_fit(sentence, room, merged)
        assert sentence.startswith(cut)
        assert merged(" " + cut) <= room
        exact += merged(" " + cut) == room
    possible = {merged(" " + sentence[:n]) for n in range(len(sentence) + 1)}
    assert exact == len(possible & set(range(1, merged(" " + sentence))))


@pytest.mark.parametrize("qa", range(1, 6))
def test_text_has_the_nominal_length_less_300(qa: int, books: Path) -> None:
    """Prevents samples that are shorter or longer than their name says."""
    task = BabiLong(qa=qa, length=1500, background=str(books))
    for question in task.sample(10, seed=qa, measure=n_words):
        assert n_words(context_of(question.prompt)) == 1500 - 300
        assert n_words(question.prompt) < 1500


def test_prompt_longer_than_300_makes_the_text_shorter() -> None:
    """Prevents prompts over the asked length for models that read bytes."""
    for question in BabiLong(qa=3, length=4000).sample(10, seed=0):
        assert 3995 <= n_bytes(question.prompt) <= 4000


def test_measure_that_does_not_add_up_stays_within_the_length() -> None:
    """Prevents prompts over the asked length where pieces measured alone are smaller than the whole."""

    def stingy(text: str) -> int:
        return n_words(text) + 2 * text.count(". ")

    for question in BabiLong(length=3000).sample(5, seed=0, measure=stingy):
        assert 2900 < stingy(question.prompt) <= 3000


def test_background_is_a_stretch_of_one_book(books: Path) -> None:
    """Prevents shuffled, repeated or skipped background sentences, and too short ones."""
    task = BabiLong(length=900, background=str(books))
    seen = Counter()
    for question in task.sample(40, seed=5, measure=n_words):
        found = re.findall(r"Book (\w) has one sentence and its number in this place is (\d+)", context_of(question.prompt))
        runs = [[int(number) for book, number in found if book == letter] for letter in "AB"]
        for run in runs:
            steps = [b - a for a, b in pairwise(run)]
            # A missing number is one of the short sentences; a passage that reaches a book's end may be followed by another.
            assert sum(step not in (1, 2) for step in steps) <= 1
        seen.update(book for book, _ in found[:1])
        assert "Too short" not in question.prompt
    assert min(seen["A"], seen["B"]) >= 8


@pytest.mark.parametrize("qa", range(1, 6))
def test_facts_are_all_there_in_order(qa: int, books: Path) -> None:
    """Prevents lost, torn or reordered facts, and depths that point elsewhere."""
    for task in (BabiLong(qa=qa, length=1200, background=str(books)), BabiLong(qa=qa)):
        for question in task.sample(20, seed=1, measure=n_words):
            context = context_of(question.prompt)
            ends = re.escape(question.tags["question"])
            assert re.search(rf"Question: {ends}\nAnswer:$", question.prompt)
            assert len(events(context)) == question.tags["n_facts"]
            starts = [round(depth * len(context)) for depth in question.tags["depths"]]
            assert starts == sorted(starts)
            assert question.tags["depth"] == question.tags["depths"][-1]
            for start, index in zip(starts, question.tags["support"], strict=True):
                assert start == 0 or context[start - 1] == " "
                assert events(context[start:])[0] == events(context)[index]
                assert len(events(context[:start])) == index


def test_window_holds_in_samples(books: Path) -> None:
    """Prevents a window that the sampler forgets."""
    for question in BabiLong(length=4000, background=str(books), window=(0.5, 0.75)).sample(20, seed=2, measure=n_words):
        assert 0.48 < question.tags["depth"] < 0.77


def test_length_zero_is_the_facts_alone(stories: Path) -> None:
    """Prevents background, or a filter, where there is none."""
    task = BabiLong(facts=str(stories))
    rows = read_stories(1, str(stories))
    asked = task.sample(len(rows), seed=0)
    assert {context_of(question.prompt) for question in asked} == {" ".join(row.facts) for row in rows}
    assert [context_of(q.prompt) for q in asked] != [" ".join(row.facts) for row in rows]
    assert task.chance == pytest.approx(1 / 6)


def test_long_stories_are_passed_over(stories: Path) -> None:
    """Prevents samples that are all facts: at most L / 8 lines, the question is one."""
    task = BabiLong(length=364, facts=str(stories))
    assert {q.tags["n_facts"] for q in task.sample(60, seed=0, measure=lambda text: n_words(text) // 2)} == set(range(2, 8))


@pytest.mark.parametrize("off", ["instruction", "examples", "answer_format"])
def test_parts_can_be_left_out(off: str) -> None:
    """Prevents a switch that does nothing or takes the wrong part."""
    full, part = BabiLong(qa=2).sample(1, seed=0)[0].prompt, BabiLong(qa=2, **{off: False}).sample(1, seed=0)[0].prompt
    alone = (
        BabiLong(qa=2, **dict.fromkeys({"instruction", "examples", "answer_format"} - {off}, False)).sample(1, seed=0)[0].prompt
    )
    bare = BabiLong(qa=2, instruction=False, examples=False, answer_format=False).sample(1, seed=0)[0].prompt
    assert bare.startswith("<context>\n")
    assert alone.endswith(bare)
    removed = alone.removesuffix(bare)
    assert removed in full
    assert full.replace(removed, "") == part


def test_default_prompts_fit_into_what_is_set_aside() -> None:
    """Prevents wording that grows over the 300 tokens: 250 words and signs leave room for words of several tokens."""
    for qa in range(1, 6):
        for question in BabiLong(qa=qa).sample(20, seed=0):
            assert n_words(question.prompt) - n_words(context_of(question.prompt)) <= 250


def test_examples_name_nothing_of_the_stories() -> None:
    """Prevents worked examples that answer or contradict the question."""
    for qa in range(1, 6):
        head = BabiLong(qa=qa).sample(1, seed=0)[0].prompt.split("<context>")[0]
        assert events(head) == []
        assert not [word for word in (*ROOMS, *ITEMS, *LABELS[5], "John", "Sandra", "Daniel") if word in head]


def test_templates_come_from_a_file(tmp_path: Path) -> None:
    """Prevents a file that is read but not used, and prompts that the solver then cannot read."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"instruction": "Read {{this}}.", "frame": "{context}\n\nQ: {question}\nA: "}))
    task = BabiLong(qa=5, templates=str(path), examples=False, answer_format=False)
    for question in task.sample(30, seed=0):
        assert question.prompt.startswith("Read {this}.\n")
        assert task.target(question) == f"{question.answers[0]}."
        assert task.score(task.solve(question.prompt), question) == 1


@pytest.mark.parametrize("qa", range(1, 6))
def test_real_rows_in_real_books(qa: int, real_data: Callable[[str], Path]) -> None:
    """Prevents book text that the solver takes for facts, and questions of real rows that it takes for facts."""
    facts, folder = real_data(f"babi/qa{qa}_train.jsonl"), real_data("pg19")
    task = BabiLong(qa=qa, length=2000, facts=str(facts), background=str(folder))
    asked = task.sample(60, seed=qa, measure=n_words)
    assert all(n_words(context_of(question.prompt)) == 1700 for question in asked)
    assert sum(task.score(task.solve(question.prompt), question) for question in asked) >= 60 - (qa == 5)


def test_bad_files_are_named(tmp_path: Path, stories: Path) -> None:
    """Prevents stack traces about keys where a file is missing, empty, of another form or of another task."""
    cases = {
        "not json": ('{"facts": [', "line 1: not a row"),
        "no question": ('{"facts": ["Mary went to the office."], "answer": "office"}', "line 1: not a row"),
        "support": ('{"facts": ["a."], "question": "Where is Mary?", "answer": "office", "support": [1]}', "support"),
        "other task": ('{"facts": ["a."], "question": "Is Mary here?", "answer": "yes", "support": [0]}', "no label of qa1"),
        "empty": ("\n", "has no rows"),
    }
    for name, (text, message) in cases.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            BabiLong(facts=str(path))
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="cannot read the facts file"):
        BabiLong(facts=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        BabiLong(background=str(tmp_path / "none"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*\.txt file"):
        BabiLong(background=str(tmp_path / "bare"))
    (tmp_path / "bare" / "latin.txt").write_bytes(b"\xe9" * 50)
    with pytest.raises(ValueError, match=r"latin\.txt.* cannot be read"):
        BabiLong(background=str(tmp_path / "bare"), length=3000).sample(1, seed=0)
    path = tmp_path / "templates.json"
    for text, message in [("{", "not JSON"), ('{"frmae": "x"}', "unknown name"), ('{"frame": "{context}"}', "lacks the field")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            BabiLong(templates=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qa": 6}, "qa is 1 to 5"),
        ({"length": -1}, "length is at least 0"),
        ({"window": (0.5, 0.5), "length": 4000}, "window is"),
        ({"window": (0.2, 0.5)}, "length=0 has none"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    """Prevents options that silently mean something else."""
    with pytest.raises(ValueError, match=message):
        BabiLong(**options)


def test_impossible_lengths_are_refused(stories: Path, tmp_path: Path) -> None:
    """Prevents endless loops: no room beside the prompt, no story short enough, a window without a gap."""
    with pytest.raises(ValueError, match="leaves no room"):
        BabiLong(length=300).sample(1, seed=0, measure=n_words)
    with pytest.raises(ValueError, match=r"none of 24 stories of qa1 fits length=320"):
        BabiLong(length=320, facts=str(stories)).sample(1, seed=0, measure=n_words)
    long = tmp_path / "long.txt"
    long.write_text(("Now " + "on and " * 900 + "on. ") * 9)
    task = BabiLong(length=2000, window=(0.5, 0.6), facts=str(stories), background=str(long))
    with pytest.raises(ValueError, match="no gap between sentences"):
        task.sample(1, seed=0, measure=n_words)
    with pytest.raises(ValueError, match="n, the number of examples"):
        BabiLong().sample(0, seed=0)
