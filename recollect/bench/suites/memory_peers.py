"""What others offer for the suite "miras": flash-linear-attention, mamba-ssm and titans-pytorch, each the recurrence alone.

Each is imported when it runs and never required. Axis legend: B batch, T time, H heads, K key and value dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recollect.bench.contenders import Contender, Step, only_cuda, register
from recollect.bench.setting import Setting
from recollect.bench.suites import memories
from recollect.bench.suites.attention_peers import half_on_cuda
from recollect.bench.suites.memories import PRESETS, Memory

TITANS_CHUNK = 64  # unless one is chosen
NOT_THE_SAME = "the same kind of memory, not the same function"


def function(module: str, name: str) -> Callable[..., Any]:
    """A peer's function, imported now."""
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def gla(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> Tensor:
    out: Tensor = function("fla.ops.gla", "chunk_gla")(q, k, v, log_alpha, scale=1.0)[0]
    return out


def delta_net(q: Tensor, k: Tensor, v: Tensor, eta: Tensor) -> Tensor:
    out: Tensor = function("fla.ops.delta_rule", "chunk_delta_rule")(q, k, v, eta, scale=1.0)[0]
    return out


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, log_alpha: Tensor) -> Tensor:
    rule = function("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    out: Tensor = rule(q, k, v, g=log_alpha.float(), beta=eta, scale=1.0)[0]
    return out


def mamba2(q: Tensor, k: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    scan = function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    out: Tensor = scan(v, dt, -torch.ones(dt.shape[-1], device=dt.device), k, q, chunk_size=256)
    return out


def ttt_linear(q: Tensor, k: Tensor, v: Tensor, eta: Tensor) -> Tensor:
    """With the norm of its outputs, whose weights are ones and zeros here."""
    one = torch.ones(q.shape[2:], dtype=q.dtype, device=q.device)
    layer = function("fla.ops.ttt", "chunk_ttt_linear")
    out: Tensor = layer(q, k, v, one, torch.zeros_like(one), eta[..., None], scale=1.0, chunk_size=16)[0]
    return out


def prepare(setting: Setting, x: Memory, *, run: Callable[..., Tensor], leaves: tuple[str, ...]) -> Step:
    """Forward and backward: the output and the gradients of q, k, v and the gates, in the order of our preset."""
    values = x._asdict()
    inputs = [values[name].detach().requires_grad_() for name in ("q", "k", "v", *leaves)]

    def step() -> list[Tensor]:
        y = run(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, x.grad)]

    return step


def titans_memory(heads: int, head_dim: int, chunk: int) -> Any:
    """`NeuralMemory` of titans-pytorch, reduced to the memory: no momentum, no norms or projections around it, gradients at the last
    chunk's state. Two maps from all channels to a gate per head are left.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    make = importlib.import_module("titans_pytorch").NeuralMemory
    torch.manual_seed(0)
    module = make(
        dim=heads * head_dim, heads=heads, dim_head=head_dim, chunk_size=chunk, batch_size=chunk, momentum=False,
        pre_rmsnorm=False, default_step_transform_max_lr=0.02,
    )  # fmt: skip
    module.to_queries = module.to_keys = module.to_values = module.combine_heads = nn.Identity()
    module.retrieve_gate = None
    return module


def titans(setting: Setting, x: Memory) -> Step:
    """Queries, keys and values are one tensor; the output and the gradient of that tensor."""
    module = titans_memory(setting.heads, setting.head_dim, setting.chunk or TITANS_CHUNK).to(setting.device, setting.precision)
    tokens = x.k.detach().flatten(2).clone().requires_grad_()
    grad = x.grad.flatten(2)

    def step() -> list[Tensor]:
        module.zero_grad(set_to_none=True)
        tokens.grad = None
        y, _ = module(tokens)
        y.backward(grad)
        assert tokens.grad is not None
        return [y.detach(), tokens.grad]

    return step


def equal(
    name: str, about: str, run: Callable[..., Tensor], ours: str, module: str, lacks: Callable[[Setting], str]
) -> Contender:
    """A peer that computes the function of one of our presets."""
    make = partial(prepare, run=run, leaves=PRESETS[ours].leaves)
    return Contender(
        name=name,
        suite="miras",
        about=about,
        prepare=make,
        check=partial(memories.check, make=make, preset=PRESETS[ours]),
        work=partial(memories.work, preset=PRESETS[ours]),
        needs=(module,),
        lacks=lacks,
        note=lambda setting: f"the function of {ours}",
    )


register(
    equal("fla_gla", "flash-linear-attention, chunk_gla", gla, "gla", "fla", only_cuda),
    equal("fla_delta_net", "flash-linear-attention, chunk_delta_rule", delta_net, "delta_net", "fla", half_on_cuda),
    equal(
        "fla_gated_delta_net",
        "flash-linear-attention, chunk_gated_delta_rule",
        gated_delta_net,
        "gated_delta_net",
        "fla",
        half_on_cuda,
    ),
    equal("mamba_ssm", "mamba-ssm, mamba_chunk_scan_combined", mamba2, "mamba2", "mamba_ssm", only_cuda),
    Contender(
        name="fla_ttt_linear",
        suite="miras",
        about="flash-linear-attention, chunk_ttt_linear",
        prepare=partial(prepare, run=ttt_linear, leaves=("small",)),
        needs=("fla",),
        lacks=half_on_cuda,
        note=lambda setting: NOT_THE_SAME,
    ),
    Contender(
        name="titans_pytorch",
        suite="miras",
        about="titans-pytorch, NeuralMemory; perceptron",
        prepare=titans,
        needs=("titans_pytorch",),
        note=lambda setting: f"{NOT_THE_SAME}: beside yaad; chunks of {setting.chunk or TITANS_CHUNK}",
    ),
)
