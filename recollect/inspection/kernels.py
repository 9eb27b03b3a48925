"""Learned kernels and head-mixing matrices, with the pattern that they show named by a rule.

A key-query kernel W [c_q, c_k] weighs the score of query i - a and key j + b for the score of query i and key j. Its energy is the
sum of its squared entries. The rule:

    zero      no entry beyond ZERO
    identity  at least IDENTITY of the energy is at the origin (a = 0, b = 0)
    else, where does the energy outside of the origin lie? A pattern that holds at least NAMED of it gives the name:
    diagonal     (a, -a), with the sign of the origin: an earlier query with an equally earlier key, "the same phrase"
    priming      (a > 0, 0), with the sign of the origin: strengthens a key that earlier queries attended
    suppression  (a > 0, 0), against it: weakens such a key
    edge         (0, b != 0), against it: the first or last of a run of attended keys
    blur         (0, b != 0), with it: the keys around an attended one
    mixed        none of them

By chance a pattern of m entries out of n holds m / n: of a 6 x 11 kernel with random signs 4 % (diagonal, priming, suppression) or
8 % (edge, blur). The paper names diagonal, priming and edge detection without a rule (arXiv 2504.00927, section 4.5); suppression,
blur, the rule and its thresholds are ours.

A head-mixing matrix is "identity" if its diagonal holds IDENTITY of the energy, else "contrast" if negative entries hold NAMED of
the energy off the diagonal (a map less another), else "mixing".

Axis legend: H heads, G groups of c_h heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.inspection.stock import Caught
from recollect.mixers import Mixer
from recollect.mixers.multi_token import MultiTokenAttention
from recollect.ops.multi_token import Mixing, key_padding

ZERO = 1e-6
IDENTITY = 0.9
NAMED = 0.5


class Pattern(NamedTuple):
    """name: see the file's head; share: of all energy for identity and zero, of that outside the origin or diagonal for a pattern, and
    for mixed and mixing the part of all that lies there."""

    name: str
    share: float


class Kernel(NamedTuple):
    """One matrix. kind: kq_pre, kq_post, head_pre or head_post; title: whose; origin: column of the same key (of kq kernels);
    first: number of the head of row and column 0 (of head matrices)."""

    kind: str
    title: str
    heads: tuple[int, ...]
    values: Tensor
    pattern: Pattern
    origin: int = 0
    first: int = 0


def kernels(mixer: Mixer | Caught) -> list[Kernel]:
    """Every kernel and matrix of a layer of Multi-Token Attention or Talking Heads; [] of other mixers."""
    if isinstance(mixer, MultiTokenAttention):
        return _kernels(mixer.mixing, mixer.config.pad_key)
    return _kernels(mixer.mixing, mixer.pad_key) if isinstance(mixer, Caught) and mixer.mixing is not None else []


def _kernels(mixing: Mixing, pad_key: str) -> list[Kernel]:
    found = []
    for kind, tensor in mixing._asdict().items():
        if tensor is None:
            continue
        values = tensor.detach().float().cpu()
        if kind.startswith("head"):
            size = values.shape[-1]
            for group, matrix in enumerate(values):
                heads = tuple(range(group * size, (group + 1) * size))
                title = "all heads" if len(values) == 1 else f"heads {heads[0]} to {heads[-1]}"
                found.append(Kernel(kind, title, heads, matrix, head_pattern(matrix), first=group * size))
            continue
        origin = key_padding(pad_key, values.shape[-1])[0]
        if values.dim() == 3:
            found += [Kernel(kind, f"head {h}", (h,), one, pattern(one, origin), origin) for h, one in enumerate(values)]
            continue
        size = values.shape[1]
        for head, some in enumerate(values):
            for n, one in enumerate(some):
                source = head // size * size + n
                found.append(Kernel(kind, f"head {source} to {head}", (head, source), one, pattern(one, origin), origin))
    return found


def pattern(kernel: Tensor, origin: int) -> Pattern:
    """The pattern of a key-query kernel.

    Args:
        kernel: [c_q, c_k], the current query's row last.
        origin: the column of the same key.
    """
    if float(kernel.abs().max()) <= ZERO:
        return Pattern("zero", 1.0)
    c_q, origin_row = kernel.shape[0], kernel.shape[0] - 1
    energy = kernel.double().square()
    centre = kernel[-1, origin]
    at_origin = float(energy[-1, origin] / energy.sum())
    if at_origin >= IDENTITY:
        return Pattern("identity" if centre > 0 else "identity, negative", at_origin)
    outside = energy.clone()
    outside[-1, origin] = 0
    along = kernel * torch.where(centre < 0, -1.0, 1.0) > 0  # with the sign of the origin
    slanted = torch.zeros_like(along)
    for a in range(1, min(c_q, origin + 1)):
        slanted[origin_row - a, origin - a] = True
    upright, level = torch.zeros_like(along), torch.zeros_like(along)
    upright[:-1, origin], level[-1] = True, True
    parts = {
        "diagonal": slanted & along,
        "priming": upright & along,
        "suppression": upright & ~along,
        "edge": level & ~along,
        "blur": level & along,
    }
    shares = {name: float(outside[where].sum() / outside.sum()) for name, where in parts.items()}
    name = max(shares, key=shares.__getitem__)
    return Pattern(name, shares[name]) if shares[name] >= NAMED else Pattern("mixed", 1 - at_origin)


def head_pattern(matrix: Tensor) -> Pattern:
    """The pattern of a head-mixing matrix [c_h, c_h]."""
    if float(matrix.abs().max()) <= ZERO:
        return Pattern("zero", 1.0)
    energy = matrix.double().square()
    on = float(energy.diagonal().sum() / energy.sum())
    if on >= IDENTITY:
        return Pattern("identity", on)
    off = energy - torch.diag(energy.diagonal())
    negative = float(off[matrix < 0].sum() / off.sum())
    return Pattern("contrast", negative) if negative >= NAMED else Pattern("mixing", 1 - on)
