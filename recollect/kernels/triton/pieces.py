"""How the tokens of a call are cut into pieces of at most 16, and pieces into segments: the table that the perceptron kernels walk.

No piece crosses the start of a chunk or document. The backward pass computes a segment again from the state saved at its first piece:
a segment has at most four pieces, starts wherever a document does, and a chunk that needs more than one starts its own. A segment that
starts a document needs no saved state, so the number of saved ones is bounded by shapes, whatever the documents are, and nothing here
waits for the device.

Axis legend: B batch, T time, P pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOKENS, SEGMENT = 16, 4  # tokens of a piece, pieces of a segment
CHUNK, DOCUMENT = 1, 2  # flags: the piece starts one
FIRST, COUNT, FLAGS, SLOT, LOW, CHUNK_AT = range(6)


class Pieces(NamedTuple):
    """The table.

    Attributes:
        order: int32 [B, T], the tokens that count, in order; what is behind them has no meaning.
        entries: int32 [B, P, 6], of each piece: first token (index into `order`), number of tokens, flags, where its state is saved (-1
            inside a segment, and where a document starts), first piece of its segment, first piece of its chunk (-1: before the call).
        ends: int32 [B, 2], number of pieces and whether the last chunk is full.
        phase: int64 [B], tokens in the open chunk after the call.
        n_slots: saved states per head.
    """

    order: Tensor
    entries: Tensor
    ends: Tensor
    phase: Tensor
    n_slots: int


def cut(phase: Tensor, length: int, chunk_size: int, reset: Tensor | None, valid: Tensor | None) -> Pieces:
    """The table of a call.

    Args:
        phase: int64 [B], tokens already in the open chunk.
        length: T, at least 1.
        reset, valid: bool [B, T] or None: first token of a document; False where the token is padding.
    """
    device, shape = phase.device, (phase.shape[0], length)
    place = torch.arange(length, device=device).expand(shape)
    counts = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    index = place if valid is None else counts.cumsum(1) - 1  # of the token among those that count
    document = torch.zeros_like(counts) if reset is None else reset & counts
    since = torch.where(document, index, -phase[:, None]).cummax(1).values  # index of the document's first token
    step = (index - since) % chunk_size
    begins = counts & (step == 0)
    inside = index - torch.where(begins, index, 0).cummax(1).values  # of the chunk's tokens in this call
    first = counts & (index == 0)
    heads = counts & (inside % TOKENS == 0)
    runs = (begins | first).cumsum(1)
    run = runs - torch.where(document | first, runs, 0).cummax(1).values  # chunk of the document
    need = -(-chunk_size // TOKENS)
    group = max(1, SEGMENT // need)
    fresh = heads & (inside % (TOKENS * SEGMENT) == 0) & (run % group == 0)
    fresh = fresh | document | first
    saved = fresh & ~document
    slot = torch.where(saved, saved.cumsum(1) - 1, -1)
    piece = heads.cumsum(1) - 1
    low = torch.where(fresh, piece, 0).cummax(1).values
    chunk_at = torch.where(begins, piece, -1).cummax(1).values
    flags = begins * CHUNK + document * DOCUMENT

    total = counts.sum(1)
    at = (~heads).to(torch.int8).argsort(dim=1, stable=True)
    if reset is None:  # padding makes pieces fewer; documents, which may be a token each, as many as there are tokens
        at = at[:, : min(length, (length // chunk_size + 2) * need)]
    begin = torch.where(heads, index, length).gather(1, at)
    begin = torch.minimum(begin, total[:, None])
    after = torch.cat((begin[:, 1:], total[:, None]), dim=1)
    rows = [begin, after - begin, *(x.gather(1, at) for x in (flags, slot, low, chunk_at))]
    order = place if valid is None else (~counts).to(torch.int8).argsort(dim=1, stable=True)
    last = order.gather(1, (total - 1).clamp_min(0)[:, None])
    open_tokens = torch.where(total > 0, (step.gather(1, last)[:, 0] + 1) % chunk_size, phase)
    ends = torch.stack((heads.sum(1), (total > 0) & (open_tokens == 0)), dim=1)
    n_slots = length // min(group * chunk_size, TOKENS * SEGMENT) + (length // chunk_size if need > SEGMENT else 0) + 2
    return Pieces(
        order.to(torch.int32).contiguous(),
        torch.stack(rows, dim=-1).to(torch.int32),
        ends.to(torch.int32),
        open_tokens,
        min(length, n_slots),
    )
