"""Caches that grow in place stay values: nobody's older cache changes, and nothing is copied that need not be."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import recollect
from recollect import state
from recollect.ops.growing import LEAST, _rooms, appended


@pytest.fixture(autouse=True)
def decoding() -> Iterator[None]:
    """Without gradients, as one decodes."""
    with torch.no_grad():
        yield


def tokens(n: int, *, seed: int = 0, batch: int = 2) -> Tensor:
    """[B, n, 3, 4]"""
    return torch.randn(batch, n, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 5, 1), (7, 100, 1, 300), (1,) * 200])
def test_it_equals_cat(lengths: tuple[int, ...]) -> None:
    """Over growth within the room and beyond it."""
    cache, parts = tokens(5), [tokens(5)]
    for i, n in enumerate(lengths):
        parts.append(tokens(n, seed=i))
        cache = appended(cache, parts[-1])
        assert torch.equal(cache, torch.cat(parts, 1))


def test_tokens_are_written_behind_the_cache() -> None:
    """Prevents a copy of the whole cache for every token."""
    cache = appended(tokens(5), tokens(1))
    first = cache.data_ptr()
    for i in range(LEAST - 1):
        cache = appended(cache, tokens(1, seed=i))
        assert cache.data_ptr() == first


def test_a_cache_may_be_continued_twice() -> None:
    """Prevents a second continuation that writes into the first, and an older cache that changes."""
    old = appended(tokens(5), tokens(1))
    before = old.clone()
    first = appended(old, tokens(2, seed=1))
    second = appended(old, tokens(2, seed=2))
    third = appended(first, tokens(1, seed=3))
    again = appended(first, tokens(1, seed=4))
    assert torch.equal(old, before)
    assert torch.equal(first, torch.cat((before, tokens(2, seed=1)), 1))
    assert torch.equal(second, torch.cat((before, tokens(2, seed=2)), 1))
    assert torch.equal(third, torch.cat((first, tokens(1, seed=3)), 1))
    assert torch.equal(again, torch.cat((first, tokens(1, seed=4)), 1))


def test_threads_may_continue_one_cache() -> None:
    """Prevents two that write to the same place."""
    old = appended(tokens(5), tokens(1))
    results: dict[int, Tensor] = {}

    def go(seed: int) -> None:
        cache = old
        with torch.no_grad():  # of a thread
            for i in range(30):
                cache = appended(cache, tokens(1, seed=100 * seed + i))
        results[seed] = cache

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, cache in results.items():
        assert torch.equal(cache[:, 6:], torch.cat([tokens(1, seed=100 * seed + i) for i in range(30)], 1))


def test_gradients_go_through() -> None:
    """Prevents writing where a gradient is wanted: to what is appended, or to the buffer of a cache that a graph has saved."""
    cache, new = appended(tokens(5), tokens(1)), tokens(2, seed=1).requires_grad_()
    with torch.enable_grad():
        longer = appended(cache, new)
        (grad,) = torch.autograd.grad(longer.square().sum(), new)
        assert torch.equal(grad, 2 * new)
        weight = torch.ones(4, requires_grad=True)
        y = cache @ weight
        appended(cache, tokens(1))
        (grad,) = torch.autograd.grad(y.sum(), weight)
        torch.testing.assert_close(grad, cache.sum((0, 1, 2)))


def test_inference_mode_and_its_outside_may_take_turns() -> None:
    """Prevents an update of an inference tensor outside, which PyTorch refuses."""
    cache, parts = tokens(5), [tokens(5)]
    for i in range(6):
        parts.append(tokens(1, seed=i))
        with torch.inference_mode(i % 3 > 0):
            cache = appended(cache, parts[-1])
    assert torch.equal(cache, torch.cat(parts, 1))


def test_other_shapes_are_errors_as_of_cat() -> None:
    """Prevents a batch of one that is spread over many, or numbers that are rounded without a word."""
    cache = appended(tokens(5), tokens(1))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        appended(cache, tokens(1, batch=1))
    assert appended(cache, tokens(1).double()).dtype == torch.float64


def test_copies_have_no_room() -> None:
    """Prevents a copied state that writes into the original's buffer; and rooms that outlive their caches."""
    cache = appended(tokens(5), tokens(1))
    for other in (copy.deepcopy(cache), cache.clone(), cache.detach()):
        appended(other, tokens(1, seed=1))
        assert torch.equal(appended(cache, tokens(1, seed=2))[:, 6:], tokens(1, seed=2))
    gc.collect()
    before = len(_rooms)
    del cache, other
    gc.collect()
    assert len(_rooms) < before


@pytest.mark.parametrize("name", ["attention", "mta", "diff", "talking_heads"])
def test_a_mixer_decodes_without_copying_its_cache(name: str) -> None:
    """And two continuations of one state give what each gives alone."""
    torch.manual_seed(0)
    mixer = recollect.build(name, dim=16, n_heads=2).eval()
    x = torch.randn(1, 12, 16)
    whole, _ = mixer(x)
    other, _ = mixer(torch.cat((x[:, :9], x[:, :3]), 1))
    _, cached = mixer(x[:, :8])
    _, cached = mixer(x[:, 8:9], cached)
    places = [t.data_ptr() for n, t in state.leaves(cached) if n.rpartition(".")[2] in ("k", "v")]
    assert len(places) == 2
    ends = []
    for tail in (x[:, 9:], x[:, :3]):
        now, outputs = cached, []
        for t in range(3):
            y, now = mixer(tail[:, t : t + 1], now)
            outputs.append(y)
        ends.append(torch.cat(outputs, 1))
        kept = [t.data_ptr() for n, t in state.leaves(now) if n.rpartition(".")[2] in ("k", "v")]
        assert (kept == places) == (len(ends) == 1)
    torch.testing.assert_close(ends[0], whole[:, 9:])
    torch.testing.assert_close(ends[1], other[:, 9:])
