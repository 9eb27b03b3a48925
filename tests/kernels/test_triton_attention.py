"""Multi-Token Attention in Triton's interpreter, where all of its kernels run: blocks, halos, documents, carried rows, dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recollect.ops import Mixing, Rows, multi_token_attention, multi_token_rows
from recollect.ops.multi_token import BACKENDS, choose, document_starts
from tests.kernels.gpu_code import assert_compiles
from tests.ops.test_multi_token import EXACT, FEW, Case, case_id, case_inputs, module_inputs

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run, multi_token, stencil
from tests.kernels.interpreter import quick

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks of eight rows, so that short sequences have several."""
    monkeypatch.setattr(stencil, "ROWS", 8)
    monkeypatch.setattr(multi_token, "BLOCK_ENTRIES", 1)


def everything(named: dict[str, Tensor], run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Outputs of `run`, and the gradients of a fixed sum over them by every input."""
    outputs = run()
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, list(named.values()))]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = EXACT) -> None:
    """Relative to the largest entry where that is above 1."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach())
        assert error <= tolerance, f"tensor {i}: {error:.1e}"


FORMS = ("triton", "materialized")
PROMISES = ("test_schema", "test_faketensor")


def leaves(case: Case, length: int) -> tuple[dict[str, Tensor], dict]:
    """Fresh leaves of a case, and its other options."""
    (q, k, v), parts, ids = case_inputs(case, length)
    named = {"q": q, "k": k, "v": v, **{name: part for name, part in parts.items() if part is not None}}
    return {name: x.clone().requires_grad_() for name, x in named.items()}, {"document_ids": ids, "pad_key": case.pad_key}


@pytest.mark.parametrize("case", FEW, ids=case_id)
def test_every_part_equals_the_oracle_over_blocks(case: Case, small_blocks: None) -> None:
    """Prevents a halo or a gradient that is lost between blocks or tiles, cuts read from the wrong row, transposed matrices."""
    named, options = leaves(case, 19)
    results = [
        everything(named, lambda form=form: [multi_token_attention(**named, **options, backend=form)])
        for form in ("triton", "materialized")
    ]
    assert_equal(*results)


@pytest.mark.parametrize("group", [16, 9])
def test_many_mixed_heads_equal_the_oracle(group: int, small_blocks: None) -> None:
    """Prevents tensor cores, which take 16 heads or more, from mixing by another matrix than fewer heads are, or by padding."""
    torch.manual_seed(0)
    n_heads = 18 if group == 9 else 16
    named = {name: torch.randn(1, 9, n_heads, 2, dtype=torch.float64) for name in "qkv"}
    named["kq_pre"] = torch.randn(n_heads, 2, 3, dtype=torch.float64)
    for name in ("head_pre", "head_post"):
        named[name] = torch.randn(n_heads // group, group, group, dtype=torch.float64)
    named = {name: x.requires_grad_() for name, x in named.items()}
    ids = (torch.arange(9) > 4).long()[None]
    assert_equal(
        *(
            everything(named, lambda form=form: [multi_token_attention(**named, document_ids=ids, backend=form)])
            for form in FORMS
        )
    )


def test_a_sliding_window_equals_the_oracle(small_blocks: None) -> None:
    """Prevents first keys that move with every query from being read from another row, or taken for documents."""
    named = module_inputs(19)
    start = (torch.arange(19) - 4).clamp(min=0).expand(2, -1)
    results = [
        everything(named, lambda form=form: [multi_token_attention(**named, start=start, backend=form)])
        for form in ("triton", "materialized")
    ]
    assert_equal(*results)


@pytest.mark.parametrize("cuts", [[9], [16, 17]])
def test_carried_rows_equal_one_call(cuts: list[int], small_blocks: None) -> None:
    """Prevents a decoder whose earlier rows or their gradients are lost at the border."""
    named = module_inputs(18)
    mixing = Mixing(**{part: named[part] for part in Mixing._fields})
    q, k, v = (named[name].detach() for name in "qkv")
    mixing = Mixing(*(x.detach() for x in mixing))
    pieces, rows, edges = [], Rows(), [0, *cuts, 18]
    for start, stop in itertools.pairwise(edges):
        out, rows = multi_token_rows(q[:, start:stop], k[:, :stop], v[:, :stop], mixing, rows, backend="triton")
        pieces.append(out)
    expected, last = multi_token_rows(q, k, v, mixing, Rows(), backend="materialized")
    assert_equal([torch.cat(pieces, 1), *rows], [expected, *last])


def test_gradients_of_returned_rows(small_blocks: None) -> None:
    """Prevents a state that passes no gradient back, or passes one for entries that no query sees."""
    named = module_inputs(11)
    mixing = Mixing(**{part: named[part] for part in Mixing._fields})

    def run(form: str) -> list[Tensor]:
        out, rows = multi_token_rows(named["q"], named["k"], named["v"], mixing, Rows(), backend=form)
        assert rows.raw is not None
        assert rows.weights is not None
        return [out, rows.raw, rows.weights]

    assert_equal(*(everything(named, lambda form=form: run(form)) for form in ("triton", "materialized")))


def test_dropout_equals_the_oracle_over_blocks(small_blocks: None) -> None:
    """Prevents a mask that depends on the block."""
    named = module_inputs(11)

    def run(form: str) -> list[Tensor]:
        return [multi_token_attention(**named, dropout_p=0.3, seed=4, backend=form)]

    assert_equal(*(everything(named, lambda form=form: run(form)) for form in ("triton", "materialized")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_the_oracles(dtype: torch.dtype) -> None:
    """Prevents sums in the inputs' own precision, and logits that are rounded before the softmax."""
    named = {name: x.detach().to(dtype).requires_grad_() for name, x in module_inputs(12).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in named.items()}
    wanted = everything(exact, lambda: [multi_token_attention(**exact, backend="materialized")])

    def errors(form: str) -> list[float]:
        got = everything(named, lambda: [multi_token_attention(**named, backend=form)])
        return [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(got, wanted, strict=True)]

    for ours, theirs in zip(errors("triton"), errors("materialized"), strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps


def test_autocast_changes_nothing(small_blocks: None) -> None:
    """Prevents a forward pass whose logits autocast has rounded, and a log-sum-exp of them that does not fit those which the backward
    pass computes again: at logits of this size the gradients of q and k would be wrong by more than their own size."""
    named = {name: torch.randn(1, 12, 2, 8, dtype=torch.float64).requires_grad_() for name in "qkv"}
    named["kq_pre"] = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        named["q"] *= 40
    single = {name: x.detach().float().requires_grad_() for name, x in named.items()}
    wanted = everything(named, lambda: [multi_token_attention(**named, backend="materialized")])

    def attend(low: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return [multi_token_attention(**single, backend="triton")]

    plain, forward = (everything(single, lambda low=low: attend(low)) for low in (False, True))
    with torch.autocast("cpu", torch.bfloat16):
        both = everything(single, lambda: attend(low=True))
    for name, exact, *got in zip(["y", *named], wanted, plain, forward, both, strict=True):
        assert float(((got[0].double() - exact).norm() / exact.norm()).detach()) < 1e-4, name
        assert torch.equal(got[0], got[1]), name
        assert torch.equal(got[0], got[2]), name


def test_inputs_of_several_dtypes_are_promoted() -> None:
    """Prevents the error of a matrix product where the forms of the CPU take what they are given."""
    q, k, v = (torch.randn(1, 5, 2, 4).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16))
    out = multi_token_attention(q, k, v, backend="triton")
    assert torch.equal(out, multi_token_attention(q.float(), k, v.float(), backend="triton").bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value")
def test_keys_that_no_query_sees_may_hold_anything(small_blocks: None) -> None:
    """Prevents NaN from beyond a document, a tile or the sequence getting through a mask that multiplies by zero."""
    named = {name: x.detach() for name, x in module_inputs(11).items()}
    start = document_starts(torch.tensor([[0] * 4 + [1] * 7] * 2))
    wanted = multi_token_attention(**named, start=start, backend="triton")
    poisoned = {**named, "k": named["k"].clone(), "v": named["v"].clone()}
    poisoned["k"][:, :4] = float("inf")
    out = multi_token_attention(**poisoned, start=start, backend="triton")
    assert torch.equal(out[:, 4:], wanted[:, 4:])


def test_it_can_be_compiled_as_one_graph() -> None:
    """Prevents an op that breaks torch.compile's graph, or whose fake has other shapes than it."""
    named = {name: x for name, x in module_inputs(6).items() if not name.startswith("head")}

    def run(q: Tensor, k: Tensor, v: Tensor, kq_pre: Tensor, kq_post: Tensor) -> Tensor:
        return multi_token_attention(q, k, v, kq_pre=kq_pre, kq_post=kq_post, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal(everything(named, lambda: [compiled(**named)]), everything(named, lambda: [run(**named)]), 0.0)
    inputs = [x.detach() for x in named.values()]
    rows = torch.zeros(2, 4, 5, 6, dtype=torch.float64)
    given = (*inputs[:4], None, inputs[4], None, None, rows, rows, None, 0.5, "both", 0.0, 0, 0)
    torch.library.opcheck(torch.ops.recollect.multi_token.default, given)
    out, lse, raw, weights = torch.ops.recollect.multi_token.default(*given)
    back = torch.ops.recollect.multi_token_backward.default
    grads = (x.detach().cos() for x in (out, raw, weights))
    torch.library.opcheck(
        back, (*grads, lse.detach(), *(x.detach() if isinstance(x, Tensor) else x for x in given)), test_utils=PROMISES
    )


def test_it_is_never_the_default_without_a_gpu() -> None:
    """Prevents an interpreter that someone waits for."""
    q = torch.zeros(1, 4, 4, 8)
    assert choose(q, q, Mixing(kq_pre=torch.zeros(4, 2, 3, 3))) is BACKENDS["blocked"]
    wide = torch.zeros(4, 2, 115)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run .*pass backend='blocked'"):
        multi_token_attention(q, q, q, kq_pre=wide, backend="triton")


CODE = """
from recollect.kernels.triton import softmax, stencil

bf16, fp32 = "*bf16", "*fp32"
taps = dict(C_Q=6, C_K=11, LEFT=5, MERGED=1, HAS_START=True, BM=stencil.ROWS, BN=stencil.KEYS, KW=32, ACC=tl.float32, PRECISION="tf32")
mixed = dict(GROUP=16, GROUP_WIDTH=16)
maps = dict(x=bf16, y=fp32, mid=fp32, taps=fp32, matrix=fp32, start="*i32")
side = dict(HAS_KERNEL=True, HAS_MATRIX=True, KEEP=True, FLIP=False, FILL=float("-inf"))
back = {**side, "HAS_MATRIX": False, "KEEP": False, "FLIP": True}
for text in (
    compiled(stencil._stencil, maps, **taps, **mixed, **side),
    compiled(stencil._stencil, maps, **taps, **back, GROUP=1, GROUP_WIDTH=1),
    compiled(stencil._kernel_gradient, dict(grad=fp32, x=bf16, sums=fp32, start="*i32"), **taps),
):
    assert "mma" in text, "no tensor cores"
fp64 = dict(x="*fp64", y="*fp64", mid="*fp64", taps="*fp64", matrix="*fp64", start="*i32")
exact, plain = dict(ACC=tl.float64, PRECISION="ieee"), dict(HAS_START=False, FILL=0.0)
compiled(stencil._stencil, fp64, **{**taps, **mixed, **side, **exact, **plain})
compiled(stencil._stencil, maps, **{**taps, **mixed, **side, **plain, "HAS_KERNEL": False, "C_Q": 1, "C_K": 1, "LEFT": 0, "KW": 16})
compiled(stencil._stencil, maps, **{**taps, **back, **plain, "MERGED": 2, "PRECISION": "tf32x3"}, GROUP=1, GROUP_WIDTH=1)
compiled(stencil._kernel_gradient, dict(grad=fp32, x=bf16, sums=fp32, start="*i32"), **{**taps, "MERGED": 2, "HAS_START": False})
for known in (False, True):
    compiled(softmax._softmax, dict(x=fp32, lse=fp32), KNOWN=known, N=1024, ACC=tl.float32)
compiled(softmax._softmax_backward, dict(weights=fp32, grad=fp32), N=1024, ACC=tl.float32)
pointers = dict(grad=fp32, mid=fp32, out=fp32, sums=fp32, matrix=fp32, start="*i32")
for heads in (mixed, dict(GROUP=2, GROUP_WIDTH=2)):
    text = compiled(stencil._mix_backward, pointers, **heads, HAS_START=True, N=64, ACC=tl.float32, PRECISION="tf32x3")
    assert ("mma" in text) == (heads is mixed)
fp64 = {name: "*i32" if name == "start" else "*fp64" for name in pointers}
compiled(stencil._mix_backward, fp64, **mixed, **exact, HAS_START=False, N=64)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability: int) -> None:
    """Prevents code that only the interpreter understands, and convolutions that miss the tensor cores."""
    assert_compiles(CODE, capability)
