"""What others offer for the suite "mta": plain attention (PyTorch, FlashAttention, FlexAttention) and Liger-Kernel's operator.

Each is imported when it runs and never required. Axis legend: B batch, T time, H heads, K key dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.bench.contenders import CHECK_LENGTH, Check, Contender, Step, against, only_cuda, register, worst
from recollect.bench.floor import Work
from recollect.bench.setting import Setting
from recollect.bench.suites import attention
from recollect.bench.suites.attention import Attention

PLAIN = "plain attention: another function, the price of attending at all"


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention as it is written, on [B, T, H, K]."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(later, float("-inf")).softmax(-1), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention."""
    out: Tensor = importlib.import_module("flash_attn").flash_attn_func(q, k, v, causal=True)
    return out


def flex(setting: Setting, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled, with the causal blocks found once."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    mask = module.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=setting.device)
    compiled = torch.compile(module.flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(*(part.transpose(1, 2) for part in (q, k, v)), block_mask=mask)
        return out.transpose(1, 2)

    return attend


def step(x: Attention, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Forward and backward: the output and the gradients of q, k, v."""
    out = attend(x.q, x.k, x.v)
    return [out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.grad)]


def check(setting: Setting, *, make: Callable[[Setting, Attention], Step]) -> Check:
    """Against the equation in fp64, at a short length and at one of several blocks of 64 or 128 rows and a rest."""

    def at(length: int) -> Check:
        x = attention.inputs(setting, length)
        return against(setting, make(setting, x)(), step(x, plain), step(x.to(torch.float64), plain))

    return worst(at(length) for length in (CHECK_LENGTH, 3 * CHECK_LENGTH + 12))


def work(setting: Setting, length: int, _: Any) -> Work:
    """The matrix products alone."""
    count = attention.operations(setting.heads, setting.head_dim, length)
    return Work(setting.batch * count["matrix products"], attention.traffic(setting, length))


def liger_step(x: Attention) -> list[Tensor]:
    """Liger-Kernel's operator takes the logits; queries, keys and values around it are plain products.

    It convolves symmetrically over queries: our kernel's rows are its upper half, and the rows below, later queries, are zeros.
    """
    operator = importlib.import_module("liger_kernel.transformers.functional").liger_multi_token_attention
    kernel = x.mixing.kq_post
    assert kernel is not None
    n_queries, n_keys = kernel.shape[-2:]
    scores = torch.einsum("bthk,bshk->bhts", x.q, x.k) * x.q.shape[-1] ** -0.5
    wide = F.pad(kernel, (0, 0, 0, n_queries - 1))[:, None]
    weights = operator(scores, wide, padding=(n_queries - 1, n_keys // 2), groups=x.q.shape[2])
    out = torch.einsum("bhts,bshv->bthv", weights, x.v)
    return [out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v, kernel), x.grad)]


def liger(setting: Setting, x: Attention) -> Step:
    return lambda: liger_step(x)


def half_on_cuda(setting: Setting) -> str:
    """For kernels that take bfloat16 and float16 on a GPU."""
    wrong = "" if setting.dtype in ("bfloat16", "float16") else "takes bfloat16 or float16 only"
    return only_cuda(setting) or wrong


def contender(name: str, about: str, make: Callable[[Setting, Attention], Step], **more: Any) -> Contender:
    """One kind of plain attention."""
    return Contender(
        name=name,
        suite="mta",
        about=about,
        prepare=make,
        check=partial(check, make=make),
        work=work,
        note=lambda setting: PLAIN,
        **more,
    )


register(
    contender("sdpa", "scaled_dot_product_attention of PyTorch", lambda setting, x: lambda: step(x, sdpa)),
    contender(
        "flash_attention",
        "FlashAttention",
        lambda setting, x: lambda: step(x, flash),
        needs=("flash_attn",),
        lacks=half_on_cuda,
    ),
    contender(
        "flex_attention",
        "FlexAttention of PyTorch, compiled",
        lambda setting, x: partial(step, x, flex(setting, x.q.shape[1])),
        needs=("triton",),
        lacks=only_cuda,
    ),
    Contender(
        name="liger",
        suite="mta",
        about="Liger-Kernel's multi_token_attention: one convolution after the softmax, T x T tensors",
        prepare=liger,
        check=partial(attention.check, make=liger, part=attention.post_only),
        work=partial(attention.work, sides=1, heads_mixed=False),
        needs=("liger_kernel",),
        lacks=only_cuda,
        note=lambda setting: "the function of post_only",
    ),
)
