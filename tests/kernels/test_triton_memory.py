"""Perceptron memories in Triton's interpreter, against the plain chunks: outputs, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.miras import MirasSpec, Parameters, Retention, scan
from recollect.ops.miras.biases import AttentionalBias, dot_product, huber, l2, lp
from recollect.ops.miras.memories import mlp
from recollect.ops.miras.retentions import elastic_net, kl, lq
from recollect.ops.miras.retentions import l2 as decay
from recollect.ops.miras.rules import LearningRule, gd, momentum, omega
from tests.kernels.gpu_code import assert_compiles

pytest.importorskip("triton", reason="triton is not installed (pip install 'recollect[kernels]')")
from recollect.kernels.triton import can_run, pieces
from tests.kernels.interpreter import quick
from tests.kernels.scans import (
    BIASES,
    EXACT,
    assert_as_exact,
    assert_equal,
    assert_one_graph,
    flags,
    scan_in_parts,
    with_gradients,
)

pytestmark = pytest.mark.skipif(not can_run(torch.zeros(1)), reason="a GPU: TRITON_INTERPRET is not set")

SIZE = 16


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def draw(
    length: int,
    *,
    n_rows: int = 1,
    n_heads: int = 1,
    width: int = 1,
    expansion: int = 1,
    size: int = SIZE,
    strongest: float = 0.1,
) -> dict[str, Tensor]:
    """Everything that a gradient is taken of, fp64; gates of `width` channels."""
    generator = torch.Generator().manual_seed(length)
    tokens, wide = (n_rows, length, n_heads, size), (n_rows, length, n_heads, width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    named = {name: F.normalize(normal(*tokens), dim=-1) for name in "qk"}
    named |= {"v": normal(*tokens), "eta": 0.3 * uniform(*wide), "log_alpha": -strongest * uniform(*wide)}
    named |= {"delta": 0.1 + uniform(*wide), "log_momentum": -2 * uniform(*tokens[:3])}
    first, last = mlp(expansion=expansion).init(n_heads, size, size, generator=generator, dtype=torch.float64).fast
    named |= {"first": first, "last": last, "scale": 1 + normal(n_heads, size) / 10, "shift": normal(n_heads, size) / 10}
    return {name: x.requires_grad_() for name, x in named.items()}


def run(
    named: dict[str, Tensor],
    chunk: int,
    bias: AttentionalBias,
    backend: str,
    *,
    cuts: tuple[int, ...] = (),
    retention: Retention | None = None,
    rule: LearningRule | None = None,
    **marks: Tensor,
) -> list[Tensor]:
    """y and the last states, of one call or cut into several."""
    memory = mlp(expansion=named["first"].shape[-2] // named["q"].shape[-1])
    spec = MirasSpec(memory=memory, bias=bias, retention=retention or decay(), rule=rule or gd(), chunk_size=chunk)
    parameters = Parameters((named["first"], named["last"]), (named["scale"], named["shift"]))
    gates = ("eta", "log_alpha", *bias.gates, *(["log_momentum"] if spec.rule.momentum else []))
    return scan_in_parts(spec, named, gates, parameters, backend, cuts, **marks)


def results(named: dict[str, Tensor], *arguments: Any, **options: Any) -> list[Tensor]:
    """What `run` returns, and the gradients of a fixed sum over it."""
    return with_gradients(run(named, *arguments, **options), named)


@pytest.mark.parametrize(
    ("bias", "length", "chunk", "width"),
    [
        ("l2", 35, 16, 1),
        ("lp3", 21, 5, SIZE),
        ("huber", 37, 64, SIZE),
        ("l1", 18, 64, 1),
        ("huber of the norm", 18, 7, 1),
        ("lp below 2", 18, 7, 1),
        ("lp above 3", 18, 16, SIZE),
        ("l_infinity", 18, 7, SIZE),
        ("pseudo_huber", 18, 7, SIZE),
        ("value_shift", 18, 16, 1),
    ],
)
def test_it_equals_the_plain_chunks(bias: str, length: int, chunk: int, width: int) -> None:
    """Prevents a gradient point, a decay or a second-order term that is lost between pieces and chunks; one bias each."""
    named = draw(length, width=width)
    actual, expected = (results(named, chunk, BIASES[bias], form) for form in ("triton", "chunked"))
    assert_equal(actual, expected)


@pytest.mark.parametrize(("chunk", "cuts"), [(16, (21,)), (20, ()), (64, (1, 14))])
def test_it_keeps_documents_padding_and_calls_apart(chunk: int, cuts: tuple[int, ...]) -> None:
    """Prevents a document that sees the one before it, padding that moves the chunks, and states that do not go on in an open chunk."""
    named, marks = draw(26, n_rows=2, n_heads=2, width=SIZE), flags(2, 26)
    actual = results(named, chunk, BIASES["huber"], "triton", cuts=cuts, **marks)
    assert_equal(actual, results(named, chunk, BIASES["huber"], "chunked", **marks))


@pytest.mark.parametrize(("length", "chunk", "cuts"), [(70, 16, ()), (90, 80, (3,))])
def test_it_goes_back_over_several_segments(length: int, chunk: int, cuts: tuple[int, ...]) -> None:
    """Prevents a state, or the first state of a chunk, that is taken from the wrong segment; three blocks of hidden units."""
    named = draw(length, expansion=3)
    actual = results(named, chunk, BIASES["l2"], "triton", cuts=cuts)
    assert_equal(actual, results(named, chunk, BIASES["l2"], "chunked"))


@pytest.mark.parametrize("retention", [decay(), kl()], ids=["l2", "kl"])
def test_it_survives_any_decay(retention: Retention) -> None:
    """Prevents overflow or 0/0 where a gate forgets everything: log alpha down to -1e4."""
    named = draw(20, width=SIZE, strongest=3.0)
    with torch.no_grad():
        named["log_alpha"][:, 7] = -1e4
    actual, expected = (results(named, 20, BIASES["l2"], form, retention=retention) for form in ("triton", "chunked"))
    assert_equal(actual, expected, 1e-11)  # the norm divides by a memory that is nearly empty


MODELS = {
    "yaad": {"bias": huber()},
    "moneta": {"bias": lp(3.0), "retention": lq(4.0)},
    "memora": {"bias": l2(), "retention": kl()},
    "titans": {"bias": l2(), "rule": momentum()},
}


@pytest.mark.parametrize("model", list(MODELS))
def test_error_in_single_precision_is_at_most_twice_the_plain_chunks(model: str) -> None:
    """Prevents sums or gates in less than fp32: mean error of three draws, each result and gradient."""
    draws = (draw(length, width=1 if model == "titans" else SIZE) for length in (18, 20, 22))
    assert_as_exact(draws, lambda named, form: results(named, 16, backend=form, **MODELS[model]))


@pytest.mark.parametrize(("chunk", "length"), [(1, 40), (5, 40), (16, 100), (24, 100), (64, 300), (100, 300), (250, 600)])
def test_the_table_of_pieces_covers_every_token_once(chunk: int, length: int) -> None:
    """Prevents pieces that cross a chunk or a document, segments that are too long, and more saved states than were reserved."""
    n_rows = 4
    generator = torch.Generator().manual_seed(chunk)
    for share, fill in ((0.0, 1.0), (0.0, 0.7), (0.02, 0.9), (0.3, 0.5), (1.0, 1.0)):
        phase = torch.randint(chunk, (n_rows,), generator=generator)
        reset, valid = (torch.rand(n_rows, length, generator=generator) < part for part in (share, fill))
        table = pieces.cut(phase, length, chunk, reset if share else None, valid if fill < 1 else None)
        for row in range(n_rows):
            expected = loop(int(phase[row]), chunk, reset[row] & bool(share), valid[row])
            n_pieces, full = table.ends[row].tolist()
            entries = table.entries[row, :n_pieces].tolist()
            found = [(table.order[row, begin : begin + count].tolist(), flag) for begin, count, flag, *_ in entries]
            assert found == [(tokens, flag) for tokens, flag in expected]
            open_tokens = len(expected[-1][0]) if expected else 0
            assert bool(full) == (bool(expected) and int(table.phase[row]) == 0), open_tokens
            for n, (_, _, flag, slot, low, chunk_at) in enumerate(entries):
                assert 0 <= n - low < pieces.SEGMENT
                assert slot < table.n_slots
                starts = [m for m in range(n + 1) if entries[m][2] & pieces.CHUNK]
                assert chunk_at == (starts[-1] if starts else -1)
                assert chunk_at >= low or chunk_at < 0 or entries[chunk_at][4] == chunk_at, "a chunk's start was not saved"
                assert (slot >= 0) == (n == low and not flag & pieces.DOCUMENT)
                assert n == low or not flag & pieces.DOCUMENT
            slots = [entry[3] for entry in entries if entry[3] >= 0]
            assert slots == list(range(len(slots)))


def loop(phase: int, chunk: int, reset: Tensor, valid: Tensor) -> list[tuple[list[int], int]]:
    """Tokens and flags of each piece, token by token."""
    found: list[tuple[list[int], int]] = []
    for t in valid.nonzero()[:, 0].tolist():
        phase = 0 if reset[t] else phase
        if not found or phase == 0 or len(found[-1][0]) == pieces.TOKENS:
            found.append(([], (phase == 0) * pieces.CHUNK + bool(reset[t]) * pieces.DOCUMENT))
        found[-1][0].append(t)
        phase = (phase + 1) % chunk
    return found


@pytest.mark.parametrize("model", list(MODELS))
def test_key_dims_that_are_no_power_of_two(model: str) -> None:
    """Prevents columns that pad a tile to a power of two from entering a mean, a softmax or a neighbour's channels."""
    named = draw(11, n_heads=2, width=1 if model == "titans" else 48, size=48)
    actual, expected = (results(named, 7, backend=form, **MODELS[model]) for form in ("triton", "chunked"))
    assert_equal(actual, expected, 3e-12 if model == "memora" else EXACT)


@pytest.mark.parametrize("bias", ["l_infinity", "value_shift"])
def test_biases_over_channels_leave_out_what_pads_them(bias: str) -> None:
    """Prevents columns that pad a tile to a power of two from entering a bias' softmax or mean."""
    named = draw(11, n_heads=2, size=48)
    assert_equal(*(results(named, 7, BIASES[bias], form) for form in ("triton", "chunked")))


@pytest.mark.parametrize("model", ["yaad", "memora", "titans"])
def test_it_can_be_compiled_as_one_graph(model: str) -> None:
    """Prevents an op that breaks torch.compile's graph, or whose fake has other shapes than it."""
    named = draw(9)
    del named["delta" if model != "yaad" else "log_momentum"]
    if model == "memora":
        del named["log_momentum"]
    assert_one_graph(lambda x: run(x, 8, backend="triton", reset=torch.arange(9)[None] == 4, **MODELS[model]), named)


def test_it_is_never_the_default_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an interpreter that someone waits for, and a kernel that is named where it cannot run."""
    from recollect.kernels.triton import perceptron

    named = draw(3)
    monkeypatch.setattr(perceptron, "perceptron_scan", None)
    spec = MirasSpec(memory=mlp(expansion=1), bias=l2(), retention=decay(), rule=gd(), chunk_size=16)
    parameters = Parameters((named["first"], named["last"]), (named["scale"], named["shift"]))
    scan(spec, named["q"], named["k"], named["v"], {}, parameters=parameters)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run scan of memory .*pass backend='chunked'"):
        run(named, 16, l2(), "triton")


@pytest.mark.parametrize(
    "choice",
    [
        {"bias": dot_product()},
        {"retention": kl(2.0)},
        {"rule": omega()},
        {"memory": mlp(expansion=1, activation="silu")},
        {"chunk_size": 1},
    ],
)
def test_it_refuses_what_it_has_no_code_for(choice: dict[str, Any]) -> None:
    """Prevents wrong numbers where the plain form has to be used."""
    named = draw(3)
    same: dict[str, Any] = {"memory": mlp(expansion=1), "bias": l2(), "retention": decay(), "rule": gd(), "chunk_size": 16}
    parameters = Parameters((named["first"], named["last"]), (named["scale"], named["shift"]))
    with pytest.raises(RuntimeError, match="'triton' cannot run"):
        scan(MirasSpec(**{**same, **choice}), *(named[x] for x in "qkv"), {}, parameters=parameters, backend="triton")


@pytest.mark.parametrize("retention", [lq(4.0), lq(2.5, radius=2.0), lq(3.0, "paper")], ids=["4", "2.5 of a radius", "paper"])
def test_a_scaled_memory_equals_the_plain_chunks(retention: Retention) -> None:
    """Prevents a scale, or its gradient, that is lost in an open chunk or between calls, once the memory has outgrown its radius."""
    named = draw(40, n_heads=2, width=SIZE)
    options = {"retention": retention}
    actual, expected = (
        results(named, 20, BIASES["lp3"], form, cuts=cuts, **options) for form, cuts in (("triton", (7, 23)), ("chunked", ()))
    )
    assert_equal(actual, expected)
    assert float((expected[0] - run(named, 20, BIASES["lp3"], "chunked")[0])[:, 20:].detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("length", "chunk", "cuts", "marked"), [(40, 16, (), False), (26, 20, (9,), True), (70, 80, (2,), False)]
)
def test_momentum_equals_the_plain_chunks(length: int, chunk: int, cuts: tuple[int, ...], marked: bool) -> None:
    """Prevents a last change that is lost between pieces or calls, outlives its document, or moves the memory at padding."""
    named, options = draw(length, n_heads=1 + marked), {"rule": momentum(), **(flags(1, length) if marked else {})}
    actual = results(named, chunk, BIASES["l2"], "triton", cuts=cuts, **options)
    assert_equal(actual, results(named, chunk, BIASES["l2"], "chunked", **options))


@pytest.mark.parametrize(
    ("length", "chunk", "cuts", "width", "marked"),
    [(40, 20, (3,), SIZE, False), (26, 16, (9,), 1, True), (70, 80, (2,), SIZE, False)],
)
def test_a_simplex_memory_equals_the_plain_chunks(
    length: int, chunk: int, cuts: tuple[int, ...], width: int, marked: bool
) -> None:
    """Prevents weights that are not those of the chunk's start, and a frame that has lost the decay since then. The chunks, its oracle,
    move by 1.2e-12 with the last bits of their inputs."""
    named, options = draw(length, n_heads=1 + marked, width=width), {"retention": kl(), **(flags(1, length) if marked else {})}
    actual = results(named, chunk, BIASES["l2"], "triton", cuts=cuts, **options)
    assert_equal(actual, results(named, chunk, BIASES["l2"], "chunked", **options), 3e-12)


@pytest.mark.parametrize(
    ("length", "cuts", "rule", "marked"), [(37, (14,), gd(), True), (40, (), momentum(), False), (90, (), gd(), False)]
)
def test_an_elastic_net_equals_the_plain_chunks(length: int, cuts: tuple[int, ...], rule: LearningRule, marked: bool) -> None:
    """Prevents a threshold that is taken in an open chunk, by a document that starts, twice between calls or not at all, that takes
    the last change along, and a gradient through weights that are zero since."""
    named, options = draw(length), {"retention": elastic_net(0.003), "rule": rule}
    marks = {**flags(1, length), "reset": torch.arange(length)[None] == 25} if marked else {}
    chunk = 8 if marked else 20
    actual = results(named, chunk, BIASES["huber"], "triton", cuts=cuts, **options, **marks)
    expected = results(named, chunk, BIASES["huber"], "chunked", **options, **marks)
    assert_equal(actual, expected)
    assert 0.01 < float((expected[3] == 0).double().mean()) < 0.9  # of the state where the last chunk began


CODE = """
from recollect.kernels.triton import perceptron_mixture as mixed, perceptron_tokens as tokens
from recollect.kernels.triton.perceptron_walk import walk
from recollect.kernels.triton.perceptron_walk_back import walk_back
from tests.kernels.gpu_probe import probe

def check(kernel, real, **choice):
    numbers = {"n_tokens", "n_heads", "n_rows", "n_slots"}
    sizes = dict(KEY=16, KW=16, HIDDEN=512, BO=16, SHARPNESS=10.0, THRESHOLD=0.0, EXPONENT=3.0)
    constants = {name: value for name, value in {**sizes, **choice}.items() if name in kernel.arg_names}
    pointers = {name: "*" + real for name in kernel.arg_names if name not in numbers and name not in constants}
    tables = {name: "*i32" for name in ("order", "entries", "ends") if name in pointers}
    text = compiled(kernel, {**pointers, **tables}, **constants)
    assert "mma" in text or kernel is probe, "no tensor cores"

gates = ("ETA_WIDE", "ALPHA_WIDE", "IN_WIDE", "DELTA_WIDE", "HAS_DELTA", "LEARN", "HAS_START")
plain = dict(dict.fromkeys(gates, False), MOMENTUM=False, LINK=0, BIAS=0)
every = dict(dict.fromkeys(gates, True), MOMENTUM=False, LINK=1, BIAS=2)
mixed_up = dict(every, MOMENTUM=True, LINK=0, ETA_WIDE=False, THRESHOLD=0.1)
of_tokens = (tokens.prepare, tokens.finish, tokens.prepare_back, tokens.finish_back)
of_mixtures = (mixed.prepare_mixed, mixed.finish_mixed, mixed.prepare_mixed_back, mixed.finish_mixed_back)
some, others = {
    "tokens": (of_tokens, of_mixtures),
    "walk": ((walk,), (walk,)),
    "walk_back": ((walk_back,), ()),
    "walk_back with momentum": ((), (walk_back,)),
}[PART]
for kernel in some:
    check(kernel, "fp32", PRECISION="tf32", **plain)
    check(kernel, "fp32", PRECISION="tf32x3", **every)
    check(kernel, "fp32", PRECISION="tf32", **{**every, "LINK": 2, "IN_WIDE": False})
for kernel in others:
    check(kernel, "fp32", PRECISION="tf32x3", **mixed_up)
    check(kernel, "fp64", PRECISION="ieee", **mixed_up)
for bias in range(9) if PART == "walk" else ():
    check(probe, "fp32", BIAS=bias)
"""


SLOW_PARTS = [pytest.param(part, marks=pytest.mark.slow) for part in ("walk_back", "walk_back with momentum")]


@pytest.mark.parametrize("part", ["tokens", "walk", *SLOW_PARTS])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability: int, part: str) -> None:
    """Prevents code that only the interpreter understands, and products that miss the tensor cores."""
    assert_compiles(CODE.replace("PART", repr(part)), capability)
