"""Haystacks: sentences against texts cut by hand, essays against plain list arithmetic, lengths against a linear search."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recollect.tasks.haystack import (
    DEPTHS,
    fill,
    gap_at,
    grammar_sentences,
    insert,
    most_units,
    read_essay,
    split_sentences,
)
from recollect.tasks.text import Question, n_bytes

CUT_BY_HAND = [
    ["One is here.", "Two is there!", "Is it three?", "Yes."],
    ["She said “no.”", "He left."],
    ['"Go!" she said.', '"Why?" he asked.'],
    ['He asked "Why?"', "Nobody spoke."],
    ["Mr. Smith met Dr. J. Brown at 3.5 miles from St. Mary, e.g. on foot.", "They spoke."],
    ["It cost 3. 50 pieces were sold.", "(Nobody knew.)", "Then he left."],
    ["no capital here. so this is one.", "And this is two..."],
    ["It ended .", "The next one began ."],
    ["Élan is a word.", "École is another one."],
    ["a text without an end"],
]


@pytest.mark.parametrize("sentences", CUT_BY_HAND, ids=lambda sentences: sentences[0][:20])
def test_split_sentences_cuts_as_a_reader_does(sentences: list[str]) -> None:
    """A splitter that cuts at titles and decimals, or misses a quotation's end, would put needles inside sentences."""
    assert split_sentences("  " + " \n\t".join(sentences) + "\n") == sentences


def test_split_sentences_loses_nothing(real_data: Callable[[str], Path]) -> None:
    """A border that swallows a word would change the text and its length; on a book, sentences must also have sane lengths."""
    text = real_data("pg19/10006.txt").read_text(encoding="utf-8")
    sentences = split_sentences(text)
    assert " ".join(sentences) == " ".join(text.split())
    lengths = sorted(len(sentence.split()) for sentence in sentences)
    assert 10 < lengths[len(lengths) // 2] < 60
    assert split_sentences("") == split_sentences(" \n") == []


def test_grammar_sentences_are_whole_sentences_of_a_seed() -> None:
    """The offline haystack must be reproducible, and be cut back into the very sentences that it was made of."""
    sentences = grammar_sentences(400, seed=3)
    assert sentences == grammar_sentences(400, seed=3)
    assert sentences != grammar_sentences(400, seed=4)
    assert split_sentences(" ".join(sentences)) == sentences
    assert not re.search(r"[{}]|\ba [aeiou]", " ".join(sentences))
    assert len(set(sentences)) > 300


def plain(words: list[str]) -> list[str]:
    """Sentences of words that know neither quotes nor abbreviations."""
    return re.split(r"(?<=[.?!]) (?=[A-Z])", " ".join(words))


@pytest.mark.parametrize("n_words", [1, 2, 3, 7, 12, 13, 14, 25, 40, 100])
def test_essay_is_the_first_words_of_the_text_repeated(tmp_path: Path, n_words: int) -> None:
    """Off-by-one errors at the text's end (12 words here) would drop or double a sentence of long haystacks."""
    path = tmp_path / "essay.txt"
    path.write_text("Rain fell.\nWho knew it? Snow\tfell on the old barn! It melted.", encoding="utf-8")
    words = path.read_text(encoding="utf-8").split()
    assert len(words) == 13
    essay = read_essay(str(path))
    assert essay.sentences(n_words) == plain((words * 9)[:n_words])
    for start in (2, 5, 11):
        assert essay.sentences(n_words, start=start) == plain((words * 9)[start : start + n_words])


def test_essay_start_is_any_sentence(tmp_path: Path) -> None:
    """A start in the middle of a sentence, or a first or last sentence never taken, would skew the training texts."""
    path = tmp_path / "essay.txt"
    path.write_text("rain fell on the barn. Who knew it? Snow fell on the old barn! It melted and then", encoding="utf-8")
    starts = [read_essay(str(path)).start(share) for share in np.linspace(0, 1, 400, endpoint=False)]
    assert starts == sorted([0, 5, 8, 14] * 100)
    essay = read_essay(None)
    starts = [essay.start(share) for share in np.linspace(0, 1, 10_000, endpoint=False)]
    assert len(set(starts)) == len(plain(list(essay.words)))
    assert all(essay.words[start][0].isupper() for start in starts)


def test_essay_of_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """A cache keyed by the path alone would go on serving the text of before an edit."""
    path = tmp_path / "essay.txt"
    path.write_text("Old words.", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    assert read_essay(str(path)).words == ("Old", "words.")
    path.write_text("New words.", encoding="utf-8")
    os.utime(path, ns=(2, 2))
    assert read_essay(str(path)).words == ("New", "words.")


def test_essay_names_the_file_it_cannot_use(tmp_path: Path) -> None:
    """Without the option and the file's name in the message a user cannot tell which of several files is wrong."""
    with pytest.raises(ValueError, match=r"text='.*missing.txt' cannot be read"):
        read_essay(str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"text='.*empty.txt' is empty"):
        read_essay(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"UTF-8 text file"):
        read_essay(str(tmp_path / "latin.txt"))


def test_depths_are_forty_equally_spaced_percentages() -> None:
    """RULER's depths are np.round(np.linspace(0, 100, 40)); a range() would end at 97.5 or have 41 of them."""
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()
    assert len(set(DEPTHS)) == 40


def test_gap_at_reaches_both_ends() -> None:
    """Depth 0 is before the first piece, 100 behind the last; between, the fraction is cut, not rounded.

    RULER's arithmetic: 82 % of 150 is 122.99... to a computer, so whole products may fall one short.
    """
    assert [gap_at(depth, 7) for depth in (0, 14, 15, 50, 99, 100)] == [0, 0, 1, 3, 6, 7]
    assert all(0 <= n * depth - 100 * gap_at(depth, n) <= 100 for depth in range(101) for n in range(300))
    assert all(gap_at(depth, n) == n * depth // 100 for depth in range(101) for n in range(300) if n * depth % 100)
    assert all((gap_at(0, n), gap_at(100, n)) == (0, n) for n in range(300))
    assert gap_at(82, 150) == 122


def test_insert_equals_list_insertion_from_the_back() -> None:
    """Needles inserted front to back with unshifted gaps would each stand too early."""
    draw = random.Random(0)
    for _ in range(200):
        pieces = [f"p{i}" for i in range(draw.randrange(6))]
        gaps = [draw.randint(0, len(pieces)) for _ in range(draw.randrange(5))]
        needles = [f"n{i}" for i in range(len(gaps))]
        expected = list(pieces)
        for gap, needle in sorted(zip(gaps, needles, strict=True), key=lambda pair: pair[0], reverse=True):
            while gap < len(expected) and expected[gap].startswith("n"):  # sort is stable: the later one of a gap comes later
                gap += 1
            expected.insert(gap, needle)
        assert insert(pieces, needles, gaps) == expected


def test_most_units_equals_linear_search() -> None:
    """A bisection that is off by one wastes room or, worse, exceeds the window by one unit."""
    draw = random.Random(0)
    for _ in range(300):
        sizes = np.cumsum([draw.randint(0, 20)] + [draw.randint(1, 5) for _ in range(400)]).tolist()
        least = draw.randint(0, 5)
        budget = draw.randint(sizes[least], sizes[250])
        expected = max(n for n in range(401) if sizes[n] <= budget)
        assert most_units(lambda n, sizes=sizes: sizes[n], budget, least=least) == expected


def test_most_units_never_exceeds_the_budget_when_sizes_wobble() -> None:
    """Tokenizers may shorten a text that grows; the answer must then still fit."""
    draw = random.Random(0)
    for _ in range(300):
        sizes = [4 * n + draw.randint(0, 12) for n in range(500)]
        found = most_units(lambda n, sizes=sizes: sizes[n], 700, least=0)
        assert sizes[found] <= 700
        assert found > 150


def test_most_units_refuses_what_cannot_fit_and_what_never_fills() -> None:
    """Without the second check a tokenizer that truncates would double the text until memory ends."""
    with pytest.raises(ValueError, match="measures 30, 10 more than fit"):
        most_units(lambda n: 30 + n, 20, least=0)
    with pytest.raises(ValueError, match="must grow with the text"):
        most_units(lambda n: min(n, 512), 600, least=1)


def write(units: int, i: int, rng: np.random.Generator) -> Question:
    word = "x" * int(rng.integers(1, 40))
    return Question(" ".join([word, *["hay"] * units]), (word,), {"i": i, "units": units})


def test_fill_keeps_every_prompt_within_the_room() -> None:
    """A sample with longer needles than the one that was measured overflows; it has to give up hay, and no more than told."""
    made = fill(200, write, seed=1, measure=n_bytes, length=400, answer_tokens=50, least=0, give_up=lambda units, excess: 2)
    assert [question.tags["i"] for question in made] == list(range(200))
    most = max(question.tags["units"] for question in made)
    for question in made:
        assert question.tags["size"] == len(question.prompt) <= 350
        assert question.tags["length"] == 400
        assert (most - question.tags["units"]) % 2 == 0
        if question.tags["units"] < most:
            assert len(question.prompt) + 2 * len(" hay") > 350
    assert len({question.tags["units"] for question in made}) >= 2


def test_fill_is_seeded_example_by_example() -> None:
    """Examples that share one generator would all change with n, and a run could not be resumed or cut short."""
    options = {"measure": n_bytes, "length": 400, "answer_tokens": 50, "least": 0, "give_up": lambda units, excess: 3}
    made = fill(9, write, seed=1, **options)
    assert fill(5, write, seed=1, **options) == made[:5]
    assert fill(9, write, seed=2, **options) != made
    assert fill(1, write, seed=2**32, **options)[0].answers != fill(2, write, seed=0, **options)[1].answers


def test_fill_says_what_to_raise() -> None:
    """Too short a length, a long answer and n=0 are the user's slips; each needs one clear sentence."""
    options = {"seed": 1, "measure": n_bytes, "least": 5, "give_up": lambda units, excess: 1}
    with pytest.raises(ValueError, match="n, the number of examples, is at least 1; got 0"):
        fill(0, write, length=400, answer_tokens=50, **options)
    with pytest.raises(ValueError, match="length=20 leaves no room for a prompt beside answer_tokens=20"):
        fill(1, write, length=20, answer_tokens=20, **options)
    with pytest.raises(ValueError, match=r"length=60 with answer_tokens=50: the shortest possible text .*; raise length"):
        fill(1, write, length=60, answer_tokens=50, **options)
    with pytest.raises(ValueError, match=r"length=105 is too short: example \d+ needs 1\d\d; raise length"):
        fill(50, write, length=105, answer_tokens=50, **options)
    with pytest.raises(ValueError, match="raise answer_tokens=5"):
        fill(50, write, length=400, answer_tokens=5, **options)
