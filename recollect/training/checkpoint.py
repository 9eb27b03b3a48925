"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong result.

A checkpoint is a folder `step-00001200/` with `model/` and `optimiser/`, each written by torch.distributed.checkpoint as safetensors
(no pickle anywhere, one file per process, readable by any number of processes), and `state.json`, which names the sha256 of every
other file. It is written under a temporary name, synced to disk and renamed: it is whole or it is not there. Several processes
need a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from recollect.training.optimiser import Optimisers
from recollect.training.world import World, alone, totals, wait


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: updates done.
        seconds: time spent training (without evaluation and saving), over all resumptions.
        tokens: tokens read in training, by all processes.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Saving:
    """Where and when checkpoints are written.

    Attributes:
        folder: of all checkpoints of the run.
        seconds: time between two.
        steps: steps between two, besides; 0: none.
        keep_last: number of newest ones kept; one more than 1 is there to fall back on should the newest be damaged later.
        keep_best: number of those with the lowest `loss` kept besides.
    """

    folder: Path
    seconds: float = 30.0
    steps: int = 0
    keep_last: int = 2
    keep_best: int = 0


@dataclasses.dataclass
class Run:
    """What a checkpoint holds.

    Attributes:
        model, optimisers: their tensors are written, and overwritten by loading.
        fingerprint: identifies the run; checkpoints of another one are not loaded.
        data: JSON of the position in the data.
        carried: further tensors by name, of this process; loading fills those that the checkpoint has.
    """

    model: nn.Module
    optimisers: Optimisers
    fingerprint: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    carried: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Damaged(Exception):
    """A checkpoint is not whole."""


class OtherRun(Exception):
    """A whole checkpoint of another configuration, or of another version of the model's code."""


def save_checkpoint(
    run: Run, progress: Progress, saving: Saving, world: World | None = None, *, loss: float | None = None
) -> Path:
    """Write weights, buffers, optimiser, random state, data position and progress; checkpoints beyond those kept are removed.

    Args:
        loss: of the last evaluation, by which `Saving.keep_best` judges.
    Raises:
        OSError: the disk is full or not writable; existing checkpoints stay.
    """
    world = world or alone()
    final = saving.folder / f"step-{progress.step:08d}"
    temporary = saving.folder / f".{final.name}"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait(world)
    try:
        hashes = {
            **_write(temporary, "model", {**model_tensors(run.model), **run.carried}, world),
            **_write(temporary, "optimiser", {**_optimiser_tensors(run), **_random_state(world)}, world),
        }
        wait(world)
        if world.rank == 0:
            state = {
                "fingerprint": run.fingerprint,
                "progress": dataclasses.asdict(progress),
                "data": run.data,
                "loss": loss,
                "processes": world.size,
                "sha256": hashes,
            }
            write_synced(temporary / "state.json", json.dumps(state, indent=1, sort_keys=True).encode())
            sync_folder(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync_folder(saving.folder)
            _remove_old(saving)
    finally:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    wait(world)
    return final


def load_checkpoint(run: Run, folder: Path, world: World | None = None) -> tuple[Progress | None, list[str]]:
    """Restore the newest whole checkpoint of `folder` into model, optimisers, carried tensors, `run.data` and the random state.

    Damaged ones are renamed to `damaged-step-...`: they are evidence, but no longer count as the newest.

    Returns:
        progress, or None if there is no whole checkpoint (nothing is then touched); and one sentence per checkpoint that had to be
        skipped.
    Raises:
        ValueError: the newest whole checkpoint is one of another configuration; it is left as it is.
        OSError: a checkpoint cannot be read; it is left as it is.
    """
    world = world or alone(next(run.model.parameters()).device)
    skipped: dict[Path, str] = {}
    progress = None
    for path in found(folder):
        try:
            progress = _restore(path, run, world)
            break
        except Damaged as error:
            skipped[path] = f"skipped the checkpoint {path.name}: {error}"
        except OtherRun as error:
            raise ValueError(
                f"{folder} holds checkpoints of another configuration, or of another version of recollect; give another folder, or "
                "move them away to start anew"
            ) from error
    wait(world)  # all have read what is renamed now
    if world.rank == 0:
        for path in skipped:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return progress, list(skipped.values())


def found(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable (a folder cannot be opened on Windows, where the rename itself is)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write(folder: Path, part: str, tensors: Mapping[str, Tensor], world: World) -> dict[str, str]:
    """Write one part, each process its own; returns the sha256 of every file of it, by its path below `folder`."""
    path = folder / part
    contiguous = {name: t if isinstance(t, DTensor) else t.detach().contiguous() for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    with _quiet(), _plain_errors():
        dcp.save(contiguous, storage_writer=writer, no_dist=world.size == 1)
    wait(world)
    files = sorted(path.iterdir())
    mine = {f"{part}/{file.name}": _synced_hash(file) for file in files[world.rank :: world.size]}
    if world.size == 1:
        return mine
    gathered: list[dict[str, str]] = [{} for _ in range(world.size)]
    torch.distributed.all_gather_object(gathered, mine)
    return {name: value for part in gathered for name, value in part.items()}


def _restore(path: Path, run: Run, world: World) -> Progress:
    state, problem = _examine(path, world)
    n_unreadable, n_damaged = totals(world, isinstance(problem, OSError), isinstance(problem, Damaged))
    if n_unreadable:
        raise problem if isinstance(problem, OSError) else OSError(f"another process cannot read the checkpoint {path}")
    if n_damaged:
        raise problem or Damaged("a file is missing or does not match its checksum")
    if state.get("fingerprint") != run.fingerprint:
        raise OtherRun(path.name)
    weights, moments = (_shapes(path / part) for part in ("model", "optimiser"))
    current = model_tensors(run.model)
    if {name: t.shape for name, t in current.items()} != {n: s for n, s in weights.items() if not n.startswith("carried.")}:
        raise OtherRun(path.name)
    carried = {name: torch.empty(weights[name], dtype=t.dtype) for name, t in run.carried.items() if name in weights}
    _read(path / "model", {**{name: t.detach() for name, t in current.items()}, **carried}, world)
    restored = _like_optimisers(run, moments)
    random = {name: torch.empty(moments[name], dtype=torch.uint8) for name in _random_state(world) if name in moments}
    _read(path / "optimiser", {**restored, **random}, world)
    run.carried.update(carried)
    run.data = state["data"]
    _restore_optimisers(run, restored)
    _restore_random_state(random, world)
    return Progress(**state["progress"])


def _examine(path: Path, world: World) -> tuple[dict[str, Any], OSError | Damaged | None]:
    """`state.json`, and what is wrong in this process's share of the files: nothing, damage, or a disk that cannot be read."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        Progress(**state["progress"]), state["data"]
        hashes = state["sha256"]
        for name in sorted(hashes)[world.rank :: world.size]:
            if _hash(path / name) != hashes[name]:
                return state, Damaged(f"{name} does not match its checksum")
    except FileNotFoundError as error:
        return {}, Damaged(f"{Path(error.filename).relative_to(path)} is missing")
    except OSError as error:
        return {}, error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, Damaged(f"state.json is not whole ({error})")
    return state, None


def _shapes(path: Path) -> dict[str, torch.Size]:
    """Names and sizes of the tensors of a part."""
    try:
        with _quiet():
            metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Damaged(f"it is not whole ({error})") from error
    return {name: torch.Size(entry.size) for name, entry in metadata.items()}  # type: ignore[union-attr]


def _read(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill tensors in place."""
    with _quiet(), torch.no_grad():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=world.size == 1)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in saved}
    tensors.update({name: b for name, b in model.named_buffers() if name in saved})
    return tensors


def _optimiser_tensors(run: Run) -> dict[str, Tensor]:
    """The optimisers' states as `name of the parameter::name of the state`."""
    states = run.optimisers.states()
    return {f"{name}::{key}": t for name, p in run.model.named_parameters() for key, t in states.get(p, {}).items()}


def _like_optimisers(run: Run, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Empty tensors for the states of this model's parameters: like the parameter where the shape is its, else plain fp32."""
    empty: dict[str, Tensor] = {}
    parameters = dict(run.model.named_parameters())
    for name, shape in shapes.items():
        owner = parameters.get(name.partition("::")[0])
        if owner is not None:
            empty[name] = torch.empty_like(owner.detach()) if shape == owner.shape else torch.empty(shape)
    return empty


def _restore_optimisers(run: Run, tensors: Mapping[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.partition("::")
        states.setdefault(owner, {})[key] = tensor
    run.optimisers.restore({p: states.get(name, {}) for name, p in run.model.named_parameters()})


def _random_state(world: World) -> dict[str, Tensor]:
    """This process's generators, which dropout draws from (the data need none: they are a function of seed and position)."""
    state = {f"random.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"random.cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return state


def _restore_random_state(tensors: Mapping[str, Tensor], world: World) -> None:
    """A process that the checkpoint does not know goes on with the generator it has."""
    if f"random.cpu.{world.rank}" in tensors:
        torch.set_rng_state(tensors[f"random.cpu.{world.rank}"])
    if f"random.cuda.{world.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.cuda.{world.rank}"], world.device)


def _remove_old(saving: Saving) -> None:
    """Keep the newest and the best; whatever else a kill has left under a temporary name goes, too."""
    paths = found(saving.folder)
    kept = set(paths[: max(1, saving.keep_last)])
    if saving.keep_best:
        losses = {path: _loss_of(path) for path in paths}
        kept.update(sorted((p for p in paths if math.isfinite(losses[p])), key=losses.__getitem__)[: saving.keep_best])
    for path in [*(p for p in paths if p not in kept), *saving.folder.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _loss_of(path: Path) -> float:
    """The loss that a checkpoint was judged by; infinite where none was written or it cannot be read."""
    try:
        loss = json.loads((path / "state.json").read_bytes())["loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return math.inf if loss is None else float(loss)


def _synced_hash(path: Path) -> str:
    """sha256 of a file that the disk then has."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_hash(file)


def _slow_hash(file: Any) -> str:
    """For Python 3.10."""
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that one process alone saves what one process alone has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The error of the process that failed, instead of a report on all of them."""
    try:
        yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise cause from error
        raise OSError(f"the checkpoint cannot be written: {error}") from error
