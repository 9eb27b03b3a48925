"""Triton kernels: faster equals of `recollect.ops` on a GPU. Its modules need triton; this one only says whether they can run.

TRITON_INTERPRET=1 in the environment runs them on a CPU, hundreds of times slower than anything else: for tests of their arithmetic.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from recollect.kernels.memory import BIASES, LINKS
from recollect.ops.multi_token import Mixing, Rows, Settings
from recollect.ops.tiles import Recurrence

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 16
REMEMBERED = (("identity", "gd"), ("scaled", "gd"), ("simplex", "gd"), ("identity", "momentum"))
OVER_CHANNELS = ("huber_norm", "l_infinity", "value_shift")  # of one channel they depend on all
INSTALLED = importlib.util.find_spec("triton") is not None


def numbers(link: int, retention: float) -> dict[str, float]:
    """The number that a retention has, as the walks of memories are compiled with it; see `recollect.kernels.memory.Settings`."""
    scaled = link == LINKS["scaled"]
    return {"THRESHOLD": retention if link == LINKS["identity"] else 0.0, "EXPONENT": retention if scaled else 0.0}


def can_run(x: Tensor) -> bool:
    """Whether kernels run where x lies: on a GPU with triton, or interpreted."""
    return INSTALLED and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def nowhere(x: Tensor) -> str:
    """Why kernels cannot run where x lies, "" where they can."""
    if not INSTALLED:
        return "triton is not installed: pip install 'recollect[kernels]'"
    return "" if can_run(x) else f"it runs on a GPU, the inputs are on {x.device.type}"


def lacks_attention(q: Tensor, mixing: Mixing) -> str:
    """Why attention cannot run, "" where it can: kernels of at most 113 keys, and at most 32 heads mixed."""
    kernels = [k for k in (mixing.kq_pre, mixing.kq_post) if k is not None]
    matrices = [m for m in (mixing.head_pre, mixing.head_post) if m is not None]
    if any(k.shape[-1] > 113 for k in kernels):
        return "it has kernels of at most 113 keys"
    if any(m.shape[1] > 32 for m in matrices):
        return "it mixes at most 32 heads"
    return nowhere(q) if q.dtype in DTYPES else f"it has no {q.dtype}"


def meant_attention(q: Tensor, mixing: Mixing) -> bool:
    """For a GPU, not for the interpreter."""
    return q.is_cuda


def attend(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """Multi-Token Attention, `recollect.kernels.triton.multi_token`; triton is imported on first use."""
    from recollect.kernels.triton.multi_token import fused

    return fused(q, k, v, mixing, settings, start, rows)


def lacks(x: Recurrence) -> str:
    """Why the recurrence cannot run; "" where it can."""
    return nowhere(x.q)


def should_recur(x: Recurrence) -> bool:
    """On a GPU, a few tokens that nobody differentiates: one launch instead of a dozen. Longer calls are tiles of matrix products."""
    return x.q.is_cuda and x.q.shape[1] <= FEW_TOKENS and not x.differentiated


def recur(x: Recurrence) -> tuple[Tensor, Tensor]:
    """Recurrences on a matrix state, `recollect.kernels.triton.recurrence`; triton is imported on first use."""
    from recollect.kernels.triton.recurrence import recurrence

    return recurrence(x.q, x.k, x.v, x.a, x.b, x.log_decay, x.strength, x.state, x.reset, x.on_values)


def lacks_memory(q: Tensor, hidden: int, bias: str, link: str, rule: str) -> str:
    """Why Miras' perceptron memories cannot run, "" where they can: fp32 and fp64, sizes that are multiples of 16 and at most 128 (key
    dim) and 1024 (hidden), and of the links and rules of `recollect.kernels.memory` those that are built in, with any bias above."""
    key = q.shape[-1]
    if key % 16 or hidden % 16 or not 0 < key <= 128 or not 0 < hidden <= 1024:
        return f"it takes multiples of 16, K up to 128 and hidden sizes up to 1024; these are {key} and {hidden}"
    if q.dtype not in DTYPES[:2]:
        return f"it computes in fp32 or fp64, not {q.dtype}"
    if (link, rule) not in REMEMBERED or bias not in BIASES:
        return f"it has no rule {rule!r} with weights that are {link!r} and bias {bias!r}"
    return nowhere(q)


def lacks_matrix(q: Tensor, v: Tensor) -> str:
    """Why Miras' matrix memories cannot run, "" where they can: fp32 and fp64, key and value dims of at most 128."""
    if max(q.shape[-1], v.shape[-1]) > 128:
        return f"it takes K and V up to 128; these are {q.shape[-1]} and {v.shape[-1]}"
    return nowhere(q) if q.dtype in DTYPES[:2] else f"it computes in fp32 or fp64, not {q.dtype}"
