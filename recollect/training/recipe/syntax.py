"""YAML as people write it: 1e-3 is a number, a key stands once, errors say where."""

from __future__ import annotations

import re
from typing import Any

import yaml

# PyYAML follows YAML 1.1, which wants a dot and a sign: 1.0e-3. YAML 1.2 and people do not.
_POWER = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """YAML allows a key twice and keeps the last; that is a mistake in every run file."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would take for a number."""


for _cls in (_Loader, _Dumper):
    _cls.add_implicit_resolver("tag:yaml.org,2002:float", _POWER, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value that a YAML text means.

    Raises:
        ValueError: it is not YAML, or a key is given twice; with the line.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        _check_ends(value, ())
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        alias = (isinstance(error.context, str) and "alias" in error.context) or "alias" in str(error.problem)
        hint = "; a text that begins with * needs quotes" if alias else ""
        raise ValueError(f"{where}{error.problem or error.context}{hint}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date like 2024-13-01 is a bare ValueError
        raise ValueError(f"not YAML: {error}") from error


def _check_ends(value: Any, above: tuple[int, ...]) -> None:
    """Refuse a value that holds itself, which aliases make possible."""
    if isinstance(value, dict | list):
        if id(value) in above:
            raise ValueError("an alias stands inside what it stands for")
        for part in value.values() if isinstance(value, dict) else value:
            _check_ends(part, (*above, id(value)))


def write_yaml(value: Any) -> str:
    """YAML of dicts, lists, texts, numbers, booleans and None; `parse_yaml` gives the value back. Order is kept."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
