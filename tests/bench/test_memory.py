"""Memory: what a step takes is what is said, and a step that takes too much ends alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recollect.bench.memory import MEASURABLE, out_of_memory, peak_during, probe, shortly
from recollect.bench.setting import available_bytes
from tests.bench.toys import SETTING

pytestmark = pytest.mark.skipif(not MEASURABLE, reason="reads /proc, Linux only")


def test_the_peak_of_an_allocation_is_its_size() -> None:
    """Prevents counting what was there before, or only what is left after."""
    peak = peak_during(lambda: torch.ones(64 * 2**18).sum())
    assert 60 * 2**20 < peak < 80 * 2**20


def test_a_process_that_asks_for_too_much_is_told_so() -> None:
    """Prevents a run that Linux ends because one contender filled the memory."""
    code = (
        "import torch\nfrom recollect.bench.memory import _bound, out_of_memory\n"
        "_bound(64 * 2**20)\ntorch.ones(2**20)\n"
        "try:\n    torch.ones(2**28)\nexcept RuntimeError as error:\n    print(out_of_memory(error))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "True\n", done.stderr


def test_a_step_in_a_process_of_its_own_tells_its_time_or_its_error() -> None:
    """Prevents a child that dies in silence: 2 heads of 7 channels are refused by rotary positions."""
    done = probe("decode/attention", SETTING._replace(suite="decode"), 16)
    assert done.reason == ""
    assert done.bytes is not None
    assert done.seconds is not None
    refused = probe("decode/attention", SETTING._replace(suite="decode", head_dim=7), 16)
    assert refused.seconds is None
    assert "rotary positions need an even head dim" in refused.reason


def test_only_errors_of_memory_are_errors_of_memory() -> None:
    """Prevents a bug from being reported as a full memory."""
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not out_of_memory(RuntimeError("expected a tensor"))
    assert shortly(RuntimeError("expected a tensor\nat line 3")) == "RuntimeError: expected a tensor"
    assert 0 < available_bytes("cpu") < 2**50
