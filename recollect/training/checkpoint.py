"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong result.

A checkpoint is a directory `step-00001200/` with `model.safetensors`, `optimiser.safetensors` (no pickle anywhere) and
`state.json`, which names the sha256 of the other two. It is written under a temporary name, synced to disk and renamed: it is
whole or it is not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

KEEP = 2  # the newest, and one to fall back on should the newest be damaged later


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: updates done.
        seconds: time spent training (without evaluation and saving), over all resumptions.
        tokens: tokens read in training.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Damaged(Exception):
    """A checkpoint is not whole, or belongs to another model."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, *, fingerprint: str
) -> Path:
    """Write weights, buffers, optimiser, random state and progress into `folder`; older checkpoints beyond `KEEP` are removed.

    Raises:
        OSError: the disk is full or not writable; existing checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    files = {
        "model.safetensors": save(_contiguous(_model_tensors(model))),
        "optimiser.safetensors": save(_contiguous({**_optimiser_tensors(optimiser), **_random_state()})),
    }
    state = {
        "fingerprint": fingerprint,
        "progress": dataclasses.asdict(progress),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files["state.json"] = json.dumps(state, indent=1, sort_keys=True).encode()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _found(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, *, fingerprint: str
) -> tuple[Progress | None, list[str]]:
    """Restore the newest whole checkpoint of `folder` into model, optimiser and the random state.

    Returns:
        progress, or None if there is no whole checkpoint (model and optimiser are then untouched); and one sentence per
        checkpoint that had to be skipped.
    """
    skipped: list[str] = []
    for path in _found(folder):
        try:
            return _restore(path, model, optimiser, fingerprint), skipped
        except Damaged as error:
            skipped.append(f"skipped the checkpoint {path.name}: {error}")
    return None, skipped


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


def _found(folder: Path) -> list[Path]:
    """Checkpoints by name, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, fingerprint: str) -> Progress:
    try:
        state = json.loads((path / "state.json").read_bytes())
        files = {name: (path / name).read_bytes() for name in ("model.safetensors", "optimiser.safetensors")}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != state["sha256"][name]:
                raise Damaged(f"{name} does not match its checksum")
        weights, moments = load(files["model.safetensors"]), load(files["optimiser.safetensors"])
        progress = Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"it is not whole ({error})") from error
    if state.get("fingerprint") != fingerprint:
        raise Damaged("it was written by another configuration")
    current = _model_tensors(model)
    if {name: t.shape for name, t in current.items()} != {name: t.shape for name, t in weights.items()}:
        raise Damaged("it holds other tensors than this model")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(weights[name])
    _restore_random_state(moments)
    _restore_optimiser(optimiser, moments)
    return progress


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in saved}
    tensors.update({name: b for name, b in model.named_buffers() if name in saved})
    return tensors


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: Mapping[int, Mapping[str, Tensor]] = optimiser.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index.isdigit():
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _random_state() -> dict[str, Tensor]:
    """torch's generators, which dropout draws from (the data need none: they are a function of seed and step)."""
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
