"""Memory that the C library keeps: freed tensors are used again, not given back to the system and taken anew."""

from __future__ import annotations

import ctypes
import os
import sys

# Of mallopt(3), and what is set. Larger blocks than a threshold of 32 MiB (the most that glibc takes) are mapped one by one as before.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
SETTINGS = {MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 256 * 2**20}


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for this process: steps of training ask for the same sizes again and again.

    By itself glibc gives every large block back, and the next step pays a page fault for each 4 KiB of it: a quarter to a third
    of a small model's step. The process holds on to its peak instead. Settings of the user (MALLOC_*, GLIBC_TUNABLES) stand.

    Returns:
        Whether all settings were taken: False on other systems and C libraries.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    taken = [mallopt(name, value) for name, value in SETTINGS.items()]
    return all(taken)
