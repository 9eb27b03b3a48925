"""Templates that a JSON file may replace: strings with fields in braces, checked when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from string import Formatter

from recollect.tasks.files import read_text


def replace_templates(
    path: str | None, default: Mapping[str, str], fields: Mapping[str, tuple[Collection[str], Collection[str]]]
) -> dict[str, str]:
    """Templates by name: `default`, with those that a JSON file (an object of strings) names in their place.

    Args:
        fields: for every name, the fields that its template must hold and those that it may hold besides. A template that may
            hold several lines is checked as a whole.
    Raises:
        ValueError: unreadable file, not an object of strings, an unknown name, a field that is missing, unknown or not just a
            name in braces.
    """
    if path is None:
        return dict(default)
    where = f"templates={path!r}"
    try:
        loaded = json.loads(read_text("templates", path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(template, str) for template in loaded.values()):
        raise ValueError(f"{where} must be one JSON object of strings; its names: {', '.join(default)}")
    for name, template in loaded.items():
        if name not in default:
            raise ValueError(f"{where} has the unknown name {name!r}; known: {', '.join(default)}")
        check_fields(f"{where}, {name!r}", template, *fields[name])
    return {**default, **loaded}


def check_fields(where: str, template: str, needed: Collection[str], allowed: Collection[str]) -> None:
    """Raise ValueError, beginning with `where`, unless the template's fields are all the needed and some of the allowed ones."""
    try:
        parsed = [(name, spec, how) for _, name, spec, how in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write {{{{ and }}}} for braces that are not fields") from error
    held = {name for name, _, _ in parsed}
    for field in sorted(set(needed) - held):
        raise ValueError(f"{where} lacks the field {{{field}}}")
    for field in sorted(held - set(needed) - set(allowed)):
        known = ", ".join(sorted({*needed, *allowed})) or "none"
        raise ValueError(f"{where} has the unknown field {{{field}}} (known: {known}); double the braces that are no fields")
    if any(spec or conversion for _, spec, conversion in parsed):
        raise ValueError(f"{where}: a field is a name in braces and nothing else")
