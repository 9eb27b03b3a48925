"""A run from its file: YAML, inheritance (`base:`), overrides, and the recipes that are shipped with the package.

A recipe is a YAML file in `shipped/`. One with `variants` and `sizes` is a family: it stands for every `VARIANT-SIZE`, which is
the file's own settings, then the variant's, then the size's.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic

from recollect.training.recipe.problems import listing, problems_of
from recollect.training.recipe.settings import RunSettings
from recollect.training.recipe.syntax import parse_yaml, write_yaml
from recollect.training.recipe.tree import Tree, expand, merge, override


def load_run(file: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """The run that a file or a shipped recipe describes. Names and types are checked; `check` looks at the values.

    Args:
        file: a YAML file, or the name of a recipe (`recipes()`). A file may inherit: `base: mta-300m`, `base: other.yaml` (relative
            to itself) or a list of these, the later over the earlier; its own settings win. `out` is `runs/NAME` unless given,
            NAME being the recipe's, or the file's without its ending.
        overrides: "name=value" with dotted names and numbers of list items, values in YAML: "model.hidden_size=128",
            "data.sources=[a.txt]", "data.sources.0.weight=2", "optimiser.lr=1e-3". They win over the file; of two for one name the
            later wins.
    Raises:
        ValueError: no such file or recipe, not YAML, an unknown setting (the nearest is named), a value of another type, an override
            that does not fit; all problems at once, one per line.
    """
    tree, name = _load(file)
    settings, problems = _parse_overrides(overrides)
    tree, misplaced = override(tree, settings)
    problems += misplaced
    try:
        run = pydantic.TypeAdapter(RunSettings).validate_python({"out": f"runs/{name}", **tree})
    except pydantic.ValidationError as error:
        raise ValueError(listing(str(file), [*problems, *problems_of(error)])) from error
    if problems:
        raise ValueError(listing(str(file), problems))
    return run


def dump_run(run: RunSettings) -> str:
    """The run as YAML with every setting; `load_run` of it gives an equal run."""
    return write_yaml(dataclasses.asdict(run))


def normal(run: RunSettings) -> RunSettings:
    """The same run with every value in its own type, as a file would give it: 2 steps of warm-up become 2.0."""
    return pydantic.TypeAdapter(RunSettings).validate_python(dataclasses.asdict(run))


def recipes() -> dict[str, str]:
    """Name -> what it is, in one line, of every shipped recipe."""
    return {name: about for name, (about, _) in _shipped().items()}


def _load(file: str | Path) -> tuple[Tree, str]:
    """The merged tree of a file or recipe, and its name."""
    shipped = _shipped()
    if str(file) in shipped:
        return copy.deepcopy(shipped[str(file)][1]), str(file)
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the run file in it")
    if not path.is_file():
        near = difflib.get_close_matches(str(file), shipped, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"there is no run file and no recipe {str(file)!r}{hint} `recollect train --recipes` lists the recipes"
        )
    return _load_file(path, ()), path.stem


def _load_file(path: Path, above: tuple[Path, ...]) -> Tree:
    """A run file over what it inherits; `above` are the files that inherit from it."""
    if path.resolve() in above:
        chain = " -> ".join(str(step) for step in (*above, path.resolve()))
        raise ValueError(f"run files inherit from each other in a circle: {chain}")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    shipped = _shipped()
    below: Tree = {}
    for base in _bases(tree, str(path)):
        if base in shipped:
            inherited = copy.deepcopy(shipped[base][1])
        elif (path.parent / base).is_file():
            inherited = _load_file(path.parent / base, (*above, path.resolve()))
        else:
            near = difflib.get_close_matches(base, shipped, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}: base {base!r} is neither a recipe nor a file beside it{hint}")
        below = merge(below, inherited)
    return merge(below, _settings(tree))


def _parse(text: str, name: str) -> Tree:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error
    if not isinstance(tree, dict | None):
        raise ValueError(f"{name} must hold settings (name: value); it holds {type(tree).__name__}")
    return tree or {}


def _bases(tree: Tree, name: str) -> list[str]:
    bases = tree.get("base") or []
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{name}: base must be a recipe, a file or a list of these; got {tree['base']!r}")
    return bases


def _settings(tree: Tree) -> Tree:
    """What of a file is settings: `base` says where to start, `about` is for people."""
    return expand({key: value for key, value in tree.items() if key not in ("base", "about")})


def _parse_overrides(overrides: Sequence[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """(dotted name, value) of each override, and what is wrong with the others."""
    settings: list[tuple[str, Any]] = []
    problems: list[str] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            problems.append(f"{text!r} is not name=value, as in model.n_layers=8")
            continue
        try:
            # A pattern (*.txt) is a text here: YAML's aliases mean nothing in a single value.
            settings.append((name.strip(), value.strip() if value.strip().startswith("*") else parse_yaml(value)))
        except ValueError as error:
            problems.append(f"the value of {name.strip()} is not YAML ({error}); put it in quotes")
    return settings, problems


@functools.cache  # of files that do not change; nothing that is handed out is part of it
def _shipped() -> dict[str, tuple[str, Tree]]:
    """Name -> (line, tree) of every shipped recipe: single ones first, families in the order of variants, then sizes."""
    folder = resources.files("recollect.training.recipe") / "shipped"
    files = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    bodies = {name: _parse(file.read_text(encoding="utf-8"), file.name) for name, file in sorted(files.items())}
    found: dict[str, tuple[str, Tree]] = {}
    for name, body in sorted(bodies.items(), key=lambda item: "variants" in item[1]):
        own = _settings({key: value for key, value in body.items() if key not in ("variants", "sizes")})
        for base in reversed(_bases(body, name)):
            family = {key: value for key, value in bodies[base].items() if key not in ("variants", "sizes")}
            own = merge(_settings(family), own)
        if "variants" not in body:
            found[name] = (body["about"], own)
        for variant, mixer in body.get("variants", {}).items():
            for size, shape in body["sizes"].items():
                about = f"{mixer['about']}, {shape['about']}, {body['about']}"
                found[f"{variant}-{size}"] = (about, merge(merge(own, _settings(mixer)), _settings(shape)))
    return found
