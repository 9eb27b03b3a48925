"""Whether a model of transformers does what evaluations rely on: tried on a few tokens, once, before it is relied on.

Axis legend: T time, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from recollect.models.cache import CACHE, cache_of

PROBE = 16  # tokens of each half


class Carry:
    """A cache from call to call. The first of a model of transformers is None: it makes its own."""

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache

    @property
    def options(self) -> dict[str, Any]:
        """What the model is called with besides its inputs."""
        return {"use_cache": True, CACHE: self.cache}


@torch.no_grad()
def check_carried(model: PreTrainedModel) -> None:
    """Refuse a model whose state is lost between the pieces of a text.

    Some models of transformers return no state, and some one that a call with more than one token reads in part (Mamba's
    convolutions go on, its recurrence starts anew): likelihoods would be wrong without a sign. So a few tokens are read whole and
    in two halves; the logits of the second half may differ by rounding.

    Raises:
        ValueError: see above.
    """
    tokens = _tokens(model, 2 * PROBE)
    carry = Carry()
    halves = []
    for half in tokens.split(PROBE, dim=1):
        out: Any = model(input_ids=half, **carry.options)
        carry.cache = cache_of(out)
        halves.append(out.logits)
        if carry.cache is None:
            break
    if carry.cache is None or differ(halves[1], model(input_ids=tokens, use_cache=False).logits[:, PROBE:]):
        raise ValueError(
            f"the state of {type(model).__name__} cannot be carried on from one piece of a text to the next; "
            "give --context N to read windows of N tokens"
        )


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Module | None:
    """The matrix that makes logits of the base model's output, if they are no more than that (some models scale or cap them).

    With it logits can be made for a few positions at a time: those of a window of 128 thousand tokens would take hundreds of GB.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return None
    tokens = _tokens(model, PROBE)
    hidden = getattr(base(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    logits = model(input_ids=tokens, use_cache=False).logits
    if hidden is None or hidden.shape[-1] != getattr(head, "in_features", None) or differ(head(hidden), logits):
        return None
    return head


@torch.no_grad()
def generates_batches(model: PreTrainedModel, pad: int) -> bool:
    """Whether `generate` gives rows of different lengths, padded on the left, the logits that it gives each alone.

    RWKV's of transformers does not: it knows no padding, and two rows disturb each other's states.
    """
    rows = [_tokens(model, PROBE)[0, :n] for n in (PROBE // 2, PROBE)]
    padded = torch.stack([torch.cat((row.new_full((PROBE - len(row),), pad), row)) for row in rows])
    mask = torch.stack([torch.arange(PROBE, device=row.device) >= PROBE - len(row) for row in rows]).long()
    together = _first_steps(model, padded, mask, pad)
    for i, row in enumerate(rows):
        alone = _first_steps(model, row[None], torch.ones_like(row)[None], pad)
        for (said, logits), (expected, right) in zip(together, alone, strict=True):
            if differ(logits[i], right[0]):
                return False
            if said[i] != expected[0]:  # two tokens as likely as each other: from here on the rows go their own ways
                break
    return True


def _first_steps(model: Any, ids: Tensor, mask: Tensor, pad: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens [B], logits [B, C]) of the first two that are written."""
    options = {"do_sample": False, "min_new_tokens": 2, "max_new_tokens": 2, "pad_token_id": pad}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    return list(zip(out.sequences[:, ids.shape[1] :].T, out.logits, strict=True))


def _tokens(model: PreTrainedModel, n: int) -> Tensor:
    """int64 [1, n], all kinds of."""
    return (torch.arange(n, device=next(model.parameters()).device) * 7 % int(model.config.vocab_size))[None]


def differ(logits: Tensor, whole: Tensor) -> bool:
    """Whether logits are others, not the same with other roundings. What is not finite is left to the evaluation."""
    rounding = max(1e-3, 16 * torch.finfo(whole.dtype).eps)
    return bool((logits - whole).abs().max() > rounding * whole.std())
