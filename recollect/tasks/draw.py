"""Random draws that several tasks need, vectorised over examples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def distinct(rng: np.random.Generator, n_rows: int, *, population: int, k: int) -> NDArray[np.int64]:
    """k distinct numbers of range(population) for each row, uniform over ordered k-tuples: int64 [n_rows, k].

    Floyd's algorithm for all rows at once, then a shuffle of each row: O(n_rows k^2) time, O(n_rows k) memory.
    """
    chosen = np.empty((n_rows, k), np.int64)
    for i in range(k):
        top = population - k + i
        drawn = rng.integers(top + 1, size=n_rows)
        taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, drawn)
    return rng.permuted(chosen, axis=1)
