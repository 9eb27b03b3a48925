"""What every benchmark shares: clocks, floor and peak memory of `recollect.bench`, a fresh process for the latter, one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from recollect.bench.clock import interleaved, ratio
from recollect.bench.floor import copy_rate, matmul_rate
from recollect.bench.memory import peak_during

__all__ = ["Measure", "copy_rate", "extra_peak_bytes", "interleaved", "machine", "matmul_rate", "peak_during", "ratio", "show"]


class Measure(NamedTuple):
    """A row of the table: what, the value, the goal as text, whether it is met (None: information only)."""

    measure: str
    value: str
    goal: str = ""
    met: bool | None = None


def extra_peak_bytes(module: str, *arguments: str) -> int:
    """Peak memory beyond its inputs that `python -m module arguments` reports as its last line of output, in a fresh process."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


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
