"""What Hugging Face's attention mask says about padding, checked and cut to the tokens at hand.

Axis legend: B batch, T new tokens, P tokens already in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """mask: bool [B, T], False at padding of the new tokens, or None when there is none.
    ends_in_padding: a row that has begun ends in padding, so that its state cannot be carried on."""

    mask: Tensor | None
    ends_in_padding: bool


def read_attention_mask(attention_mask: Tensor | None, batch_size: int, n_tokens: int, n_past: int) -> Padding:
    """Check an attention mask and keep what concerns the new tokens.

    Args:
        attention_mask: [B, P + T], nonzero at tokens and 0 at padding, past tokens included; None: no padding among the new
            tokens.
        batch_size, n_tokens, n_past: B, T, P.
    Returns:
        Padding. While compiling, values cannot be looked at: the mask is passed on unchecked.
    Raises:
        ValueError: another shape, or a row whose tokens are not one contiguous run.
    """
    if attention_mask is None:
        return Padding(None, False)
    expected = (batch_size, n_past + n_tokens)
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask must be [batch, past + new tokens] = {list(expected)} ({n_past} past, {n_tokens} new); "
            f"got {list(attention_mask.shape)}"
        )
    whole = attention_mask != 0
    mask = whole[:, n_past:]
    if torch.compiler.is_compiling():
        return Padding(mask, False)
    if bool(whole.all()):
        return Padding(None, False)
    begins = whole[:, 1:] & ~whole[:, :-1]
    runs = begins.sum(dim=1) + whole[:, 0]
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has padding between tokens: {whole[row].int().tolist()[:64]}; padding may stand at the "
            "left, or at the right when nothing follows (`generate` guesses a mask from pad_token_id unless given one)"
        )
    ends_in_padding = bool((whole.any(dim=1) & ~whole[:, -1]).any())
    return Padding(None if bool(mask.all()) else mask, ends_in_padding)
