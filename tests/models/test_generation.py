"""Text generation through Hugging Face's `generate`. Logits are compared, not only tokens: equal tokens hide wrong states."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from recollect.models import RecollectCache
from tests.models.conftest import NAMES, left_pad, tiny, tokens

ROWS = [tokens(3, seed=1), tokens(9, seed=2), tokens(6, seed=3)]


def generate(model, ids, mask, **options):
    """Greedy unless told otherwise; sequences and the logits of each step."""
    defaults = {
        "do_sample": False,
        "max_new_tokens": 7,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    out = model.generate(ids, attention_mask=mask, **{**defaults, **options})
    return out.sequences, torch.stack(out.logits, dim=1), out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_left_padded_batch_equals_one_by_one(name: str, dtype: torch.dtype) -> None:
    """Tokens and logits of every step. `generate` returns logits in fp32, hence 1e-5 in fp64; in fp32 each of the two layers sums
    over 32 channels, which may be off by 32 roundings of the largest logit.
    """
    model = tiny(name, dtype=dtype)
    ids, mask = left_pad(ROWS)
    sequences, logits, _ = generate(model, ids, mask)
    for i, row in enumerate(ROWS):
        alone, alone_logits, _ = generate(model, row[None], torch.ones(1, len(row)))
        assert torch.equal(sequences[i, ids.shape[1] :], alone[0, len(row) :])
        roundings = 2 * 32 * torch.finfo(torch.float32).eps * alone_logits.abs().max().item()
        torch.testing.assert_close(logits[i], alone_logits[0], atol=1e-5 if dtype == torch.float64 else roundings, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_left_padded_decoding_equals_one_by_one_in_fp64(name: str) -> None:
    """The same by hand, where fp64 logits can be seen: 1e-10."""
    model = tiny(name)
    ids, mask = left_pad(ROWS)
    out = model(ids, attention_mask=mask)
    alone = [model(row[None]) for row in ROWS]
    for _ in range(6):
        torch.testing.assert_close(out.logits[:, -1], torch.cat([one.logits[:, -1] for one in alone]), atol=1e-10, rtol=0)
        new = out.logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        out = model(new, attention_mask=mask, past_key_values=out.past_key_values)
        alone = [model(new[i : i + 1], past_key_values=one.past_key_values) for i, one in enumerate(alone)]


@pytest.mark.parametrize("name", NAMES)
def test_cached_greedy_equals_uncached(name: str) -> None:
    """Every step with states against the whole sequence anew."""
    model = tiny(name)
    ids, mask = left_pad(ROWS)
    sequences, logits, out = generate(model, ids, mask)
    again, uncached, plain = generate(model, ids, mask, use_cache=False)
    assert torch.equal(sequences, again)
    torch.testing.assert_close(logits, uncached, atol=1e-6, rtol=0)
    assert isinstance(out.past_key_values, RecollectCache)
    assert plain.past_key_values is None


@pytest.mark.parametrize("name", NAMES)
def test_cached_beams_equal_uncached(name: str) -> None:
    """Beam search reorders the states' rows at every step; without states there is nothing to reorder wrongly."""
    model = tiny(name)
    ids, mask = left_pad(ROWS)
    options = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True}
    sequences, _, out = generate(model, ids, mask, **options)
    again, _, plain = generate(model, ids, mask, use_cache=False, **options)
    assert sequences.shape[0] == 9
    assert torch.equal(sequences, again)
    torch.testing.assert_close(out.sequences_scores, plain.sequences_scores, atol=1e-6, rtol=0)
    assert len(torch.unique(out.beam_indices)) > 3  # beams did change places


@pytest.mark.parametrize("name", NAMES)
def test_cached_sampling_equals_uncached(name: str) -> None:
    """The same seed draws the same tokens, for several sequences per prompt."""
    model = tiny(name)
    ids, mask = left_pad(ROWS)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(generate(model, ids, mask, do_sample=True, num_return_sequences=2, use_cache=use_cache)[0])
    assert drawn[0].shape == (6, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("name", NAMES)
def test_continues_from_a_returned_cache(name: str) -> None:
    """Generating 4 and then 4 more equals generating 8, also through a prefill in pieces."""
    model = tiny(name)
    ids, mask = left_pad(ROWS)
    whole, _, _ = generate(model, ids, mask, max_new_tokens=8)
    first, _, out = generate(model, ids, mask, max_new_tokens=4, prefill_chunk_size=4)
    longer = torch.cat((mask, mask.new_ones(3, 4)), dim=1)
    assert out.past_key_values.get_seq_length() == 9 + 3  # the last token drawn has not been read
    second, _, _ = generate(model, first, longer, max_new_tokens=4, past_key_values=out.past_key_values)
    assert torch.equal(second, whole)


def test_generates_from_embeddings() -> None:
    """The prompt may be given as embeddings."""
    model = tiny()
    row = ROWS[1][None]
    expected = model.generate(row, max_new_tokens=5, do_sample=False)[:, row.shape[1] :]
    embeds = model.get_input_embeddings()(row)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False), expected)


def test_stops_at_end_of_sequence() -> None:
    """A finished row is filled with padding while the others go on, and disturbs nobody."""
    model = tiny()
    ids, mask = left_pad(ROWS)
    free, _, _ = generate(model, ids, mask)
    stop = int(free[0, ids.shape[1] + 1])
    sequences, _, _ = generate(model, ids, mask, eos_token_id=stop)
    for i in range(3):
        new, expected = sequences[i, ids.shape[1] :].tolist(), free[i, ids.shape[1] :].tolist()
        n_kept = expected.index(stop) + 1 if stop in expected else len(expected)
        assert new == (expected[:n_kept] + [0] * len(expected))[: len(new)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' holds keys and values"),
        ({"past_key_values": DynamicCache()}, "must be a RecollectCache; got DynamicCache"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
    ],
)
def test_impossible_generation_is_refused(options: dict, message: str) -> None:
    """What a state cannot do is said, not silently replaced."""
    with pytest.raises(ValueError, match=message):
        tiny().generate(tokens(1, 4), max_new_tokens=3, do_sample=False, **options)


def test_right_padded_prompts_are_refused() -> None:
    """Continuing behind padding would be wrong without a word."""
    ids, mask = left_pad(ROWS)
    with pytest.raises(ValueError, match="padding"):
        tiny().generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=3, do_sample=False)
