"""The dependency rule, by parsing imports: which part of the package may import which, and which libraries."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_package import pyproject

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recollect"

# Part -> the other parts it may import. A part is a module or folder directly under recollect/; "" is recollect/__init__.py.
ALLOWED: dict[str, set[str]] = {
    "": {"mixers", "models", "ops", "presets", "state", "tasks"},  # names only: imported when they are first used
    "ops": set(),
    "presets": {"ops"},
    "state": set(),
    "tasks": set(),
    "kernels": {"ops"},
    "mixers": {"kernels", "ops", "state"},
    "models": {"mixers", "ops", "state"},
    "data": {"tasks"},  # the type of a batch
    "training": {"data", "models", "ops", "state", "tasks"},  # ops: which form of them ran
    "user_modules": set(),
    "pages": set(),
    "terminal": set(),
    "inference": {"data", "models", "user_modules"},
    # The loss that is reported is the one that is trained on.
    "evaluation": {"data", "inference", "models", "pages", "state", "tasks", "terminal", "training", "user_modules"},
    "comparison": {"data", "evaluation", "kernels", "mixers", "models", "pages", "state", "tasks", "training", "user_modules"},
    "bench": {"comparison", "kernels", "mixers", "models", "ops", "state", "training"},
    "reproduction": {"comparison", "evaluation", "inference", "inspection", "models", "pages", "terminal", "training"},
    "inspection": {"evaluation", "mixers", "models", "ops", "pages"},
    "__main__": {"cli"},
    "cli": {
        "bench",
        "comparison",
        "data",
        "evaluation",
        "inference",
        "inspection",
        "kernels",
        "mixers",
        "models",
        "ops",
        "reproduction",
        "state",
        "tasks",
        "terminal",
        "training",
        "user_modules",
    },
}

# Parts that must run wherever torch runs.
LEAN = {
    "": set(),
    "ops": set(),
    "state": {"safetensors"},
    "kernels": {"fla", "triton"},
    "mixers": {"safetensors"},
    "pages": set(),
    "tasks": set(),
}
MODULE_OF = {"lm-eval": "lm_eval", "pyyaml": "yaml"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def parts_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of ours; a name that is no module (`from recollect import __version__`) is none."""
    for line, name in imports(path):
        words = name.split(".")
        if (
            words[0] == "recollect"
            and len(words) > 1
            and ((PACKAGE / words[1]).is_dir() or (PACKAGE / f"{words[1]}.py").exists())
        ):
            yield line, words[1]


def libraries(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every import that is neither ours nor Python's."""
    for line, name in imports(path):
        top = name.split(".")[0]
        if top != "recollect" and top not in sys.stdlib_module_names:
            yield line, top


def test_every_part_has_a_rule() -> None:
    """Prevents a new folder from escaping the rule."""
    assert {part_of(path) for path in files()} <= set(ALLOWED)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_dependency_rule(path: Path) -> None:
    """Prevents ops that need a config, tasks that need a model, and cycles between folders."""
    part = part_of(path)
    wrong = [
        f"line {line} imports recollect.{other}" for line, other in parts_imported(path) if other not in {part, *ALLOWED[part]}
    ]
    assert not wrong, f"recollect.{part} may import {sorted(ALLOWED[part]) or 'nothing of ours'}: {wrong}"


def test_the_rule_has_no_cycle() -> None:
    """Prevents a rule that allows two folders to need each other."""
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [part for part in ALLOWED if part not in order and ALLOWED[part] <= set(order)]
        assert ready, f"cycle among {sorted(set(ALLOWED) - set(order))}"
        order += ready


@pytest.mark.parametrize(
    "path", [path for path in files() if part_of(path) in LEAN], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_lean_parts_need_torch_and_numpy_alone(path: Path) -> None:
    """Prevents mathematics that cannot run without a framework, a plotting library or a GPU."""
    part = part_of(path)
    wrong = [f"line {line}: {name}" for line, name in libraries(path) if name not in {"torch", "numpy", *LEAN[part]}]
    assert not wrong, wrong


def test_every_library_is_a_declared_dependency_and_used() -> None:
    """Prevents an install that cannot import itself, and one that downloads what nothing uses."""
    project = pyproject()["project"]

    def modules(requirements: list[str]) -> set[str]:
        names = [name.split(">")[0].split("=")[0].split("<")[0] for name in requirements]
        return {MODULE_OF.get(name, name) for name in names}

    extras = project["optional-dependencies"]
    declared, optional = modules(project["dependencies"]), modules(extras["train"] + extras["eval"])
    used = {name for path in files() for _, name in libraries(path)}
    assert used - {"fla", "triton", "pyarrow"} - optional == declared  # pyarrow comes with datasets
    assert optional - used <= {"tensorboard"}  # torch imports it
