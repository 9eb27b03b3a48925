"""The command is killed, asked to stop, and run out of disk: nothing is lost, and the end is that of a run that was left alone."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recollect.training.recipe.settings import RunSettings
from recollect.training.trainer import CHECKPOINTS, run_training
from tests.training.processes import command, started
from tests.training.runs import finish, journal, losses, model_bits, out_again, stop_after, tiny_run, validation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and mounts as Linux has them"),
]
DROPOUT = [{"mixer": "mta", "dropout": 0.2}, {"mixer": "memora"}]
N_KILLS = 24


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("layers", "data"), [(DROPOUT, {}), (["yaad", "mamba2"], {"carry": True})], ids=["dropout", "carry"])
def test_a_run_killed_many_times_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, layers: Any, data: dict[str, Any]
) -> None:
    """SIGKILL at random moments: while it starts, between steps, and in every third case while a checkpoint is being written."""
    run = tiny_run(
        tmp_path,
        layers=layers,
        data={"shards": None, **data},
        steps=400,
        eval_every=50,
        saving={"every_steps": 1},
        logging={"every_seconds": 0.0, "tensorboard": True},
    )
    draw = random.Random(0)
    n_killed = n_writing = 0
    for n in range(3 * N_KILLS):
        if n_killed >= N_KILLS and n_writing >= 5:
            break
        log, begun = tmp_path / f"log{n}", time.time()
        with started(command(run), log=log) as job:
            if n % 6 == 0:
                time.sleep(draw.uniform(0, 6))
            else:
                n_steps = draw.randint(1, 8)
                wait_until(lambda log=log, n_steps=n_steps: n_steps_said(log) >= n_steps, job)  # type: ignore[misc]
                if n % 2:
                    wait_until(lambda begun=begun: half_written(run, begun), job, pause=0.0)  # type: ignore[misc]
                time.sleep(draw.uniform(0, 0.02))
            job.kill()
            assert job.wait() == -signal.SIGKILL, f"ended by itself:\n{log.read_text()[-2000:]}"
        n_killed += 1
        n_writing += half_written(run, begun)
    assert n_killed >= 20
    assert n_writing >= 5
    done = subprocess.run(command(run), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stdout + "".join(log.read_text() for log in tmp_path.glob("log*"))

    whole = out_again(run, "whole")
    bits = finish(whole)
    assert model_bits(run) == bits
    assert losses(run) == losses(whole)
    assert sorted(losses(run)) == list(range(1, 401))
    assert validation(run) == validation(whole)
    assert not [path for path in (Path(run.out) / CHECKPOINTS).iterdir() if path.name.startswith(".")]
    assert {path.name for path in Path(run.out).iterdir() if path.name != ".lock"} == {
        *("run.yaml", "progress.jsonl", "checkpoints", "model", "tokens", "curves.png", "tensorboard")
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_status_75(tmp_path: Path, number: signal.Signals) -> None:
    """Schedulers send SIGTERM and start the job again if it says so; no step may be lost or done twice."""
    run = tiny_run(tmp_path, layers=DROPOUT, steps=200, eval_every=50)
    with started(command(run), log=tmp_path / "log") as job:
        wait_until(lambda: n_steps_said(tmp_path / "log") >= 5, job)
        job.send_signal(number)
        assert job.wait(timeout=30) == 75
    text = (tmp_path / "log").read_text()
    assert "the same command goes on" in text
    assert "Traceback" not in text
    (checkpoint,) = (Path(run.out) / CHECKPOINTS).iterdir()
    assert int(checkpoint.name[5:]) == max(losses(run)) >= 1
    assert subprocess.run(command(run), capture_output=True, timeout=300, check=False).returncode == 0
    whole = out_again(run, "whole")
    assert finish(whole) == model_bits(run)
    assert losses(whole) == losses(run)
    assert not any(event["step"] <= int(checkpoint.name[5:]) for event in journal(run) if event["event"] == "saved")


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint(tmp_path: Path) -> None:
    """On a small disk of its own; with space again, the same command goes on and loses nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        run = tiny_run(tmp_path, out="disk/run", layers=DROPOUT, steps=12, saving={"every_steps": 4}, eval_every=0)
        assert_survives(run, fill=lambda: fill(disk), free=lambda: (disk / "filler").unlink(), words="disk is full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_ends_with_a_sentence_and_the_last_checkpoint(tmp_path: Path) -> None:
    """The same where no disk can be mounted: files may not grow beyond 16 KiB, which only those of a checkpoint do."""
    run = tiny_run(tmp_path, layers=DROPOUT, steps=12, saving={"every_steps": 4}, eval_every=0)
    assert_survives(run, fill=lambda: None, free=lambda: None, words="too large", file_bytes=16 << 10)


def assert_survives(
    run: RunSettings, *, fill: Callable[[], None], free: Callable[[], None], words: str, file_bytes: int | None = None
) -> None:
    """Stopped at step 2; without space the next part fails and leaves that checkpoint; with space the run ends as one left alone."""
    whole = out_again(run, "whole")
    if "disk/" in run.out:
        whole = out_again(run, "../whole")
    bits = finish(whole)
    run_training(run, should_stop=stop_after(2), say=lambda line: None)
    before = contents(run)
    fill()

    def limit() -> None:
        if file_bytes:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    done = subprocess.run(command_beside(run), capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)
    assert done.returncode not in (0, 75)
    assert done.returncode > 0
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert contents(run) == before
    free()
    done = subprocess.run(command_beside(run), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step 2\n" in done.stdout
    assert model_bits(run) == bits
    assert losses(run) == losses(whole)


def command_beside(run: RunSettings) -> list[str]:
    """The command, its run file not on the small disk."""
    arguments = command(run)
    place = Path(arguments[-1])
    if place.parent.name == "disk":
        arguments[-1] = str(shutil.move(place, place.parent.parent / place.name))
    return arguments


def contents(run: RunSettings) -> dict[str, bytes]:
    """Every file of the checkpoints."""
    folder = Path(run.out) / CHECKPOINTS
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(disk: Path) -> None:
    """Leave 24 KiB: enough for lines of the journal, not for a checkpoint."""
    with (disk / "filler").open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - (24 << 10)))


def wait_until(holds: Callable[[], bool], job: subprocess.Popen[bytes], *, pause: float = 0.01, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert job.poll() is None, f"the job ended with status {job.returncode}"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(pause)


def half_written(run: RunSettings, since: float) -> bool:
    """Whether a checkpoint lies there under its temporary name, and has since that time."""
    found = (Path(run.out) / CHECKPOINTS).glob(".step-*")
    with contextlib.suppress(FileNotFoundError):  # renamed in this moment
        return any(path.stat().st_mtime >= since for path in found)
    return False


def n_steps_said(log: Path) -> int:
    """Steps that a job has reported."""
    return log.read_text(errors="replace").count(" tokens/s, ") if log.exists() else 0
