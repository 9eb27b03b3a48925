"""The convolution before the softmax as one product of wider queries and keys, for units that multiply matrices faster than all else.

    logits[t, s] = sum over a, b of theta[a, b] scale q_(t-a) . k_(s+b-left)  -  band[t, t - s]
                 = scale q'_t . k'_s  -  band[t, t - s]

q' puts c_q queries side by side, k' as many sums of c_k keys. The product knows no mask: it counts keys behind the query they meet,
which the definition (`multi_token.convolve`, the oracle) leaves out. They are at most c_q - 1 + right keys behind it, and reach as
many keys before it: `band` is what they add.

Axis legend: B batch, T queries and keys, H heads, K key dim, E keys of the band.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.multi_token import key_padding


class Widened(NamedTuple):
    """q, k: [B, T, H, c_q K]; band: [B, H, T, E], of the key that is e before the query; None where no key behind a query is met."""

    q: Tensor
    k: Tensor
    band: Tensor | None


def widened(q: Tensor, k: Tensor, kernel: Tensor, scale: float, pad_key: str) -> Widened:
    """The three, in q's dtype but for the band, which is in the kernel's.

    Args:
        q: [B, T, H, K]; k: [B, T, Hkv, K], each of its heads read by H / Hkv in order; kernel: [H, c_q, c_k].
        scale, pad_key: as `multi_token_attention` has them. No earlier keys, no documents.
    """
    (batch, length, n_heads, size), (_, c_q, c_k) = q.shape, kernel.shape
    left, right = key_padding(pad_key, c_k)
    keys = k.repeat_interleave(n_heads // k.shape[2], 2)
    wide_q = torch.cat([_earlier(q, a) for a in range(c_q)], -1)
    taps = kernel.flip(1).to(q.dtype).reshape(n_heads * c_q, 1, c_k)  # of a queries back, a from 0
    channels = F.pad(keys.permute(0, 3, 2, 1).reshape(-1, n_heads, length), (left, right))
    summed = F.conv1d(channels, taps, groups=n_heads).view(batch, size, n_heads, c_q, length)
    wide_k = summed.permute(0, 4, 2, 3, 1).reshape(batch, length, n_heads, c_q * size)
    reach = right + c_q - 1
    if not reach:
        return Widened(wide_q, wide_k, None)
    # behind[t, d - 1]: the logit of query t and the key d behind it
    exact_q, exact_k = q.to(kernel.dtype) * scale, keys.to(kernel.dtype)
    behind = torch.stack([(exact_q * _later(exact_k, d)).sum(-1) for d in range(1, reach + 1)], -1).transpose(1, 2)
    back, d, e = torch.meshgrid(*(torch.arange(n, device=q.device) for n in (c_q, reach, reach)), indexing="ij")
    tap = d + 1 - back + e + left
    met = kernel.flip(1)[:, back, tap.clamp(0, c_k - 1)] * ((tap >= 0) & (tap < c_k))  # [H, c_q, D, E]
    shifted = [_earlier(behind.transpose(1, 2), a).transpose(1, 2) @ met[:, a] for a in range(c_q)]
    return Widened(wide_q, wide_k, torch.stack(shifted).sum(0))


def _earlier(x: Tensor, n: int) -> Tensor:
    """x [B, T, ...] of n tokens before, zeros at the start."""
    return x if n == 0 else F.pad(x[:, :-n], (*(0, 0) * (x.dim() - 2), n, 0)) if n < x.shape[1] else torch.zeros_like(x)


def _later(x: Tensor, n: int) -> Tensor:
    """x [B, T, ...] of n tokens behind, zeros at the end."""
    return F.pad(x[:, n:], (*(0, 0) * (x.dim() - 2), 0, min(n, x.shape[1])))
