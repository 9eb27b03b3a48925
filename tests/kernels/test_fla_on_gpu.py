"""flash-linear-attention's own kernels through our scans on a GPU, at real sizes. Skipped without either."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.kernels import fla
from recollect.ops import tiles
from recollect.ops.linear_scan import delta_rule_scan, delta_scan, gated_linear_scan

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or bool(fla.installed()), reason=f"no GPU, or {fla.installed()}")

SCANS: dict[str, Any] = {"linear": gated_linear_scan, "rule": delta_rule_scan, "delta": delta_scan}
LENGTH = 300
LOW = [torch.bfloat16, torch.float16]
DECAYS = ["none", "head", "key"]


def inputs(kind: str, decay: str, dtype: torch.dtype, length: int, size: int) -> dict[str, Tensor]:
    """Tokens in dtype, gates and the carried state in fp32."""
    shape = (2, length, 4)

    def random(*last: int) -> Tensor:
        return torch.randn(*shape, *last, device=DEVICE)

    k = torch.nn.functional.normalize(random(size), dim=-1)
    named = {"q": random(size) * size**-0.5, "k": k, "v": random(2 * size)}
    if kind == "delta":
        named |= {"a": k, "b": -torch.rand(*shape, 1, device=DEVICE) * k}
    named = {name: x.to(dtype) for name, x in named.items()}
    named["state"] = torch.randn(2, 4, 2 * size, size, device=DEVICE)
    if decay != "none":
        named["log_decay"] = -0.1 * torch.rand(*shape, *((size,) if decay == "key" else ()), device=DEVICE)
    if kind == "rule":
        named["beta"] = torch.rand(*shape, device=DEVICE)
    return named


def everything(kind: str, named: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """y, the last state and the gradients of a fixed sum over both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named.items()}
    y, state = SCANS[kind](**leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=DEVICE).view_as(y)
    total = (y.double() * weights).sum() + state.double().sin().sum()
    return [y, state, *torch.autograd.grad(total, list(leaves.values()))]


def runnable(kind: str, decay: str) -> None:
    """Skip what `fla.lacks` says theirs get wrong on this very machine."""
    if decay == "head" and kind != "delta" and fla._miscompiles(torch.device(DEVICE, torch.cuda.current_device())):
        pytest.skip("this Triton miscompiles their gradients for decays per head on this GPU")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("kind", "decay", "dtype", "size"), list(itertools.product(SCANS, DECAYS, LOW, [64, 128])))
def test_they_equal_the_token_loop(kind: str, decay: str, dtype: torch.dtype, size: int, documents: bool) -> None:
    """Prevents arguments that their installed version takes otherwise. Four roundings of the dtype; in fp16 in Triton's interpreter, at
    70 tokens, it was 0.7 of one."""
    runnable(kind, decay)
    named, options = inputs(kind, decay, dtype, LENGTH, size), {}
    if documents:
        options["reset"] = torch.rand(2, LENGTH, device=DEVICE) < 0.02
        options["valid"] = torch.rand(2, LENGTH, device=DEVICE) > 0.02
    actual = everything(kind, named, backend="fla", **options)
    exact = everything(kind, {name: x.double() for name, x in named.items()}, backend="sequential", **options)
    for name, a, b in zip(["y", "state", *named], actual, exact, strict=True):
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm(), name


def test_a_bounded_decay_may_be_taken_in_longer_chunks() -> None:
    """Prevents a bound that their kernel reads otherwise; padding has a decay of exactly 1."""
    named = inputs("delta", "key", torch.bfloat16, LENGTH, 64)
    options: dict[str, Any] = {"floor": -0.61, "valid": torch.rand(2, LENGTH, device=DEVICE) > 0.1}
    actual = everything("delta", named, backend="fla", **options)
    exact = everything("delta", {name: x.double() for name, x in named.items()}, backend="sequential", **options)
    for name, a, b in zip(["y", "state", *named], actual, exact, strict=True):
        assert (a.double() - b).norm() <= 4 * torch.finfo(torch.bfloat16).eps * b.norm(), name


@pytest.mark.parametrize(("kind", "decay"), list(itertools.product(SCANS, DECAYS)))
def test_they_are_the_default(kind: str, decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an extra that is installed and not used."""
    runnable(kind, decay)
    named = inputs(kind, decay, torch.bfloat16, 100, 64)
    calls = []
    monkeypatch.setitem(tiles.RECURRENCES, "fla", lambda x: calls.append(x) or fla.run(x))
    SCANS[kind](**named)
    assert len(calls) == 1
