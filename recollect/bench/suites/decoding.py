"""Suite "decode": one token after a context of some length, and the state that carries the context.

Of a layer alone; where a depth or a published shape is asked for, of a language model.

Axis legend: B batch, T time, D model dim, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import recollect.mixers
from recollect import state
from recollect.bench.contenders import ATTENTIONS, SUITES, Check, Contender, Suite, loosely, over_a_chunk, register, unmeasured
from recollect.bench.floor import Work
from recollect.bench.setting import Setting
from recollect.bench.suites import models
from recollect.mixers import Mixer
from recollect.state import State

MIXERS = (
    "attention", "mta", "talking_heads", "diff", "yaad", "moneta", "memora", "delta_net", "gated_delta_net", "gla", "mamba2",
)  # fmt: skip
PIECE = 512  # tokens read at a time
SHORT = 64  # tokens after which it is known whether a state grows


Read: TypeAlias = (
    "Callable[[Tensor, State], tuple[Tensor, State]]"  # a piece and the state before it -> outputs, the next state
)


class Context(NamedTuple):
    """length: tokens before the one that is timed; token: [B, 1, D] of a layer, [B, 1] of a model."""

    length: int
    token: Tensor


class Decoder:
    """A layer or model, the state after a context, and a token that each step decodes behind the last one: caches grow, as in use."""

    def __init__(self, module: nn.Module, read: Read, carried: State, token: Tensor) -> None:
        self.module, self.read, self.carried, self.token = module, read, carried, token

    def __call__(self) -> list[Tensor]:
        with torch.inference_mode():
            out, self.carried = self.read(self.token, self.carried)
            return [out]


def text(setting: Setting, length: int) -> Tensor:
    """Tokens [B, T] for a model, random numbers [B, T, D] for a layer, from a fixed seed; a longer text begins with a shorter one's
    only in distribution."""
    if setting.layers:
        return models.tokens(setting, length, seed=length)
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(setting.batch, length, setting.width, generator=generator)
    return drawn.to(setting.device, setting.precision)


def inputs(setting: Setting, length: int) -> Context:
    return Context(length, text(setting, 1))


def build(setting: Setting, name: str) -> Mixer:
    """The layer in evaluation mode, from a fixed seed."""
    torch.manual_seed(0)
    mixer = recollect.mixers.build(name, dim=setting.width, n_heads=setting.heads, **models.chunk(setting, name))
    return mixer.eval().to(setting.device, setting.precision)


def whole(setting: Setting, name: str) -> tuple[nn.Module, Read]:
    """What decodes: the layer, or the model and what reads tokens with it; its outputs are the last token's logits [B, 1, C]."""
    if not setting.layers:
        mixer = build(setting, name)
        return mixer, mixer
    from recollect.models import RecollectCache  # here: transformers, which a layer does without

    model: Any = models.build(setting, name).eval().to(setting.precision)

    def read(tokens: Tensor, carried: State) -> tuple[Tensor, State]:
        cache = RecollectCache([None] * setting.layers if carried is None else carried)
        out = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1)
        return out.logits, cache.states

    return model, read


def stretched(carried: State, longer: State, length: int) -> State:
    """A state of `length` tokens, made of one of `SHORT` by repeating it along what grows from `carried` to `longer` (one token more).

    Its numbers are those of a repeated context. The time of a step does not depend on them, and reading a long context through a
    quadratic layer would take hours.
    """

    def stretch(short: Tensor, more: Tensor) -> Tensor:
        grown = [axis for axis in range(short.dim()) if short.shape[axis] != more.shape[axis]]
        for axis in grown:
            index = torch.arange(length, device=short.device) % short.shape[axis]
            short = short.index_select(axis, index)
        return short

    pairs = zip(state.leaves(carried), state.leaves(longer), strict=True)
    return state.filled(carried, (stretch(a, b) for (_, a), (_, b) in pairs))


def context(read: Read, setting: Setting, length: int) -> State:
    """The state after `length` tokens: read whole where it is of constant size, stretched from a short one where it grows."""
    with torch.inference_mode():
        first = min(length, SHORT)
        _, carried = read(text(setting, first), None)
        _, longer = read(text(setting, 1), carried)
        shapes = [[part.shape for _, part in state.leaves(some)] for some in (carried, longer)]
        if shapes[0] != shapes[1]:
            return stretched(carried, longer, length)
        for begin in range(first, length, PIECE):
            _, carried = read(text(setting, min(PIECE, length - begin)), carried)
    return carried


def prepare(setting: Setting, x: Context, *, name: str) -> Decoder:
    module, read = whole(setting, name)
    return Decoder(module, read, context(read, setting, x.length), x.token)


def check(setting: Setting, *, name: str) -> Check:
    """A token decoded after 32, or a chunk and a half, against the last of all of them in one call in fp64."""
    (module, read), x = whole(setting, name), text(setting, 1 + max(32, over_a_chunk(setting)))
    with torch.inference_mode():
        _, carried = read(x[:, :-1], None)
        got, _ = read(x[:, -1:], carried)
        module.double()
        exact, _ = read(x.double() if x.is_floating_point() else x, None)
    return loosely(setting, [got], [exact[:, -1:]])


def state_bytes(step: Decoder) -> int:
    return state.nbytes(step.carried)


def work(setting: Setting, length: int, step: Decoder) -> Work:
    """Every parameter and the whole state is read once; two operations for each number of them."""
    numbers = sum(part.numel() for part in step.module.parameters())
    held = sum(part.numel() for _, part in state.leaves(step.carried))
    size = sum(part.numel() * part.element_size() for part in step.module.parameters()) + state.nbytes(step.carried)
    return Work(2.0 * (setting.batch * numbers + held), float(size))


def note(setting: Setting, *, name: str) -> str:
    """That a cache was stretched, what stands in the layers, and what nobody has measured."""
    repeats = f"the cache repeats {SHORT} tokens" if name in ATTENTIONS else ""
    return "; ".join(filter(None, [repeats, models.note(setting, name), unmeasured(setting)]))


def contender(name: str) -> Contender:
    """One layer, or a model of such layers, as a contender."""
    return Contender(
        name=name,
        suite="decode",
        about=models.about(name),
        prepare=partial(prepare, name=name),
        check=partial(check, name=name),
        work=work,
        state_bytes=state_bytes,
        note=partial(note, name=name),
    )


SUITES["decode"] = Suite("decode", "one token after a context, and the state that carries it", inputs)
register(*(contender(name) for name in MIXERS))
