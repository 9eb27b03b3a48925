"""Freed memory that is kept, in processes of their own: the settings last as long as a process does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Pages taken by the last 60 of 90 steps whose tensors are of 4 MiB: a thousand pages of 4 KiB each, where nothing is kept. The first
# find how much the process needs at most.
PROGRAM = """
import resource, sys
from recollect.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
import torch
weight = torch.ones(1024, requires_grad=True)
def steps(n):
    for _ in range(n):
        x = torch.ones(1024, 1024)
        for _ in range(8):
            x = (x * weight).sigmoid()
        x.sum().backward()
steps(30)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(60)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not sys.platform.startswith("linux"), reason="mallopt is glibc's"
)


def said(how: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True).stdout.split()


def test_freed_memory_is_used_again() -> None:
    taken, faults = said("keep")
    assert taken == "True"
    assert int(faults) * 5 < int(said("leave")[0])


def test_what_the_user_has_set_stands() -> None:
    taken, _ = said("keep", MALLOC_ARENA_MAX="2")
    assert taken == "False"
