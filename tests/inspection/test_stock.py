"""Models of transformers are looked into: their maps are those that they use, retrofitted parts are shown, nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recollect.data.tokenizer import ByteTokenizer
from recollect.evaluation.loading import OwnCoder
from recollect.inspection import inspect_text
from recollect.inspection.stock import caught
from recollect.inspection.view import Inspection
from recollect.models import retrofit
from tests.inspection.small import TEXT
from tests.inspection.test_inspect_command import call
from tests.inspection.test_page import data_of

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
STOCK = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=7)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}
IDS = torch.tensor([256, *TEXT.encode()[:40]])


def model_of(family: str) -> Any:
    """A fresh model whose attention is far from even."""
    torch.manual_seed(0)
    model = STOCK[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def look(model: Any, **options: Any) -> Inspection:
    return inspect_text(model, OwnCoder(ByteTokenizer()), TEXT, n_tokens=len(IDS), **options)


@pytest.mark.parametrize("family", STOCK)
def test_maps_equal_those_that_transformers_gives(family: str) -> None:
    """Prevents maps before the rotation or the norms, with another scale, in other groups of heads, or beyond a window."""
    model = model_of(family)
    views = look(model).layers
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=IDS[None], output_attentions=True, use_cache=False).attentions
    assert [view.label for view in views] == ["0: attention", "1: attention"]
    for view, weights in zip(views, expected, strict=True):
        (softmax,) = [one.values for one in view.attended.maps if one.stage == "softmax"]
        seen = ~softmax.isnan()
        assert seen[0].equal(weights[0, 0] > 0)
        torch.testing.assert_close(softmax[seen], weights[0][seen], rtol=1e-4, atol=1e-6)


def test_bits_equal_the_models_own() -> None:
    """Prevents a head applied without what the family does around it."""
    model = model_of("gpt2")
    with torch.no_grad():
        expected = model(input_ids=IDS[None], labels=IDS[None]).loss
    bits = look(model).bits
    assert bits[0].isnan()
    assert float(bits[1:].mean() * torch.log(torch.tensor(2.0))) == pytest.approx(float(expected), rel=1e-5)


def test_retrofitted_parts_are_shown() -> None:
    """Prevents kernels of another layer, convolved maps without them, and a memory that is passed over."""
    model = retrofit(model_of("llama"), mixer="mta", layers=[1], c_q=3, c_k=5)
    before = look(model).layers
    assert [view.label for view in before] == ["0: attention", "1: mta"]
    assert [one.stage for one in before[1].attended.maps] == [
        "logits", "convolved", "mixed", "softmax", "post_convolved", "post_mixed",
    ]  # fmt: skip
    maps = {one.stage: one.values for one in before[1].attended.maps}
    torch.testing.assert_close(maps["post_mixed"], maps["softmax"], equal_nan=True)  # identities at the start
    assert {one.pattern.name for one in before[1].kernels} == {"identity"}
    with torch.no_grad():
        model.model.layers[1].self_attn.multi_token.kq_pre[2, -2, 1] = 2.0
    after = look(model).layers[1]
    assert [one.title for one in after.kernels if one.pattern.name != "identity"] == ["head 2"]
    raw, convolved = (one.values for one in after.attended.maps[:2])
    expected = raw[2, 9, 5] + 2 * raw[2, 8, 4]
    assert float(convolved[2, 9, 5]) == pytest.approx(float(expected), rel=1e-4)

    both = retrofit(model, mixer="gated_delta_net", layers=[0])
    views = look(both).layers
    assert [view.label for view in views] == ["0: attention", "0: gated_delta_net (memory)", "1: mta"]
    assert {strip.key for strip in views[1].strips} >= {"surprise", "alpha"}


def test_the_model_is_left_as_it_was() -> None:
    """Prevents wrappers that stay behind, also after a failure."""
    model = model_of("llama")
    model.set_attn_implementation("eager")
    functions = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), ALL_ATTENTION_FUNCTIONS["sdpa"]
    look(model)
    with pytest.raises(RuntimeError, match="stop"), caught(model):
        raise RuntimeError("stop")
    assert (dict(ALL_ATTENTION_FUNCTIONS._local_mapping), ALL_ATTENTION_FUNCTIONS["sdpa"]) == functions
    assert model.config._attn_implementation == "eager"


def test_attention_that_cannot_be_shown_is_named() -> None:
    """Prevents maps that leave out a part of the weights."""
    model = model_of("llama")

    def biased(_: Any, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "position_bias": torch.zeros(1, 4, len(IDS), len(IDS))}

    model.model.layers[0].self_attn.register_forward_pre_hook(biased, with_kwargs=True)
    first, second = look(model).layers
    assert first.attended is None
    assert first.missing == ["the maps of attention with position_bias cannot be shown"]
    assert second.attended is not None


def test_a_model_of_eager_attention_is_refused() -> None:
    """Prevents transformers' advice on how to load the model, which would not help."""
    model = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8)).eval()
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM has no \"sdpa\" attention"):
        look(model)


def test_layers_are_chosen_by_depth() -> None:
    """Prevents the first layers caught from being taken for those asked for."""
    assert [view.label for view in look(model_of("mistral"), layers=[1]).layers] == ["1: attention"]
    with pytest.raises(ValueError, match="layers of this model are 0 to 1; got 2"):
        look(model_of("mistral"), layers=[2])


@pytest.mark.parametrize("is_retrofitted", [False, True])
def test_the_command_takes_a_folder_with_a_tokenizer_of_transformers(tmp_path: Path, is_retrofitted: bool) -> None:
    """Prevents another tokenizer, or a document start that the model never saw."""
    model = model_of("llama")
    if is_retrofitted:
        model = retrofit(model, mixer="mta", layers="all")
    model.save_pretrained(tmp_path / "model")
    words = sorted({*TEXT.split(), "</s>", "?"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    status, out, err = call(tmp_path / "model", "--text", tmp_path / "text.txt", "--out", tmp_path / "a.html", "--tokens", 10)
    assert (status, err) == (0, "")
    assert out.startswith("10 tokens")
    data = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert data["tokens"][0] == "To"
    assert len(data["layers"][1]["maps"]) == (6 if is_retrofitted else 2)
