"""The equations of Multi-Token Attention and of its baselines as loops over (i, j, i', j'): slow, plain, from the paper.

Nothing here is shared with the package. Loops run over positions; batch rows and heads that do not interact are vectorised.

Axis legend: B batch, T time, H query heads, Hkv key/value heads, K key dim, V value dim, G head groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEFT_REACH = {"both": lambda c_k: c_k // 2, "left": lambda c_k: c_k - 1, "right": lambda c_k: 0}


def visible_pairs(q: Tensor, document_ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, T, T], true where row i may see key j: causal, both real tokens, both of one document."""
    n_rows, length = q.shape[:2]
    visible = torch.zeros(n_rows, length, length, dtype=torch.bool)
    for b in range(n_rows):
        for i in range(length):
            for j in range(i + 1):
                same = document_ids is None or bool(document_ids[b, i] == document_ids[b, j])
                real = mask is None or bool(mask[b, i] and mask[b, j])
                visible[b, i, j] = same and real
    return visible


def raw_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, H, T, T]: scale * q_i . k_j for every pair; query head m reads key head m // (H / Hkv)."""
    n_heads, repeat = q.shape[2], q.shape[2] // k.shape[2]
    of_head = [m // repeat for m in range(n_heads)]
    return scale * (q[:, :, None] * k[:, None, :, of_head]).sum(-1).permute(0, 3, 1, 2)


def convolve(scores: Tensor, kernel: Tensor, visible: Tensor, pad_key: str) -> Tensor:
    """Eq. 5 and 6, the convolution between the two masks: sum over i', j' of theta[i', j'] a[i - i', j - j'].

    A term counts only if its row i - i' may see its key and stands in row i's document. The weight of (i', key - j) stands at
    kernel row c_q - 1 - i', column key - j + reach.
    """
    n_heads, length = scores.shape[1], scores.shape[2]
    c_q, c_k = kernel.shape[-2:]
    reach = LEFT_REACH[pad_key](c_k)
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            total = torch.zeros_like(scores[:, :, 0, 0])
            for back in range(min(c_q - 1, i) + 1 if j <= i else 0):
                for key in range(max(0, j - reach), min(length, j - reach + c_k)):
                    allowed = visible[:, i - back, key] & visible[:, i, i - back]
                    if not allowed.any():
                        continue
                    term = torch.where(allowed[:, None], scores[:, :, i - back, key], 0.0)
                    weight = kernel[..., c_q - 1 - back, key - j + reach]
                    total = total + mix_vector(term, weight, n_heads)
            row.append(total)
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def mix_vector(term: Tensor, weight: Tensor, n_heads: int) -> Tensor:
    """[B, H] times a weight per head [H], or per ordered head pair of a group [H, c_h] (out head o, input p of o's group)."""
    if weight.dim() == 1:
        return term * weight
    group = weight.shape[1]
    outs = []
    for o in range(n_heads):
        first = o // group * group
        outs.append(sum(weight[o, p] * term[:, first + p] for p in range(group)))
    return torch.stack(outs, dim=1)


def mix_heads(scores: Tensor, matrix: Tensor) -> Tensor:
    """Eq. 7: out head o of group g = sum_p matrix[g, o, p] of the group's head p."""
    n_groups, group = matrix.shape[:2]
    outs = []
    for g in range(n_groups):
        for o in range(group):
            outs.append(sum(matrix[g, o, p] * scores[:, g * group + p] for p in range(group)))
    return torch.stack(outs, dim=1)


def softmax_rows(scores: Tensor, visible: Tensor) -> Tensor:
    """exp(a_ij) / sum_j exp(a_ij) over the visible keys; a row that sees nothing is zero."""
    shown = visible[:, None].expand_as(scores)
    powers = torch.where(shown, torch.exp(torch.where(shown, scores, 0.0)), 0.0)
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total == 0, 1.0, total)


def multi_token_weights(
    q: Tensor,
    k: Tensor,
    *,
    kq_pre: Tensor | None = None,
    head_pre: Tensor | None = None,
    kq_post: Tensor | None = None,
    head_post: Tensor | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    pad_key: str = "both",
) -> Tensor:
    """Final attention weights [B, H, T, T]: mask 0, conv, head mix, mask -inf, softmax, conv, mask 0, head mix."""
    visible = visible_pairs(q, document_ids, mask)
    weights = raw_scores(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
    if kq_pre is not None:
        weights = convolve(weights, kq_pre, visible, pad_key)
    if head_pre is not None:
        weights = mix_heads(weights, head_pre)
    weights = softmax_rows(weights, visible)
    if kq_post is not None:
        weights = torch.where(visible[:, None], convolve(weights, kq_post, visible, pad_key), 0.0)
    if head_post is not None:
        weights = mix_heads(weights, head_post)
    return weights


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, V]: sum_j weights_ij v_j; query head m reads value head m // (H / Hkv)."""
    n_heads, repeat = weights.shape[1], weights.shape[1] // v.shape[2]
    of_head = [m // repeat for m in range(n_heads)]
    return torch.einsum("bhij,bjhv->bihv", weights, v[:, :, of_head])


def multi_token_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """The whole operation [B, T, H, V], by loops."""
    return weighted_values(multi_token_weights(q, k, **options), v)  # type: ignore[arg-type]
