"""A trained model of text and its tokenizer, from the folder they are saved in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from recollect.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_file
from recollect.models import RecollectForCausalLM, load_retrofitted
from recollect.models.configuration import model_folder
from recollect.user_modules import import_user_modules


class TextModel(NamedTuple):
    """model: in evaluation mode; tokenizer: the one that it was trained with."""

    model: Any  # a RecollectForCausalLM: Hugging Face's stubs refuse `generate` on a declared model
    tokenizer: Tokenizer


def load_text_model(folder: Path, imports: Sequence[str] = ()) -> TextModel:
    """A model that `recollect compare text`, `train` or `retrofit` has left: of bytes, unless a tokenizer.json lies beside it.

    Args:
        folder: of `save_pretrained`, or a run's folder.
        imports: modules that register the model's mixers.
    Raises:
        ValueError: no model there, a damaged or unknown one, or one that has another number of symbols than the tokenizer.
    """
    folder, model = load_saved(folder, imports)
    return TextModel(model, tokenizer_of(folder, model.config.vocab_size))


def tokenizer_of(folder: Path, n_symbols: int) -> Tokenizer:
    """The tokenizer of a saved model of `n_symbols`: its tokenizer.json, else bytes.

    Raises:
        ValueError: another number of symbols than the tokenizer has.
    """
    own = tokenizer_file(folder)
    tokenizer = load_tokenizer(own) if own else ByteTokenizer()
    if own and n_symbols < tokenizer.vocab_size:
        raise ValueError(f"{folder}: the model has {n_symbols} symbols, its tokenizer.json {tokenizer.vocab_size}")
    if not own and n_symbols != tokenizer.vocab_size:
        raise ValueError(
            f"{folder} is no byte-level model: it has {n_symbols} symbols, not {tokenizer.vocab_size}; "
            "put the tokenizer.json that it was trained with into the folder"
        )
    return tokenizer


def load_saved(folder: Path, imports: Sequence[str] = ()) -> tuple[Path, Any]:
    """Where a saved model of this package lies, and the model in evaluation mode.

    Raises:
        ValueError: no model there, a damaged or unknown one.
    """
    import_user_modules(imports)
    place = model_folder(folder)
    if place is None:
        raise ValueError(
            f"{folder} holds no model; give OUT of a finished `recollect train`, or OUT/runs/LABEL-seedK of a compare"
        )
    transformers_logging.disable_progress_bar()
    try:
        return place, _load(place)
    except SafetensorError as error:
        raise ValueError(f"{place}: model.safetensors is damaged: {error}") from error
    except ValueError as error:
        hint = "; if it is a mixer of your own, name its file with --import" if "unknown mixer" in str(error) else ""
        raise ValueError(f"{place}: {error}{hint}") from error


def _load(folder: Path) -> Any:
    """One of our models, or one that `recollect retrofit` has made."""
    if PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "").startswith("recollect_"):
        return load_retrofitted(folder).eval()
    return RecollectForCausalLM.from_pretrained(folder).eval()
