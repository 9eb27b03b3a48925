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
# dim D, layers L, heads, SwiGLU F: arXiv 2504.13173, Table 5; 1.3b: arXiv 2505.23735, Table 7. F is 8 D / 3 up to multiples of 64.
MIRAS = {
    "miras-170m": (768, 12, 16, 2048),
    "miras-340m": (1024, 24, 16, 2752),
    "miras-780m": (1536, 24, 16, 4096),
    "miras-1.3b": (2048, 18, 8, 5504),
}


@pytest.mark.parametrize(("name", "expected"), BASELINES.items())
def test_transformer_counts(name: str, expected: int) -> None:
    """arXiv 2504.00927, Table 7: widths, depths, SwiGLU sizes, tied embeddings, no biases."""
    assert n_parameters(size(name, "attention")) == expected


@pytest.mark.parametrize(("mixer", "name", "extra"), EXTRA)
def test_extra_counts(mixer: str, name: str, extra: int) -> None:
    """arXiv 2504.00927, Table 8, and version 1's 9,408 = 6*16*66 + 24*8*4 + 24*96 (kernels before, pairs of heads after)."""
    assert n_parameters(size(name, mixer)) - BASELINES[name] == extra


@pytest.mark.parametrize(("name", "shape"), MIRAS.items())
def test_miras_shapes(name: str, shape: tuple[int, int, int, int]) -> None:
    """Each number of the shape reaches the model: with attention, embedding V D, per layer 4 D^2 + 3 D F + 2 D, and a norm."""
    dim, n_layers, n_heads, hidden = shape
    config = size(name, "attention")
    assert n_parameters(config) == 32_000 * dim + n_layers * (4 * dim**2 + 3 * dim * hidden + 2 * dim) + dim
    assert (config.num_attention_heads, config.max_position_embeddings) == (n_heads, 4096)
    assert n_parameters(size(name, "attention", vocab_size=257)) == n_parameters(config) - (32_000 - 257) * dim


@pytest.mark.parametrize(
    ("name", "gates_rank", "total"),
    [
        ("miras-170m", 32, 121_474_368),
        ("miras-340m", 32, 377_670_144),
        ("miras-780m", 64, 823_668_480),
        ("miras-1.3b", 64, 1_137_326_592),
    ],
)
def test_miras_counts(name: str, gates_rank: int, total: int) -> None:
    """Moneta, Yaad and Memora, and the hybrid of half the memory layers, counted by hand."""
    dim, n_layers, n_heads, hidden = MIRAS[name]
    head = dim // n_heads
    around = 3 * dim * hidden + 2 * dim  # SwiGLU and two norms
    gate = 2 * dim * gates_rank + dim  # down, up, bias; one number per channel
    projections = 5 * dim**2 + 3 * 4 * dim  # q, k, v, output gate, output; three convolutions of four taps
    memory = n_heads * (2 * 4 * head**2 + 2 * head)  # two matrices of expansion four, a LayerNorm's weight and bias
    moneta = projections + 2 * gate + memory + head + around  # eta and alpha; one norm shared by the heads
    outside = 32_000 * dim + dim
    assert outside + n_layers * moneta == total
    assert n_parameters(size(name)) == total
    assert n_parameters(size(name, "memora")) == total
    assert n_parameters(size(name, "yaad")) == total + n_layers * gate, "its threshold is one more gate"
    hybrid = outside + n_layers // 2 * (moneta + 4 * dim**2 + around)
    assert n_parameters(size(name, "moneta-h")) == hybrid


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
    assert list(SIZES) == [*BASELINES, *MIRAS]
