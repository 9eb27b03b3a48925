"""The recurrent mixers' options: the laws over those that take another path, sizes, initial values, and refused values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recollect.mixers import build, layer_options
from recollect.mixers.blocks import HeadNorm, LowRank, ShortConvolution
from tests.laws import DIM, LAWS, N_HEADS, maker

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear attention, norm per head, convolutions": (
        "linear_attention",
        {"feature_map": "silu", "normalize": False, "conv_width": 3, "expand_v": 0.5},
    ),
    "linear attention, identity": ("linear_attention", {"feature_map": "identity", "normalize": False}),
    "retnet, narrow, convolutions": ("retnet", {"expand_k": 0.5, "expand_v": 1.0, "conv_width": 4}),
    "lightning, second layer": ("lightning", {"layer": 1, "n_layers": 4}),
    "gla, convolutions": ("gla", {"expand_k": 1.0, "conv_width": 4}),
    "hgrn2, floor, convolutions": ("hgrn2", {"layer": 2, "n_layers": 4, "conv_width": 2}),
    "gsa, more slots than channels": ("gsa", {"n_slots": 7, "conv_width": 4}),
    "delta_net, gate, reflections": ("delta_net", {"output_gate": True, "negative_eigenvalues": True, "conv_width": 1}),
    "gated_delta_net, reflections": ("gated_delta_net", {"negative_eigenvalues": True, "expand_v": 2.0}),
    "delta_product, three steps": ("delta_product", {"n_steps": 3, "forget": False, "negative_eigenvalues": False}),
    "mesa, gate": ("mesa", {"output_gate": True, "expand_k": 0.5}),
    "rwkv7, last layer": ("rwkv7", {"layer": 3, "decay_rank": 2, "rate_rank": 3, "gate_rank": 5}),
    "mamba, small": ("mamba", {"expand": 1, "state_dim": 3, "dt_rank": 2, "conv_width": 2}),
    "longhorn, small": ("longhorn", {"expand": 1, "state_dim": 3}),
    "mamba2, one head": ("mamba2", {"expand": 1, "state_dim": 5, "head_dim": 16}),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_law_of_variant(variant: str, law: str) -> None:
    """Prevents options that break what the default keeps."""
    name, options = VARIANTS[variant]
    LAWS[law](maker(name, **options))


# Linear maps and low-rank maps by the docstrings, without convolutions, norms and other vectors, in units of D^2 at D = 1024, H = 16.
MATRICES = {
    "linear_attention": 4.0,
    "retnet": 8.0,
    "lightning": 5.0,
    "gla": 4 + 1.5 * 16 / 1024,
    "hgrn2": 4.0,
    "gsa": 5.0,
    "delta_net": 4 + 16 / 1024,
    "gated_delta_net": 4 + 2 * 16 / 1024,
    "delta_product": 3.5 + 3 * 16 / 1024,
    "mesa": 4 + 2 * 16 / 1024,
    "rwkv7": 4 + 2 * (64 + 64 + 160) / 1024,
    "mamba": 6 + 2 * (64 + 32) / 1024 + 2 * 64 / 1024,
    "longhorn": 6 + 2 * (64 + 32) / 1024 + 2 * 64 / 1024,
    "mamba2": 6 + (2 * 128 + 32) / 1024,
}


@pytest.mark.parametrize("name", MATRICES)
def test_number_of_parameters(name: str) -> None:
    """Prevents comparisons between mixers whose sizes are not what their docstrings say."""
    with torch.device("meta"):
        mixer = build(name, dim=1024, n_heads=16)
    count = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    assert count / 1024**2 == pytest.approx(MATRICES[name], abs=1e-9)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gated_delta_net", "delta_product"])
def test_time_steps_start_between_a_thousandth_and_a_tenth(name: str) -> None:
    """Prevents a memory that starts forgetful (or frozen) because a bias was reset with the linear maps."""
    parameters = dict(build(name, dim=64, n_heads=4).named_parameters())
    bias = next(p for key, p in parameters.items() if key in ("selection.dt.bias", "dt_bias", "alpha.bias"))
    steps = F.softplus(bias.detach())
    assert steps.min() > 0.9e-3
    assert steps.max() < 0.11
    assert steps.std() > 0


def test_depth_decides_what_is_forgotten() -> None:
    """Prevents layers that all start alike: deeper layers of HGRN2 and Lightning keep more, RWKV-7 shifts less."""
    hgrn2 = [build("hgrn2", dim=16, n_heads=4, **options(layer)) for layer, options in _layers("hgrn2")]
    assert dict(hgrn2[0].named_parameters()).get("floor") is None
    for layer in (1, 2):
        floor = dict(hgrn2[layer].named_parameters())["floor"].detach().sigmoid()
        assert torch.allclose(floor, torch.full_like(floor, layer / 3))
    rwkv7 = [build("rwkv7", dim=16, n_heads=4, **options(layer)) for layer, options in _layers("rwkv7")]
    shifts = [dict(mixer.named_parameters())["mix_k"].detach().mean() for mixer in rwkv7]
    assert shifts[0] > shifts[1] > shifts[2] > 0


def _layers(name: str) -> list[Any]:
    """(layer, layer -> its options in a model of three layers)."""
    items = layer_options(name, 3)

    def options(layer: int) -> dict[str, Any]:
        return {"layer": layer, **{key: value for key, value in items[layer].items() if key != "mixer"}}

    return [(layer, options) for layer in range(3)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "linear_attention",
            {"expand_k": 0.3},
            r"expand_k \* dim must be a positive multiple of n_heads: expand_k=0.3, dim=16",
        ),
        ("linear_attention", {"expand_v": 0.0}, "expand_v"),
        ("linear_attention", {"feature_map": "exp"}, "feature_map is 'elu', 'silu' or 'identity'; got 'exp'"),
        ("linear_attention", {"feature_map": "silu"}, "normalize needs positive weights"),
        ("linear_attention", {"n_heads": 3}, "multiple of n_heads"),
        ("retnet", {"n_heads": 16}, "even key dim; got 1"),
        ("retnet", {"conv_width": 0}, "conv_width .* at least 1; got 0"),
        ("lightning", {"layer": 3, "n_layers": 3}, "n_layers must exceed the 0-based layer: n_layers=3, layer=3"),
        ("gla", {"gate_rank": 0}, "gate_rank=0"),
        ("gla", {"gate_temperature": 0.0}, "gate_temperature=0.0"),
        ("gla", {"conv_width": -1}, "conv_width"),
        ("hgrn2", {"conv_width": 0}, "conv_width"),
        ("gsa", {"n_slots": 0}, "n_slots=0"),
        ("delta_net", {"conv_width": 0}, "conv_width"),
        ("delta_product", {"n_steps": 0}, "n_steps .* at least 1; got 0"),
        ("mesa", {"ridge_floor": 1.0}, r"ridge_floor lies in \(0, 1\)"),
        ("rwkv7", {"n_heads": 16}, "heads of at least 2 channels: dim=16, n_heads=16"),
        ("rwkv7", {"gate_rank": 0}, "gate_rank must be positive; got 0"),
        ("mamba", {"state_dim": 0}, "state_dim=0"),
        ("longhorn", {"dt_rank": 0}, "dt_rank=0"),
        ("mamba2", {"head_dim": 5}, r"head_dim must divide expand \* dim: head_dim=5, expand \* dim=32"),
        ("mamba2", {"n_heads": 3}, "n_heads must divide dim"),
        ("mamba2", {"conv_width": 0}, "conv_width"),
    ],
)
def test_options_that_cannot_be_are_named(name: str, options: dict[str, Any], message: str) -> None:
    """Prevents a wrong option from surfacing as a shape error inside the first call."""
    with pytest.raises(ValueError, match=message):
        build(name, **{"dim": DIM, "n_heads": N_HEADS, **options})


def test_wrong_input_is_named() -> None:
    """Prevents an error about matrix shapes deep inside."""
    with pytest.raises(ValueError, match=r"x is \[B, T, D\] with D=16; got \(2, 16\)"):
        build("gla", dim=16, n_heads=4)(torch.zeros(2, 16))


def test_wrong_blocks_are_named() -> None:
    """Prevents building blocks that fail at their first call."""
    with pytest.raises(ValueError, match="width=0"):
        ShortConvolution(4, 0)
    with pytest.raises(ValueError, match="'silu' or None; got 'gelu'"):
        ShortConvolution(4, 2, "gelu")
    with pytest.raises(ValueError, match="2 numbers for 3 outputs"):
        LowRank(4, 1, 3, bias=[0.0, 1.0])
    with pytest.raises(ValueError, match="got 'gelu'"):
        LowRank(4, 1, 3, activation="gelu")
    with pytest.raises(ValueError, match="gate is 'silu' or 'sigmoid'; got 'tanh'"):
        HeadNorm(4, gate="tanh")
