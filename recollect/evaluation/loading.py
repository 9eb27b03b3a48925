"""A language model by path: a recollect run, or any causal LM of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from recollect.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_file
from recollect.evaluation.language_model import BATCH_TOKENS, LanguageModel, TextCoder
from recollect.inference.text_model import load_saved, tokenizer_of
from recollect.models.configuration import model_folder
from recollect.training.world import find_device
from recollect.user_modules import import_user_modules


class OwnCoder:
    """A tokenizer of `recollect.data`: every text begins with its start token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.start
        self.prefix = [tokenizer.start]
        self.name = tokenizer.fingerprint[:16]

    def encode(self, text: str) -> list[int]:
        return list(map(int, self.tokenizer.encode_batch([text])[0]))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


class NoText:
    """Of a model that was trained on symbols that are no text (recall, find-block): it can be asked in these alone."""

    name = "symbols"
    prefix: ClassVar[list[int]] = []
    start = 0

    def __init__(self, why: str) -> None:
        self.why = why

    def encode(self, text: str) -> list[int]:
        raise ValueError(f"{self.why}: it cannot read text; ask it the task that it was trained on")

    def decode(self, ids: Sequence[int]) -> str:
        raise ValueError(f"{self.why}: it cannot write text; ask it the task that it was trained on")


class HuggingFaceCoder:
    """A tokenizer of transformers: texts begin with what it puts there itself (a Llama's <s>, nothing of a GPT-2)."""

    def __init__(self, tokenizer: Any, *, where: str) -> None:
        """
        Raises:
            ValueError: it makes no tokens of a text, or has neither an EOS nor a BOS token: nothing can end or begin a document.
        """
        self.tokenizer = tokenizer
        if not tokenizer("A text.", add_special_tokens=False).input_ids:  # what transformers makes up where there are no files
            raise ValueError(
                f"{where} has no tokenizer: nothing there makes tokens of a text; put tokenizer.json beside the model"
            )
        start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        if start is None:
            raise ValueError(f"{where}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json")
        self.start = int(start)
        prefix = list(tokenizer("").input_ids)
        self.prefix = prefix[:-1] if prefix and prefix[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else prefix
        self.name = str(tokenizer.name_or_path or where)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def load_language_model(
    path: str,
    *,
    imports: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> LanguageModel:
    """Load a model and its tokenizer for evaluation.

    Args:
        path: OUT of a `recollect train`, OUT/runs/LABEL-seedK of a compare, a folder of `save_pretrained`, or a name on the hub.
        imports: modules that register the model's mixers.
        device: auto, cpu, cuda, cuda:1, ...; see `find_device`.
        dtype: of the weights: auto (as saved), float32, bfloat16, float16.
        max_length: tokens that the model may see at a time; None: see `LanguageModel`.
        batch_tokens: tokens of a batch.
    Raises:
        ValueError: no model there, a damaged or unknown one, one without a tokenizer, an unknown dtype, a device that is not here.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is auto, float32, bfloat16 or float16; got {dtype!r}")
    device = find_device(device)
    import_user_modules(imports)
    transformers_logging.set_verbosity_error()  # it warns of contexts that the caller has chosen
    transformers_logging.disable_progress_bar()
    folder = model_folder(Path(path))
    if folder is not None and _is_ours(folder):
        place, model = load_saved(folder)
        own = _coder(place, model.config.vocab_size, path)
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
        return LanguageModel(model.to(device), own, max_length=max_length, batch_tokens=batch_tokens)
    if folder is None and (Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(
            f"{path} holds no model; give OUT of a `recollect train`, OUT/runs/LABEL-seedK of a compare, a model's folder, or a name "
            "on the Hugging Face hub"
        )
    source = str(folder or path)
    try:
        other: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        here = "" if folder is not None else "there is no such folder here, and on the hub: "
        raise ValueError(f"{path} is no causal language model with a tokenizer: {here}{first}") from error
    coder = HuggingFaceCoder(tokenizer, where=path)
    return LanguageModel(other.to(device), coder, max_length=max_length, batch_tokens=batch_tokens)


def _is_ours(folder: Path) -> bool:
    """Whether a model was built or retrofitted by recollect."""
    try:
        return str(AutoConfig.from_pretrained(str(folder)).model_type).startswith("recollect")
    except (OSError, ValueError):
        return True  # the loader of our own models says what is wrong, in its own words


def _coder(place: Path, n_symbols: int, path: str) -> TextCoder:
    """The tokenizer of one of our models: what transformers saved beside a retrofitted one, a tokenizer.json alone, or bytes."""
    if (place / "tokenizer_config.json").is_file():
        return HuggingFaceCoder(AutoTokenizer.from_pretrained(str(place)), where=path)
    if tokenizer_file(place) or n_symbols == ByteTokenizer.vocab_size:
        return OwnCoder(tokenizer_of(place, n_symbols))
    return NoText(f"{path} has {n_symbols} symbols and no tokenizer beside it")
