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
from recollect.models import RecollectCache, RecollectForCausalLM, load_memory


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
        n_tokens: bytes to generate, at least 1.
        temperature: of the sampling; 0 always takes the likeliest byte.
        seed: of the sampling.
        memory: file of `recollect remember`, of this model.
        imports: modules that register the model's mixers.
    Raises:
        ValueError: no model there, not a byte-level one, another model's memory, or an argument out of range.
    """
    if n_tokens < 1 or temperature < 0:
        raise ValueError(f"tokens must be at least 1 and temperature 0 or more; got {n_tokens} and {temperature}")
    model = load_byte_model(folder, imports)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = encode(prompt)[None]
    if memory is None:
        tokens = torch.cat([torch.tensor([[DOCUMENT_START]]), tokens], dim=1)
    else:
        if not prompt:
            raise ValueError("with a memory the prompt must not be empty: a memory does not keep the last byte it has read")
        # The states know their own place; `generate` would ask for the tokens of a cache that has a length.
        options["past_key_values"] = RecollectCache(load_memory(model, memory).states)
    torch.manual_seed(seed)
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_tokens, top_k=0, **options)
    return decode(said[0])


def load_byte_model(
    folder: Path, imports: Sequence[str] = ()
) -> Any:  # Hugging Face's stubs refuse `generate` on a declared model
    """A byte-level model in evaluation mode.

    Args:
        folder: of `save_pretrained`, or a run's folder.
        imports: modules that register the model's mixers.
    Raises:
        ValueError: no model there, a damaged or unknown one, or one whose symbols are no bytes.
    """
    import_user_modules(imports)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; give OUT/runs/LABEL-seedK/model of a finished `recollect compare text`")
    transformers_logging.disable_progress_bar()
    try:
        model = RecollectForCausalLM.from_pretrained(folder).eval()
    except SafetensorError as error:
        raise ValueError(f"{folder}: model.safetensors is damaged: {error}") from error
    except ValueError as error:
        hint = "; if it is a mixer of your own, name its file with --import" if "unknown mixer" in str(error) else ""
        raise ValueError(f"{folder}: {error}{hint}") from error
    if model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(f"{folder} is no byte-level model: it has {model.config.vocab_size} symbols, not {VOCAB_SIZE}")
    return model
