"""Published results that a report prints beside its own, so that nobody takes one for the other."""

from __future__ import annotations

from typing import Final

COLUMNS: Final = ("N=5 all", "N=5 first", "N=5 last", "N=8 all", "N=8 first", "N=8 last")

# Error %, mean and sample standard deviation over 3 seeds. Source: Golovneva et al. 2025, arXiv 2504.00927v2, Table 1.
FIND_BLOCK: Final[dict[str, tuple[tuple[float, float], ...]]] = {
    "Transformer": ((51.6, 43.1), (78.2, 1.5), (1.3, 0.4), (31.2, 50.3), (28.9, 24.9), (58.4, 46.8)),
    "MTA": ((0.1, 0.1), (0.0, 0.0), (0.0, 0.0), (0.1, 0.0), (0.0, 0.0), (0.0, 0.0)),
}

TITLE: Final = "Published, another size than this run: error %, mean +- std over 3 seeds"
NOTE: Final = (
    "Golovneva et al. 2025 (arXiv 2504.00927), Table 1: 4 layers, width 256, 100K steps, up to 50 blocks of N letters, "
    "answering with all letters of the block, its first or its last. Not measured here; not comparable number by number."
)
