"""What a sequence mixer is, and the registry that everything else loops over.

A mixer maps x [B, T, D] and a state to y [B, T, D] and the next state. Adding one is one file: a frozen config, a state, a class
with `@register("name", ...)`; the command line, the models, the laws and the benchmarks find it by being registered.

Axis legend: B batch, T time, D model dim.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from recollect.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Options that every mixer has.

    Attributes:
        dim: model dim D.
        n_heads: heads of the Transformer of the same size (a mixer may use fewer, wider ones).
        layer: 0-based depth of the layer in the model; some mixers initialise or scale by it.
    """

    dim: int
    n_heads: int
    layer: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1 or self.n_heads < 1:
            raise ValueError(f"dim and n_heads must be positive; got dim={self.dim}, n_heads={self.n_heads}")
        if self.layer < 0:
            raise ValueError(f"layer is a 0-based depth; got {self.layer}")


class Mixer(nn.Module, abc.ABC):
    """A causal sequence mixer: `y, state = mixer(x, state)`.

    Laws (tested over the registry): causal; rows of a batch are independent; any split of the sequence with carried state equals one
    call; left padding is the identity; document ids isolate documents; the state can be detached, selected, saved and loaded.
    """

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialise every parameter and non-persistent buffer in place; called again after loading to fill what is missing."""

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state before the first token, on the parameters' device and in their dtype."""

    @abc.abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, *, mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Mix a piece of the sequence.

        Args:
            x: [B, T, D], T >= 1.
            state: what the previous piece returned; None is the start of the sequence.
            mask: bool [B, T], False at padding. Padding stands at the left (before a row's first token) or at the right; outputs at
                padding are unspecified but finite. A state may only be carried on after left padding.
            document_ids: int [B, T], equal for tokens of one document; a document is contiguous. Tokens see their own document only.
        Returns:
            y [B, T, D] and the state after the last token.
        """

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Attention-like maps [B, H, T, T] for pictures, by name (`"attention"`, `"before"`, `"after"`); {} if there are none."""
        return {}


class Entry(NamedTuple):
    """One registered name: the class, its preset options, and what `recollect list` says of it.

    `pattern(layer, n_layers)` gives the options that depend on the depth (Multi-Token Attention convolves only in some layers).
    """

    name: str
    cls: type[Mixer]
    config: type[MixerConfig]
    options: Mapping[str, Any]
    pattern: Callable[[int, int], Mapping[str, Any]]
    summary: str
    source: str
    state: str


class Pattern(NamedTuple):
    """A name for mixers that take turns over the layers of a model (recollect/mixers/patterns.py).

    `layers` are the turns: mixers' names, which take their depth-dependent options, or dicts of a name and its options, which
    stand as they are.
    """

    name: str
    layers: tuple[str | Mapping[str, Any], ...]
    summary: str
    source: str


MIXERS: dict[str, Entry] = {}
PATTERNS: dict[str, Pattern] = {}
M = TypeVar("M", bound=type[Mixer])


def register(
    name: str,
    *,
    config: type[MixerConfig],
    summary: str,
    source: str,
    state: str,
    options: Mapping[str, Any] | None = None,
    pattern: Callable[[int, int], Mapping[str, Any]] | None = None,
) -> Callable[[M], M]:
    """Register a mixer under `name`; use as a class decorator, several times for several presets of one class.

    Args:
        name: what users type.
        config: its frozen config dataclass; the class is built as `cls(config(...))`.
        summary: one line, what it is.
        source: paper, with its arXiv number.
        state: how the state grows, in words ("2 H K numbers per token", "constant").
        options: preset values of config fields.
        pattern: (layer, n_layers) -> options that depend on the depth.
    Raises:
        ValueError: the name is taken by another class or by a pattern of layers, or an option is no field of `config`.
    """

    def add(cls: M) -> M:
        if name in PATTERNS:
            raise ValueError(f"{name!r} is already registered, as a pattern of layers")
        if name in MIXERS and MIXERS[name].cls.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"mixer {name!r} is already registered by {MIXERS[name].cls.__module__}.{MIXERS[name].cls.__qualname__}"
            )
        fixed = dict(options or {})
        check_options(name, config, fixed)
        MIXERS[name] = Entry(name, cls, config, fixed, pattern or (lambda layer, n_layers: {}), summary, source, state)
        return cls

    return add


def available() -> list[str]:
    """Every registered name, sorted; each builds with `dim` and `n_heads` alone."""
    return sorted(MIXERS)


def entry(name: str) -> Entry:
    """The registry entry of `name`.

    Raises:
        ValueError: unknown name; the message gives the nearest and all known ones.
    """
    if name not in MIXERS:
        if name in PATTERNS or "+" in name:
            raise ValueError(f"{name!r} names the layers of a whole model; one mixer is needed here")
        near = difflib.get_close_matches(name.lower(), [*MIXERS, *PATTERNS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown mixer {name!r}{hint} Known mixers: {', '.join(available())}")
    return MIXERS[name]


def build(name: str, *, dim: int, n_heads: int, **options: Any) -> Mixer:
    """Build a registered mixer.

    Args:
        name: a name from `available()`.
        dim: model dim D.
        n_heads: number of heads.
        options: any field of the mixer's config; they override the preset's.
    Raises:
        ValueError: unknown name or option (the nearest is named), or a value the config refuses.
    """
    return entry(name).cls(configure(name, dim=dim, n_heads=n_heads, **options))


def configure(name: str, *, dim: int, n_heads: int, **options: Any) -> MixerConfig:
    """The config that `build` would use: checks the name, the options and their values without allocating a parameter."""
    found = entry(name)
    check_options(name, found.config, options)
    return found.config(**{"dim": dim, "n_heads": n_heads, **found.options, **options})


def option_names(name: str) -> list[str]:
    """The options of a registered mixer: the fields of its config, in their order."""
    return [field.name for field in dataclasses.fields(entry(name).config)]


def check_options(name: str, config: type[MixerConfig], options: Mapping[str, Any]) -> None:
    """Raises ValueError if `config` lacks one of the options; the message gives the nearest and all that `name` has."""
    known = [field.name for field in dataclasses.fields(config)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option.lower(), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"mixer {name!r} has no option {option!r}{hint} Its options: {', '.join(known)}")
