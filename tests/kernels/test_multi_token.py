"""The compiled form of Multi-Token Attention against its oracle where strips, threads and rare shapes take other paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.kernels.compile import compiler
from recollect.ops import Mixing, Rows, multi_token_attention, multi_token_rows
from recollect.ops.multi_token import document_starts
from tests.kernels.strips import small
from tests.ops.test_multi_token import module_inputs

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")

EXACT = 1e-12


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 12 rows, so that short sequences have several."""
    small(monkeypatch)


def assert_forms_agree(named: dict[str, Tensor], *, tolerance: float = EXACT, **options: object) -> None:
    """Output and every gradient of the native form equal the oracle's, relative to the largest entry where that is above 1."""
    results = []
    for backend in ("native", "materialized"):
        out = multi_token_attention(**named, **options, backend=backend)  # type: ignore[arg-type]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), list(named.values()))])
    for name, actual, expected in zip(("out", *named), *results, strict=True):
        error = float(((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).detach())
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65, 131])
def test_native_strips_equal_the_oracle(length: int, small_strips: None) -> None:
    """Prevents a halo or a gradient that is lost between strips, and a last strip that is cut wrong."""
    assert_forms_agree(module_inputs(length))


@pytest.mark.parametrize(
    "parts", [("kq_pre",), ("kq_post",), ("kq_pre", "head_pre"), ("kq_post", "head_post"), ("head_pre", "head_post")]
)
def test_native_parts_equal_the_oracle_over_strips(parts: tuple[str, ...], small_strips: None) -> None:
    """Prevents paths for a missing part that only work in one strip."""
    named = module_inputs(70)
    assert_forms_agree({name: named[name] for name in ("q", "k", "v", *parts)})


def test_native_documents_equal_the_oracle_over_strips(small_strips: None) -> None:
    """Prevents cuts that are read from the wrong row in a later strip."""
    ids = torch.stack([(torch.arange(100) >= 37).long() + (torch.arange(100) >= 64), torch.arange(100) // 7])
    assert_forms_agree(module_inputs(100), document_ids=ids)


def test_native_dropout_equals_the_oracle_over_strips(small_strips: None) -> None:
    """Prevents a mask that depends on the strip."""
    assert_forms_agree(module_inputs(100), dropout_p=0.3, seed=5)


def test_autocast_does_not_change_the_native_form() -> None:
    """Prevents logits of a forward pass under autocast that are not those which the backward pass, outside it, computes again."""
    named = {name: x.detach().float().requires_grad_() for name, x in module_inputs(40).items()}
    with torch.no_grad():
        named["q"] *= 40
    results = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = multi_token_attention(**named, backend="native")
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(named.values()))])
    for name, plain, cast in zip(("out", *named), *results, strict=True):
        assert torch.equal(plain, cast), name


@pytest.mark.parametrize("pad_key", ["left", "right"])
def test_native_one_sided_kernels_equal_the_oracle_over_strips(pad_key: str, small_strips: None) -> None:
    """Prevents a reach beyond the padding of the buffers."""
    assert_forms_agree(module_inputs(70), pad_key=pad_key)


@pytest.mark.parametrize("first", [3, 40, 69])
@pytest.mark.parametrize("documents", [False, True])
def test_native_rows_carry_over_strips(first: int, documents: bool, small_strips: None) -> None:
    """Prevents wrong carried rows, or wrong gradients through them, where a piece is longer or shorter than a strip."""
    named = module_inputs(75)
    mixing = Mixing(**{part: named[part] for part in Mixing._fields})
    start = document_starts((torch.arange(75) // 38).expand(2, -1)) if documents else None
    results = []
    for backend in ("native", "materialized"):
        rows, outs = Rows(), []
        for low, high in ((0, first), (first, 75)):
            piece = None if start is None else start[:, low:high]
            q, k, v = named["q"][:, low:high], named["k"][:, :high], named["v"][:, :high]
            out, rows = multi_token_rows(q, k, v, mixing, rows, start=piece, backend=backend)
            outs.append(out)
        out = torch.cat(outs, dim=1)
        results.append([out, *rows, *torch.autograd.grad(out.sin().sum(), list(named.values()))])
    for name, actual, expected in zip(("out", *Rows._fields, *named), *results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n_heads", [3, 5])
def test_native_odd_numbers_of_heads_equal_the_oracle(n_heads: int, small_strips: None) -> None:
    """Prevents vector code that only works for groups of four: 3 and 5 heads mixed together."""
    assert_forms_agree(module_inputs(40, n_heads=n_heads, n_kv=n_heads, group=n_heads))


def test_native_refuses_a_matrix_of_one_head() -> None:
    """Prevents a learned scale per head (c_h = 1) from being dropped by a kernel that was compiled without head mixing."""
    with pytest.raises(RuntimeError, match="backend='blocked'"):
        multi_token_attention(**module_inputs(8, n_heads=2, n_kv=2, group=1), backend="native")


def test_native_takes_any_layout_of_its_inputs(small_strips: None) -> None:
    """Prevents reading memory as contiguous that is not: transposed, strided and expanded inputs."""
    named = {name: tensor.detach() for name, tensor in module_inputs(40).items()}
    odd = {name: tensor.mT.contiguous().mT for name, tensor in named.items()}
    odd["k"] = torch.stack([named["k"], named["k"]], dim=-1).flatten(-2)[..., ::2]
    assert not any(tensor.is_contiguous() for name, tensor in odd.items() if name in ("q", "k", "v", "kq_pre"))
    expected = multi_token_attention(**named, backend="native")
    torch.testing.assert_close(multi_token_attention(**odd, backend="native"), expected, rtol=0, atol=EXACT)


def test_native_results_do_not_depend_on_threads(small_strips: None) -> None:
    """Prevents sums in the order in which threads finish: one, three and twenty threads, which work as a team, give equal bits."""

    def run(n_threads: int) -> list[Tensor]:
        torch.set_num_threads(n_threads)
        try:
            named = module_inputs(70)
            out = multi_token_attention(**named, backend="native")
            return [out, *torch.autograd.grad(out.sin().sum(), list(named.values()))]
        finally:
            torch.set_num_threads(1)

    names, alone = ("out", *module_inputs(1)), run(1)
    for n_threads in (3, 20):
        for name, one, several in zip(names, alone, run(n_threads), strict=True):
            assert torch.equal(one, several), f"{name}, {n_threads} threads"


def test_native_logits_of_any_size_stay_finite() -> None:
    """Prevents an exponential that overflows: logits of +-300 in fp32, against fp64."""
    named = {name: tensor.detach() for name, tensor in module_inputs(20).items()}
    named["q"] = named["q"] * 100
    exact = multi_token_attention(**named, backend="materialized")
    low = multi_token_attention(**{name: tensor.float() for name, tensor in named.items()}, backend="native")
    plain = multi_token_attention(**{name: tensor.float() for name, tensor in named.items()}, backend="materialized")
    assert torch.isfinite(low).all()
    assert (low - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


PARTS = {
    "everything": Mixing._fields,
    "first": ("kq_pre", "head_post"),
    "heads": ("head_pre", "head_post"),
    "after": ("kq_post",),
    "none": (),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("pad_key", ["both", "left", "right"])
@pytest.mark.parametrize("documents", [False, True])
def test_native_decoding_equals_the_oracle(parts: tuple[str, ...], pad_key: str, documents: bool) -> None:
    """Prevents rows that are carried wrongly from token to token, a reach beyond the padding, cuts at the wrong row; with dropout."""
    named = {name: x.detach() for name, x in module_inputs(41).items()}
    mixing = Mixing(**{name: named[name] for name in parts})
    start = document_starts(torch.stack([(torch.arange(41) >= 29).long(), torch.arange(41) // 7])) if documents else None
    rows: dict[str, Rows] = {"native": Rows(), "materialized": Rows()}
    for low, high in [(0, 27), *((t, t + 1) for t in range(27, 41))]:
        outs = []
        for backend in rows:
            out, rows[backend] = multi_token_rows(
                named["q"][:, low:high],
                named["k"][:, :high],
                named["v"][:, :high],
                mixing,
                rows[backend],
                start=None if start is None else start[:, low:high],
                pad_key=pad_key,
                dropout_p=0.2,
                seed=3,
                backend=backend,
            )
            outs.append(out)
        torch.testing.assert_close(*outs, atol=EXACT, rtol=0)
        for name in Rows._fields:
            ours, theirs = (getattr(rows[backend], name) for backend in rows)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_decoding_errs_no_more_than_the_definition(dtype: torch.dtype) -> None:
    """Prevents logits or weights that are rounded where the definition keeps fp32."""
    named = {name: x.detach() for name, x in module_inputs(70).items()}
    q, k, v = (named.pop(name) for name in ("q", "k", "v"))
    exact = multi_token_attention(q, k, v, **named, backend="materialized")[:, -1:]
    low = [x.to(dtype) for x in (q, k, v)]
    mixing = Mixing(**{name: x.float() for name, x in named.items()})
    errors = []
    for backend in ("native", "materialized"):
        _, rows = multi_token_rows(low[0][:, :-1], low[1][:, :-1], low[2][:, :-1], mixing, Rows(), backend="materialized")
        out, _ = multi_token_rows(low[0][:, -1:], low[1], low[2], mixing, rows, backend=backend)
        assert out.dtype == dtype
        errors.append((out.double() - exact).abs().max())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("first", [-1, 20, 10**9])
def test_decoding_checks_where_it_starts(first: int) -> None:
    """Prevents a write outside a row."""
    named = {name: x.detach() for name, x in module_inputs(20).items()}
    named["q"] = named["q"][:, -1:]
    with pytest.raises(ValueError, match="must lie in 0"):
        multi_token_attention(**named, start=torch.tensor([[first]]), backend="native")


def test_gradients_of_one_token_are_those_of_the_oracle() -> None:
    """Prevents decoding, which has none, where they are wanted: of keys alone, too."""
    named = module_inputs(20)
    for wanted in ("q", "k", "kq_pre"):
        given = {name: x.detach() for name, x in named.items()}
        given["q"] = given["q"][:, -1:]
        given[wanted] = given[wanted].requires_grad_()
        grads = [
            torch.autograd.grad(multi_token_attention(**given, backend=backend).sin().sum(), given[wanted])[0]
            for backend in ("native", "materialized")
        ]
        torch.testing.assert_close(*grads, atol=EXACT, rtol=0)


def test_one_token_on_a_cpu_takes_the_form_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents decoding by many small steps, or by a form that copies the whole cache."""
    from recollect.kernels import multi_token

    taken = []
    monkeypatch.setattr(multi_token, "decode", lambda *call: taken.append(1) or (call[0], call[-1]))
    with torch.no_grad():
        named = module_inputs(20)
        named["q"] = named["q"][:, -1:]
        multi_token_attention(**named)
    assert taken
