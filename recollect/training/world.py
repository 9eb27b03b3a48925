"""The processes of a run: torch.distributed as torchrun starts it, or one process alone."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: the longest that one process may wait for another


class World(NamedTuple):
    """This process among all.

    rank: 0 .. size - 1. size: number of processes. device: of this process.
    """

    rank: int
    size: int
    device: torch.device


def alone(device: torch.device | str = "cpu") -> World:
    """One process."""
    return World(0, 1, torch.device(device))


def find_device(name: str) -> str:
    """The device of one process: "auto" is the GPU where there is one.

    Raises:
        ValueError: a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {str(error).strip().splitlines()[0]}; cpu always can"
        ) from error
    return name


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun has started, or be alone; leave them at the end.

    Args:
        device: "auto" (the GPU of this process where there is one), "cpu", "cuda", or a device for one process alone.
    Raises:
        ValueError: "cuda" or "cuda:N" where there is none.
    """
    if device.startswith("cuda"):
        n_found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n_found <= int(device.partition(":")[2] or 0):
            found = f"{n_found} GPU{'s' * (n_found != 1)}" if n_found else "no GPU"
            raise ValueError(f"engine.device is {device}, but torch finds {found} here; set engine.device=cpu")
    kind = find_device(device) if device == "auto" else device
    if not dist.is_torchelastic_launched():
        yield alone(kind)
        return
    # Control messages travel on the CPU, so that agreeing on a stop never waits for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        rank = dist.get_rank()
        here = torch.device("cpu") if kind == "cpu" else torch.device("cuda", dist.get_node_local_rank(fallback_rank=rank))
        if here.type == "cuda":
            torch.cuda.set_device(here)
        yield World(rank, dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


def totals(world: World, *numbers: float) -> tuple[float, ...]:
    """Sums over all processes, exact for integers below 2^53."""
    if world.size == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def wait(world: World) -> None:
    """Until every process is here."""
    totals(world, 0)
