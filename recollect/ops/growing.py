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


_rooms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the tensor that shows all that is written, as long as it lives
_lock = threading.Lock()


def appended(cache: Tensor, new: Tensor) -> Tensor:
    """`torch.cat((cache, new), dim=1)` of cache [B, S, ...] and new [B, T, ...], without copying what is cached where that is safe:
    where no gradients are computed (what a graph has saved must not be written to, not even elsewhere in its buffer) and outside
    `torch.compile`.
    """
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    alike = (cache.dtype, cache.device, cache.shape[:1], cache.shape[2:]) == (
        new.dtype,
        new.device,
        new.shape[:1],
        new.shape[2:],
    )
    if not plain or not alike:
        return torch.cat((cache, new), dim=1)
    n, end = cache.shape[1], cache.shape[1] + new.shape[1]
    with _lock:
        room = _rooms.get(cache)
        own = room is not None and room.written == n and end <= room.buffer.shape[1]
        if (
            own and room.buffer.is_inference() == torch.is_inference_mode_enabled()
        ):  # PyTorch lets none write to the other's tensors
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
