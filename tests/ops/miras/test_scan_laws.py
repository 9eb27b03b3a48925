"""The laws of `scan`, over a pairwise sample of the whole product space: memory x bias x retention x rule x chunk size x read x ...

Each combination either is refused with a message that names what would work, or obeys every law.

Axis legend: B batch, T time, H heads, V value dim.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from recollect import state as states
from recollect.ops.miras import MirasState
from tests.laws import EXACT, assert_bitwise, assert_near, assert_same_state
from tests.ops.miras.cases import Draw
from tests.ops.miras.equality import BACKENDS
from tests.ops.miras.plain import everywhere
from tests.ops.miras.product_space import (
    AXES,
    BATCH,
    LENGTH,
    REGISTRIES,
    VARIANTS,
    Choice,
    Example,
    example,
    pairwise_sample,
    special_forms,
)

RUNNING, REFUSED = pairwise_sample()


def quick_sample() -> set[Choice]:
    """A few of the forms with an op of their own, and combinations until every value of every axis has run."""
    chosen = special_forms()[::4]
    seen = {part for choice in chosen for part in enumerate(choice)}
    for choice in RUNNING:
        if not seen >= set(enumerate(choice)):
            chosen.append(choice)
            seen |= set(enumerate(choice))
    return set(chosen)


QUICK = quick_sample()


def parameters_of(choices: Sequence[Choice]) -> list[ParameterSet]:
    """Each choice as a test: `QUICK` always, the whole sample with `-m "slow or not slow"`."""
    return [pytest.param(choice, marks=() if choice in QUICK else pytest.mark.slow, id=str(choice)) for choice in choices]


combinations = pytest.mark.parametrize("choice", parameters_of(RUNNING))

ALL = slice(None)


def in_pieces(
    made: Example, cuts: Sequence[int], *, reset: Tensor | None = None, valid: Tensor | None = None, backend: str = "chunked"
) -> tuple[Tensor, MirasState]:
    """y and the last state of a sequence cut at `cuts`."""
    carried, outputs = None, []
    for start, stop in itertools.pairwise([0, *cuts, made.q.shape[1]]):
        y, carried = made.part(ALL, slice(start, stop)).scan(
            carried,
            reset=None if reset is None else reset[:, start:stop],
            valid=None if valid is None else valid[:, start:stop],
            backend=backend,
        )
        outputs.append(y)
    assert carried is not None
    return torch.cat(outputs, dim=1), carried


def marks(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """reset and valid [B, T]: documents that end inside chunks and at their ends, padding at the left and in between."""
    reset = torch.zeros(BATCH, length, dtype=torch.bool)
    valid = torch.ones(BATCH, length, dtype=torch.bool)
    reset[0, 6] = reset[1, 3] = reset[1, 4] = reset[1, 8] = True
    valid[0, :2] = valid[1, :1] = valid[1, 9:10] = False
    return reset, valid


def noise_like(made: Example, seed: int) -> Example:
    """Other values everywhere, in the same ranges."""
    draw = Draw(seed)

    def shuffled(x: Tensor) -> Tensor:
        order = torch.randperm(x.numel(), generator=draw.generator)
        return 1.7 * x.flatten()[order].reshape(x.shape)

    return made.sequence(shuffled)


def mixed(made: Example, other: Example, keep: Tensor) -> Example:
    """`made` where keep [B, T] is True, `other` elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep.view(*keep.shape, *(1,) * (a.dim() - 2)), a, b)

    gates = {name: choose(gate, other.gates[name]) for name, gate in made.gates.items()}
    return made._replace(q=choose(made.q, other.q), k=choose(made.k, other.k), v=choose(made.v, other.v), gates=gates)


def leaves(made: Example) -> Example:
    """The same with gradients recorded for every tensor."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    parameters = made.parameters._replace(
        fast=tuple(leaf(w) for w in made.parameters.fast), slow=tuple(leaf(p) for p in made.parameters.slow)
    )
    return made.sequence(leaf)._replace(parameters=parameters)


# --- the sample itself --------------------------------------------------------------------------------------------------------


def test_sample_holds_every_pair() -> None:
    """Prevents a sample that silently loses a registered name or a pair of values."""
    for axis, registry in REGISTRIES.items():
        assert set(VARIANTS[axis]) <= set(registry)
        assert len(AXES[axis]) >= len(registry)
    held = {pair for choice in (*RUNNING, *REFUSED) for pair in itertools.combinations(enumerate(choice), 2)}
    for (a, left), (b, right) in itertools.combinations(enumerate(AXES.values()), 2):
        for x, y in itertools.product(left, right):
            assert ((a, x), (b, y)) in held


@pytest.mark.parametrize("axis", AXES)
def test_every_value_runs_somewhere(axis: str) -> None:
    """Prevents a registered part that no combination accepts."""
    used = {str(choice._asdict()[axis]) for choice in RUNNING}
    assert used >= {str(value) for value in AXES[axis]}


@pytest.mark.parametrize("choice", REFUSED, ids=str)
def test_refusal_names_what_works(choice: Choice) -> None:
    """Prevents a refusal that leaves the user to guess."""
    with pytest.raises(ValueError, match=r"'\w+'|chunk_size") as refusal:
        choice.spec()
    text = str(refusal.value)
    known = [f"'{name}'" for registry in REGISTRIES.values() for name in registry]
    named = [name for name in known if name in text]
    taken = {
        f"'{name}'" for axis in REGISTRIES for name in REGISTRIES[axis] if re.match(rf"{name}\b", str(choice._asdict()[axis]))
    }
    alternatives = ("chunk_size must be", "chunk_size=1", "read='exact'")
    assert set(named) - taken or any(words in text for words in alternatives), text


# --- laws ---------------------------------------------------------------------------------------------------------------------


@combinations
def test_chunked_equals_sequential(choice: Choice) -> None:
    """Prevents a parallel form that computes another recurrence, with documents and padding or without."""
    made = example(choice)
    reset, valid = marks()
    for masks in ({}, {"reset": reset}, {"valid": valid}, {"reset": reset, "valid": valid}):
        (y, state), (wanted, last) = (made.scan(backend=name, **masks) for name in ("chunked", "sequential"))
        what = f"chunked with {sorted(masks)}"
        assert_near(y, wanted, EXACT, f"{what}: y")
        assert_same_state(state, last, EXACT, what)


@combinations
def test_split_equals_one_call(choice: Choice) -> None:
    """Prevents a state that forgets the open chunk, its anchor, the window or the momentum."""
    made = example(choice)
    reset, valid = marks()
    for masks in ({}, {"reset": reset, "valid": valid}):
        y, state = made.scan(**masks)
        for cuts in ([3], [4], [2, 9], list(range(1, LENGTH))):
            pieces, last = in_pieces(made, cuts, **masks)
            what = f"cuts {cuts} with {sorted(masks)}"
            assert_near(pieces, y, EXACT, f"{what}: y")
            assert_same_state(last, state, EXACT, what)


@combinations
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_equal_each_alone(choice: Choice, backend: str) -> None:
    """Prevents a document that sees the one before it: its memory, its chunk, its window or its momentum."""
    made = example(choice)
    reset, _ = marks()
    y, state = made.scan(reset=reset, backend=backend)
    for b in range(BATCH):
        starts = [0, *torch.nonzero(reset[b]).flatten().tolist(), LENGTH]
        for start, stop in itertools.pairwise(starts):
            alone, last = made.part(slice(b, b + 1), slice(start, stop)).scan(backend=backend)
            assert_near(y[b : b + 1, start:stop], alone, EXACT, f"row {b}, document {start}:{stop}")
        if choice.memory != "growing":
            assert_same_state(states.select(state, torch.tensor([b])), last, EXACT, f"row {b}, the last document")


@combinations
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_the_identity(choice: Choice, backend: str) -> None:
    """Prevents padding that decays, writes, fills chunks or windows, or whose content reaches any bit."""
    made = example(choice)
    _, valid = marks()
    if choice.memory == "growing":  # a cache holds padding: it may stand at the left only
        valid[:, 2:] = True
    y, state = made.scan(valid=valid, backend=backend)
    assert not y[~valid].any()
    for b in range(BATCH):
        real = valid[b]
        alone, last = made.part(slice(b, b + 1), ALL).sequence(lambda x, real=real: x[:, real]).scan(backend=backend)
        assert_near(y[b : b + 1, real], alone, EXACT, f"row {b}")
        if choice.memory != "growing":
            assert_same_state(states.select(state, torch.tensor([b])), last, EXACT, f"row {b}")
    other, after = mixed(made, noise_like(made, 5), valid).scan(valid=valid, backend=backend)
    assert_bitwise(other, y, "other content at padding: y")
    if choice.memory != "growing":
        assert_same_state(after, state, 0.0, "other content at padding")


@combinations
@pytest.mark.parametrize("backend", BACKENDS)
def test_causality_bit_for_bit(choice: Choice, backend: str) -> None:
    """Prevents a chunk that reads its own future, also through rounding or a path chosen by values."""
    made = example(choice)
    other = noise_like(made, 3)
    y, _ = made.scan(backend=backend)
    for t in (1, 4, 6, LENGTH - 1):
        changed, _ = mixed(made, other, torch.arange(LENGTH).expand(BATCH, -1) < t).scan(backend=backend)
        assert_bitwise(changed[:, :t], y[:, :t], f"tokens before {t}")
        assert (changed[:, t] != y[:, t]).any()


@combinations
def test_rows_are_independent(choice: Choice) -> None:
    """Prevents one row of the batch from changing a bit of another."""
    made = example(choice)
    reset, valid = marks()
    rows = torch.tensor([True, False])[:, None].expand(BATCH, LENGTH)
    for masks in ({}, {"reset": reset, "valid": valid}):
        y, _ = made.scan(**masks)
        changed, _ = mixed(made, noise_like(made, 4), rows).scan(**masks)
        assert_bitwise(changed[0], y[0], f"row 0 with {sorted(masks)}")


@combinations
def test_gradients_are_finite_and_equal_between_backends(choice: Choice) -> None:
    """Prevents a detached gradient point, a lost second-order term and NaN behind a mask."""
    reset, valid = marks()
    for masks in ({}, {"reset": reset, "valid": valid}):
        found = []
        for name in BACKENDS:
            made = leaves(example(choice))
            y, state = made.scan(backend=name, **masks)
            total = (y * Draw(8).normal(*y.shape)).sum()
            total = total + sum(leaf.sin().sum() for _, leaf in states.leaves(state) if leaf.requires_grad)
            found.append(torch.autograd.grad(total, made.tensors(), materialize_grads=True))
        names = ["q", "k", "v", *made.gates, *(f"fast {n}" for n in range(9))]
        for name, actual, wanted in zip(names, found[1], found[0], strict=False):
            assert_near(actual, wanted, 1e-10, f"gradient of {name} with {sorted(masks)}")


@combinations
def test_gradient_through_split(choice: Choice) -> None:
    """Prevents a carried state that cuts the graph."""
    found = []
    for cuts in ([], [3, 6]):
        made = leaves(example(choice))
        y, _ = in_pieces(made, cuts)
        found.append(torch.autograd.grad((y * Draw(8).normal(*y.shape)).sum(), made.tensors(), materialize_grads=True))
    for n, (actual, wanted) in enumerate(zip(*reversed(found), strict=True)):
        assert_near(actual, wanted, 1e-10, f"gradient {n}")


@combinations
def test_state_survives_saving(choice: Choice, tmp_path: Path) -> None:
    """Prevents a state with a part that is not saved: the rest of the sequence is the same bit for bit."""
    made = example(choice)
    _, state = made.part(ALL, slice(0, 6)).scan()
    rest = made.part(ALL, slice(6, LENGTH))
    wanted, last = rest.scan(state)
    states.save(state, tmp_path / "memory.safetensors", fingerprint="x")
    loaded = states.load(tmp_path / "memory.safetensors", like=state, fingerprint="x")
    y, after = rest.scan(loaded)
    assert_bitwise(y, wanted, "after loading")
    assert_same_state(after, last, 0.0, "after loading")
    swapped, _ = rest.sequence(lambda x: x.flip(0)).scan(states.select(state, torch.tensor([1, 0])))
    assert_near(swapped.flip(0), wanted, EXACT, "rows of the state selected")


PLAIN = [c for c in RUNNING if c.chunk_size == 1 and c.memory not in ("slots", "growing") and c.rule != "least_squares"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", parameters_of(PLAIN))
def test_chunk_size_one_is_the_plain_recurrence(choice: Choice, backend: str) -> None:
    """Prevents parts that are right alone and put together wrong: sides, axes, order of decay, write and settling."""
    made = example(choice)
    wanted, dual = everywhere(choice.memory, made)
    y, state = made.scan(backend=backend)
    assert_near(y, wanted, EXACT, "y")
    for m, (actual, z) in enumerate(zip(state.dual, dual, strict=True)):
        assert_near(actual, z, EXACT, f"dual {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_equals_log_alpha(backend: str) -> None:
    """Prevents the two ways of giving a gate from differing, and both at once from being taken silently."""
    made = example(next(choice for choice in RUNNING if choice.retention == "l2" and choice.memory == "mlp2"))
    wanted, _ = made.scan(backend=backend)
    gates = {
        ("alpha" if name == "log_alpha" else name): g.exp() if name == "log_alpha" else g for name, g in made.gates.items()
    }
    assert_near(made._replace(gates=gates).scan(backend=backend)[0], wanted, EXACT, "alpha instead of log_alpha")
    with pytest.raises(ValueError, match="alpha"):
        made._replace(gates={**gates, **made.gates}).scan(backend=backend)
