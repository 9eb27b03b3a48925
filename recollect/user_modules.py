"""A user's own mixers and tasks: importing the module that registers them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def import_user_modules(names: Iterable[str]) -> list[dict[str, str]]:
    """Import modules by dotted name or file name, so that their `@register(...)` runs.

    Args:
        names: `my_package.my_mixer` (the current folder is searched too) or `path/to/my_mixer.py`.
    Returns:
        for each the name as given, made absolute if it is a file, and the sha256 of its source.
    Raises:
        ValueError: there is no such module, or importing it fails.
    """
    return [_import(name) for name in names]


def _import(name: str) -> dict[str, str]:
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ValueError(f"--import {name}: there is no such file")
    try:
        module = _import_file(path.resolve()) if is_file else _import_module(name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"--import {name} failed: {type(error).__name__}: {error}") from error
    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    return {"name": str(path.resolve()) if is_file else name, "sha256": hashlib.sha256(source).hexdigest()}


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    loaded = sys.modules.get(path.stem)
    if loaded is not None and loaded.__file__ and Path(loaded.__file__).resolve() == path:
        return loaded
    if loaded is not None:
        raise ImportError(f"a module named {path.stem!r} exists already; rename the file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)
