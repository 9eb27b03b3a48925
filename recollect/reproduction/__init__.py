"""The papers' experiments by name: what is trained, what is asked, and the published numbers beside the measured ones."""

from __future__ import annotations

import difflib

from recollect.reproduction import miras, mta, recall
from recollect.reproduction.experiment import SCALES, Experiment, Published, Scale

EXPERIMENTS: dict[str, Experiment] = {each.name: each for each in (*mta.EXPERIMENTS, *miras.EXPERIMENTS, *recall.EXPERIMENTS)}

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "Published", "Scale", "find"]


def find(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown experiment {name!r}{hint} Known: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
