"""Every setting of a run with its type, default and meaning, read from the dataclasses: `recollect train --help`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from recollect.data.settings import SourceSettings
from recollect.training.recipe.problems import describe
from recollect.training.recipe.settings import RunSettings

EXAMPLES = """\
recollect train tiny data.sources=[book.txt]            a recipe, and your text
recollect train RUN.yaml optimiser.lr=1e-3              a file, one setting changed
recollect train long-context model.start_from=runs/a    a trained model goes on

A setting is named with dots (model.n_layers=8), an item of a list by its number (data.sources.0.weight=2). Values are YAML: quote
what the shell would take apart ('data.sources=[{paths: [a.txt], weight: 2}, b.txt]')."""


class Setting(NamedTuple):
    """One setting: dotted name, type in words, default (None where it has none of its own), meaning."""

    name: str
    kind: str
    default: Any
    text: str


def explain(width: int = 100) -> str:
    """Every setting, section by section, as plain text of at most `width` columns where names allow."""
    parts = [EXAMPLES]
    for title, text, entries in sections():
        lines = [f"{title}: {text}" if title else text]
        for entry in entries:
            default = "" if entry.default is dataclasses.MISSING else f", default {shown(entry.default)}"
            lines.append(f"  {entry.name}  ({entry.kind}{default})")
            lines.append(textwrap.fill(entry.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def sections() -> Iterator[tuple[str, str, list[Setting]]]:
    """(section, what it is, its settings) of a run: the run itself (section ""), then its parts, then a source of data."""
    hints = typing.get_type_hints(RunSettings)
    parts = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    yield "", _summary(RunSettings), [entry for entry in _settings(RunSettings, "") if entry.name not in parts]
    for name, cls in parts.items():
        yield name, _summary(cls), _settings(cls, f"{name}.")
        if name == "data":
            title = "data.sources.0, .1, ... and data.validation.0, ..."
            yield title, _summary(SourceSettings), _settings(SourceSettings, "data.sources.0.")


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(cls: type, prefix: str) -> list[Setting]:
    texts, hints = meanings(cls), typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found.append(Setting(f"{prefix}{field.name}", describe(hints[field.name]), default, texts.get(field.name, "")))
    return found


def meanings(cls: type) -> dict[str, str]:
    """Field -> text, from the "Attributes:" section of a class' docstring ("a, b: text" is for both)."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section.split("\n\n")[0]):
        names, _, text = entry.partition(":")
        texts.update((name.strip(), " ".join(text.split())) for name in names.split(","))
    return texts


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").split("\n")[0]
