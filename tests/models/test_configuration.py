"""The configuration: what it fills in, what it refuses, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from recollect.mixers import layer_options
from recollect.models import RecollectConfig, RecollectForCausalLM
from tests.models.conftest import NAMES, TOY, tiny_config


@pytest.mark.parametrize(
    ("dim", "hidden"), [(96, 256), (97, 512), (256, 768), (1024, 2816), (1280, 3584), (1536, 4096), (2048, 5632)]
)
def test_intermediate_size_follows_the_papers_rule(dim: int, hidden: int) -> None:
    """Table 7 of arXiv 2504.00927; rounding down, or 8D/3 cut to an integer first, would change every parameter count."""
    assert RecollectConfig(hidden_size=dim, layers=TOY, num_attention_heads=1).intermediate_size == hidden


def test_layers_give_their_number() -> None:
    """`num_hidden_layers` need not be repeated beside a list."""
    config = tiny_config([{"mixer": TOY}, TOY, {"mixer": TOY, "sharpness": 2.0}])
    assert config.num_hidden_layers == 3
    assert config.layers == [{"mixer": TOY}, {"mixer": TOY}, {"mixer": TOY, "sharpness": 2.0}]
    assert RecollectForCausalLM(config).model.layers[2].mixer.config.sharpness == 2.0
    assert RecollectForCausalLM(config).model.layers[2].mixer.config.layer == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_name_expands_to_the_mixers_pattern(name: str) -> None:
    """The depth-dependent options of a mixer must reach its layers."""
    assert tiny_config(name, num_hidden_layers=5).layers == layer_options(name, 5)
    assert tiny_config([name] * 5).layers == layer_options(name, 5)


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str, tmp_path) -> None:
    """Nothing is lost between config, JSON and config, whichever way it is read."""
    config = tiny_config(name, mlp=False, rms_norm_eps=1e-6, eos_token_id=[1, 2], pad_token_id=0, tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "recollect"
    assert stored["layers"] == config.layers
    for again in (
        RecollectConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        RecollectConfig.from_dict(config.to_dict()),
        RecollectConfig(**json.loads(config.to_json_string(use_diff=False))),
    ):
        assert type(again) is RecollectConfig
        assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_model_dtype_survives() -> None:
    """Hugging Face's own keywords are passed through, not refused."""
    assert tiny_config(dtype="bfloat16").dtype == torch.bfloat16
    assert tiny_config(name_or_path="here", output_attentions=False).name_or_path == "here"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 3}, r"no option 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"rope_theta": 1e4}, r"no option 'rope_theta'.*Options of a mixer belong in `layers`"),
        ({"temperature": 0.7}, r"no option 'temperature'.*generation"),
        ({"hidden_size": 0}, r"hidden_size must be a positive integer; got 0"),
        ({"vocab_size": 2.5}, r"vocab_size must be a positive integer; got 2.5"),
        ({"num_attention_heads": True}, r"num_attention_heads must be a positive integer; got True"),
        ({"max_position_embeddings": -1}, r"max_position_embeddings must be a positive integer"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps must be positive; got 0.0"),
        ({"pad_token_id": 61}, r"pad_token_id must be None or in 0..60"),
        ({"eos_token_id": [3, -1]}, r"eos_token_id must be None or in 0..60"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    """A misspelt or impossible option must not train the wrong model in silence."""
    with pytest.raises(ValueError, match=message):
        tiny_config(TOY, **options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("attentoin", r"layers\[0\]: unknown mixer 'attentoin'; did you mean 'attention'\?"),
        (
            [TOY, {"mixer": TOY, "sharpnes": 1.0}],
            r"layers\[1\]: mixer 'toy_for_tests' has no option 'sharpnes'; did you mean 'sharpness'\?",
        ),
        (
            [TOY, {"sharpness": 1.0}],
            r"layers\[1\]: expected a mixer's name or a dict with the key 'mixer'; got \{'sharpness': 1.0\}",
        ),
        ([TOY, 3], r"layers\[1\]: expected a mixer's name or a dict with the key 'mixer'; got 3"),
        ([{"mixer": "attention", "n_kv_heads": 3}], r"layers\[0\]: n_kv_heads must divide n_heads"),
        ([], r"num_hidden_layers must be a positive integer; got 0"),
    ],
)
def test_impossible_layers_are_refused(layers, message: str) -> None:
    """The message says which layer, and names the nearest mixer or option."""
    with pytest.raises(ValueError, match=message):
        tiny_config(layers)


def test_layer_count_must_agree() -> None:
    """Two numbers that contradict each other are an error, not a choice."""
    with pytest.raises(ValueError, match="layers lists 2 mixers but num_hidden_layers is 3"):
        tiny_config([TOY, TOY], num_hidden_layers=3)


def test_mixer_options_change_in_every_layer_that_has_them(tmp_path: Path) -> None:
    """Prevents a longer context's theta from reaching some layers only, or from changing the weights that are loaded."""
    config = tiny_config(["attention", {"mixer": "mta", "c_q": 3, "c_k": 3}])
    longer = config.with_mixer_options(rope_theta=5e5, c_q=3)
    assert longer.layers == [
        {"mixer": "attention", "rope_theta": 5e5},
        {"mixer": "mta", "c_q": 3, "c_k": 3, "rope_theta": 5e5},
    ]
    assert "rope_theta" not in config.layers[0]
    model = RecollectForCausalLM(config)
    model.save_pretrained(tmp_path)
    loaded = RecollectForCausalLM.from_pretrained(tmp_path, config=longer)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    tokens = torch.arange(12)[None]
    assert not torch.equal(model(tokens).logits, loaded(tokens).logits)
    with pytest.raises(ValueError, match=r"rope_thta.*rope_theta"):
        config.with_mixer_options(rope_thta=5e5)
