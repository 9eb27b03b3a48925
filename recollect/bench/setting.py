"""What is the same for all contenders of a suite: sizes, precision, machine, how long and how often."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

import recollect

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LENGTHS = tuple(512 * 2**i for i in range(8))  # to 64K
SIZES = {"mta": (16, 96), "miras": (8, 64), "decode": (16, 96), "train": (8, 64)}  # heads, channels of each
LAYERS = {"train": 6}  # of a suite's models; "decode" has a layer alone unless a depth or a shape is asked for
VOCABULARY = 257  # of models without a published shape: bytes and a separator
LIMITS = {"cpu": 10.0, "cuda": 5.0}  # seconds of a step


class Setting(NamedTuple):
    """suite: its name; device: a torch device; dtype: a name of DTYPES; batch, heads, head_dim: sizes; repeats: rounds; limit: seconds
    that a step may take; threads: of torch on the CPU.

    layers: of the suite's models, 0 where there is none; shape: name of the published size that all sizes are of, "" for none;
    vocabulary, intermediate: tokens and SwiGLU of the models (None: the model's own rule); chunk: chunk size of Miras memories, None:
    their own.
    """

    suite: str
    device: str
    dtype: str
    batch: int
    heads: int
    head_dim: int
    repeats: int
    limit: float
    threads: int
    layers: int = 0
    shape: str = ""
    vocabulary: int = VOCABULARY
    intermediate: int | None = None
    chunk: int | None = None

    @property
    def kind(self) -> str:
        """The device's type, "cpu" or "cuda"."""
        return torch.device(self.device).type

    @property
    def precision(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def width(self) -> int:
        """Model dim D."""
        return self.heads * self.head_dim

    def described(self) -> dict[str, object]:
        """The setting with the machine, as it stands in every row: rows are one measurement only if all of this is equal."""
        return {**self._asdict(), "code": code_digest(), "machine": dict(_machine())}


@functools.cache
def _machine() -> dict[str, object]:
    from recollect.comparison.plan import machine  # here: it loads transformers, and a process that measures memory needs none

    here = machine()
    return {name: here[name] for name in ("recollect", "torch", "processor", "cores", "gpu", "multi_token_attention")}


@functools.cache
def code_digest() -> str:
    """What identifies this package's source: a row of other code is another measurement."""
    total = hashlib.sha256()
    for path in sorted(Path(recollect.__file__).parent.rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def available_bytes(device: str) -> float:
    """Memory that a step can still have: free on the GPU; on the CPU nine tenths of what Linux calls available, within the limit of the
    container if there is one; infinity where neither is known."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = _lines("/proc/meminfo")
    found = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    most, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if most and used and most[0].isdigit():
        found.append(float(most[0]) - float(used[0]))
    return 0.9 * min(found, default=float("inf"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
