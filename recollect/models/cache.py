"""The model's states in the shape that Hugging Face's generation expects of a cache.

Axis legend: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from recollect import state as states_of
from recollect.state import State

# What Hugging Face calls a model's cache, as an argument and in its outputs: `past_key_values` until transformers 5.23.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def cache_of(outputs: Any) -> Cache | None:
    """The cache in the outputs of any model of Hugging Face; None where there is none."""
    return getattr(outputs, CACHE, None)


def cache_bytes(cache: Any) -> int:
    """Size in bytes of the tensors in the cache of any model of Hugging Face, each counted once; 0 for None."""
    if isinstance(cache, RecollectCache):
        return cache.nbytes()
    tensors: dict[int, Tensor] = {}
    held = [cache]
    while held:
        part = held.pop()
        if isinstance(part, Tensor):
            tensors[part.data_ptr()] = part
        elif isinstance(part, Mapping):
            held += part.values()
        elif isinstance(part, (list, tuple)):
            held += part
        elif type(part).__module__.startswith(("transformers.", "recollect.")):
            held += vars(part).values()
    return sum(tensor.nbytes for tensor in tensors.values())


class LayerState:
    """One layer's state. Hugging Face reads the class attributes; its own base class would want keys and values."""

    is_compileable = False
    is_croppable = False
    is_initialized = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, state: State | None) -> None:
        self.state = state


class RecollectCache(Cache):
    """What the model remembers: one state per layer, and how many tokens they have seen.

    The states are values that no call changes in place: `RecollectCache(cache.states, n_seen=cache.n_seen)` is a snapshot that
    costs nothing, to continue from twice. Cutting tokens off again is impossible in general, so `crop` refuses.

    Args:
        states: one state per layer; None is the start of the sequence.
        n_seen: tokens per row that the states have seen, padding included.
    """

    layers: list[LayerState]  # type: ignore[assignment]  # Hugging Face's kinds of layer all hold keys and values

    def __init__(self, states: Sequence[State | None], *, n_seen: int = 0) -> None:
        super().__init__(layers=[])
        self.layers = [LayerState(state) for state in states]
        self.n_seen = n_seen
        self.ends_in_padding = False

    @property
    def states(self) -> tuple[State | None, ...]:
        """The layers' states, in order."""
        return tuple(layer.state for layer in self.layers)

    def advance(self, states: Sequence[State], n_tokens: int, *, ends_in_padding: bool = False) -> None:
        """Put in the states after `n_tokens` more tokens; `ends_in_padding` marks them as impossible to continue."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.n_seen += n_tokens
        self.ends_in_padding = ends_in_padding

    def nbytes(self) -> int:
        """Size of all states in bytes."""
        return sum(states_of.nbytes(state) for state in self.states)

    def detach(self) -> None:
        """Cut the states from the graph: the step of truncated back-propagation through time."""
        for layer in self.layers:
            layer.state = states_of.detach(layer.state)

    def reset(self) -> None:
        """Back to the start of the sequence."""
        self.advance([None] * len(self.layers), -self.n_seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i] (beam search)."""
        for layer in self.layers:
            layer.state = states_of.select(layer.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int [n] or bool [B]."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, copies side by side."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a state cannot forget its last tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a state cannot forget its last tokens; keep a snapshot, RecollectCache(cache.states, n_seen=cache.n_seen)"
        )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: this is no key-value cache.

        Raises:
            ValueError: always.
        """
        raise ValueError("a RecollectCache holds the states of a Recollect model; it cannot serve another model")

    @property
    def batch_size(self) -> int:
        """Rows B of the states; -1 at the start of the sequence."""
        for state in self.states:
            for _, tensor in states_of.leaves(state):
                return tensor.shape[0]
        return -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row seen so far, padding included; the same for every layer."""
        return self.n_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no limit (the name of `get_max_length` in earlier releases)."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the attention mask, (past + new, 0)."""
        return self.n_seen + query_length, 0
