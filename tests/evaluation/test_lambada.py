"""LAMBADA by hand. Against the harness itself: test_harness.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recollect.evaluation.lambada import last_word


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("she sang to the moon", ("she sang to the", " moon")),
        ("`` no , '' said ann", ("`` no , '' said", " ann")),
        ('"No," said "Ann.', ('"No," said', ' "Ann.')),
        ("a  b", ("a ", " b")),
        ("line\nof verse", ("line\nof", " verse")),
    ],
)
def test_the_last_blank_divides_context_and_word(text: str, pair: tuple[str, str]) -> None:
    """The blank belongs to the continuation: tokenizers join it with the word."""
    assert last_word({"text": text}) == pair


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"passage": "a b"}, "has the field text; got the fields: passage"),
        ({"text": None}, "has the field text"),
        ({"text": "moon"}, "at least two words"),
        ({"text": " moon"}, "at least two words"),
        ({"text": ""}, "white space"),
        ({"text": "to the moon "}, "white space"),
        ({"text": "to the moon\n"}, "white space"),
    ],
)
def test_a_row_without_a_last_word_is_refused(row: dict[str, Any], message: str) -> None:
    """A line end kept by a reader would make the word unpredictable, and the score 0, without a sign."""
    with pytest.raises(ValueError, match=message):
        last_word(row)


def test_every_real_passage_has_a_last_word(real_data: Callable[[str], Path]) -> None:
    """Passages of the standard set are cut at the last blank, and nothing is lost."""
    lines = real_data("lambada/dev_standard.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4860
    for line in lines:
        row = json.loads(line)
        context, word = last_word(row)
        assert context + word == row["text"]
        assert word[0] == " "
        assert not any(c.isspace() for c in word[1:])
