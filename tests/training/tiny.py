"""A model and data small enough to train in milliseconds."""

from __future__ import annotations

import torch

from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.tasks import Batch, FindBlock, stream_seed
from recollect.training.config import TrainingConfig

TASK = FindBlock(n_letters=2, n_question=1, n_blocks=3)
CONFIG = TrainingConfig(steps=12, batch_size=4, lr=3e-3, schedule="cosine", warmup=3, weight_decay=0.1)


def tiny_model(*, seed: int = 0, dropout: float = 0.2, mixer: str = "mta") -> RecollectForCausalLM:
    torch.manual_seed(seed)
    layers = [{"mixer": mixer, "dropout": dropout}] * 2
    return RecollectForCausalLM(
        RecollectConfig(vocab_size=TASK.vocab_size, hidden_size=16, num_attention_heads=2, intermediate_size=16, layers=layers)
    )


def batch_at(step: int) -> Batch:
    return TASK.sample(4, seed=stream_seed("train", 0, step))


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every parameter, bit by bit."""
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}
