"""Suite "mta": forward and backward of Multi-Token Attention in every form that runs here.

The default size is that of the paper's 880M model: 16 heads of 96, 6 x 11 kernels and 16 x 16 head mixing on both sides.

Axis legend: B batch, T time, H heads, K key dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.bench.contenders import (
    CHECK_LENGTH,
    SUITES,
    UNMEASURED,
    Check,
    Contender,
    Step,
    Suite,
    against,
    register,
    unmeasured,
    worst,
)
from recollect.bench.floor import Work
from recollect.bench.setting import Setting
from recollect.ops import multi_token
from recollect.ops.multi_token import LACKS, Mixing, backends, choose, multi_token_attention

C_Q, C_K = 6, 11
ABOUT = {
    "materialized": "T x T tensors, automatic differentiation: the formulation of the paper",
    "blocked": "blocks of rows in plain PyTorch, recomputed in the backward pass",
    "native": "strips of rows, compiled C kernels",
    "triton": "blocks of rows, Triton kernels",
}


class Attention(NamedTuple):
    """q, k, v [B, T, H, K], the mixing near the identity, and the gradient of the output; all but the last require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixing: Mixing
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Attention:
        """The same numbers in another precision."""
        q, k, v = (part.detach().to(dtype).requires_grad_() for part in (self.q, self.k, self.v))
        mixing = Mixing(*(part.detach().to(dtype).requires_grad_() for part in self.mixing if part is not None))
        return Attention(q, k, v, mixing, grad=self.grad.to(dtype))


def inputs(setting: Setting, length: int) -> Attention:
    """Random, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale)

    n_heads = setting.heads
    q, k, v, grad = (draw(setting.batch, length, n_heads, setting.head_dim) for _ in range(4))
    kernels = [draw(n_heads, C_Q, C_K, scale=0.1) for _ in range(2)]
    matrices = [torch.eye(n_heads)[None] + draw(1, n_heads, n_heads, scale=0.1) for _ in range(2)]
    for kernel in kernels:
        kernel[:, -1, C_K // 2] += 1
    parts = [part.to(setting.device, setting.precision) for part in (q, k, v, grad, *kernels, *matrices)]
    for part in (*parts[:3], *parts[4:]):
        part.requires_grad_()
    q, k, v, grad = parts[:4]
    return Attention(q, k, v, Mixing(parts[4], parts[6], parts[5], parts[7]), grad)


def everything(x: Attention) -> Mixing:
    """Convolution and head mixing on both sides."""
    return x.mixing


def post_only(x: Attention) -> Mixing:
    """One convolution after the softmax: what Liger-Kernel's operator computes."""
    return Mixing(kq_post=x.mixing.kq_post)


def step(x: Attention, part: Callable[[Attention], Mixing], backend: str | None) -> list[Tensor]:
    """Forward and backward: the output and the gradients of q, k, v and what is mixed with."""
    mixing = part(x)
    out = multi_token_attention(x.q, x.k, x.v, **mixing._asdict(), backend=backend)
    learned = [given for given in mixing if given is not None]
    return [out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v, *learned), x.grad)]


def prepare(setting: Setting, x: Attention, *, part: Callable[[Attention], Mixing], backend: str | None) -> Step:
    return lambda: step(x, part, backend)


def check(
    setting: Setting,
    *,
    make: Callable[[Setting, Any], Step],
    part: Callable[[Attention], Mixing],
    block_entries: Callable[[Setting], int] = lambda setting: 0,
) -> Check:
    """Against the materialised form in fp64, at a short length and at one where rows are handed from a block to the next.

    Args:
        block_entries: numbers in one map of a block of a form that works block by block; 0: whatever its blocks are, the short length
            crosses them.
    """
    entries = block_entries(setting)
    lengths = [CHECK_LENGTH, crossing(setting, entries)] if entries else [CHECK_LENGTH]

    def at(length: int) -> Check:
        x = inputs(setting, length)
        exact = step(x.to(torch.float64), part, "materialized")
        return against(setting, make(setting, x)(), step(x, part, "materialized"), exact)

    return worst(at(length) for length in lengths)


def crossing(setting: Setting, entries: int) -> int:
    """A length whose rows are two blocks or more, no multiple of any tile: B H T^2 is a half more than a block's entries."""
    return max(CHECK_LENGTH, int(1.25 * (entries / (setting.batch * setting.heads)) ** 0.5) // 2 * 2 + 7)


def entries_of(setting: Setting, *, backend: str | None) -> int:
    """Numbers in one map of a block of a form (None: the default here); 0: of strips that the short length crosses, or all at once."""
    if backend is None:
        x = inputs(setting, 1)
        backend = next(name for name, found in backends().items() if found is choose(x.q, x.k, x.mixing))
    if backend == "blocked":
        return multi_token.BLOCK_ENTRIES
    if backend == "triton":
        from recollect.kernels.triton.multi_token import BLOCK_ENTRIES  # here: triton is there where it is checked

        return BLOCK_ENTRIES
    return 0


def operations(n_heads: int, head_dim: int, length: int, *, sides: int = 2, heads_mixed: bool = True) -> dict[str, float]:
    """FLOPs of forward + backward of one row on the causal part, recomputation of the maps in the backward pass included.

    Args:
        sides: of the softmax with a convolution, 1 or 2; heads_mixed: with head mixing there, all heads of one group.
    """
    pairs = n_heads * length * (length + 1) / 2
    products = 2 * head_dim * pairs * (2 + 5)  # QK, PV; again QK, and dV, dP, dQ, dK
    stencils = 2 * C_Q * C_K * pairs * 4 * sides  # each side: forward, recomputed, then gradients of map and kernel
    mixes = 2 * n_heads * pairs * 4 * sides * heads_mixed
    return {"matrix products": products, "stencils": stencils, "head mixing": mixes}


def traffic(setting: Setting, length: int) -> float:
    """Bytes of q, k, v, the output and their gradients, each once."""
    return 8 * setting.batch * length * setting.width * setting.precision.itemsize


def work(setting: Setting, length: int, _: Any, *, sides: int = 2, heads_mixed: bool = True) -> Work:
    """On the causal part, as if nothing else were computed."""
    count = operations(setting.heads, setting.head_dim, length, sides=sides, heads_mixed=heads_mixed)
    return Work(setting.batch * sum(count.values()), traffic(setting, length))


def lacks(setting: Setting, *, backend: str) -> str:
    """Why a form cannot run: interpreted Triton is no contender."""
    if backend == "triton" and setting.kind != "cuda":
        return "runs on a GPU only"
    x = inputs(setting, 1)
    return LACKS[backend](x.q, x.mixing) if backend in LACKS else ""


def note(setting: Setting, *, backend: str) -> str:
    """Whether it is the form that users get, and what nobody has measured."""
    x = inputs(setting, 1)
    default = choose(x.q, x.k, x.mixing) is backends()[backend]
    return "; ".join(filter(None, ["the default here" * default, UNMEASURED if backend == "triton" else unmeasured(setting)]))


def form(backend: str) -> Contender:
    """One form of the op as a contender."""
    make = partial(prepare, part=everything, backend=backend)
    return Contender(
        name=backend,
        suite="mta",
        about=ABOUT.get(backend, "a form of multi_token_attention"),
        prepare=make,
        check=partial(check, make=make, part=everything, block_entries=partial(entries_of, backend=backend)),
        work=work,
        lacks=partial(lacks, backend=backend),
        note=partial(note, backend=backend),
    )


SUITES["mta"] = Suite("mta", "forward and backward of attention", inputs)
register(*(form(backend) for backend in ("native", "triton", "blocked", "materialized")))
register(*(form(backend) for backend in sorted(backends().keys() - ABOUT.keys())))
_post = partial(prepare, part=post_only, backend=None)
register(
    Contender(
        name="post_only",
        suite="mta",
        about="one convolution after the softmax and nothing else, in the default form",
        prepare=_post,
        check=partial(check, make=_post, part=post_only, block_entries=partial(entries_of, backend=None)),
        work=partial(work, sides=1, heads_mixed=False),
        note=lambda setting: "; ".join(filter(None, ["less than the full op", unmeasured(setting)])),
    )
)
