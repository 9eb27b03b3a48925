"""What every benchmark shares: interleaved medians, the machine's own floor, peak memory of a fresh process, one table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table


class Measure(NamedTuple):
    """A row of the table: what, the value, the goal as text, whether it is met (None: information only)."""

    measure: str
    value: str
    goal: str = ""
    met: bool | None = None


def interleaved(runs: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, in turn A B C A B C ..., after one warm-up each: drift of the machine hits all alike."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """(median, lowest, highest) of the round-by-round ratios of two interleaved series."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def matmul_rate(size: int = 1024, repeats: int = 9) -> float:
    """The machine's fp32 matrix-product rate in FLOP/s, best of `repeats` at size^3 with torch's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(interleaved({"matmul": lambda: a @ b}, repeats=repeats)["matmul"])


def copy_rate(megabytes: int = 256, repeats: int = 5) -> float:
    """Memory bandwidth in bytes/s, read plus write, of a large copy."""
    a = torch.ones(megabytes * 2**18)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / min(interleaved({"copy": lambda: b.copy_(a)}, repeats=repeats)["copy"])


def extra_peak_bytes(module: str, *arguments: str) -> int:
    """Peak memory beyond its inputs that `python -m module arguments` reports as its last line of output, in a fresh process."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def peak_during(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process peaks above its level before the call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def show(title: str, rows: list[Measure], json_path: str | None) -> int:
    """Print the table, write `--json FILE` as a list of {measure, value, goal, met}; exit code 1 if a goal is missed."""
    table = Table(title=title, title_justify="left")
    for heading in ("measure", "value", "goal", "met"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.measure, row.value, row.goal, "" if row.met is None else "yes" if row.met else "no")
    Console(width=max(100, Console().width)).print(table)
    if json_path:
        temporary = Path(f"{json_path}.tmp{os.getpid()}")
        temporary.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        os.replace(temporary, json_path)
    return int(any(row.met is False for row in rows))


def machine() -> str:
    """One line on the machine: processor, cores, torch, threads."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "processor unknown"
    )
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
