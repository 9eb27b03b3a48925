"""Continuing a text with a byte-level model that `recollect compare text` has trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from recollect.comparison.user_modules import import_user_modules
from recollect.data.text import DOCUMENT_START, VOCAB_SIZE, decode, encode
from recollect.models import RecollectForCausalLM


def continue_text(
    folder: Path, prompt: str, *, n_tokens: int = 200, temperature: float = 0.8, seed: int = 0, imports: Sequence[str] = ()
) -> str:
    """The prompt and what the model makes of it.

    Args:
        folder: of `save_pretrained`; a run's folder is accepted too.
        prompt: text; it is read after a document start.
        n_tokens: bytes to generate, at least 1.
        temperature: of the sampling; 0 always takes the likeliest byte.
        seed: of the sampling.
        imports: modules that register the model's mixers.
    Raises:
        ValueError: no model there, not a byte-level one, or an argument out of range.
    """
    if n_tokens < 1 or temperature < 0:
        raise ValueError(f"tokens must be at least 1 and temperature 0 or more; got {n_tokens} and {temperature}")
    import_user_modules(imports)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; give OUT/runs/LABEL-seedK/model of a finished `recollect compare text`")
    transformers_logging.disable_progress_bar()
    model = _load(folder)
    if model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(f"{folder} is no byte-level model: it has {model.config.vocab_size} symbols, not {VOCAB_SIZE}")
    tokens = torch.cat([torch.tensor([DOCUMENT_START]), encode(prompt)])[None]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_tokens, top_k=0, **sampling)
    return decode(said[0])


def _load(folder: Path) -> Any:  # Hugging Face's stubs refuse `generate` on a declared model
    try:
        return RecollectForCausalLM.from_pretrained(folder).eval()
    except SafetensorError as error:
        raise ValueError(f"{folder}: model.safetensors is damaged: {error}") from error
    except ValueError as error:
        hint = "; if it is a mixer of your own, name its file with --import" if "unknown mixer" in str(error) else ""
        raise ValueError(f"{folder}: {error}{hint}") from error
