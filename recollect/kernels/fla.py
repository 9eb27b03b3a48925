"""The kernels of flash-linear-attention, where that package is installed, as a form of the scans over a matrix state.

| recurrence | decay: none | per head | per key channel |
|---|---|---|---|
| `gated_linear_scan` | chunk_simple_gla | chunk_simple_gla | chunk_gla |
| `delta_rule_scan` | chunk_delta_rule | chunk_gated_delta_rule | chunk_kda |
| `delta_scan` | chunk_dplr_delta_rule | chunk_dplr_delta_rule | chunk_dplr_delta_rule |

Their tokens are laid out as ours, their states are [B, H, K, V]. Documents are theirs too: one row of all tokens, cut where a row
begins or the state is forgotten, each piece with a first state of its own. Products are taken in bf16 or fp16, sums, decays and
carried states in fp32. NOT YET MEASURED ON A GPU: tested with stand-ins; theirs, of version 0.6.0, were run in Triton's interpreter.

Axis legend: B batch, T time, H heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from recollect.kernels.triton import FEW_TOKENS
from recollect.ops.decay import UNDERFLOW
from recollect.ops.tiles import Recurrence, blank

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_KEY = 256
OLDEST = (0, 6)  # what their functions are called with below was read in its source


@functools.cache
def version(package: str) -> tuple[int, ...]:
    """The first numbers of an installed package's version; empty if it is not installed."""
    try:
        return tuple(int(n) for n in re.findall(r"\d+", metadata.version(package))[:3])
    except metadata.PackageNotFoundError:
        return ()


FOUND = version("fla-core") if importlib.util.find_spec("fla") else ()


def installed() -> str:
    """Why their package cannot be used on any machine; "" where it can."""
    if FOUND >= OLDEST:
        return ""
    if FOUND:
        return f"fla-core {_dotted(FOUND)} is older than {_dotted(OLDEST)}: pip install -U 'recollect[fla]'"
    return "flash-linear-attention is not installed: pip install 'recollect[fla]'"


def lacks(x: Recurrence) -> str:
    """Why they cannot run it; "" where they can."""
    key_dim, value_dim, device = x.q.shape[-1], x.v.shape[-1], x.q.device
    if why := installed():
        return why
    if device.type not in DEVICES:
        return f"flash-linear-attention needs a GPU; the inputs are on {device.type}"
    if x.products not in DTYPES:
        return f"flash-linear-attention takes products in bfloat16 or float16, these are in {x.products}"
    if x.on_values:
        return "flash-linear-attention has no decay per value channel"
    if x.strength is not None and x.strength.shape[-1] > 1:
        return "flash-linear-attention has no strength per value channel"
    if key_dim > LARGEST_KEY or key_dim % 2 or value_dim % 2:
        return f"flash-linear-attention takes an even K up to {LARGEST_KEY} and an even V; these are {key_dim} and {value_dim}"
    per_head = x.decays and x.log_decay.dim() == 3 and (x.rule is not None or x.a is None)
    if per_head and x.differentiated and _miscompiles(device):
        return f"on this GPU Triton {_dotted(version('triton'))} miscompiles its gradients for decays per head: 3.7.1 does not"
    return ""


def meant(x: Recurrence) -> bool:
    """For calls with gradients and long ones on a GPU. Not inside torch.compile, which cannot look into their functions."""
    worth = x.q.shape[1] > FEW_TOKENS or x.differentiated
    return worth and x.q.device.type in DEVICES and not torch.compiler.is_compiling()


@torch.compiler.disable
def run(x: Recurrence) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V], in the dtype of products, and the last state [B, H, V, K]."""
    function, tokens = _chosen(x)
    first = x.state.mT
    if x.reset is None:
        y, last = function(**tokens, scale=1.0, initial_state=first.contiguous(), output_final_state=True)
        return y, last.mT
    cuts, firsts, lasts = _documents(x.reset)
    carried = blank(first, x.reset[:, 0, None, None, None])
    starts = first.new_zeros(len(cuts) - 1, *first.shape[1:]).index_copy(0, firsts, carried)
    tokens = {name: value.flatten(0, 1)[None] if isinstance(value, Tensor) else value for name, value in tokens.items()}
    y, ends = function(**tokens, scale=1.0, initial_state=starts, output_final_state=True, cu_seqlens=cuts)
    return y.unflatten(1, x.reset.shape).squeeze(0), ends.index_select(0, lasts).mT


def _chosen(x: Recurrence) -> tuple[Any, dict[str, Any]]:
    """Their function for a recurrence and its arguments: tokens in the dtype of products, gates as they are."""
    low = x.products
    # What underflows is 0 either way; below, their sums of logarithms would lose digits, and -inf be NaN.
    decay = x.log_decay.clamp(min=UNDERFLOW[x.log_decay.dtype])
    gates = {"g": decay} if x.decays else {}
    tokens: dict[str, Any] = {"q": x.q.to(low), "v": x.v.to(low)}
    if x.rule is not None:
        key, beta = x.rule
        tokens |= {"k": key.to(low), "beta": beta, **gates}
        if not x.decays:
            from fla.ops.delta_rule import chunk_delta_rule as function
        elif decay.dim() == 3:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as function
        else:
            from fla.ops.kda import chunk_kda as function
        return function, tokens
    tokens["k"] = x.k.to(low)
    if x.a is not None and x.b is not None:
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

        added = x.b if x.strength is None else x.b * x.strength
        per_key = decay if decay.dim() == 4 else decay[..., None].expand(x.q.shape)
        bound = {"lower_bound": x.floor} if x.floor else {}
        return chunk_dplr_delta_rule, {**tokens, "a": x.a.to(low), "b": added.to(low), "gk": per_key, **bound}
    if decay.dim() == 4:
        from fla.ops.gla import chunk_gla

        return chunk_gla, {**tokens, **gates}
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla, {**tokens, **gates}


def _documents(reset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where documents begin in the row of all tokens, and its end [N + 1]; the number of every batch row's first and last one [B]."""
    begins = reset.clone()
    begins[:, 0] = True
    lasts = begins.sum(1).cumsum(0) - 1
    firsts = torch.cat([lasts.new_zeros(1), lasts[:-1] + 1])
    cuts = begins.flatten().nonzero().squeeze(1)
    return torch.cat([cuts, cuts.new_tensor([reset.numel()])]), firsts, lasts


def _miscompiles(device: torch.device) -> bool:
    """Whether they would refuse to differentiate decays per head: Triton 3.4.0 to 3.7.0 on GPUs of capability 9."""
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return on_hopper and (3, 4, 0) <= version("triton") < (3, 7, 1)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(n) for n in numbers)
