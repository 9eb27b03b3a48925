"""Which parameters weight decay touches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.training.optimiser import make_optimisers, parameter_groups
from tests.training.tiny import CONFIG, tiny_model


def test_only_weight_matrices_are_decayed() -> None:
    """Decay on a kernel that starts as the identity, a norm or a (tied) embedding changes what the model is."""
    model = tiny_model()
    decayed, rest = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    in_decayed = {names[id(p)] for p in decayed["params"]}
    in_rest = {names[id(p)] for p in rest["params"]}
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert in_decayed | in_rest == set(names.values())
    assert all(name.endswith(".weight") and "norm" not in name and "embed" not in name for name in in_decayed)
    assert any("kq_pre" in name for name in in_rest)
    assert "model.embed_tokens.weight" in in_rest
    assert any("mlp.up" in name for name in in_decayed)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_optimised_once(name: str) -> None:
    """A tied weight in two groups would be stepped twice."""
    model, config = tiny_model(), dataclasses.replace(CONFIG, optimiser=name)
    optimised = [id(p) for p in make_optimisers(model, config).parameters()]
    assert sorted(optimised) == sorted({id(p) for p in model.parameters()})


@pytest.mark.parametrize("mixer", ["yaad", "gated_delta_net", "mamba", "gla", "mta"])
def test_gates_are_not_decayed(mixer: str) -> None:
    """Decay would pull what is kept, and how far memories step, towards the middle of their ranges; projections are decayed."""
    model = RecollectForCausalLM(RecollectConfig(hidden_size=16, num_attention_heads=2, layers=[mixer]))
    decayed, _ = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)].partition("mixer.")[2] for p in decayed["params"]} - {""}
    assert inside
    gates = {"gate", "alpha", "beta", "gamma", "eta", "own", "rule_gates", "dt"}
    assert not [name for name in inside if gates & set(name.split("."))]


def test_decay_all_decays_everything() -> None:
    """The Multi-Token Attention paper's recipe decays kernels and norms, too."""
    groups = parameter_groups(tiny_model(), 0.1, decay_all=True)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


def test_muon_orthogonalises_the_update_of_a_matrix() -> None:
    """Its first update of a matrix has singular values near one, at AdamW's root mean square, and nothing else is Muon's."""
    model = tiny_model(dropout=0.0)
    config = dataclasses.replace(CONFIG, optimiser="muon", weight_decay=0.0)
    optimisers = make_optimisers(model, config)
    weight = model.model.layers[0].mlp.up.weight
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimisers.set_rate(1e-3)
    optimisers.step()
    change = (weight.detach() - before) / 1e-3
    singular = torch.linalg.svdvals(change) / (0.2 * max(change.shape) ** 0.5)
    assert ((singular > 0.6) & (singular < 1.4)).all()
    muon, adamw = optimisers.parts
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert any(p is model.model.embed_tokens.weight for group in adamw.param_groups for p in group["params"])
