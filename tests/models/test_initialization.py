"""How weights start, and that loading neither overwrites what a checkpoint holds nor leaves anything unset."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from recollect.models import RecollectForCausalLM
from tests.models.conftest import NAMES, TOY, tiny, tiny_config, tokens


@pytest.mark.parametrize("tied", [True, False])
def test_weights_start_truncated_normal(tied: bool) -> None:
    """arXiv 2504.00927's code: std D^(-1/2), outward F^(-1/2), cut at 3 std; Hugging Face's default is 0.02."""
    model = RecollectForCausalLM(tiny_config(hidden_size=64, intermediate_size=400, vocab_size=500, tie_word_embeddings=tied))
    mlp = model.model.layers[1].mlp
    expected = {mlp.gate: 64, mlp.up: 64, mlp.down: 400, model.model.embed_tokens: 64, model.lm_head: 64}
    for module, fan in expected.items():
        std = fan**-0.5
        assert module.weight.abs().max() <= 3 * std
        # A normal cut at 3 std has std 0.9866; the sample of >= 25600 numbers is within 2 % of it (4 sigma).
        torch.testing.assert_close(module.weight.std().item(), 0.9866 * std, rtol=0.02, atol=0.0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(bool((norm == 1).all()) for name, norm in model.named_parameters() if name.endswith("norm.weight"))


def test_mixers_start_by_their_own_rule() -> None:
    """Hugging Face's initialisation must not touch what a mixer set, nor miss it."""
    mixer = RecollectForCausalLM(tiny_config()).model.layers[0].mixer
    assert bool((mixer.scale == 0.5).all())
    torch.testing.assert_close(mixer.qkv.weight.std().item(), 32**-0.5, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_the_weights(name: str) -> None:
    """Two models from one seed are equal; a third from another seed is not."""
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(RecollectForCausalLM(tiny_config(name)))
    ids = tokens(1, 9)
    one, same, other = (model.eval()(ids).logits for model in models)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_loading_fills_what_a_checkpoint_lacks(name: str, tmp_path) -> None:
    """A checkpoint without one block's mixer and norm: these start afresh, everything else is the checkpoint's, and no buffer
    is left as raw memory."""
    model = tiny(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [key for key in weights if key.startswith("model.layers.1.mixer")]
    save_file(
        {key: value for key, value in weights.items() if key not in lost},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    again = RecollectForCausalLM.from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        if key in lost:
            assert value.isfinite().all(), key
            assert value.abs().max() < 20, key
        else:
            assert torch.equal(value, model.state_dict()[key]), key
    assert again(tokens(2, 7)).logits.isfinite().all()


def test_loading_keeps_the_loaded_half_of_a_mixer(tmp_path) -> None:
    """A mixer whose initialisation writes in place must not overwrite its loaded parameters while one of them is filled in."""
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mixer.scale"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mixer = RecollectForCausalLM.from_pretrained(tmp_path).model.layers[0].mixer
    assert bool((mixer.scale == 0.5).all())
    assert torch.equal(mixer.qkv.weight, model.model.layers[0].mixer.qkv.weight)
    assert torch.equal(mixer.slopes, torch.tensor([0.5, 0.25, 0.125, 0.0625]))


def test_non_persistent_buffers_survive_loading(tmp_path) -> None:
    """Hugging Face builds on the meta device and leaves such buffers as raw memory unless the mixer fills them again."""
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = RecollectForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[1].mixer.slopes, model.model.layers[1].mixer.slopes)
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_mlp_false_leaves_mixers_only() -> None:
    """A model of mixers only has no parameter of a SwiGLU and its second norm."""
    model = tiny(mlp=False)
    assert not [name for name, _ in model.named_parameters() if ".mlp" in name]
    block, x = model.model.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
    assert torch.equal(block(x)[0], x + block.mixer(block.mixer_norm(x))[0])


def test_toy_is_not_left_registered() -> None:
    """The names that other suites loop over were collected without the toy."""
    assert NAMES.count(TOY) == 1
