"""Own stories of the five kinds of `babi`: people walk, carry and hand over things in a small world, and the world knows the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from recollect.tasks.babi import (
    DROPS,
    GIVERS,
    GIVES,
    ITEMS,
    MOVES,
    OPPOSITE,
    ROOMS,
    TAKES,
    WALKERS,
    Story,
    answer,
    events,
)

# Facts of a story: an even number between these, drawn uniformly (bAbI: 2-10, 2-68, 4-228, 2, 2-126). Shorter in kinds 2, 3 and
# 5, so that small models can be trained on them.
N_FACTS = {1: (2, 10), 2: (6, 24), 3: (12, 40), 4: (2, 2), 5: (6, 24)}
_T = TypeVar("_T")


def tell(qa: int, rng: np.random.Generator) -> Story:
    """One story of kind `qa` (1 to 5).

    Kinds 1, 2, 3 and 5: at each step a uniform person acts. Their first act is a walk; later they handle a thing (take one
    that is in the room, put down or, in kind 5, hand over one that they hold) with probability 1/2 where they can, else walk
    to another room. Asked is, uniformly among what the story tells: 1 a person that walked, 2 a thing that was touched, 3 a
    room that a thing came to once from another, 5 a gift, in one of five forms. Kind 4: three rooms in a row, two facts, each
    pair of neighbours told and asked in a uniform one of its two directions. Stories without anything to ask are told anew,
    with another number of facts.

    Answers come from the world; only the supporting facts are found by reading.
    """
    least, most = N_FACTS[qa]
    while True:
        n_facts = 2 * int(rng.integers(least // 2, most // 2 + 1))
        told = _TELLERS[qa](rng, n_facts)
        if told is not None:
            facts, question, reply = told
            _, support = answer(qa, events(" ".join(facts)), question)
            return Story(tuple(facts), question, reply, support)


_Told = tuple[list[str], str, str]


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


class _World:
    """Who and what is where, from the start; what has been told so far. `toured`: rooms of a thing since it was first touched."""

    def __init__(self, rng: np.random.Generator, people: Sequence[str]) -> None:
        self.rng, self.people = rng, people
        self.room = {person: _pick(rng, ROOMS) for person in people}
        self.lies = {item: _pick(rng, ROOMS) for item in ITEMS}
        self.holder: dict[str, str] = {}
        self.walked: set[str] = set()
        self.toured: dict[str, list[str]] = {}
        self.gifts: list[tuple[str, str, str]] = []
        self.facts: list[str] = []

    def walk(self, person: str) -> None:
        room = _pick(self.rng, [room for room in ROOMS if room != self.room[person]])
        self.room[person] = room
        self.walked.add(person)
        for item in [item for item, holder in self.holder.items() if holder == person]:
            self.toured[item].append(room)
        self.facts.append(f"{person} {_pick(self.rng, MOVES)} the {room}.")

    def handle(self, person: str, *, gives: bool) -> bool:
        """Take, put down or hand over something; False where there is nothing to handle."""
        here, hands = self.room[person], [item for item, holder in self.holder.items() if holder == person]
        acts = [("take", item, "") for item in ITEMS if item not in self.holder and self.lies[item] == here]
        acts += [("drop", item, "") for item in hands]
        if gives:
            near = [other for other in self.people if other != person and other in self.walked and self.room[other] == here]
            acts += [("give", item, other) for item in hands for other in near]
        if not acts:
            return False
        # Kinds first: with two hands full, putting down is not twice as likely as taking.
        kind = _pick(self.rng, sorted({act[0] for act in acts}))
        _, item, other = _pick(self.rng, [act for act in acts if act[0] == kind])
        if kind == "take":
            self.holder[item] = person
            self.toured.setdefault(item, [here])
            self.facts.append(f"{person} {_pick(self.rng, TAKES)} the {item}.")
        elif kind == "drop":
            del self.holder[item]
            self.lies[item] = here
            self.facts.append(f"{person} {_pick(self.rng, DROPS)} the {item}.")
        else:
            self.holder[item] = other
            self.gifts.append((person, item, other))
            self.facts.append(f"{person} {_pick(self.rng, GIVES)} the {item} to {other}.")
        return True


def _live(rng: np.random.Generator, people: Sequence[str], n_facts: int, *, things: bool, gives: bool = False) -> _World:
    world = _World(rng, people)
    while len(world.facts) < n_facts:
        person = _pick(rng, people)
        handles = things and person in world.walked and rng.random() < 0.5
        if not (handles and world.handle(person, gives=gives)):
            world.walk(person)
    return world


def _where_is_who(rng: np.random.Generator, n_facts: int) -> _Told:
    world = _live(rng, WALKERS, n_facts, things=False)
    person = _pick(rng, sorted(world.walked))
    return world.facts, f"In which room is {person}?", world.room[person]


def _where_is_what(rng: np.random.Generator, n_facts: int) -> _Told | None:
    world = _live(rng, WALKERS, n_facts, things=True)
    if not world.toured:
        return None
    item = _pick(rng, sorted(world.toured))
    room = world.room[world.holder[item]] if item in world.holder else world.lies[item]
    return world.facts, f"In which room is the {item}?", room


def _where_before(rng: np.random.Generator, n_facts: int) -> _Told | None:
    world = _live(rng, WALKERS, n_facts, things=True)
    steps = [
        (item, before, room)
        for item, rooms in sorted(world.toured.items())
        for before, room in pairwise(rooms)
        if rooms.count(room) == 1
    ]
    if not steps:
        return None
    item, before, room = _pick(rng, steps)
    return world.facts, f"In which room was the {item} before it came to the {room}?", before


def _what_lies_where(rng: np.random.Generator, n_facts: int) -> _Told:
    row = [ROOMS[i] for i in rng.permutation(len(ROOMS))[:3]]
    side = _pick(rng, sorted(OPPOSITE))
    # Each room of the row lies to this side of the next one.
    pairs = [(row[0], side, row[1]), (row[1], side, row[2])]
    turned = [pair if rng.random() < 0.5 else (pair[2], OPPOSITE[side], pair[0]) for pair in pairs]
    order = rng.permutation(2)
    facts = [f"The {a} lies {of} of the {b}." for a, of, b in (turned[i] for i in order)]
    a, of, b = pairs[int(rng.integers(2))]
    if rng.random() < 0.5:
        a, of, b = b, OPPOSITE[of], a
    question = f"Which room lies {of} of the {b}?" if rng.random() < 0.5 else f"Which room is the {b} {OPPOSITE[of]} of?"
    return facts, question, a


def _who_gave_what(rng: np.random.Generator, n_facts: int) -> _Told | None:
    world = _live(rng, GIVERS, n_facts, things=True, gives=True)
    if not world.gifts:
        return None
    giver, item, receiver = _pick(rng, world.gifts)
    form = int(rng.integers(5))
    question = (
        f"What did {giver} hand to {receiver}?",
        f"Who handed over the {item}?",
        f"Who was handed the {item}?",
        f"Who handed over the {item} to {receiver}?",
        f"To whom did {giver} hand the {item}?",
    )[form]
    # Of several gifts that the question fits, the last one counts.
    fits: Callable[[tuple[str, str, str]], bool] = (
        lambda gift: (gift[0], gift[2]) == (giver, receiver),
        lambda gift: gift[1] == item,
        lambda gift: gift[1] == item,
        lambda gift: gift[1:] == (item, receiver),
        lambda gift: gift[:2] == (giver, item),
    )[form]
    last = [gift for gift in world.gifts if fits(gift)][-1]
    return world.facts, question, last[(1, 0, 2, 0, 2)[form]]


_TELLERS: dict[int, Callable[[np.random.Generator, int], _Told | None]] = {
    1: _where_is_who,
    2: _where_is_what,
    3: _where_before,
    4: _what_lies_where,
    5: _who_gave_what,
}
