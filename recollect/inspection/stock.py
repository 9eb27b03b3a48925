"""What the attention of a Hugging Face model works with, caught on the way into the function that it calls for it.

Queries and keys are caught after norms and rotation, whatever the family does to them, so its maps need no second copy of its
arithmetic. While a model is read, transformers' attention functions mean wrappers, so nothing else may run a model meanwhile.

Axis legend: T time, H heads, Hkv key-value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recollect.models.retrofitting.attention import INTERFACE
from recollect.ops.multi_token import Mixing

OTHER_KINDS = ("softcap", "s_aux", "position_bias", "head_mask")  # they change the weights in ways that are not shown


class Caught(NamedTuple):
    """The attention of one layer over one text.

    depth: of the layer, 0-based; q: [1, T, H, K]; k: [1, T, Hkv, K]; scale: of the logits; window: keys that a query sees, or None;
    mixing, pad_key: of retrofitted Multi-Token Attention; refused: what keeps its maps from being shown.
    """

    depth: int
    q: Tensor
    k: Tensor
    scale: float
    window: int | None
    mixing: Mixing | None
    pad_key: str
    refused: list[str]


@contextmanager
def caught(model: Any) -> Iterator[list[Caught]]:
    """While it is open, every call of attention of a model of transformers is appended to the list.

    Raises:
        ValueError: the model's attention has no "sdpa" implementation.
    """
    found: list[Caught] = []

    def wrapper(attend: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
            found.append(_caught(module, query, key, options))
            return attend(module, query, key, value, mask, **options)

        return call

    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except ValueError as error:
        raise ValueError(
            f'{type(model).__name__} has no "sdpa" attention in transformers; only such models can be inspected'
        ) from error
    for name in ("sdpa", INTERFACE):
        ALL_ATTENTION_FUNCTIONS[name] = wrapper(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield found
    finally:
        for name in ("sdpa", INTERFACE):
            del ALL_ATTENTION_FUNCTIONS[name]
        model.set_attn_implementation(before)


def _caught(module: Any, query: Tensor, key: Tensor, options: dict[str, Any]) -> Caught:
    scale = options.get("scaling")
    kernels = getattr(module, "multi_token", None)
    refused = [name for name in OTHER_KINDS if options.get(name) is not None]
    if query.shape[2] != key.shape[2]:
        refused.append("keys of another text")
    return Caught(
        depth=int(module.layer_idx),
        q=query.transpose(1, 2),
        k=key.transpose(1, 2),
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=options.get("sliding_window"),
        mixing=None if kernels is None else kernels.mixing,
        pad_key="both" if kernels is None else kernels.config.pad_key,
        refused=refused,
    )
