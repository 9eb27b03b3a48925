"""Multi-Token Attention inside torch.compile: one graph, with outputs and gradients of the call outside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.kernels.compile import compiler
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.ops import Mixing, Rows, multi_token_attention, multi_token_rows
from recollect.ops.multi_token import BACKENDS, choose, document_starts
from tests.ops.test_multi_token import EXACT, FORMS, module_inputs

OPTIONS = {
    "whole": {},
    "documents": {"document_ids": torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])},
    "dropout": {"dropout_p": 0.3, "seed": 5},
}
PARTS = {
    "all": Mixing._fields,
    "convolution before": ("kq_pre",),
    "convolution after, heads before": ("head_pre", "kq_post"),
}


def with_parts(named: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The inputs with some of the learned parts."""
    return {name: x for name, x in named.items() if name in ("q", "k", "v", *parts)}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """No test meets what another one compiled."""
    torch._dynamo.reset()


def assert_one_graph(run, named: dict[str, Tensor]) -> None:
    """As one graph: the same outputs and gradients of all inputs."""
    compiled, results = torch.compile(run, fullgraph=True, backend="aot_eager"), []
    for form in (compiled, run):
        outputs = form(**named)
        total = sum((x.sin().sum() for x in outputs), torch.zeros(()))
        results.append([*outputs, *torch.autograd.grad(total, list(named.values()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("option", "parts"), [*((option, "all") for option in OPTIONS), *(("whole", parts) for parts in PARTS)][1:]
)
@pytest.mark.parametrize("form", [None, "blocked"])
def test_it_compiles_as_one_graph(form: str | None, option: str, parts: str) -> None:
    """Prevents a default form that torch.compile cannot trace, and fake outputs of another shape or layout."""

    def run(**named: Tensor) -> list[Tensor]:
        return [multi_token_attention(**named, **OPTIONS[option], backend=form)]  # type: ignore[arg-type]

    assert_one_graph(run, with_parts(module_inputs(11), PARTS[parts]))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "materialized"])
def test_carried_rows_compile_as_one_graph(form: str) -> None:
    """Prevents truncated back-propagation through carried rows from breaking the graph or losing their gradients."""

    def run(q: Tensor, k: Tensor, v: Tensor, **parts: Tensor) -> list[Tensor]:
        mixing = Mixing(**parts)
        first, rows = multi_token_rows(q[:, :9], k[:, :9], v[:, :9], mixing, Rows(), backend=form)
        second, rows = multi_token_rows(q[:, 9:], k, v, mixing, rows, backend=form)
        assert rows.raw is not None
        assert rows.weights is not None
        return [first, second, rows.raw, rows.weights]

    assert_one_graph(run, module_inputs(13))


def test_kernels_of_another_shape_compile_again() -> None:
    """Prevents a choice of form that was made for one shape of the kernels from being kept for another."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q: Tensor, kernel: Tensor) -> Tensor:
        return multi_token_attention(q, q, q, kq_pre=kernel)

    q = module_inputs(6)["q"].detach()
    for shape in ((4, 2, 3), (4, 3, 5), (4, 1, 7), (4, 4, 35)):
        kernel = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(run(q, kernel), multi_token_attention(q, q, q, kq_pre=kernel), rtol=0, atol=EXACT)


@pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
def test_the_form_is_the_same_inside_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a compiled model that runs slower than the same model not compiled."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q = torch.zeros(1, 12, 4, 8)
    assert choose(q, q, Mixing(kq_pre=torch.zeros(4, 2, 3))) is BACKENDS["native"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "materialized"])
def test_operators_keep_the_rules_of_pytorch(form: str) -> None:
    """Prevents a fake form that lies, an output that is a view of an input, a gradient that is not registered."""
    named = module_inputs(6)
    names = {"blocked": "multi_token_blocks", "native": "multi_token_native"}
    rows = torch.zeros(2, 4, 5, 6, dtype=torch.float64)
    start = document_starts(torch.tensor([[0, 0, 1, 1, 1, 1]] * 2))
    inputs = (*(named[name] for name in ("q", "k", "v", *Mixing._fields)), start, rows, rows.clone(), None)
    torch.library.opcheck(getattr(torch.ops.recollect, names[form]).default, (*inputs, 0.5, "both", 0.0, 0, 4))


def test_a_model_compiles_as_one_graph() -> None:
    """Prevents `training.compile` from failing on Multi-Token Attention alone: loss and every parameter's gradient."""
    config = RecollectConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, layers="mta")
    model, tokens = RecollectForCausalLM(config), torch.randint(0, 63, (1, 20))

    def loss(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    results = []
    for form in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        model.zero_grad()
        value = form(tokens)
        value.backward()
        results.append([value, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[1]) == 1 + len(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
