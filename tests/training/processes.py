"""Several processes, with and without torchrun, and how they end."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recollect.training.recipe.settings import RunSettings
from recollect.training.trainer import run_training
from tests.training.runs import stop_after, write_run

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def train_on(n: int, run: RunSettings, *, stop: int | None = None, seconds: float = 120) -> list[str]:
    """`run_training` on n processes that see what torchrun would have told them; what each said.

    They are forked from a server that has imported torch once, so starting them costs no seconds. If one fails, so does this, with
    its traceback; the others are ended, as torchrun would.

    Args:
        stop: steps after which the second process (of one: the only) asks to stop; None: never.
        seconds: after which a hang is a failure.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recollect.training.trainer", "tests.training.processes"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(n):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=_worker, args=(rank, n, port, run, stop, there), daemon=True))
        pipes.append(here)
        processes[-1].start()
        there.close()
    said: dict[int, str] = {}
    try:
        while len(said) < n:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in said]
            ready = multiprocessing.connection.wait(waiting, timeout=seconds)
            assert ready, f"processes {sorted(set(range(n)) - said.keys())} of {n} hang; the others said {said}"
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, said[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, said[rank] = False, "died"
                if not ok:
                    raise RuntimeError(f"process {rank} of {n}: {said[rank]}")
    finally:
        for process in processes:
            process.join(timeout=5 if len(said) == n else 0.2)
            process.kill()
    return [said[rank] for rank in range(n)]


def _worker(rank: int, n: int, port: int, run: RunSettings, stop: int | None, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        **QUIET,
    )
    lines: list[str] = []
    stopping = stop_after(stop) if stop is not None and rank == n - 1 else lambda: False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run_training(run, should_stop=stopping, say=lines.append)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    else:
        pipe.send((True, "\n".join(lines)))
    os._exit(0)


def command(run: RunSettings, *, processes: int = 1) -> list[str]:
    """The command that trains `run`, alone or by torchrun."""
    file = write_run(run, Path(run.out).with_name(f"{Path(run.out).name}.yaml"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "recollect.cli", "train", str(file)]


@contextlib.contextmanager
def started(arguments: Sequence[str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, with all it says in a file; killed at the end if it still runs."""
    with log.open("ab") as file:
        job = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **QUIET})
    try:
        yield job
    finally:
        job.kill()
        job.wait()
