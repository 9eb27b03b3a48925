"""A kernel is called what it is."""

from __future__ import annotations

import pytest
import torch

from recollect.inspection.kernels import NAMED, head_pattern, kernels, pattern
from recollect.mixers import build
from recollect.mixers.multi_token import init_kernel

C_Q, C_K, ORIGIN = 4, 7, 3


def kernel(entries: dict[tuple[int, int], float]) -> torch.Tensor:
    """Entries by (queries back, keys to the right)."""
    made = torch.zeros(C_Q, C_K)
    for (back, right), value in entries.items():
        made[C_Q - 1 - back, ORIGIN + right] = value
    return made


CASES = {
    "zero": {},
    "identity": {(0, 0): 2.0, (1, 1): 0.2},
    "identity, negative": {(0, 0): -1.0},
    "diagonal": {(0, 0): 1.0, (1, -1): 0.8, (2, -2): 0.6, (1, 2): 0.4},
    "priming": {(0, 0): 1.0, (1, 0): 0.7, (3, 0): 0.5, (0, 1): 0.3},
    "suppression": {(0, 0): 1.0, (1, 0): -0.7, (2, 0): -0.5},
    "edge": {(0, 0): 1.0, (0, 1): -0.8, (0, -1): 0.1},
    "blur": {(0, 0): -1.0, (0, 1): -0.8, (0, -1): -0.7},
    "mixed": {(0, 0): 1.0, (1, -1): 0.5, (2, 0): 0.5, (0, 2): 0.5},
}


@pytest.mark.parametrize("name", CASES)
def test_pattern_of_a_kernel(name: str) -> None:
    """Prevents rows read from the wrong end, which would call a diagonal its mirror image."""
    assert pattern(kernel(CASES[name]), ORIGIN).name == name


def test_mirrored_diagonal_is_no_diagonal() -> None:
    """Prevents "the same phrase" from being said of a key that comes later the earlier the query is."""
    assert pattern(kernel({(0, 0): 1.0, (1, 1): 0.8, (2, 2): 0.6}), ORIGIN).name == "mixed"


def test_a_pattern_needs_the_documented_share() -> None:
    """Prevents a threshold other than the one that the page states."""
    for share in (NAMED - 0.02, NAMED + 0.02):
        found = pattern(kernel({(0, 0): 1.0, (1, 0): share**0.5, (2, 2): (1 - share) ** 0.5}), ORIGIN)
        assert found.name == ("priming" if share > NAMED else "mixed")
        assert found.share == pytest.approx(share if share > NAMED else 0.5, abs=1e-6)


@pytest.mark.parametrize(("matrix", "name"), [
    ([[1.0, 0.1], [0.0, 0.9]], "identity"),
    ([[1.0, -0.7], [0.1, 1.0]], "contrast"),
    ([[1.0, 0.7], [-0.1, 1.0]], "mixing"),
    ([[0.0, 0.0], [0.0, 0.0]], "zero"),
])  # fmt: skip
def test_pattern_of_head_mixing(matrix: list[list[float]], name: str) -> None:
    """Prevents a difference of heads from passing as their sum."""
    assert head_pattern(torch.tensor(matrix)).name == name


@pytest.mark.parametrize(("pad_key", "c_k"), [("both", 5), ("left", 4), ("right", 4)])
def test_layers_know_their_origin(pad_key: str, c_k: int) -> None:
    """Prevents a fresh kernel of a layer that pads on one side from being anything but the identity."""
    mixer = build("mta", dim=16, n_heads=4, pad_key=pad_key, c_q=3, c_k=c_k)
    found = kernels(mixer)
    assert [one.kind for one in found] == ["kq_pre"] * 4 + ["head_pre"] + ["kq_post"] * 4 + ["head_post"]
    assert {one.pattern.name for one in found} == {"identity"}


def test_merged_kernels_have_one_entry_per_ordered_pair() -> None:
    """Prevents kernels between heads from being shown as another head's own."""
    mixer = build("mta", dim=16, n_heads=4, merged=True, c_h=2, c_q=3, c_k=3)
    with torch.no_grad():
        init_kernel(mixer.kq_pre, "diagonal", "both")
    some = [one for one in kernels(mixer) if one.kind == "kq_pre"]
    assert [one.title for one in some][:5] == ["head 0 to 0", "head 1 to 0", "head 0 to 1", "head 1 to 1", "head 2 to 2"]
    assert [one.pattern.name for one in some][:4] == ["diagonal", "zero", "zero", "diagonal"]


def test_other_mixers_have_none() -> None:
    """Prevents a layer without kernels from stopping the page."""
    assert kernels(build("attention", dim=16, n_heads=4)) == []
    assert kernels(build("delta_net", dim=16, n_heads=4)) == []
