"""The distribution: what the wheel holds, what importing it needs."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest itself brings tomli there
    import tomli as tomllib

import recollect

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recollect"
DATA_SUFFIXES = {".c", ".css", ".h", ".html", ".js", ".typed", ".yaml"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheel_holds_the_package_only() -> None:
    """Prevents wheels with tests, data or an environment in them, and packages without their `__init__`."""
    assert pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["recollect"]}
    found = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in found} <= {".py", *DATA_SUFFIXES}
    assert (PACKAGE / "py.typed").exists()
    for folder in {path.parent for path in found if path.suffix == ".py"}:
        assert (folder / "__init__.py").exists(), f"{folder} lacks __init__.py"


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_no_file_of_the_package_is_ignored_by_git() -> None:
    """Prevents a wheel that lacks a file: the build leaves out what .gitignore names, and so does a clone."""
    found = [str(path) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ignored = subprocess.run(["git", "check-ignore", *found], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""
    assert ignored.returncode == 1  # git's word for "none of them"


def test_metadata_agrees_with_the_code() -> None:
    """Prevents two versions, a console script that does not exist, a missing licence."""
    project = pyproject()["project"]
    assert project["version"] == recollect.__version__
    module, _, function = project["scripts"]["recollect"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for name in (project["readme"], *project["license-files"]):
        assert (ROOT / name).stat().st_size > 0
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter without a GPU after running `code`."""
    program = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_importing_needs_torch_only() -> None:
    """Prevents a slow import, or one that fails without CUDA, triton, Hugging Face, a plotting library or a C compiler."""
    forbidden = (
        "import subprocess\ndef run(*a, **k): raise AssertionError(a)\nsubprocess.run = subprocess.Popen.__init__ = run\n"
    )
    loaded = modules_after(forbidden + "import recollect\nassert 'mta' in recollect.available()")
    assert loaded & {"triton", "transformers", "matplotlib", "typer", "rich", "pydantic", "pytest"} == set()


def test_a_mixer_runs_without_triton_installed() -> None:
    """Prevents a hidden need for triton behind the first call."""
    code = "import sys\nsys.modules['triton'] = None\nimport torch, recollect\n"
    call = "recollect.build('mta', dim=8, n_heads=2, backend='blocked')(torch.zeros(1, 3, 8))"
    assert "recollect" in modules_after(code + call)
