"""A memory that can be kept: stream any amount of text through a model, write what it remembers to a file, go on elsewhere.

Axis legend: B batch, T time, C vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from recollect import state as states
from recollect.mixers import entry
from recollect.models.cache import RecollectCache, cache_bytes, cache_of
from recollect.models.layers import Block
from recollect.models.modeling import RecollectForCausalLM
from recollect.state import State

Tokens: TypeAlias = Tensor | Iterable[Tensor]


class Report(NamedTuple):
    """What `remember` has read.

    n_tokens: tokens per row; n_scored: tokens of all rows that were predicted (all but the very first of each row); loss: their
    mean cross entropy in nats, nan if there are none; state_bytes: size of the memory afterwards.
    """

    n_tokens: int
    n_scored: int
    loss: float
    state_bytes: int


class Memory(NamedTuple):
    """What a file holds: n_seen int64 [B], tokens seen per row, and the layers' states."""

    n_seen: Tensor
    layers: tuple[State, ...]


@torch.no_grad()
def remember(
    model: RecollectForCausalLM, tokens: Tokens, cache: RecollectCache | None = None, *, piece: int = 512
) -> tuple[RecollectCache, Report]:
    """Read tokens into a model's states, piece by piece.

    Only one piece and the states are ever in memory, so with mixers of constant state any length can be read; an attention layer's
    keys grow with every token. The cut into pieces changes nothing but rounding.

    Args:
        model: in evaluation mode, on its device.
        tokens: int64 [T] (one row) or [B, T]; or an iterable of such tensors, which follow one another, of any lengths.
        cache: what the model remembers already; None is the start of the sequence. It is left as it was.
        piece: tokens of a row that one call of the model takes, at least 1.
    Returns:
        the cache after the last token, and a report.
    Raises:
        ValueError: no token, tensors of other shape or dtype, a model in training mode, a cache that cannot be continued.
    """
    if piece < 1:
        raise ValueError(f"piece counts tokens: at least 1; got {piece}")
    if model.training:
        raise ValueError("the model is in training mode, so dropout would disturb what it remembers; call model.eval() first")
    after = _copy(cache, model.config.num_hidden_layers)
    device = model.model.embed_tokens.weight.device
    total, n_tokens, n_scored = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    last: Tensor | None = None  # logits [B, 1, C] of the next piece's first token
    for part in _pieces(tokens, piece):
        part = part.to(device)
        logits = model(part, cache=after, use_cache=True).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        predictions = logits[:, :-1] if last is None else torch.cat((last, logits[:, :-1]), dim=1)
        targets = part[:, part.shape[1] - predictions.shape[1] :]
        total += F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="sum")
        n_tokens, n_scored, last = n_tokens + part.shape[1], n_scored + targets.numel(), logits[:, -1:].clone()
    if not n_tokens:
        raise ValueError("there is nothing to remember: tokens is empty")
    loss = float(total) / n_scored if n_scored else float("nan")
    return after, Report(n_tokens, n_scored, loss, after.nbytes())


def save_memory(model: RecollectForCausalLM, cache: RecollectCache, path: str | os.PathLike[str]) -> None:
    """Write what the model remembers to a safetensors file, whole or not at all.

    Args:
        model: the model whose states they are; its fingerprint goes into the file.
        cache: of `remember`, `generate` or a call of the model.
        path: file to write; replaced if it exists.
    Raises:
        ValueError: a cache of another number of layers, one that has seen nothing, or one that ends in padding.
        OSError: the file cannot be written.
    """
    if len(cache.layers) != model.config.num_hidden_layers:
        raise ValueError(f"the cache has states of {len(cache.layers)} layers; this model has {model.config.num_hidden_layers}")
    if cache.batch_size < 0:
        raise ValueError("the cache has seen no token: there is no memory to save")
    if cache.ends_in_padding:
        raise ValueError("the cache ends in padding on the right, so it cannot be continued; pad the tokens on the left")
    memory = Memory(torch.full((cache.batch_size,), cache.n_seen), cache.states)
    states.save(memory, path, fingerprint=fingerprint(model))


def load_memory(model: RecollectForCausalLM, path: str | os.PathLike[str]) -> RecollectCache:
    """Read a memory that the same model has saved; continuing from it gives the logits of an uninterrupted sequence.

    Args:
        model: same configuration, same weights (to the bit) and same dtype as the one that saved; on any device.
        path: file of `save_memory`.
    Raises:
        ValueError: the file is damaged or no memory, or another model has saved it.
        FileNotFoundError: no such file.
    """
    like = Memory(torch.zeros(1, dtype=torch.int64), model.init_states(1))
    memory = states.load(Path(path), like, fingerprint=fingerprint(model))
    return RecollectCache(memory.layers, n_seen=int(memory.n_seen[0]))


@torch.no_grad()
def state_bytes(model: PreTrainedModel, tokens: Tensor) -> int:
    """Bytes of what a causal model of any kind keeps of one row: tokens int64 [T] or [1, T], on any device; 0 if it gives no cache."""
    device = next(model.parameters()).device
    return cache_bytes(cache_of(model.base_model(input_ids=tokens.reshape(1, -1).to(device), use_cache=True)))


def growing_mixers(model: RecollectForCausalLM) -> list[str]:
    """Names of the model's mixers whose states grow with every token they read."""
    names = dict.fromkeys(layer["mixer"] for layer in model.config.layers)
    return [name for name in names if not entry(name).state.startswith("constant")]


def fingerprint(model: RecollectForCausalLM) -> str:
    """What identifies a model: its mixers and sizes in words, a hash of its configuration and one of its weights.

    The configuration is what computes: sizes, and every option of every mixer with its default filled in. Reads all weights once
    (about a second per gigabyte).
    """
    config = model.config
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    layers = [
        {"mixer": layer["mixer"], **dataclasses.asdict(block.mixer.config)}
        for layer, block in zip(config.layers, blocks, strict=True)
    ]
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "mlp", "rms_norm_eps")
    hashed = states.fingerprint({"layers": layers, **{name: config.to_dict()[name] for name in sizes}})
    mixers = ", ".join(dict.fromkeys(layer["mixer"] for layer in config.layers))
    shape = f"{len(layers)} layers of {config.hidden_size}"
    return f"{mixers}, {shape}, config {hashed}, weights {states.digest(model.state_dict())[:16]}"


def _copy(cache: RecollectCache | None, n_layers: int) -> RecollectCache:
    """A cache of the same states that can be advanced without changing the caller's."""
    if cache is None:
        return RecollectCache([None] * n_layers)
    copied = RecollectCache(cache.states, n_seen=cache.n_seen)
    copied.ends_in_padding = cache.ends_in_padding
    return copied


def _pieces(tokens: Tokens, size: int) -> Iterator[Tensor]:
    """Cut tokens, however they come, into pieces [B, size], the last one shorter."""
    held: list[Tensor] = []
    n_held = 0
    for part in [tokens] if isinstance(tokens, Tensor) else tokens:
        row = part[None] if part.dim() == 1 else part
        if row.dim() != 2 or row.dtype != torch.int64:
            raise ValueError(f"tokens are int64 [T] or [B, T]; got {part.dtype} {list(part.shape)}")
        if held and row.shape[0] != held[0].shape[0]:
            raise ValueError(f"all tokens must have the same number of rows; got {row.shape[0]} after {held[0].shape[0]}")
        held.append(row)
        n_held += row.shape[1]
        if n_held >= size:
            whole = torch.cat(held, dim=1)
            n_whole = n_held - n_held % size
            yield from whole[:, :n_whole].split(size, dim=1)
            held, n_held = [whole[:, n_whole:]], n_held - n_whole
    if n_held:
        yield torch.cat(held, dim=1)
