"""The published model sizes by name, and how many parameters a config has."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch

from recollect.models.configuration import RecollectConfig
from recollect.models.modeling import RecollectForCausalLM


class Size(NamedTuple):
    """Model dim D, layers L, heads M."""

    dim: int
    n_layers: int
    n_heads: int


# Table 7 of arXiv 2504.00927. The names are the paper's: with the vocabulary of 128,256 tokens the smallest one has 388 M
# parameters.
SIZES = {
    "mta-300m": Size(1024, 20, 16),
    "mta-550m": Size(1280, 24, 10),
    "mta-880m": Size(1536, 24, 16),
    "mta-1b": Size(2048, 24, 16),
}


def size(name: str, mixer: str = "mta", *, vocab_size: int = 128_256) -> RecollectConfig:
    """A model of the Multi-Token Attention paper, with any mixer in the place of the paper's.

    Args:
        name: a key of `SIZES`.
        mixer: a registered mixer; its depth-dependent options apply (Multi-Token Attention convolves in layers 2, 6, 10, ...).
        vocab_size: number of tokens; the paper's is that of Llama 3.1.
    Returns:
        A config with tied embeddings and a context of 2048 tokens.
    Raises:
        ValueError: unknown size or mixer; the nearest is named.
    Source: Golovneva et al. 2025, arXiv 2504.00927, Table 7.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown size {name!r}{hint} Known sizes: {', '.join(SIZES)}")
    shape = SIZES[name]
    return RecollectConfig(
        vocab_size=vocab_size,
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        layers=mixer,
    )


def n_parameters(config: RecollectConfig) -> int:
    """Trainable numbers of the model, tied ones counted once. Nothing is allocated."""
    with torch.device("meta"):
        model = RecollectForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
