"""What a stock model's attention mask says: each query's first visible key, and which queries are padding.

Axis legend: B batch, T queries, S keys (the queries are the last T of the S positions).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """start: int64 [B, T], first visible key of each query, None when it is 0 everywhere; padding sees itself only.
    real: bool [B, T], False at padding, None when there is none."""

    start: Tensor | None
    real: Tensor | None


def read_mask(mask: Any, batch_size: int, n_queries: int, n_keys: int) -> Seen:
    """Read a mask as Hugging Face's "sdpa" and "eager" attention get it.

    Padding at the left, padding at the right that nothing follows, and documents packed in one row all have the form "keys from a
    first one up to the query itself", which is what Multi-Token Attention and memories can follow.

    Args:
        mask: None (causal, nothing hidden); bool [B or 1, 1, T, S], True where a query sees a key; or the same in floats, 0 where it
            sees and the dtype's lowest number where not.
        batch_size, n_queries, n_keys: B, T, S.
    Raises:
        ValueError: another kind of mask, or one of another form. While compiling, values cannot be looked at and are trusted.
    """
    if mask is None:
        return Seen(None, None)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or tuple(mask.shape[1:]) != (1, n_queries, n_keys):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a retrofitted layer needs an attention mask [batch, 1, {n_queries}, {n_keys}] for {n_queries} new tokens and {n_keys} "
            f"keys; got {found}"
        )
    visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(batch_size, -1, -1)
    position = torch.arange(n_keys - n_queries, n_keys, device=mask.device)
    key = torch.arange(n_keys, device=mask.device)
    # Some releases of transformers let a query that would see nothing (padding) see everything, to keep its softmax finite.
    everything = visible.all(-1) & (position < n_keys - 1)
    real = visible.diagonal(n_keys - n_queries, -2, -1) & ~everything
    start = torch.where(real, visible.int().argmax(-1), position)
    if not torch.compiler.is_compiling():
        _check_form(mask, visible, real, (key >= start[..., None]) & (key <= position[:, None]))
    # Asking a GPU whether there is padding would wait for all its work; a mask that hides nothing costs less than that.
    cheap = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return Seen(
        None if cheap and not bool(start.any()) else start,
        None if cheap and bool(real.all()) else real,
    )


def _check_form(mask: Tensor, visible: Tensor, real: Tensor, expected: Tensor) -> None:
    """Raise ValueError unless every real query sees the `expected` keys and the mask only shows or hides."""
    if bool(((visible != expected) & real[..., None]).any()):
        raise ValueError(
            "a retrofitted layer follows causal masks with padding at the left, at the right when nothing follows, or with packed "
            "documents; this attention mask has padding between tokens, or shows or hides keys otherwise"
        )
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise ValueError("a retrofitted layer follows masks that show or hide keys; this one adds other numbers to the logits")
