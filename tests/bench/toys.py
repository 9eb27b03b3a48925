"""A suite of contenders that only pretend: a clock that they move themselves, memory that they only claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recollect.bench.contenders import Check, Contender, Suite
from recollect.bench.floor import Rates, Work
from recollect.bench.memory import Probe
from recollect.bench.rows import Rows
from recollect.bench.runner import Runner
from recollect.bench.setting import Setting

SETTING = Setting(
    suite="toy",
    device="cpu",
    dtype="float32",
    batch=1,
    heads=2,
    head_dim=8,
    repeats=2,
    limit=10.0,
    threads=torch.get_num_threads(),
)


class World:
    """What the toys share: the time, what was called, the error that each makes, and the length at which each runs out of memory."""

    def __init__(self) -> None:
        self.time = 0.0
        self.calls: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.errors: dict[str, float] = {}
        self.full: dict[str, int] = {}

    def contender(self, name: str, seconds: Callable[[int], float], **more: object) -> Contender:
        """A contender whose step takes `seconds(length)` on the toys' clock."""

        def prepare(setting: Setting, length: int) -> Callable[[], list[Tensor]]:
            def step() -> list[Tensor]:
                if length >= self.full.get(f"inside {name}", length + 1):
                    raise RuntimeError(
                        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
                    )
                self.calls.append((name, length))
                self.time += seconds(length)
                return []

            return step

        return Contender(
            name=name,
            suite="toy",
            about="a toy",
            prepare=prepare,
            check=lambda setting: Check(self.errors.get(name, 0.0), 1e-6),
            work=lambda setting, length, step: Work(flops=1000.0 * length, bytes=1.0),
            **more,  # type: ignore[arg-type]
        )

    def probe(self, key: str, setting: Setting, length: int) -> Probe:
        """What a process of its own would say."""
        if length >= self.full.get(key.split("/")[1], length + 1):
            return Probe(None, None, "out of memory")
        return Probe(1000 * length, 0.001)

    def runner(self, out: Path, setting: Setting = SETTING) -> Runner:
        """A runner over the rows in a folder."""
        suite = Suite("toy", "toys", lambda setting, length: length)
        rates = Rates(flops=1e6, bytes=1e9)
        return Runner(setting, suite, Rows(out, setting), rates, self.said.append, self.probe, now=lambda: self.time)
