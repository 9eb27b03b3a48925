"""The model of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.tasks.base import stream_seed


def make_model(
    sizes: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], *, seed: int, length: int = 2048
) -> RecollectForCausalLM:
    """A freshly initialised model on the CPU; dropout will go on from where this leaves torch's generator.

    Args:
        sizes: `Plan.model_of(label)`.
        layers: per-layer mixers and options, `Plan.mixers[i]["layers"]`.
        seed: of weights and dropout.
        length: tokens of an example.
    """
    torch.manual_seed(stream_seed("train", seed))
    config = RecollectConfig(**sizes, layers=[dict(layer) for layer in layers], max_position_embeddings=length)
    return RecollectForCausalLM(config)


def n_parameters(model: torch.nn.Module) -> int:
    """Trainable numbers, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
