"""Sequence parallelism: the tokens of a row spread over neighbouring processes, for every mixer.

A mixer gives the same output for a sequence in one call and in pieces with carried state. So process r computes piece r of every row:
layer by layer it takes the state that process r - 1 has after its piece, and hands its own to process r + 1. While one process works
on layer l, the next works on layer l - 1: with L layers and P processes a pass takes (L + P - 1) / L pieces' time, not P. The backward
pass runs the other way, with the states' gradients. Activations take 1 / P of the memory; what travels is the state, which is small and
of constant size for recurrent mixers, and all earlier keys and values for attention.

Axis legend: B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recollect import state as states
from recollect.models.layers import Block
from recollect.state import State

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
MOST_AXES = 7
MOST_SENDS = 64  # some layers' states


class Relay:
    """Runs blocks for one piece of every row; put in as `RecollectModel.relay`.

    All processes of a row call it equally often, in the same order.

    Args:
        rank: global number of this process; its neighbours have the next ones.
        piece, n_pieces: which of a row's pieces this process has.
    """

    def __init__(self, rank: int, *, piece: int, n_pieces: int) -> None:
        self.previous = rank - 1 if piece > 0 else None
        self.next = rank + 1 if piece < n_pieces - 1 else None
        self.structures: dict[Block, State] = {}
        self.under_way: deque[tuple[Any, Tensor]] = deque()  # sends, with what they send from

    def __call__(self, block: Block, x: Tensor, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """x [B, T, D] of this piece -> the same after the block."""
        state = None
        if self.previous is not None:
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()  # the states' gradients must go back, also where nothing below is trained
            like = self._structure(block)
            x, *leaves = _Take.apply(x, self, len(list(states.leaves(like))))
            state = states.filled(like, leaves)
        x, state = block(x, state, mask, document_ids)
        if self.next is not None:
            x = _Give.apply(x, self, *(leaf for _, leaf in states.leaves(state)))
        return x

    @torch.no_grad()
    def _structure(self, block: Block) -> State:
        """What the block's state looks like; the numbers in it mean nothing."""
        if block not in self.structures:
            self.structures[block] = block.mixer.init_state(1)
        return self.structures[block]

    def send(self, tensors: Sequence[Tensor], to: int | None) -> None:
        """Start sending, and wait for the oldest sends where many are under way: a neighbour never needs a later one to take them."""
        assert to is not None
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self.under_way.append((dist.isend(whole, to), whole))
        while len(self.under_way) > MOST_SENDS:
            work, _ = self.under_way.popleft()
            work.wait()


class _Take(torch.autograd.Function):
    """x, and the leaves of the state that the previous process has given; backward, their gradients go back to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relay: Relay, n_leaves: int) -> tuple[Tensor, ...]:
        described = torch.empty(n_leaves, MOST_AXES + 2, dtype=torch.int64, device=x.device)
        dist.recv(described, relay.previous)
        leaves = []
        for dtype, n_axes, *sizes in described.tolist():
            kind = DTYPES[dtype]
            leaf = torch.empty(sizes[:n_axes], dtype=torch.uint8 if kind == torch.bool else kind, device=x.device)
            if leaf.numel():
                dist.recv(leaf, relay.previous)
            leaves.append(leaf.to(kind))
        ctx.mark_non_differentiable(*(leaf for leaf in leaves if not leaf.is_floating_point()))
        ctx.relay, ctx.sent = relay, [leaf.is_floating_point() and leaf.numel() > 0 for leaf in leaves]
        return x.view_as(x), *leaves

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, *d_leaves: Tensor) -> tuple[Tensor, None, None]:
        ctx.relay.send([d for d, sent in zip(d_leaves, ctx.sent, strict=True) if sent], ctx.relay.previous)
        return d_x, None, None


class _Give(torch.autograd.Function):
    """x; the leaves of the state are given to the next process, whose gradients of them come in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relay: Relay, *leaves: Tensor) -> Tensor:
        rows = [[DTYPES.index(t.dtype), t.dim(), *t.shape, *[0] * (MOST_AXES - t.dim())] for t in leaves]
        described = torch.tensor(rows, dtype=torch.int64, device=x.device).reshape(len(leaves), MOST_AXES + 2)
        relay.send([described, *(t.to(torch.uint8) if t.dtype == torch.bool else t for t in leaves if t.numel())], relay.next)
        ctx.relay = relay
        ctx.like = [(t.shape, t.dtype, t.device) if t.is_floating_point() and t.numel() else None for t in leaves]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = []
        for like in ctx.like:
            if like is None:
                gradients.append(None)
                continue
            shape, dtype, device = like
            gradient = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(gradient, ctx.relay.next)
            gradients.append(gradient)
        return d_x, None, *gradients
