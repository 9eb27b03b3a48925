"""Recurrences on a matrix state in Triton's interpreter, against the token loops: outputs, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.ops.linear_scan import delta_scan, gated_linear_scan
from tests.kernels.gpu_code import assert_compiles
from tests.kernels.scans import assert_as_exact
from tests.laws import assert_near

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run, recurrence

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")

EXACT = 1e-12
B, T, H, K, V = 2, 6, 2, 5, 6
DECAYS = {"no decay": None, "per head": (), "per key": (K,), "per value": (V,)}


@pytest.fixture(autouse=True)
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a program: the state's six rows need two, one of them half full. And four tokens a span: six need two."""
    monkeypatch.setattr(recurrence, "ROWS", 4)
    monkeypatch.setattr(recurrence, "SPAN", 4)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def tokens(decay: str, strength: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Leaves by name; a delta rule where there is a strength."""
    named = {"q": random(B, T, H, K), "k": random(B, T, H, K), "v": random(B, T, H, V), "state": random(B, H, V, K)}
    shape = DECAYS[decay]
    if shape is not None:
        named["log_decay"] = (-torch.rand(B, T, H, *shape, dtype=torch.float64)).requires_grad_()
    if strength is not None:
        small = {name: (0.5 * torch.randn(B, T, H, K, dtype=torch.float64)).requires_grad_() for name in "ab"}
        named |= {**small, "strength": torch.rand(B, T, H, *strength, dtype=torch.float64).requires_grad_()}
    return named


def results(named: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs, the last state, and the gradients of a fixed sum over both."""
    y, state = (delta_scan if "strength" in named else gated_linear_scan)(**named, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    total = (y * weights).sum() + state.sin().sum()
    return [y, state, *torch.autograd.grad(total, list(named.values()))]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("decay", "strength"),
    [(decay, None) for decay in DECAYS] + [("no decay", ()), ("per head", ()), ("per key", ()), ("per key", (V,))],
)
def test_it_equals_the_token_loop(decay: str, strength: tuple[int, ...] | None, documents: bool) -> None:
    """Prevents a gradient that a token too many or too few gets, gates on the wrong axis, and documents that leak either way."""
    named = tokens(decay, strength)
    options: dict[str, Any] = {"decay_axis": "value"} if decay == "per value" else {}
    if documents:
        options["reset"] = torch.tensor([[False, False, True, False, True, True], [True, False, False, False, False, False]])
        options["valid"] = torch.tensor([[True] * 6, [False, True, True, True, False, True]])
    actual, expected = (results(named, backend=backend, **options) for backend in ("triton", "sequential"))
    for name, a, b in zip(["y", "state", *named], actual, expected, strict=True):
        assert_near(a, b, EXACT, name)


@pytest.mark.parametrize(("decay", "strength"), [("per head", None), ("per key", ()), ("per value", None)])
def test_error_in_single_precision_is_at_most_twice_the_loops(
    decay: str, strength: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents sums of many terms that nearly cancel, the decays' gradients: mean error of three draws over 120 tokens."""
    monkeypatch.undo()
    for name, size in (("B", 1), ("H", 1), ("T", 120)):
        monkeypatch.setitem(globals(), name, size)
    options: dict[str, Any] = {"decay_axis": "value"} if decay == "per value" else {}

    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        named = tokens(decay, strength)
        return {name: x.detach() / {"log_decay": 10, "a": 2, "b": 2}.get(name, 1) for name, x in named.items()}

    assert_as_exact(map(draw, range(3)), lambda named, form: results(named, backend=form, **options), oracle="sequential")


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    """Prevents a state in the inputs' precision."""
    named = {name: x.detach().bfloat16() for name, x in tokens("per key", ()).items()}
    y, state = delta_scan(**named, backend="triton")
    wanted, last = delta_scan(**{name: x.double() for name, x in named.items()}, backend="sequential")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_near(state.double(), last, 1e-5, "state")
    assert_near(y.double(), wanted, 1e-2, "y")


def test_it_can_be_compiled_as_one_graph() -> None:
    """Prevents an op that breaks torch.compile's graph, or whose fake has other shapes than it."""
    named = tokens("per head", ())

    def run(*inputs: Tensor) -> Tensor:
        y, state = delta_scan(**dict(zip(named, inputs, strict=True)), backend="triton")
        return y.sum() + state.sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = list(named.values())
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs), strict=True):
        assert torch.equal(a, b)


def test_it_is_never_the_default_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an interpreter that someone waits for, and a kernel that is named where it cannot run."""
    named = tokens("per head", None)
    monkeypatch.setattr(recurrence, "recurrence", None)
    gated_linear_scan(**named)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run .* here: .*pass backend='chunked'"):
        gated_linear_scan(**named, backend="triton")


CODE = """
from recollect.kernels.triton import recurrence

numbers = {"n_tokens": "i32", "n_heads": "i32", "n_entries": "i32"}
for choice in (
    dict(DECAY=0, DELTA=False, WIDE=False, HAS_RESET=False),
    dict(DECAY=1, DELTA=True, WIDE=False, HAS_RESET=False),
    dict(DECAY=2, DELTA=True, WIDE=False, HAS_RESET=True),
    dict(DECAY=3, DELTA=True, WIDE=True, HAS_RESET=True),
):
    sizes = dict(K=128, V=128, KW=128, N=recurrence.ROWS, EVERY=recurrence.SPAN, **choice)
    for kernel in (recurrence._forward_kernel, recurrence._reverse_kernel, recurrence._again_kernel):
        constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
        pointers = {name: "*fp32" for name in kernel.arg_names if name not in numbers and name not in constants}
        compiled(kernel, {**pointers, "reset": "*i8"}, **constants)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability: int) -> None:
    """Prevents code that only the interpreter understands."""
    assert_compiles(CODE, capability)
