"""The convolution before the softmax as a product: its logits are those of the definition wherever a query sees a key."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from recollect.ops.multi_token import convolve, scores
from recollect.ops.widened import widened

EXACT = 1e-12
SHAPES = [(6, 11), (1, 5), (3, 1), (2, 3), (1, 1)]
HEADS = [(4, 2), (2, 2), (3, 1)]


def logits(q: Tensor, k: Tensor, kernel: Tensor, pad_key: str) -> Tensor:
    """By the product and its band, entry by entry."""
    wide = widened(q, k, kernel, 0.7, pad_key)
    found = scores(wide.q, wide.k, 0.7)
    if wide.band is None:
        return found
    length, n_keys = found.shape[2], wide.band.shape[-1]
    minus = found.new_zeros(found.shape)
    for t, e in itertools.product(range(length), range(n_keys)):
        if e <= t:
            minus[:, :, t, t - e] = wide.band[:, :, t, e]
    return found - minus


@pytest.mark.parametrize("length", [1, 4, 23])
@pytest.mark.parametrize(("n_heads", "n_groups"), HEADS)
@pytest.mark.parametrize("pad_key", ["both", "left", "right"])
@pytest.mark.parametrize(("c_q", "c_k"), SHAPES)
def test_logits_and_gradients_equal_the_definition(
    c_q: int, c_k: int, pad_key: str, n_heads: int, n_groups: int, length: int
) -> None:
    """Prevents keys behind a query from being counted, taps in another order, heads that read another head's keys."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k = random(2, length, n_heads, 5), random(2, length, n_groups, 5)
    kernel = random(n_heads, c_q, c_k)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    raw = scores(q, k, 0.7).masked_fill(~seen, 0)
    expected, _ = convolve(raw, kernel, raw.new_zeros(2, n_heads, c_q - 1, length), None, pad_key)
    pair = [x.masked_fill(~seen, 0) for x in (logits(q, k, kernel, pad_key), expected)]
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    gradients = (torch.autograd.grad((x * weights).sum(), (q, k, kernel)) for x in pair)
    for name, a, b in zip(
        ("logits", "q", "k", "kernel"), *((x, *grads) for x, grads in zip(pair, gradients, strict=True)), strict=True
    ):
        error = float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach())
        assert error <= EXACT, f"{name}: {error:.1e}"
