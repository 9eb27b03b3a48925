"""Which form of an op runs: the first one that is meant for the call and lacks nothing, and a warning where a slower one must do."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

WORTH = 1024  # tokens of a call; of shorter ones, decoding among them, nobody waits for the form


class SlowerFormWarning(UserWarning):
    """A fast form of an op exists for this device, but not for this call. Told once for each reason."""


_told: set[tuple[str, str, str]] = set()
_listeners: list[set[tuple[str, str]]] = []


def choose(
    op: str,
    call: Sequence[Any],
    preferred: Sequence[tuple[str, Callable[..., bool]]],
    lacks: Mapping[str, Callable[..., str]],
    *,
    plain: str,
    n_tokens: int,
) -> str:
    """The name of the form that runs, no form having been asked for.

    Args:
        call: what both kinds of functions take.
        preferred: faster forms and whether each is meant for a call: for its device, for its length.
        lacks: why a form cannot run a call, a sentence without its full stop; "" where it can.
        plain: the form that always can.
        n_tokens: B T; short calls are not warned about, nor are those inside torch.compile.
    """
    name, refused = plain, None
    for candidate, meant in preferred:
        if meant(*call):
            why = lacks[candidate](*call)
            if not why:
                name = candidate
                break
            refused = refused or (candidate, why)
    if refused and name == plain and n_tokens >= WORTH and not torch.compiler.is_compiling():
        _warn(op, plain, *refused)
    took(op, name)
    return name


def refuse(op: str, backend: str, why: str, plain: str) -> RuntimeError:
    """The error for a form that was asked for and cannot run."""
    return RuntimeError(f"backend {backend!r} cannot run {op} here: {why}; pass backend={plain!r}")


@contextlib.contextmanager
def recorded() -> Iterator[set[tuple[str, str]]]:
    """The (op, form) pairs of all calls in the block, of this thread and others."""
    found: set[tuple[str, str]] = set()
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners[:] = [other for other in _listeners if other is not found]


def took(op: str, name: str) -> None:
    """Tell whoever listens. torch.compile runs it while it traces and does not look inside, as it does `plugins.load`."""
    for found in _listeners:
        found.add((op, name))


took._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn(op: str, plain: str, fast: str, why: str) -> None:
    if (op, fast, why) not in _told:
        _told.add((op, fast, why))
        text = f"{op} runs as {plain!r}, several times slower than {fast!r}, which cannot: {why}. "
        warnings.warn(text + f"Naming it, backend={plain!r}, silences this.", SlowerFormWarning, stacklevel=4)
