"""A mixer's state is a value: a (possibly nested) tuple of tensors, batch first. One generic function per thing one does with it.

Axis legend: B batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

# A NamedTuple or tuple whose leaves are tensors [B, ...] or None; nesting is allowed.
State: TypeAlias = Any


def map_state(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply `fn` to every tensor of `state`, keeping its structure (NamedTuples stay NamedTuples, None stays None)."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, tuple):
        parts = [map_state(fn, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise TypeError(f"a state is a tuple of tensors, None or tuples of these; got {type(state).__name__}")


def leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) for every tensor of `state`, in order."""
    if state is None:
        return
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = getattr(state, "_fields", range(len(state)))
    for name, part in zip(names, state, strict=True):
        yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))


def filled(like: State, tensors: Iterable[Tensor]) -> State:
    """A state of the structure of `like` with these tensors, in the order of `leaves`."""
    given = iter(tensors)
    return map_state(lambda _: next(given), like)


def detach(state: State) -> State:
    """Cut the state from the graph: truncated back-propagation through time is `state = detach(state)` between calls."""
    return map_state(Tensor.detach, state)


def select(state: State, index: Tensor) -> State:
    """Rows `index` [n] of a state of batch B -> a state of batch n. Beam search reorders and repeats with it."""
    return map_state(lambda t: t.index_select(0, index.to(t.device)), state)


def to(state: State, device: torch.device | str) -> State:
    """Move every tensor of the state to `device`."""
    return map_state(lambda t: t.to(device), state)


def nbytes(state: State) -> int:
    """Size of the state in bytes (all rows of the batch)."""
    return sum(t.numel() * t.element_size() for _, t in leaves(state))


def save(state: State, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
    """Write the state to a safetensors file with a checksum, atomically (temporary name, fsync, rename).

    Args:
        state: any state.
        path: file to write; replaced if it exists.
        fingerprint: text that identifies the model; `load` refuses a file whose fingerprint differs.
    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    path = Path(path)
    tensors = {name: t.detach().contiguous().cpu().clone() for name, t in leaves(state)}
    about = json.dumps({"fingerprint": fingerprint, "sha256": _checksum(tensors, fingerprint)})
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(to_bytes(tensors, metadata={"recollect": about}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], like: State, *, fingerprint: str = "") -> State:
    """Read a state written by `save` into the structure of `like` (for instance `mixer.init_state(1)`).

    Args:
        path: file written by `save`.
        like: a state of the same structure; its tensors give device and dtype, not sizes (a cache may have grown).
        fingerprint: must equal the one given to `save`.
    Raises:
        ValueError: the file is damaged, belongs to another model, or holds other tensors than `like`.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("recollect", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole state file: {error}") from error
    if not isinstance(about, dict) or not {"fingerprint", "sha256"} <= about.keys():
        raise ValueError(f"{path} was not written by recollect.state.save, or its header is damaged: it has no checksum")
    if about["sha256"] != _checksum(tensors, str(about["fingerprint"])):
        raise ValueError(f"{path} is damaged: its content does not match its checksum; restore it from a copy or save it again")
    if about["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} was saved by another model (fingerprint {about['fingerprint']!r}, expected {fingerprint!r}); "
            "load it into the model that saved it"
        )
    expected = dict(leaves(like))
    if sorted(tensors) != sorted(expected):
        raise ValueError(f"{path} holds tensors {sorted(tensors)}; this model's state has {sorted(expected)}")
    return filled(like, (tensors[name].to(device=t.device, dtype=t.dtype) for name, t in expected.items()))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors, 64 hex digits: names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # A fresh copy: a view of one element may keep a stride that `contiguous` leaves and `view` refuses.
        fresh = tensor.cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        total.update(fresh.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], fingerprint: str) -> str:
    return hashlib.sha256(f"{digest(tensors)} {fingerprint}".encode()).hexdigest()


def fingerprint(config: dict[str, Any]) -> str:
    """A short text that identifies a configuration: sha256 of its sorted JSON, 16 hex digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
