"""The command line. Thin: it turns words into a request and prints what comes back."""

from __future__ import annotations

import os

from recollect.cli import bench, compare, evaluate, inspect, listing, memory, reproduce, retrofit, train  # noqa: F401 (each registers its commands)
from recollect.cli.shared import app
from recollect.training.allocator import keep_freed_memory

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    # Before torch is imported: two spinning OpenMP threads on busy cores cost up to 300 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    app()
