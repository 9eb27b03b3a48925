"""Which parameters weight decay touches."""

from __future__ import annotations

from recollect.training.optimiser import make_optimiser, parameter_groups
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


def test_every_parameter_is_optimised_once() -> None:
    """A tied weight in two groups would be stepped twice."""
    model = tiny_model()
    optimised = [id(p) for group in make_optimiser(model, CONFIG).param_groups for p in group["params"]]
    assert sorted(optimised) == sorted({id(p) for p in model.parameters()})
