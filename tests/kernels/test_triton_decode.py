"""One new token of Multi-Token Attention in Triton's interpreter, against the oracle on whole sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.ops import Mixing, Rows, multi_token, multi_token_rows
from recollect.ops.multi_token import backends, choose, document_starts
from tests.kernels.gpu_code import assert_compiles
from tests.ops.test_multi_token import EXACT, FEW, Case, case_id, case_inputs

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run, decode, meant_attention

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")


@pytest.fixture(autouse=True)
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of eight keys, so that short sequences have several."""
    monkeypatch.setattr(decode, "KEYS", 8)


def stepped(case: Case, length: int, first: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs of the tokens from `first` on, one at a time in Triton, and the rows after the last; and the oracle's on all at once."""
    (q, k, v), parts, ids = case_inputs(case, length)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mixing = Mixing(**{name: None if x is None else x.to(dtype) for name, x in parts.items()})
    start = None if ids is None else document_starts(ids)
    found: list[list[Tensor]] = []
    for forms in (("materialized", "triton"), ("materialized", None)):
        rows, outs = Rows(), []
        cuts = [(0, first), *((i, i + 1) for i in range(first, length))] if forms[1] else [(0, first), (first, length)]
        for (low, high), form in zip(cuts, [forms[0], *[forms[1] or forms[0]] * (len(cuts) - 1)], strict=True):
            given = None if start is None else start[:, low:high]
            pieces = q[:, low:high], k[:, :high], v[:, :high]
            with torch.no_grad():
                out, rows = multi_token_rows(*pieces, mixing, rows, start=given, pad_key=case.pad_key, backend=form)
            outs.append(out)
        found.append([torch.cat(outs, 1), *(row for row in rows if row is not None)])
    return [part for pair in zip(*found, strict=True) for part in pair]


@pytest.mark.parametrize(("length", "first"), [(3, 1), (11, 9)])
@pytest.mark.parametrize("case", FEW, ids=case_id)
def test_steps_equal_the_oracle_on_the_whole(case: Case, length: int, first: int) -> None:
    """Prevents carried rows read at the wrong age, keys at the edge of a program, cuts of documents, transposed matrices."""
    if case.documents and length < 6:
        length, first = 7, 5  # documents of three and four tokens, and one that begins with the last step
    pairs = stepped(case, length, first)
    for actual, expected in zip(pairs[::2], pairs[1::2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_the_definition(dtype: torch.dtype) -> None:
    """Error of outputs and rows against fp64 at most twice the definition's own, and a last bit."""
    case = FEW[0]
    exact = stepped(case, 10, 9)[1::2]
    pairs = stepped(case, 10, 9, dtype)
    for actual, plain, right in zip(pairs[::2], pairs[1::2], exact, strict=True):
        bit = torch.finfo(dtype).eps * right.abs().max()
        assert (actual - right).abs().max() <= 2 * (plain - right).abs().max() + bit


def test_it_is_one_node_of_a_graph() -> None:
    """Prevents a decoder that torch.compile breaks at every layer."""
    torch.manual_seed(0)
    mixing = Mixing(
        *(x.double() for x in (torch.randn(2, 3, 3), torch.randn(1, 2, 2), torch.randn(2, 2, 3), torch.randn(1, 2, 2)))
    )
    q, k, v = torch.randn(2, 1, 2, 4).double(), torch.randn(2, 9, 2, 4).double(), torch.randn(2, 9, 2, 4).double()
    rows = Rows(torch.randn(2, 2, 2, 8).double(), torch.rand(2, 2, 1, 8).double())

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Rows]:
        return multi_token_rows(q, k, v, mixing, rows, backend="triton")

    with torch.no_grad():
        out, after = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
        expected, rows_expected = step(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip((out, *after), (expected, *rows_expected), strict=True))
    given = (q, k, v, *mixing, None, *(torch.nn.functional.pad(row, (0, 1)) for row in rows), 0.5, "both")
    torch.library.opcheck(decode._decode, given, test_utils=("test_schema", "test_faketensor"))


def test_it_is_the_default_for_one_new_token_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a decoder that has to be asked for; a few tokens at once, and a CPU, go on with the plain form."""
    chosen = {}
    for where, meant in (("gpu", lambda q, mixing: True), ("cpu", lambda q, mixing: q.is_cuda)):
        monkeypatch.setattr(multi_token, "DECODERS", [("triton", meant)])
        for n in (1, 2):
            chosen[where, n] = choose(torch.zeros(1, n, 2, 4), torch.zeros(1, 9, 2, 4), Mixing())
    forms = backends()
    assert chosen["gpu", 1] is forms["triton"]
    assert all(form is forms["materialized"] for which, form in chosen.items() if which != ("gpu", 1))
    monkeypatch.undo()
    assert ("triton", meant_attention) in multi_token.DECODERS


CODE = """
from recollect.kernels.triton import decode

maps = {name: "*fp32" for name in ("x", "before", "y", "taps", "matrix")} | {"start": "*i32"}
shape = dict(LEFT=5, C_Q=6, C_K=11, MERGED=1, BN=decode.KEYS, ACC=tl.float32)
for group, merged in ((16, 1), (1, 2)):
    mixed = dict(GROUP=group, GROUP_WIDTH=group, HAS_MATRIX=group > 1)
    for has_start, fill in ((False, 0.0), (True, float("-inf"))):
        compiled(decode._row, maps, **{**shape, "MERGED": merged}, **mixed, HAS_KERNEL=True, HAS_START=has_start, FILL=fill)
    compiled(decode._row, maps, **{**shape, "C_Q": 1, "C_K": 1, "LEFT": 0}, **mixed, HAS_KERNEL=False, HAS_START=True, FILL=0.0)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_a_gpu(capability: int) -> None:
    """Prevents code that only the interpreter understands."""
    assert_compiles(CODE, capability)
