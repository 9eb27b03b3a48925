"""A small mixer that exists only while these tests run, and tiny models of any mixer.

The toy mixer owns what breaks loading and decoding most easily: a parameter of its own, a non-persistent buffer, an in-place
initialisation, and a state that must remember padding. It is written for clarity, independently of the mixers of the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from recollect.mixers import MIXERS, Mixer, MixerConfig, available, register
from recollect.models import RecollectConfig, RecollectForCausalLM

TOY = "toy_for_tests"
NAMES = [TOY, *available()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    """sharpness: factor of the logits."""

    sharpness: float = 1.0


class ToyState(NamedTuple):
    k: Tensor  # [B, S, H, K]
    v: Tensor  # [B, S, H, K]
    document: Tensor  # [B, S], -1 at padding


class Toy(Mixer):
    """Causal attention with a linear penalty on distance."""

    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.scale = nn.Parameter(torch.empty(config.n_heads))
        self.register_buffer("slopes", torch.empty(config.n_heads), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.qkv.weight.normal_(std=self.config.dim**-0.5)
        self.out.weight.normal_(std=self.config.dim**-0.5)
        self.scale.fill_(0.5)
        self.slopes.copy_(2.0 ** -torch.arange(1, self.config.n_heads + 1))

    def init_state(self, batch_size: int) -> ToyState:
        empty = self.qkv.weight.new_empty(batch_size, 0, self.config.n_heads, self.config.dim // self.config.n_heads)
        return ToyState(empty, empty, torch.empty(batch_size, 0, dtype=torch.int64))

    def forward(
        self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, ToyState]:
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v = (part.unflatten(-1, (self.config.n_heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        last = (
            state.document.amax(dim=1, keepdim=True).clamp(min=0) if state.document.shape[1] else state.document.new_zeros(1, 1)
        )
        new = last.expand(x.shape[:2]) if document_ids is None else document_ids
        new = new if mask is None else new.masked_fill(~mask, -1)
        k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)
        document = torch.cat((state.document, new), 1)
        row, column = torch.arange(k.shape[1])[-x.shape[1] :, None], torch.arange(k.shape[1])
        seen = (column <= row) & (document[:, None, :] == new[:, :, None])
        logits = torch.einsum("bthk,bshk->bhts", q, k) * self.config.sharpness * q.shape[-1] ** -0.5
        logits = logits - self.slopes[:, None, None] * (row - column)
        weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1) * self.scale[:, None, None]
        return self.out(torch.einsum("bhts,bshk->bthk", weights, v).flatten(2)), ToyState(k, v, document)


@pytest.fixture(scope="session", autouse=True)
def _toy_mixer() -> Iterator[None]:
    """Known by name during these tests only, so that it is no member of the laws' registries."""
    register(TOY, config=ToyConfig, summary="for tests", source="none", state="2 D numbers per token")(Toy)
    yield
    del MIXERS[TOY]


def tiny_config(mixer: Any = TOY, **options: Any) -> RecollectConfig:
    """Two layers of width 32 with 4 heads and 61 tokens.

    Memora has 1 head: the units of a memory whose weights are softmaxes differ by less than they are, and over the 8 channels of
    a quarter the norm of their sum loses another digit.
    """
    n_heads = 1 if mixer == "memora" else 4
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": n_heads, "intermediate_size": 48}
    n_layers = {"num_hidden_layers": 2} if isinstance(mixer, str) else {}
    return RecollectConfig(layers=mixer, **{**sizes, **n_layers, **options})


def tiny(mixer: Any = TOY, *, dtype: torch.dtype = torch.float64, **options: Any) -> RecollectForCausalLM:
    """A tiny model in evaluation mode, its parameters moved off their start so that identities and zeros do something."""
    model = RecollectForCausalLM(tiny_config(mixer, **options)).to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def tokens(*shape: int, seed: int = 3) -> Tensor:
    """Random tokens 1..60 (0 is left for padding)."""
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def left_pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [T_i] -> ids [B, max T] padded with 0 on the left, and the attention mask."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask
