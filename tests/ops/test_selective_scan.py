"""Mamba's selective scan: the token loop against the recurrence as printed, the tiles against the token loop, and the laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.ops import selective_scan as module
from recollect.ops.selective_scan import selective_scan
from tests.laws import assert_bitwise, assert_near

EXACT = 1e-12
B, D, N = 2, 3, 4
TILES = [1, 3, 16, 64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(length: int) -> dict[str, Tensor]:
    """x, dt, b, c per token, A and skip."""
    return {
        "x": random(B, length, D, seed=1),
        "dt": random(B, length, D, seed=2).exp(),
        "A": -random(D, N, seed=3).exp(),
        "b": random(B, length, N, seed=4),
        "c": random(B, length, N, seed=5),
        "skip": random(D, seed=6),
    }


PER_TOKEN = ("x", "dt", "b", "c")


def pieces(tokens: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[:, start:stop] if name in PER_TOKEN else x for name, x in tokens.items()}


def changed(tokens: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """Other content at the tokens `where` (bool [B, T]); steps stay positive."""
    new = {name: x * 1.7 + (0.0 if name == "dt" else 0.2) for name, x in tokens.items()}
    return {name: torch.where(where[..., None], new[name], x) if name in PER_TOKEN else x for name, x in tokens.items()}


def masks(length: int) -> tuple[Tensor, Tensor]:
    """Resets at the start, next to each other and in the middle; padding at the left, in the middle and on a reset."""
    reset, valid = torch.zeros(B, length, dtype=torch.bool), torch.ones(B, length, dtype=torch.bool)
    reset[0, [0, 4, 5]] = True
    reset[1, [7, length - 1]] = True
    valid[1, :3], valid[0, 8], valid[1, 7], valid[0, length - 2 :] = False, False, False, False
    return reset, valid


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments in a short sequence."""
    monkeypatch.setattr(module, "SEGMENT", 8)


def test_token_loop_follows_the_recurrence() -> None:
    """Every channel and state entry on its own, from the definition."""
    length = 6
    tokens, state = inputs(length), random(B, D, N, seed=7)
    x, dt, A, b, c, skip = tokens.values()
    y, end = selective_scan(**tokens, state=state, backend="sequential")
    for row in range(B):
        for d in range(D):
            expected = [float(skip[d] * x[row, t, d]) for t in range(length)]
            for n in range(N):
                h = float(state[row, d, n])
                for t in range(length):
                    h = h * float(torch.exp(dt[row, t, d] * A[d, n])) + float(dt[row, t, d] * b[row, t, n] * x[row, t, d])
                    expected[t] += h * float(c[row, t, n])
                assert abs(float(end[row, d, n]) - h) < EXACT
            assert_near(y[row, :, d], torch.tensor(expected, dtype=torch.float64), EXACT, "y")


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("tile", TILES)
def test_tiles_equal_the_token_loop(tile: int) -> None:
    """With and without state, skip, resets and padding."""
    length = 19
    tokens, (reset, valid) = inputs(length), masks(length)
    for state in (None, random(B, D, N, seed=7)):
        for options in ({}, {"reset": reset}, {"valid": valid}, {"reset": reset, "valid": valid}, {"skip": None}):
            given = {**tokens, **options}
            y, end = selective_scan(**given, state=state, tile=tile, backend="chunked")
            expected, expected_end = selective_scan(**given, state=state, backend="sequential")
            assert_near(y, expected, EXACT, f"y, {list(options)}")
            assert_near(end, expected_end, EXACT, f"state, {list(options)}")


@pytest.mark.usefixtures("short_segments")
def test_gradients_equal_those_of_the_token_loop() -> None:
    """Every input and the carried state, through y and the final state; recomputed segments included."""
    length = 19
    reset, valid = masks(length)
    gradients = []
    for options in ({"backend": "chunked", "tile": 4}, {"backend": "sequential"}):
        leaves = {**inputs(length), "state": random(B, D, N, seed=7)}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        y, end = selective_scan(**leaves, reset=reset, valid=valid, **options)
        loss = (y * random(*y.shape, seed=8)).sum() + (end * random(*end.shape, seed=9)).sum()
        gradients.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    for name, expected in gradients[1].items():
        assert_near(gradients[0][name], expected, 1e-11, f"gradient of {name}")
        if name in PER_TOKEN:
            assert not gradients[0][name][~valid].any(), f"padding has a gradient in {name}"


def test_gradients_by_finite_differences() -> None:
    """The tiles against numbers, so that both forms cannot share a wrong gradient."""
    tokens = {name: x.requires_grad_() for name, x in inputs(4).items()}

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*leaves, tile=3, backend="chunked")

    assert torch.autograd.gradcheck(run, list(tokens.values()))


@pytest.mark.parametrize("cuts", [[1], [7], [3, 4, 11], list(range(1, 19))])
def test_split_law(cuts: list[int]) -> None:
    """Pieces with carried state, inside tiles and token by token, equal one call."""
    length = 19
    tokens, (reset, valid) = inputs(length), masks(length)
    y, end = selective_scan(**tokens, reset=reset, valid=valid, tile=5)
    state, outputs = None, []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        here = slice(start, stop)
        part, state = selective_scan(
            **pieces(tokens, start, stop), state=state, reset=reset[:, here], valid=valid[:, here], tile=5
        )
        outputs.append(part)
    assert_near(torch.cat(outputs, 1), y, EXACT, "y")
    assert state is not None
    assert_near(state, end, EXACT, "state")


def test_the_future_changes_no_bit() -> None:
    """Causality, atol = 0."""
    length = 13
    tokens, position = inputs(length), torch.arange(length).expand(B, length)
    for tile in (4, 64):
        y, _ = selective_scan(**tokens, tile=tile)
        for t in (0, 1, 3, 4, 6, 12):
            other, _ = selective_scan(**changed(tokens, position >= t), tile=tile)
            assert_bitwise(other[:, :t], y[:, :t], f"rows before {t}")
            assert (other[:, t] - y[:, t]).abs().max() > 1e-6, f"row {t} does not depend on token {t}"


def test_other_rows_change_no_bit() -> None:
    """Batch independence, atol = 0."""
    tokens, row = inputs(11), torch.tensor([[False], [True]]).expand(B, 11)
    y, end = selective_scan(**tokens, tile=4)
    other, other_end = selective_scan(**changed(tokens, row), tile=4)
    assert_bitwise(other[0], y[0], "row 0")
    assert_bitwise(other_end[0], end[0], "state of row 0")


@pytest.mark.parametrize("backend", ["chunked", "sequential"])
def test_padding_is_the_identity(backend: str) -> None:
    """Its content, NaN included, changes no bit; its output is 0; the rest equals the row without it."""
    length = 12
    tokens, (_, valid), state = inputs(length), masks(length), random(B, D, N, seed=7)
    y, end = selective_scan(**tokens, state=state, valid=valid, tile=5, backend=backend)
    poisoned = {n: x.masked_fill(~valid[..., None], torch.nan) if n in PER_TOKEN else x for n, x in tokens.items()}
    other, other_end = selective_scan(**poisoned, state=state, valid=valid, tile=5, backend=backend)
    assert_bitwise(other, y, "y with NaN at padding")
    assert_bitwise(other_end, end, "state with NaN at padding")
    assert not y[~valid].any(), "output at padding"
    for row in range(B):
        real = {n: x[row : row + 1, valid[row]] if n in PER_TOKEN else x for n, x in tokens.items()}
        alone, alone_end = selective_scan(**real, state=state[row : row + 1], tile=5, backend=backend)
        assert_near(y[row, valid[row]], alone[0], EXACT, f"row {row} without padding")
        assert_near(end[row], alone_end[0], EXACT, f"state of row {row}")


@pytest.mark.parametrize("backend", ["chunked", "sequential"])
def test_resets_isolate_documents(backend: str) -> None:
    """After a reset inside a tile everything equals a call that starts there, and no bit depends on what was before."""
    length, start = 13, 6
    tokens, state = inputs(length), random(B, D, N, seed=7)
    reset = torch.zeros(B, length, dtype=torch.bool)
    reset[:, start] = True
    y, end = selective_scan(**tokens, state=state, reset=reset, tile=5, backend=backend)
    alone, alone_end = selective_scan(**pieces(tokens, start, length), tile=5, backend=backend)
    assert_near(y[:, start:], alone, EXACT, "the second document")
    assert_near(end, alone_end, EXACT, "state")
    before = changed(tokens, torch.arange(length).expand(B, length) < start)
    other, _ = selective_scan(**before, reset=reset, tile=5, backend=backend)
    assert_bitwise(other[:, start:], y[:, start:], "after another first document and state")


def test_strong_decays_stay_finite_in_fp32() -> None:
    """Steps that forget everything next to tiny ones, forward and backward."""
    length = 40
    exact = inputs(length)
    exact["dt"] = exact["dt"] * 1e-3
    exact["dt"][0, 5], exact["A"][0, 0] = 1e3, -50.0
    tokens = {name: x.float().requires_grad_() for name, x in exact.items()}
    y, end = selective_scan(**tokens)
    assert_near(y.detach().double(), selective_scan(**exact, backend="sequential")[0], 1e-5, "y")
    (y.square().sum() + end.square().sum()).backward()
    for name, leaf in tokens.items():
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all(), f"gradient of {name}"


def test_dtypes_and_state_shape() -> None:
    """Half precision in and out, the state in fp32."""
    for backend in ("chunked", "sequential"):
        y, end = selective_scan(**{name: x.to(torch.bfloat16) for name, x in inputs(5).items()}, backend=backend)
        assert (y.shape, y.dtype) == ((B, 5, D), torch.bfloat16)
        assert (end.shape, end.dtype) == ((B, D, N), torch.float32)


def test_errors_say_what_to_do() -> None:
    """Wrong shapes and names stop at the border, with the value and what is accepted."""
    tokens = inputs(4)
    with pytest.raises(ValueError, match=r"A must be \[D, N\] with D = 3 as in x; got \(4, 3\)"):
        selective_scan(**{**tokens, "A": tokens["A"].mT})
    with pytest.raises(ValueError, match=r"b must have shape \(2, 4, 4\); got \(2, 4, 3\)"):
        selective_scan(**{**tokens, "b": tokens["x"]})
    with pytest.raises(ValueError, match=r"state must have shape \(2, 3, 4\)"):
        selective_scan(**tokens, state=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"unknown backend 'fast'"):
        selective_scan(**tokens, backend="fast")
