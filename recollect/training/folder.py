"""A folder that long work writes into: one process at a time, whose work it is, and what it means when the disk takes no more."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"


class Busy(Exception):
    """Another process holds a lock."""


def changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of whatever differs between two nested dicts, in the order of the names."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


@contextlib.contextmanager
def locked(folder: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold `folder`/.lock; the operating system lets go of it when the process ends, however it ends.

    Raises:
        Busy: another process holds it for longer than `wait_seconds`.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out, nothing else changes
        yield
        return
    deadline = time.monotonic() + wait_seconds
    with open(folder / LOCK, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise Busy(f"{folder} is in use by another recollect process") from error
                time.sleep(0.1)
        yield


def is_disk_full(error: BaseException) -> bool:
    """ENOSPC or EDQUOT, also where a library has turned it into a text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
