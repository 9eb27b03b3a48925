"""What users write in words: budgets, mixers with options, name=value pairs."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def parse_budget(text: str) -> tuple[int | None, float | None]:
    """(steps, None) of "1500steps" or (None, seconds) of "90s", "5m", "1h", "1h30m".

    Raises:
        ValueError: anything else, or nothing at all of it.
    """
    compact = text.replace(" ", "").replace("_", "").lower()
    if match := re.fullmatch(r"(\d+)steps?", compact):
        if int(match[1]) < 1:
            raise ValueError(f"the budget must be at least one step; got {text!r}")
        return int(match[1]), None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m(?:in)?)?(?:{number}s)?", compact)
    if not match or not compact:
        raise ValueError(f"budget {text!r} is not understood; write steps (2000steps) or wall time (90s, 5m, 1h, 1h30m)")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise ValueError(f"the budget must be more than nothing; got {text!r}")
    return None, total


def parse_mixer(text: str) -> tuple[str, dict[str, Any]]:
    """("mta", {"c_q": 2}) of "mta:c_q=2"; ("moneta", {"bias": {"name": "lp", "p": 4}}) of "moneta:bias={name: lp, p: 4}".

    Raises:
        ValueError: a part that is not option=value.
    """
    name, *parts = split_outside(text.strip(), ":")
    return name, parse_options(parts, of=f"mixer {text!r}")


def split_outside(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_options(parts: Sequence[str], *, of: str) -> dict[str, Any]:
    """{"c_q": 2, "norm": "none"} of ["c_q=2", "norm=none"]; values are YAML (numbers, true, false and null have their types).

    Raises:
        ValueError: a part that is not name=value, or a name given twice.
    """
    options: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"{of}: {part!r} is not option=value")
        if name in options:
            raise ValueError(f"{of}: {name} is given twice")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{of}: the value of {name} is not understood: {value!r}") from error
        # YAML wants a dot in 1e-3; people do not.
        options[name] = float(parsed) if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", parsed) else parsed
    return options


def check_types(cls: type, options: Mapping[str, Any], *, of: str) -> None:
    """Refuse values of another type than the dataclass field has: `c_q=two` is a mistake that arithmetic would find too late.

    Unknown names and fields of other types than int, float, bool, str and None pass; who builds `cls` looks at them.

    Raises:
        ValueError: naming option, value and what is accepted.
    """
    hints = typing.get_type_hints(cls)
    for name, value in options.items():
        hint = hints.get(name)
        accepted = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        if not accepted <= {int, float, bool, str, type(None)}:
            continue
        if type(value) in accepted or (type(value) is int and float in accepted):
            continue
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
        allowed = " or ".join(names[kind] for kind in names if kind in accepted)
        raise ValueError(f"{of}: {name} must be {allowed}; got {value!r}")
