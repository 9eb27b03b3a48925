"""How texts that are longer than a model reads at once are cut, and short ones put together.

The functions know tokens and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Row(NamedTuple):
    """Tokens for a model to read, of which the last `n_scored` are scored: fewer than there are."""

    tokens: list[int]
    n_scored: int


def blocks(parts: Iterable[NDArray[Any]], size: int) -> Iterator[list[int]]:
    """Tokens, in stretches of any lengths, in blocks of `size`, the last one shorter."""
    held = np.empty(0, np.int64)
    for part in parts:
        held = np.concatenate([held, np.asarray(part, np.int64)])
        while len(held) >= size:
            yield held[:size].tolist()
            held = held[size:]
    if len(held):
        yield held.tolist()


def windows(lead: list[int], parts: Iterable[NDArray[Any]], length: int, overlap: int) -> Iterator[Row]:
    """Rows that score every token once, each row read by itself.

    As in lm-evaluation-harness: a window's first target is predicted from the one token before it, which was the last target of the
    window before (`overlap` adds more than that); the last window, if it is short, is filled up with what came before.

    Args:
        lead: read before the text; at least one token.
        parts: the text's tokens.
        length: tokens that a model may read at a time.
        overlap: tokens that a window reads again; below `length`.
    """
    context = lead
    for block in blocks(parts, length - overlap):
        is_whole = len(block) == length - overlap
        yield Row(context[-(overlap + 1 if is_whole else length + 1 - len(block)) :] + block, len(block))
        context = (context + block)[-length:]


def depths(n: int, length: int | None, overlap: int) -> NDArray[np.int64]:
    """Places of a text's n tokens in the windows that predict them: int64 [n], 0 .. length - 1, each from one token more than that;
    in the text itself where the context has no limit (None)."""
    before = np.arange(n)
    if length is None or not n:
        return before
    step = length - overlap
    window = before // step
    first = np.maximum(window * step - overlap, 0)  # a window begins with tokens of the one before
    if n % step:
        first[window == window[-1]] = max(0, n - length)  # the last one is filled up
    return before - first


def packed(rows: Iterable[T], n_tokens: Callable[[T], int], at_most: int) -> Iterator[list[T]]:
    """Consecutive rows in batches of at most `at_most` tokens, padding included; a longer row is a batch of its own."""
    batch: list[T] = []
    longest = 0
    for row in rows:
        longest = max(longest, n_tokens(row))
        if batch and (len(batch) + 1) * longest > at_most:
            yield batch
            batch, longest = [], n_tokens(row)
        batch.append(row)
    if batch:
        yield batch
