"""Which source the next row comes from: fixed shares, kept exactly at every moment, without a draw."""

from __future__ import annotations

from collections.abc import Sequence


def choose_source(shares: Sequence[float], counts: Sequence[int]) -> int:
    """The source of the next row; after any number n of rows, |counts[k] - n shares[k]| < 1 for every source.

    A function of the counts alone, so a checkpoint needs nothing else. (The simpler rule "whatever is furthest behind" lets a source
    fall more than one row behind where there are several.)

    Args:
        shares: of each source, > 0, sum 1.
        counts: rows taken from each so far.
    Source: Tijdeman 1980, The chairman assignment problem, Discrete Mathematics 32: among those that are due, the one whose next row
        must come first.
    """
    n_sources = len(shares)
    if n_sources == 1:
        return 0
    n = sum(counts) + 1
    slack = 1 / (2 * n_sources - 2)
    due = [k for k in range(n_sources) if n * shares[k] - counts[k] >= slack]
    if not due:  # only by rounding
        return max(range(n_sources), key=lambda k: n * shares[k] - counts[k])
    return min(due, key=lambda k: (counts[k] + 1 - slack) / shares[k])


def shares_of(weights: Sequence[float | None], n_tokens: Sequence[int | None], names: Sequence[str]) -> list[float]:
    """Shares of the rows, sum 1: the weights, or where none is given the sources' shares of the tokens.

    Args:
        weights: of each source, relative to the others'; None: by size.
        n_tokens: of each source; None: not known (streams).
        names: for errors.
    Raises:
        ValueError: a weight that is not positive, weights for some sources only, or sizes that are not known.
    """
    if len(weights) == 1:
        weights = [1.0 if weights[0] is None else weights[0]]
    for name, weight in zip(names, weights, strict=True):
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(
                f"weight of source {name!r} is a positive number; got {weight}; leave out a source that is not wanted"
            )
    if all(weight is None for weight in weights):
        for name, size in zip(names, n_tokens, strict=True):
            if size is None:
                raise ValueError(f"the size of the streamed source {name!r} is not known; give every source a weight")
        weights = [float(size) for size in n_tokens if size is not None]
    given = [float(weight) for weight in weights if weight is not None]
    if len(given) < len(weights):
        without = next(name for name, weight in zip(names, weights, strict=True) if weight is None)
        raise ValueError(f"source {without!r} has no weight and others have; give a weight to every source or to none")
    return [weight / sum(given) for weight in given]
