"""The forward pass: its equation, its loss, padding, states, precision, checkpointing, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from recollect.models import RecollectCache, RecollectForCausalLM
from recollect.models.cache import CACHE, cache_of
from recollect.models.modeling import next_token_loss
from tests.models.conftest import NAMES, left_pad, tiny, tiny_config, tokens


def test_forward_is_the_pre_norm_transformer() -> None:
    """The whole model written out: a missing norm, residual or tie would change it."""
    model = tiny()
    weights = dict(model.named_parameters())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"model.{name}.weight"]

    ids = tokens(2, 9)
    x = weights["model.embed_tokens.weight"][ids]
    for i, block in enumerate(model.model.layers):
        x = x + block.mixer(norm(x, f"layers.{i}.mixer_norm"))[0]
        h = norm(x, f"layers.{i}.mlp_norm")
        gate, up = h @ weights[f"model.layers.{i}.mlp.gate.weight"].T, h @ weights[f"model.layers.{i}.mlp.up.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ weights[f"model.layers.{i}.mlp.down.weight"].T
    expected = norm(x, "norm") @ weights["model.embed_tokens.weight"].T
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-12, rtol=0)


def test_loss_is_the_next_tokens_cross_entropy() -> None:
    """Labels are shifted inside, -100 is ignored, the mean is over what was scored."""
    model, ids = tiny(), tokens(3, 8)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2] = -100
    out = model(ids, labels=labels)
    logp = out.logits.log_softmax(-1)
    terms = [-logp[b, t, labels[b, t + 1]] for b in range(3) for t in range(7) if labels[b, t + 1] != -100]
    assert len(terms) == 3 + 7
    torch.testing.assert_close(out.loss, sum(terms) / len(terms), atol=1e-12, rtol=0)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=25).loss, sum(terms) / 25, atol=1e-12, rtol=0)


def test_loss_without_labels_to_score_is_zero() -> None:
    """A batch in which nothing is asked must not turn the weights into NaN."""
    logits = torch.randn(2, 4, 7, requires_grad=True)
    loss = next_token_loss(logits, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def test_loss_of_half_precision_logits_is_computed_in_fp32() -> None:
    """A bf16 loss has two digits."""
    logits = torch.randn(2, 6, 50).bfloat16()
    labels = torch.randint(0, 50, (2, 6))
    expected = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    loss = next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=0)


def test_logits_to_keep() -> None:
    """The last n, or the chosen, positions of the same logits."""
    model, ids = tiny(), tokens(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:], atol=1e-14, rtol=0)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]], atol=1e-14, rtol=0)


def test_inputs_embeds_replace_input_ids() -> None:
    """The same logits from the embeddings themselves."""
    model, ids = tiny(), tokens(2, 6)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_hidden_states_and_tuples() -> None:
    """One hidden state before each block and one after the last; `return_dict=False` gives a tuple."""
    model, ids = tiny(), tokens(2, 6)
    out = model.model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert model(ids).hidden_states is None
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_any_split_with_carried_states_equals_one_call(name: str) -> None:
    """Prefill in pieces, then token by token, on a batch padded on the left: every logit as without a cache."""
    model = tiny(name)
    ids, mask = left_pad([tokens(19, seed=1), tokens(12, seed=2), tokens(5, seed=3)])
    full = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts, at = None, [], 0
    for length in (4, 1, 6, 1, 1, 3, 1, 2):
        out = model(ids[:, at : at + length], attention_mask=mask[:, : at + length], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + length
        parts.append(out.logits)
        assert cache.get_seq_length() == at
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], full[real], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    """Rows of a padded batch give the logits that each gives alone."""
    model = tiny(name)
    rows = [tokens(11, seed=1), tokens(4, seed=2), tokens(7, seed=3)]
    ids, mask = left_pad(rows)
    if side == "right":
        ids, mask = left_pad([row.flip(0) for row in rows])
        ids, mask = ids.flip(1), mask.flip(1)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i][mask[i].bool()], model(row[None]).logits[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_isolated(name: str) -> None:
    """Two documents in one row give the logits of each alone."""
    model = tiny(name)
    first, second = tokens(6, seed=1), tokens(8, seed=2)
    ids = torch.cat((first, second))[None]
    documents = torch.tensor([[4] * 6 + [5] * 8])
    logits = model(ids, document_ids=documents).logits[0]
    torch.testing.assert_close(logits[:6], model(first[None]).logits[0], atol=1e-10, rtol=0)
    # Positions go on through a row, so the second document is compared with one that starts later: behind another first
    # document.
    other = model(torch.cat((tokens(6, seed=9), second))[None], document_ids=documents).logits[0]
    torch.testing.assert_close(logits[6:], other[6:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_start_states_equal_no_states(name: str) -> None:
    """`init_states` is the start of the sequence."""
    model, ids = tiny(name), tokens(2, 6)
    out = model(ids, past_key_values=RecollectCache(model.init_states(2)))
    torch.testing.assert_close(out.logits, model(ids).logits, atol=1e-12, rtol=0)


def test_hybrids_are_data() -> None:
    """Every mixer in one model."""
    model = tiny([*NAMES])
    ids, mask = left_pad([tokens(9, seed=1), tokens(6, seed=2)])
    full = model(ids, attention_mask=mask).logits
    head = model(ids[:, :5], attention_mask=mask[:, :5])
    tail = model(ids[:, 5:], attention_mask=mask, past_key_values=head.past_key_values)
    torch.testing.assert_close(tail.logits, full[:, 5:], atol=1e-10, rtol=0)


def test_use_cache_decides_who_is_changed() -> None:
    """A cache given with use_cache=False is only read; training makes none unasked."""
    model, ids = tiny(), tokens(2, 6)
    cache = model(ids).past_key_values
    states = cache.states
    out = model(ids, past_key_values=cache, use_cache=False)
    assert out.past_key_values is None
    assert cache.n_seen == 6
    assert cache.states is not states
    assert all(a is b for a, b in zip(cache.states, states, strict=True))
    assert model(ids, past_key_values=cache).past_key_values is cache
    assert cache.n_seen == 12
    assert model.train()(ids).past_key_values is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_the_names_of_all_releases_of_transformers(name: str) -> None:
    """transformers renamed past_key_values to cache in 5.24; code written for either must go on."""
    model, ids = tiny(), tokens(2, 6)
    first = model(ids[:, :4])
    out = model(ids[:, 4:], **{name: cache_of(first)})
    torch.testing.assert_close(out.logits, model(ids).logits[:, 4:], atol=1e-10, rtol=0)
    assert cache_of(out) is cache_of(first) is out.past_key_values
    said = model.generate(ids[:1], attention_mask=torch.ones(1, 6), max_new_tokens=3, do_sample=False)
    again = model.generate(
        ids[:1], attention_mask=torch.ones(1, 6), max_new_tokens=3, do_sample=False, **{CACHE: RecollectCache([None, None])}
    )
    assert torch.equal(said, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: m(), r"give input_ids \[batch, tokens\] or inputs_embeds .*; got neither"),
        (lambda m, ids: m(ids, inputs_embeds=torch.zeros(2, 6, 32)), "got both"),
        (lambda m, ids: m(ids[0]), r"the input must be \[batch, tokens\] with at least one token; got \[6\]"),
        (lambda m, ids: m(ids[:, :0]), r"at least one token; got \[2, 0\]"),
        (lambda m, ids: m(ids, attention_mask=torch.ones(2, 5)), r"= \[2, 6\] \(0 past, 6 new\); got \[2, 5\]"),
        (lambda m, ids: m(ids, attention_mask=torch.tensor([[1] * 6, [1, 0, 1, 1, 1, 1]])), "row 1 has padding between tokens"),
        (
            lambda m, ids: m(ids, document_ids=torch.zeros(6)),
            r"document_ids must be \[batch, new tokens\] = \[2, 6\]; got \[6\]",
        ),
        (lambda m, ids: m(ids, labels=ids[:, 1:]), r"labels must be \[batch, tokens\] = \[2, 6\]; got \[2, 5\]"),
        (lambda m, ids: m(ids, labels=ids, logits_to_keep=1), "leave logits_to_keep out"),
        (lambda m, ids: m(ids, past_key_values=DynamicCache()), "must be a RecollectCache; got DynamicCache"),
        (
            lambda m, ids: m(ids, cache=RecollectCache([None] * 2), past_key_values=RecollectCache([None] * 2)),
            "give one of them",
        ),
        (lambda m, ids: m(ids, past_key_values=RecollectCache([None])), "states of 1 layers; this model has 2"),
        (lambda m, ids: m(ids, past_key_values=m(ids[:1]).past_key_values), "has 1 rows; the input has 2"),
    ],
)
def test_impossible_calls_are_refused(call, message: str) -> None:
    """One clear sentence rather than a shape error three modules down."""
    with pytest.raises(ValueError, match=message):
        call(tiny(), tokens(2, 6))


def test_right_padding_ends_a_cache() -> None:
    """A state that has run over padding behind its tokens is wrong for what follows: scoring is fine, continuing is refused."""
    model, ids = tiny(), tokens(2, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="ends in padding on the right, so it cannot be continued"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # the name changes within transformers 5
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    """Recomputing blocks in the backward pass gives the same loss and gradients, and does recompute."""
    model = tiny(name).train()
    ids, mask = left_pad([tokens(9, seed=1), tokens(5, seed=2)])
    labels = ids.masked_fill(mask == 0, -100)
    calls = []
    for block in model.model.layers:
        block.mixer.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        calls.clear()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    loss, plain = gradients()
    assert len(calls) == 2
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, recomputed = gradients()
    assert len(calls) == 4
    assert again == loss
    assert len(plain) == len(recomputed) > 10
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_truncated_back_propagation(reentrant: bool) -> None:
    """States carried through training, detached: the forward is exact and the gradient stops there, checkpointed or not."""
    model = tiny().train()
    ids = tokens(2, 10)
    whole = model(ids).logits

    def tail_gradient() -> list[torch.Tensor]:
        model.zero_grad()
        cache = model(ids[:, :6], use_cache=True).past_key_values
        cache.detach()
        out = model(ids[:, 6:], past_key_values=cache)
        torch.testing.assert_close(out.logits, whole[:, 6:], atol=1e-12, rtol=0)
        out.logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = tail_gradient()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one, other in zip(plain, tail_gradient(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_fp32(name: str) -> None:
    """Finite, and as near as eight bits allow: rounding errors of 2^-8 in about ten places add up to a few percent of the
    logits' size. Where rounding the weights alone moves the logits by more (a norm after a read that nearly cancels), rounding
    activations in as many places may do so too, and their sum again: three times that."""
    model = tiny(name, dtype=torch.float32)
    ids, mask = left_pad([tokens(24, seed=1), tokens(9, seed=2)])
    exact = model(ids, attention_mask=mask).logits[mask.bool()]
    half = copy.deepcopy(model).to(torch.bfloat16)(ids, attention_mask=mask).logits
    assert half.dtype == torch.bfloat16
    error = half[mask.bool()].float() - exact
    assert error.isfinite().all()
    rounded = copy.deepcopy(model).to(torch.bfloat16).float()
    inherent = rounded(ids, attention_mask=mask).logits[mask.bool()] - exact
    assert error.square().mean().sqrt() < max(0.05 * exact.std(), 3 * inherent.square().mean().sqrt())


def test_fp64_stays_fp64() -> None:
    """Norms must not pass through fp32 on the way."""
    model, ids = tiny(), tokens(1, 5)
    assert model(ids).logits.dtype == torch.float64
    model.model.norm.weight.data.add_(1e-12)
    assert not torch.equal(model(ids).logits, tiny()(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "diff", "mta"])
def test_compiled_forward_equals_eager(name: str) -> None:
    """`torch.compile` gives the same logits, with and without padding."""
    model = tiny(name, dtype=torch.float32, num_hidden_layers=1)
    compiled = torch.compile(model)
    ids, mask = left_pad([tokens(12, seed=1), tokens(7, seed=2)])
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=2e-5, rtol=0)
    real = mask.bool()
    padded = compiled(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(padded[real], model(ids, attention_mask=mask).logits[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str) -> None:
    """Every parameter gets a gradient, and a few steps on one batch lower its loss."""
    torch.manual_seed(1)
    model = RecollectForCausalLM(tiny_config(name)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = tokens(4, 16)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
