"""The loss at labelled positions is the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recollect.tasks import IGNORE
from recollect.training import parallel
from recollect.training.loss import labelled_logits
from recollect.training.parallel import Scored
from tests.training.tiny import batch_at, tiny_model


def test_labelled_logits_equal_the_full_logits_where_asked() -> None:
    """The shortcut past the vocabulary projection must not skip anything the model does to its logits."""
    model = tiny_model(dropout=0.0).double().eval()
    batch = batch_at(0)
    logits, targets = labelled_logits(model, batch.inputs, batch.labels)
    asked = batch.labels != IGNORE
    torch.testing.assert_close(logits, model(input_ids=batch.inputs).logits[asked], rtol=0, atol=1e-12)
    assert torch.equal(targets, batch.labels[asked])


@pytest.mark.parametrize("slab", [1 << 26, 64])
def test_the_loss_is_the_sum_over_labelled_tokens(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out with torch's own ignore_index, which sees all positions; also where every position is labelled, and in slabs."""
    monkeypatch.setattr(parallel, "SLAB", slab)
    model = tiny_model(dropout=0.0).double().eval()
    batch = batch_at(0)
    for labels in (batch.labels, batch.labels.clamp(min=0)):
        expected = F.cross_entropy(
            model(input_ids=batch.inputs).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        parameters = list(model.parameters())
        wanted = torch.autograd.grad(expected, parameters)
        value = Scored(model)(batch.inputs, labels)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
        for given, want in zip(torch.autograd.grad(value, parameters), wanted, strict=True):
            torch.testing.assert_close(given, want, rtol=0, atol=1e-10)


def test_a_batch_without_labels_is_refused() -> None:
    """Its mean would be 0 / 0, and training would go on with NaN."""
    batch = batch_at(0)
    with pytest.raises(ValueError, match="without labelled positions"):
        Scored(tiny_model())(batch.inputs, torch.full_like(batch.labels, IGNORE))
