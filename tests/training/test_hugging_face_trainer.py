"""The models also train under Hugging Face's own Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from recollect.models import RecollectConfig, RecollectForCausalLM


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows that count upwards from a random start: easy to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(16) + 5 * index) % 32
        return {"input_ids": row, "labels": row}


def trained(folder: Path, mixer: str, *, resume: bool = False, **options: Any) -> tuple[RecollectForCausalLM, list[float]]:
    torch.manual_seed(0)
    model = RecollectForCausalLM(
        RecollectConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, layers=mixer
        )
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 4, **options},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("mixer", ["mta", "yaad"])
def test_it_learns_and_resumes(tmp_path: Path, mixer: str) -> None:
    """Prevents a forward pass that a Trainer cannot call, and states that it would have to know about."""
    whole, losses = trained(tmp_path / "whole", mixer, save_strategy="no")
    assert losses[0] > math.log(32) - 1
    assert losses[-1] < losses[0] - 1
    trained(tmp_path / "cut", mixer, save_steps=6)
    (tmp_path / "cut" / "checkpoint-12").rename(tmp_path / "later")
    resumed, _ = trained(tmp_path / "cut", mixer, resume=True, save_strategy="no")
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """The loss takes `num_items_in_batch`; without it the sum over micro-batches would count each of them as a whole batch."""
    whole, losses = trained(tmp_path / "a", "mta", save_strategy="no")
    parts, same = trained(
        tmp_path / "b", "mta", save_strategy="no", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert losses == pytest.approx(same, abs=1e-3)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
