"""What a model scores on held-out data: loss, error, bits per byte.

Axis legend: n examples, T time, m labelled positions, C vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from recollect.tasks.base import IGNORE, Batch
from recollect.training.loss import labelled_logits


class Score(NamedTuple):
    """A model on held-out data.

    loss: mean nats per labelled token.
    accuracy: mean per-example score in [0, 1].
    n: examples scored.
    n_tokens: labelled tokens.
    n_bytes: bytes of text that these stand for, 0 where they stand for none.
    """

    loss: float
    accuracy: float
    n: int
    n_tokens: int
    n_bytes: int = 0

    @property
    def error(self) -> float:
        """Share of the examples that are not right."""
        return 1 - self.accuracy

    @property
    def bits_per_byte(self) -> float:
        """Of text; nan of anything else."""
        return self.loss * self.n_tokens / self.n_bytes / math.log(2) if self.n_bytes else math.nan


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    correct: Callable[[Tensor, Tensor], Tensor],
    *,
    n_bytes: Callable[[Tensor], int] = lambda labels: 0,
    device: torch.device | str = "cpu",
) -> Score:
    """Score a model (dropout off: the caller has put it in eval mode) by teacher-forced argmax.

    Args:
        model: a causal LM in eval mode.
        batches: held-out data.
        correct: (predictions [n, T], labels [n, T]) -> per-example score [n], such as `Task.correct`.
        n_bytes: labels [n, T] -> bytes of text that the asked ones stand for.
        device: where `correct` runs; predictions and labels are moved there.
    Raises:
        ValueError: the model is in training mode, or there are no batches.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first, or dropout spoils the score")
    total_loss = total_right = 0.0
    n = n_tokens = total_bytes = 0
    with torch.no_grad():
        for batch in batches:
            logits, targets = labelled_logits(model, batch.inputs, batch.labels)
            total_loss += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            predictions = spread(logits.argmax(dim=-1).to(device), batch.labels.to(device))
            total_right += correct(predictions, batch.labels.to(device)).sum().item()
            n += batch.inputs.shape[0]
            n_tokens += targets.numel()
            total_bytes += n_bytes(batch.labels)
    if n == 0:
        raise ValueError("there are no held-out examples to score")
    return Score(loss=total_loss / n_tokens, accuracy=total_right / n, n=n, n_tokens=n_tokens, n_bytes=total_bytes)


def spread(values: Tensor, labels: Tensor) -> Tensor:
    """Values [m] of the labelled positions laid out as [n, T]; IGNORE elsewhere."""
    laid = torch.full_like(labels, IGNORE)
    laid[labels != IGNORE] = values
    return laid


def share_right(predictions: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled positions that are right, per example: [n]. The score of running text."""
    asked = labels != IGNORE
    return ((predictions == labels) & asked).sum(dim=1).to(torch.float64) / asked.sum(dim=1).clamp(min=1)
