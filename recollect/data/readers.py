"""Rows of one source of files: shuffled anew in every epoch, or as lanes that go on from row to row.

Axis legend: n rows, T time (seq_len), m = T + 1 tokens of a row: its inputs and the token after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.data.pieces import Integers, Order, Pieces, permutation, shorten
from recollect.data.shards import Tokens


class ShuffledRows:
    """Rows of T + 1 tokens, T apart, of the documents in a random order, in a random order: both new in every epoch.

    A row is a function of its number, which is all there is to a position. Every token is read once in an epoch, except a last one
    and a tail that is shorter than a row; which tokens these are differs from epoch to epoch.

    Memory: 32 bytes per document and 8 per row of an epoch.
    """

    def __init__(self, tokens: Tokens, pieces: Pieces, *, seq_len: int, key: Sequence[int]) -> None:
        """
        Args:
            pieces: of `tokens`, those to read.
            key: seed and number of the source.
        Raises:
            ValueError: less text than one row.
        """
        self.n_rows = (pieces.n_tokens - 1) // seq_len  # in an epoch
        if self.n_rows < 1:
            raise ValueError(f"too little text: {pieces.n_tokens} tokens, a row needs {seq_len + 1}; add text or lower seq_len")
        self._tokens, self._pieces, self._seq_len, self._key = tokens, pieces, seq_len, tuple(key)
        self._epoch = -1

    def read(self, number: int, out: Integers) -> None:
        """Write row `number` >= 0 of the run to out [T + 1]."""
        epoch, row = divmod(number, self.n_rows)
        if epoch != self._epoch:
            order = permutation(len(self._pieces.begins), *self._key, epoch, "documents")
            self._order = Order(self._tokens.tokens, self._pieces, order, start=self._tokens.start)
            self._rows = permutation(self.n_rows, *self._key, epoch, "rows")
            self._epoch = epoch
        self._order.read(int(self._rows[row]) * self._seq_len, out)

    def epochs(self, number: int) -> float:
        """Epochs that are over after `number` rows."""
        return number / self.n_rows

    def position(self, number: int) -> dict[str, Any]:
        """Where row `number` stands; for information, the number says all."""
        epoch, row = divmod(number, self.n_rows)
        return {"epoch": epoch, "row": row}

    def go_to(self, number: int, position: Mapping[str, Any]) -> None:
        """Nothing to do."""


class Lanes:
    """L streams of documents, read in parallel, each without a gap: every lane's next row begins where its last one ended.

    In every epoch the documents are put in a random order and dealt to the lanes in turn (documents longer than a lane's fair share
    are cut first). A lane that has read its share of an epoch goes on with its share of the next, whether or not the others have.
    """

    def __init__(self, tokens: Tokens, pieces: Pieces, *, seq_len: int, key: Sequence[int], n_lanes: int) -> None:
        """As `ShuffledRows`, with n_lanes >= 1 lanes.

        Raises:
            ValueError: fewer tokens than lanes.
        """
        self._tokens, self._pieces, self._seq_len, self._key = tokens, shorten(pieces, n_lanes), seq_len, tuple(key)
        n_pieces = len(self._pieces.begins)
        counts = [len(range(lane, n_pieces, n_lanes)) for lane in range(n_lanes)]
        self._first: Integers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # piece of each lane, and the end
        self._epochs: dict[int, tuple[Order, Integers]] = {}
        self.places = [(0, 0)] * n_lanes  # epoch and token of the epoch, by lane

    @property
    def n_lanes(self) -> int:
        return len(self.places)

    def read(self, lane: int, out: Integers) -> int:
        """Write the lane's next tokens to out [T + 1], without going on; returns the number of the document of the first token, that
        is of documents the lane has begun before it."""
        epoch, token = self.places[lane]
        order, bounds = self._at(epoch)
        n_pieces = int(self._first[lane + 1] - self._first[lane])
        document = epoch * n_pieces + order.place_of(int(bounds[lane]) + token) - int(self._first[lane])
        done = 0
        while done < len(out):
            order, bounds = self._at(epoch)
            n = min(int(bounds[lane + 1] - bounds[lane]) - token, len(out) - done)
            order.read(int(bounds[lane]) + token, out[done : done + n])
            done += n
            epoch, token = epoch + 1, 0
        return document

    def advance(self) -> None:
        """All lanes go on by T tokens."""
        for lane, (epoch, token) in enumerate(self.places):
            token += self._seq_len
            while token >= (size := self._size(epoch, lane)):
                epoch, token = epoch + 1, token - size
            self.places[lane] = (epoch, token)
        for epoch in range(min(self._epochs), min(epoch for epoch, _ in self.places)):
            self._epochs.pop(epoch, None)

    def epochs(self) -> float:
        """Epochs that are over, on average over the lanes."""
        return sum(e + t / self._size(e, lane) for lane, (e, t) in enumerate(self.places)) / self.n_lanes

    def _size(self, epoch: int, lane: int) -> int:
        bounds = self._at(epoch)[1]
        return int(bounds[lane + 1] - bounds[lane])

    def _at(self, epoch: int) -> tuple[Order, Integers]:
        """All lanes of an epoch, one after the other, and where each begins, and the end: int64 [L + 1]."""
        if epoch not in self._epochs:
            dealt = permutation(len(self._pieces.begins), *self._key, epoch, "documents")
            order = np.concatenate([dealt[lane :: self.n_lanes] for lane in range(self.n_lanes)])
            text = Order(self._tokens.tokens, self._pieces, order, start=self._tokens.start)
            self._epochs[epoch] = text, np.concatenate([[0], text.ends])[self._first]
        return self._epochs[epoch]
