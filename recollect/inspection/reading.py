"""A model reads a text once: what every layer gets to see, and how well each token was predicted.

Axis legend: T time, D model dim, C vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.evaluation.language_model import TextCoder, target_log_probs
from recollect.inspection.stock import Caught, caught
from recollect.mixers import Mixer
from recollect.models import RecollectForCausalLM
from recollect.models.layers import Block
from recollect.models.retrofitting.attention import Retrofitted
from recollect.models.retrofitting.options import kind_of

LOGITS_AT_ONCE = 1 << 24  # numbers


class Layer(NamedTuple):
    """A mixer and its input; depth: of the layer, 0-based. Where a layer has several mixers, each has an entry, told apart by `part`.
    Attention of a Hugging Face model was caught: `x` are its queries [1, T, H, K]."""

    depth: int
    part: str
    name: str
    mixer: Mixer | Caught
    x: Tensor  # [1, T, D]


def read(model: Any, ids: Tensor, layers: Sequence[int] | None = None) -> tuple[list[Layer], Tensor]:
    """Run the model over one text.

    Args:
        model: a `RecollectForCausalLM`, or a causal model of transformers, retrofitted or not; in evaluation mode.
        ids: int64 [T].
        layers: 0-based depths to look into; None: all.
    Returns:
        the layers in order, and -log2 p(token | those before it) [T], nan for the first token.
    Raises:
        ValueError: a layer that the model does not have.
    """
    n_layers = model.config.num_hidden_layers
    for index in layers or ():
        if not 0 <= index < n_layers:
            raise ValueError(f"layers of this model are 0 to {n_layers - 1}; got {index}")
    run = _read_own if isinstance(model, RecollectForCausalLM) else _read_stock
    with torch.no_grad():
        found, bits = run(model, ids.to(model.device))
    chosen = [layer for layer in found if layers is None or layer.depth in layers]
    return sorted(chosen, key=lambda layer: (layer.depth, layer.part)), bits


def _read_own(model: Any, ids: Tensor) -> tuple[list[Layer], Tensor]:
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    mixers = [
        (depth, part, model.config.layers[depth]["mixer"], mixer)
        for depth, block in enumerate(blocks)
        for part, mixer in _innermost(block.mixer)
    ]
    hidden, found = _watched(mixers, lambda: model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0])
    head = model.get_output_embeddings()
    n_rows = max(1, LOGITS_AT_ONCE // int(head.weight.shape[0]))
    return found, _bits((head(some) for some in hidden[:-1].split(n_rows)), ids)


def _read_stock(model: Any, ids: Tensor) -> tuple[list[Layer], Tensor]:
    mixers = [
        (module.layer_idx, f"memory{part}", _retrofitted_with(model, module.layer_idx, "memory"), mixer)
        for module in model.modules()
        if isinstance(module, Retrofitted) and module.memory is not None
        for part, mixer in _innermost(module.memory.mixer)
    ]
    with caught(model) as attention:
        logits, found = _watched(mixers, lambda: model(input_ids=ids[None], use_cache=False).logits[0])
    for one in attention:
        name = "attention" if one.mixing is None else _retrofitted_with(model, one.depth, "kernels")
        found.append(Layer(one.depth, "", name, one, one.q))
    n_rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    return found, _bits(logits[:-1].split(n_rows), ids)


def _retrofitted_with(model: Any, depth: int, kind: str) -> str:
    """Name of the mixer whose kernels or memory a layer has got."""
    records = model.config.retrofit
    return str(next(one["mixer"] for one in records if depth in one["layers"] and kind_of(one["mixer"]) == kind))


def _watched(mixers: Sequence[tuple[int, str, str, Mixer]], run: Callable[[], Tensor]) -> tuple[Tensor, list[Layer]]:
    """What a run of a model gives, and the mixers (depth, part, name, mixer) with what each of them got."""
    found: list[Layer] = []

    def keep(depth: int, part: str, name: str) -> Any:
        return lambda mixer, args: found.append(Layer(depth, part, name, mixer, args[0]))

    hooks = [mixer.register_forward_pre_hook(keep(depth, part, name)) for depth, part, name, mixer in mixers]
    try:
        return run(), found
    finally:
        for hook in hooks:
            hook.remove()


def token_texts(coder: TextCoder, ids: Tensor) -> list[str]:
    """What each token adds to the text: "" for special tokens and for the later bytes of a character."""
    tokens: list[int] = ids.tolist()
    texts: list[str] = []
    while len(texts) < len(tokens):
        first = len(texts)
        before = [] if not first else tokens[first - 1 : first]
        # A character of several tokens is decoded as a whole (at most 4 bytes); what decodes to nothing valid stands as it is.
        sizes = range(1, min(4, len(tokens) - first) + 1)
        size, text = next(
            ((n, text) for n in sizes if "�" not in (text := _added(coder, before, tokens[first : first + n]))),
            (1, "�"),
        )
        texts += [text, *[""] * (size - 1)]
    return texts


def _added(coder: TextCoder, before: list[int], tokens: list[int]) -> str:
    """The text of tokens after another one: some tokenizers drop a space that stands at the beginning of a text."""
    lead = coder.decode(before)
    both = coder.decode(before + tokens)
    return both[len(lead) :] if both.startswith(lead) and "�" not in lead else coder.decode(tokens)


def _innermost(mixer: Mixer, part: str = "") -> list[tuple[str, Mixer]]:
    """(path below the layer's mixer, mixer) of those that contain no other mixer."""
    inner = [(name, module) for name, module in mixer.named_modules() if name and isinstance(module, Mixer)]
    leaves = [(name, one) for name, one in inner if not any(isinstance(m, Mixer) and m is not one for m in one.modules())]
    return leaves or [(part, mixer)]


def _bits(logits: Iterable[Tensor], ids: Tensor) -> Tensor:
    """Logits of all tokens but the last in groups of rows [n, C], ids [T] -> [T]; of a large vocabulary logits take far more room
    than the model."""
    values, done = [torch.full((1,), math.nan)], 1
    for some in logits:
        values.append((target_log_probs(some, ids[done : done + len(some)]) / -math.log(2)).float().cpu())
        done += len(some)
    return torch.cat(values)
