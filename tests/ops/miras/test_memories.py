"""Memory structures: the read and the hand-written gradient factors against forward passes written here and autograd.

Axis legend: B batch, C tokens, H heads, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from recollect.ops.miras.memories import MEMORIES, Memory, dense, gated_mlp, growing, matrix, mlp, slots, vector
from tests.laws import assert_bitwise, assert_near
from tests.ops.miras.cases import Draw

EXACT = 1e-12
BATCH, HEADS, TOKENS, KEY_DIM, VALUE_DIM = 2, 2, 3, 6, 4

# --- forward passes of one token x [..., I], weights [..., O, I]: nothing of the package --------------------------------------

Forward = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "identity": lambda x: x,
}


def times(weight: Tensor, x: Tensor) -> Tensor:
    return (weight * x.unsqueeze(-2)).sum(-1)


def finished(u: Tensor, slow: Sequence[Tensor], x: Tensor, residual: bool, norm: bool) -> Tensor:
    """LayerNorm with the scale and shift of each head, and the input added, as asked; u [B, H, C, V]."""
    if norm:
        centred = u - u.mean(-1, keepdim=True)
        u = slow[0][:, None] * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) + slow[1][:, None]
    return x + u if residual else u


def perceptron(activation: str, residual: bool, norm: bool) -> Forward:
    def forward(weights: Sequence[Tensor], slow: Sequence[Tensor], x: Tensor) -> Tensor:
        u = times(weights[0], x)
        for weight in weights[1:]:
            u = times(weight, ACTIVATIONS[activation](u))
        return finished(u, slow, x, residual, norm)

    return forward


def gated(activation: str, residual: bool, norm: bool) -> Forward:
    def forward(weights: Sequence[Tensor], slow: Sequence[Tensor], x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[activation](times(weights[0], x)) * times(weights[1], x)
        return finished(times(weights[2], hidden), slow, x, residual, norm)

    return forward


def _structures() -> dict[str, tuple[Memory, Forward]]:
    made: dict[str, tuple[Memory, Forward]] = {
        "matrix": (matrix(), lambda weights, slow, x: times(weights[0], x)),
        "vector": (vector(), lambda weights, slow, x: weights[0][..., 0, :] * x),
    }
    ends = {"": (True, True), " residual only": (True, False), " norm only": (False, True), " bare": (False, False)}
    for depth, activation in itertools.product((1, 2, 3, 4), ACTIVATIONS):
        if depth > 1 or activation == "gelu":  # a single matrix has no activation
            memory = mlp(depth, 2, activation)
            made[f"mlp {depth} {activation}"] = (memory, perceptron(activation, True, True))
    for depth, (end, (residual, norm)) in itertools.product((1, 2, 3), ends.items()):
        memory = mlp(depth, 3, "silu", residual=residual, norm=norm)
        made[f"mlp {depth} wide{end}"] = (memory, perceptron("silu", residual, norm))
    for activation, (end, (residual, norm)) in itertools.product(("silu", "gelu", "relu", "identity"), ends.items()):
        memory = gated_mlp(2, activation, residual=residual, norm=norm)
        made[f"gated {activation}{end}"] = (memory, gated(activation, residual, norm))
    return made


STRUCTURES = _structures()


def drawn(memory: Memory, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Weights [B, H, O, I], slow parameters [H, V] off their initial values, keys [B, H, C, K] and targets [B, H, C, V]."""
    draw = Draw(seed)
    value_dim = KEY_DIM if memory.residual or memory.diagonal else VALUE_DIM
    weights = [draw.normal(BATCH, HEADS, *shape) / shape[1] ** 0.5 for shape in memory.shapes(KEY_DIM, value_dim)]
    slow = [float(n == 0) + 0.3 * draw.normal(HEADS, value_dim) for n in range(memory.n_slow)]
    keys = draw.normal(BATCH, HEADS, TOKENS, KEY_DIM)
    return weights, slow, keys, draw.normal(BATCH, HEADS, TOKENS, value_dim)


def gradient(factors: tuple[Tensor, Tensor], memory: Memory) -> Tensor:
    """G F^T of every token, [B, H, C, O, I]; of the vector, its one row G * F."""
    g, f = factors
    return (g * f).unsqueeze(-2) if memory.diagonal else g.unsqueeze(-1) * f.unsqueeze(-2)


def cubed(target: Tensor) -> Callable[[Tensor], Tensor]:
    """d / d prediction of sum |prediction - target|^3 / 3: no multiple of the residual, so that phi cannot be applied twice."""
    return lambda prediction: (prediction - target) * (prediction - target).abs()


# --- the laws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_read_equals_the_forward_pass(name: str) -> None:
    """Prevents a read in another order: an activation after the last matrix, a norm after the residual, another head's scale."""
    memory, forward = STRUCTURES[name]
    weights, slow, keys, _ = drawn(memory)
    y = memory.read(dense(weights, diagonal=memory.diagonal), slow, keys)
    assert_near(y, forward([w.unsqueeze(2) for w in weights], slow, keys), EXACT, name)


@pytest.mark.parametrize("name", STRUCTURES)
def test_pullback_equals_autograd(name: str) -> None:
    """Prevents a hand-written gradient that is wrong for one activation, depth, norm or residual: token by token, matrix by matrix."""
    memory, forward = STRUCTURES[name]
    weights, slow, keys, target = drawn(memory)
    of_tokens = [w.unsqueeze(2).repeat(1, 1, TOKENS, 1, 1).requires_grad_() for w in weights]
    wanted = torch.autograd.grad(((forward(of_tokens, slow, keys) - target).abs() ** 3).sum() / 3, of_tokens)
    factors = memory.pullback(weights, slow, keys, cubed(target))
    assert len(factors) == len(weights)
    for m, (pair, exact) in enumerate(zip(factors, wanted, strict=True)):
        assert_near(gradient(pair, memory), exact, EXACT, f"{name}: matrix {m}")


@pytest.mark.parametrize("name", [name for name in STRUCTURES if "relu" not in name])
def test_pullback_can_be_differentiated(name: str) -> None:
    """Prevents a factor that is cut from the graph: the outer loop needs second derivatives of weights, norms and keys."""
    memory, forward = STRUCTURES[name]
    found = []
    for analytic in (True, False):
        weights, slow, keys, target = drawn(memory)
        leaves = [*weights, *slow, keys, target]
        for leaf in leaves:
            leaf.requires_grad_()
        if analytic:
            inner = [gradient(pair, memory) for pair in memory.pullback(weights, slow, keys, cubed(target))]
        else:
            of_tokens = [w.unsqueeze(2).expand(-1, -1, TOKENS, -1, -1) for w in weights]
            loss = ((forward(of_tokens, slow, keys) - target).abs() ** 3).sum() / 3
            inner = list(torch.autograd.grad(loss, of_tokens, create_graph=True))
        draw = Draw(3)
        total = torch.stack([(part * draw.normal(*part.shape)).sum() for part in inner]).sum()
        found.append(torch.autograd.grad(total, leaves, materialize_grads=True))
    for n, (actual, wanted) in enumerate(zip(*found, strict=True)):
        assert_near(actual, wanted, 1e-11, f"{name}: leaf {n}")


def test_relu_pullback_can_be_differentiated() -> None:
    """Prevents a step function without a graph: relu's second derivative is 0, the rest of the chain is not."""
    memory, forward = STRUCTURES["mlp 3 relu"]
    weights, slow, keys, target = drawn(memory)
    for leaf in (*weights, keys):
        leaf.requires_grad_()
    of_tokens = [w.unsqueeze(2).expand(-1, -1, TOKENS, -1, -1) for w in weights]
    loss = ((forward(of_tokens, slow, keys) - target).abs() ** 3).sum() / 3
    wanted = torch.autograd.grad(loss, of_tokens, create_graph=True)[0].square().sum()
    actual = gradient(memory.pullback(weights, slow, keys, cubed(target))[0], memory).square().sum()
    for a, b in zip(torch.autograd.grad(actual, weights), torch.autograd.grad(wanted, weights), strict=True):
        assert_near(a, b, 1e-11, "second order")


@pytest.mark.parametrize("name", [name for name in STRUCTURES if STRUCTURES[name][0].offset_free])
def test_an_offset_that_the_norm_takes_away(name: str) -> None:
    """Prevents a scan from leaving out an offset that is read after all."""
    memory, _ = STRUCTURES[name]
    weights, slow, keys, target = drawn(memory)
    moved = [w + 3.0 if m in memory.offset_free else w for m, w in enumerate(weights)]
    read, other = (memory.read(dense(each), slow, keys) for each in (weights, moved))
    assert_near(other, read, 1e-11, "read")
    pairs = zip(*(memory.pullback(each, slow, keys, cubed(target)) for each in (weights, moved)), strict=True)
    for m, (actual, wanted) in enumerate(pairs):
        assert_near(gradient(wanted, memory), gradient(actual, memory), 1e-11, f"matrix {m}")


# --- parameters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_shapes_and_axes_of_a_structure(name: str) -> None:
    """Prevents a gate on an axis that is none of the model's: inputs of a matrix that reads the key, outputs of one that answers."""
    memory, _ = STRUCTURES[name]
    value_dim = KEY_DIM if memory.residual or memory.diagonal else VALUE_DIM
    shapes = memory.shapes(KEY_DIM, value_dim)
    if memory.diagonal:
        assert shapes == [(1, KEY_DIM)]
        return
    assert len(memory.axes) == len(shapes)
    assert shapes[-1][0] == value_dim
    for (rows, columns), axis in zip(shapes, memory.axes, strict=True):
        assert axis == ("input" if columns == KEY_DIM else "output" if rows == value_dim else "mean")


def test_fresh_parameters() -> None:
    """Prevents a memory that starts at another scale, with another norm than the identity, or not from the generator given."""
    memory = mlp(3, 4)
    fresh = memory.init(8, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert [tuple(part.shape) for part in fresh.fast] == [(8, 128, 32), (8, 128, 128), (8, 32, 128)]
    for part in fresh.fast:
        assert float(part.std()) == pytest.approx(part.shape[-1] ** -0.5, rel=0.02)
    assert torch.equal(fresh.slow[0], torch.ones(8, 32, dtype=torch.float64))
    assert torch.equal(fresh.slow[1], torch.zeros(8, 32, dtype=torch.float64))
    again = memory.init(8, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for actual, wanted in zip(again.fast, fresh.fast, strict=True):
        assert_bitwise(actual, wanted, "the same seed")
    wide = memory.init(8, 32, 32, std=0.25, dtype=torch.float32)
    assert {part.dtype for part in (*wide.fast, *wide.slow)} == {torch.float32}
    assert all(float(part.std()) == pytest.approx(0.25, rel=0.02) for part in wide.fast)
    for linear in (matrix(), vector()):
        assert not any(part.any() for part in linear.init(2, 5, 5).fast)  # they can start from zeros, and do


def test_memories_that_are_lists_of_tokens_have_no_matrix() -> None:
    """Prevents parameters for memories that learn nothing of their own."""
    for memory, kind in ((slots(7), "slots"), (growing(), "growing")):
        assert (memory.kind, memory.init(2, 5, 3)) == (kind, ((), ()))
    assert slots(7).n_slots == 7


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(0), "depth >= 1 and expansion >= 1; got depth=0, expansion=4"),
        (lambda: mlp(2, 0), "got depth=2, expansion=0"),
        (lambda: mlp(activation="tanh"), "unknown activation 'tanh'; known: gelu, silu, relu, identity"),
        (lambda: gated_mlp(0), "expansion is the hidden size over the key dim, at least 1; got 0"),
        (lambda: gated_mlp(activation="tanh"), "unknown activation 'tanh'"),
        (lambda: slots(0), "n_slots is at least 1; got 0"),
    ],
)
def test_refused_structures(make: Callable[[], Memory], message: str) -> None:
    """Prevents a memory without a matrix, a hidden unit or a slot."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("memory", [mlp(), mlp(1), gated_mlp(), vector(), mlp(norm=False)])
def test_a_residual_needs_equal_sizes(memory: Memory) -> None:
    """Prevents a key that is added to a value of another size, which broadcasting may let pass."""
    with pytest.raises(ValueError, match="K and V must be equal; got K=6, V=4"):
        memory.init(HEADS, KEY_DIM, VALUE_DIM)


def test_every_registered_memory_is_tested() -> None:
    """Prevents a new structure whose gradient nobody has compared."""
    assert {memory.name for memory, _ in STRUCTURES.values()} | {"slots", "growing"} == set(MEMORIES)
