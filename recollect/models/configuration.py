"""Configuration of the language model: sizes, and which mixer each layer uses, as data."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from recollect.mixers import configure
from recollect.mixers.patterns import layer_item, turns, with_options

# Keys that Hugging Face itself puts into a config's keywords or its JSON; every other unknown key is a mistake.
_HUGGING_FACE_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
    }
)


class RecollectConfig(PreTrainedConfig):
    """A causal language model with any registered mixer in each layer.

    Everything is checked here, so that a config that exists can be built; `to_json_string` and back gives an equal config.

    Args:
        vocab_size: number of tokens C; 257 is bytes and one separator.
        hidden_size: model dim D.
        num_hidden_layers: layers L; None: as many as `layers` lists, else 4.
        num_attention_heads: heads; what a mixer makes of them is its own affair.
        intermediate_size: hidden size of the SwiGLU; None: 256 * ceil(8 D / 3 / 256).
        layers: one name for the whole model: a mixer, a pattern of layers ("moneta-h") or mixers that take turns
            ("mta+moneta"); or a list with one item per layer: a mixer's name, or a dict of its name and its options, as in
            `[{"mixer": "mta", "c_q": 6}, {"mixer": "attention"}]`. A name alone also takes the mixer's depth-dependent
            options (`mixers.layer_options`); a dict stands as it is. Stored as a list of dicts.
        mlp: False leaves the SwiGLUs out, for models of mixers only.
        tie_word_embeddings: the output projection is the embedding.
        rms_norm_eps: added to the mean square in every RMSNorm of the model (mixers have their own).
        max_position_embeddings: context in tokens that the model is meant for. Nothing enforces it; evaluation tools read it.
        use_cache: forward returns the states (a `RecollectCache`) unless told otherwise; never by default while training.
        pad_token_id, bos_token_id, eos_token_id: token ids used by `generate`, or None.
    Raises:
        ValueError: a size, a mixer, an option, a token id or a keyword that is not possible; the nearest known name is given.
    """

    model_type = "recollect"

    vocab_size: int = 257
    hidden_size: int = 256
    num_hidden_layers: int = None  # type: ignore[assignment]  # an int once constructed, as the two below
    num_attention_heads: int = 4
    intermediate_size: int = None  # type: ignore[assignment]
    layers: Any = "attention"
    mlp: bool = True
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what was left open, check everything, and hand Hugging Face its own keywords."""
        _refuse_unknown(kwargs, [field.name for field in dataclasses.fields(self)])
        if self.num_hidden_layers is None:
            self.num_hidden_layers = 4 if isinstance(self.layers, str) else len(self.layers)
        if self.intermediate_size is None:
            self.intermediate_size = swiglu_size(self.hidden_size)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            _check_count(name, self.__dict__[name])
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive; got {self.rms_norm_eps}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            _check_tokens(name, self.__dict__[name], self.vocab_size)
        self.layers = self._checked_layers()
        super().__post_init__(**kwargs)

    def with_mixer_options(self, **options: Any) -> RecollectConfig:
        """A copy with mixer options set in every layer that has them; weights that an option does not shape load into it unchanged.

        `config.with_mixer_options(rope_theta=5e5)` is the change for longer contexts of arXiv 2504.00927, section 4.3:
        `RecollectForCausalLM.from_pretrained(path, config=config.with_mixer_options(rope_theta=5e5))`.

        Raises:
            ValueError: no layer's mixer has an option of that name, or a mixer refuses the value.
        """
        changed = copy.deepcopy(self)
        changed.layers = with_options(changed.layers, options)
        changed.layers = changed._checked_layers()
        return changed

    def _checked_layers(self) -> list[dict[str, Any]]:
        """`layers` as a list of dicts, each of which its mixer accepts."""
        n_layers = self.num_hidden_layers
        items = turns(self.layers, n_layers) if isinstance(self.layers, str) else list(self.layers)
        if len(items) != n_layers:
            raise ValueError(
                f"layers lists {len(items)} mixers but num_hidden_layers is {n_layers}; "
                "give one per layer, or leave num_hidden_layers out"
            )
        return [self._checked_layer(layer, item) for layer, item in enumerate(items)]

    def _checked_layer(self, layer: int, item: Any) -> dict[str, Any]:
        try:
            item = layer_item(item, layer, self.num_hidden_layers)
            options = {key: value for key, value in item.items() if key != "mixer"}
            configure(
                item["mixer"], **{"dim": self.hidden_size, "n_heads": self.num_attention_heads, "layer": layer, **options}
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"layers[{layer}]: {error}") from error
        return item


def swiglu_size(dim: int) -> int:
    """Hidden size of a SwiGLU beside model dim D: 256 * ceil(8 D / 3 / 256), the Llama rule with multiples of 256."""
    return 256 * -(-8 * dim // (3 * 256))


def _refuse_unknown(given: dict[str, Any], known: Sequence[str]) -> None:
    """Hugging Face would keep any keyword in silence, and a misspelt size would train the wrong model."""
    for key in given:
        if key in _HUGGING_FACE_KEYS or key.startswith("_"):
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"RecollectConfig has no option {key!r}{hint} Options of a mixer belong in `layers`, "
            "those of generation in `model.generation_config`."
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")


def _check_tokens(name: str, value: Any, vocab_size: int) -> None:
    for token in value if isinstance(value, list) else [value]:
        if token is not None and (not isinstance(token, int) or not 0 <= token < vocab_size):
            raise ValueError(f"{name} must be None or in 0..{vocab_size - 1} (vocab_size={vocab_size}); got {value!r}")


def model_folder(folder: Path) -> Path | None:
    """Where a saved model lies: in the folder itself, or in `model` inside it, where runs leave theirs; None: nowhere."""
    return next((place for place in (folder, folder / "model") if (place / "config.json").is_file()), None)
