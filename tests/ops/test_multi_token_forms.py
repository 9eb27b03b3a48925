"""The forms of Multi-Token Attention: blocks, carried rows, dropout, dtypes, memory, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from recollect.kernels.compile import compiler
from recollect.ops import Mixing, Rows, multi_token_attention, multi_token_rows
from recollect.ops.multi_token import BACKENDS, Settings, blocked, choose, document_starts
from tests.ops.test_multi_token import EXACT, FORMS, module_inputs, module_of_the_paper


def split(named: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], Mixing]:
    """((q, k, v), the learned parts) of `module_inputs`."""
    return (named["q"], named["k"], named["v"]), Mixing(**{part: named[part] for part in Mixing._fields})


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 16, 23, 100])
def test_blocks_of_any_size_equal_the_oracle(block: int, documents: bool) -> None:
    """Prevents a halo that is too short, or a last block that is cut wrong: outputs, every gradient and the rows carried on."""
    named = module_inputs(23)
    (q, k, v), mixing = split(named)
    start = document_starts(torch.tensor([[0] * 6 + [1] * 17, [0] * 15 + [1] * 8])) if documents else None
    settings = Settings(0.4, "both")
    zero = torch.zeros(2, 4, 5, 23, dtype=torch.float64)
    results = []
    for run in (BACKENDS["materialized"], lambda *inputs: blocked(*inputs, block=block)):
        out, rows = run(q, k, v, mixing, settings, start, Rows(zero, zero))
        assert rows.raw is not None
        assert rows.weights is not None
        total = out.sin().sum() + rows.raw.cos().sum() + rows.weights.sin().sum()
        results.append([out, *rows, *torch.autograd.grad(total, list(named.values()))])
    for name, a, b in zip(("out", *Rows._fields, *named), *reversed(results), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, 3, 9])
def test_sliding_windows_equal_the_oracle(window: int, form: str) -> None:
    """Prevents first keys that move with every query from being taken for documents: outputs and every gradient."""
    named = module_inputs(29)
    start = (torch.arange(29) - window + 1).clamp(min=0).expand(2, -1)
    results = []
    for name in (form, "materialized"):
        out = multi_token_attention(**named, start=start, backend=name)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(named.values()))])
    for name, a, b in zip(("out", *named), *results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [[9], [1, 2, 12], list(range(1, 21))], ids=["two", "four", "token-by-token"])
def test_carried_rows_equal_one_call(cuts: list[int], form: str) -> None:
    """Prevents a decoder whose earlier rows, keys or gradients are lost at the border."""
    named = module_inputs(21)
    (q, k, v), mixing = split(named)
    pieces, rows, edges = [], Rows(), [0, *cuts, 21]
    for start, stop in itertools.pairwise(edges):
        out, rows = multi_token_rows(q[:, start:stop], k[:, :stop], v[:, :stop], mixing, rows, backend=form)
        assert rows.raw is not None
        assert rows.weights is not None
        assert rows.raw.shape == rows.weights.shape == (2, 4, 5, stop)
        pieces.append(out)
    whole = module_of_the_paper(**named)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=EXACT)
    pairs = [torch.autograd.grad(out.sin().sum(), list(named.values())) for out in (torch.cat(pieces, dim=1), whole)]
    for name, a, b in zip(named, *pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("form", FORMS)
def test_rows_hold_only_what_is_used(form: str) -> None:
    """Prevents a decode state that is larger than mta.md's count: no rows for a convolution that is off."""
    (q, k, v), mixing = split(module_inputs(8))
    _, rows = multi_token_rows(q, k, v, mixing._replace(kq_post=None), Rows(), backend=form)
    assert rows.weights is None
    assert rows.raw is not None
    _, rows = multi_token_rows(q, k, v, Mixing(head_pre=mixing.head_pre), Rows(), backend=form)
    assert rows == Rows(None, None)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_changes_none_of_its_inputs(form: str) -> None:
    """Prevents in-place work on tensors that belong to the caller, carried rows included."""
    (q, k, v), mixing = split({name: tensor.detach() for name, tensor in module_inputs(12).items()})
    _, rows = multi_token_rows(q[:, :7], k[:, :7], v[:, :7], mixing, Rows(), backend=form)
    inputs = [t for t in (q, k, v, *mixing, *rows) if t is not None]
    kept = [t.clone() for t in inputs]
    multi_token_rows(q[:, 7:], k, v, mixing, rows, backend=form)
    for tensor, copy in zip(inputs, kept, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
def test_the_native_form_is_the_default_and_refuses_merged_kernels() -> None:
    """Prevents a compiled form that is never used, or that takes what it cannot compute."""
    (q, k, v), mixing = split(module_inputs(4))
    assert choose(q, q, mixing) is BACKENDS["native"]
    merged = torch.zeros(4, 2, 3, 3, dtype=torch.float64)
    assert choose(q, q, Mixing(kq_pre=merged)) is BACKENDS["blocked"]
    with pytest.raises(RuntimeError, match=r"'native' cannot run .*pass backend='blocked'"):
        multi_token_attention(q, k, v, kq_pre=merged, backend="native")


# --- dropout ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_a_function_of_its_seed(form: str) -> None:
    """Prevents dropout that cannot be reproduced, or that ignores its seed; without a seed the global generator decides."""
    (q, k, v), mixing = split(module_inputs(40))

    def run(seed: int | None) -> Tensor:
        return multi_token_attention(q, k, v, **mixing._asdict(), dropout_p=0.3, seed=seed, backend=form)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    first, second = run(None), run(None)
    torch.manual_seed(5)
    assert torch.equal(run(None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "materialized"])
def test_dropout_masks_agree_between_forms(form: str) -> None:
    """Prevents a backward pass that recomputes with another mask than the forward pass used."""
    named = module_inputs(40)
    (q, k, v), mixing = split(named)
    results = []
    for backend in ("materialized", form):
        out = multi_token_attention(q, k, v, **mixing._asdict(), dropout_p=0.3, seed=11, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(named.values()))])
    for name, a, b in zip(("out", *named), *results, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("block", [1, 7, 33])
def test_dropout_does_not_depend_on_the_block_size(block: int) -> None:
    """Prevents a model that trains differently on a machine with other memory."""
    (q, k, v), mixing = split(module_inputs(40))
    settings, zero = Settings(0.4, "both", 0.3, 17), torch.zeros(2, 4, 5, 40, dtype=torch.float64)
    expected, _ = BACKENDS["materialized"](q, k, v, mixing, settings, None, Rows(zero, zero))
    actual, _ = blocked(q, k, v, mixing, settings, None, Rows(zero, zero), block=block)
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_keeps_the_mean(form: str) -> None:
    """Prevents a missing 1 / (1 - p): the mean over 400 seeds is the output without dropout, within 5 standard errors."""
    (q, k, v), mixing = split({name: tensor.detach() for name, tensor in module_inputs(6).items()})
    runs = torch.stack(
        [multi_token_attention(q, k, v, **mixing._asdict(), dropout_p=0.25, seed=100 * s, backend=form) for s in range(400)]
    )
    plain = multi_token_attention(q, k, v, **mixing._asdict(), backend=form)
    errors = (runs.mean(0) - plain).abs() / (runs.std(0) / 20 + 1e-12)
    assert errors.max() < 5
    dropped = multi_token_attention(*(t[:, :1] for t in (q, k, v)), dropout_p=0.25, seed=0, backend=form)
    ratio = dropped / multi_token_attention(*(t[:, :1] for t in (q, k, v)), backend=form)
    assert torch.isclose(ratio[..., None], torch.tensor([0.0, 4 / 3], dtype=torch.float64)).any(-1).all()


# --- dtypes, memory, errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form != "materialized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_at_most_twice_the_oracles(dtype: torch.dtype, form: str) -> None:
    """Prevents a fast form that is less exact than the plain one: against fp64, outputs and every gradient."""
    exact = module_inputs(60)
    low = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in exact.items()}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in low.items()}
    weights = torch.randn(2, 60, 4, 8, dtype=torch.float64)

    def run(named: dict[str, Tensor], backend: str) -> list[Tensor]:
        out = multi_token_attention(**named, backend=backend)
        assert out.dtype == named["q"].dtype
        grads = torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(named.values()))
        return [t.double() for t in (out, *grads)]

    reference, plain, fast = run(exact, "materialized"), run(low, "materialized"), run(low, form)
    for name, right, slow, quick in zip(("out", *exact), reference, plain, fast, strict=True):
        floor = torch.finfo(dtype).eps * right.abs().max()
        assert (quick - right).abs().max() <= 2 * (slow - right).abs().max() + floor, name


@pytest.mark.parametrize("form", [form for form in FORMS if form != "materialized"])
def test_training_memory_grows_linearly(form: str) -> None:
    """Prevents a T x T tensor kept for the backward pass: bytes saved at 4 T are at most 4.5 times those at T."""

    def saved_bytes(length: int) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            multi_token_attention(**module_inputs(length), backend=form)
        return total

    assert saved_bytes(128) <= 4.5 * saved_bytes(32)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_right_or_refused(form: str) -> None:
    """Prevents a hand-written backward pass from giving silent zeros where a gradient penalty needs second derivatives."""
    named = module_inputs(5)
    out = multi_token_attention(**named, backend=form)
    (grad,) = torch.autograd.grad(out.sin().sum(), named["q"], create_graph=True)
    if form != "materialized":
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()
        return
    (second,) = torch.autograd.grad(grad.square().sum(), named["k"])
    expected_out = module_of_the_paper(**named)
    (grad,) = torch.autograd.grad(expected_out.sin().sum(), named["q"], create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), named["k"])
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)


def bad_calls() -> list[tuple[dict[str, object], str]]:
    """(what to change in a good call, what the message must say)."""
    x = torch.zeros
    return [
        ({"k": x(1, 6, 2, 5)}, "key dim.*K=4.*K=5"),
        ({"v": x(1, 5, 2, 4)}, "share the batch.*length and heads"),
        ({"q": x(6, 4, 4)}, r"q, k, v are \[B, T, H, K\]"),
        ({"k": x(1, 6, 3, 4), "v": x(1, 6, 3, 4)}, "must divide query heads: 4 query heads, 3"),
        ({"q": x(1, 7, 4, 4)}, "T=7 exceeds S=6"),
        ({"kq_pre": x(2, 3, 3)}, r"kq_pre .*H=4; got \(2, 3, 3\)"),
        ({"kq_post": x(4, 3, 4)}, "kq_post: .*c_k must be odd; got 4"),
        ({"kq_pre": x(4, 3, 3, 3)}, "c_h=3 heads do not divide H=4"),
        ({"head_pre": x(4, 4)}, r"head_pre is \[G, c_h, c_h\]"),
        ({"head_post": x(3, 2, 2)}, r"head_post .*H = 4; got \(3, 2, 2\)"),
        ({"pad_key": "middle"}, "pad_key is 'both', 'left' or 'right'; got 'middle'"),
        ({"backend": "fastest"}, "unknown backend 'fastest'; known: .*blocked"),
        ({"dropout_p": 1.0}, r"dropout_p lies in \[0, 1\); got 1.0"),
        ({"document_ids": x(1, 6).long(), "start": x(1, 6).long()}, "document_ids or start, not both"),
    ]


@pytest.mark.parametrize(("change", "message"), bad_calls(), ids=[message[:24] for _, message in bad_calls()])
def test_bad_inputs_are_named(change: dict[str, object], message: str) -> None:
    """Prevents shape errors from surfacing deep inside, or worse, from broadcasting."""
    good = {"q": torch.zeros(1, 6, 4, 4), "k": torch.zeros(1, 6, 2, 4), "v": torch.zeros(1, 6, 2, 4)}
    with pytest.raises(ValueError, match=message):
        multi_token_attention(**{**good, **change})  # type: ignore[arg-type]


def test_carried_rows_of_another_kernel_are_refused() -> None:
    """Prevents a state of another model from being read as this one's."""
    (q, k, v), mixing = split(module_inputs(6))
    with pytest.raises(ValueError, match=r"carried rows .* do not fit c_q=6"):
        multi_token_rows(q[:, 4:], k, v, mixing, Rows(torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 3, 4)))
