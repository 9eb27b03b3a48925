"""The published scale of an experiment: a script of its commands, for a cluster or one machine with GPUs."""

from __future__ import annotations

import re
from pathlib import Path

from recollect.reproduction.experiment import Experiment
from recollect.training.checkpoint import replace_file

PAPER = """#!/bin/bash
# {name}: {about}
#
# Every training is a job of $NODES nodes of 8 GPUs (the papers: 4, of models of 1 B and more 8), which goes on by itself after
# an interruption; with NODES=0 it runs here, on the GPUs of this machine. What has ended is not done again when the script is.
# Files that are yours to bring: validation (a folder of texts per domain), haystack.txt, essays.txt, pg19, babi.
set -e
NODES=${{NODES:-4}}

train() {{
    if [ "$NODES" -gt 0 ]; then
        sbatch --wait --nodes "$NODES" "${{TRAIN_SBATCH:-examples/slurm/train.sbatch}}" "$@"
    else
        torchrun --standalone --nproc-per-node gpu -m recollect.cli train "$@"
    fi
}}

{commands}
"""


def write_paper(experiment: Experiment, out: Path) -> Path:
    """The commands of the published scale as a shell script for a cluster.

    Raises:
        OSError: it cannot be written.
    """
    commands = "\n".join(map(_line, experiment.paper))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{experiment.name}.sh"
    replace_file(path, PAPER.format(name=experiment.name, about=experiment.about, commands=commands).encode())
    path.chmod(0o755)
    return path


def _line(command: str) -> str:
    """A command as the script has it: trainings are jobs, and a model that is there is not made again (trainings go on)."""
    if command.startswith("recollect train "):
        return command.removeprefix("recollect ")
    made = re.search(r"--out (\S+)|save_pretrained\('([^']+)'\)", command)
    if made and command.startswith(("recollect retrofit ", "python ")):
        return f"[ -e {made[1] or made[2]} ] || {command}"
    return command
