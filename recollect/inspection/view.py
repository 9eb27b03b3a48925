"""A text as a model reads it: everything that the page shows, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.evaluation.language_model import TextCoder, check_positions
from recollect.inspection.kernels import Kernel, kernels
from recollect.inspection.maps import Attended, attend, row_blocks
from recollect.inspection.memory import Remembered, remember
from recollect.inspection.reading import Layer, read, token_texts
from recollect.inspection.stock import Caught
from recollect.inspection.strips import Strip, strip
from recollect.mixers import Mixer

TOKENS = 1024  # read of a text unless more are asked for
WIDEST_MAP = 256  # cells
CHARACTERS = 16  # of a text that are encoded per token wanted, at first
EDGE = 32  # tokens that a cut through the text may change
MAP_CELLS = 5_000_000  # of all maps together: 2 bytes each, a third more in base64


class LayerView(NamedTuple):
    """One mixer. strips: values per token and head; `attended` or `remembered.reads` say where reads come from; missing:
    sentences on what it cannot show."""

    label: str
    n_heads: int
    strips: list[Strip]
    attended: Attended | None
    remembered: Remembered | None
    kernels: list[Kernel]
    missing: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """tokens: what each adds to the text; bits: -log2 of each one's probability [T], nan for the first; pool: of the maps; notes:
    sentences for the reader."""

    tokens: list[str]
    bits: Tensor
    layers: list[LayerView]
    pool: str
    notes: list[str]


def inspect_text(
    model: Any,
    coder: TextCoder,
    text: str,
    *,
    n_tokens: int | None = None,
    layers: Sequence[int] | None = None,
    pool: str = "max",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Look into a model while it reads a text.

    Args:
        model: a `RecollectForCausalLM`, or a causal model of transformers, retrofitted or not; put into evaluation mode.
        coder: its tokenizer.
        text: not empty; read after what every text of this tokenizer begins with.
        n_tokens: tokens to read, that beginning included, at least 2; None: TOKENS, or the model's context if that is shorter.
        layers: 0-based depths; None: all.
        pool: "max" or "mean", see `maps.attend`.
        progress: called with the layers done and their number.
    Raises:
        ValueError: an empty text, an argument out of range, more tokens than the model has positions for, a layer that it lacks.
    """
    model.eval()
    context = int(getattr(model.config, "max_position_embeddings", None) or TOKENS)
    if n_tokens is not None and n_tokens < 2:
        raise ValueError(f"tokens is at least 2, one to read and one to predict; got {n_tokens}")
    wanted = min(TOKENS, context) if n_tokens is None else n_tokens
    check_positions(model, wanted)
    ids, is_whole = _encoded(coder, text, wanted)
    found, bits = read(model, ids, layers)
    notes = _notes(len(ids), is_whole, n_tokens is None, context)
    if not found:
        notes.append(
            "None of this model's layers can be looked into: its attention does not call transformers' attention functions."
        )
    side = _side(found, len(ids))
    views = []
    for n, layer in enumerate(found):
        views.append(look(layer, side=side, pool=pool))
        progress(n + 1, len(found))
    return Inspection(tokens=token_texts(coder, ids), bits=bits, layers=views, pool=pool, notes=notes)


def look(layer: Layer, *, side: int, pool: str) -> LayerView:
    """One layer: its maps if it attends, else its memory."""
    label = f"{layer.depth}: {layer.name}" + (f" ({layer.part})" if layer.part else "")
    strips: list[Strip] = []
    missing: list[str] = []
    remembered = None
    try:
        attended = attend(layer.mixer, layer.x, side=side, pool=pool)
    except ValueError as error:
        attended, missing = None, [str(error)]
    if isinstance(layer.mixer, Caught) and layer.mixer.refused:
        missing = [f"the maps of attention with {', '.join(layer.mixer.refused)} cannot be shown"]
    elif attended is None and isinstance(layer.mixer, Mixer):
        remembered = remember(layer.mixer, layer.x)
        strips, missing = remembered.strips, missing + remembered.missing
    elif attended is not None and attended.entropy is not None and attended.first is not None:
        strips = [
            strip(
                "entropy",
                "Entropy of the attention",
                "Of the softmax, in bits: 0 looks at one token alone.",
                attended.entropy.T,
            ),
            strip("first", "Weight on the first token", "What the softmax gives to the document start.", attended.first.T),
        ]
    heads = [len(one.values) for one in strips] + ([len(attended.keys)] if attended is not None else [])
    return LayerView(label, max(heads, default=0), strips, attended, remembered, kernels(layer.mixer), missing)


def _side(layers: Sequence[Layer], length: int) -> int:
    """Cells that a map may be wide, so that all of them together stay below MAP_CELLS."""
    n_maps = 0
    with torch.no_grad():
        for layer in layers:
            for rows in row_blocks(layer.mixer, layer.x[:, :1], 1):
                n_maps += sum(len(stage) for stage in rows.stages.values())
    if not n_maps:
        return WIDEST_MAP
    return max(16, min(WIDEST_MAP, length, int(math.sqrt(2 * MAP_CELLS / n_maps))))


def _encoded(coder: TextCoder, text: str, wanted: int) -> tuple[Tensor, bool]:
    """The first tokens of a text after its prefix, int64 [T], and whether that is all of it."""
    n_characters = CHARACTERS * wanted
    while True:
        ids = coder.prefix + coder.encode(text[:n_characters])
        if len(ids) >= wanted + EDGE or n_characters >= len(text):
            break
        n_characters *= 2
    if len(ids) < 2:
        raise ValueError(
            "the text is empty; give one of at least one token"
            if len(ids) == len(coder.prefix)
            else "the text has one token only"
        )
    return torch.tensor(ids[:wanted]), len(ids) <= wanted


def _notes(n_read: int, is_whole: bool, by_default: bool, context: int) -> list[str]:
    notes = []
    if not is_whole:
        notes.append(
            f"The first {n_read:,} tokens of the text, document start included{'; --tokens reads more' if by_default else ''}."
        )
    if n_read > context:
        notes.append(f"The model was made for {context:,} tokens; what it does beyond them may mean little.")
    return notes
