"""The cache of a retrofitted layer: keys and values as Hugging Face holds them, and what the added parts carry beside them.

Axis legend: B batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from recollect import state as states
from recollect.ops.multi_token import Rows
from recollect.state import State


class AddedLayer(DynamicLayer):
    """Keys and values of one layer, and the states of its added parts.

    Attributes:
        rows: the last c_q - 1 rows of the attention maps, which the next tokens' convolutions read.
        memory: the memory's state; None at the start of the sequence.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows()
        self.memory: State | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i] (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # int64, as theirs
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int [n] or bool [B]."""
        super().batch_select_indices(indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, copies side by side."""
        if self.is_initialized and self.keys is not None:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def reset(self) -> None:
        """Back to the start of the sequence."""
        super().reset()
        self.rows, self.memory = Rows(), None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the added parts cannot forget their last tokens.

        Raises:
            ValueError: unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise ValueError(
                "the cache of a retrofitted layer cannot forget its last tokens; continue from a copy.deepcopy of it, taken before"
            )

    def _select(self, index: Tensor) -> None:
        self.rows, self.memory = states.select(self.rows, index), states.select(self.memory, index)


def added_layer(cache: Any, index: int) -> AddedLayer:
    """The retrofitted layer's part of a model's cache; an empty layer of a stock cache is replaced by one.

    Raises:
        ValueError: another kind of cache, or one that another model has filled.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"a retrofitted model needs a DynamicCache; got {type(cache).__name__}. "
            "Leave the cache and cache_implementation out"
        )
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, AddedLayer):
        return layer
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        raise ValueError(
            f"layer {index} of the cache is a {type(layer).__name__} that has seen {layer.get_seq_length()} tokens; a retrofitted "
            "layer can only continue a cache that the retrofitted model has filled, from its first token on"
        )
    added = AddedLayer()
    cache.layers[index] = added
    return added
