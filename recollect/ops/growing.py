"""Caches that grow in place: appending a token to 64 thousand must not copy them.

A state is a value: whoever holds an older one finds it unchanged, and may go on from it more than once. So it stays: a cache is a view
of the first tokens of a longer buffer, and what is appended is written behind them where nobody has written yet. A second continuation
of one cache copies it, as does that of a cache which was moved, loaded, selected from or otherwise made anew. Nobody may write into
one: it shares its memory with older and younger ones.

Axis legend: B batch, S cached tokens, T new ones.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SHARE, LEAST = 4, 64  # room left behind S tokens: S / SHARE of them, at least LEAST


class Room:
    """A buffer [B, more than S, ...] and how many of its tokens are written."""

    def __init__(self, buffer: Tensor, written: int) -> None:
        self.buffer, self.written = buffer, written

    def takes(self, first: int, end: int) -> bool:
        """Whether tokens first .. end may be written: nobody has, and inference mode and its outside write to their own tensors."""
        fits = self.written == first and end <= self.buffer.shape[1]
        return fits and self.buffer.is_inference() == torch.is_inference_mode_enabled()


_rooms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the caches that are views of them, as long as these live
_lock = threading.Lock()


def appended(cache: Tensor, new: Tensor) -> Tensor:
    """`torch.cat((cache, new), dim=1)` of cache [B, S, ...] and new [B, T, ...], without copying what is cached where that is safe:
    where no gradients are computed (what a graph has saved must not be written to, not even elsewhere in its buffer) and outside
    `torch.compile`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _alike(cache, new):
        return torch.cat((cache, new), dim=1)
    n, end = cache.shape[1], cache.shape[1] + new.shape[1]
    with _lock:
        room = _rooms.get(cache)
        if room is not None and room.takes(n, end):
            room.written = end
        else:
            room = None
    if room is None:
        room = Room(cache.new_empty(cache.shape[0], end + max(LEAST, end // SHARE), *cache.shape[2:]), end)
        room.buffer[:, :n] = cache
    room.buffer[:, n:end] = new
    longer = room.buffer[:, :end]
    with _lock:
        _rooms[longer] = room
    return longer


def _alike(cache: Tensor, new: Tensor) -> bool:
    """Whether they differ in their number of tokens alone; `torch.cat` promotes, or says what is wrong."""
    kinds = [(x.dtype, x.device, x.shape[:1], x.shape[2:]) for x in (cache, new)]
    return kinds[0] == kinds[1]
