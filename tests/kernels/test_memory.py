"""The compiled kernels stay inside their memory and use nothing they did not write, in the code of every kind of processor."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.kernels import compile as building
from recollect.kernels import layout
from recollect.ops import Mixing, Rows, multi_token_attention, multi_token_rows
from recollect.ops.multi_token import document_starts
from tests.kernels.strips import small
from tests.ops.test_multi_token import module_inputs

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C compiler on this machine")

EXACT = 1e-12
FENCE = 256  # numbers on either side of every buffer
PROCESSORS = ("native", "x86-64-v3", "x86-64")  # vectors of the widest kind here, of 32 and of 16 bytes


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New buffers hold NaN and lie between NaNs, which must still be there at the end; strips are as short as possible."""
    buffers: list[tuple[Tensor, int]] = []

    def new_empty(self: Tensor, *shape: int, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(sizes)
        buffer = torch.full((size + 2 * FENCE,), math.nan, dtype=dtype or self.dtype)
        buffers.append((buffer, size))
        return buffer[FENCE : FENCE + size].view(sizes)

    small(monkeypatch)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: new_empty(x, *x.shape))
    monkeypatch.setattr(torch, "zeros_like", lambda x: new_empty(x, *x.shape).zero_())
    yield
    assert len(buffers) > 10
    for buffer, size in buffers:
        assert buffer[:FENCE].isnan().all(), "written before the buffer"
        assert buffer[FENCE + size :].isnan().all(), "written past the buffer"


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels compiled for this kind of processor."""
    if request.param != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86-64 processor")
    if request.param == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("a processor without AVX2")
    flags = tuple(f"-march={request.param}" if flag == "-march=native" else flag for flag in building.FLAGS)
    monkeypatch.setattr(building, "FLAGS", flags)
    for cache in (building.stencil, building.attention):
        cache.cache_clear()
    yield request.param
    for cache in (building.stencil, building.attention):
        cache.cache_clear()


def inputs(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """q, k, v (head dims 5 and 40) and the four parts at one small size: kernels 2 x 15, two heads mixed."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    named = {"q": random(2, length, 4, 5), "k": random(2, length, 2, 5), "v": random(2, length, 2, 40)}
    named |= {name: 0.3 * random(4, 2, 15) for name in ("kq_pre", "kq_post")}
    named |= {name: torch.eye(2) + 0.3 * random(2, 2, 2) for name in ("head_pre", "head_post")}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in named.items()}


def results(named: dict[str, Tensor], **options: object) -> list[Tensor]:
    """Output and every gradient."""
    out = multi_token_attention(**named, **options)  # type: ignore[arg-type]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(named.values()))]


@pytest.mark.parametrize("pad_key", ["both", "left", "right"])
@pytest.mark.parametrize("length", [1, 40, 64, 67, 96, 203])
def test_kernels_use_only_what_they_wrote(length: int, pad_key: str, processor: str, fenced: None) -> None:
    """Prevents reads and writes outside the maps, and rows or padding that are read before they are written.

    Lengths that fill the last panel of keys leave no room behind it but the padding.
    """
    named = inputs(length)
    ids = (torch.arange(length) >= torch.tensor([[length // 3], [length]])).long()
    for documents in (None, ids):
        pairs = [results(named, pad_key=pad_key, document_ids=documents, backend=form) for form in ("native", "materialized")]
        for name, actual, expected in zip(("out", *named), *pairs, strict=True):
            error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
            assert error <= EXACT, f"{name}: {error:.1e}"


@pytest.mark.parametrize("length", [64, 70])
def test_single_precision_is_as_exact_as_the_plain_form(length: int, processor: str, fenced: None) -> None:
    """Prevents vector code of one width, or its exponential, that is less exact: output and gradients against fp64.

    And reads past the buffers that only the wider vectors of fp32 reach: at 64 keys, the kernel's gradient once did. A last bit of
    the result is let pass: a matrix' gradient is eight numbers, too few for an error of the plain form that could not be luck.
    """
    pairs = (("materialized", torch.float64), ("materialized", torch.float32), ("native", torch.float32))
    exact, plain, actual = (results(inputs(length, dtype), backend=form) for form, dtype in pairs)
    for name, a, b, c in zip(("out", *inputs(1)), actual, plain, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(torch.float32).eps * c.norm(), name


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 on matrix tiles, where the processor has them, and on vectors."""
    if not request.param:
        monkeypatch.setattr(layout, "TILED_QUERIES", 10**9)
    elif building.attention(torch.bfloat16, tiles=True) is None:
        pytest.skip("a processor without matrix tiles of bfloat16")


@pytest.mark.parametrize("length", [1, 32, 49, 64, 67, 131])
def test_products_of_bfloat16_are_as_exact_as_the_plain_forms(length: int, processor: str, tiles: None, fenced: None) -> None:
    """Prevents a row or column that lacks its neighbour, where two of them are multiplied at a time: strips that begin or end odd.

    Error of output and gradients at most twice that of the definition, in bfloat16 too; a last bit of the result is let pass.
    """
    low = inputs(length, torch.bfloat16)
    exact = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    ids = (torch.arange(length) >= torch.tensor([[length // 3], [length]])).long()
    for documents in (None, ids):
        pairs = (("materialized", exact), ("materialized", low), ("native", low))
        right, plain, actual = (results(named, document_ids=documents, backend=form) for form, named in pairs)
        for name, a, b, c in zip(("out", *low), actual, plain, right, strict=True):
            bit = torch.finfo(torch.bfloat16).eps * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + bit, name


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 5}])
@pytest.mark.parametrize("first", [0, 37])
def test_products_of_bfloat16_carry_rows(first: int, options: dict[str, Any], tiles: None, fenced: None) -> None:
    """Prevents rows of an earlier call, or a dropout mask, that stand elsewhere where products come in tiles; two pieces of 100
    tokens against the definition, outputs and gradients as above."""
    low = inputs(100, torch.bfloat16)
    exact = {name: x.detach().double().requires_grad_() for name, x in low.items()}

    def pieces(named: dict[str, Tensor], backend: str) -> list[Tensor]:
        mixing = Mixing(**{part: named[part] for part in Mixing._fields})
        rows, outs = Rows(), []
        for start, end in ((0, first), (first, 100)) if first else ((0, 100),):
            q, k, v = named["q"][:, start:end], named["k"][:, :end], named["v"][:, :end]
            out, rows = multi_token_rows(
                q, k, v, mixing, Rows(*(None if x is None else x.detach() for x in rows)), backend=backend, **options
            )
            outs.append(out)
        out = torch.cat(outs, 1)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(named.values()))]

    pairs = ((exact, "materialized"), (low, "materialized"), (low, "native"))
    for name, c, b, a in zip(("out", *low), *(pieces(*pair) for pair in pairs), strict=True):
        bit = torch.finfo(torch.bfloat16).eps * c.abs().max()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + bit, name


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["q", "k"])
def test_nan_is_not_hidden(name: str, dtype: torch.dtype, length: int) -> None:
    """Prevents a diverged model that looks healthy: NaN logits once had weight zero in fp32."""
    named = {key: tensor.detach().to(dtype) for key, tensor in module_inputs(length).items()}
    named[name][0, 7] = math.nan
    expected = multi_token_attention(**named, backend="materialized")
    actual = multi_token_attention(**named, backend="native")
    torch.testing.assert_close(actual.isnan(), expected.isnan(), rtol=0, atol=0)


def test_starts_that_are_shared_equal_those_of_every_batch_element() -> None:
    """Prevents reading past starts that are given once for the whole batch: this once crashed."""
    named = module_inputs(40)
    ids = (torch.arange(40) // 13)[None]
    expected = multi_token_attention(**named, document_ids=ids.expand(2, -1), backend="materialized")
    torch.testing.assert_close(multi_token_attention(**named, document_ids=ids, backend="native"), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("wrong", [-1, 1000, "decreasing", "short"])
def test_starts_that_would_leave_the_memory_are_refused(wrong: int | str) -> None:
    """Prevents a user's mistake from overwriting memory."""
    start = document_starts((torch.arange(20) // 6).expand(2, -1))
    if wrong == "decreasing":
        start = start.flip(1).clamp(max=torch.arange(20))
    elif wrong == "short":
        start = start[:, :19]
    else:
        start[1, 3] = int(wrong)
    with pytest.raises(ValueError, match="start"):
        multi_token_attention(**module_inputs(20), start=start, backend="native")


@pytest.mark.parametrize("low", ["q", "k", "v"])
def test_keys_and_values_of_another_precision_are_converted(low: str) -> None:
    """Prevents reading fp32 keys as fp64 ones: this once overwrote memory."""
    named = {name: tensor.detach() for name, tensor in module_inputs(30).items()}
    mixed = named | {low: named[low].float()}
    same = {name: tensor.double() for name, tensor in mixed.items()}  # what they promote to
    expected = multi_token_attention(**same, backend="native").to(mixed["q"].dtype)
    torch.testing.assert_close(multi_token_attention(**mixed, backend="native"), expected, rtol=0, atol=0)


def test_products_of_bfloat16_need_all_inputs_in_it() -> None:
    """Prevents fp32 keys that are rounded to bfloat16 because queries are: then gradients of fp32 have its error."""
    named = {name: tensor.detach() for name, tensor in module_inputs(30).items()}
    mixed = named | {name: named[name].float() for name in "kv"} | {"q": named["q"].bfloat16()}
    single = {name: tensor.float() for name, tensor in mixed.items()}
    expected = multi_token_attention(**single, backend="native")
    torch.testing.assert_close(multi_token_attention(**mixed, backend="native"), expected.bfloat16(), rtol=0, atol=0)


def test_threads_may_call_at_once() -> None:
    """Prevents scratch memory that calls share."""
    expected = results(module_inputs(50), backend="native")
    with ThreadPoolExecutor(2) as pool:
        for actual in pool.map(lambda _: results(module_inputs(50), backend="native"), range(8)):
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
