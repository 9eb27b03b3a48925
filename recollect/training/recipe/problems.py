"""Sentences for what is wrong with a run's settings."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from recollect.training.recipe.settings import RunSettings


def listing(head: str, problems: Sequence[str]) -> str:
    """One problem in one line; several one per line below `head`."""
    if len(problems) == 1:
        return f"{head}: {problems[0]}"
    return "\n".join([f"{head}: {len(problems)} problems", *(f"  {problem}" for problem in problems)])


def sentence(error: Mapping[str, Any]) -> str:
    """One entry of pydantic's `ValidationError.errors()` for `RunSettings` as a sentence: setting, what is accepted, the value."""
    path = error["loc"]
    name = ".".join(map(str, path))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        return _unknown(path)
    hint = _hint(path)
    return f"{name} must be {describe(hint)}; got {error['input']!r}{_near(hint, error['input'])}"


def describe(hint: Any) -> str:
    """A field's type in words: "an integer or null"."""
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        list[str]: "a list of texts",
    }
    if hint in words:
        return words[hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        *names, last = typing.get_args(hint)
        return f"{', '.join(names)} or {last}" if names else str(last)
    if typing.get_origin(hint) is list:
        return "a list of mappings"
    return "anything" if hint is Any else "a mapping"


def names(of: type = RunSettings, prefix: str = "") -> Iterator[str]:
    """Every setting's dotted name; an item of `data.sources` as `data.sources.0`."""
    for field, hint in typing.get_type_hints(of).items():
        yield f"{prefix}{field}"
        inner, index = _section(hint)
        if inner is not None:
            yield from names(inner, f"{prefix}{field}.{index}")


def _section(hint: Any) -> tuple[type | None, str]:
    """The dataclass that a field holds, alone or in a list, and how its items are named."""
    inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    return (inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None), ("0." if inner is not hint else "")


def _hint(path: Sequence[str | int]) -> Any:
    """Type of the setting at a path."""
    hint: Any = RunSettings
    for part in path:
        if isinstance(part, int):
            hint = (*typing.get_args(hint), Any)[0]
            if isinstance(hint, types.GenericAlias):  # list[str] | None
                hint = typing.get_args(hint)[0]
        elif dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(part, Any)
        else:
            return Any
    return hint


def _unknown(path: Sequence[str | int]) -> str:
    *section, key = path
    prefix = "".join(f"{part}." for part in section)
    owner = _hint(section)
    known = list(typing.get_type_hints(owner)) if dataclasses.is_dataclass(owner) else []
    everywhere = list(names())
    same = [name for name in everywhere if name.rpartition(".")[2] == str(key)]
    near = difflib.get_close_matches(str(key), known, n=1)
    if near:
        hint = f"{prefix}{near[0]}"
    elif same:
        hint = same[0]
    else:
        far = difflib.get_close_matches(str(key), [name.rpartition(".")[2] for name in everywhere], n=1)
        hint = next((name for name in everywhere if far and name.rpartition(".")[2] == far[0]), "")
    question = f"; did you mean {hint}?" if hint else f"; known here: {', '.join(known)}"
    return f"there is no setting {prefix}{key}{question}"


def _near(hint: Any, value: Any) -> str:
    options = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    near = difflib.get_close_matches(str(value), options, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    if hint in (str, str | None) and isinstance(value, (int, float)):
        return "; write it in quotes"
    return ""


def problems_of(error: pydantic.ValidationError) -> list[str]:
    """All problems that pydantic found in a `RunSettings`, one sentence each."""
    return [sentence(entry) for entry in error.errors()]
