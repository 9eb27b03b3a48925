"""Suite "decode": one token after a context of some length, and the state that carries the context.

Axis legend: B batch, T time, D model dim.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import recollect.mixers
from recollect import state
from recollect.bench.contenders import ATTENTIONS, SUITES, Check, Contender, Suite, loosely, register, unmeasured
from recollect.bench.floor import Work
from recollect.bench.setting import Setting
from recollect.mixers import Mixer
from recollect.state import State

MIXERS = (
    "attention", "mta", "talking_heads", "diff", "yaad", "moneta", "memora", "delta_net", "gated_delta_net", "gla", "mamba2",
)  # fmt: skip
PIECE = 512  # tokens read at a time
SHORT = 64  # tokens after which it is known whether a state grows


class Context(NamedTuple):
    """length: tokens before the one that is timed; token: [B, 1, D]."""

    length: int
    token: Tensor


class Decoder:
    """A layer, the state after a context, and one token: a step decodes it. The state is a value, so every step is the same."""

    def __init__(self, mixer: Mixer, carried: State, token: Tensor) -> None:
        self.mixer, self.carried, self.token = mixer, carried, token

    def __call__(self) -> list[Tensor]:
        with torch.inference_mode():
            return [self.mixer(self.token, self.carried)[0]]


def text(setting: Setting, length: int) -> Tensor:
    """Random numbers [B, T, D] from a fixed seed; a longer text begins with a shorter one's only in distribution."""
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(setting.batch, length, setting.width, generator=generator)
    return drawn.to(setting.device, setting.precision)


def inputs(setting: Setting, length: int) -> Context:
    return Context(length, text(setting, 1))


def build(setting: Setting, name: str) -> Mixer:
    """The layer in evaluation mode, from a fixed seed."""
    torch.manual_seed(0)
    mixer = recollect.mixers.build(name, dim=setting.width, n_heads=setting.heads)
    return mixer.eval().to(setting.device, setting.precision)


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


def read(mixer: Mixer, setting: Setting, length: int) -> State:
    """The state after `length` tokens: read whole where it is of constant size, stretched from a short one where it grows."""
    with torch.inference_mode():
        first = min(length, SHORT)
        _, carried = mixer(text(setting, first))
        _, longer = mixer(text(setting, 1), carried)
        shapes = [[part.shape for _, part in state.leaves(some)] for some in (carried, longer)]
        if shapes[0] != shapes[1]:
            return stretched(carried, longer, length)
        for begin in range(first, length, PIECE):
            _, carried = mixer(text(setting, min(PIECE, length - begin)), carried)
    return carried


def prepare(setting: Setting, x: Context, *, name: str) -> Decoder:
    mixer = build(setting, name)
    return Decoder(mixer, read(mixer, setting, x.length), x.token)


def check(setting: Setting, *, name: str) -> Check:
    """A token decoded after 32, against the last of 33 in one call in fp64."""
    mixer, x = build(setting, name), text(setting, 33)
    with torch.inference_mode():
        _, carried = mixer(x[:, :-1])
        got, _ = mixer(x[:, -1:], carried)
        exact, _ = mixer.double()(x.double())
    return loosely(setting, [got], [exact[:, -1:]])


def state_bytes(step: Decoder) -> int:
    return state.nbytes(step.carried)


def work(setting: Setting, length: int, step: Decoder) -> Work:
    """Every parameter and the whole state is read once; two operations for each number of them."""
    numbers = sum(part.numel() for part in step.mixer.parameters())
    held = sum(part.numel() for _, part in state.leaves(step.carried))
    size = sum(part.numel() * part.element_size() for part in step.mixer.parameters()) + state.nbytes(step.carried)
    return Work(2.0 * (setting.batch * numbers + held), float(size))


def note(setting: Setting, *, name: str) -> str:
    """That a cache was stretched, and what nobody has measured."""
    return "; ".join(filter(None, [f"the cache repeats {SHORT} tokens" if name in ATTENTIONS else "", unmeasured(setting)]))


def contender(name: str) -> Contender:
    """One layer as a contender."""
    return Contender(
        name=name,
        suite="decode",
        about=recollect.mixers.entry(name).summary,
        prepare=partial(prepare, name=name),
        check=partial(check, name=name),
        work=work,
        state_bytes=state_bytes,
        note=partial(note, name=name),
    )


SUITES["decode"] = Suite("decode", "one token after a context, and the state that carries it", inputs)
register(*(contender(name) for name in MIXERS))
