"""Multi-Token Attention against the paper's equations: loops at tiny sizes, a conv2d module at larger ones, identities."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops import Mixing, multi_token_attention, softmax_attention
from recollect.ops.multi_token import LACKS, backends
from tests.ops import naive

EXACT = 1e-12


def runs(form: str, mixing: Mixing) -> bool:
    """Whether `form` takes these learned parts on this machine (the compiled one needs a C compiler and kernels per head)."""
    lacks = LACKS.get(form)
    return lacks is None or not lacks(torch.zeros(1, 1, 1, 1, dtype=torch.float64), mixing)


# Triton's interpreter takes seconds for what the others do in milliseconds: tests/kernels/test_triton_attention.py has its cases.
FORMS = [form for form in sorted(backends()) if form != "triton" and runs(form, Mixing())]


class Case(NamedTuple):
    """A combination of options. kq_*: None, "heads" [H, c_q, c_k] or "3d" [H, c_h, c_q, c_k]; head_*: None or group size."""

    kq_pre: str | None
    kq_post: str | None
    head_pre: int | None
    head_post: int | None
    pad_key: str = "both"
    n_kv: int = 4
    documents: bool = False


def all_cases() -> list[Case]:
    """Every (kq_pre, kq_post, head_pre, head_post); pad_key, GQA and documents run through their values along the way."""
    kinds, groups = (None, "heads", "3d"), (None, 1, 2, 4)
    rest = itertools.cycle(itertools.product(("both", "left", "right"), (4, 2, 1), (False, True)))
    return [Case(*parts, *next(rest)) for parts in itertools.product(kinds, kinds, groups, groups)]


# A few that together use everything, for gradients.
FEW = [
    Case("heads", "heads", 4, 4),
    Case("heads", None, None, None, "both", 1),
    Case(None, "heads", None, 2, "right", 2, True),
    Case("3d", "3d", 2, None, "left", 2, True),
    Case(None, "3d", 4, None, "both", 4, True),
    Case("3d", None, 1, 4, "right", 4),
    Case(None, None, 2, 2),
]


def case_id(case: Case) -> str:
    return "-".join("off" if part is None else str(part) for part in case)


@functools.cache
def case_inputs(case: Case, length: int = 7) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor | None], Tensor | None]:
    """(q, k, v), the learned parts, document ids; fp64, 4 heads, kernels 3 x 3 before and 2 x 3 after."""
    generator = torch.Generator().manual_seed(sum(map(ord, case_id(case))))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def kernel(kind: str | None, c_q: int, c_k: int) -> Tensor | None:
        return None if kind is None else random(*((4,) if kind == "heads" else (4, 2)), c_q, c_k)

    def matrix(group: int | None) -> Tensor | None:
        return None if group is None else random(4 // group, group, group)

    parts = {
        "kq_pre": kernel(case.kq_pre, 3, 3),
        "kq_post": kernel(case.kq_post, 2, 3),
        "head_pre": matrix(case.head_pre),
        "head_post": matrix(case.head_post),
    }
    ids = torch.tensor([[0] * 3 + [1] * (length - 3), [5] * 4 + [2] + [9] * (length - 5)]) if case.documents else None
    return (random(2, length, 4, 3), random(2, length, case.n_kv, 3), random(2, length, case.n_kv, 2)), parts, ids


@functools.cache
def expected_output(case: Case) -> Tensor:
    (q, k, v), parts, ids = case_inputs(case)
    return naive.multi_token_attention(q, k, v, **parts, document_ids=ids, pad_key=case.pad_key)


def forms_of(case: Case) -> list[str]:
    """The forms that can run this case."""
    return [form for form in FORMS if runs(form, Mixing(**case_inputs(case)[1]))]


FEW_IN_FORMS = [pytest.param(case, form, id=f"{case_id(case)}-{form}") for case in FEW for form in forms_of(case)]


def leaves_of(case: Case) -> tuple[list[str], list[Tensor]]:
    """Names and fresh leaves that require gradients, of every tensor in the case."""
    (q, k, v), parts, _ = case_inputs(case, 5)
    named = {"q": q, "k": k, "v": v, **{name: part for name, part in parts.items() if part is not None}}
    return list(named), [tensor.clone().requires_grad_() for tensor in named.values()]


@pytest.mark.parametrize("case", all_cases(), ids=case_id)
def test_multi_token_attention_equals_the_loops(case: Case) -> None:
    """Prevents any slip in orientation, padding, masks, order of steps, groups, GQA or document cuts, in every form."""
    (q, k, v), parts, ids = case_inputs(case)
    for form in forms_of(case):
        actual = multi_token_attention(q, k, v, **parts, document_ids=ids, pad_key=case.pad_key, backend=form)
        torch.testing.assert_close(
            actual, expected_output(case), rtol=0, atol=EXACT, msg=lambda text, form=form: f"{form}: {text}"
        )


@pytest.mark.parametrize(("case", "form"), FEW_IN_FORMS)
def test_multi_token_gradients_equal_the_loops(case: Case, form: str) -> None:
    """Prevents wrong gradients of any input or learned part: automatic differentiation of the loops is the oracle."""
    _, _, ids = case_inputs(case, 5)
    names, leaves = leaves_of(case)
    options = {"document_ids": ids, "pad_key": case.pad_key}

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        return torch.autograd.grad((out * weights).sum(), leaves)

    inputs = dict(zip(names, leaves, strict=True))
    expected = gradients(naive.multi_token_attention(**inputs, **options))
    actual = gradients(multi_token_attention(**inputs, **options, backend=form))
    for name, a, b in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize(("case", "form"), FEW_IN_FORMS)
def test_multi_token_gradcheck(case: Case, form: str) -> None:
    """Prevents gradients that agree with another implementation's but not with finite differences."""
    _, _, ids = case_inputs(case, 5)
    names, leaves = leaves_of(case)

    def run(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors, strict=True))
        return multi_token_attention(**inputs, document_ids=ids, pad_key=case.pad_key, backend=form)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pad_key", ["left", "right"])
def test_one_sided_kernels_may_be_even(pad_key: str, form: str) -> None:
    """Prevents a reach that is right for odd widths only."""
    (q, k, v), parts, _ = case_inputs(FEW[0])
    parts = {**parts, "kq_pre": parts["kq_pre"][..., :2], "kq_post": torch.randn(4, 1, 4, dtype=torch.float64)}  # type: ignore[index]
    expected = naive.multi_token_attention(q, k, v, **parts, pad_key=pad_key)
    actual = multi_token_attention(q, k, v, **parts, pad_key=pad_key, backend=form)
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_multi_token_scale(form: str) -> None:
    """Prevents a scale that is ignored or applied twice."""
    (q, k, v), parts, _ = case_inputs(FEW[0])
    expected = naive.multi_token_attention(q, k, v, **parts, scale=0.3)
    actual = multi_token_attention(q, k, v, **parts, scale=0.3, backend=form)
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT)


def module_of_the_paper(
    q: Tensor, k: Tensor, v: Tensor, kq_pre: Tensor, head_pre: Tensor, kq_post: Tensor, head_post: Tensor
) -> Tensor:
    """The whole version-2 op on [B, H, T, T] tensors: explicit masks and padding, grouped conv2d, einsum, softmax in fp64."""
    n_heads, length = q.shape[2], q.shape[1]
    k, v = (t.repeat_interleave(n_heads // t.shape[2], dim=2) for t in (k, v))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def convolved(maps: Tensor, kernel: Tensor) -> Tensor:
        c_q, c_k = kernel.shape[1:]
        return F.conv2d(F.pad(maps, (c_k // 2, c_k // 2, c_q - 1, 0)), kernel[:, None], groups=n_heads)

    def mixed(maps: Tensor, matrix: Tensor) -> Tensor:
        grouped = maps.unflatten(1, matrix.shape[:2])
        return torch.einsum("gop,bgpij->bgoij", matrix, grouped).flatten(1, 2)

    maps = torch.einsum("bihk,bjhk->bhij", q, k) / q.shape[-1] ** 0.5
    maps = mixed(convolved(maps.masked_fill(future, 0.0), kq_pre), head_pre)
    maps = maps.masked_fill(future, float("-inf")).softmax(-1)
    maps = mixed(convolved(maps, kq_post).masked_fill(future, 0.0), head_post)
    return torch.einsum("bhij,bjhv->bihv", maps, v)


def module_inputs(length: int, n_heads: int = 4, n_kv: int = 2, group: int = 4) -> dict[str, Tensor]:
    """q, k, v and the four learned parts at the paper's kernel size 6 x 11, near the identity, requiring gradients."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    named = {"q": random(2, length, n_heads, 8), "k": random(2, length, n_kv, 8), "v": random(2, length, n_kv, 8)}
    for name in ("kq_pre", "kq_post"):
        named[name] = 0.3 * random(n_heads, 6, 11)
        named[name][:, 5, 5] += 1
    for name in ("head_pre", "head_post"):
        named[name] = torch.eye(group, dtype=torch.float64) + 0.3 * random(n_heads // group, group, group)
    return {name: tensor.requires_grad_() for name, tensor in named.items()}


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16, torch.float64), (torch.bfloat16, torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_several_dtypes_are_promoted(form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Prevents forms that refuse what another takes, and one that rounds keys to the queries' dtype."""
    named = module_inputs(9)
    mixed = {name: named[name].detach().to(dtype).requires_grad_() for name, dtype in zip("qkv", dtypes, strict=True)}
    common = max(dtypes, key=lambda dtype: dtype.itemsize)
    whole = {name: x.detach().to(common).requires_grad_() for name, x in mixed.items()}
    parts = {name: x.detach() for name, x in named.items() if name not in mixed}
    out, expected = (multi_token_attention(**inputs, **parts, backend=form) for inputs in (mixed, whole))
    assert out.dtype == dtypes[0]
    assert torch.equal(out, expected.to(dtypes[0]))
    weights = torch.randn(out.shape).to(dtypes[0])
    pairs = (
        torch.autograd.grad((x * weights.to(x.dtype)).sum(), inputs.values()) for x, inputs in ((out, mixed), (expected, whole))
    )
    for (name, x), a, b in zip(mixed.items(), *pairs, strict=True):
        assert torch.equal(a, b.to(x.dtype)), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 45, 70])
def test_multi_token_equals_the_module_of_the_paper(length: int, form: str) -> None:
    """Prevents errors that tiny sizes hide: 6 x 11 kernels, blocks, beyond the diagonal band; outputs and every gradient."""
    named = module_inputs(length)
    expected = module_of_the_paper(**named)
    actual = multi_token_attention(**named, backend=form)
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    pairs = [torch.autograd.grad((out * weights).sum(), list(named.values())) for out in (actual, expected)]
    for name, a, b in zip(named, *pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_pre_convolution_is_a_wider_product_away_from_the_band() -> None:
    """Prevents a changed diagonal band: for i - j > h + c_q - 2 the logit is sum_a q_{i-a} . (theta_a * k)_j, nearer it is not.

    The logits are read off the op's weights (values are unit vectors) as log ratios inside a row.
    """
    length, c_q, c_k = 24, 3, 5
    h, generator = c_k // 2, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, 1, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    theta = torch.randn(1, c_q, c_k, generator=generator, dtype=torch.float64)
    weights = multi_token_attention(q, k, torch.eye(length, dtype=torch.float64)[None, :, None], kq_pre=theta)[0, :, 0]

    padded = F.pad(k[0, :, 0], (0, 0, h, h))
    wide = torch.zeros(length, length, dtype=torch.float64)
    for a in range(c_q):
        keys = sum(theta[0, c_q - 1 - a, c] * padded[c : c + length] for c in range(c_k))
        queries = F.pad(q[0, :, 0], (0, 0, a, 0))[:length]
        wide += queries @ keys.T / 2  # sqrt(K) = 2
    row = length - 1
    first_band_key = row - (h + c_q - 2)
    gap = (weights[row].log() - weights[row, 0].log()) - (wide[row] - wide[row, 0])
    assert gap[:first_band_key].abs().max() < EXACT
    assert (gap[first_band_key:].abs() > 1e-6).any()


@pytest.mark.parametrize(("pre", "post", "reach"), [(True, True, 10), (True, False, 5), (False, True, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_the_last_row_depends_on_exactly_the_last_queries(pre: bool, post: bool, reach: int, form: str) -> None:
    """Prevents a decode state that is too small, or larger than needed: 1 + (c_q - 1) queries per convolution used."""
    named = module_inputs(20)
    parts = {"kq_pre": named["kq_pre"] if pre else None, "kq_post": named["kq_post"] if post else None}
    out = multi_token_attention(named["q"], named["k"], named["v"], **parts, backend=form)
    (grad,) = torch.autograd.grad(out[:, -1].square().sum(), named["q"])
    per_query = grad.abs().amax(dim=(0, 2, 3))
    assert (per_query[20 - 1 - reach :] > 0).all()
    assert (per_query[: 20 - 1 - reach] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_identity_kernels_give_softmax_attention(form: str) -> None:
    """Prevents an initialisation that is not the plain Transformer."""
    named = module_inputs(19)
    q, k, v = named["q"], named["k"], named["v"]
    delta = torch.zeros(4, 6, 11, dtype=torch.float64)
    delta[:, 5, 5] = 1
    eye = torch.eye(4, dtype=torch.float64)[None]
    actual = multi_token_attention(q, k, v, kq_pre=delta, head_pre=eye, kq_post=delta, head_post=eye, backend=form)
    torch.testing.assert_close(actual, softmax_attention(q, k, v), rtol=0, atol=EXACT)
    torch.testing.assert_close(multi_token_attention(q, k, v, backend=form), softmax_attention(q, k, v), rtol=0, atol=EXACT)


@pytest.mark.parametrize("form", ["materialized", "blocked"])
def test_the_3d_form_contains_the_separable_one(form: str) -> None:
    """Prevents a head index mix-up: kernel [o, p] = matrix[o, p] * kernel[p] is convolution, then head mixing."""
    named = module_inputs(15)
    merged = {}
    for side in ("pre", "post"):
        # Head o = 2g + r of the group reads input p: matrix[g, r, p] times the kernel of head 2g + p.
        matrix, kernel = torch.randn(2, 2, 2, dtype=torch.float64), named[f"kq_{side}"].detach()
        named[f"head_{side}"] = matrix
        merged[f"kq_{side}"] = torch.einsum("grp,gpac->grpac", matrix, kernel.view(2, 2, 6, 11)).flatten(0, 1)
    qkv = {name: named[name] for name in "qkv"}
    separable = multi_token_attention(**named, backend="materialized")
    torch.testing.assert_close(multi_token_attention(**qkv, **merged, backend=form), separable, rtol=0, atol=EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_each_document_alone(form: str) -> None:
    """Prevents attention or convolution across a document boundary, outputs and gradients."""
    named = module_inputs(30)
    cuts = [0, 4, 5, 17, 30]
    ids = torch.cat([torch.full((stop - start,), 3 * n) for n, (start, stop) in enumerate(itertools.pairwise(cuts))])
    packed = multi_token_attention(**named, document_ids=ids.expand(2, -1), backend=form)
    parts = {name: tensor for name, tensor in named.items() if name not in "qkv"}
    alone = torch.cat(
        [
            module_of_the_paper(*(named[name][:, start:stop] for name in "qkv"), **parts)
            for start, stop in itertools.pairwise(cuts)
        ],
        dim=1,
    )
    torch.testing.assert_close(packed, alone, rtol=0, atol=EXACT)
    pairs = [torch.autograd.grad(out.sin().sum(), list(named.values())) for out in (packed, alone)]
    for name, a, b in zip(named, *pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")
