"""A model reads a text once: what every layer gets to see, and how well each token was predicted.

Axis legend: T time, D model dim, C vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.data.tokenizer import Tokenizer
from recollect.mixers import Mixer
from recollect.models.layers import Block

LOGITS_AT_ONCE = 1 << 24  # numbers


class Layer(NamedTuple):
    """A mixer and its input; depth: of the layer, 0-based. Where a layer wires several mixers together, each has an entry, told
    apart by `part`."""

    depth: int
    part: str
    name: str
    mixer: Mixer
    x: Tensor  # [1, T, D]


def read(model: Any, ids: Tensor, layers: Sequence[int] | None = None) -> tuple[list[Layer], Tensor]:
    """Run the model over one text.

    Args:
        model: a `RecollectForCausalLM` in evaluation mode.
        ids: int64 [T].
        layers: 0-based depths to look into; None: all.
    Returns:
        the layers in order, and -log2 p(token | those before it) [T], nan for the first token.
    Raises:
        ValueError: a layer that the model does not have.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for index in layers or ():
        if not 0 <= index < len(blocks):
            raise ValueError(f"layers of this model are 0 to {len(blocks) - 1}; got {index}")
    found: list[Layer] = []

    def keep(index: int, part: str) -> Any:
        name = model.config.layers[index]["mixer"]
        return lambda mixer, args: found.append(Layer(index, part, name, mixer, args[0]))

    hooks = [
        mixer.register_forward_pre_hook(keep(index, part))
        for index, block in enumerate(blocks)
        if layers is None or index in layers
        for part, mixer in _innermost(block.mixer)
    ]
    try:
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state[0]
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(found, key=lambda layer: (layer.depth, layer.part)), _bits(model.get_output_embeddings(), hidden, ids)


def token_texts(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """What each token adds to the text: "" for special tokens and for the later bytes of a character."""
    tokens: list[int] = ids.tolist()
    texts: list[str] = []
    while len(texts) < len(tokens):
        first = len(texts)
        before = [] if not first else tokens[first - 1 : first]
        # A character of several tokens is decoded as a whole (at most 4 bytes); what decodes to nothing valid stands as it is.
        sizes = range(1, min(4, len(tokens) - first) + 1)
        size, text = next(
            ((n, text) for n in sizes if "�" not in (text := _added(tokenizer, before, tokens[first : first + n]))),
            (1, "�"),
        )
        texts += [text, *[""] * (size - 1)]
    return texts


def _added(tokenizer: Tokenizer, before: list[int], tokens: list[int]) -> str:
    """The text of tokens after another one: some tokenizers drop a space that stands at the beginning of a text."""
    lead = tokenizer.decode(before)
    both = tokenizer.decode(before + tokens)
    return both[len(lead) :] if both.startswith(lead) and "�" not in lead else tokenizer.decode(tokens)


def _innermost(mixer: Mixer, part: str = "") -> list[tuple[str, Mixer]]:
    """(path below the layer's mixer, mixer) of those that contain no other mixer."""
    inner = [(name, module) for name, module in mixer.named_modules() if name and isinstance(module, Mixer)]
    leaves = [(name, one) for name, one in inner if not any(isinstance(m, Mixer) and m is not one for m in one.modules())]
    return leaves or [(part, mixer)]


def _bits(head: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """hidden [T, D], ids [T] -> [T]; rows of logits in groups: of a large vocabulary they take far more room than the model."""
    n_rows = max(1, LOGITS_AT_ONCE // int(head.weight.shape[0]))
    values = [torch.full((1,), math.nan)]
    with torch.no_grad():
        for some, targets in zip(hidden[:-1].split(n_rows), ids[1:].split(n_rows), strict=True):
            logits = head(some)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.gather(1, targets[:, None].to(logits.device)).squeeze(1)
            values.append(((logits.logsumexp(1) - chosen) / math.log(2)).float().cpu())
    return torch.cat(values)
