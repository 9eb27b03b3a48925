"""Layer patterns: names for mixers that take turns over the layers of a model, wherever a model takes a mixer's name.

"mta+moneta" alternates the two mixers. A registered pattern is a name for such turns; each layer is followed by the model's SwiGLU.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from recollect.mixers.base import MIXERS, PATTERNS, Pattern, check_options, entry, option_names

Turn: TypeAlias = str | Mapping[str, Any]


def register_pattern(name: str, layers: Sequence[Turn], *, summary: str, source: str) -> None:
    """Name the mixers that take turns over the layers of a model.

    Args:
        name: what users type.
        layers: one round, repeated over the depth: registered mixers' names, which take their depth-dependent options, or dicts
            of a name and its options, which stand as they are.
        summary: one line, what it is.
        source: paper, with its arXiv number.
    Raises:
        ValueError: no layer, a mixer or option that does not exist, or a name that is taken by a mixer or by other layers.
    """
    pattern = Pattern(name, tuple(layers), summary, source)
    if not pattern.layers:
        raise ValueError(f"pattern {name!r} needs at least one layer")
    if name in MIXERS or PATTERNS.get(name, pattern) != pattern:
        raise ValueError(f"{name!r} is already registered, as {'a mixer' if name in MIXERS else 'other layers'}")
    for layer, turn in enumerate(pattern.layers):
        item = layer_item(turn, layer, len(pattern.layers))
        mixer = item.pop("mixer")
        check_options(mixer, entry(mixer).config, item)
    PATTERNS[name] = pattern


def turns(name: str, n_layers: int) -> list[Turn]:
    """What stands in each layer of a model named `name`: a pattern's layers or those of "mta+moneta", repeated, or one mixer."""
    repeated = PATTERNS[name].layers if name in PATTERNS else name.split("+")
    return [repeated[layer % len(repeated)] for layer in range(n_layers)]


def layer_item(turn: Any, layer: int, n_layers: int) -> dict[str, Any]:
    """One layer as a dict: a mixer's name takes its depth-dependent options, a dict stands as it is.

    Raises:
        ValueError: an unknown mixer, or neither a name nor a dict with a mixer.
    """
    if isinstance(turn, str):
        return {"mixer": turn, **entry(turn).pattern(layer, n_layers)}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("mixer"), str):
        raise ValueError(f"expected a mixer's name or a dict with the key 'mixer'; got {turn!r}")
    return dict(turn)


def layer_options(name: str, n_layers: int) -> list[dict[str, Any]]:
    """The layers of a model as `[{"mixer": ..., ...options}, ...]` of length n_layers.

    Args:
        name: a mixer, a pattern ("moneta-h"), or mixers that take turns ("mta+moneta").
        n_layers: layers L; a pattern is repeated, and cut where the depth ends.
    Raises:
        ValueError: unknown name; the nearest is given.
    """
    return [layer_item(turn, layer, n_layers) for layer, turn in enumerate(turns(name, n_layers))]


def with_options(layers: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers, with the options set in every layer whose mixer has them.

    Raises:
        ValueError: no layer's mixer has an option of that name; the nearest is given.
    """
    known = {layer["mixer"]: option_names(layer["mixer"]) for layer in layers}
    every = list(dict.fromkeys(option for names in known.values() for option in names))
    for option in options:
        if option not in every:
            near = difflib.get_close_matches(option.lower(), every, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"no layer has an option {option!r}{hint} The options of {', '.join(known)}: {', '.join(every)}")
    return [{**layer, **{k: v for k, v in options.items() if k in known[layer["mixer"]]}} for layer in layers]
