"""Mamba's selective scan (S6): a diagonal state per model channel, with steps and projections that depend on the input.

Axis legend: B batch, T time, D model channels, N state size per channel, C tokens of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recollect.ops import tiles

# Tokens whose states are in memory at once; in the backward pass, all of them.
SEGMENT = 1024


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    tile: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) b_t^T, y_t = h_t c_t + skip * x_t.

    The decay belongs to channel and state entry together, so there is no matrix-product form. Tiles run their tokens in step: once to
    learn what each adds, once from their true first states. The backward pass keeps a state per segment of tiles and computes the
    others again.

    Args:
        x: [B, T, D], T >= 1.
        dt: [B, T, D], > 0, the step size.
        A: [D, N], < 0.
        b, c: [B, T, N], what a token writes to and reads from.
        skip: [D], a direct path from x to y; None: none.
        state: h before the first token, [B, D, N]; None: zeros.
        reset: bool [B, T], true at the first token of a document: the state before it is forgotten.
        valid: bool [B, T], false at padding: it leaves the state as it is, its y is 0, its content has no effect.
        tile: tokens of a tile, >= 1; no effect on the result.
        backend: None or "chunked", or "sequential".
    Returns:
        y [B, T, D] in x's dtype, and h after the last token, [B, D, N], in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: shapes that do not fit, an unknown backend.
    Source: Gu and Dao 2023, arXiv 2312.00752, with the write discretised as dt b as in the authors' code.
    """
    n_tokens = _check(x, dt, A, b, c, skip, reset, valid)
    dtype = x.dtype
    state = tiles.first_state(state, (x.shape[0], *A.shape), x)
    reset = tiles.real_resets(reset, valid)
    x, dt, b, c = (tiles.real_part(part, valid) for part in (x, dt, b, c))
    A = A.to(x.dtype)
    if tiles.runs_sequentially(backend, n_tokens, tile):
        y, state = _by_tokens(x, dt, A, b, c, state, reset)
    else:
        y, state = _by_segments(x, dt, A, b, c, state, reset, min(tile, n_tokens))
    if skip is not None:
        y = y + skip.to(x.dtype) * x
    return y.to(dtype), state


def _check(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, reset: Tensor | None, valid: Tensor | None
) -> int:
    """The number of tokens T; raises ValueError if shapes do not fit."""
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x must be [B, T, D] with T >= 1; got {tuple(x.shape)}")
    if A.dim() != 2 or A.shape[0] != x.shape[-1]:
        raise ValueError(f"A must be [D, N] with D = {x.shape[-1]} as in x; got {tuple(A.shape)}")
    tiles.check_shape("dt", dt, x.shape)
    tiles.check_shape("b", b, (*x.shape[:2], A.shape[1]))
    tiles.check_shape("c", c, (*x.shape[:2], A.shape[1]))
    tiles.check_shape("skip", skip, x.shape[-1:])
    tiles.check_masks(x.shape[:2], reset, valid)
    return x.shape[1]


def _by_tokens(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t, (written_t, dt_t, b_t, c_t) in enumerate(zip(*(part.unbind(1) for part in (dt * x, dt, b, c)), strict=True)):
        if reset is not None:
            state = tiles.blank(state, reset[:, t, None, None])
        state = (dt_t[..., None] * A).exp() * state + written_t[..., None] * b_t[..., None, :]
        outputs.append((state @ c_t[..., None]).squeeze(-1))
    return torch.stack(outputs, 1), state


def _by_segments(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, reset: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    length = max(SEGMENT // size, 1) * size
    forget = [None] * -(-x.shape[1] // length) if reset is None else reset.split(length, 1)
    outputs = []
    for *parts, starts in zip(*(part.split(length, 1) for part in (x, dt, b, c)), forget, strict=True):
        y, state = checkpoint(_by_tiles, *parts, A, state, starts, size, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _by_tiles(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, A: Tensor, state: Tensor, reset: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Tiles of `size` tokens, all in step; missing tokens of the last tile have dt = 0: no decay, no write."""
    n_tokens = x.shape[1]
    missing = -n_tokens % size
    # Step j of every tile: lists over j of [B, tiles, ...].
    written, dt, b, c = (F.pad(part, (0, 0, 0, missing)).unflatten(1, (-1, size)).unbind(2) for part in (dt * x, dt, b, c))
    decays = [(step[..., None] * A).exp() for step in dt]
    writes = [new[..., None] * key[..., None, :] for new, key in zip(written, b, strict=True)]
    if reset is not None:
        forget = F.pad(reset, (0, missing)).unflatten(1, (-1, size)).unbind(2)
        decays = [tiles.blank(decay, mask[..., None, None]) for decay, mask in zip(decays, forget, strict=True)]
    h, whole = writes[0], decays[0]
    for decay, write in zip(decays[1:], writes[1:], strict=True):
        h, whole = torch.addcmul(write, h, decay), whole * decay
    starts = []
    for kept, added in zip(whole.unbind(1), h.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(added, kept, state)
    h, outputs = torch.stack(starts, 1), []
    for decay, write, read in zip(decays, writes, c, strict=True):
        h = torch.addcmul(write, h, decay)
        outputs.append((h @ read[..., None]).squeeze(-1))
    return torch.stack(outputs, 2).flatten(1, 2)[:, :n_tokens], state
