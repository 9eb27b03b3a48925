"""docs/training.md: its run files load, its commands name recipes and settings that exist, its Python compiles."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from recollect.training.recipe.check import check
from recollect.training.recipe.load import load_run, recipes

GUIDE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def train_commands() -> list[list[str]]:
    """What follows `train` in every command that trains, in the blocks and in the text."""
    inline = [" ".join(text.split()) for text in re.findall(r"`(recollect train [^`]+)`", GUIDE)]
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in [*lines, *inline]]
    starts = ("train", "examples/slurm/train.sbatch")
    found = [line[next(i for i, word in enumerate(line) if word in starts) + 1 :] for line in words if set(starts) & set(line)]
    found += [line[4:] for line in words if line[:2] == ["bash", "examples/multi_node.sh"]]
    return [line for line in found if not line[0].startswith("-") and "--vocab-size" not in line]


def test_run_files_and_commands_of_the_guide_load(tmp_path: Path) -> None:
    """Prevents a guide whose run file or command is refused."""
    (text,) = blocks("yaml")
    file = tmp_path / "my-run.yaml"
    file.write_text(text, encoding="utf-8")
    check(load_run(file))
    commands = train_commands()
    assert len(commands) > 10
    for run, *overrides in commands:
        check(load_run(str(file) if run == "my-run.yaml" else run, overrides))


def test_python_of_the_guide_compiles() -> None:
    """Prevents a script with a syntax error."""
    (code,) = blocks("python")
    compile(code, "docs/training.md", "exec")


def test_the_guide_names_every_recipe() -> None:
    """Prevents a recipe that the guide's table leaves out."""
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in GUIDE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row if not name.endswith("-") and name in recipes()}
    for row in rows:
        named |= {f"{first}{size}" for first in row if first.endswith("-") for size in row}
    assert set(recipes()) <= named
