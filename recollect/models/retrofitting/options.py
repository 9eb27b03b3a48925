"""What a retrofit adds, as data: one record per call of `retrofit`, checked here and stored in the model's config.

Axis legend: D model dim, L layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from recollect.mixers import MIXERS, MixerConfig, configure, entry
from recollect.mixers.multi_token import MultiTokenAttention, MultiTokenConfig
from recollect.mixers.recurrent import RecurrentMixer

KERNEL_OPTIONS = ("kq_pre", "kq_post", "c_q", "c_k", "pad_key", "head_pre", "head_post", "c_h", "merged", "backend")
_OF_THE_LAYER = ("dim", "layer", "n_layers")


def chosen_layers(layers: str | Sequence[int], n_layers: int) -> list[int]:
    """0-based layers, ascending.

    Args:
        layers: "all"; "every-4th": layers 2, 6, 10, ... as in the paper (of every n layers the one at n // 2; the last layer of a
            shallower model), any n; "2,6"; or the numbers themselves.
        n_layers: L.
    Raises:
        ValueError: another word, or a number that is no layer, or no layer at all.
    """
    accepted = f"'all', 'every-4th' (any number), or layers of 0..{n_layers - 1} as '2,6' or [2, 6]"
    found: list[Any]
    if isinstance(layers, str):
        every = re.fullmatch(r"every-(\d+)(?:st|nd|rd|th)", layers)
        if layers == "all":
            found = list(range(n_layers))
        elif every and int(every[1]) > 0:
            step = int(every[1])
            found = list(range(min(step // 2, n_layers - 1), n_layers, step))
        elif re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", layers):
            found = [int(part) for part in layers.split(",")]
        else:
            raise ValueError(f"unknown layers {layers!r}; accepted: {accepted}")
    else:
        found = list(layers)
    if not found or any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < n_layers for i in found):
        raise ValueError(f"layers {layers!r} are not layers of this model; accepted: {accepted}")
    if len(set(found)) != len(found):
        raise ValueError(f"layers {layers!r} name a layer twice")
    return sorted(found)


def make_record(mixer: str, layers: Sequence[int], options: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """{"mixer", "layers", "options"}, every option with its value, so that later defaults do not change a saved model.

    Raises:
        ValueError: an unknown mixer or option, one that would change the model's outputs, or a value that the mixer refuses.
    """
    kind = kind_of(mixer)
    if kind == "kernels":
        for option in options:
            if option not in KERNEL_OPTIONS:
                raise ValueError(
                    f"retrofit with mixer {mixer!r} has no option {option!r}: everything else is the model's own or would change "
                    f"its outputs. Options: {', '.join(KERNEL_OPTIONS)}"
                )
        kernels = kernel_config(mixer, options, config)
        return {"mixer": mixer, "layers": list(layers), "options": {name: getattr(kernels, name) for name in KERNEL_OPTIONS}}
    for option in options:
        if option in _OF_THE_LAYER:
            raise ValueError(f"option {option!r} is given by the model; leave it out")
    checked = [memory_config(mixer, options, config, layer) for layer in layers]
    known = {name: value for name, value in dataclasses.asdict(checked[0]).items() if name not in _OF_THE_LAYER}
    return {"mixer": mixer, "layers": list(layers), "options": known}


def kind_of(mixer: str) -> str:
    """ "kernels" inside the attention, or "memory" beside it.

    Raises:
        ValueError: an unknown mixer, or one that can be neither.
    """
    cls = entry(mixer).cls
    if issubclass(cls, MultiTokenAttention):
        return "kernels"
    if issubclass(cls, RecurrentMixer):
        return "memory"
    names = [name for name in sorted(MIXERS) if issubclass(MIXERS[name].cls, MultiTokenAttention | RecurrentMixer)]
    raise ValueError(f"mixer {mixer!r} cannot be added to a trained model; mixers that can: {', '.join(names)}")


def kernel_config(mixer: str, options: Mapping[str, Any], config: PreTrainedConfig) -> MultiTokenConfig:
    """The mixer's config with the model's heads and without a norm, which would change the model's outputs."""
    n_heads = config.num_attention_heads
    # The shapes of the kernels follow from the number of heads alone; projections are the model's own.
    found = configure(mixer, dim=2 * n_heads, n_heads=n_heads, **{"norm": "none", **options})
    assert isinstance(found, MultiTokenConfig)
    if not (found.head_pre or found.head_post or (found.kq and (found.kq_pre or found.kq_post))):
        raise ValueError(
            f"retrofit with mixer {mixer!r} would add nothing: all of kq_pre, kq_post, head_pre and head_post are off"
        )
    return found


def memory_config(mixer: str, options: Mapping[str, Any], config: PreTrainedConfig, layer: int) -> MixerConfig:
    """The mixer's config for one layer; as many heads as the model's attention unless `n_heads` says otherwise."""
    deep = entry(mixer).pattern(layer, config.num_hidden_layers)
    own: dict[str, Any] = {"n_heads": config.num_attention_heads, **deep, **options}
    return configure(mixer, dim=config.hidden_size, layer=layer, **own)
