"""The README is executed: its Python blocks run, its commands exist with the options that they use."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from recollect.cli import app
from recollect.mixers import MIXERS, PATTERNS, available

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {"recollect", ".venv/bin/recollect"}


def blocks(language: str) -> list[tuple[int, str]]:
    """(first line, text) of every fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [(README[: match.start(1)].count("\n") + 1, match.group(1)) for match in found]


def commands() -> list[list[str]]:
    """The words of every command line in the bash blocks; `\\` at a line's end continues it, `#` starts a comment."""
    lines = [line.removeprefix("$ ") for _, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.fullmatch(r"[A-Z_]+=.*", word)] for line in words if line]


def of_program(*names: str) -> list[list[str]]:
    return [words for words in commands() if words and words[0] in names]


def test_the_readme_shows_code_and_commands() -> None:
    """Prevents the tests below from passing on an empty README."""
    assert blocks("python")
    assert {words[1] for words in of_program("make")} >= {"demo", "test"}
    assert any(words[1] == "compare" for words in of_program(*PROGRAMS))


@pytest.mark.parametrize(("line", "code"), blocks("python"), ids=lambda value: f"line{value}" if isinstance(value, int) else "")
def test_readme_code_runs(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents examples that a reader pastes and that fail."""
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), {"__name__": "readme"})
    assert code.strip()


@pytest.mark.parametrize("words", of_program(*PROGRAMS), ids=" ".join)
def test_readme_commands_parse(words: list[str]) -> None:
    """Prevents commands, options and mixers in the README that do not exist. Nothing is run."""
    group = typer.main.get_command(app)
    name, *arguments = [word for word in words[1:] if word != "--help"] or ["list"]
    assert name in group.commands, f"recollect has no command {name!r}"  # type: ignore[attr-defined]
    if "--help" in words:
        return
    with group.commands[name].make_context(name, arguments) as context:  # type: ignore[attr-defined]
        if context.params.get("mixers") and not context.params.get("imports"):
            named = {label.split(":")[0] for label in context.params["mixers"].split(",")}
            assert named <= {*available(), *PATTERNS}


def test_readme_make_targets_exist() -> None:
    """Prevents `make` commands that the Makefile does not know."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {words[1] for words in of_program("make") if len(words) > 1} <= targets


def test_readme_modules_exist() -> None:
    """Prevents `python -m` commands for modules that are not there."""
    for words in of_program("python", "python3", ".venv/bin/python"):
        if words[1] == "-m" and words[2].split(".")[0] in ("bench", "recollect"):
            path = ROOT / words[2].replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), words[2]


def test_readme_lists_every_mixer() -> None:
    """Prevents a mixer that is registered and not described."""
    ours = [name for name in available() if MIXERS[name].cls.__module__.startswith("recollect.")]
    missing = [name for name in ours if f"`{name}`" not in README]
    assert not missing


def test_readme_has_its_results() -> None:
    """Prevents a table that was to be filled in later from being published empty."""
    assert not re.findall(r"^[A-Z]+_TABLE$|<!-- RESULTS", README, flags=re.MULTILINE)


def test_readme_links_lead_somewhere() -> None:
    """Prevents links and pictures that a reader finds broken: every relative target exists."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", README)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
