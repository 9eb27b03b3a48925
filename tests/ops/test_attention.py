"""Softmax attention, rotary positions and differential attention against loops written from their definitions."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from recollect.ops import differential_attention, rotary, softmax_attention
from recollect.ops.attention import visible
from tests.ops import naive

EXACT = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_by_loops(
    q: Tensor, k: Tensor, *, scale: float | None = None, start: Tensor | None = None, window: int | None = None
) -> Tensor:
    """[B, H, T, S]: exp(scale q_i . k_j) over the visible keys, normalised; query t stands at position S - T + t."""
    n_rows, n_queries, n_heads = q.shape[:3]
    n_keys, repeat = k.shape[1], q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weights = torch.zeros(n_rows, n_heads, n_queries, n_keys, dtype=q.dtype)
    for b in range(n_rows):
        for m in range(n_heads):
            for t in range(n_queries):
                position = n_keys - n_queries + t
                first = 0 if start is None else int(start[b, t])
                if window is not None:
                    first = max(first, position - window + 1)
                seen = range(first, position + 1)
                powers = {j: torch.exp(scale * (q[b, t, m] @ k[b, j, m // repeat])) for j in seen}
                total = sum(powers.values())
                for j, power in powers.items():
                    weights[b, m, t, j] = power / total
    return weights


def attention_by_loops(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return naive.weighted_values(weights_by_loops(q, k, **options), v)  # type: ignore[arg-type]


STARTS = torch.tensor([[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 4, 4, 4]])
OPTIONS = [
    {},
    {"scale": 0.2},
    {"window": 1},
    {"window": 3},
    {"window": 7},
    {"window": 100},
    {"start": STARTS},
    {"start": STARTS, "window": 2, "scale": 1.3},
]


@pytest.mark.parametrize("n_kv", [4, 2, 1])
@pytest.mark.parametrize("n_queries", [7, 3, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_softmax_attention_equals_the_loops(options: dict[str, object], n_queries: int, n_kv: int) -> None:
    """Prevents wrong causal offsets with few queries, window off by one, wrong GQA pairing, wrong scale; gradients too."""
    inputs = [random(2, n_queries, 4, 3), random(2, 7, n_kv, 3, seed=1), random(2, 7, n_kv, 5, seed=2)]
    if "start" in options:
        options = {**options, "start": STARTS[:, 7 - n_queries :]}
    results = []
    for run in (softmax_attention, attention_by_loops):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = run(*leaves, **options)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for name, a, b in zip("oqkv", *results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_softmax_attention_takes_large_logits() -> None:
    """Prevents overflow: logits of a thousand give one-hot weights, not NaN."""
    q = torch.full((1, 4, 1, 1), 1000.0)
    k = torch.tensor([1.0, 3.0, 2.0, 0.0]).view(1, 4, 1, 1)
    v = torch.arange(4.0).view(1, 4, 1, 1)
    assert softmax_attention(q, k, v).flatten().tolist() == [0.0, 1.0, 1.0, 1.0]


def test_softmax_attention_dropout_keeps_the_mean() -> None:
    """Prevents dropout that is ignored or not rescaled: the mean of 400 draws is the plain output within 5 standard errors."""
    q, k, v = random(1, 5, 2, 4), random(1, 5, 2, 4, seed=1), random(1, 5, 2, 4, seed=2)
    runs = torch.stack([softmax_attention(q, k, v, dropout_p=0.25) for _ in range(400)])
    assert runs.std(0).max() > 0.1
    assert ((runs.mean(0) - softmax_attention(q, k, v)).abs() / (runs.std(0) / 20 + 1e-12)).max() < 5


def test_visible_is_causal_windowed_and_cut() -> None:
    """Prevents an off-by-one in the mask that everything shares: all positions, all windows, brute force."""
    for window in (None, 1, 2, 5):
        seen = visible(3, 5, start=torch.tensor([[0, 2, 4]]), window=window)
        assert seen.shape == (1, 1, 3, 5)
        for t, first in enumerate([0, 2, 4]):
            for j in range(5):
                expected = first <= j <= t + 2 and (window is None or t + 2 - j < window)
                assert bool(seen[0, 0, t, j]) == expected, (window, t, j)


# --- rotary positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
def test_rotary_equals_complex_rotation(theta: float) -> None:
    """Prevents halves instead of interleaved pairs, a wrong exponent, or the opposite direction."""
    x, positions = random(2, 4, 3, 6), torch.tensor([[0, 1, 2, 3], [7, 8, 9, 1000]])
    actual = rotary(x, positions, theta=theta)
    for b in range(2):
        for t in range(4):
            for c in range(3):
                turn = cmath.exp(1j * int(positions[b, t]) * theta ** (-2 * c / 6))
                for m in range(3):
                    expected = complex(x[b, t, m, 2 * c], x[b, t, m, 2 * c + 1]) * turn
                    assert abs(complex(actual[b, t, m, 2 * c], actual[b, t, m, 2 * c + 1]) - expected) < 1e-11
    torch.testing.assert_close(rotary(x, positions[0]), rotary(x, positions[:1].expand(2, -1)), rtol=0, atol=0)


def test_rotary_products_depend_on_the_distance_alone() -> None:
    """Prevents absolute positions from leaking into the scores: what makes left padding and decoding offsets harmless."""
    q, k, positions = random(1, 5, 2, 8), random(1, 5, 2, 8, seed=1), torch.arange(5)

    def products(shift: int) -> Tensor:
        return torch.einsum("bihk,bjhk->bhij", rotary(q, positions + shift), rotary(k, positions + shift))

    torch.testing.assert_close(products(40), products(0), rtol=0, atol=1e-11)
    assert (products(0) - torch.einsum("bihk,bjhk->bhij", q, k)).abs().max() > 0.1


def test_rotary_is_computed_in_fp32_for_bf16() -> None:
    """Prevents angles in bf16, which are wrong by whole turns after a few hundred tokens."""
    x, positions = random(1, 4, 1, 8).bfloat16(), torch.tensor([0, 500, 1001, 4093])
    rounded = rotary(x, positions)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), rotary(x.double(), positions), rtol=2**-8, atol=2e-3)


def test_rotary_refuses_an_odd_head_dim() -> None:
    """Prevents a channel that silently never turns."""
    with pytest.raises(ValueError, match="must be even, got 5"):
        rotary(random(1, 2, 1, 5), torch.arange(2))


# --- differential attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("n_groups", [4, 2, 1])
@pytest.mark.parametrize("n_queries", [6, 2])
def test_differential_attention_equals_the_loops(version: int, n_groups: int, n_queries: int) -> None:
    """Prevents wrong pairing of heads, keys and values (4 pairs), and lambda at the wrong map: outputs and gradients."""
    n_key_heads, v_dim = (2 * n_groups, 6) if version == 1 else (n_groups, 3)
    inputs = [
        random(2, n_queries, 8, 3),
        random(2, 6, n_key_heads, 3, seed=1),
        random(2, 6, n_groups, v_dim, seed=2),
        random(2, n_queries, 4, seed=3),
    ]

    def by_loops(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        heads = []
        for m in range(4):
            group = m // (4 // n_groups)
            maps = [
                weights_by_loops(
                    q[:, :, [2 * m + side]], k[:, :, [2 * group + side if version == 1 else group]], start=starts, scale=0.7
                )
                for side in (0, 1)
            ]
            difference = maps[0] - lam[:, None, :, m, None] * maps[1]
            heads.append(torch.einsum("bij,bjv->biv", difference[:, 0], v[:, :, group]))
        return torch.stack(heads, dim=2)

    starts = STARTS[:, 6 - n_queries : 6]
    results = []
    for run in (lambda *t: differential_attention(*t, start=starts, scale=0.7), by_loops):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = run(*leaves)
        assert out.shape == (2, n_queries, 4, v_dim)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for name, a, b in zip(("out", "q", "k", "v", "lam"), *results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_differential_attention_without_lambda_is_the_first_map() -> None:
    """Prevents a lambda that does not broadcast: a number per head, or zero."""
    q, k, v = random(1, 5, 4, 3), random(1, 5, 2, 3, seed=1), random(1, 5, 2, 3, seed=2)
    torch.testing.assert_close(
        differential_attention(q, k, v, torch.zeros(2, dtype=torch.float64)),
        softmax_attention(q[:, :, ::2], k, v),
        rtol=0,
        atol=EXACT,
    )
    lam = torch.tensor([0.3, -0.5], dtype=torch.float64)
    torch.testing.assert_close(
        differential_attention(q, k, v, lam),
        differential_attention(q, k, v, lam.expand(1, 5, 2)),
        rtol=0,
        atol=0,
    )


# --- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 5, 4, 3), (1, 5, 4, 2), (1, 5, 4, 3)), "share the key dim: q has K=3, k has K=2"),
        (((1, 5, 4, 3), (1, 5, 3, 3), (1, 5, 3, 3)), "4 query heads, 3 key-value heads"),
        (((1, 6, 4, 3), (1, 5, 4, 3), (1, 5, 4, 3)), "T=6 exceeds S=5"),
        (((1, 5, 4, 3), (1, 5, 4, 3), (1, 6, 4, 3)), "k and v also length and heads"),
        (((2, 5, 4, 3), (1, 5, 4, 3), (1, 5, 4, 3)), "must share the batch"),
        (((5, 4, 3), (5, 4, 3), (5, 4, 3)), r"q, k, v are \[B, T, H, K\]"),
    ],
)
def test_softmax_attention_names_bad_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    """Prevents shapes that broadcast into nonsense."""
    with pytest.raises(ValueError, match=message):
        softmax_attention(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("heads", "message"),
    [((3, 3, 3), "must be even, got 3"), ((4, 1, 2), "q 4, k 1, v 2 heads"), ((8, 3, 3), "q 8, k 3, v 3 heads")],
)
def test_differential_attention_names_bad_heads(heads: tuple[int, int, int], message: str) -> None:
    """Prevents heads that pair across groups."""
    q, k, v = (torch.zeros(1, 4, n, 2) for n in heads)
    with pytest.raises(ValueError, match=message):
        differential_attention(q, k, v, torch.zeros(()))
