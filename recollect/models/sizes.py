"""The published model sizes by name, and how many parameters a config has."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch

from recollect.models.configuration import RecollectConfig
from recollect.models.modeling import RecollectForCausalLM


class Size(NamedTuple):
    """Model dim D, layers L, heads M; hidden size of the SwiGLU (None: the config's own rule); vocabulary and context in tokens;
    the paper's mixer."""

    dim: int
    n_layers: int
    n_heads: int
    intermediate: int | None = None
    vocab_size: int = 128_256
    context: int = 2048
    mixer: str = "mta"


SIZES = {
    # Table 7 of arXiv 2504.00927. The names are the paper's: with the vocabulary of 128,256 tokens the smallest one has 388 M
    # parameters.
    "mta-300m": Size(1024, 20, 16),
    "mta-550m": Size(1280, 24, 10),
    "mta-880m": Size(1536, 24, 16),
    "mta-1b": Size(2048, 24, 16),
    # Table 5 of arXiv 2504.13173; 1.3b, which it trains but does not list, from Table 7 of arXiv 2505.23735 by the same group.
    # Context and vocabulary as there. The SwiGLU is not given: 8 D / 3 in whole multiples of 64. The names are the papers' too:
    # with moneta these shapes have 121 M, 378 M, 824 M and 1.14 B parameters.
    "miras-170m": Size(768, 12, 16, 2048, 32_000, 4096, "moneta"),
    "miras-340m": Size(1024, 24, 16, 2752, 32_000, 4096, "moneta"),
    "miras-780m": Size(1536, 24, 16, 4096, 32_000, 4096, "moneta"),
    "miras-1.3b": Size(2048, 18, 8, 5504, 32_000, 4096, "moneta"),
}


def size(name: str, mixer: str | None = None, *, vocab_size: int | None = None) -> RecollectConfig:
    """A model of the papers' shapes, with any mixer in the place of the paper's.

    Args:
        name: a key of `SIZES`.
        mixer: a registered mixer or a pattern of layers ("yaad-h"); None: the paper's, `mta` or `moneta`. Depth-dependent options
            apply (Multi-Token Attention convolves in layers 2, 6, 10, ...). Sliding windows are half the context, 2048 tokens
            (arXiv 2505.23735, appendix E); change them with `config.with_mixer_options(window=1024)`.
        vocab_size: number of tokens; None: the paper's, 128,256 of Llama 3.1 or 32,000.
    Returns:
        A config with tied embeddings and the paper's context.
    Raises:
        ValueError: unknown size or mixer; the nearest is named.
    Source: Golovneva et al. 2025, arXiv 2504.00927, Table 7; Behrouz et al. 2025, arXiv 2504.13173, Table 5.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown size {name!r}{hint} Known sizes: {', '.join(SIZES)}")
    shape = SIZES[name]
    config = RecollectConfig(
        vocab_size=shape.vocab_size if vocab_size is None else vocab_size,
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        intermediate_size=shape.intermediate,  # type: ignore[arg-type]  # None is the config's own rule
        layers=shape.mixer if mixer is None else mixer,
        max_position_embeddings=shape.context,
    )
    has_window = any(layer["mixer"] == "sliding_window" for layer in config.layers)
    return config.with_mixer_options(window=shape.context // 2) if has_window else config


def n_parameters(config: RecollectConfig) -> int:
    """Trainable numbers of the model, tied ones counted once. Nothing is allocated."""
    with torch.device("meta"):
        model = RecollectForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
