"""The cache object by itself."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recollect.models import RecollectCache
from recollect.models.cache import cache_bytes, cache_of
from recollect.models.memory import state_bytes
from recollect.state import nbytes
from tests.models.conftest import NAMES, tiny, tokens


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_selected_repeated_and_reordered(name: str) -> None:
    """After any choice of rows the cache continues as those rows would have."""
    model, ids, new = tiny(name), tokens(3, 6), tokens(3, 1, seed=8)
    expected = model(new, past_key_values=model(ids).past_key_values).logits

    def continued(change, index: list[int]) -> torch.Tensor:
        cache = model(ids).past_key_values
        change(cache)
        assert cache.batch_size == len(index)
        return model(new[index], past_key_values=cache).logits

    cases = [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]
    for change, index in cases:
        torch.testing.assert_close(continued(change, index), expected[index], atol=1e-12, rtol=0)


def test_snapshot_is_not_changed_by_what_follows() -> None:
    """States are values: one prefix can be continued twice without copying."""
    model, ids = tiny(), tokens(2, 6)
    cache = model(ids).past_key_values
    snapshot = RecollectCache(cache.states, n_seen=cache.n_seen)
    first = model(ids, past_key_values=cache).logits
    assert (cache.n_seen, snapshot.n_seen) == (12, 6)
    assert torch.equal(model(ids, past_key_values=snapshot).logits, first)


def test_reset_is_the_start() -> None:
    """A reset cache serves another batch size."""
    model, ids = tiny(), tokens(2, 6)
    cache = model(ids).past_key_values
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.states) == (0, -1, (None, None))
    assert torch.equal(model(ids[:1], past_key_values=cache).logits, model(ids[:1]).logits)


def test_what_a_state_cannot_do_is_refused() -> None:
    """Cutting tokens off, and serving another model."""
    cache = tiny()(tokens(1, 4)).past_key_values
    with pytest.raises(ValueError, match="cannot forget its last tokens; keep a snapshot"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot serve another model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_nbytes_counts_every_layer() -> None:
    """The number that `compare` prints."""
    cache = tiny()(tokens(2, 5)).past_key_values
    assert cache.nbytes() == sum(nbytes(state) for state in cache.states) == 2 * (2 * 2 * 5 * 32 * 8 + 2 * 5 * 8)
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    assert not cache.is_compileable
    assert len(cache) == 2


def test_bytes_are_counted_in_caches_of_any_model() -> None:
    """Prevents a state of 0 bytes beside a model of transformers: 2 layers, keys and values, 2 heads of 8, 7 tokens, fp32."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    assert state_bytes(model, tokens(7)) == cache_bytes(cache_of(model(tokens(1, 7)))) == 2 * 2 * 2 * 8 * 7 * 4
    assert cache_bytes(None) == 0
    own = tiny()
    assert state_bytes(own, tokens(7)) == cache_of(own(tokens(1, 7))).nbytes() > 0
