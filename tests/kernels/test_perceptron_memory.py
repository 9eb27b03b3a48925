"""The compiled recurrence of a perceptron memory against the token loop, however pieces, chunks, documents and padding cut it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.kernels import compile as building
from recollect.kernels.memory import can_run
from recollect.ops.miras import MirasSpec, MirasState, Parameters, Retention, scan
from recollect.ops.miras.biases import AttentionalBias, huber, l1, l2, l_infinity, lp, pseudo_huber, value_shift
from recollect.ops.miras.memories import mlp
from recollect.ops.miras.retentions import elastic_net, kl, logit, lq
from recollect.ops.miras.retentions import l2 as decay
from recollect.ops.miras.rules import LearningRule, gd, momentum

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C compiler on this machine")

EXACT = 1e-12
N_ROWS, N_HEADS, SIZE = 2, 2, 16


class Model(NamedTuple):
    """What the kernel is compiled for; steps: the largest eta, such that the memory leaves its first weights.

    Tolerance: Memora's plain form, its oracle, moves by 1.2e-12 with the last bits of its inputs (the kernel by a tenth of that);
    the loop of lp of 3 and 4 by up to 5.0e-12 and 1.9e-12 in 24 draws, that of lp of 1, a thousand times steeper at 0 than elsewhere,
    by 3.1e-11.
    """

    bias: AttentionalBias
    retention: Retention = decay()
    steps: float = 0.1
    tolerance: float = EXACT
    rule: LearningRule = gd()  # with momentum, gates are per head


MODELS = {
    "l2": Model(l2()),
    "lp3": Model(lp(3.0), tolerance=1.9e-12),
    "huber": Model(huber()),
    "huber of the norm": Model(huber("norm")),
    "l1": Model(l1()),
    "lp1": Model(lp(1.0), tolerance=3.1e-11),
    "lp2": Model(lp(2.0)),
    "lp4": Model(lp(4.0), tolerance=1.9e-12),
    "l_infinity": Model(l_infinity()),
    "pseudo_huber": Model(pseudo_huber()),
    "value_shift": Model(value_shift()),
    "elastic net": Model(huber(), elastic_net(0.001)),
    "elastic net, momentum": Model(huber(), elastic_net(0.001), rule=momentum()),
    "moneta": Model(lp(3.0), lq(4.0), 0.3),
    "moneta, 2": Model(lp(3.0), lq(2.0), 0.3),
    "moneta, 3": Model(lp(3.0), lq(3.0), 0.3),
    "moneta, 5 of a radius": Model(lp(2.8), lq(5.0, radius=1.5), 0.3),
    "moneta of the paper": Model(lp(3.0), lq(3.0, "paper"), 0.3),
    "memora": Model(l2(), kl(), tolerance=3e-12),
    "titans": Model(l2(), rule=momentum()),
    "titans, huber": Model(huber(), rule=momentum()),
}
PROCESSORS = ("native", "x86-64-v3", "x86-64")  # vectors of the widest kind here, of 32 and of 16 bytes


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels compiled for this kind of processor."""
    if request.param != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86-64 processor")
    if request.param == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("a processor without AVX2")
    flags = tuple(f"-march={request.param}" if flag == "-march=native" else flag for flag in building.FLAGS)
    monkeypatch.setattr(building, "FLAGS", flags)
    building.memory.cache_clear()
    yield request.param
    building.memory.cache_clear()


def draw(
    length: int, model: str = "l2", *, channels: bool, dtype: torch.dtype = torch.float64, strongest: float = 0.1
) -> dict[str, Tensor]:
    """Everything that a gradient is taken of; numbers do not depend on the precision."""
    kind = MODELS[model]
    steps, channels = kind.steps, channels and not kind.rule.momentum
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    tokens, width = (N_ROWS, length, N_HEADS), SIZE if channels else 1
    named = {name: F.normalize(normal(*tokens, SIZE), dim=-1) for name in ("q", "k")}
    named |= {
        "v": normal(*tokens, SIZE),
        "eta": steps * uniform(*tokens, width),
        "log_alpha": -strongest * uniform(*tokens, width),
    }
    named["delta"] = 0.1 + uniform(*tokens, width)
    memory = mlp().init(N_HEADS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    named |= {"first": memory.fast[0], "last": memory.fast[1]}
    named |= {"scale": 1 + normal(N_HEADS, SIZE) / 10, "shift": normal(N_HEADS, SIZE) / 10}
    named["log_momentum"] = -2 * uniform(*tokens)
    return {name: part.to(dtype).requires_grad_() for name, part in named.items()}


def flags(length: int) -> tuple[Tensor, Tensor]:
    """Documents that start inside pieces and chunks, and padding anywhere; the second row starts with padding."""
    generator = torch.Generator().manual_seed(0)
    reset, valid = (torch.rand(N_ROWS, length, generator=generator) < share for share in (0.1, 0.8))
    valid[1, :3] = False
    return reset, valid


def run(
    named: dict[str, Tensor],
    chunk: int,
    model: str,
    backend: str,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    cuts: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """y and the last states, of one call or cut into several."""
    kind = MODELS[model]
    spec = MirasSpec(memory=mlp(), bias=kind.bias, retention=kind.retention, rule=kind.rule, chunk_size=chunk)
    parameters = Parameters((named["first"], named["last"]), (named["scale"], named["shift"]))
    state, outputs = None, []
    for low, high in zip((0, *cuts), (*cuts, named["q"].shape[1]), strict=True):
        q, k, v = (named[name][:, low:high] for name in ("q", "k", "v"))
        gates = {
            name: named[name][:, low:high]
            for name in ("eta", "log_alpha", *kind.bias.gates, *(["log_momentum"] * kind.rule.momentum))
        }
        marks = {name: None if x is None else x[:, low:high] for name, x in (("reset", reset), ("valid", valid))}
        y, state = scan(spec, q, k, v, gates, state, parameters=parameters, backend=backend, **marks)
        outputs.append(y)
    assert isinstance(state, MirasState)
    assert state.anchor is not None
    held = {"state": state.dual, "anchor": state.anchor, "kept": state.kept or (), "momentum": state.momentum or ()}
    return {"y": torch.cat(outputs, dim=1)} | {f"{name} {m}": x for name, pair in held.items() for m, x in enumerate(pair)}


def oracle(named: dict[str, Tensor], chunk: int, model: str, *flags: Tensor | None) -> dict[str, Tensor]:
    """The token loop, in one call; for Memora the plain chunks: the loop adds what the norm takes away, and loses a digit with it."""
    return run(named, chunk, model, "chunked" if model == "memora" else "sequential", *flags)


def compiled(
    named: dict[str, Tensor], chunk: int, model: str, *flags: Tensor | None, cuts: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """The kernel."""
    return run(named, chunk, model, "native", *flags, cuts=cuts)


def with_gradients(outputs: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a weighted sum of them all; zeros where nothing depends on an input."""
    total = sum((torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) * x).sum() for x in outputs.values())
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return {**outputs, **dict(zip(named, gradients, strict=True))}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    """Relative to the largest entry where that is above 1."""
    for name, value in expected.items():
        error = float(((actual[name] - value).abs().max() / value.abs().max().clamp(min=1)).detach())
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (50, 16), (40, 5), (90, 64), (150, 100)])
def test_compiled_memory_equals_the_token_loop(length: int, chunk: int, model: str) -> None:
    """Prevents a gradient point, a decay or a second-order term that is lost between pieces, chunks or segments."""
    named = draw(length, model, channels=length % 20 == 10)
    actual, expected = (with_gradients(form(named, chunk, model), named) for form in (compiled, oracle))
    assert_close(actual, expected, MODELS[model].tolerance)
    if model.startswith("elastic net") and length > chunk:
        assert 0.01 < float((expected["anchor 0"] == 0).double().mean()) < 0.99


@pytest.mark.parametrize("model", ["l2", "elastic net", "elastic net, momentum", "moneta", "memora", "titans"])
@pytest.mark.parametrize(("chunk", "cuts"), [(16, ()), (16, (21,)), (64, (1, 37)), (100, (70,))])
def test_compiled_memory_keeps_documents_padding_and_cuts_apart(chunk: int, cuts: tuple[int, ...], model: str) -> None:
    """Prevents a document that sees the one before it, padding that moves the chunks, and states that do not go on."""
    named = draw(80, model, channels=True)
    marks = flags(80)
    actual = with_gradients(compiled(named, chunk, model, *marks, cuts=cuts), named)
    assert_close(actual, with_gradients(oracle(named, chunk, model, *marks), named), MODELS[model].tolerance)


@pytest.mark.parametrize("cuts", [(29,), (1, 17, 70, 71)])
def test_scaled_memory_goes_on_in_the_middle_of_a_chunk(cuts: tuple[int, ...]) -> None:
    """Prevents a scale, or its gradient, that is lost with the open chunk, once the memory has outgrown its radius."""
    named = draw(90, "moneta", channels=True)
    expected, plain = oracle(named, 64, "moneta"), oracle(named, 64, "lp3")
    assert_close(with_gradients(compiled(named, 64, "moneta", cuts=cuts), named), with_gradients(expected, named))
    assert float((expected["y"] - plain["y"])[:, 64:].detach().abs().max()) > 0.1


@pytest.mark.parametrize("model", ["l2", "moneta", "memora", "titans"])
def test_compiled_memory_survives_any_decay(model: str) -> None:
    """Prevents overflow or 0/0 where a gate forgets everything: log alpha down to -1e4, forward and backward.

    The norm divides by a memory that is nearly empty: with the last bits of its inputs Memora's token loop moves by 2e-11 to 7e-11
    here, which the kernel may too.
    """
    named = draw(60, model, channels=True, strongest=3.0)
    with torch.no_grad():
        named["log_alpha"][:, 7] = -1e4
    actual, expected = (with_gradients(form(named, 20, model), named) for form in (compiled, oracle))
    assert_close(actual, expected, 7e-11 if model == "memora" else 1e-11)


@pytest.mark.parametrize(
    ("chunk", "model"),
    [
        *((16, "l2"), (64, "l2"), (16, "moneta"), (64, "memora"), (16, "titans"), (64, "titans")),
        *((16, model) for model in ("l_infinity", "pseudo_huber", "value_shift", "moneta, 5 of a radius")),
    ],
)
def test_compiled_memory_in_single_precision_is_as_exact_as_the_token_loop(chunk: int, model: str, processor: str) -> None:
    """Prevents vector code of one width, or its exponential, that is less exact: mean error of eight draws, each result and gradient.

    One draw's rounding is amplified by what the memory has become; the mean says what the arithmetic loses.
    """
    errors: dict[str, list[float]] = {}
    for length in range(60, 76, 2):
        exact, *single = (
            with_gradients(form(named := draw(length, model, channels=True, dtype=dtype), chunk, model), named)
            for form, dtype in ((oracle, torch.float64), (compiled, torch.float32), (oracle, torch.float32))
        )
        for name, value in exact.items():
            pair = errors.setdefault(name, [0.0, 0.0])
            for n, results in enumerate(single):
                pair[n] += float((results[name] - value).detach().norm() / value.detach().norm().clamp(min=1e-30))
    for name, (actual, plain) in errors.items():
        assert actual <= 2 * plain, f"{name}: {actual / 8:.1e}, the loop {plain / 8:.1e}"


def test_an_elastic_net_hides_no_nan() -> None:
    """Prevents entries that are no number from passing for small ones, which a full chunk leaves at zero."""
    named = {name: part.detach() for name, part in draw(40, "elastic net", channels=False).items()}
    named["v"][0, 3] = float("nan")
    found = compiled(named, 16, "elastic net")
    for name in ("y", "state 0", "state 1", "anchor 0", "anchor 1"):
        assert found[name][0].isnan().any(), name


@pytest.mark.parametrize("model", ["l2", "titans"])
def test_roundings_of_decays_do_not_add_up(model: str) -> None:
    """Prevents a decay over a piece that is a product: rounded alike at every token, it drifts, here 4 times as far."""
    single = {name: part.detach() for name, part in draw(1000, model, channels=False, dtype=torch.float32).items()}
    for name, value in (("log_alpha", -0.001), ("log_momentum", -0.001), ("eta", 1e-4)):
        single[name].fill_(value)
    exact = run({name: part.double() for name, part in single.items()}, 16, model, "chunked")["state 0"]
    errors = [float((run(single, 16, model, backend)["state 0"] - exact).norm()) for backend in ("native", "chunked")]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("model", ["huber", "l_infinity", "moneta", "moneta, 3", "memora", "titans, huber"])
def test_compiled_memory_is_exact_on_every_processor(model: str, processor: str) -> None:
    """Prevents products that assume one width of vectors."""
    named = draw(50, model, channels=True)
    marks = flags(50)
    actual, expected = (with_gradients(form(named, 40, model, *marks), named) for form in (compiled, oracle))
    assert_close(actual, expected, MODELS[model].tolerance)


@pytest.mark.parametrize("chunk", [16, 64])
def test_compiled_memory_is_causal_and_rows_are_apart(chunk: int) -> None:
    """Prevents a token that changes a bit of an earlier one, or of another row of the batch."""
    named = {name: part.detach() for name, part in draw(60, channels=True, dtype=torch.float32).items()}
    before = compiled(named, chunk, "l2")["y"]
    for name in ("q", "k", "v", "eta"):
        named[name] = named[name].clone()
        named[name][0, 29:] *= 3
    after = compiled(named, chunk, "l2")["y"]
    assert torch.equal(before[0, :29], after[0, :29])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 29], after[0, 29])


def test_can_run_refuses_what_the_kernel_has_no_code_for() -> None:
    """Prevents wrong results or a crash where the plain form has to be used."""
    q = torch.zeros(1, 1, 1, 16)
    assert can_run(q, 64, "l2")
    assert not can_run(q.half(), 64, "l2")
    assert not can_run(torch.zeros(1, 1, 1, 24), 96, "l2")
    assert not can_run(q, 64, "switch")
    assert not can_run(q, 64, "l2", "simplex", "momentum")
    assert not can_run(q, 64, "l2", "identity", "omega")


@pytest.mark.parametrize("retention", [lq(4.0, "ftrl"), logit(), kl(2.0)])
def test_native_refuses_links_that_it_has_no_code_for(retention: Retention) -> None:
    """Prevents a scale that is computed with another exponent or radius than the spec's."""
    named = draw(4, channels=True)
    spec = MirasSpec(memory=mlp(), bias=l2(), retention=retention, rule=gd(), chunk_size=16)
    parameters = Parameters((named["first"], named["last"]), (named["scale"], named["shift"]))
    with pytest.raises(RuntimeError, match="native"):
        scan(spec, named["q"], named["k"], named["v"], {}, parameters=parameters, backend="native")


def test_native_refuses_momentum_with_gates_per_channel() -> None:
    """Prevents a kernel that takes the first channel for all."""
    named = draw(4, channels=True)
    spec = MirasSpec(memory=mlp(), bias=l2(), retention=decay(), rule=momentum(), chunk_size=16)
    parameters = Parameters((named["first"], named["last"]), (named["scale"], named["shift"]))
    gates = {"eta": named["eta"], "log_alpha": named["log_alpha"]}
    with pytest.raises(RuntimeError, match="native"):
        scan(spec, named["q"], named["k"], named["v"], gates, parameters=parameters, backend="native")
