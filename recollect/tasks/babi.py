"""Stories of people, rooms and things, with a question: read from bAbI files, and answered by rule.

    Mary went to the office. Mary took the milk. Mary walked to the garden.        In which room is the milk?

Questions by number: 1 where a person is, 2 where a thing is, 3 where a thing was before a room, 4 what lies north of a room,
5 who gave what to whom.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from recollect.tasks.files import numbered_lines

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
ITEMS = ("apple", "football", "milk")
WALKERS = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
LABELS: dict[int, tuple[str, ...]] = dict.fromkeys((1, 2, 3, 4), ROOMS) | {5: GIVERS + ITEMS}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

# The verbs of our own stories, then those that only bAbI's files use.
MOVES = ("went to", "walked to", "hurried to", "moved to", "ran to")
TAKES = ("took", "picked up", "collected", "lifted")
DROPS = ("put down", "dropped", "set down", "let go of")
GIVES = ("gave", "handed", "presented")
_ALSO_MOVES, _ALSO_TAKES = ("went back to", "journeyed to", "travelled to"), ("grabbed", "got")
_ALSO_DROPS, _ALSO_GIVES = ("left", "discarded"), ("passed",)


def _any(*words: tuple[str, ...]) -> str:
    return "(?:" + "|".join(word for group in words for word in group) + ")"


_NAME, _ROOM, _ITEM, _SIDE = r"\b[A-Z][a-z]+\b", _any(ROOMS), _any(ITEMS), _any(tuple(OPPOSITE))
_FACT = re.compile(
    rf"(?P<mover>{_NAME}) {_any(MOVES, _ALSO_MOVES)} the (?P<room>{_ROOM})\b"
    rf"|(?P<taker>{_NAME}) {_any(TAKES, _ALSO_TAKES)} the (?P<taken>{_ITEM})\b"
    rf"|(?P<dropper>{_NAME}) {_any(DROPS, _ALSO_DROPS)} the (?P<dropped>{_ITEM})\b"
    rf"|(?P<giver>{_NAME}) {_any(GIVES, _ALSO_GIVES)} the (?P<given>{_ITEM}) to (?P<receiver>{_NAME})"
    rf"|\bThe (?P<place>{_ROOM}) (?:is|lies) (?P<side>{_SIDE}) of the (?P<base>{_ROOM})\b"
)
_GROUPS = (
    ("mover", "room"),
    ("taker", "taken"),
    ("dropper", "dropped"),
    ("giver", "given", "receiver"),
    ("place", "side", "base"),
)
_KINDS = dict(zip([group[0] for group in _GROUPS], ("move", "take", "drop", "give", "lie"), strict=True))
_QUESTIONS: dict[int, re.Pattern[str]] = {
    1: re.compile(rf"(?:Where|In which room) is (?P<person>{_NAME})\?"),
    2: re.compile(rf"(?:Where|In which room) is the (?P<item>{_ITEM})\?"),
    3: re.compile(rf"(?:Where|In which room) was the (?P<item>{_ITEM}) before (?:it came to )?the (?P<room>{_ROOM})\?"),
    4: re.compile(
        rf"(?:What|Which room) (?:is|lies) (?P<side>{_SIDE}) of the (?P<base>{_ROOM})\?"
        rf"|(?:What|Which room) is the (?P<place>{_ROOM}) (?P<of>{_SIDE}) of\?"
    ),
    5: re.compile(
        rf"What did (?P<giver>{_NAME}) (?:give|hand) to (?P<receiver>{_NAME})\?"
        rf"|Who (?:gave|handed over) the (?P<given>{_ITEM})(?: to (?P<given_to>{_NAME}))?\?"
        rf"|Who (?:received|was handed) the (?P<received>{_ITEM})\?"
        rf"|(?:Who did|To whom did) (?P<given_by>{_NAME}) (?:give|hand) the (?P<gift>{_ITEM})(?: to)?\?"
    ),
}


class Story(NamedTuple):
    """facts: sentences in order. support: the facts, counted from 0, that prove the answer, ascending."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


class Event(NamedTuple):
    """One fact as read. kind: "move", "take", "drop", "give" or "lie"; words: who, what or where, in the order of the sentence."""

    kind: str
    words: tuple[str, ...]


def events(text: str) -> list[Event]:
    """Every fact stated in a text, in order; all else is passed over."""
    found = []
    for match in _FACT.finditer(text):
        group = next(group for group in _GROUPS if match[group[0]])
        found.append(Event(_KINDS[group[0]], match.group(*group)))
    return found


def last_question(qa: int, text: str) -> str | None:
    """The last question of kind `qa` in a text, None without one."""
    found = None
    for match in _QUESTIONS[qa].finditer(text):
        found = match[0]
    return found


def answer(qa: int, told: list[Event], question: str) -> tuple[str, tuple[int, ...]]:
    """The answer to a question and the indices of the events that prove it.

    A thing is where it was put down, or with its holder, who is where they last went; of two gifts that fit, the later counts;
    neighbours on the map are only those that a fact names.

    Raises:
        ValueError: not a question of kind `qa`, or the events do not answer it.
    """
    asked = _QUESTIONS[qa].search(question)
    if asked is None:
        raise ValueError(f"not a question of qa{qa}: {question!r}")
    if qa == 4:
        found = _neighbour(told, asked)
    elif qa == 5:
        found = _gift(told, asked)
    else:
        where, paths = _follow(told)
        if qa == 1:
            found = where.get(asked["person"])
        else:
            found = _on_path(paths[asked["item"]], asked["room"] if qa == 3 else None)
    if found is None:
        raise ValueError(f"the text does not answer {question!r}")
    return found


Known = tuple[str, tuple[int, ...]]


class _Path(NamedTuple):
    """Of one thing: the rooms it was in, each with the events that prove it, and the last event at which a hand touched it."""

    rooms: list[Known]
    touched: list[int]


def _follow(told: list[Event]) -> tuple[dict[str, Known], dict[str, _Path]]:
    """Where each person went last, and each thing's path through the rooms (without repeats in a row)."""
    where: dict[str, Known] = {}
    holder: dict[str, str] = {}
    paths: dict[str, _Path] = defaultdict(lambda: _Path([], []))

    def stands(item: str, known: Known | None) -> None:
        rooms = paths[item].rooms
        if known is not None:
            if rooms and rooms[-1][0] == known[0]:
                rooms.pop()
            rooms.append(known)

    for i, (kind, words) in enumerate(told):
        if kind == "move":
            where[words[0]] = words[1], (i,)
            for item in [item for item, person in holder.items() if person == words[0]]:
                stands(item, where[words[0]])
        elif kind in ("take", "give"):
            holder[words[1]] = words[0] if kind == "take" else words[2]
            paths[words[1]].touched.append(i)
            stands(words[1], where.get(holder[words[1]]))
        elif kind == "drop":
            holder.pop(words[1], None)
            paths[words[1]].touched.append(i)
            stands(words[1], where.get(words[0]))
    return where, paths


def _on_path(path: _Path, before: str | None) -> Known | None:
    """The last room of a path, or the one in front of the last visit to a room."""
    rooms = [room for room, _ in path.rooms]
    if before is None:
        at = len(rooms) - 1
    else:
        at = max((i for i, room in enumerate(rooms) if room == before), default=0) - 1
    if at < 0:
        return None
    proof = {i for _, indices in path.rooms[at : at + 2] for i in indices}
    return rooms[at], tuple(sorted(proof | set(path.touched[-1:])))


def _neighbour(told: list[Event], asked: re.Match[str]) -> Known | None:
    # "What is the garden north of?" asks for what is south of the garden.
    base, side = (asked["base"], asked["side"]) if asked["base"] else (asked["place"], OPPOSITE[asked["of"]])
    for i, (kind, words) in enumerate(told):
        if kind == "lie" and words[1:] == (side, base):
            return words[0], (i,)
        if kind == "lie" and (words[0], OPPOSITE[words[1]]) == (base, side):
            return words[2], (i,)
    return None


def _gift(told: list[Event], asked: re.Match[str]) -> Known | None:
    item = asked["given"] or asked["received"] or asked["gift"]
    giver, receiver = asked["giver"] or asked["given_by"], asked["receiver"] or asked["given_to"]
    wanted = (giver, item, receiver)
    says = 1 if item is None else 2 if asked["received"] or asked["gift"] else 0
    for i in range(len(told) - 1, -1, -1):
        kind, words = told[i]
        if kind == "give" and all(want in (None, word) for want, word in zip(wanted, words, strict=True)):
            return words[says], (i,)
    return None


def choices(qa: int, question: str) -> tuple[str, ...]:
    """The labels that a reader of the question alone would consider: of the right sort, and not named in it."""
    labels = LABELS[qa]
    if qa == 5:
        labels = ITEMS if question.startswith("What") else GIVERS
    return tuple(label for label in labels if label not in question)


def read_stories(qa: int, path: str) -> tuple[Story, ...]:
    """The rows of a bAbI file as JSON lines {"facts": [..], "question", "answer", "support": [..]}, one per question.

    Raises:
        ValueError: no such file, no rows, a row of another form, or an answer that is none of the labels of `qa`.
    """
    try:
        stamp = Path(path).stat()
    except OSError as error:
        raise ValueError(
            f"cannot read the facts file {path!r}: {error.strerror}; give a file of bAbI rows as JSON lines"
        ) from error
    return _read_stories(qa, path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=8)
def _read_stories(qa: int, path: str, _modified: int, _size: int) -> tuple[Story, ...]:
    stories = []
    for number, line in numbered_lines(Path(path).read_text(encoding="utf-8")):
        try:
            row = json.loads(line)
            story = Story(tuple(row["facts"]), row["question"].strip(), row["answer"], tuple(row.get("support", ())))
            if not all(isinstance(fact, str) for fact in story.facts):
                raise TypeError("facts are strings")
            if not all(0 <= i < len(story.facts) for i in story.support):
                raise IndexError(f"support {list(story.support)} of {len(story.facts)} facts")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
            form = '{"facts": [..], "question": .., "answer": .., "support": [..]}'
            raise ValueError(f"{path}, line {number}: not a row of the form {form} ({error!r})") from error
        if story.answer not in LABELS[qa]:
            raise ValueError(
                f"{path}, line {number}: the answer {story.answer!r} is no label of qa{qa} ({', '.join(LABELS[qa])}); "
                "is this another task's file?"
            )
        stories.append(story)
    if not stories:
        raise ValueError(f"{path} has no rows")
    return tuple(stories)
