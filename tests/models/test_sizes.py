"""The papers' parameter counts, without allocating the models."""

from __future__ import annotations

import pytest

from recollect.models import SIZES, n_parameters, size

BASELINES = {"mta-300m": 388_277_248, "mta-550m": 651_818_240, "mta-880m": 876_553_728, "mta-1b": 1_495_894_016}
EXTRA = [
    *[("mta", name, extra) for name, extra in zip(BASELINES, (23_380, 18_888, 29_592, 31_128), strict=True)],
    ("mta_v2", "mta-880m", 29_592),
    ("mta_v1", "mta-880m", 9_408),
    ("diff", "mta-880m", 13_824),
    ("talking_heads", "mta-880m", 12_288),
]


@pytest.mark.parametrize(("name", "expected"), BASELINES.items())
def test_transformer_counts(name: str, expected: int) -> None:
    """arXiv 2504.00927, Table 7: widths, depths, SwiGLU sizes, tied embeddings, no biases."""
    assert n_parameters(size(name, "attention")) == expected


@pytest.mark.parametrize(("mixer", "name", "extra"), EXTRA)
def test_extra_counts(mixer: str, name: str, extra: int) -> None:
    """arXiv 2504.00927, Table 8, and version 1's 9,408 = 6*16*66 + 24*8*4 + 24*96 (kernels before, pairs of heads after)."""
    assert n_parameters(size(name, mixer)) - BASELINES[name] == extra


def test_sizes_convolve_in_every_fourth_layer() -> None:
    """Layers 2, 6, 10, ... (0-based) convolve keys and queries: the paper's 3, 7, 11, ..."""
    plain = n_parameters(size("mta-300m", "talking_heads"))
    assert n_parameters(size("mta-300m")) > plain
    layers = size("mta-300m").layers
    different = [layer for layer, options in enumerate(layers) if options != layers[0]]
    assert different == [2, 6, 10, 14, 18]


def test_unknown_sizes_name_the_nearest() -> None:
    """As everywhere in the package."""
    with pytest.raises(ValueError, match=r"unknown size 'mta-880'; did you mean 'mta-880m'\? Known sizes: mta-300m, "):
        size("mta-880")
    with pytest.raises(ValueError, match="unknown mixer 'mtaa'"):
        size("mta-880m", "mtaa")
    assert list(SIZES) == list(BASELINES)
