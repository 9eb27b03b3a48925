"""Retrofit: the stock transformers model is the oracle at the start, the paper's equations written out here after that."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recollect.models.retrofitting import FAMILIES, load_retrofitted, new_parameters, retrofit
from recollect.models.retrofitting.options import chosen_layers
from recollect.models.retrofitting.seen import Seen, read_mask
from tests.models.conftest import left_pad, tokens

GROUPED = {"num_key_value_heads": 2}
STOCK: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED),
    "mistral": (MistralConfig, MistralForCausalLM, {**GROUPED, "sliding_window": None}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, GROUPED),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**GROUPED, "head_dim": 16}),
}
KINDS = ["mta", "yaad"]


def stock(family: str = "llama", *, n_layers: int = 3, std: float = 0.1, **options: Any) -> PreTrainedModel:
    """A tiny random model whose weights have standard deviation `std`, those of queries and keys 0.4: attention is far from uniform."""
    config, cls, own = STOCK[family]
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": n_layers,
    }
    rest = {
        "initializer_range": std,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    model = cls(config(**{**sizes, **rest, **own, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query_key_value")):
                parameter.mul_(0.4 / std)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def moved(model: PreTrainedModel, *, by: float = 0.2) -> PreTrainedModel:
    """The model with every new parameter moved off its start."""
    added = set(new_parameters(model))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in added:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **options}).logits


def test_every_family_is_tested() -> None:
    """A family that is offered but never compared with its stock model."""
    assert set(STOCK) == set(FAMILIES)


@pytest.mark.parametrize(("dtype", "std", "atol"), [(torch.float32, 0.02, 1e-6), (torch.float64, 0.1, 1e-12)])
@pytest.mark.parametrize("mixer", KINDS)
@pytest.mark.parametrize("family", STOCK)
def test_outputs_are_identical_at_the_start(family: str, mixer: str, dtype: torch.dtype, std: float, atol: float) -> None:
    """A retrofit that changes the model: another scale, rotation, norm, head order, or padding that is attended to.

    fp32 with transformers' usual weights (std 0.02); in fp64 nothing but the equations is left.
    """
    before, after = stock(family, std=std).to(dtype), retrofit(stock(family, std=std).to(dtype), mixer=mixer, layers="all")
    ids, mask = left_pad([tokens(12, seed=1), tokens(7, seed=2), tokens(1, seed=3)])
    real = mask.bool()
    expected, got = logits(before, ids, attention_mask=mask)[real], logits(after, ids, attention_mask=mask)[real]
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)
    torch.testing.assert_close(logits(after, tokens(2, 40)), logits(before, tokens(2, 40)), atol=atol, rtol=0)


@pytest.mark.parametrize("mixer", KINDS)
@pytest.mark.parametrize("family", STOCK)
def test_only_new_parameters_are_added(family: str, mixer: str) -> None:
    """A renamed, lost or changed parameter of the stock model, or a layer retrofitted that was not asked for."""
    before, after = stock(family), retrofit(stock(family), mixer=mixer, layers=[1])
    old, new, added = dict(before.named_parameters()), dict(after.named_parameters()), set(new_parameters(after))
    assert set(new) - added == set(old)
    assert all(torch.equal(new[name], value) for name, value in old.items())
    assert all(".layers.1." in name for name in added)
    assert all(new[name].requires_grad for name in added)


@pytest.mark.parametrize("mixer", KINDS)
@pytest.mark.parametrize("family", STOCK)
def test_prefill_and_steps_equal_the_full_forward(family: str, mixer: str) -> None:
    """Rows of earlier queries or a memory that the cache does not carry: tokens may agree where logits do not."""
    model = moved(retrofit(stock(family), mixer=mixer, layers=[0, 2]))
    ids = tokens(2, 20)
    full = logits(model, ids)
    assert (full - logits(stock(family), ids)).abs().max() > 0.05
    cache, parts = None, []
    for piece in ids.split([6, 1, 1, 3, 1, 8], dim=1):
        with torch.no_grad():
            out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixer", KINDS)
@pytest.mark.parametrize("n_beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(mixer: str, n_beams: int) -> None:
    """States that beam search does not reorder; left padding that reaches convolutions or the memory while decoding."""
    model = moved(retrofit(stock(), mixer=mixer, layers=[0, 2]))
    ids, mask = left_pad([tokens(9, seed=1), tokens(4, seed=2)])
    how = {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": n_beams,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(ids, attention_mask=mask, **how)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **how)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)
    alone = model.generate(ids[1:, 5:], **how)
    assert torch.equal(alone.sequences[0], cached.sequences[1, 5:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mixer", KINDS)
def test_padding_and_packed_documents_change_nothing(mixer: str, implementation: str) -> None:
    """Convolutions or a memory that read padding or the document before, under either kind of mask."""
    model = moved(retrofit(stock(), mixer=mixer, layers=[0, 2]))
    model.set_attn_implementation(implementation)
    rows = [tokens(11, seed=1), tokens(6, seed=2)]
    alone = [logits(model, row[None])[0] for row in rows]
    ids, mask = left_pad(rows)
    left = logits(model, ids, attention_mask=mask)
    right = logits(model, ids.roll(-5, 1)[1:], attention_mask=mask.roll(-5, 1)[1:])[0, :6]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = logits(model, torch.cat(rows)[None], position_ids=places)[0]
    for got, expected in ((left[0], alone[0]), (left[1, 5:], alone[1]), (right, alone[1]), (packed, torch.cat(alone))):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def convolved(maps: Tensor, kernel: Tensor) -> Tensor:
    """out[h, i, j] = sum_ab kernel[h, a, b] maps[h, i - c_q + 1 + a, j - c_k // 2 + b], zeros outside; [H, T, T]."""
    _, c_q, c_k = kernel.shape
    length, wide = maps.shape[-1], torch.nn.functional.pad(maps, (c_k // 2, c_k // 2, c_q - 1, 0))
    taps = [kernel[:, a, b, None, None] * wide[:, a : a + length, b : b + length] for a in range(c_q) for b in range(c_k)]
    return torch.stack(taps).sum(0)


def llama_by_hand(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, C] of a Llama whose layers with kernels attend by arXiv 2504.00927, Eq. 3-7; one sequence, from the weights."""
    x, length, weights = model.model.embed_tokens(ids), len(ids), dict(model.named_parameters())
    angle = torch.outer(torch.arange(length, dtype=x.dtype), 1e4 ** (-torch.arange(4, dtype=x.dtype) / 4))
    hidden = torch.ones(length, length).triu(1).bool()

    def turned(u: Tensor) -> Tensor:  # [T, heads, 8], channel c with channel c + 4
        first, second = u[..., :4], u[..., 4:]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    for n, layer in enumerate(model.model.layers):
        u, name = layer.input_layernorm(x), f"model.layers.{n}.self_attn."
        q, k, v = ((u @ weights[f"{name}{part}_proj.weight"].T).unflatten(-1, (-1, 8)) for part in "qkv")
        k, v = turned(k).repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        maps = torch.einsum("thk,shk->hts", turned(q), k) / 8**0.5
        if f"{name}multi_token.kq_pre" in weights:
            part = {side: weights[f"{name}multi_token.{side}"] for side in ("kq_pre", "head_pre", "kq_post", "head_post")}
            maps = convolved(maps.masked_fill(hidden, 0), part["kq_pre"])
            maps = torch.einsum("op,pts->ots", part["head_pre"][0], maps).masked_fill(hidden, float("-inf")).softmax(-1)
            maps = convolved(maps, part["kq_post"]).masked_fill(hidden, 0)
            maps = torch.einsum("op,pts->ots", part["head_post"][0], maps)
        else:
            maps = maps.masked_fill(hidden, float("-inf")).softmax(-1)
        x = x + torch.einsum("hts,shk->thk", maps, v).flatten(1) @ weights[f"{name}o_proj.weight"].T
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@torch.no_grad()
def test_kernels_off_the_identity_match_the_equations() -> None:
    """Kernels applied to the wrong side, key, query or head, or to logits without the model's own scale and rotation."""
    model = moved(retrofit(stock(), layers=[1], c_q=3, c_k=5))
    ids = tokens(9)
    torch.testing.assert_close(logits(model, ids[None])[0], llama_by_hand(model, ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(stock(), ids[None])[0], llama_by_hand(stock(), ids), atol=1e-5, rtol=0)


def test_memory_reads_the_normalised_input_and_is_gated() -> None:
    """A memory beside the attention that reads another stream, or whose gate acts on something else."""
    model = moved(retrofit(stock(n_layers=1), mixer="yaad", layers=[0]))
    ids = tokens(2, 10)
    with torch.no_grad():
        layer, plain = model.model.layers[0], stock(n_layers=1).model.layers[0]
        x = model.model.embed_tokens(ids)
        u = layer.input_layernorm(x)
        turns = model.model.rotary_emb(x, torch.arange(10)[None])
        x = x + plain.self_attn(u, attention_mask=None, position_embeddings=turns)[0]
        x = x + layer.self_attn.memory.gate * layer.self_attn.memory.mixer(u)[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        expected = model.lm_head(model.model.norm(x))
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=0)


def test_memory_has_a_norm_where_the_model_has_none() -> None:
    """OLMo2 normalises behind the attention: a memory that reads the bare stream would see it grow from layer to layer."""
    memory = moved(retrofit(stock("olmo2"), mixer="yaad", layers=[2])).model.layers[2].self_attn.memory
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        once, many = (memory(scale * x, None, Seen(None, None))[0] for scale in (1.0, 50.0))
    torch.testing.assert_close(many, once, atol=1e-4, rtol=0)
    assert once.abs().max() > 1e-2


@pytest.mark.parametrize("family", STOCK)
def test_saved_model_is_the_same_model(family: str, tmp_path) -> None:
    """A checkpoint that forgets the kernels, the memory or where they are, or that a stock class takes for its own."""
    model = moved(retrofit(retrofit(stock(family), layers=[1], c_q=3, c_k=5), mixer="titans", layers=[1, 2], chunk_size=4))
    model.save_pretrained(tmp_path)
    expected = logits(model, tokens(2, 9))
    for again in (load_retrofitted(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(again) is type(model) is FAMILIES[family].causal
        assert new_parameters(again) == new_parameters(model)
        assert torch.equal(logits(again, tokens(2, 9)), expected)
    assert again.config.model_type == f"recollect_{family}"
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens(2, 9)).last_hidden_state, model.base_model(tokens(2, 9)).last_hidden_state)


def test_loads_in_a_fresh_process_and_goes_on_from_a_path(tmp_path) -> None:
    """Loading that depends on classes made earlier in this process; a path in the place of a model."""
    stock().save_pretrained(tmp_path / "stock")
    model = moved(retrofit(tmp_path / "stock", layers=[1]))
    model.save_pretrained(tmp_path / "mta")
    code = (
        "import sys, torch, recollect.models.retrofitting\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(1, 10)[None]).logits, sys.argv[2])\n"
    )
    result = tmp_path / "result.pt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", code, str(tmp_path / "mta"), str(result)]
    subprocess.run(arguments, check=True, env=environment, timeout=120)
    torch.testing.assert_close(torch.load(result), logits(model, torch.arange(1, 10)[None]), atol=1e-5, rtol=0)


def test_incomplete_and_foreign_checkpoints_are_refused(tmp_path) -> None:
    """Kernels that start afresh without a word because the file lost them; a stock checkpoint taken for a retrofitted one."""
    stock().save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="not retrofitted"):
        load_retrofitted(tmp_path / "stock")
    retrofit(stock(), layers=[1]).save_pretrained(tmp_path / "mta")
    file = tmp_path / "mta" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.multi_token.kq_post"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys.*kq_post"):
        load_retrofitted(tmp_path / "mta")


def test_parameters_missing_from_a_checkpoint_start_afresh(tmp_path) -> None:
    """Auto classes that leave a missing kernel or memory uninitialised, or that draw the loaded ones again."""
    model = moved(retrofit(retrofit(stock(), layers=[1]), mixer="yaad", layers=[1]))
    model.save_pretrained(tmp_path)
    tensors, place = load_file(tmp_path / "model.safetensors"), "model.layers.1.self_attn."
    missing = [f"{place}multi_token.kq_post", f"{place}memory.mixer.fast.0"]
    save_file({name: t for name, t in tensors.items() if name not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    fresh = dict(retrofit(retrofit(stock(), layers=[1]), mixer="yaad", layers=[1]).named_parameters())
    assert torch.equal(again[missing[0]], fresh[missing[0]])
    assert 0.5 < again[missing[1]].std() / fresh[missing[1]].std() < 2
    assert all(torch.equal(again[name], t) for name, t in tensors.items() if name not in missing)


@pytest.mark.parametrize("mixer", KINDS)
def test_training_the_new_parameters_alone(mixer: str) -> None:
    """New parameters that get no gradient, or training that moves the others."""
    model, ids = retrofit(stock(), mixer=mixer, layers=[0, 2]), tokens(8, 16)
    added = set(new_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in added)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == added


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # the name changes within transformers 5
@pytest.mark.parametrize("mixer", KINDS)
def test_gradient_checkpointing_changes_no_gradient(mixer: str) -> None:
    """A recomputed layer that sees another state, or a convolution without a backward through the model."""
    grads = []
    for checkpointed in (False, True):
        model = moved(retrofit(stock(), mixer=mixer, layers=[1])).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(tokens(2, 12), labels=tokens(2, 12), use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-6, rtol=1e-5)


def test_attention_dropout_acts_in_training_only() -> None:
    """The model's dropout, silently lost in retrofitted layers or left on in evaluation."""
    model, ids = retrofit(stock(n_layers=1, attention_dropout=0.5), layers=[0]), tokens(1, 12)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize("mixer", KINDS)
def test_cache_rows_are_selected_repeated_and_reset(mixer: str) -> None:
    """Operations on the cache that treat keys and values only."""
    model, ids = moved(retrofit(stock(), mixer=mixer, layers=[0, 2])), tokens(3, 9)

    def read() -> Any:
        with torch.no_grad():
            return model(ids[:, :8], use_cache=True).past_key_values

    def go_on(cache: Any, rows: Tensor) -> Tensor:
        return logits(model, ids[rows, 8:], past_key_values=cache, use_cache=True)

    expected = logits(model, ids)[:, -1:]
    for method, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        cache = read()
        getattr(cache, method)(argument)
        torch.testing.assert_close(go_on(cache, torch.tensor(rows)), expected[rows], atol=1e-5, rtol=0)
    cache = read()
    cache.reset()
    again = logits(model, ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again[:, -1:], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=3)


def test_caches_that_cannot_carry_the_states_are_refused() -> None:
    """A stock model's cache continued without the rows before it, or a kind of cache that has no room for them."""
    model, ids = retrofit(stock(), layers=[1]), tokens(1, 6)
    filled = stock()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has seen 6 tokens"):
        model(ids[:, :1], past_key_values=filled)
    with pytest.raises(ValueError, match="needs a DynamicCache; got StaticCache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3)
    out = model(ids, past_key_values=DynamicCache(), use_cache=True)  # a cache without a config grows its layers lazily
    torch.testing.assert_close(out.logits, logits(model, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mixer", KINDS)
def test_masks_that_cannot_be_followed_are_refused(mixer: str) -> None:
    """Padding between tokens, or a mask that is not causal, silently read as something else."""
    model, ids = retrofit(stock(), mixer=mixer, layers=[0]), tokens(1, 6)
    with pytest.raises(ValueError, match="padding between tokens"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    sees = torch.ones(6, 6).tril().bool()
    sees[1, 3] = True
    with pytest.raises(ValueError, match="otherwise"):
        model(ids, attention_mask=sees[None, None])
    bias = torch.zeros(6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), torch.finfo(torch.float32).min)
    bias[4, 5] = -1.0
    with pytest.raises(ValueError, match="adds other numbers"):
        model(ids, attention_mask=bias[None, None])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa, eager"):
        model(ids)


def test_retrofit_refuses_what_it_does_not_support_and_changes_nothing() -> None:
    """Families, layers or options that are accepted and then ignored; a model left half changed."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel; supported: GPTNeoXForCausalLM, LlamaForCausalLM"):
        retrofit(gpt2)
    with pytest.raises(ValueError, match=r"layer 0 attends to a sliding window \(8\)"):
        retrofit(stock("mistral", sliding_window=8), layers="all")
    sliding = stock("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ValueError, match="layer 2 attends to a sliding window"):
        retrofit(sliding, mixer="yaad", layers=[1, 2])
    assert type(sliding) is Qwen2ForCausalLM
    assert type(sliding.config) is Qwen2Config
    assert type(sliding.model.layers[1].self_attn) is type(stock("qwen2").model.layers[1].self_attn)
    retrofit(sliding, layers=[1])  # a layer of full attention in the same model
    for options, message in (
        ({"mixer": "mtb"}, "did you mean 'mta"),
        ({"mixer": "attention"}, "cannot be added"),
        ({"norm": "gate"}, "no option 'norm'.*Options: kq_pre"),
        ({"c_k": 4}, "c_k must be odd"),
        ({"kq_pre": False, "kq_post": False, "head_pre": False, "head_post": False}, "add nothing"),
        ({"mixer": "yaad", "memry": "mlp"}, "did you mean 'memory'"),
        ({"mixer": "yaad", "dim": 8}, "leave it out"),
        ({"layers": [3]}, r"accepted.*0\.\.2"),
        ({"layers": "every-fourth"}, "every-4th"),
    ):
        with pytest.raises(ValueError, match=message):
            retrofit(stock(), **options)
    with pytest.raises(ValueError, match="layer 1 is already retrofitted with 'mta'"):
        retrofit(retrofit(stock(), layers=[1]), mixer="talking_heads", layers="all")
    with pytest.raises(ValueError, match="not retrofitted"):
        new_parameters(stock())


def test_a_shared_config_stays_stock() -> None:
    """Another model made from the same config object that turns into a retrofitted one on its next save."""
    first = stock()
    second = LlamaForCausalLM(first.config)
    retrofit(first, layers=[1])
    assert type(second.config) is LlamaConfig
    assert "retrofit" not in second.config.to_dict()
    assert type(first.model.config).__name__ == "RetrofittedLlamaConfig"


@pytest.mark.parametrize("mixer", ["mta_v1", "mta_toy", "talking_heads", "memora", "gated_delta_net"])
def test_relatives_start_identical_too(mixer: str) -> None:
    """A preset whose norm or initial value survives the retrofit, or a merged kernel that starts elsewhere."""
    ids = tokens(2, 12)
    own = {"merged": True} if mixer == "mta_v1" else {}
    model = retrofit(stock().double(), mixer=mixer, layers="all", **own)
    expected = logits(stock().double(), ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-12, rtol=0)
    assert (logits(moved(model), ids) - expected).abs().max() > 1e-3


def test_copies_pickles_and_dtypes() -> None:
    """Classes made at run time that cannot be copied or pickled; new parameters of another dtype than the model's."""
    model, ids = moved(retrofit(stock(), layers=[1])), tokens(1, 8)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again, ids), logits(model, ids))
    half = retrofit(retrofit(stock().to(torch.bfloat16), layers=[1]), mixer="yaad", layers=[1])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert logits(half, ids).isfinite().all()


@pytest.mark.parametrize("kind", ["bool", "float", "padding sees all"])
def test_masks_are_read_as_starts(kind: str) -> None:
    """Padding taken for tokens where a release of transformers lets it see everything; starts that decrease along a row."""
    start = torch.tensor([[0, 1, 2, 2], [0, 0, 2, 2], [0, 0, 0, 3]])  # two of padding; two documents; padding at the right
    real = torch.tensor([[False, False, True, True], [True] * 4, [True, True, True, False]])
    key, place = torch.arange(4), torch.arange(4)[:, None]
    mask = (key >= start[..., None]) & (key <= place) & real[..., None]
    if kind == "padding sees all":
        mask = mask | ~real[..., None] & (place < 3)
    if kind == "float":
        mask = torch.zeros(3, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
    seen = read_mask(mask[:, None], 3, 4, 4)
    assert torch.equal(seen.start, start)
    assert torch.equal(seen.real, real)
    later = read_mask(mask[:2, None, 2:], 2, 2, 4)  # two new tokens after two cached ones
    assert torch.equal(later.start, start[:2, 2:])
    assert later.real is None


@pytest.mark.parametrize(
    ("layers", "n_layers", "expected"),
    [
        ("every-4th", 12, [2, 6, 10]),
        ("every-4th", 2, [1]),
        ("every-4th", 1, [0]),
        ("every-1st", 3, [0, 1, 2]),
        ("every-2nd", 4, [1, 3]),
        ("all", 2, [0, 1]),
        ("3, 1", 4, [1, 3]),
        ((2, 0), 3, [0, 2]),
    ],
)
def test_chosen_layers(layers: Any, n_layers: int, expected: list[int]) -> None:
    """Layers other than the paper's, or the numbers that were typed."""
    assert chosen_layers(layers, n_layers) == expected
