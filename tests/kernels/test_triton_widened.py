"""Multi-Token Attention in Triton where the convolution before the softmax is a wider product, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.ops import Mixing, Rows, multi_token_attention, multi_token_rows
from tests.kernels.scans import assert_as_exact
from tests.kernels.test_triton_attention import assert_equal, everything
from tests.ops.test_multi_token import module_inputs

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run, multi_token, stencil
from tests.kernels.interpreter import quick

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks of eight rows, so that short sequences have several."""
    quick(monkeypatch)
    monkeypatch.setattr(stencil, "ROWS", 8)
    monkeypatch.setattr(multi_token, "BLOCK_ENTRIES", 1)


@pytest.fixture
def in_fp64(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The wider product whatever the precision; what it was asked for."""
    asked: list[Tensor] = []
    made = multi_token.widened
    monkeypatch.setattr(multi_token, "is_widened", lambda q, k, mixing, start: True)
    monkeypatch.setattr(multi_token, "widened", lambda *given: asked.append(given[0]) or made(*given))
    return asked


def inputs(length: int, *names: str) -> dict[str, Tensor]:
    """Of the module's inputs those that are named, and no mixing before the softmax."""
    return {name: x for name, x in module_inputs(length).items() if name in ("q", "k", "v", "kq_pre", *names)}


@pytest.mark.parametrize(
    ("length", "after", "pad_key"),
    [
        (1, (), "both"),
        (3, ("kq_post",), "right"),
        (19, (), "left"),
        (19, ("kq_post",), "right"),
        (19, ("kq_post", "head_post"), "both"),
    ],
)
def test_it_equals_the_oracle_over_blocks(length: int, after: tuple[str, ...], pad_key: str, in_fp64: list[Tensor]) -> None:
    """Prevents a band that is a row or a key off, or lost between blocks, in the rows above one, or in the gradients."""
    named = inputs(length, *after)
    actual, expected = (
        everything(named, lambda form=form: [multi_token_attention(**named, pad_key=pad_key, backend=form)])
        for form in ("triton", "materialized")
    )
    assert in_fp64
    assert_equal(actual, expected)


def test_rows_to_carry_on_with_and_dropout(in_fp64: list[Tensor]) -> None:
    """Prevents a decoder that goes on from wider logits, or rows of another shape or mask than the definition's."""
    for length in (2, 19):
        named = inputs(length, "kq_post")
        mixing = Mixing(named["kq_pre"], None, named["kq_post"], None)

        def run(form: str, named: dict[str, Tensor] = named, mixing: Mixing = mixing) -> list[Tensor]:
            options: dict[str, Any] = {"dropout_p": 0.3, "seed": 5, "backend": form}
            out, rows = multi_token_rows(named["q"], named["k"], named["v"], mixing, Rows(), **options)
            assert rows.raw is not None
            assert rows.weights is not None
            return [out, rows.raw, rows.weights]

        assert_equal(*(everything(named, lambda form=form, run=run: run(form)) for form in ("triton", "materialized")))
    assert in_fp64


def test_it_can_be_compiled_as_one_graph(in_fp64: list[Tensor]) -> None:
    """Prevents wider queries and keys, or a band, that break torch.compile's graph or miss in the fake form."""
    named = inputs(6, "kq_post")

    def run(q: Tensor, k: Tensor, v: Tensor, kq_pre: Tensor, kq_post: Tensor) -> Tensor:
        return multi_token_attention(q, k, v, kq_pre=kq_pre, kq_post=kq_post, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal(everything(named, lambda: [compiled(**named)]), everything(named, lambda: [run(**named)]), 1e-14)
    assert in_fp64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_the_definition(dtype: torch.dtype) -> None:
    """Prevents sums of wider keys that lose what the convolution kept: error at most twice the definition's in the same dtype, mean of
    three draws."""
    assert_as_exact(
        ({name: x.detach().to(dtype) for name, x in inputs(length).items()} for length in (17, 18, 19)),
        lambda named, form: everything(named, lambda: [multi_token_attention(**named, backend=form)]),
        oracle="materialized",
        dtype=dtype,
    )


def test_it_is_taken_where_it_was_derived_to_win() -> None:
    """Prevents a wider product where heads are mixed before the softmax, in fp32, of wide heads, or with documents and earlier keys."""
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    plain = Mixing(kq_pre=torch.zeros(2, 2, 3))
    assert multi_token.is_widened(q, q, plain, None)
    assert multi_token.is_widened(
        q.half(), q.half(), plain._replace(kq_post=torch.zeros(2, 2, 3), head_post=torch.zeros(1, 2, 2)), None
    )
    assert not multi_token.is_widened(q.float(), q.float(), plain, None)
    assert not multi_token.is_widened(q, q, plain._replace(head_pre=torch.zeros(1, 2, 2)), None)
    assert not multi_token.is_widened(q, q, Mixing(kq_pre=torch.zeros(2, 2, 2, 3)), None)
    assert not multi_token.is_widened(q, q, plain, torch.zeros(1, 4))
    assert not multi_token.is_widened(q[:, 2:], q, plain, None)
    wide = torch.zeros(1, 4, 2, multi_token.WIDENED + 1, dtype=torch.bfloat16)
    assert not multi_token.is_widened(wide, wide, plain, None)
