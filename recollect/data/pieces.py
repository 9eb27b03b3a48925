"""Pieces of tokenised text in an order: what is held out, how an epoch is shuffled, how a row is read.

A piece is a stretch of the tokens of one document that is read as a document of its own: its first token is read as the start token,
whatever stands there. Whole documents are pieces; where a document is cut, the second piece begins one token early, at a token that
the first has, which the start token then hides. So every token of the text is in one piece.
"""

from __future__ import annotations

import hashlib
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Pieces(NamedTuple):
    """Where pieces begin and how many tokens they have, the start token included: int64 [n] both."""

    begins: Integers
    lengths: Integers

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())


def whole_documents(offsets: Integers) -> Pieces:
    """Every document as one piece; offsets [n_documents + 1] as in `shards.Tokens`."""
    return Pieces(offsets[:-1], np.diff(offsets))


def split_holdout(offsets: Integers, *, holdout: float, seq_len: int) -> tuple[Pieces, Pieces]:
    """Training pieces and held-out pieces, by the rule of `windows.TextWindows` in tokens: no draw, the same in every run.

    Documents are gathered in order into groups just long enough that `holdout` of one is `seq_len` tokens; the last `holdout` of
    every group is held out. So a book gives its end, and of many short documents some are held out whole (at most one per group is
    cut).

    Args:
        offsets: of the documents, int64 [n_documents + 1].
        holdout: share, in (0, 1).
    Raises:
        ValueError: too little text for one group.
    """
    n_least = ceil(max(seq_len / holdout, (seq_len + 1) / (1 - holdout)))
    last = len(offsets) - 1
    if offsets[last] < n_least:
        raise ValueError(
            f"too little text: {offsets[last]} tokens, seq_len={seq_len} with holdout={holdout} needs {n_least}; "
            "add text, lower seq_len, or name validation files"
        )
    groups = [0]  # first document of each
    while True:
        end = int(np.searchsorted(offsets, offsets[groups[-1]] + n_least))
        if end >= last:
            break
        groups.append(end)
    if offsets[last] - offsets[groups[-1]] < n_least:
        groups.pop()  # too short for itself: part of the group before
    bounds = offsets[[*groups, last]]
    cuts = bounds[1:] - np.ceil(np.diff(bounds) * holdout).astype(np.int64)
    place = np.searchsorted(offsets, cuts, side="right")  # of the document after the one that is cut
    begun = cuts - offsets[place - 1]  # tokens of it before the cut
    cuts = np.where(begun == 1, cuts - 1, cuts)  # nothing but a start token is no piece
    inside = begun > 1
    starts = np.insert(offsets[:-1], place[inside], cuts[inside])
    is_cut = np.insert(np.zeros(last, bool), place[inside], True)
    ends = np.append(starts[1:], offsets[-1])
    is_held = starts >= cuts[np.searchsorted(bounds, starts, side="right") - 1]
    pieces = Pieces(starts - is_cut, ends - starts + is_cut)
    return Pieces(*(part[~is_held] for part in pieces)), Pieces(*(part[is_held] for part in pieces))


def shorten(pieces: Pieces, n_parts: int) -> Pieces:
    """Pieces longer than 1/n_parts of the text, rounded, are cut into equal ones that are not: at least n_parts pieces.

    Raises:
        ValueError: fewer tokens than n_parts.
    """
    content = pieces.lengths - 1  # the start tokens apart
    total = int(content.sum())
    longest = -(-total // n_parts)
    if (-(-content // max(1, longest))).sum() < n_parts:
        longest = total // n_parts  # never too few, but less even
    if longest < 1:
        raise ValueError(f"too little text: {total} tokens for {n_parts} lanes; add text or lower the batch")
    n_cuts = np.maximum(1, -(-content // longest))
    size = -(-content // n_cuts)
    index = np.repeat(np.arange(len(content)), n_cuts)
    done = (np.arange(len(index)) - np.repeat(np.cumsum(n_cuts) - n_cuts, n_cuts)) * size[index]
    lengths = 1 + np.minimum(size[index], content[index] - done)
    keep = (lengths > 1) | (done == 0)
    return Pieces((pieces.begins[index] + done)[keep], lengths[keep])


def permutation(n: int, *key: int | str) -> Integers:
    """A random order of 0 ... n - 1, int64 [n], a function of n and the key; it is the same in every version of every library."""
    word = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    # SplitMix64 (Steele, Lea and Flood 2014): a stream of random words, which are then sorted.
    x = (np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(word)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


class Order:
    """Pieces in an order, read as one text.

    Memory: 16 bytes per piece, besides those of the pieces.
    """

    def __init__(self, tokens: NDArray[Any], pieces: Pieces, order: Integers, *, start: int) -> None:
        """
        Args:
            tokens: of all documents [n_tokens].
            order: indices of pieces [m].
            start: the start token.
        """
        self._tokens = tokens
        self._pieces = pieces
        self._order = order
        self._start = start
        self.ends: Integers = np.cumsum(pieces.lengths[order])

    @property
    def n_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def place_of(self, position: int) -> int:
        """Place in the order of the piece that has the token at `position`."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def read(self, position: int, out: Integers) -> None:
        """Write the tokens from `position` on to out [n]; position + n <= n_tokens."""
        begins, lengths = self._pieces
        place = self.place_of(position)
        piece = self._order[place]
        skip = position - (int(self.ends[place]) - int(lengths[piece]))
        done = 0
        while True:
            begin = int(begins[piece]) + skip
            n = min(int(lengths[piece]) - skip, len(out) - done)
            out[done : done + n] = self._tokens[begin : begin + n]
            if skip == 0:
                out[done] = self._start
            done += n
            if done == len(out):
                return
            skip = 0
            place += 1
            piece = self._order[place]
