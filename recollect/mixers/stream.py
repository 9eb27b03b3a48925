"""Where the tokens of a piece stand for a recurrent mixer: position in the document, which tokens are padding, where documents start.

Unlike `place`, which tells attention what a query sees of a cache, this tells a recurrence when to hold still and when to forget.

Axis legend: B batch, T tokens of the piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1  # the document before the first real token; real document ids are >= 0


class Stream(NamedTuple):
    """position: int64 [B], tokens of the current document so far; document: int64 [B], its id (NONE before the first token)."""

    position: Tensor
    document: Tensor


class Steps(NamedTuple):
    """What `follow` says of a piece; see there."""

    positions: Tensor
    valid: Tensor | None
    reset: Tensor | None
    stream: Stream


def beginning(batch_size: int, device: torch.device) -> Stream:
    """The stream before the first token."""
    zero = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return Stream(zero, zero + NONE)


def follow(
    stream: Stream | None,
    n_tokens: int,
    batch_size: int,
    device: torch.device,
    mask: Tensor | None,
    ids: Tensor | None,
) -> Steps:
    """Follow the stream over the next tokens.

    Args:
        stream: before the piece; None at the start of the sequence.
        n_tokens: tokens T of the piece.
        mask: bool [B, T], False at padding. ids: int [B, T] document ids >= 0. None: no padding; the current document goes on.
    Returns:
        positions: int64 [T] or [B, T], tokens of its document before each token (padding has the next token's position);
        valid: bool [B, T], False at padding, None without a mask; reset: bool [B, T], True at the first token of a document that
        follows another one, None without ids; stream: after the piece.
    """
    steps = torch.arange(n_tokens, device=device)
    if mask is None and ids is None:
        if stream is None:
            position = torch.full((batch_size,), n_tokens, dtype=torch.int64, device=device)
            return Steps(steps, None, None, Stream(position, torch.zeros_like(position)))
        after = Stream(stream.position + n_tokens, stream.document.clamp(min=0))
        return Steps(stream.position[:, None] + steps, None, None, after)
    stream = beginning(batch_size, device) if stream is None else stream
    valid = None if mask is None else mask.to(torch.bool)
    real = torch.ones(batch_size, n_tokens, dtype=torch.bool, device=device) if valid is None else valid
    count = real.cumsum(dim=1)
    if ids is None:
        total = stream.position[:, None] + count
        document = torch.where(real.any(dim=1), stream.document.clamp(min=0), stream.document)
        return Steps((total - 1).clamp(min=0), valid, None, Stream(total[:, -1], document))

    # `recent[:, t]` is the document of the last real token before t, and of the whole piece at T.
    last = torch.where(real, steps + 1, 0).cummax(dim=1).values
    documents = torch.cat((stream.document[:, None], ids.to(torch.int64)), dim=1)
    recent = torch.cat((documents[:, :1], documents.gather(1, last)), dim=1)
    reset = real & (recent[:, :-1] != NONE) & (ids != recent[:, :-1])
    base = torch.where(reset, count - 1, 0).cummax(dim=1).values
    total = count + torch.where(reset.cumsum(dim=1) > 0, -base, stream.position[:, None])
    return Steps((total - 1).clamp(min=0), valid, reset, Stream(total[:, -1], recent[:, -1]))
