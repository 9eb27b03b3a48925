"""What a machine can do at best, and what a step must do at least: achieved over floor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from recollect.bench.clock import interleaved, synchroniser


class Work(NamedTuple):
    """What a step needs. flops: additions and multiplications; bytes: what it must read and write once, inputs and results."""

    flops: float
    bytes: float


class Rates(NamedTuple):
    """What the machine reaches. flops: of matrix products, per second; bytes: of a copy, read plus write, per second."""

    flops: float
    bytes: float


def matmul_rate(size: int = 1024, repeats: int = 9, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The rate of matrix products of size^3 in FLOP/s, best of `repeats`, with torch's threads."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    runs = interleaved({"matmul": lambda: a @ b}, repeats=repeats, wait=synchroniser(device))
    return 2 * size**3 / min(runs["matmul"])


def copy_rate(megabytes: int = 256, repeats: int = 5, *, device: str = "cpu") -> float:
    """Memory bandwidth in bytes/s, read plus write, of a large copy."""
    a = torch.ones(megabytes * 2**18, device=device)
    b = torch.empty_like(a)
    runs = interleaved({"copy": lambda: b.copy_(a)}, repeats=repeats, wait=synchroniser(device))
    return 2 * a.numel() * 4 / min(runs["copy"])


def rates(device: str, dtype: torch.dtype) -> Rates:
    """Both, at sizes that fill the device."""
    if torch.device(device).type == "cuda":
        return Rates(matmul_rate(8192, device=device, dtype=dtype), copy_rate(1024, device=device))
    return Rates(matmul_rate(device=device, dtype=dtype), copy_rate())


def floor(work: Work, found: Rates) -> float:
    """Seconds below which no step with this work comes: its products at the products' rate, or its traffic at the copy's."""
    return max(work.flops / found.flops, work.bytes / found.bytes)
