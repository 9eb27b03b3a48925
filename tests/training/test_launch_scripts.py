"""The launch scripts run, with stand-ins for Slurm and torchrun that write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = ["mta-300m", "data.sources=[{paths: [a b.txt]}]"]


def stand_in(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with the stand-ins first; `calls` gets one line per word of torchrun's call."""
    calls = tmp_path / "calls"
    stand_in(tmp_path, "torchrun", f'printf "%s\\n" "$@" > {calls}; exit "${{CODE:-0}}"')
    stand_in(tmp_path, "srun", 'shift; exec "$@"')
    stand_in(tmp_path, "scontrol", f'if [ "$1" = show ]; then echo node3; echo node4; else echo "$@" > {tmp_path}/requeued; fi')
    stand_in(tmp_path, "nvidia-smi", "exit 0")
    slurm = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2"}
    return {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def called(folder: Path) -> dict[str, str]:
    """torchrun's options by name; "run" holds what follows `-m`."""
    words = (folder / "calls").read_text().splitlines()
    at = words.index("-m")
    assert words[at + 1 : at + 3] == ["recollect.cli", "train"]
    assert words[at + 3 :] == RUN, "words with blanks stay whole"
    return dict(zip(words[:at:2], words[1:at:2], strict=True))


def test_slurm_script_starts_one_torchrun_per_node(environment: dict[str, str], tmp_path: Path) -> None:
    """Prevents nodes that never meet, arguments torn at blanks, and a lost exit code (a failed run that Slurm calls done)."""
    command = ["bash", str(EXAMPLES / "slurm" / "train.sbatch")]
    done = subprocess.run([*command, *RUN], env={**environment, "CODE": "7"}, timeout=60, check=False)
    assert done.returncode == 7
    options = called(tmp_path)
    assert (options["--nnodes"], options["--rdzv-endpoint"], options["--rdzv-id"]) == ("2", "node3:24567", "1234567")
    assert not (tmp_path / "requeued").exists()
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode == 2


def test_slurm_script_passes_the_signal_on_and_requeues(environment: dict[str, str], tmp_path: Path) -> None:
    """Prevents a job whose time is up from ending without a checkpoint, or before it is written, or for good."""
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    body = f"trap 'sleep 0.3; touch {saved}; exit 1' TERM; touch {ready}; while :; do sleep 0.05; done"
    stand_in(tmp_path, "torchrun", body)
    script = subprocess.Popen(["bash", str(EXAMPLES / "slurm" / "train.sbatch"), *RUN], env=environment)
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 0
    assert saved.exists(), "the script waited for the run to save"
    assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"


def test_multi_node_script(environment: dict[str, str], tmp_path: Path) -> None:
    """Prevents machines that never meet, arguments torn at blanks, and a usage error that starts something."""
    command = ["bash", str(EXAMPLES / "multi_node.sh")]
    assert subprocess.run([*command, "host", "2"], env=environment, capture_output=True, check=False).returncode == 2
    assert not (tmp_path / "calls").exists()
    done = subprocess.run([*command, "10.0.0.1", "2", *RUN], env={**environment, "CODE": "3", "PORT": "4000"}, check=False)
    assert done.returncode == 3
    options = called(tmp_path)
    assert (options["--nnodes"], options["--rdzv-endpoint"], options["--nproc-per-node"]) == ("2", "10.0.0.1:4000", "gpu")
    stand_in(tmp_path, "nvidia-smi", "exit 9")
    assert subprocess.run([*command, "h", "1", *RUN], env=environment, check=False).returncode == 0
    assert called(tmp_path)["--nproc-per-node"] == "1"
