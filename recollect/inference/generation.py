"""Continuing a text with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.inference.text_model import load_text_model
from recollect.models import RecollectCache, RecollectForCausalLM, load_memory
from recollect.models.cache import CACHE


def continue_text(
    folder: Path,
    prompt: str,
    *,
    n_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    memory: Path | None = None,
    imports: Sequence[str] = (),
) -> str:
    """The prompt and what the model makes of it.

    Args:
        folder: of `save_pretrained`; a run's folder is accepted too.
        prompt: text; it is read after a document start, or, with a memory, goes on from what was read last.
        n_tokens: tokens to generate, at least 1 (of a byte-level model these are bytes).
        temperature: of the sampling; 0 always takes the likeliest token.
        seed: of the sampling.
        memory: file of `recollect remember`, of this model.
        imports: modules that register the model's mixers.
    Raises:
        ValueError: what `load_text_model` refuses, another model's memory, or an argument out of range.
    """
    if n_tokens < 1 or temperature < 0:
        raise ValueError(f"tokens must be at least 1 and temperature 0 or more; got {n_tokens} and {temperature}")
    model, tokenizer = load_text_model(folder, imports)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = tokenizer.encode_batch([prompt])[0].astype(np.int64)
    if memory is None:
        ids = np.insert(ids, 0, tokenizer.start)
    else:
        if not prompt:
            raise ValueError("with a memory the prompt must not be empty: a memory does not keep the last token it has read")
        if not isinstance(model, RecollectForCausalLM):
            raise ValueError(f"{folder} holds a retrofitted model; it goes on from no memory")
        # The states know their own place; `generate` would ask for the tokens of a cache that has a length.
        options[CACHE] = RecollectCache(load_memory(model, memory).states)
    tokens = torch.from_numpy(ids)[None]
    torch.manual_seed(seed)
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_tokens, top_k=0, **options)
    return tokenizer.decode(said[0].numpy())
