"""Settings as plain trees (dicts, lists, values) before they are checked: shorthands, inheritance, overrides. Pure functions."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from recollect.data.settings import SourceSettings
from recollect.training.recipe.settings import RunSettings

Tree: TypeAlias = dict[str, Any]

_SHAPE = tuple(f"model.{name}" for name in ("size", "layers", "hidden_size", "n_layers", "n_heads", "intermediate_size"))
# Giving one of these in a run file or override takes back what its base said in the others.
RIVALS: dict[str, tuple[str, ...]] = {
    "steps": ("tokens",),
    "tokens": ("steps",),
    "model.start_from": _SHAPE,  # not the other way round: a checkpoint is not forgotten in silence
}


def merge(below: Tree, above: Tree) -> Tree:
    """`above` over `below`: mappings are merged, everything else (lists too) is replaced; rivals in `below` go."""
    return _merge(without_rivals(below, [name for name, value in leaves(above) if value is not None]), above)


def override(tree: Tree, settings: Sequence[tuple[str, Any]]) -> tuple[Tree, list[str]]:
    """Values set by dotted name ("model.n_layers", "data.sources.0.weight"), in order; a mapping is replaced, not merged.

    A number is an item of a list; the number behind the last one adds an item. All settings stand side by side: one takes back
    its rivals in `tree`, not those in another setting.

    Returns:
        the tree; and a sentence for each setting that was left out: its name leads into a value without parts, or to an item that
        is not there.
    """
    problems: list[str] = []
    tree = without_rivals(tree, [name for name, value in settings if value is not None])
    for name, value in settings:
        try:
            tree = expand(_with(tree, name.split("."), value, ""))
        except ValueError as error:
            problems.append(str(error))
    return tree, problems


def without_rivals(tree: Tree, given: Sequence[str]) -> Tree:
    """The tree without what the settings named `given` take back."""
    for rival in {rival for name in given for rival in RIVALS.get(name, ())}:
        section, _, name = rival.rpartition(".")
        if not section:
            tree = {key: value for key, value in tree.items() if key != name}
        elif isinstance(tree.get(section), dict):
            tree = {**tree, section: {key: value for key, value in tree[section].items() if key != name}}
    return tree


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is not a mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def expand(tree: Any, of: type = RunSettings) -> Any:
    """The tree with the shorthands written out.

    A source may be its path alone; a list of one item may be the item. A boolean where a number belongs becomes a text, which
    is then refused, instead of 0 or 1.
    """
    if not isinstance(tree, dict):
        return tree
    hints = typing.get_type_hints(of)
    return {key: _expanded(value, hints.get(key)) for key, value in tree.items()}


def _expanded(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return expand(value, hint)  # type: ignore[arg-type]
    kinds = set(typing.get_args(hint)) | {hint}
    if kinds & {int, float} and isinstance(value, bool):
        return str(value).lower()
    if hint == list[SourceSettings]:
        items = [value] if isinstance(value, (str, dict)) else value
        if isinstance(items, list):
            return [expand({"paths": item} if isinstance(item, str) else item, SourceSettings) for item in items]
    if list[str] in kinds and isinstance(value, str):
        return [value]
    return value


def _merge(below: Tree, above: Tree) -> Tree:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _with(node: Any, path: Sequence[str], value: Any, where: str) -> Any:
    if not path:
        return value
    head, *rest = path
    here = f"{where}.{head}" if where else head
    if node is None:
        node = [] if head.isdigit() else {}
    if isinstance(node, list):
        if not head.isdigit() or int(head) > len(node):
            raise ValueError(f"{here}: {where} has {len(node)} items; they are numbered from 0, and {len(node)} adds one")
        index = int(head)
        items = [*node, None] if index == len(node) else list(node)
        items[index] = _with(items[index], rest, value, here)
        return items
    if not isinstance(node, dict):
        raise ValueError(f"{here}: {where} is {node!r}, which has no parts; set {where} itself")
    return {**node, head: _with(node.get(head), rest, value, here)}
