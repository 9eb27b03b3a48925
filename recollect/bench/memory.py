"""Peak memory of a step beyond its inputs: the allocator's on a GPU, that of a fresh process on a CPU (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recollect.bench.clock import once
from recollect.bench.setting import Setting, available_bytes

MEASURABLE = sys.platform == "linux"
WARM_UP = 32  # tokens of a first step that loads and compiles whatever a contender needs
PATIENCE = 10  # a step that takes so many times its limit is not waited for
START = 120.0  # seconds for a process to start, build its inputs and compile


class Probe(NamedTuple):
    """One step in a process of its own. bytes: peak beyond the inputs; seconds: of the step; reason: why there is neither."""

    bytes: int | None
    seconds: float | None
    reason: str = ""


def peak_during(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process peaks above its level before the call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def gpu_peak_during(run: Callable[[], object], device: str) -> int:
    """Bytes by which torch's memory on a GPU peaks above its level before the call."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def probe(key: str, setting: Setting, length: int) -> Probe:
    """One step of a registered contender at a length, on the CPU in a fresh process.

    It may take the machine's free memory; asking for more fails there, and nothing else is lost.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recollect.bench.suites"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, key, setting, length), daemon=True)
    child.start()
    theirs.close()
    patience = START + PATIENCE * setting.limit
    try:
        if not ours.poll(patience):
            return Probe(None, None, f"no end after {patience:.0f} s")
        return Probe(*ours.recv())
    except EOFError:
        child.join()
        return Probe(None, None, f"out of memory (the process ended with status {child.exitcode})")
    finally:
        child.kill()
        child.join()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory; torch's CPU allocator raises a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))


def shortly(error: BaseException) -> str:
    """The first line of an error, with its type."""
    if out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _child(pipe: Any, key: str, setting: Setting, length: int) -> None:
    from recollect.bench.suites import CONTENDERS, SUITES  # here: the suites import this part's other files

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group: the parent ends this process, without a traceback
    torch.set_num_threads(setting.threads)
    _bound(available_bytes("cpu"))
    contender = CONTENDERS[key]
    inputs = SUITES[setting.suite].inputs
    seconds: list[float] = []
    try:
        contender.prepare(setting, inputs(setting, min(WARM_UP, length)))()
        step = contender.prepare(setting, inputs(setting, length))
        _trim()
        peak = peak_during(lambda: seconds.append(once(step)))
    except Exception as error:  # whatever a contender, ours or a peer, raises is its row's reason
        pipe.send((None, None, shortly(error)))
        return
    pipe.send((peak, seconds[0], ""))


def _trim() -> None:
    """Give back what the warm-up has freed (glibc keeps it), so that the step's own memory shows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _bound(n_bytes: float) -> None:
    """Let this process allocate so much more and no more: an allocation beyond fails instead of having Linux kill something."""
    if n_bytes == float("inf"):
        return
    import resource  # not on Windows

    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + int(n_bytes), hard))


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
