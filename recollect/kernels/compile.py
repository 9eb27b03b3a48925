"""Compiles `stencil.c` for one shape of the mixing with the machine's C compiler, once, and loads it with ctypes.

A build takes one to three seconds and is kept in the user's cache folder under the hash of source, flags, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("stencil.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
POINTER, SIZE = ctypes.c_void_p, ctypes.c_ssize_t


class Geometry(ctypes.Structure):
    """The C struct of the same name: tasks, rows, strides and visible keys of one block."""

    _fields_ = (
        ("groups", SIZE),
        ("per_batch", SIZE),
        ("rows", SIZE),
        ("first", SIZE),
        ("ld", SIZE),
        ("pad", SIZE),
        ("left", SIZE),
        ("start", POINTER),
        ("start_stride", SIZE),
        ("threads", ctypes.c_int),
    )


@functools.lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C compiler found on the PATH (cc, gcc or clang), None if there is none."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


@functools.lru_cache(maxsize=64)
def library(c_q: int, c_k: int, c_h: int, double: bool) -> ctypes.CDLL | None:
    """The kernel for this shape of the mixing, built if need be; None where it cannot be built or loaded.

    Args:
        c_q, c_k: kernel size (0, 0: no convolution on this side); c_h: heads mixed (1: none); double: fp64 instead of fp32.
    """
    found = compiler()
    if found is None:
        return None
    shape = (f"-DCQ={c_q}", f"-DCK={c_k}", f"-DCH={c_h}", *(("-DREAL64",) if double else ()))
    # Without OpenMP (Apple's clang) the same kernel runs on one thread.
    return _build(found, (*FLAGS, "-fopenmp", *shape)) or _build(found, (*FLAGS, *shape))


def _build(found: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """Compile to the cache (atomically: several processes may build at once) and load; None if either fails."""
    key = hashlib.sha256("\0".join((SOURCE.read_text(), *flags, found, _processor())).encode()).hexdigest()[:20]
    folder = _cache_folder()
    target = folder / f"stencil-{key}.so"
    try:
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / target.name
                command = [found, *flags, str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(built, target)
        return _declare(ctypes.CDLL(str(target)))
    except (OSError, subprocess.SubprocessError):
        return None


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types of the four functions; see their comments in stencil.c."""
    geometry = ctypes.POINTER(Geometry)
    loaded.forward.argtypes = [
        geometry,
        POINTER,
        SIZE,
        POINTER,
        POINTER,
        POINTER,
        SIZE,
        POINTER,
        SIZE,
        ctypes.c_int,
        POINTER,
        SIZE,
    ]
    loaded.mask.argtypes = [geometry, POINTER, SIZE]
    loaded.mix_backward.argtypes = [geometry, POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, SIZE]
    loaded.convolution_backward.argtypes = [
        *(geometry, POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, POINTER, SIZE),
    ]
    for name in ("forward", "mask", "mix_backward", "convolution_backward"):
        getattr(loaded, name).restype = None
    return loaded


@functools.lru_cache(maxsize=1)
def _cache_folder() -> Path:
    """A folder only this user can write: code is loaded from it. A temporary one where the home folder is not writable."""
    try:
        folder = Path.home() / ".cache" / "recollect"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="recollect-"))


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"
