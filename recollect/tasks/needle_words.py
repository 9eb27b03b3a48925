"""What needles are made of: keys, values, and the templates that turn them into sentences, prompts and patterns to find them by."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import Formatter

import numpy as np

from recollect.tasks.files import read_text


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ancient blue bold brass brave bright broken bronze calm careful cheerful clean clever cold copper crooked curious
    dark distant dusty early eager empty faded famous fancy fine flat fragile frozen gentle giant golden grand green grey
    handsome heavy hidden hollow honest humble idle ivory jolly lazy light little lonely loud lucky marble mellow modest
    narrow noble odd painted pale patient plain polished proud quick quiet rare rough round rusty scarlet sharp shiny silent
    silver simple slim slow small smooth soft solid stern stubborn sturdy sunny swift tall tame thin tiny tired velvet
    violet warm wide wild wise wooden young
    """
)
NOUNS = _words(
    """
    anchor anvil apple arrow badger barrel basket beaver bell bench bottle bridge broom bucket butter button cabin camel
    candle canoe carpet cellar chair cherry chimney clock coat compass cradle crane curtain dagger desk dolphin drum engine
    falcon feather fence fiddle flute fountain fox garden gate glove goose hammer hammock harbour harp hedge heron hinge
    jacket jug kettle kite ladder lamp lantern lemon lizard locket loom magnet maple marble meadow mirror mitten needle oar
    orchard otter oven paddle parrot pebble pencil piano pillow plough pocket quill rabbit raft ribbon rocket saddle sail
    scarf shovel spoon stove sparrow table teapot thimble ticket tower trumpet tunnel turnip umbrella vase violin wagon
    walnut whistle window
    """
)
CITIES = _words(
    """
    Accra Amsterdam Ankara Athens Auckland Baghdad Bangkok Barcelona Beirut Belgrade Berlin Bogota Boston Brussels Bucharest
    Budapest Cairo Casablanca Chicago Copenhagen Dakar Delhi Denver Dublin Edinburgh Florence Geneva Hamburg Havana Helsinki
    Houston Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Miami Montreal Moscow Mumbai Nairobi
    Naples Oslo Paris Perth Prague Quito Riga Rome Santiago Seattle Seoul Shanghai Sofia Stockholm Sydney Tehran Tokyo
    Toronto Tunis Vienna Warsaw Zurich
    """
)
KINDS = ("numbers", "words", "uuids")
N_DIGITS = 7

RULER_TEMPLATES = {
    "needle": "One of the secret {kinds} kept under {key} reads: {value}.",
    "noise": "Rain falls on the roof. The kettle hums. A door stands open. We wait a while. Then all is still.",
    "one": "The text below hides a secret {kind}. Keep it in mind: a question about the {kind} comes at the end.\n{context}\n"
    "Which secret {kind} is kept under {query} in the text above? The secret {kind} kept under {query} in the text above is",
    "many": "The text below hides some secret {kinds}. Keep them in mind: a question about the {kinds} comes at the end.\n"
    "{context}\nWhich secret {kinds} are kept under {query} in the text above? "
    "The secret {kinds} kept under {query} in the text above are",
}
NEEDLES_TEMPLATES = {
    "needle": "The lucky number of {key} is {value}.",
    "one": "{context}\n\nWhat is the lucky number of {query}? The lucky number of {query} is",
}
# For every template the fields in braces that it must hold, and those that it may hold besides.
TEMPLATE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "noise": (set(), set()),
    "needle": ({"key", "value"}, {"kind", "kinds"}),
    "one": ({"context", "query"}, {"kind", "kinds"}),
    "many": ({"context", "query"}, {"kind", "kinds"}),
}


def read_words(option: str, path: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The distinct words of a file, one a line, in order; `default` without a file.

    Args:
        option: what users call this file; for messages.
    Raises:
        ValueError: the file cannot be read, or holds no words, or one with a sign that ends a needle or parts a list (. , { }).
    """
    if path is None:
        return default
    words = tuple(dict.fromkeys(line.strip() for line in read_text(option, path).splitlines() if line.strip()))
    if not words:
        raise ValueError(f"{option}={path!r} holds no words; it needs one a line")
    for word in words:
        if re.search(r"[.,{}]", word):
            raise ValueError(f"{option}={path!r} has the line {word!r}; a word holds no full stop, comma or brace")
    return words


def draw(rng: np.random.Generator, kind: str, adjectives: tuple[str, ...], nouns: tuple[str, ...]) -> str:
    """One key or value.

    numbers: 7 digits, uniform over 1,000,000 .. 9,999,999. words: "adjective-noun", uniform over all pairs. uuids: 128 random
    bits as a version-4 UUID (36 characters, 122 bits of them free).
    """
    if kind == "numbers":
        return str(rng.integers(10 ** (N_DIGITS - 1), 10**N_DIGITS))
    if kind == "words":
        return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def draw_distinct(
    rng: np.random.Generator, kind: str, n: int, adjectives: tuple[str, ...], nouns: tuple[str, ...]
) -> list[str]:
    """n different keys or values, each drawn as by `draw` until it is new."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw(rng, kind, adjectives, nouns)] = None
    return list(found)


def check_findable(where: str, templates: Mapping[str, str]) -> None:
    """Raise ValueError, beginning with `where`, for a template whose fields no pattern could find again in what it makes.

    A needle needs text around its fields; a prompt holds its context once, and what it asks for behind it.
    """
    for name, template in templates.items():
        pieces = list(Formatter().parse(template))
        outline = "".join(literal + ("" if field is None else "\0") for literal, field, _, _ in pieces)
        if name == "needle" and (outline[0] == "\0" or outline[-1] == "\0" or "\0\0" in outline):
            raise ValueError(f"{where}, {name!r} must have text before, between and behind its fields, to find them by")
        held = [field for _, field, _, _ in pieces if field is not None]
        if "context" in held and (held.count("context") > 1 or "query" not in held[held.index("context") :]):
            raise ValueError(f"{where}, {name!r} must hold {{context}} once, and {{query}} behind it")


@lru_cache(maxsize=256)
def pattern(template: str, known: tuple[tuple[str, str], ...] = (), *, after: str | None = None) -> re.Pattern[str]:
    """A pattern of the texts that a template makes: a group, within one line, for every field that is not `known`.

    Args:
        known: (field, its text) for fields whose text is settled.
        after: only the part behind this field, and only where the text ends with it.
    """
    settled, parts, seen = dict(known), [], set()
    pieces = list(Formatter().parse(template))
    if after is not None:
        pieces = pieces[[field for _, field, _, _ in pieces].index(after) + 1 :]
    for literal, field, _, _ in pieces:
        parts.append(re.escape(literal))
        if field is None:
            continue
        if field in settled:
            parts.append(re.escape(settled[field]))
        else:
            parts.append(f"(?P={field})" if field in seen else f"(?P<{field}>.+?)")
            seen.add(field)
    return re.compile("".join(parts) + ("" if after is None else r"\Z"))


def find_values(prompt: str, template: str, needle: str, *, known: tuple[tuple[str, str], ...] = ()) -> list[str]:
    """The values of the needles in a prompt whose keys it asks for, in the order of the question, then of the text.

    Args:
        template, needle: what the prompt and its needles were made of.
        known: (field, its text) for fields that are the same in all prompts.
    Raises:
        ValueError: the prompt does not end as the template does, or no needle has a key that it asks for.
    """
    question = pattern(template, known, after="context").search(prompt)
    if question is None:
        raise ValueError(f"the prompt does not end with this task's question; use the task that wrote it ({template!r})")
    found: dict[str, list[str]] = {}
    for told in pattern(needle, known).finditer(prompt, 0, question.start()):
        found.setdefault(told["key"], []).append(told["value"])
    keys = split_keys(question["query"])
    for key in keys:
        if key not in found:
            raise ValueError(
                f"no needle in the prompt tells of {key!r}; it tells of {', '.join(sorted(found)[:5]) or 'nothing'}"
            )
    return [value for key in keys for value in found[key]]


def join_keys(keys: Sequence[str]) -> str:
    """Keys as a question lists them: "a", "a, and b", "a, b, and c"."""
    return ", ".join([*keys[:-1], f"and {keys[-1]}"]) if len(keys) > 1 else keys[0]


def split_keys(query: str) -> list[str]:
    """The keys of a list that `join_keys` made."""
    return re.split(r", (?:and )?", query)


def say(values: Sequence[str]) -> str:
    """An answer as it continues a prompt: a blank, the values joined by commas, a full stop."""
    return f" {', '.join(values)}."


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError if an option's value is not a known one."""
    if value not in known:
        raise ValueError(f"{option} is one of {', '.join(known)}; got {value!r}")
