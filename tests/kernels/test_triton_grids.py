"""How many programs the Triton kernels are launched with, where that is more than a GPU takes on any axis of a grid but the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.ops import multi_token_attention
from recollect.ops.delta_scan import delta_scan
from recollect.ops.miras.biases import huber, l2
from recollect.ops.miras.retentions import kl
from recollect.ops.miras.rules import momentum

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from triton.runtime import interpreter

from recollect.kernels.triton import can_run
from tests.kernels import test_triton_matrix as matrices
from tests.kernels import test_triton_memory as perceptrons

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")

MANY = 65_600
LIMITS = (2**31 - 1, 65_535, 65_535)  # CUDA's, of grid axes


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """The largest grid of every kernel, by name; nothing runs, so that results are whatever memory held."""
    grids: dict[str, tuple[int, ...]] = {}

    def record(self: Any, *_: Any, **__: Any) -> None:
        name = self.fn.__name__
        grids[name] = max(grids.get(name, self.grid), self.grid)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    return grids


def assert_launchable(grids: dict[str, tuple[int, ...]], names: set[str], at_least: int) -> None:
    """These kernels were launched, as many programs as there are tokens or heads, on axes that are long enough."""
    assert set(grids) == names
    for name, grid in grids.items():
        assert all(size <= limit for size, limit in zip(grid, LIMITS, strict=False)), f"{name}: {grid}"
        assert name.startswith("walk") or grid[0] >= at_least, f"{name}: {grid}"


OF_PIECES = {
    "yaad": {"prepare", "finish", "prepare_back", "finish_back"},
    "memora": {"prepare", "finish", "prepare_back", "finish_back"},
    "titans": {"prepare_mixed", "finish_mixed", "prepare_mixed_back", "finish_mixed_back"},
}


@pytest.mark.parametrize("model", list(OF_PIECES))
def test_perceptron_memories_take_as_many_documents_as_tokens(model: str, launches: dict[str, tuple[int, ...]]) -> None:
    """Prevents pieces on an axis that ends at 65,535: with documents a call may have as many of them as tokens."""
    options = {
        "yaad": {"bias": huber()},
        "memora": {"bias": l2(), "retention": kl()},
        "titans": {"bias": l2(), "rule": momentum()},
    }
    reset = torch.zeros(1, MANY, dtype=torch.bool)
    perceptrons.results(perceptrons.draw(MANY), 64, backend="triton", reset=reset, **options[model])
    assert_launchable(launches, OF_PIECES[model] | {"walk", "walk_back"}, MANY)


def test_matrix_memories_take_as_many_documents_as_tokens(launches: dict[str, tuple[int, ...]]) -> None:
    """Prevents the same of the matrix memory."""
    reset = torch.zeros(1, MANY, dtype=torch.bool)
    matrices.results(matrices.draw(MANY, key=2, value=2), 64, huber(), "triton", reset=reset)
    assert_launchable(launches, {"prepare", "finish_back", "walk", "walk_back"}, MANY)


def test_padding_makes_no_more_pieces(launches: dict[str, tuple[int, ...]]) -> None:
    """Prevents a program for every token where documents are not given."""
    valid = torch.ones(1, 4096, dtype=torch.bool)
    matrices.results(matrices.draw(4096, key=2, value=2), 64, huber(), "triton", valid=valid)
    assert launches["prepare"][0] <= 4096 // 16 + 8


def test_attention_takes_many_sequences(launches: dict[str, tuple[int, ...]]) -> None:
    """Prevents batch elements and heads on an axis that ends at 65,535."""
    named = {name: torch.randn(MANY, 1, 1, 2) for name in "qkv"}
    named |= {name: torch.randn(1, 2, 3) for name in ("kq_pre", "kq_post")}
    named |= {name: torch.randn(1, 1, 1) for name in ("head_pre", "head_post")}
    named = {name: x.requires_grad_() for name, x in named.items()}
    multi_token_attention(**named, backend="triton").sum().backward()
    assert_launchable(launches, {"_stencil", "_softmax", "_softmax_backward", "_mix_backward", "_kernel_gradient"}, MANY)


def test_recurrences_take_many_sequences(launches: dict[str, tuple[int, ...]]) -> None:
    """Prevents the same of the recurrences."""

    def random(*shape: int) -> Tensor:
        return torch.randn(MANY, 1, 1, *shape).requires_grad_()

    y, _ = delta_scan(*(random(2) for _ in range(3)), random(2), random(2), strength=random(), backend="triton")
    y.sum().backward()
    assert_launchable(launches, {"_forward_kernel", "_reverse_kernel", "_again_kernel"}, MANY)
