"""Multi-query associative recall (MQAR), with a forgetting and a compositional variant.

    plain           k1 v1 k2 v2 . . k2 . . . k1 .            at each later key, predict its value
    forgetting      k1 v1 k2 v2 k1 v3 . . k1 . . . k2 .      a key written twice means its last value
    compositional   a1 b1 v1 a1 b2 v2 a2 b1 v3 a2 b2 v4 . . . a2 b1 . a1 b1 .      only both tokens together determine the value

Axis legend: n examples, T time, D pairs (distinct keys), W writes, E tokens of an entry (2; compositional 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import compress
from math import isqrt
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.tasks.base import IGNORE, Batch, Task, register_task
from recollect.tasks.draw import distinct

VARIANTS = ("plain", "forgetting", "compositional")


@register_task
@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Key-value entries, then queries among filler: while reading a query's (last) key token, predict the key's value.

    Token 0 is filler, 1 .. V/2-1 are keys, V/2 .. V-1 are values. The first `n_passes` W E tokens are entries; the rest is cut
    into slots of E tokens, and every key stands once, at the start of a slot of its own. Slot i (from 1) is drawn with weight
    i^(power - 1), without replacement. Values are never fed back.

    Zoology's published figure is `vocab_size=8192` with (length, n_pairs) = (64, 4), (128, 8), (256, 16), (512, 64). The
    defaults keep its shortest shape and shrink the vocabulary, so that small models learn it on a CPU within minutes. One
    difference: random filler is drawn again where it hits one of the sequence's own keys; in zoology it stays, and then
    nothing in the input tells a query from filler.

    Variants:
        plain: zoology's task.
        forgetting: `n_reassigned` keys are written twice with different values, entries in random order; the last counts.
        compositional: a key is two tokens (a, b) of a full grid of rows x columns = D, as square as D allows, another value in
            every cell: each a occurs with every b, so neither says the value. Row tokens come from the lower half of the keys,
            column tokens from the upper.

    Attributes:
        vocab_size: V.
        length: T.
        n_pairs: D, distinct keys, each asked once. Compositional: a product of two numbers >= 2 (4, 6, 8, 9, 10, 12, ...).
        variant: "plain", "forgetting" or "compositional".
        n_reassigned: forgetting only: keys written twice, 1 to D; default D // 2, at least 1.
        random_non_queries: filler is random tokens instead of 0 (zoology: True by default, False in its published figures).
        power: > 0; 0.01 puts queries close behind the entries, 1 is uniform.
        n_passes: times that the entries are repeated.
        chance: mean accuracy of a uniform guess among the values of the sequence, 1 / W.
    Raises:
        ValueError: an option outside its range, entries and queries longer than `length`, or too few tokens for keys or values.
    Source: Arora et al. 2023, arXiv 2312.04927, as in HazyResearch/zoology, data/multiquery_ar.py; the variants are ours.
    """

    name: ClassVar[str] = "recall"
    vocab_size: int = 128
    length: int = 64
    n_pairs: int = 4
    variant: str = "plain"
    n_reassigned: int | None = None
    random_non_queries: bool = False
    power: float = 0.01
    n_passes: int = 1
    chance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is one of {', '.join(VARIANTS)}; got {self.variant!r}")
        if self.n_pairs < 1 or self.n_passes < 1:
            raise ValueError(f"n_pairs and n_passes are at least 1; got n_pairs={self.n_pairs}, n_passes={self.n_passes}")
        if not self.power > 0:
            raise ValueError(f"power is above 0 (1 spreads the queries evenly); got {self.power}")
        self._check_variant()
        self._check_vocabulary()
        needed = self._entry * (self.n_pairs + self.n_passes * self._n_writes)
        if needed > self.length:
            raise ValueError(
                f"length={self.length} is too short: {self.n_passes} x {self._n_writes} entries and {self.n_pairs} queries of "
                f"{self._entry} tokens need {needed}; raise length or lower n_pairs"
            )
        object.__setattr__(self, "chance", 1 / self._n_writes)

    def _check_variant(self) -> None:
        if self.variant == "forgetting":
            if self.n_reassigned is not None and not 1 <= self.n_reassigned <= self.n_pairs:
                raise ValueError(f"n_reassigned is 1 to n_pairs={self.n_pairs}; got {self.n_reassigned}")
        elif self.n_reassigned is not None:
            raise ValueError(f"n_reassigned belongs to variant='forgetting'; variant is {self.variant!r}")
        if self.variant == "compositional" and self._grid[0] < 2:
            raise ValueError(
                f"n_pairs of variant='compositional' is a product of two numbers >= 2 (4, 6, 8, 9, ...); got {self.n_pairs}"
            )

    def _check_vocabulary(self) -> None:
        n_keys, n_values = self.vocab_size // 2 - 1, self.vocab_size - self.vocab_size // 2
        fits = n_keys >= self.n_pairs
        if self.variant == "compositional":
            fits = n_keys // 2 >= self._grid[0] and n_keys - n_keys // 2 >= self._grid[1]
        if not fits or n_values < self._n_writes:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {max(n_keys, 0)} key and {n_values} value tokens, too few for "
                f"n_pairs={self.n_pairs} of variant={self.variant!r}; raise vocab_size"
            )

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of the compositional grid; rows is the largest divisor of n_pairs up to its root."""
        rows = next(r for r in range(isqrt(self.n_pairs), 0, -1) if self.n_pairs % r == 0)
        return rows, self.n_pairs // rows

    @property
    def _entry(self) -> int:
        return 3 if self.variant == "compositional" else 2

    @property
    def _n_writes(self) -> int:
        if self.variant != "forgetting":
            return self.n_pairs
        return self.n_pairs + (max(1, self.n_pairs // 2) if self.n_reassigned is None else self.n_reassigned)

    @property
    def _context(self) -> int:
        return self._entry * self._n_writes * self.n_passes

    def sample(self, n: int, *, seed: int) -> Batch:
        """n examples: inputs and labels int64 [n, T].

        Tags: `variant`, `n_pairs`, `queries` (positions of the labels, key by key), `reassigned` (those whose key was written
        twice).
        """
        if n < 1:
            raise ValueError(f"n, the number of examples, is at least 1; got {n}")
        rng = np.random.default_rng(seed)
        keys = self._draw_keys(rng, n)
        written = self._draw_writes(rng, n)
        values = self.vocab_size // 2 + distinct(rng, n, population=self.vocab_size - self.vocab_size // 2, k=self._n_writes)
        meant, count = _last_writes(written, values, self.n_pairs)
        slots = self._draw_slots(rng, n)

        entries = np.concatenate([np.take_along_axis(keys, written[..., None], axis=1), values[..., None]], axis=2)
        inputs = np.zeros((n, self.length), np.int64)
        inputs[:, : self._context] = np.tile(entries.reshape(n, -1), (1, self.n_passes))
        last = self._context + slots * self._entry + self._entry - 2
        for back in range(self._entry - 1):
            np.put_along_axis(inputs, last - back, keys[..., -1 - back], axis=1)
        labels = np.full((n, self.length), IGNORE)
        np.put_along_axis(labels, last, meant, axis=1)
        if self.random_non_queries:
            _fill_at_random(rng, inputs, keys.reshape(n, -1), self.vocab_size)
        base = {"variant": self.variant, "n_pairs": self.n_pairs}
        twice = [list(compress(*pair)) for pair in zip(last.tolist(), (count > 1).tolist(), strict=True)]
        tags = [base | {"queries": at, "reassigned": again} for at, again in zip(last.tolist(), twice, strict=True)]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), tags)

    def _draw_keys(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Distinct keys [n, D, E - 1] in random order."""
        n_keys = self.vocab_size // 2 - 1
        if self.variant != "compositional":
            return 1 + distinct(rng, n, population=n_keys, k=self.n_pairs)[..., None]
        n_rows, n_columns = self._grid
        rows = 1 + distinct(rng, n, population=n_keys // 2, k=n_rows)
        columns = 1 + n_keys // 2 + distinct(rng, n, population=n_keys - n_keys // 2, k=n_columns)
        cells = distinct(rng, n, population=self.n_pairs, k=self.n_pairs)
        halves = [np.take_along_axis(rows, cells // n_columns, axis=1), np.take_along_axis(columns, cells % n_columns, axis=1)]
        return np.stack(halves, axis=2)

    def _draw_writes(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Which key (0 .. D-1) each entry writes: [n, W]."""
        written = np.tile(np.arange(self.n_pairs), (n, 1))
        n_again = self._n_writes - self.n_pairs
        if n_again == 0:
            return written
        again = distinct(rng, n, population=self.n_pairs, k=n_again)
        return rng.permuted(np.concatenate([written, again], axis=1), axis=1)

    def _draw_slots(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """The slot of each key's query [n, D]: weighted draws without replacement, as the order of exponential arrivals."""
        n_slots = (self.length - self._context) // self._entry
        rates = np.arange(1, n_slots + 1, dtype=np.float64) ** (self.power - 1)
        return np.argsort(rng.standard_exponential((n, n_slots)) / rates, axis=1)[:, : self.n_pairs]

    def solve(self, inputs: Tensor) -> Tensor:
        """The labels [n, T] from inputs [n, T]: write the entries into a dictionary, look every later key up.

        Raises:
            ValueError: wrong length.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self.length:
            raise ValueError(f"inputs must be [n, {self.length}] for these options; got {list(inputs.shape)}")
        entry, context = self._entry, self._context
        labels = torch.full(inputs.shape, IGNORE)
        for row, tokens in enumerate(inputs.tolist()):
            memory = {tuple(tokens[t : t + entry - 1]): tokens[t + entry - 1] for t in range(0, context, entry)}
            for t in range(context, self.length - entry + 2):
                key = tuple(tokens[t : t + entry - 1])
                if key in memory:
                    labels[row, t + entry - 2] = memory[key]
        return labels.to(inputs.device)

    def correct(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Share of an example's queries that are right: predictions [n, T], labels [n, T] -> float64 [n]."""
        asked = labels != IGNORE
        right = (predictions == labels) & asked
        return right.sum(dim=1).to(torch.float64) / asked.sum(dim=1).clamp(min=1)

    def text(self, tokens: Tensor) -> str:
        """Tokens of [T] as words: k7 a key, v70 a value, "." filler 0, "_" where a label is IGNORE."""
        return " ".join(self._word(token) for token in tokens.tolist())

    def _word(self, token: int) -> str:
        if token <= 0:
            return "." if token == 0 else "_"
        return f"k{token}" if token < self.vocab_size // 2 else f"v{token}"


def _last_writes(
    written: NDArray[np.int64], values: NDArray[np.int64], n_pairs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The value each key ends with and how often it was written, both [n, D], from keys and values of the writes [n, W]."""
    rows = np.arange(len(written))
    meant, count = np.zeros((len(written), n_pairs), np.int64), np.zeros((len(written), n_pairs), np.int64)
    for write in range(written.shape[1]):
        meant[rows, written[:, write]] = values[:, write]
        count[rows, written[:, write]] += 1
    return meant, count


def _fill_at_random(rng: np.random.Generator, inputs: NDArray[np.int64], keys: NDArray[np.int64], vocab_size: int) -> None:
    """Replace, in place, every 0 of inputs [n, T] by a uniform token that is none of the row's keys [n, any]."""
    is_key = np.zeros((len(inputs), vocab_size), bool)
    np.put_along_axis(is_key, keys, True, axis=1)
    rows, columns = np.nonzero(inputs == 0)
    while len(rows):
        inputs[rows, columns] = rng.integers(vocab_size, size=len(rows))
        again = is_key[rows, inputs[rows, columns]]
        rows, columns = rows[again], columns[again]
