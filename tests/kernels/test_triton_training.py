"""Triton's operators inside what training wraps around them: checkpointing, autocast, FSDP2, memory that holds anything, opcheck."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from recollect.ops import multi_token_attention
from recollect.ops.delta_scan import delta_scan
from recollect.ops.miras.biases import huber, l2
from recollect.ops.miras.rules import momentum

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run, matrix, multi_token, perceptron, recurrence
from tests.kernels import test_triton_matrix as matrices
from tests.kernels import test_triton_memory as perceptrons
from tests.kernels.interpreter import quick

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")

LENGTH = 5
RESET = torch.arange(LENGTH)[None] == 3


class Family(NamedTuple):
    """Operators of one module: its inputs in fp32, all of them leaves, and the outputs of a call."""

    module: ModuleType
    draw: Callable[[], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor]], list[Tensor]]


def single(named: dict[str, Tensor], *without: str) -> dict[str, Tensor]:
    return {name: x.detach().float().requires_grad_() for name, x in named.items() if name not in without}


def of_attention() -> dict[str, Tensor]:
    named = {name: torch.randn(1, LENGTH, 2, 4) for name in "qkv"}
    named |= {name: torch.randn(2, 2, 3) for name in ("kq_pre", "kq_post")}
    return single(named | {name: torch.randn(1, 2, 2) for name in ("head_pre", "head_post")})


def of_recurrence() -> dict[str, Tensor]:
    named = {name: torch.randn(1, LENGTH, 1, 4) / 2 for name in "qkvab"}
    return single(named | {"log_decay": -torch.rand(1, LENGTH, 1, 4), "strength": torch.rand(1, LENGTH, 1)})


FAMILIES = {
    "attention": Family(multi_token, of_attention, lambda x: [multi_token_attention(**x, backend="triton")]),
    "recurrence": Family(recurrence, of_recurrence, lambda x: [*delta_scan(**x, reset=RESET, backend="triton")]),
    "matrix": Family(
        matrix,
        lambda: single(matrices.draw(LENGTH, key=4, value=4, widths=(1, 4, 1))),
        lambda x: matrices.run(x, 4, huber(), "triton", reset=RESET),
    ),
    "perceptron": Family(
        perceptron,
        lambda: single(perceptrons.draw(LENGTH), "log_momentum"),
        lambda x: perceptrons.run(x, 4, huber(), "triton", reset=RESET),
    ),
    "momentum": Family(
        perceptron,
        lambda: single(perceptrons.draw(LENGTH), "delta"),
        lambda x: perceptrons.run(x, 4, l2(), "triton", rule=momentum(), reset=RESET),
    ),
}


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def total(outputs: list[Tensor]) -> Tensor:
    return torch.stack([x.sin().sum() for x in outputs]).sum()


@functools.cache
def reference(family: Family) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs, and what `results` makes of them with nothing around."""
    named = family.draw()
    return named, results(family, named)


def results(family: Family, named: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed sum over them."""
    outputs = family.run(named)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total(outputs), list(named.values()))]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal bits, and no NaN in them, which equals nothing."""
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), n


def test_checkpointed_calls_give_the_same(family: Family) -> None:
    """Prevents an operator that cannot be run again in the backward pass, or keeps something between the two runs."""
    named, expected = reference(family)
    again = family._replace(
        run=lambda x: checkpoint(
            lambda *values: family.run(dict(zip(x, values, strict=True))), *x.values(), use_reentrant=False
        )
    )
    assert_same(results(again, named), expected)


def test_autocast_gives_the_same(family: Family) -> None:
    """Prevents states and logits that autocast rounds: what is handed over in fp32 is computed in it, backward too."""
    named, expected = reference(family)

    def cast(x: dict[str, Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return family.run(x)

    assert_same(results(family._replace(run=cast), named), expected)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every new tensor that nothing was written to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_results_do_not_depend_on_what_memory_held(family: Family, request: pytest.FixtureRequest) -> None:
    """Prevents reads of scratch that nobody wrote: beyond a tile, before the first piece, of a state that was not saved."""
    named, expected = reference(family)
    request.getfixturevalue("poisoned")
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert_same(results(family, named), expected)


class Layer(nn.Module):
    """A call whose inputs are all parameters."""

    def __init__(self, family: Family, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.family, self.named = family, nn.ParameterDict({name: x.detach().clone() for name, x in named.items()})

    def forward(self, factor: Tensor) -> Tensor:
        return total(self.family.run(dict(self.named.items()))) * factor


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, which talks to nobody."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_get_the_same_gradients(family: Family, one_process: None) -> None:
    """Prevents an operator that FSDP2's parameters, hooks or freed storages do not go through."""
    named, expected = reference(family)
    layer = Layer(family, named)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer(torch.ones(())).backward()
    found = []
    for name in named:
        grad = layer.named[name].grad
        assert isinstance(grad, DTensor)
        found.append(grad.full_tensor())
    assert_same(found, expected[-len(found) :])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "attention"], indirect=True)
def test_operators_keep_the_promises_of_operators(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents fakes with other shapes or dtypes, inputs that are written to or returned, and gradients that are lost. opcheck's
    test of whole graphs would compare what is kept for the backward pass too, where unused places hold anything; each kernel's own
    tests compile a call and its gradients; attention's operators are checked there.
    """
    module, calls = family.module, dict[str, tuple[Any, ...]]()

    def spy(name: str) -> Callable[..., Any]:
        operator = getattr(module, name)

        def record(*args: Any) -> Any:
            calls[name] = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
            return operator(*args)

        return record

    with monkeypatch.context() as patch:
        for name in ("_forward", "_backward"):
            patch.setattr(module, name, spy(name))
        results(family, family.draw())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._forward, calls["_forward"], test_utils=checks)
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in calls["_backward"])
    torch.library.opcheck(module._backward, plain, test_utils=("test_schema", "test_faketensor"))
