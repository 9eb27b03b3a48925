"""Names for mixers that take turns over the layers: what they mean, where they stand, what is refused."""

from __future__ import annotations

import pytest
import torch

from recollect.comparison.plan import make_plan
from recollect.mixers import MIXERS, PATTERNS, build, layer_options, register, register_pattern
from recollect.mixers.attention import Attention, AttentionConfig
from recollect.mixers.base import option_names
from recollect.mixers.patterns import with_options
from recollect.models import RecollectConfig, RecollectForCausalLM
from tests.comparison.small import small

WORDS = {"summary": "-", "source": "-"}
WIDE = ["mta", {"mixer": "sliding_window", "window": 9}]


@pytest.fixture(autouse=True)
def _pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that exists during these tests only: two mixers of which one has a depth-dependent option and one a preset."""
    known = dict(PATTERNS)
    for module in ("base", "patterns"):
        monkeypatch.setattr(f"recollect.mixers.{module}.PATTERNS", known)
    register_pattern("wide-h", WIDE, **WORDS)


def test_layers_take_turns_over_the_depth() -> None:
    """Prevents an order other than the one written, a lost option, and depth-dependent options at the depth of the round."""
    layers = layer_options("wide-h", 5)
    assert [layer["mixer"] for layer in layers] == ["mta", "sliding_window", "mta", "sliding_window", "mta"]
    assert [layer.get("window") for layer in layers] == [None, 9, None, 9, None]
    alone = layer_options("mta", 5)
    assert layers[::2] == alone[::2]
    assert alone[2] != alone[0], "mta has an option that depends on the depth"


def test_mixers_joined_by_plus_take_turns() -> None:
    """Any hybrid without registering it."""
    assert layer_options("mta+attention", 4) == [
        layer_options("mta", 4)[layer] if layer % 2 == 0 else {"mixer": "attention"} for layer in range(4)
    ]


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_registered_pattern_is_a_model(name: str) -> None:
    """Every pattern of the package builds, learns and decodes, and says what it is."""
    config = RecollectConfig(
        vocab_size=11, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, intermediate_size=16, layers=name
    )
    assert config.layers == layer_options(name, 3)
    model = RecollectForCausalLM(config)
    tokens = torch.arange(20)[None] % 11
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model = model.double().eval()
    whole = model(tokens).logits
    first = model(tokens[:, :7], use_cache=True)
    rest = model(tokens[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, atol=1e-12, rtol=0)
    assert PATTERNS[name].summary
    assert PATTERNS[name].source.startswith("arXiv ")


def test_pattern_names_stand_for_a_model_only() -> None:
    """A pattern in the place of one mixer is refused with the reason, not as an unknown name."""
    for wrong in ("wide-h", "mta+attention"):
        with pytest.raises(ValueError, match=r"names the layers of a whole model; one mixer is needed here"):
            build(wrong, dim=16, n_heads=2)
        with pytest.raises(ValueError, match=r"layers\[1\]: .*names the layers of a whole model"):
            RecollectConfig(layers=["mta", wrong])


def test_unknown_names_give_the_nearest_pattern_or_mixer() -> None:
    with pytest.raises(ValueError, match=r"unknown mixer 'wide_h'; did you mean 'wide-h'\?"):
        layer_options("wide_h", 2)
    with pytest.raises(ValueError, match=r"unknown mixer 'atention'; did you mean 'attention'\?"):
        layer_options("mta+atention", 2)
    with pytest.raises(ValueError, match=r"unknown mixer 'wide_h'; did you mean 'wide-h'\?"):
        RecollectConfig(layers="wide_h")


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("wide-h", ["attention"], "'wide-h' is already registered, as other layers"),
        ("mta", ["attention"], "'mta' is already registered, as a mixer"),
        ("new", [], "'new' needs at least one layer"),
        ("new", ["atention"], "did you mean 'attention'"),
        ("new", [{"mixer": "attention", "windw": 3}], "did you mean 'window'"),
        ("new", [{"window": 3}], "expected a mixer's name or a dict"),
        ("new", ["wide-h"], "names the layers of a whole model"),
    ],
)
def test_impossible_patterns_are_refused(name: str, layers: list, message: str) -> None:
    """Prevents a pattern that fails, or changes its meaning, where it is used."""
    with pytest.raises(ValueError, match=message):
        register_pattern(name, layers, **WORDS)
    register_pattern("wide-h", WIDE, **WORDS)  # the same again is no conflict: a module imported twice


def test_a_mixer_cannot_take_a_patterns_name() -> None:
    with pytest.raises(ValueError, match="'wide-h' is already registered, as a pattern of layers"):
        register("wide-h", config=AttentionConfig, state="-", **WORDS)(Attention)
    assert "wide-h" not in MIXERS


def test_options_reach_every_layer_that_has_them() -> None:
    """Prevents an option that reaches some layers only, overrides nothing, or reaches a mixer without it."""
    layers = with_options(layer_options("wide-h", 3), {"window": 4, "rope_theta": 5e5})
    assert [layer.get("window") for layer in layers] == [None, 4, None]
    assert [layer["rope_theta"] for layer in layers] == [5e5] * 3
    assert "window" not in option_names("mta")
    with pytest.raises(
        ValueError, match=r"no layer has an option 'windw'; did you mean 'window'\? The options of mta, sliding_w"
    ):
        with_options(layers, {"windw": 4})


def test_a_comparison_takes_patterns() -> None:
    """Typed options and the task's own reach the layers they belong to; what is impossible is refused in one sentence."""
    plan = make_plan(small(mixers=["mta", "wide-h:window=3", "mta+attention"], layers=3))
    hybrid = plan.mixer("wide-h:window=3")["layers"]
    assert [layer["mixer"] for layer in hybrid] == ["mta", "sliding_window", "mta"]
    assert [layer.get("window") for layer in hybrid] == [None, 3, None]
    assert hybrid[0] == plan.mixer("mta")["layers"][0], "the task's defaults of mta, dropout included"
    assert hybrid[1]["dropout"] == 0.1
    assert [layer["mixer"] for layer in plan.mixer("mta+attention")["layers"]] == ["mta", "attention", "mta"]
    for wrong, message in (
        ("wide-h:windw=3", "did you mean 'window'"),
        ("wide-h:window=two", "window must be an integer or null"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(small(mixers=[wrong], layers=2))
