"""LAMBADA: predict the last word of a passage that only the whole passage determines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def last_word(row: Mapping[str, Any]) -> tuple[str, str]:
    """(context, continuation) of a passage: all but the last word, and a blank with the last word.

    The standard set is lower-cased and has blanks around its punctuation, the OpenAI set is text as written; both are cut at the
    last blank, so what is glued to the word in the latter (a quotation mark) belongs to it.

    Args:
        row: {"text": passage}.
    Raises:
        ValueError: no text, fewer than two words, or white space at its end.
    Source: Paperno et al. 2016, arXiv 1606.06031, as lm-evaluation-harness 0.4.13 asks it.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"a row of LAMBADA has the field text; got the fields: {', '.join(row) or 'none'}")
    context, blank, word = text.rpartition(" ")
    if not word or text != text.rstrip():
        raise ValueError(f"the passage ends in white space, not in a word: ...{text[-40:]!r}")
    if not context:
        raise ValueError(f"a passage has at least two words; got {text!r}")
    return context, blank + word
