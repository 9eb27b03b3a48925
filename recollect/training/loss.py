"""Logits where something is asked, and only there.

Axis legend: n examples, T time, m labelled positions, C vocabulary, D model dim.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from recollect.tasks.base import IGNORE


def labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `hidden` [n, T, D] where something is asked, and what: [m, D] and [m], in row-major order.

    Args:
        hidden: on any device.
        labels: int64 [n, T], IGNORE (-100) where nothing is asked. On the CPU this costs no device synchronisation.
    Raises:
        ValueError: nothing is asked at all.
    """
    asked = (labels.reshape(-1) != IGNORE).nonzero().squeeze(1)
    if asked.numel() == 0:
        raise ValueError("a batch without labelled positions has no loss")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if asked.numel() < targets.numel():
        hidden = hidden.index_select(0, asked.to(hidden.device, non_blocking=True))
        targets = targets[asked.to(targets.device)]
    return hidden, targets.to(hidden.device, non_blocking=True)


def labelled_logits(model: PreTrainedModel, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [m, C] and targets [m] of the labelled positions, in row-major order.

    The vocabulary projection runs at those positions only: a task that asks for five of sixty tokens pays for five.

    Args:
        model: a Hugging Face causal LM.
        inputs: int64 [n, T].
        labels: as in `labelled`.
    Raises:
        ValueError: nothing is asked at all.
    """
    device = next(model.parameters()).device
    hidden = model.base_model(input_ids=inputs.to(device, non_blocking=True), use_cache=False).last_hidden_state
    hidden, targets = labelled(hidden, labels)
    return model.get_output_embeddings()(hidden), targets
