"""Where the tokens of a piece stand: rotary position, first visible key, current document. Shared by all attention-like mixers.

Axis legend: B batch, T tokens of the piece, S cached keys before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -1  # the document of padding; real document ids are >= 0


class Place(NamedTuple):
    """position: int64 [B], tokens seen without padding; start: int64 [B], index in the cache of the current document's first key;
    document: int64 [B], its id (PADDING before the first real token)."""

    position: Tensor
    start: Tensor
    document: Tensor


def origin(batch_size: int, device: torch.device) -> Place:
    """The place before the first token."""
    zero = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return Place(zero, zero.clone(), zero - 1)


def locate(
    place: Place | None,
    n_cached: int,
    n_tokens: int,
    batch_size: int,
    device: torch.device,
    mask: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor | None, Place]:
    """Place the next tokens.

    Args:
        place: before the piece; None at the start of the sequence.
        n_cached: keys S already in the cache.
        mask: bool [B, T], False at padding; ids: int [B, T] document ids >= 0; None: no padding; the current document goes on.
    Returns:
        positions [B, T] (or [T]) for rotary embedding; start [B, T] of each query, None when it is 0 everywhere; the next place.
        Padding is a document of its own for each token, so nothing sees it and it sees itself (a finite softmax).
    """
    steps = torch.arange(n_tokens, device=device)
    if place is None and mask is None and ids is None:
        here = origin(batch_size, device)
        return steps, None, Place(here.position + n_tokens, here.start, here.document + 1)
    place = origin(batch_size, device) if place is None else place
    real = torch.ones(batch_size, n_tokens, dtype=torch.bool, device=device) if mask is None else mask.to(torch.bool)
    current = place.document.clamp(min=0)[:, None].expand(batch_size, n_tokens) if ids is None else ids.to(torch.int64)
    document = torch.where(real, current, PADDING)
    before = torch.cat((place.document[:, None], document[:, :-1]), dim=1)
    fresh = (document != before) | ~real
    start = torch.cat((place.start[:, None], torch.where(fresh, steps + n_cached, 0)), dim=1).cummax(dim=1).values[:, 1:]
    count = real.cumsum(dim=1)
    positions = place.position[:, None] + (count - 1).clamp(min=0)
    after = Place(place.position + count[:, -1], start[:, -1], document[:, -1])
    return positions, None if _all_zero(start) else start, after


def _all_zero(start: Tensor) -> bool:
    """Whether nothing is hidden, where asking costs nothing: reading a GPU's answer would wait for all its work."""
    return start.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(start.any())
