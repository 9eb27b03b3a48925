"""Where the tokens of a call stand in chunks: open chunks go on, documents start chunks of their own, padding stands nowhere.

A chunk has `length` slots; its tokens fill the first ones, and a slot without a token is the identity on the memory. The layout is a
function of masks and phases alone, never of what the tokens hold.

Axis legend: B batch, T tokens of the call, N chunks, L slots of a chunk, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """A layout.

    Attributes:
        n_tokens, n_chunks, length: T, N and L.
        token: int64 [B, N * L], the token in each slot (any token where `real` is False). None, as the next six, if every row just
            fills the slots in order.
        real: bool [B, N * L], whether the slot has a token.
        slot: int64 [B, T], the slot of each token.
        placed: bool [B, T], whether the token has one (padding has none); None: all have.
        before: int64 [B, N], tokens in the chunk before this call's first.
        filled: int64 [B, N], tokens of this call in the chunk.
        complete: bool [B, N], whether the chunk ends in this call.
        reset: bool [B, N], whether the chunk starts a document; None: none does.
        phase: int64 [B], tokens in the open chunk after the call.
    """

    n_tokens: int
    n_chunks: int
    length: int
    token: Tensor | None
    real: Tensor | None
    slot: Tensor | None
    placed: Tensor | None
    before: Tensor | None
    filled: Tensor | None
    complete: Tensor | None
    reset: Tensor | None
    phase: Tensor

    def arrange(self, x: Tensor) -> Tensor:
        """x [B, T, H, ...] -> [N, B, H, L, ...], zero in slots without a token."""
        if self.token is None or self.real is None:
            missing = self.n_chunks * self.length - x.shape[1]
            if missing:
                x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
        else:
            trailing = (1,) * (x.dim() - 2)
            index = self.token.view(*self.token.shape, *trailing).expand(-1, -1, *x.shape[2:])
            x = x.gather(1, index).masked_fill(~self.real.view(*self.real.shape, *trailing), 0.0)
        x = x.unflatten(1, (self.n_chunks, self.length))
        return x.permute(1, 0, 3, 2, *range(4, x.dim())).contiguous()

    def mask(self) -> Tensor | None:
        """bool [N, B or 1, L], which slots have a token; None: all."""
        if self.real is not None:
            return self.real.unflatten(1, (self.n_chunks, self.length)).transpose(0, 1)
        n_slots = self.n_chunks * self.length
        if self.n_tokens == n_slots:
            return None
        return (torch.arange(n_slots, device=self.phase.device) < self.n_tokens).view(self.n_chunks, 1, self.length)

    def size(self, n: int) -> int:
        """Slots of chunk n up to the last that any row uses."""
        return min(self.length, self.n_tokens - n * self.length) if self.real is None else self.length

    def collect(self, y: Tensor) -> Tensor:
        """[N, B, H, L, V] -> [B, T, H, V], zero for tokens without a slot."""
        y = y.permute(1, 0, 3, 2, 4).flatten(1, 2)
        if self.slot is None:
            return y[:, : self.n_tokens]
        y = y.gather(1, self.slot[:, :, None, None].expand(-1, -1, *y.shape[2:]))
        return y if self.placed is None else y.masked_fill(~self.placed[:, :, None, None], 0.0)


def whole(n_tokens: int, batch_size: int, chunk_size: int, device: torch.device) -> Slots:
    """The layout of rows that all start a chunk and have neither padding nor resets."""
    length = min(chunk_size, n_tokens)
    n_chunks = -(-n_tokens // length)
    phase = torch.full((batch_size,), n_tokens % chunk_size, dtype=torch.int64, device=device)
    return Slots(n_tokens, n_chunks, length, None, None, None, None, None, None, None, None, phase)


def lay_out(phase: Tensor, n_tokens: int, chunk_size: int, valid: Tensor | None, reset: Tensor | None) -> Slots:
    """The layout for rows whose open chunks hold `phase` [B] tokens.

    Args:
        valid: bool [B, T], False at padding; None: no padding.
        reset: bool [B, T], True at the first token of a document; None: the document goes on.
    """
    batch_size, device = phase.shape[0], phase.device
    length, steps = min(chunk_size, n_tokens), torch.arange(n_tokens, device=device)
    real = torch.ones(batch_size, n_tokens, dtype=torch.bool, device=device) if valid is None else valid
    cut = torch.zeros_like(real) if reset is None else reset & real
    seen = real.cumsum(1) - real.long()  # real tokens before this one
    origin = torch.where(cut, seen, 0).cummax(1).values  # ... and before its document, if that began in this call
    place = torch.where(cut.cumsum(1) > 0, seen - origin, seen + phase[:, None]) % chunk_size
    begins = real & (cut | (place == 0) | (seen == 0))
    chunk = (begins.cumsum(1) - 1).clamp(min=0)
    n_chunks = int(chunk.max()) + 1 if n_tokens > 1 else 1

    def per_chunk(values: Tensor, where: Tensor) -> Tensor:
        """The value at the one token per chunk that `where` marks, 0 for a chunk without."""
        spread = torch.zeros(batch_size, n_chunks + 1, dtype=values.dtype, device=device)
        return spread.scatter_(1, torch.where(where, chunk, n_chunks), values)[:, :-1]

    before = per_chunk(place, begins)
    count = torch.zeros(batch_size, n_chunks, dtype=torch.int64, device=device).scatter_add_(1, chunk, real.long())
    slot = torch.where(real, chunk * length + place - before.gather(1, chunk), 0)
    spread = torch.full((batch_size, n_chunks * length + 1), -1, dtype=torch.int64, device=device)
    token = spread.scatter_(1, torch.where(real, slot, n_chunks * length), steps.expand(batch_size, -1))[:, :-1]
    last = real.cumsum(1)[:, -1]
    ended = torch.where(cut.any(1), last - origin[:, -1], last + phase)
    return Slots(
        n_tokens,
        n_chunks,
        length,
        token.clamp(min=0),
        token >= 0,
        slot,
        None if valid is None else real,
        before,
        count,
        (before + count == chunk_size) & (count > 0),
        None if reset is None else per_chunk(cut.long(), begins).bool(),
        ended % chunk_size,
    )
