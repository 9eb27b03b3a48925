"""The model that a run asks for: as a configuration, and with its first weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from recollect.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from recollect.models import SIZES, RecollectConfig, RecollectForCausalLM, load_retrofitted, size
from recollect.models.configuration import model_folder
from recollect.training.recipe.settings import ModelSettings, RunSettings


def model_config(run: RunSettings, vocab_size: int) -> RecollectConfig:
    """Configuration of the model that `run` trains.

    Args:
        run: with `model.start_from`, size and mixers are those of the saved model; only `model.options` and a longer context change
            it. Otherwise the shape of `model.size`, the paper's mixer in it unless `model.layers` names another, and the given
            fields over both; a hidden size of one's own brings its own width of the SwiGLUs.
        vocab_size: of the tokenizer.
    Raises:
        ValueError: an unknown size, mixer or option (the nearest is named), a shape that does not fit, or a saved model that is not
            there, is no model of this package or has another vocabulary.
    """
    model = run.model
    if model.start_from is not None:
        config = _saved(Path(model.start_from), vocab_size)
        context = max(config.max_position_embeddings, run.data.seq_len)
    else:
        config = RecollectConfig(vocab_size=vocab_size, **_shape(model))
        context = run.data.seq_len
    if model.options:
        config = config.with_mixer_options(**model.options)
    config.max_position_embeddings = context
    return config


def _shape(model: ModelSettings) -> dict[str, Any]:
    """Arguments of `RecollectConfig`."""
    shape: dict[str, Any] = {}
    if model.size is not None:
        published = size(model.size, "attention")  # names the nearest where there is no such size
        shape = {
            "hidden_size": published.hidden_size,
            "num_hidden_layers": published.num_hidden_layers,
            "num_attention_heads": published.num_attention_heads,
            "intermediate_size": published.intermediate_size if model.hidden_size is None else None,
            "layers": SIZES[model.size].mixer,
        }
    given = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.intermediate_size,
        "layers": model.layers,
    }
    shape.update({name: value for name, value in given.items() if value is not None})
    return {**shape, "mlp": model.mlp, "tie_word_embeddings": model.tie_embeddings}


def saved_model(folder: Path) -> Path:
    """Where the model lies in `folder`, which holds one or is the folder of a run.

    Raises:
        ValueError: there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"model.start_from: there is no folder {folder}")
    place = model_folder(folder)
    if place is None:
        raise ValueError(f"model.start_from: {folder} holds no model (no config.json in it or in its folder model)")
    return place


def start_model(run: RunSettings, tokenizer: Tokenizer) -> PreTrainedModel:
    """The model that `run` trains, with its weights in fp32: drawn from torch's generator, or those of `model.start_from`.

    `model.start_from` may also hold a retrofitted model (`recollect retrofit`), or a stock causal model that can be one: those are
    trained as they are.

    Raises:
        ValueError: as `model_config`; settings of our models for a model that is none; or another tokenizer than the saved model's.
    """
    if run.model.start_from is None:
        return RecollectForCausalLM(model_config(run, tokenizer.vocab_size))
    place = saved_model(Path(run.model.start_from))
    _check_tokenizer(place, tokenizer)
    try:
        return _loaded(run, place, tokenizer.vocab_size)
    except SafetensorError as error:
        raise ValueError(f"model.start_from: the weights in {place} are damaged: {error}") from error


def _loaded(run: RunSettings, place: Path, vocab_size: int) -> PreTrainedModel:
    """The saved model of any kind that can be trained."""
    kind = _kind(place)
    if kind == RecollectConfig.model_type:
        return RecollectForCausalLM.from_pretrained(place, config=model_config(run, vocab_size), dtype=torch.float32)
    if run.model.options or run.data.carry:
        raise ValueError(f"model.options and data.carry are for models of this package; {place} holds a {kind!r}")
    # Half-precision files would be trained in half precision, where small steps leave a weight of 1 as it is.
    if kind.startswith("recollect_"):
        model = load_retrofitted(place, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"model.start_from: {place} has {model.config.vocab_size} tokens, the tokenizer {vocab_size}")
    return model


def _check_tokenizer(place: Path, tokenizer: Tokenizer) -> None:
    """A model's ids mean nothing to another tokenizer, whatever their number."""
    own = tokenizer_file(place)
    if own is None:
        return
    try:
        known = load_tokenizer(own)
    except ValueError:  # of a kind that we cannot read: the number of tokens is all that can be compared
        return
    if known.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"model.start_from: the model in {place} was trained with the tokenizer beside it, data.tokenizer is another; "
            f"set data.tokenizer={own}"
        )


def _kind(place: Path) -> str:
    """The type of a saved model."""
    try:
        return str(json.loads((place / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"model.start_from: cannot read {place / 'config.json'}: {error}") from error


def _saved(folder: Path, vocab_size: int) -> RecollectConfig:
    """Configuration of a saved model, or of the one in a run's folder."""
    place = saved_model(folder)
    kind = _kind(place)
    if kind != RecollectConfig.model_type:
        raise ValueError(f"model.start_from: {place} holds a model of the type {kind!r}, not {RecollectConfig.model_type!r}")
    config: RecollectConfig = RecollectConfig.from_pretrained(place)
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"model.start_from: the model in {place} has {config.vocab_size} tokens, the tokenizer {vocab_size}; "
            "set data.tokenizer to the one it was trained with"
        )
    return config
