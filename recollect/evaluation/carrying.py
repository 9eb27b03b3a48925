"""The state of a model that reads a text piece by piece.

Axis legend: T time, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
    n_symbols = int(model.config.vocab_size)
    tokens = (torch.arange(2 * PROBE, device=next(model.parameters()).device) * 7 % n_symbols)[None]  # int64 [1, T]
    carry = Carry()
    halves = []
    for half in tokens.split(PROBE, dim=1):
        out: Any = model(input_ids=half, **carry.options)
        carry.cache = cache_of(out)
        halves.append(out.logits)
        if carry.cache is None:
            break
    if carry.cache is None or _differ(halves[1], model(input_ids=tokens, use_cache=False).logits[:, PROBE:]):
        raise ValueError(
            f"the state of {type(model).__name__} cannot be carried on from one piece of a text to the next; "
            "give --context N to read windows of N tokens"
        )


def _differ(logits: Tensor, whole: Tensor) -> bool:
    """Whether [1, T, C] is another result, not the same with other roundings. What is not finite is left to the evaluation."""
    rounding = max(1e-3, 16 * torch.finfo(whole.dtype).eps)
    return bool((logits - whole).abs().max() > rounding * whole.std())
