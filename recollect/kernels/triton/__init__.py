"""Triton kernels: faster equals of `recollect.ops` on a GPU. Its modules need triton; this one only says whether they can run.

TRITON_INTERPRET=1 in the environment runs them on a CPU, hundreds of times slower than anything else: for tests of their arithmetic.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from recollect.kernels.memory import BIASES
from recollect.ops.multi_token import Mixing, Rows, Settings
from recollect.ops.tiles import Recurrence

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 16
REMEMBERED = (("identity", "gd"), ("scaled", "gd"), ("simplex", "gd"), ("identity", "momentum"))
INSTALLED = importlib.util.find_spec("triton") is not None


def can_run(x: Tensor) -> bool:
    """Whether kernels run where x lies: on a GPU with triton, or interpreted."""
    return INSTALLED and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def can_attend(q: Tensor, mixing: Mixing) -> bool:
    """Kernels of at most 113 keys, and at most 32 heads mixed."""
    kernels = [k for k in (mixing.kq_pre, mixing.kq_post) if k is not None]
    matrices = [m for m in (mixing.head_pre, mixing.head_post) if m is not None]
    fits = all(k.shape[-1] <= 113 for k in kernels) and all(m.shape[1] <= 32 for m in matrices)
    return fits and q.dtype in DTYPES and can_run(q)


def should_attend(q: Tensor, mixing: Mixing) -> bool:
    """It can, and not in the interpreter."""
    return q.is_cuda and can_attend(q, mixing)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """Multi-Token Attention, `recollect.kernels.triton.multi_token`; triton is imported on first use."""
    from recollect.kernels.triton.multi_token import fused

    return fused(q, k, v, mixing, settings, start, rows)


def lacks(x: Recurrence) -> str:
    """Why the recurrence cannot run; "" where it can."""
    return "" if can_run(x.q) else f"{x.q.dtype} on {x.q.device.type}"


def should_recur(x: Recurrence) -> bool:
    """On a GPU, a few tokens that nobody differentiates: one launch instead of a dozen. Longer calls are tiles of matrix products."""
    return x.q.is_cuda and can_run(x.q) and x.q.shape[1] <= FEW_TOKENS and not x.differentiated


def recur(x: Recurrence) -> tuple[Tensor, Tensor]:
    """Recurrences on a matrix state, `recollect.kernels.triton.recurrence`; triton is imported on first use."""
    from recollect.kernels.triton.recurrence import recurrence

    return recurrence(x.q, x.k, x.v, x.a, x.b, x.log_decay, x.strength, x.state, x.reset, x.on_values)


def can_remember(q: Tensor, hidden: int, bias: str, link: str, rule: str) -> bool:
    """Miras' perceptron memories: fp32 and fp64, sizes that are multiples of 16 and at most 128 (key dim) and 1024 (hidden), and of the
    biases, links and rules of `recollect.kernels.memory` those that are built in."""
    key = q.shape[-1]
    sizes = key % 16 == 0 and hidden % 16 == 0 and 0 < key <= 128 and 0 < hidden <= 1024
    return sizes and q.dtype in DTYPES[:2] and (link, rule) in REMEMBERED and bias in BIASES and can_run(q)


def can_remember_matrix(q: Tensor, v: Tensor) -> bool:
    """Miras' matrix memories: fp32 and fp64, key and value dims of at most 128."""
    return max(q.shape[-1], v.shape[-1]) <= 128 and q.dtype in DTYPES[:2] and can_run(q)
