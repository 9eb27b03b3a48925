"""Compiles the C kernels with the machine's C compiler, once, and loads them with ctypes.

`stencil.c` is compiled for each shape of the mixing, `memory.c` for each shape of the memory, bias and link, `attention.c` for each
precision. A build takes one to three seconds and is kept in the user's cache folder under the hash of source, flags, compiler and
processor, and the hash of what the compiler wrote.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-Wfatal-errors")
POINTER, SIZE = ctypes.c_void_p, ctypes.c_ssize_t


@functools.lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C compiler found on the PATH (cc, gcc or clang), None if there is none."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


@functools.lru_cache(maxsize=64)
def stencil(c_q: int, c_k: int, c_h: int, double: bool) -> ctypes.CDLL | None:
    """The kernel of one side for this shape of the mixing, built if need be; None where it cannot be built or loaded.

    Args:
        c_q, c_k: kernel size (0, 0: no convolution on this side); c_h: heads mixed (1: none); double: fp64 instead of fp32.
    """
    names = (
        "forward",
        "convolution_backward",
        *(("mix_gradient", "mix_backward") if c_h > 1 else ()),
        *(("correlate",) if c_q else ()),
    )
    return _build("stencil.c", (f"-DCQ={c_q}", f"-DCK={c_k}", f"-DCH={c_h}"), double, names)


@functools.lru_cache(maxsize=4)
def attention(dtype: torch.dtype, *, tiles: bool = False) -> ctypes.CDLL | None:
    """The walk over a map's strips; None where it cannot be built or loaded.

    Args:
        dtype: float32, float64, or bfloat16: its products in bfloat16, all else in float32; not every processor has them.
        tiles: products of bfloat16 on the processor's matrix tiles (Intel AMX), which fewer have.
    """
    if tiles and "amx_bf16" not in _processor():
        return None
    flags = (*(("-DBF16",) if dtype == torch.bfloat16 else ()), *(("-DTILES",) if tiles else ()))
    names = (
        "panel_width",
        "lanes",
        "pack_all",
        "scratch_size",
        "run",
        *(("ready", "turned_length", "gradient_length") if tiles else ()),
    )
    loaded = _build("attention.c", flags, dtype == torch.float64, names)
    if loaded is None or (tiles and not loaded.ready()):
        return None
    loaded.pack_all.argtypes = [POINTER, SIZE, SIZE, SIZE, POINTER, ctypes.c_int]
    loaded.scratch_size.argtypes = loaded.run.argtypes = [POINTER, ctypes.c_int]
    loaded.scratch_size.restype = SIZE
    loaded.pack_all.restype = loaded.run.restype = None
    if tiles:
        for name in ("turned_length", "gradient_length"):
            length = getattr(loaded, name)
            length.argtypes, length.restype = [SIZE], SIZE
    return loaded


@functools.lru_cache(maxsize=64)
def memory(key: int, hidden: int, bias: int, link: int, rule: int, double: bool) -> ctypes.CDLL | None:
    """The recurrence of a perceptron memory of these sizes; bias, link, rule: their numbers in memory.c.

    None where it cannot be built.
    """
    shape = (f"-DKEY={key}", f"-DHIDDEN={hidden}", f"-DBIAS={bias}", f"-DLINK={link}", f"-DRULE={rule}")
    loaded = _build("memory.c", shape, double, ("plan", "forward", "backward"))
    if loaded is None:
        return None
    loaded.plan.argtypes = [SIZE, SIZE, SIZE, *(POINTER,) * 7]
    loaded.forward.argtypes = [POINTER]
    loaded.backward.argtypes = [POINTER, POINTER]
    loaded.plan.restype = SIZE
    loaded.forward.restype = loaded.backward.restype = None
    return loaded


def _build(source: str, shape: tuple[str, ...], double: bool, names: tuple[str, ...]) -> ctypes.CDLL | None:
    """Compile one source file, with OpenMP if the compiler has it (else the kernel runs on one thread)."""
    found = compiler()
    if found is None:
        return None
    flags = (*FLAGS, *shape, *(("-DREAL64",) if double else ()))
    return _load(found, source, (*flags, "-fopenmp"), names) or _load(found, source, flags, names)


def _load(found: str, source: str, flags: tuple[str, ...], names: tuple[str, ...]) -> ctypes.CDLL | None:
    """Compile to the cache (atomically: several processes may build at once) and load; None where that fails or lacks a function."""
    try:
        text = "".join(file.read_text() for file in (*sorted(FOLDER.glob("*.h")), FOLDER / source))
        key = hashlib.sha256("\0".join((text, *flags, found, _processor())).encode()).hexdigest()[:20]
        folder, stem = _cache_folder(), f"{Path(source).stem}-{key}"
        # The name ends in the content's hash: loading a file that a crash or a full disk cut short would kill the process.
        target = next((kept for kept in folder.glob(f"{stem}-*.so") if kept.name == f"{stem}-{_digest(kept)}.so"), None)
        if target is None:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / "built.so"
                command = [found, *flags, str(FOLDER / source), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                target = folder / f"{stem}-{_digest(built)}.so"
                os.replace(built, target)
        loaded = ctypes.CDLL(str(target))
        for name in names:
            loaded[name]
        return loaded
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def _digest(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


@functools.lru_cache(maxsize=1)
def _cache_folder() -> Path:
    """A folder only this user can write: code is loaded from it. A temporary one, for this process, where the home folder has none."""
    try:
        folder = Path.home() / ".cache" / "recollect"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if os.name != "posix" or (status.st_uid == os.getuid() and not status.st_mode & 0o022):
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except (OSError, RuntimeError):
        pass
    own = tempfile.mkdtemp(prefix="recollect-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"
