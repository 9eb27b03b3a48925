"""Scores against a loop over the full logits."""

from __future__ import annotations

import math

import pytest
import torch

from recollect.evaluation.metrics import Score, score, share_right, spread
from recollect.tasks import IGNORE
from tests.training.tiny import TASK, tiny_model


def test_score_equals_a_loop_over_examples() -> None:
    """Unequal batches must be weighted by their size, and one wrong letter makes an example wrong."""
    model = tiny_model(dropout=0.2).eval()
    batches = [TASK.sample(5, seed=1), TASK.sample(2, seed=3)]
    result = score(model, batches, TASK.correct)
    losses, right = [], []
    for batch in batches:
        logits = model(input_ids=batch.inputs).logits.double()
        for row, labels in zip(logits, batch.labels, strict=True):
            asked = (labels != IGNORE).nonzero().flatten().tolist()
            losses += [-torch.log_softmax(row[t], -1)[labels[t]].item() for t in asked]
            right.append(all(row[t].argmax() == labels[t] for t in asked))
    assert result.n == 7
    assert result.n_tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result.error == pytest.approx(1 - sum(right) / 7)


def test_bits_per_byte_is_nats_over_ln2() -> None:
    assert Score(loss=math.log(256), accuracy=0, n=1, n_tokens=1, n_bytes=1).bits_per_byte == pytest.approx(8)
    assert Score(loss=math.log(256), accuracy=0, n=1, n_tokens=3, n_bytes=12).bits_per_byte == pytest.approx(2)
    assert math.isnan(Score(loss=1.0, accuracy=0, n=1, n_tokens=1).bits_per_byte), "of symbols that are no text"


def test_a_model_in_training_mode_is_refused() -> None:
    """Dropout in evaluation is the released code's flaw."""
    with pytest.raises(ValueError, match=r"model\.eval"):
        score(tiny_model().train(), [TASK.sample(1, seed=1)], TASK.correct)


def test_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out"):
        score(tiny_model().eval(), [], TASK.correct)


def test_spread_puts_predictions_back_in_place() -> None:
    labels = torch.tensor([[IGNORE, 4, IGNORE], [5, IGNORE, 6]])
    assert spread(torch.tensor([7, 8, 9]), labels).tolist() == [[IGNORE, 7, IGNORE], [8, IGNORE, 9]]


def test_share_right_counts_labelled_positions_only() -> None:
    labels = torch.tensor([[IGNORE, 4, 3], [IGNORE, IGNORE, IGNORE]])
    predictions = torch.tensor([[IGNORE, 4, 0], [IGNORE, IGNORE, IGNORE]])
    assert share_right(predictions, labels).tolist() == [0.5, 0.0]
