"""Own kinship stories: facts about an invented family with a chain from one person to another, with or without noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        ValueError: none was found, for want of people for so much noise.
    """
    for _ in range(MAX_FAMILIES):
        family = grow_family(rng)
        chain = find_chain(rng, family, word, k)
        if chain is None:
            continue
        told = [(family, *pair) for pair in pairwise(chain)]
        more = _NOISE[noise](rng, family, chain, n_noise)
        if more is not None:
            return _name(rng, told + more, k)
    raise ValueError(f"no {noise} story with k={k} and n_noise={n_noise} in {MAX_FAMILIES} families; lower n_noise")


def _supporting(rng: np.random.Generator, family: Family, chain: Sequence[int], n: int) -> list[_Told] | None:
    told: list[_Told] = []
    taken = set(chain)
    while len(told) < 2 * n:
        for i in rng.permutation(len(chain) - 1).tolist():
            between = put_between(rng, family, chain[i], chain[i + 1], taken)
            if between is None:
                continue
            longer = [*told, (family, chain[i], between), (family, between, chain[i + 1])]
            facts = [(str(a), family.word(a, b), str(b)) for a, b in [*pairwise(chain), *(pair[1:] for pair in longer)]]
            # A second way may allow a second answer.
            if len(derive(facts, str(chain[0]), str(chain[-1]))) == 1:
                told = longer
                taken.add(between)
                break
        else:
            return None
    return told


def _irrelevant(rng: np.random.Generator, family: Family, chain: Sequence[int], n: int) -> list[_Told] | None:
    told: list[_Told] = []
    taken = set(chain)
    while len(told) < n:
        here = pick(rng, chain)
        near = _near(family, here, taken)
        if not near:
            return None
        told.append((family, here, pick(rng, near)))
        taken.add(told[-1][2])
    return told


def _disconnected(rng: np.random.Generator, family: Family, chain: Sequence[int], n: int) -> list[_Told] | None:
    """A walk through another family."""
    strangers = grow_family(rng)
    walk = [int(rng.integers(len(strangers.female)))]
    while len(walk) <= n:
        near = _near(strangers, walk[-1], set(walk))
        if not near:
            return None
        walk.append(pick(rng, near))
    return [(strangers, *pair) for pair in pairwise(walk)]


def _near(family: Family, a: int, taken: set[int]) -> list[int]:
    """Those outside `taken` whose relation to a may be stated."""
    return [b for b in range(len(family.female)) if b not in taken and family.kinds.get((a, b)) in STATED]


# What else is told; None where the family does not have it.
_NOISE: dict[str, Callable[[np.random.Generator, Family, Sequence[int], int], list[_Told] | None]] = {
    "clean": lambda rng, family, chain, n: [],
    "supporting": _supporting,
    "irrelevant": _irrelevant,
    "disconnected": _disconnected,
}


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
