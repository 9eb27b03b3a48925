"""Worker processes: start them, hear them, stop them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from recollect.comparison.folder import DISK_FULL_TEXT, run_folder
from recollect.comparison.plan import Plan
from recollect.training.journal import DISK_FULL, DONE, STOPPED, Event, Listener

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # how long a worker may take to write its checkpoint when it is told to stop

Key = tuple[str, int]
Hear = Callable[[str, int, Event], None]


class Worker:
    """A run's process. It is told to stop by SIGTERM, and by the end of this process (its standard input is our pipe)."""

    def __init__(self, out: Path, plan: Plan, key: Key, *, arguments: Sequence[str] = (), capture: bool = False) -> None:
        self.key = key
        self.folder = run_folder(out, *key)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.listener = Listener(self.folder / "progress.jsonl")
        self.failure = ""
        command = [sys.executable, "-m", "recollect.comparison.worker", str(self.folder), "--attached", *arguments]
        with open(self.folder / "log.txt", "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if capture else log,
                stderr=log,
                env=environment(plan.threads),
                start_new_session=True,  # Ctrl-C reaches us only, and we pass it on
            )

    def hear(self) -> list[Event]:
        """New events; the reason of a failure is kept."""
        events = self.listener.new()
        for event in events:
            if event["event"] == "failed":
                self.failure = event["reason"]
        return events

    def reason(self) -> str:
        """Why the process ended without finishing, in one sentence."""
        status = self.process.returncode
        if self.failure:
            return self.failure
        if status == DISK_FULL:
            return DISK_FULL_TEXT
        if status < 0:
            name = signal.Signals(-status).name
            hint = " (out of memory?)" if -status == signal.SIGKILL else ""
            return f"the process was ended by {name}{hint}; see {self.folder / 'log.txt'}"
        return f"the process ended with status {status}; see {self.folder / 'log.txt'}"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """Kill it if it still runs, and let go of its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def environment(threads: int) -> dict[str, str]:
    """A worker's environment: as many threads as the plan says in every library, none of them spinning."""
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    # The current folder may hold the user's modules, and `recollect` itself may have been found through sys.path.
    path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
    return {"OMP_WAIT_POLICY": "passive", **os.environ, **fixed, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def run_all(out: Path, plan: Plan, keys: Sequence[Key], *, jobs: int, hear: Hear) -> dict[Key, str]:
    """Do runs, at most `jobs` at a time; `hear(label, seed, event)` gets every event of their journals.

    Returns:
        reason by run, of those that failed.
    Raises:
        KeyboardInterrupt: passed on after the workers have written their checkpoints.
        OSError: `hear` could not write, or a process could not be started; the workers are stopped first.
    """
    waiting, active, failed = deque(keys), list[Worker](), dict[Key, str]()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(Worker(out, plan, waiting.popleft()))
                hear(*active[-1].key, {"event": "launched"})
            time.sleep(POLL_SECONDS)
            for worker in list(active):
                ended = worker.process.poll() is not None  # asked before listening, so that nothing is missed
                for event in worker.hear():
                    if event["event"] != "failed":  # told once, below, whether or not the worker could say it
                        hear(*worker.key, event)
                if ended:
                    active.remove(worker)
                    worker.close()
                    if worker.process.returncode != DONE:
                        failed[worker.key] = _reason(worker)
                        hear(*worker.key, {"event": "failed", "reason": failed[worker.key]})
    except BaseException:
        _stop(active, hear)
        raise
    return failed


def _reason(worker: Worker) -> str:
    if worker.process.returncode == STOPPED:
        return "it was told to stop by another process; run the same command again"
    return worker.reason()


def _stop(workers: Sequence[Worker], hear: Hear) -> None:
    """Let every worker write a checkpoint; a second Ctrl-C, or too long a wait, kills them."""
    for worker in workers:
        worker.stop()
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while time.monotonic() < deadline and any(worker.process.poll() is None for worker in workers):
            time.sleep(POLL_SECONDS)
        for worker in workers:
            for event in worker.hear():
                with contextlib.suppress(OSError):  # a full disk: the worker's own journal has it
                    hear(*worker.key, event)
    except KeyboardInterrupt:
        pass
    finally:
        for worker in workers:
            worker.close()
