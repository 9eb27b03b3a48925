"""The chunked scan's backward pass beyond one segment: only states between segments are kept, what is inside is computed again.

Axis legend: B batch, T time, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect import state as states
from recollect.ops.miras import MirasState, Parameters
from recollect.ops.miras import chunked as module
from tests.laws import assert_near, assert_same_state
from tests.ops.miras.cases import Draw
from tests.ops.miras.product_space import BATCH, Choice, Example, example

EXACT, GRADIENT = 1e-12, 1e-10
LENGTH = 30

CHOICES = [
    Choice("mlp2", "l2", "l2", "gd", 4, "linear", "previous", "channels"),
    Choice("mlp2", "l2", "l2", "momentum", 4, "linear", "previous", "scalar"),
    Choice("gated_mlp", "l2", "l2", "omega", 4, "linear", "previous", "scalar"),
    Choice("mlp1", "l2", "l2", "muon", 4, "linear", "previous", "scalar"),
    Choice("mlp2", "l2", "kl", "gd", 4, "linear", "previous", "channels"),
    Choice("mlp2", "lp3", "lq-safe", "gd", 4, "exact", "previous", "channels"),
    Choice("matrix", "l2", "elastic_net", "gd", 4, "linear", "previous", "channels"),
    Choice("mlp3-bare", "norm", "towards_initial", "gd", 1, "linear", "decayed", "scalar"),
]


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Segments of two chunks, recomputed from the third chunk on; the first chunks of the segments that were checkpointed."""
    monkeypatch.setattr(module, "SEGMENT", 8)
    monkeypatch.setattr(module, "KEPT_SEGMENTS", 1)
    starts: list[int] = []
    original = module.checkpoint

    def counted(run: Callable[..., Any], state: MirasState, first: int, last: int, **options: Any) -> Any:
        starts.append(first)
        return original(run, state, first, last, **options)

    monkeypatch.setattr(module, "checkpoint", counted)
    return starts


def marks() -> dict[str, Tensor]:
    """Documents that end inside segments and at their ends, padding at the left and in between."""
    reset, valid = torch.zeros(BATCH, LENGTH, dtype=torch.bool), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    reset[0, [8, 19]] = reset[1, [5, 16, 17]] = True
    valid[0, :3] = valid[1, 11:13] = False
    return {"reset": reset, "valid": valid}


def leaves(made: Example) -> Example:
    """The same with gradients recorded for every tensor."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    fast, slow = (tuple(leaf(part) for part in parts) for parts in made.parameters)
    return made.sequence(leaf)._replace(parameters=Parameters(fast, slow))


def gradients(made: Example, **options: Any) -> tuple[Tensor, MirasState, list[Tensor]]:
    """y, the last state, and the gradients of a sum over both with respect to every tensor that goes in."""
    made = leaves(made)
    y, state = made.scan(**options)
    total = (y * Draw(8).normal(*y.shape)).sum()
    total = total + sum(leaf.sin().sum() for _, leaf in states.leaves(state) if leaf.requires_grad)
    return y, state, list(torch.autograd.grad(total, made.tensors(), materialize_grads=True))


def assert_same(made: Example, **options: Any) -> None:
    """Chunks equal the token loop: outputs, last state and every gradient."""
    y, state, found = gradients(made, backend="chunked", **options)
    wanted, last, exact = gradients(made, backend="sequential", **options)
    assert_near(y, wanted, EXACT, "y")
    assert_same_state(state, last, EXACT, "last")
    for n, (actual, expected) in enumerate(zip(found, exact, strict=True)):
        assert_near(actual, expected, GRADIENT, f"gradient of tensor {n}")


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_recomputed_segments_have_exact_gradients(choice: Choice, short_segments: list[int]) -> None:
    """Prevents a state that is cut from the graph between segments, and one that recomputing reads after it has moved on."""
    made = example(choice, length=LENGTH)
    assert_same(made)
    n_chunks = -(-LENGTH // choice.chunk_size)
    group = 8 // choice.chunk_size
    assert short_segments == list(range(0, n_chunks, group))


@pytest.mark.parametrize("choice", CHOICES[:6], ids=str)
def test_recomputed_segments_with_documents_and_padding(choice: Choice, short_segments: list[int]) -> None:
    """Prevents a document that starts inside a recomputed segment from losing the gradient of the learned memory."""
    assert_same(example(choice, length=LENGTH), **marks())
    assert len(short_segments) > 2


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("choice", CHOICES[:6], ids=str)
def test_gradients_flow_through_segments_of_two_calls(choice: Choice) -> None:
    """Prevents a carried state (an open chunk, its anchor, the window) that a recomputed segment takes as a constant."""
    found = []
    for backend in ("chunked", "sequential"):
        made = leaves(example(choice, length=LENGTH))
        whole = slice(None)
        first, carried = made.part(whole, slice(0, 13)).scan(backend=backend)
        second, _ = made.part(whole, slice(13, LENGTH)).scan(carried, backend=backend)
        y = torch.cat((first, second), dim=1)
        found.append(torch.autograd.grad((y * Draw(8).normal(*y.shape)).sum(), made.tensors(), materialize_grads=True))
    for n, (actual, wanted) in enumerate(zip(*found, strict=True)):
        assert_near(actual, wanted, GRADIENT, f"gradient of tensor {n}")


def test_a_text_beyond_what_is_kept_whole() -> None:
    """Prevents what short segments hide: the real sizes, on more tokens than are kept without recomputing.

    One layer: through the norms of two (over four channels here) a rounding error grows to 1e-12 over such a text, in both forms.
    """
    choice = Choice("mlp1", "l2", "l2", "gd", 16, "linear", "previous", "channels")
    made = example(choice, length=module.SEGMENT * module.KEPT_SEGMENTS + 41)
    assert_same(made.part(slice(0, 1), slice(None)))


# --- memory -----------------------------------------------------------------------------------------------------------------


def kept_bytes(choice: Choice, length: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the graph of a scan over `length` tokens holds: saved tensors, and the states that checkpoints start from.

    (The inputs, which every segment reads again, are the caller's.)
    """
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not be used twice while we count

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    original = module.checkpoint

    def counted(run: Callable[..., Any], state: MirasState, first: int, last: int, **options: Any) -> Any:
        for _, leaf in states.leaves(state):
            count(leaf)
        return original(run, state, first, last, **options)

    made = leaves(example(choice, length=length))
    with monkeypatch.context() as patched, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        patched.setattr(module, "checkpoint", counted)
        y, _ = made.scan(backend="chunked")
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("choice", CHOICES[:5], ids=str)
def test_memory_grows_linearly_with_the_text(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a backward pass that keeps something of the size T^2, and one that keeps every chunk's inside."""
    monkeypatch.setattr(module, "SEGMENT", 16)
    monkeypatch.setattr(module, "KEPT_SEGMENTS", 1)
    held = [kept_bytes(choice, n, monkeypatch) for n in (64, 128, 192)]
    assert held[2] - held[1] == held[1] - held[0] > 0  # the same for every 64 tokens
    monkeypatch.setattr(module, "KEPT_SEGMENTS", 10**9)
    assert held[1] < kept_bytes(choice, 128, monkeypatch) / 3
