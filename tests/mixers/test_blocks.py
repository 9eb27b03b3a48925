"""Following documents and padding, and the parts around a recurrence, each against an independent computation.

Axis legend: B batch, T time, C channels, W width of a convolution.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.mixers.blocks import HeadNorm, LowRank, ShortConvolution, draw_time_steps, l2_normalize, shift_back
from recollect.mixers.stream import NONE, Stream, follow

CPU = torch.device("cpu")
# Three documents; two pads, two documents; padding after one token of the first document.
IDS = torch.tensor([[1, 1, 2, 2, 2, 5], [3, 3, 3, 3, 9, 9], [4, 4, 4, 4, 4, 4]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]])
STARTS = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("cuts", [[], [1], [2], [3], [5], [1, 2, 3, 4, 5]])
def test_stream_follows_documents_and_padding(cuts: list[int]) -> None:
    """Prevents a document's start (or a position) that depends on where the sequence was cut, or on padding."""
    stream: Stream | None = None
    edges = [0, *cuts, 6]
    positions, resets = [], []
    for start, stop in itertools.pairwise(edges):
        piece = slice(start, stop)
        steps = follow(stream, stop - start, 3, CPU, MASK[:, piece], IDS[:, piece])
        assert steps.valid is not None
        assert torch.equal(steps.valid, MASK[:, piece])
        assert steps.reset is not None
        positions.append(steps.positions)
        resets.append(steps.reset)
        stream = steps.stream
    assert torch.equal(torch.cat(positions, 1), POSITIONS)
    assert torch.equal(torch.cat(resets, 1), STARTS)
    assert stream is not None
    assert stream.position.tolist() == [1, 2, 1]
    assert stream.document.tolist() == [5, 9, 4]


def test_stream_without_documents_goes_on() -> None:
    """Prevents a second call that starts a document anew, and masks where nothing is masked."""
    steps = follow(None, 4, 2, CPU, None, None)
    assert (steps.valid, steps.reset) == (None, None)
    assert steps.positions.tolist() == [0, 1, 2, 3]
    steps = follow(steps.stream, 2, 2, CPU, None, None)
    assert (steps.valid, steps.reset) == (None, None)
    assert steps.positions.tolist() == [[4, 5], [4, 5]]
    steps = follow(steps.stream, 2, 2, CPU, None, torch.tensor([[0, 0], [0, 7]]))
    assert steps.reset is not None
    assert steps.reset.tolist() == [[False, False], [False, True]]
    assert steps.positions.tolist() == [[6, 7], [6, 0]]


def test_stream_of_padding_alone_has_not_begun() -> None:
    """Prevents a piece of padding from counting as the first document."""
    steps = follow(None, 3, 1, CPU, torch.zeros(1, 3, dtype=torch.bool), None)
    assert (steps.stream.position.tolist(), steps.stream.document.tolist()) == ([0], [NONE])
    steps = follow(steps.stream, 2, 1, CPU, None, torch.tensor([[8, 8]]))
    assert steps.reset is not None
    assert not steps.reset.any()
    assert steps.positions.tolist() == [[0, 1]]


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 3, 4, 5]])
def test_convolution_equals_conv1d_of_each_document(width: int, cuts: list[int]) -> None:
    """Prevents taps in reversed order, inputs of another document or of padding, and a cache that forgets."""
    torch.manual_seed(0)
    conv = ShortConvolution(3, width, bias=True).double()
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    pieces, cached, edges = [], conv.init_state(3), [0, *cuts, 6]
    for start, stop in itertools.pairwise(edges):
        piece = slice(start, stop)
        y, cached = conv(x[:, piece], cached, MASK[:, piece], STARTS[:, piece])
        pieces.append(y)
    y = torch.cat(pieces, 1)

    def alone(document: Tensor) -> Tensor:
        padded = F.pad(document.T[None], (width - 1, 0))
        return F.silu(F.conv1d(padded, conv.weight[:, None], conv.bias, groups=3))[0].T

    for row, start, stop in ((0, 0, 2), (0, 2, 5), (0, 5, 6), (1, 2, 4), (1, 4, 6), (2, 5, 6)):
        torch.testing.assert_close(y[row, start:stop], alone(x[row, start:stop]), atol=1e-14, rtol=0)


@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 3, 4, 5]])
def test_shift_back_stays_in_the_document(cuts: list[int]) -> None:
    """Prevents a document's first token from seeing the last one of the document before."""
    x = torch.arange(1.0, 7.0)[None, :, None].expand(3, 6, 1)
    pieces, cached, edges = [], torch.zeros(3, 1, 1), [0, *cuts, 6]
    for start, stop in itertools.pairwise(edges):
        piece = slice(start, stop)
        y, cached = shift_back(x[:, piece], cached, MASK[:, piece], STARTS[:, piece])
        pieces.append(y)
    expected = [[0.0, 1, 0, 3, 4, 0], [0.0, 0, 0, 3, 0, 5], [0.0, 0, 0, 0, 0, 0]]
    assert torch.cat(pieces, 1)[..., 0].tolist() == expected


def test_low_rank_starts_as_its_bias() -> None:
    """Prevents gates that start anywhere but where the paper puts them."""
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert (LowRank(4, 2, 3, bias=[1.0, 2.0, 3.0])(x) == torch.tensor([1.0, 2.0, 3.0])).all()
    assert (LowRank(4, 2, 3, bias=-0.5, activation="tanh")(x) == -0.5).all()
    assert LowRank(4, 2, 3, bias=None, activation="sigmoid", gain=1.0)(x).std() > 0.1


def test_head_norm_equals_rms_norm() -> None:
    """Prevents a norm over the wrong axis, a gate inside of it, or a lost weight."""
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    norm = HeadNorm(5, eps=1e-3, gate="sigmoid").double()
    nn.init.uniform_(norm.weight)  # type: ignore[arg-type]
    expected = F.rms_norm(x, (5,), norm.weight, eps=1e-3)
    torch.testing.assert_close(norm(x), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(norm(x, gate), expected * gate.sigmoid(), atol=1e-14, rtol=0)
    assert HeadNorm(5, affine=False).weight is None


def test_l2_normalize_is_smooth_at_zero() -> None:
    """Prevents a NaN gradient from a key of zeros (padding, a silent channel)."""
    x = torch.zeros(1, 4, requires_grad=True)
    l2_normalize(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    unit = l2_normalize(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8]]))


def test_time_steps_are_log_uniform() -> None:
    """Prevents a wrong inverse of softplus."""
    torch.manual_seed(0)
    bias = torch.empty(20_000)
    draw_time_steps(bias, low=1e-3, high=0.1)
    steps = F.softplus(bias)
    assert 1e-3 * 0.999 < steps.min() < steps.max() < 0.1 * 1.001
    assert abs(steps.log10().mean() + 2) < 0.01
