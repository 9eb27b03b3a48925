"""Own kinship stories: facts about an invented family with a chain from one person to another, with or without noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from recollect.tasks.family import STATED, Fact, Family, derive, find_chain, grow_family, pick, put_between


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MEN = _names(
    "Abel Bert Carl Dirk Emil Fritz Gus Hank Ivan Jim Karl Leo Max Ned Otto Paul Ralph Sven Tom Ugo Vince Walt Xaver Yuri Zach"
)
WOMEN = _names(
    "Ada Beth Cora Dora Elsa Faye Gina Hilda Ida Jane Kate Lucy Mia Nell Olga Pia Rita Sara Tess Una Vera Wilma Xenia Yvonne Zoe"
)
# Families tried for one story.
MAX_FAMILIES = 1000

_Told = tuple[Family, int, int]


class Story(NamedTuple):
    """facts: the chain from `a` to `b` in order, then the noise. women: the names of those people who are women."""

    facts: tuple[Fact, ...]
    a: str
    b: str
    women: frozenset[str]


def invent(rng: np.random.Generator, word: str, k: int, *, noise: str, n_noise: int) -> Story:
    """A story in which b is a's `word`, by k facts in a row, true of a family and the only answer that the rules allow.

    Args:
        noise, n_noise: as in `kinship.Kinship`.
    Raises:
        RuntimeError: none was found.
    """
    for _ in range(MAX_FAMILIES):
        family = grow_family(rng)
        chain = find_chain(rng, family, word, k)
        if chain is None:
            continue
        more = _noise(rng, noise, family, chain, n_noise)
        if more is None:
            continue
        story = _name(rng, [(family, *pair) for pair in pairwise(chain)] + more, k)
        if derive(story.facts, story.a, story.b) == {word}:
            return story
    raise RuntimeError(
        f"no story with k={k} about {word!r} in {MAX_FAMILIES} families; try another k or less noise than {n_noise}"
    )


def _noise(rng: np.random.Generator, noise: str, family: Family, chain: Sequence[int], n: int) -> list[_Told] | None:
    """What else is told, None where the family does not have it."""
    told: list[_Told] = []
    taken = set(chain)
    if noise == "disconnected":
        family = grow_family(rng)
        here = int(rng.integers(len(family.female)))
        taken = {here}
    for _ in range(n if noise != "clean" else 0):
        if noise == "supporting":
            i = int(rng.integers(len(chain) - 1))
            one, other = chain[i], chain[i + 1]
            between = put_between(rng, family, one, other, taken)
            if between is None:
                return None
            told += [(family, one, between), (family, between, other)]
            taken.add(between)
            continue
        if noise == "irrelevant":
            here = pick(rng, chain)
        near = [b for b in range(len(family.female)) if b not in taken and family.kinds.get((here, b)) in STATED]
        if not near:
            return None
        told.append((family, here, pick(rng, near)))
        here = told[-1][2]
        taken.add(here)
    return told


def _name(rng: np.random.Generator, told: Sequence[_Told], k: int) -> Story:
    """Names for everybody, all different; two families are two sets of people."""
    free = {False: rng.permutation(MEN).tolist(), True: rng.permutation(WOMEN).tolist()}
    names: dict[tuple[int, int], str] = {}
    women: set[str] = set()
    facts: list[Fact] = []
    for family, one, other in told:
        for person in (one, other):
            if (id(family), person) not in names:
                names[id(family), person] = free[family.female[person]].pop()
                if family.female[person]:
                    women.add(names[id(family), person])
        facts.append((names[id(family), one], family.word(one, other), names[id(family), other]))
    return Story(tuple(facts), facts[0][0], facts[k - 1][2], frozenset(women))
