"""Attention maps on the page are what the layers compute, at every stage, however the rows are cut."""

from __future__ import annotations

import math

import pytest
import torch

from recollect.inspection import maps
from recollect.inspection.maps import attend
from recollect.mixers import build

LENGTH = 21


def layer(name: str, **options):
    """A mixer in fp64 with kernels that are no identity, and an input."""
    mixer = build(name, dim=16, n_heads=4, **options).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer, torch.randn(1, LENGTH, 16, dtype=torch.float64)


def stages(mixer, x) -> dict[str, torch.Tensor]:
    """Every stage, unpooled, with 0 for what is not visible."""
    found = attend(mixer, x, side=LENGTH)
    assert found is not None
    assert all(one.block == 1 for one in found.maps)
    return {one.stage: one.values.nan_to_num(0.0) for one in found.maps}


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions as multiplication by complex numbers; x [T, H, K]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    rates = theta ** (-torch.arange(pairs.shape[-1], dtype=torch.float64) * 2 / x.shape[-1])
    turns = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(len(x), dtype=torch.float64)[:, None] * rates)
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def raw_logits(mixer, x: torch.Tensor) -> torch.Tensor:
    """q.k / sqrt(K) [H, T, T], 0 after the query."""
    project, theta = mixer.project, mixer.config.rope_theta
    q = rotated((x[0] @ project.q.weight.T).unflatten(-1, (project.n_heads, -1)), theta)
    k = rotated((x[0] @ project.k.weight.T).unflatten(-1, (project.n_kv_heads, -1)), theta)
    k = k.repeat_interleave(project.n_heads // project.n_kv_heads, dim=1)
    return (torch.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])).tril()


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}], ids=str)
def test_attention_equals_a_plain_softmax(options) -> None:
    """Prevents a map of unrotated queries, of another scale, or of the wrong key head."""
    mixer, x = layer("attention", **options)
    found, logits = stages(mixer, x), raw_logits(mixer, x)
    plain = torch.full_like(logits, -math.inf).triu(1).add(logits).softmax(-1)
    torch.testing.assert_close(found["logits"], logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(found["softmax"], plain, atol=1e-12, rtol=0)


def test_entropy_and_first_weight_equal_their_definitions() -> None:
    """Prevents an entropy in nats, or one with nan where a weight is zero."""
    mixer, x = layer("attention")
    found, plain = attend(mixer, x, side=LENGTH), stages(mixer, x)["softmax"]
    entropy = [[-sum(p * math.log2(p) for p in row.tolist() if p > 0) for row in head] for head in plain]
    assert found is not None
    torch.testing.assert_close(found.entropy, torch.tensor(entropy, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.first, plain[..., 0], atol=0, rtol=0)


def test_convolved_logits_equal_the_papers_sum() -> None:
    """Prevents a stage that is shown before its convolution, or with the kernel turned (arXiv 2504.00927, Eq. 5)."""
    mixer, x = layer("mta", c_q=3, c_k=5)
    found, raw, kernel = stages(mixer, x), raw_logits(mixer, x), mixer.kq_pre
    expected = torch.zeros_like(raw)
    for h in range(4):
        for i in range(LENGTH):
            for j in range(i + 1):
                for a in range(min(3, i + 1)):
                    for b in range(-2, 3):
                        if 0 <= j + b < LENGTH:
                            expected[h, i, j] += kernel[h, 2 - a, 2 + b].item() * raw[h, i - a, j + b]
    torch.testing.assert_close(found["convolved"], expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(
        found["mixed"], torch.einsum("oi,its->ots", mixer.head_pre[0].detach(), expected), atol=1e-11, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("mta", {}, "post_mixed"),
        ("mta", {"pad_key": "left", "c_q": 4, "c_k": 4}, "post_mixed"),
        ("mta", {"pad_key": "right", "c_q": 2, "c_k": 3, "n_kv_heads": 2}, "post_mixed"),
        ("mta", {"merged": True, "c_h": 2, "c_q": 3, "c_k": 3}, "post_convolved"),
        ("mta_v1", {}, "post_mixed"),
        ("mta_toy", {}, "softmax"),
        ("talking_heads", {}, "post_mixed"),
        ("sliding_window", {"window": 5}, "softmax"),
        ("diff", {}, "difference"),
        ("diff", {"n_kv_heads": 2}, "difference"),
        ("diff_v2", {"n_kv_heads": 2}, "difference"),
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [1, 400, 1 << 24])
def test_last_stage_is_what_values_are_read_with(monkeypatch, name: str, options, last: str, at_once: int) -> None:
    """Prevents rows lost where blocks of rows meet, and stages in another order than the layer's: `Mixer.maps` reads one-hot values
    through the op itself."""
    mixer, x = layer(name, **options)
    monkeypatch.setattr(maps, "NUMBERS_AT_ONCE", at_once)
    found = stages(mixer, x)
    assert list(found)[-1] == last
    with torch.no_grad():
        whole = list(mixer.maps(x).values())[-1][0]
    torch.testing.assert_close(found[last], whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize(("name", "options"), [("mta", {}), ("sliding_window", {"window": 4})])
def test_cells_pool_the_visible_entries(name: str, options, pool: str) -> None:
    """Prevents later keys, or keys out of the window, from being counted as zeros, and a strong negative weight from vanishing."""
    mixer, x = layer(name, **options)
    fine, coarse = attend(mixer, x, side=LENGTH), attend(mixer, x, side=6, pool=pool)
    assert fine is not None
    assert coarse is not None
    for small, large in zip(fine.maps, coarse.maps, strict=True):
        assert large.block == 4
        assert large.values.shape == (4, 6, 6)
        for h, row, col in torch.cartesian_prod(torch.arange(4), torch.arange(6), torch.arange(6)).tolist():
            cell = small.values[h, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            some = cell[~cell.isnan()]
            shown = large.values[h, row, col]
            if not len(some):
                assert shown.isnan()
            elif pool == "mean":
                torch.testing.assert_close(shown, some.mean())
            else:
                strongest = some.max() if small.stage in maps.LOGITS else some[some.abs().argmax()]
                assert shown == strongest


def test_top_keys_are_the_weights_farthest_from_zero() -> None:
    """Prevents keys of another head, and negative weights that are overlooked."""
    mixer, x = layer("mta")
    found, last = attend(mixer, x, side=4), stages(mixer, x)["post_mixed"]
    assert found is not None
    for h, t in ((0, 0), (1, 3), (3, LENGTH - 1)):
        row = last[h, t, : t + 1]
        n = min(maps.N_TOP, t + 1)
        best = row.abs().argsort(descending=True)[:n]
        assert found.keys[h, t, :n].tolist() == best.tolist()
        assert found.keys[h, t, n:].tolist() == [-1] * (maps.N_TOP - n)
        torch.testing.assert_close(found.weights[h, t, :n], row[best].float())


def test_unknown_pool_is_refused() -> None:
    """Prevents a misspelt pool from meaning another one."""
    mixer, x = layer("attention")
    with pytest.raises(ValueError, match="pool is one of max, mean; got 'sum'"):
        attend(mixer, x, side=4, pool="sum")
