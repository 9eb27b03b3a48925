"""Suite "miras": forward and backward of memories, as the pure scans around which the mixers are built.

Axis legend: B batch, T time, H heads, K key and value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.bench.contenders import (
    CHECK_LENGTH,
    SUITES,
    Check,
    Contender,
    Step,
    Suite,
    against,
    over_a_chunk,
    register,
    unmeasured,
)
from recollect.bench.floor import Work
from recollect.bench.setting import Setting
from recollect.ops.miras import MirasSpec, Parameters, presets, scan


class Memory(NamedTuple):
    """q, k of norm one, v and the gradient of the output, [B, T, H, K]; what gates are made of: small step sizes, write strengths in
    (0, 1), log decays per head [B, T, H] and per channel [B, T, H, K], thresholds."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    small: Tensor
    strength: Tensor
    log_alpha: Tensor
    log_alpha_channels: Tensor
    delta: Tensor

    def to(self, dtype: torch.dtype) -> Memory:
        """The same numbers in another precision."""
        return Memory(*(part.detach().to(dtype) for part in self))


class Preset(NamedTuple):
    """A memory: its spec, the tensors that gradients are taken of beside q, k, v, and the gates made of these."""

    spec: MirasSpec
    leaves: tuple[str, ...]
    gates: Callable[..., dict[str, Tensor]]
    about: str

    @property
    def chunk(self) -> int:
        """Tokens that share a gradient point; 1 where what is computed does not depend on it."""
        return 1 if self.spec.hebbian else self.spec.chunk_size

    def at(self, setting: Setting) -> Preset:
        """With the setting's chunk size where it is part of what is computed: chunks of several tokens, written by what was read."""
        chunked = setting.chunk is not None and self.chunk > 1
        return self._replace(spec=replace(self.spec, chunk_size=setting.chunk)) if chunked else self  # type: ignore[arg-type]


def _named(*names: str) -> Callable[..., dict[str, Tensor]]:
    return lambda *parts: dict(zip(names, parts, strict=True))


PRESETS = {
    "yaad": Preset(
        presets.yaad(), ("small", "log_alpha", "delta"), _named("eta", "log_alpha", "delta"), "perceptron, Huber bias"
    ),
    "moneta": Preset(presets.moneta(), ("small", "log_alpha"), _named("eta", "log_alpha"), "perceptron, l3 bias, l4 retention"),
    "memora": Preset(presets.memora(), ("small", "log_alpha"), _named("eta", "log_alpha"), "perceptron, KL retention"),
    "delta_net": Preset(presets.delta_net(), ("strength",), _named("eta"), "matrix, delta rule"),
    "gated_delta_net": Preset(
        presets.gated_delta_net(), ("strength", "log_alpha"), _named("eta", "log_alpha"), "matrix, delta rule with forgetting"
    ),
    "linear_attention": Preset(presets.linear_attention(), (), _named(), "matrix, no decay"),
    "gla": Preset(presets.gla(), ("log_alpha_channels",), _named("log_alpha"), "matrix, a decay per channel"),
    # Mamba-2's decay is exp(dt A) with one A per head; A = -1 here.
    "mamba2": Preset(
        presets.mamba2(), ("strength",), lambda dt: {"eta": dt, "log_alpha": -dt}, "matrix, step size and decay of one gate"
    ),
}


PERCEPTRONS = tuple(name for name, preset in PRESETS.items() if preset.spec.memory.name != "matrix")


def inputs(setting: Setting, length: int) -> Memory:
    """Random, from a fixed seed: step sizes below 0.02, decays of 0.95 to 1."""
    generator = torch.Generator().manual_seed(0)
    heads = (setting.batch, length, setting.heads)
    shape = (*heads, setting.head_dim)
    q, k = (F.normalize(torch.randn(shape, generator=generator), dim=-1) for _ in range(2))
    v, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    small, strength, log_alpha, delta = (torch.rand(heads, generator=generator) for _ in range(4))
    channels = torch.rand(shape, generator=generator)
    drawn = (q, k, v, grad, 0.02 * small, strength, -0.05 * log_alpha, -0.05 * channels, 0.5 + delta)
    return Memory(*(part.to(setting.device, setting.precision) for part in drawn))


def parameters(spec: MirasSpec, x: Memory) -> Parameters | None:
    """The memory's, drawn in fp32 from a fixed seed; None for memories that start from zeros."""
    if not spec.memory.initial_std:
        return None
    generator = torch.Generator().manual_seed(1)
    drawn = spec.memory.init(x.q.shape[2], x.q.shape[3], x.v.shape[3], generator=generator, dtype=torch.float32)
    return Parameters(*(tuple(part.to(x.q).requires_grad_() for part in group) for group in drawn))


def leaves_of(preset: Preset, x: Memory) -> list[Tensor]:
    """q, k, v and what the gates are made of, requiring gradients; the storage is that of x."""
    values = x._asdict()
    return [values[name].detach().requires_grad_() for name in ("q", "k", "v", *preset.leaves)]


def prepare(setting: Setting, x: Memory, *, preset: Preset, backend: str | None = None) -> Step:
    """Forward and backward: the output and the gradients of q, k, v, gates and parameters."""
    preset = preset.at(setting)
    leaves, learned = leaves_of(preset, x), parameters(preset.spec, x)
    weights = [] if learned is None else [*learned.fast, *learned.slow]

    def step() -> list[Tensor]:
        q, k, v, *made_of = leaves
        y, _ = scan(preset.spec, q, k, v, preset.gates(*made_of), parameters=learned, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [*leaves, *weights], x.grad)]

    return step


def check(setting: Setting, *, make: Callable[[Setting, Any], Step], preset: Preset) -> Check:
    """Against the token loop in fp64."""
    x = inputs(setting, max(CHECK_LENGTH, over_a_chunk(setting)))
    plain = prepare(setting, x, preset=preset, backend="sequential")()
    exact = prepare(setting, x.to(torch.float64), preset=preset, backend="sequential")()
    return against(setting, make(setting, x)(), plain, exact)


def perceptron_operations(head_dim: int, chunk: int) -> float:
    """FLOPs per token and head of the forward pass of two matrices of hidden size 4 K: 28 K^2 + 10 C K multiply-adds."""
    return 2 * (28 * head_dim**2 + 10 * chunk * head_dim)


def work(setting: Setting, length: int, _: Any, *, preset: Preset) -> Work:
    """Forward and twice as much backward: a perceptron by chunks, a matrix by its recurrence (predict, write, read)."""
    preset = preset.at(setting)
    if preset.spec.memory.name == "matrix":
        each = 2.0 * setting.head_dim**2 * (3 if preset.spec.bias.name == "l2" else 2)
    else:
        each = perceptron_operations(setting.head_dim, preset.spec.chunk_size)
    tokens = setting.batch * length * setting.heads
    channels = 8 * setting.head_dim + 2 * sum(setting.head_dim if "channels" in name else 1 for name in preset.leaves)
    return Work(3 * each * tokens, channels * tokens * setting.precision.itemsize)


def own(setting: Setting, x: Memory, *, preset: Preset) -> Step:
    """Our form without Triton: on a GPU chunks or tiles in plain PyTorch, on a CPU the default for perceptrons.

    A matrix' default on a GPU may be flash-linear-attention, a perceptron's is Triton: both are contenders themselves.
    """
    plain = preset.spec.memory.name == "matrix" or setting.kind == "cuda"
    return prepare(setting, x, preset=preset, backend="chunked" if plain else None)


def note(setting: Setting, *, preset: Preset) -> str:
    """The chunk size, the form, and what nobody has measured."""
    size = preset.at(setting).chunk
    form = "plain PyTorch" if setting.kind == "cuda" else ""
    return "; ".join(filter(None, [f"chunks of {size}" * (size > 1), form, unmeasured(setting)]))


def contender(name: str) -> Contender:
    """One memory as a contender."""
    preset = PRESETS[name]
    make = partial(own, preset=preset)
    return Contender(
        name=name,
        suite="miras",
        about=preset.about,
        prepare=make,
        check=partial(check, make=make, preset=preset),
        work=partial(work, preset=preset),
        note=partial(note, preset=preset),
    )


SUITES["miras"] = Suite("miras", "forward and backward of memories", inputs)
register(*(contender(name) for name in PRESETS))
