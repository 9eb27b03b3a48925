"""Decayed scores and sums against loops over token pairs; safety of the exponents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recollect.ops.decay import cumulative_log_decay, decay_matrix, decayed_scores, decayed_sum
from tests.laws import assert_bitwise, assert_near

EXACT = 1e-12
# With -0.2 one product is enough, with -100 (fp64: up to 6 tokens of it) only for short tiles.
FLOORS = [None, -0.2, -100.0]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Log decays between -0.2 and 0."""
    return -0.2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scores_by_loops(x: Tensor, f: Tensor, log_decay: Tensor, strict: bool) -> Tensor:
    """[n, C, C]: each pair's decay is the sum of the log decays of the tokens between, from the definition."""
    n, length, channels = x.shape
    out = torch.zeros(n, length, length, dtype=x.dtype)
    for m in range(n):
        for t in range(length):
            for i in range(t if strict else t + 1):
                for k in range(channels):
                    between = log_decay[m, i + 1 : t if strict else t + 1, k].sum()
                    out[m, t, i] += x[m, t, k] * f[m, i, k] * torch.exp(between)
    return out


def sum_by_loops(scores: Tensor, g: Tensor, log_decay: Tensor) -> Tensor:
    """[n, C, V]."""
    out = torch.zeros_like(g)
    for t in range(g.shape[1]):
        for i in range(t + 1):
            out[:, t] += scores[:, t, i, None] * torch.exp(log_decay[:, i + 1 : t + 1].sum(1)) * g[:, i]
    return out


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_channel_scores_equal_loops(length: int, floor: float | None, strict: bool) -> None:
    """Catches a wrong reference token, a lost block or a wrong filling at any length."""
    x, f, log_decay = random(2, length, 3), random(2, length, 3, seed=2), logs(2, length, 3)
    actual = decayed_scores(x, f, log_decay.cumsum(1), floor=floor, strict=strict)
    assert_near(actual, scores_by_loops(x, f, log_decay, strict), EXACT, "scores")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_scalar_scores_equal_loops(length: int, strict: bool) -> None:
    """Catches a decay matrix that is off by one token."""
    x, f, log_decay = random(2, length, 3), random(2, length, 3, seed=2), logs(2, length)
    expected = scores_by_loops(x, f, log_decay[..., None].expand_as(x), strict)
    assert_near(decayed_scores(x, f, log_decay.cumsum(1), strict=strict), expected, EXACT, "scores")
    ones = torch.ones(2, length, 1, dtype=x.dtype)
    between = scores_by_loops(ones, ones, log_decay[..., None], strict)
    assert_near(decay_matrix(log_decay.cumsum(1), strict=strict), between, EXACT, "decay matrix")


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_decayed_sum_equals_loops(length: int, floor: float | None) -> None:
    """Catches a pair of blocks that is skipped or counted twice, for decays per channel and per token."""
    scores, g, log_decay = random(2, length, length).tril(), random(2, length, 3), logs(2, length, 3)
    actual = decayed_sum(scores, g, log_decay.cumsum(1), floor=floor)
    assert_near(actual, sum_by_loops(scores, g, log_decay), EXACT, "sum per channel")
    per_token = log_decay[..., :1]
    actual = decayed_sum(scores, g, per_token[..., 0].cumsum(1), floor=floor)
    assert_near(actual, sum_by_loops(scores, g, per_token.expand_as(g)), EXACT, "sum per token")


def test_decayed_scores_broadcast_leading_axes() -> None:
    """Several f against one x share x's exponentials: as each alone."""
    x, f, c = random(2, 5, 3), random(4, 2, 5, 3, seed=2), logs(2, 5, 3).cumsum(1)
    together = decayed_scores(x, f, c)
    for n in range(4):
        assert_near(together[n], decayed_scores(x, f[n], c), EXACT, f"f {n}")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("floor", [None, -0.2])
def test_gradients_by_finite_differences(floor: float | None, strict: bool) -> None:
    """Catches a mask that lets the gradient of what lies above the diagonal through."""
    x, f, log_decay = random(1, 5, 2), random(1, 5, 2, seed=2), logs(1, 5, 2)
    leaves = [part.requires_grad_() for part in (x, f, log_decay)]

    def scores(x: Tensor, f: Tensor, log_decay: Tensor) -> Tensor:
        return decayed_scores(x, f, log_decay.cumsum(1), floor=floor, strict=strict)

    def total(x: Tensor, f: Tensor, log_decay: Tensor) -> Tensor:
        return decayed_sum((x @ f.mT).tril(), f, log_decay.cumsum(1), floor=floor)

    assert torch.autograd.gradcheck(scores, leaves)
    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("strict", [False, True])
def test_strong_decays_stay_finite_and_right_in_fp32(length: int, strict: bool) -> None:
    """exp(-c) of a log decay of -1e4 overflows: values and gradients must be finite, and equal fp64's where anything is left."""
    log_decay = logs(2, length, 4, dtype=torch.float32)
    log_decay[0, 3], log_decay[0, length // 2, 1], log_decay[1, 5:9] = -1e4, -1e4, -300.0
    x, f = (random(2, length, 4, seed=s, dtype=torch.float32).requires_grad_() for s in (2, 3))
    log_decay.requires_grad_()
    scores = decayed_scores(x, f, cumulative_log_decay(log_decay, dim=1), strict=strict)
    total = decayed_sum((x @ f.mT).tril(), f, cumulative_log_decay(log_decay, dim=1))
    (scores.square().sum() + total.square().sum()).backward()
    exact = [part.detach().double() for part in (x, f, log_decay)]
    assert_near(scores.detach().double(), scores_by_loops(*exact, strict), 1e-4, "scores")
    assert_near(total.detach().double(), sum_by_loops((exact[0] @ exact[1].mT).tril(), exact[1], exact[2]), 1e-4, "sum")
    for name, leaf in (("x", x), ("f", f), ("log_decay", log_decay)):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all(), f"gradient of {name}"


def test_floor_keeps_the_strongest_declared_decay_in_range() -> None:
    """64 tokens at RWKV-7's strongest decay: one factorised product, in fp32, forward and backward."""
    floor = -math.exp(-0.5)
    x, f = (random(2, 64, 4, seed=s, dtype=torch.float32).requires_grad_() for s in (2, 3))
    c = torch.full((2, 64, 4), floor).cumsum(1).requires_grad_()
    for strict in (False, True):
        fast = decayed_scores(x, f, c, floor=floor, strict=strict)
        assert_near(fast, decayed_scores(x, f, c, strict=strict), 1e-4, "with floor and without")
        fast.square().sum().backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in (x, f, c) if leaf.grad is not None)


@pytest.mark.parametrize("floor", [None, -0.2])
@pytest.mark.parametrize("axes", [2, 3])
def test_the_future_changes_no_bit(floor: float | None, axes: int) -> None:
    """A reference token from the future gives the same numbers with other bits."""
    length = 13
    x, f, log_decay = random(2, length, 3), random(2, length, 3, seed=2), logs(*(2, length, 3)[:axes])

    def outputs(x: Tensor, f: Tensor, log_decay: Tensor) -> list[Tensor]:
        c = cumulative_log_decay(log_decay, dim=1)
        every = [decayed_scores(x, f, c, floor=floor, strict=strict) for strict in (False, True)]
        return [*every, decayed_sum(every[0], f, c, floor=floor)]

    before = outputs(x, f, log_decay)
    for t in range(length):
        other = [part.clone() for part in (x, f, log_decay)]
        other[0][:, t:] += 1.0
        other[1][:, t:] -= 2.0
        other[2][:, t:] *= 0.3
        for old, new in zip(before, outputs(*other), strict=True):
            assert_bitwise(new[:, :t], old[:, :t], f"rows before {t}")


@pytest.mark.parametrize("floor", [None, -0.2])
@pytest.mark.parametrize("axes", [2, 3])
def test_documents_change_no_bit_of_each_other(floor: float | None, axes: int) -> None:
    """A sum of log decays that runs through a document's start rounds by what came before; gradients across it must be finite."""
    length, start = 13, 5
    x, f, log_decay = random(2, length, 3), random(2, length, 3, seed=2), logs(*(2, length, 3)[:axes])
    document = (torch.arange(length) >= start).int().reshape(length, *(1,) * (axes - 2))
    other = torch.arange(length)[:, None] >= start
    foreign = other != other.mT

    def outputs(x: Tensor, f: Tensor, log_decay: Tensor) -> list[Tensor]:
        c = cumulative_log_decay(log_decay, dim=1, document=document)
        every = [decayed_scores(x, f, c, floor=floor, strict=s).masked_fill(foreign, 0.0) for s in (False, True)]
        return [*every, decayed_sum(every[0], f, c, floor=floor)]

    before = outputs(x, f, log_decay)
    alone = [part[:, start:] for part in (x, f, log_decay)]
    c = cumulative_log_decay(alone[2], dim=1)
    for strict, scores in zip((False, True), before, strict=False):
        assert_near(scores[:, start:, start:], decayed_scores(*alone[:2], c, strict=strict), EXACT, "scores of the second")
    scale = 1.0 if floor is not None else 1e4
    leaves = [part.clone().requires_grad_() for part in (x + 1.0, f - 2.0, log_decay * scale)]
    leaves = [torch.cat([new[:, :start], old[:, start:]], 1) for new, old in zip(leaves, (x, f, log_decay), strict=True)]
    for leaf in leaves:
        leaf.retain_grad()
    after = outputs(*leaves)
    for old, new in zip(before, after, strict=True):
        assert_bitwise(new[:, start:], old[:, start:], "the second document")
    sum(part.square().sum() for part in after).backward()  # type: ignore[union-attr]
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


def test_above_the_diagonal_is_exactly_zero() -> None:
    """Scores above the diagonal would leak the future, however small."""
    x, f, c = random(2, 13, 3), random(2, 13, 3, seed=2), logs(2, 13, 3).cumsum(1)
    for floor in FLOORS:
        assert not decayed_scores(x, f, c, floor=floor).triu(1).any()
        assert not decayed_scores(x, f, c, floor=floor, strict=True).triu().any()


def test_cumulative_log_decay_keeps_digits_after_an_underflow() -> None:
    """Summing -1e4 in fp32 would blur every later decay of the tile to 1e-3."""
    log_decay = torch.tensor([-0.1, -1e4, -1e-3, -2e-3])
    c = cumulative_log_decay(log_decay, dim=0)
    assert (c[1] - c[0]).exp() == 0
    assert_near((c[3] - c[1]).double(), torch.tensor(-3e-3, dtype=torch.float64), 2e-5, "log decay of the last two tokens")


def test_positive_floor_is_refused() -> None:
    """A floor above 0 is a decay given as a factor instead of its logarithm."""
    x, c = random(1, 4, 2), logs(1, 4, 2)
    with pytest.raises(ValueError, match=r"most negative log decay .* got 0\.5"):
        decayed_scores(x, x, c, floor=0.5)
