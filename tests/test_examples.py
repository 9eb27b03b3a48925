"""The examples run as they are told to, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def test_a_memory_is_kept_and_measured(tmp_path: Path) -> None:
    """Prevents an example that no longer fits the package: it trains, reads, saves, and another process measures."""
    book, out = tmp_path / "book.txt", tmp_path / "out"
    book.write_text("".join(f"Line {n} of a book that repeats itself. " for n in range(1200)))
    steps = ("--first-steps", "2", "--steps", "1")
    done = run("keep_a_memory.py", str(book), "--mixer", "sliding_window", "--width", "16", *steps, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "result.json").read_text())
    assert [row["distance"] for row in rows] == [0, 128, 512, 1024]
    assert all(0 < row[kind] < 10 for row in rows for kind in ("no memory", "other memory", "memory"))
    assert {path.name for path in out.iterdir()} == {
        "model",
        "result.json",
        *(f"memory-{place}.safetensors" for place in range(16)),
    }
