"""Suite "train": a training step of a whole language model: forward, backward, AdamW. Without a published shape it has 6 layers, a byte
vocabulary and SwiGLUs.

Axis legend: B batch, T time.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recollect.bench.contenders import SUITES, Check, Contender, Suite, loosely, over_a_chunk, register, unmeasured
from recollect.bench.floor import Work
from recollect.bench.setting import Setting
from recollect.bench.suites import models

CONTENDERS = ("attention", "mta", models.HYBRID, "talking_heads", "diff", "yaad", "moneta", "memora", "gated_delta_net")
CHECKED = 48  # tokens of the comparison in fp64, or a chunk and a half
RATE = 1e-5  # of AdamW: after hundreds of steps the numbers are still those of a fresh model


class Training:
    """A RecollectForCausalLM, its tokens and its optimiser: a step is forward, backward and the optimiser's (None: without), and
    returns the loss and the gradient of the embedding. Gradients are not clipped.

    Half precision is that of `recollect train`: products in it, parameters and the optimiser's moments in fp32.
    """

    def __init__(self, model: Any, tokens: Tensor, products: torch.dtype | None = None, optimiser: Any = None) -> None:
        self.model, self.tokens, self.products, self.optimiser = model, tokens, products, optimiser

    def __call__(self) -> list[Tensor]:
        self.model.zero_grad(set_to_none=True)
        low = contextlib.nullcontext() if self.products is None else torch.autocast(self.tokens.device.type, self.products)
        with low:
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()
        embedding = self.model.get_input_embeddings().weight
        return [loss.detach(), embedding.grad]


def prepare(setting: Setting, tokens: Tensor, *, name: str) -> Training:
    from recollect.training.config import TrainingConfig
    from recollect.training.optimiser import make_optimisers  # here: other suites need no optimiser

    model = models.build(setting, name)
    if not half(setting):
        model = model.to(setting.precision)
    optimiser = make_optimisers(model, TrainingConfig(steps=1, batch_size=setting.batch, lr=RATE))
    return Training(model, tokens, setting.precision if half(setting) else None, optimiser)


def half(setting: Setting) -> bool:
    """Whether products are in less than fp32."""
    return setting.precision.itemsize < 4


def check(setting: Setting, *, name: str) -> Check:
    """Against the same model in fp64; in half precision the loss alone, since the gradient of a fresh gated_delta_net is then 15 %
    off whatever computes it."""
    step = prepare(setting, models.tokens(setting, max(CHECKED, over_a_chunk(setting))), name=name)
    exact = Training(copy.deepcopy(step.model).double(), step.tokens)()
    compared = 1 if half(setting) else 2
    return loosely(setting, step()[:compared], exact[:compared])


def work(setting: Setting, length: int, step: Training, *, attends: bool) -> Work:
    """6 operations per token and parameter (the embedding is the output projection too), and attention's products on the causal part.

    Every parameter is read forward and backward and its gradient written; AdamW reads parameter, gradient and two moments and writes
    all but the gradient.
    """
    numbers = sum(part.numel() for part in step.model.parameters())
    flops = 6.0 * numbers * length
    if attends:
        flops += 12.0 * setting.layers * setting.width * length * (length + 1) / 2
    return Work(setting.batch * flops, (3.0 + 7.0) * numbers * max(4, setting.precision.itemsize))


def note(setting: Setting, *, name: str) -> str:
    """What stands in the layers, and what nobody has measured."""
    return "; ".join(filter(None, [models.note(setting, name), unmeasured(setting)]))


def contender(name: str) -> Contender:
    """A model with one kind of layer, or the hybrid, as a contender."""
    return Contender(
        name=name,
        suite="train",
        about=models.about(name),
        prepare=partial(prepare, name=name),
        check=partial(check, name=name),
        work=partial(work, attends=models.attends(name)),
        note=partial(note, name=name),
    )


SUITES["train"] = Suite("train", "a training step of a language model: forward, backward, AdamW", models.tokens)
register(*(contender(name) for name in CONTENDERS))
