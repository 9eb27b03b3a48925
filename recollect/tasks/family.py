"""Kinship: the words, the rules by which relations compose, and families in which every relation is known.

A kind is a relation without the gender: "child", its inverse "inv-child" (a parent), "SO" (husband or wife), "sibling", "grand"
(a grandchild), "un" (a sibling's child), "in-law" (a child's SO), and the inverses of the last three. "b is a's sister" is a
fact (a, "sister", b).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple, TypeVar

import numpy as np

# Kind -> the word for a man and for a woman.
WORDS: dict[str, tuple[str, str]] = {
    "child": ("son", "daughter"),
    "inv-child": ("father", "mother"),
    "SO": ("husband", "wife"),
    "sibling": ("brother", "sister"),
    "grand": ("grandson", "granddaughter"),
    "inv-grand": ("grandfather", "grandmother"),
    "un": ("nephew", "niece"),
    "inv-un": ("uncle", "aunt"),
    "in-law": ("son-in-law", "daughter-in-law"),
    "inv-in-law": ("father-in-law", "mother-in-law"),
}
KIND_OF = {word: (kind, bool(female)) for kind, pair in WORDS.items() for female, word in enumerate(pair)}
# What may be asked for: husband and wife are only ever told.
RELATIONS = tuple(sorted(word for word, (kind, _) in KIND_OF.items() if kind != "SO"))
# My (first)'s (second) is my (third). Source: facebookresearch/clutrr, the rules behind CLUTRR's stories.
RULES: dict[tuple[str, str], str] = {
    ("child", "child"): "grand",
    ("child", "SO"): "in-law",
    ("child", "sibling"): "child",
    ("child", "inv-un"): "sibling",
    ("child", "inv-grand"): "inv-child",
    ("inv-child", "child"): "sibling",
    ("inv-child", "inv-child"): "inv-grand",
    ("inv-child", "sibling"): "inv-un",
    ("SO", "inv-child"): "inv-in-law",
    ("SO", "grand"): "grand",
    ("SO", "child"): "child",
    ("sibling", "sibling"): "sibling",
    ("sibling", "inv-grand"): "inv-grand",
    ("sibling", "child"): "un",
    ("sibling", "inv-child"): "inv-child",
    ("grand", "sibling"): "grand",
}
# What a story states: nephews and in-laws compose with nothing, so they are only ever derived.
STATED = frozenset(kind for pair in RULES for kind in pair)

Fact = tuple[str, str, str]
_T = TypeVar("_T")


def compose(words: Sequence[str]) -> frozenset[str]:
    """What a chain of relations can come to: `compose(["daughter", "brother"])` is {"son"}, a daughter's brother.

    Every bracketing is tried. No result: the rules do not reach through. More than one: the chain is ambiguous; a husband's
    son's grandmother may be one's mother or one's mother-in-law.

    Args:
        words: at least one word of `KIND_OF`, each the relation of the next person to the one before.
    Raises:
        ValueError: no words, or an unknown one.
    """
    if not words:
        raise ValueError("compose needs at least one relation")
    for word in words:
        if word not in KIND_OF:
            raise ValueError(f"unknown relation {word!r}; known: {', '.join(KIND_OF)}")
    female = KIND_OF[words[-1]][1]
    return frozenset(WORDS[kind][female] for kind in _compose_kinds(tuple(KIND_OF[word][0] for word in words)))


@lru_cache(maxsize=2**16)
def _compose_kinds(kinds: tuple[str, ...]) -> frozenset[str]:
    """The kinds that a chain can come to. Pieces are remembered, so a chain of n costs n^2 pieces of n cuts, and only once."""
    if len(kinds) == 1:
        return frozenset(kinds)
    cuts = ((_compose_kinds(kinds[:m]), _compose_kinds(kinds[m:])) for m in range(1, len(kinds)))
    pairs = (pair for first, second in cuts for pair in product(first, second))
    return frozenset(RULES[pair] for pair in pairs if pair in RULES)


def inverse(kind: str) -> str:
    """What I am to you if you are `kind` to me."""
    if kind in ("SO", "sibling"):
        return kind
    return kind.removeprefix("inv-") if kind.startswith("inv-") else "inv-" + kind


def derive(facts: Iterable[Fact], a: str, b: str) -> frozenset[str]:
    """What b can be to a: the compositions along every way from a to b through the facts, each fact read in both directions.

    Raises:
        ValueError: no fact says whether b is a man or a woman, or an unknown relation.
    """
    edges: dict[str, list[tuple[str, str]]] = defaultdict(list)
    female: bool | None = None
    for one, word, other in facts:
        if word not in KIND_OF:
            raise ValueError(f"unknown relation {word!r}; known: {', '.join(KIND_OF)}")
        kind, is_female = KIND_OF[word]
        edges[one].append((kind, other))
        edges[other].append((inverse(kind), one))
        if other == b:
            female = is_female
    if female is None:
        raise ValueError(f"no fact names a relation of {b!r} to anybody")
    kinds = {kind for way in _ways(edges, a, b) for kind in _compose_kinds(way)}
    return frozenset(WORDS[kind][female] for kind in kinds)


def _ways(edges: Mapping[str, list[tuple[str, str]]], a: str, b: str) -> Iterator[tuple[str, ...]]:
    """The kinds along each path from a to b that meets nobody twice."""
    open_ends: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((a,), ())]
    while open_ends:
        people, kinds = open_ends.pop()
        for kind, other in edges.get(people[-1], []):
            if other == b:
                yield (*kinds, kind)
            elif other not in people:
                open_ends.append(((*people, other), (*kinds, kind)))


class Family(NamedTuple):
    """N people by number. female: bool per person. kinds: (a, b) -> the kind that b is to a, for all related pairs."""

    female: tuple[bool, ...]
    kinds: dict[tuple[int, int], str]

    def word(self, a: int, b: int) -> str:
        """The word for what b is to a."""
        return WORDS[self.kinds[a, b]][self.female[b]]


def grow_family(rng: np.random.Generator) -> Family:
    """A family of four generations, 20 to 60 people: a couple, their descendants, whom those married, and some of their kin.

    Everybody of the second generation marries, of the third 2 in 3. The couples have 3, 2 to 3, and 1 to 2 children; parents of
    half of those who married in are known, half of them with another child. Nobody marries twice or within the family.
    """
    female: list[bool] = []
    parents: list[tuple[int, int] | None] = []
    partner: dict[int, int] = {}

    def born(of: tuple[int, int] | None, is_female: bool | None = None) -> int:
        female.append(bool(rng.random() < 0.5) if is_female is None else is_female)
        parents.append(of)
        return len(female) - 1

    def couple(one: int, other: int) -> tuple[int, int]:
        partner[one], partner[other] = other, one
        return one, other

    generation = [couple(born(None, False), born(None, True))]
    for least, most, marrying in ((3, 3, 1.0), (2, 3, 2 / 3), (1, 2, 0.0)):
        children = [born(pair) for pair in generation for _ in range(int(rng.integers(least, most + 1)))]
        generation = []
        for child in children:
            if rng.random() >= marrying:
                continue
            elders = couple(born(None, False), born(None, True)) if rng.random() < 0.5 else None
            generation.append(couple(child, born(elders, not female[child])))
            if elders and rng.random() < 0.5:
                born(elders)
    return Family(tuple(female), _kinds(parents, partner))


def _kinds(parents: Sequence[tuple[int, int] | None], partner: Mapping[int, int]) -> dict[tuple[int, int], str]:
    """(a, b) -> what b is to a, by the definitions of the words."""
    people = range(len(parents))
    above = {a: set(parents[a] or ()) for a in people}
    siblings = {a: {b for b in people if b != a and above[a] & above[b]} for a in people}
    kinds: dict[tuple[int, int], str] = {}
    for a in people:
        for b in siblings[a]:
            kinds[a, b] = "sibling"
        for kind, those in (
            ("inv-child", above[a]),
            ("inv-grand", {c for b in above[a] for c in above[b]}),
            ("inv-un", {c for b in above[a] for c in siblings[b]}),
            ("inv-in-law", above[partner[a]] if a in partner else set()),
        ):
            for b in those:
                kinds[a, b], kinds[b, a] = kind, inverse(kind)
        if a in partner:
            kinds[a, partner[a]] = "SO"
    return kinds


def find_chain(rng: np.random.Generator, family: Family, word: str, k: int) -> list[int] | None:
    """k + 1 different people, the last of whom is `word` to the first, each in a stated relation to the one before.

    Grown as in CLUTRR, backwards: begin with two people, and k - 1 times put somebody between two neighbours so that a rule
    composes the two new relations to the old one (neighbours, rule and person uniform among what is possible). Unlike there,
    steps that make the chain ambiguous are not taken.

    Returns:
        None where this family has no such pair, or the chain can grow no further.
    """
    pairs = [pair for pair in family.kinds if family.word(*pair) == word]
    if not pairs:
        return None
    chain = list(pick(rng, pairs))
    while len(chain) <= k:
        for i in rng.permutation(len(chain) - 1).tolist():
            between = put_between(rng, family, chain[i], chain[i + 1], set(chain))
            if between is None:
                continue
            longer = [*chain[: i + 1], between, *chain[i + 1 :]]
            if len(compose([family.word(*pair) for pair in pairwise(longer)])) == 1:
                chain = longer
                break
        else:
            return None
    return chain


def put_between(rng: np.random.Generator, family: Family, a: int, b: int, taken: set[int]) -> int | None:
    """Somebody outside `taken` through whom a rule leads from a to b; None without one."""
    kinds, by_rule = family.kinds, defaultdict(list)
    for c in range(len(family.female)):
        pair = (kinds.get((a, c), ""), kinds.get((c, b), ""))
        if c not in taken and RULES.get(pair) == kinds[a, b]:
            by_rule[pair].append(c)
    return pick(rng, by_rule[pick(rng, sorted(by_rule))]) if by_rule else None


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of several, uniformly."""
    return options[int(rng.integers(len(options)))]
