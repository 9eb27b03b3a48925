"""What the tests of both kinds of memory in Triton share: biases, marks of documents and padding, a scan in parts, its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from recollect.ops.miras import MirasSpec, MirasState, Parameters, scan
from recollect.ops.miras.biases import AttentionalBias, huber, l1, l2, l_infinity, lp, pseudo_huber, value_shift

EXACT = 1e-12
BIASES: dict[str, AttentionalBias] = {
    "l2": l2(),
    "lp3": lp(3.0),
    "huber": huber(),
    "l1": l1(),
    "huber of the norm": huber("norm"),
    "lp below 2": lp(1.3),
    "lp above 3": lp(4.0),
    "l_infinity": l_infinity(0.3),
    "pseudo_huber": pseudo_huber(),
    "value_shift": value_shift(),
}


def flags(n_rows: int, length: int) -> dict[str, Tensor]:
    """Documents that start inside pieces and chunks, and padding anywhere, the start included."""
    generator = torch.Generator().manual_seed(1)
    reset, valid = (torch.rand(n_rows, length, generator=generator) < share for share in (0.1, 0.8))
    valid[0, :3] = False
    return {"reset": reset, "valid": valid}


def scan_in_parts(
    spec: MirasSpec,
    named: dict[str, Tensor],
    gates: Sequence[str],
    parameters: Parameters,
    backend: str | None,
    cuts: tuple[int, ...] = (),
    **marks: Tensor,
) -> list[Tensor]:
    """y and the last states, of one call or cut into several."""
    state, outputs = None, []
    for low, high in itertools.pairwise((0, *cuts, named["q"].shape[1])):
        part = {name: named[name][:, low:high] for name in ("q", "k", "v", *gates)}
        q, k, v = (part.pop(name) for name in "qkv")
        here = {name: x[:, low:high] for name, x in marks.items()}
        y, state = scan(spec, q, k, v, part, state, parameters=parameters, backend=backend, **here)
        outputs.append(y)
    assert isinstance(state, MirasState)
    assert state.anchor is not None
    return [torch.cat(outputs, dim=1), *state.dual, *state.anchor, *(state.kept or ()), *(state.momentum or ())]


def with_gradients(outputs: list[Tensor], named: dict[str, Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a fixed sum over them."""
    total = sum((torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) * x).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = EXACT) -> None:
    """Relative to the largest entry."""
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = float(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).detach())
        assert error <= tolerance, f"{n}: {error:.1e}"


def assert_as_exact(
    draws: Iterable[dict[str, Tensor]],
    results: Callable[[dict[str, Tensor], str], list[Tensor]],
    *,
    oracle: str = "chunked",
    dtype: torch.dtype = torch.float32,
) -> None:
    """In this dtype the mean error over the draws, against the oracle in fp64, is at most twice the oracle's own, for each result."""
    errors: dict[int, list[float]] = {}
    for named in draws:
        exact, *single = (
            results({name: x.detach().to(kind).requires_grad_() for name, x in named.items()}, form)
            for form, kind in ((oracle, torch.float64), ("triton", dtype), (oracle, dtype))
        )
        for n, (value, *pair) in enumerate(zip(exact, *single, strict=True)):
            sums = errors.setdefault(n, [0.0, 0.0])
            for m, x in enumerate(pair):
                sums[m] += float((x.double() - value).detach().norm() / value.detach().norm().clamp(min=1e-30))
    for n, (ours, theirs) in errors.items():
        assert ours <= 2 * theirs, f"{n}: {ours:.1e}, the oracle {theirs:.1e}"


def assert_one_graph(outputs: Callable[[dict[str, Tensor]], list[Tensor]], named: dict[str, Tensor]) -> None:
    """torch.compile takes them as one graph, and gradients come out with equal bits."""

    def total(**named: Tensor) -> Tensor:
        return sum((x.sin().sum() for x in outputs(named)), torch.zeros(()))

    compiled, inputs = torch.compile(total, fullgraph=True, backend="aot_eager"), list(named.values())
    for a, b in zip(torch.autograd.grad(compiled(**named), inputs), torch.autograd.grad(total(**named), inputs), strict=True):
        assert torch.equal(a, b)
