"""Matrix memories in Triton's interpreter, against the plain chunks: outputs, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.miras import MirasSpec, Parameters, Retention, scan
from recollect.ops.miras.biases import AttentionalBias, dot_product, huber, l1, l2
from recollect.ops.miras.memories import matrix, mlp
from recollect.ops.miras.retentions import elastic_net, kl, l2_coupled, logit, lq, none, towards_initial
from recollect.ops.miras.retentions import l2 as decay
from recollect.ops.miras.rules import gd, momentum
from tests.kernels.gpu_code import assert_compiles

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run
from tests.kernels.interpreter import quick
from tests.kernels.scans import BIASES, assert_as_exact, assert_equal, assert_one_graph, flags, scan_in_parts, with_gradients

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def draw(
    length: int,
    *,
    n_rows: int = 1,
    n_heads: int = 1,
    key: int = 16,
    value: int = 16,
    widths: tuple[int, int, int] = (1, 1, 1),
    strongest: float = 0.1,
) -> dict[str, Tensor]:
    """Everything that a gradient is taken of, fp64; channels of eta, log alpha and delta."""
    generator = torch.Generator().manual_seed(length)
    heads = (n_rows, length, n_heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    named = {name: F.normalize(normal(*heads, key), dim=-1) for name in "qk"}
    named |= {"v": normal(*heads, value), "eta": 0.3 * uniform(*heads, widths[0])}
    named |= {"log_alpha": -strongest * uniform(*heads, widths[1]), "delta": 0.1 + uniform(*heads, widths[2])}
    named |= {"first": normal(n_heads, value, key) / 4}
    return {name: x.requires_grad_() for name, x in named.items()}


def run(
    named: dict[str, Tensor],
    chunk: int,
    bias: AttentionalBias,
    backend: str | None,
    *,
    cuts: tuple[int, ...] = (),
    retention: Retention | None = None,
    **marks: Tensor,
) -> list[Tensor]:
    """y and the last states, of one call or cut into several."""
    retention = retention or decay()
    spec = MirasSpec(memory=matrix(), bias=bias, retention=retention, rule=gd(), chunk_size=chunk)
    gates = ("eta", *(["log_alpha"] if retention.decays and not retention.couple else []), *bias.gates)
    parameters = Parameters((named["first"],))
    return scan_in_parts(spec, named, gates, parameters, backend, cuts, **marks)


def results(named: dict[str, Tensor], *arguments: Any, **options: Any) -> list[Tensor]:
    """What `run` returns, and the gradients of a fixed sum over it."""
    return with_gradients(run(named, *arguments, **options), named)


@pytest.mark.parametrize(
    ("bias", "length", "chunk", "widths"),
    [
        ("l2", 35, 16, (1, 1, 1)),
        ("lp3", 13, 5, (16, 1, 1)),
        ("huber", 37, 64, (1, 16, 16)),
        ("huber", 18, 16, (16, 1, 1)),
        ("l1", 18, 64, (16, 16, 1)),
        ("huber of the norm", 18, 7, (1, 1, 1)),
        ("huber of the norm", 18, 64, (16, 16, 16)),
        ("lp below 2", 18, 7, (1, 1, 1)),
        ("lp above 3", 18, 16, (16, 1, 1)),
        ("l_infinity", 18, 7, (1, 16, 1)),
        ("pseudo_huber", 18, 7, (1, 1, 1)),
        ("pseudo_huber", 18, 64, (1, 1, 16)),
        ("value_shift", 18, 7, (1, 1, 1)),
        ("value_shift", 18, 16, (1, 1, 16)),
    ],
)
def test_it_equals_the_plain_chunks(bias: str, length: int, chunk: int, widths: tuple[int, int, int]) -> None:
    """Prevents a gradient point, a decay or a second-order term that is lost between pieces and chunks."""
    named = draw(length, widths=widths)
    actual, expected = (results(named, chunk, BIASES[bias], form) for form in ("triton", "chunked"))
    assert_equal(actual, expected)


@pytest.mark.parametrize(("bias", "chunk", "cuts"), [("huber", 16, (21,)), ("l1", 20, ()), ("huber of the norm", 64, (1, 14))])
def test_it_keeps_documents_padding_and_calls_apart(bias: str, chunk: int, cuts: tuple[int, ...]) -> None:
    """Prevents a document that sees the one before it, padding that moves the chunks, and states that do not go on in an open chunk."""
    named, marks = draw(26, n_rows=2, widths=(1, 16, 1)), flags(2, 26)
    actual = results(named, chunk, BIASES[bias], "triton", cuts=cuts, **marks)
    assert_equal(actual, results(named, chunk, BIASES[bias], "chunked", **marks))


@pytest.mark.parametrize(("length", "chunk", "cuts"), [(70, 16, ()), (90, 80, (3,)), (11, 2, ())])
def test_it_goes_back_over_several_segments(length: int, chunk: int, cuts: tuple[int, ...]) -> None:
    """Prevents a state, or the first state of a chunk, that is taken from the wrong segment."""
    named = draw(length)
    actual = results(named, chunk, BIASES["lp3"], "triton", cuts=cuts)
    assert_equal(actual, results(named, chunk, BIASES["lp3"], "chunked"))


@pytest.mark.parametrize(
    ("bias", "key", "value"), [("huber", 3, 40), ("huber", 20, 5), ("huber of the norm", 20, 40), ("l_infinity", 3, 40)]
)
def test_sizes_of_keys_and_values_are_free(bias: str, key: int, value: int) -> None:
    """Prevents entries that pad a tile from being written or summed, and several blocks of rows that miss a part of a sum."""
    named = draw(11, n_heads=2, key=key, value=value, widths=(key, key, 1))
    marks = flags(1, 11)
    actual, expected = (results(named, 7, BIASES[bias], form, **marks) for form in ("triton", "chunked"))
    assert_equal(actual, expected)


RETENTIONS = {
    "none": none(),
    "l2_coupled": l2_coupled(),
    "towards_initial": towards_initial(),
    "elastic_net": elastic_net(0.003),
    "lq": lq(4.0),
    "kl": kl(),
}


@pytest.mark.parametrize("retention", list(RETENTIONS))
def test_other_retentions(retention: str) -> None:
    """Prevents a gate that a retention lacks or derives from being taken for another, and a threshold that is taken in an open chunk,
    by a document that starts, twice between calls, or not at all."""
    named, options = draw(37, widths=(1, 16, 1)), {"retention": RETENTIONS[retention], **flags(1, 37)}
    if retention == "l2_coupled":
        named["log_alpha"] = named["log_alpha"][..., :1].detach().requires_grad_()
    cuts = (14,)
    if retention == "elastic_net":
        options["reset"] = torch.arange(37)[None] == 25
    actual = results(named, 8, BIASES["l1"], "triton", cuts=cuts, **options)
    expected = results(named, 8, BIASES["l1"], "chunked", **options)
    assert_equal(actual, expected)
    if retention == "elastic_net":
        assert 0.01 < float((expected[2] == 0).double().mean()) < 0.9


@pytest.mark.parametrize(
    ("bias", "retention"),
    [("lp3", lq(4.0)), ("huber of the norm", lq(4.0)), ("lp3", lq(2.5, radius=0.05)), ("huber of the norm", lq(3.0, "paper"))],
    ids=["4", "4, huber", "2.5 of a radius", "paper"],
)
def test_a_scaled_memory_equals_the_plain_chunks(bias: str, retention: Retention) -> None:
    """Prevents a scale, or its gradient, that is lost in an open chunk or between calls, once the memory has outgrown its radius."""
    named, options = draw(40, n_heads=2, value=20, widths=(16, 16, 1)), {"retention": retention}
    with torch.no_grad():
        named["first"] /= 100
    actual, expected = (
        results(named, 20, BIASES[bias], form, cuts=cuts, **options) for form, cuts in (("triton", (7, 23)), ("chunked", ()))
    )
    assert_equal(actual, expected)
    plain = run(named, 20, BIASES[bias], "chunked")[0][:, 20:].detach()
    assert float((expected[0][:, 20:].detach() - plain).abs().max()) > 0.1 * float(plain.abs().max())


@pytest.mark.parametrize(
    ("bias", "length", "chunk", "cuts", "wide"),
    [("l2", 40, 20, (3,), 16), ("huber of the norm", 26, 64, (9,), 1), ("lp3", 90, 80, (2, 60), 1)],
)
def test_a_simplex_memory_equals_the_plain_chunks(bias: str, length: int, chunk: int, cuts: tuple[int, ...], wide: int) -> None:
    """Prevents weights that are not those of the chunk's start, and a frame that has lost the decay since then."""
    named, options = draw(length, n_heads=2, value=20, widths=(wide, wide, 1)), {"retention": kl()}
    actual = results(named, chunk, BIASES[bias], "triton", cuts=cuts, **options)
    assert_equal(actual, results(named, chunk, BIASES[bias], "chunked", **options))


@pytest.mark.parametrize("length", [24, 90])
def test_a_threshold_at_the_end_of_a_call(length: int) -> None:
    """Prevents a gradient that passes through weights which the last chunk, or one computed again, has set to zero."""
    named, options = draw(length), {"retention": RETENTIONS["elastic_net"]}
    actual, expected = (results(named, 12, BIASES["huber"], form, **options) for form in ("triton", "chunked"))
    assert_equal(actual, expected)


def test_it_survives_any_decay() -> None:
    """Prevents overflow or 0/0 where a gate forgets everything: log alpha down to -1e4."""
    named = draw(20, widths=(1, 16, 1), strongest=3.0)
    with torch.no_grad():
        named["log_alpha"][:, 7] = -1e4
    assert_equal(*(results(named, 20, BIASES["l1"], form) for form in ("triton", "chunked")))


def test_without_gradients_it_gives_the_same() -> None:
    """Prevents a forward pass that needs what only a backward pass asks for."""
    named = draw(40)
    with torch.no_grad():
        assert_equal(*(run(named, 16, BIASES["huber"], form) for form in ("triton", "chunked")))


@pytest.mark.parametrize("bias", [bias for bias in BIASES if bias not in ("l2", "l1", "huber")])
def test_perfect_predictions_are_differentiated(bias: str) -> None:
    """Prevents 0 / 0, or a power of 0, where a residual is exactly zero: half of the tokens, and half of the channels of the others."""
    named = draw(9)
    with torch.no_grad():
        named["first"].zero_()
        named["v"][:, ::2] = 0
        named["v"][..., ::2] = 0
    assert_equal(*(results(named, 16, BIASES[bias], form) for form in ("triton", "chunked")))


@pytest.mark.parametrize("bias", list(BIASES))
def test_error_in_single_precision_is_at_most_twice_the_plain_chunks(bias: str) -> None:
    """Prevents sums or gates in less than fp32: mean error of three draws, each result and gradient."""
    draws = (draw(length, widths=(16, 16, 16)) for length in (18, 20, 22))
    assert_as_exact(draws, lambda named, form: results(named, 16, BIASES[bias], form))


def test_it_can_be_compiled_as_one_graph() -> None:
    """Prevents an op that breaks torch.compile's graph, or whose fake has other shapes than it."""
    named = draw(9, value=8)
    assert_one_graph(lambda x: run(x, 8, huber(), "triton", reset=torch.arange(9)[None] == 4), named)


def test_it_is_never_the_default_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an interpreter that someone waits for, and a kernel that is named where it cannot run."""
    from recollect.kernels.triton import matrix as kernels

    named = draw(3)
    monkeypatch.setattr(kernels, "matrix_scan", None)
    run(named, 16, l1(), None)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run scan of memory .*pass backend='chunked'"):
        run(named, 16, l1(), "triton")


@pytest.mark.parametrize(
    "choice",
    [
        {"bias": dot_product()},
        {"retention": logit()},
        {"rule": momentum()},
        {"memory": mlp(depth=1)},
        {"chunk_size": 1, "bias": l1()},
    ],
)
def test_it_refuses_what_it_has_no_code_for(choice: dict[str, Any]) -> None:
    """Prevents wrong numbers where the plain form has to be used."""
    named = draw(3)
    same: dict[str, Any] = {"memory": matrix(), "bias": l2(), "retention": decay(), "rule": gd(), "chunk_size": 16}
    spec = MirasSpec(**{**same, **choice})
    parameters = spec.memory.init(1, 16, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'triton' cannot run"):
        scan(spec, *(named[x] for x in "qkv"), {}, parameters=parameters, backend="triton")


CODE = """
from recollect.kernels.triton.matrix_tokens import finish_back, prepare
from recollect.kernels.triton.matrix_walk import walk, walk_back

def check(kernel, real, **choice):
    numbers = {"n_tokens", "n_heads", "n_rows", "n_slots"}
    sizes = dict(KEY=16, KW=16, VALUE=16, BV=16, SHARPNESS=10.0, EXPONENT=3.0)
    constants = {name: value for name, value in {**sizes, **choice}.items() if name in kernel.arg_names}
    pointers = {name: "*" + real for name in kernel.arg_names if name not in numbers and name not in constants}
    tables = {name: "*i32" for name in ("order", "entries", "ends")}
    text = compiled(kernel, {**pointers, **tables}, {"num_stages": 1}, **constants)
    assert "mma" in text, "no tensor cores"

gates = ("ETA_WIDE", "ALPHA_WIDE", "DELTA_WIDE", "HAS_DELTA", "LEARN", "HAS_START")
plain = dict(dict.fromkeys(gates, False), THRESHOLD=0.0, LINK=0)
every = dict(dict.fromkeys(gates, True), THRESHOLD=0.1, LINK=1)
for kernel in (prepare, finish_back, walk, walk_back):
    check(kernel, "fp32", PRECISION="tf32x3", BIAS=0, **plain)
    check(kernel, "fp32", PRECISION="tf32x3", BIAS=4, **every)
    if SIMPLEX:
        check(kernel, "fp32", PRECISION="tf32x3", BIAS=2, **{**every, "ALPHA_WIDE": False, "LINK": 2})
for bias in (5, 6, 7, 8):
    check(walk, "fp32", PRECISION="tf32x3", BIAS=bias, **every)
for kernel in (walk, walk_back):
    check(kernel, "fp64", PRECISION="ieee", BIAS=2, **{**every, "DELTA_WIDE": False})
"""


@pytest.mark.parametrize(
    ("capability", "simplex"), [(90, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (80, 90))]
)
def test_kernels_compile_for_a_gpu(capability: int, simplex: bool) -> None:
    """Prevents code that only the interpreter understands, and products that miss the tensor cores."""
    assert_compiles(CODE.replace("SIMPLEX", repr(simplex)), capability)
