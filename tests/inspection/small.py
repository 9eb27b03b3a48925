"""Byte-level models small enough to be looked into in seconds, with kernels and memories that are not as they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recollect.data.tokenizer import ByteTokenizer
from recollect.models import RecollectConfig, RecollectForCausalLM

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer. Æ \u2013 日 </script> " * 60


def model_of(*layers: dict[str, Any] | str, dim: int = 16, heads: int = 2, context: int = 64) -> RecollectForCausalLM:
    """A fresh model, seeded, with noise on every parameter of a mixer."""
    torch.manual_seed(0)
    config = RecollectConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        max_position_embeddings=context,
        layers=[{"mixer": layer} if isinstance(layer, str) else dict(layer) for layer in layers],
    )
    model = RecollectForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stored(folder: Path, *layers: dict[str, Any] | str, **sizes: int) -> Path:
    """The same, saved."""
    model_of(*layers, **sizes).save_pretrained(folder)
    return folder
