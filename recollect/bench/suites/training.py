"""Suite "train": forward and backward of a whole language model: 6 layers, a byte vocabulary, SwiGLUs. The optimiser is left out.

Axis legend: B batch, T time.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

import recollect.mixers
from recollect.bench.contenders import ATTENTIONS, SUITES, Check, Contender, Suite, loosely, register, unmeasured
from recollect.bench.floor import Work
from recollect.bench.setting import Setting

LAYERS, VOCABULARY = 6, 257
MIXERS = ("attention", "mta", "talking_heads", "diff", "yaad", "gated_delta_net")
CHECKED = 48  # tokens of the comparison in fp64


class Training:
    """A RecollectForCausalLM and its tokens: a step is forward and backward, and returns the loss and the gradient of the embedding.

    Half precision is that of `recollect train`: products in it, parameters in fp32.
    """

    def __init__(self, model: Any, tokens: Tensor, products: torch.dtype | None = None) -> None:
        self.model, self.tokens, self.products = model, tokens, products

    def __call__(self) -> list[Tensor]:
        self.model.zero_grad(set_to_none=True)
        low = contextlib.nullcontext() if self.products is None else torch.autocast(self.tokens.device.type, self.products)
        with low:
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        embedding = self.model.get_input_embeddings().weight
        return [loss.detach(), embedding.grad]


def inputs(setting: Setting, length: int) -> Tensor:
    """Tokens [B, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY - 1, (setting.batch, length), generator=generator).to(setting.device)


def prepare(setting: Setting, tokens: Tensor, *, name: str) -> Training:
    from recollect.models import (
        RecollectConfig,
        RecollectForCausalLM,
    )  # here: it loads transformers, which other suites do without

    torch.manual_seed(0)
    config = RecollectConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting.width,
        num_attention_heads=setting.heads,
        num_hidden_layers=LAYERS,
        layers=name,
    )
    model: Any = RecollectForCausalLM(config)
    model = model.to(setting.device)
    if half(setting):
        return Training(model, tokens, setting.precision)
    return Training(model.to(setting.precision), tokens)


def half(setting: Setting) -> bool:
    """Whether products are in less than fp32."""
    return setting.precision.itemsize < 4


def check(setting: Setting, *, name: str) -> Check:
    """Against the same model in fp64; in half precision the loss alone, since the gradient of a fresh gated_delta_net is then 15 %
    off whatever computes it."""
    step = prepare(setting, inputs(setting, CHECKED), name=name)
    exact = Training(copy.deepcopy(step.model).double(), step.tokens)()
    compared = 1 if half(setting) else 2
    return loosely(setting, step()[:compared], exact[:compared])


def work(setting: Setting, length: int, step: Training, *, attends: bool) -> Work:
    """6 operations per token and parameter beside the embedding, and attention's products on the causal part."""
    embedding = step.model.get_input_embeddings().weight.numel()
    numbers = sum(part.numel() for part in step.model.parameters())
    flops = 6.0 * (numbers - embedding) * length
    if attends:
        flops += 12.0 * LAYERS * setting.width * length * (length + 1) / 2
    return Work(setting.batch * flops, 3.0 * numbers * max(4, setting.precision.itemsize))


def contender(name: str) -> Contender:
    """A model with one kind of layer as a contender."""
    return Contender(
        name=name,
        suite="train",
        about=recollect.mixers.entry(name).summary,
        prepare=partial(prepare, name=name),
        check=partial(check, name=name),
        work=partial(work, attends=name in ATTENTIONS),
        note=unmeasured,
    )


SUITES["train"] = Suite("train", "forward and backward of a language model of 6 layers", inputs)
register(*(contender(name) for name in MIXERS))
