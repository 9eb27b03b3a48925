"""The adapter to flash-linear-attention, with token loops of its own conventions in the place of that package, against our loops."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.kernels import describe_recurrences, fla
from recollect.ops import tiles
from recollect.ops.linear_scan import delta_rule_scan, delta_scan, gated_linear_scan, slot_scan
from recollect.ops.miras import presets, scan
from tests.laws import assert_near

EXACT = 1e-12
B, T, H, K, V = 2, 6, 2, 4, 6
DECAYS = {"no decay": None, "per head": (), "per key": (K,), "per value": (V,)}
SCANS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "linear": gated_linear_scan,
    "rule": delta_rule_scan,
    "delta": delta_scan,
}
CHOSEN = {
    ("linear", "no decay"): "chunk_simple_gla",
    ("linear", "per head"): "chunk_simple_gla",
    ("linear", "per key"): "chunk_gla",
    ("rule", "no decay"): "chunk_delta_rule",
    ("rule", "per head"): "chunk_gated_delta_rule",
    ("rule", "per key"): "chunk_kda",
    ("delta", "no decay"): "chunk_dplr_delta_rule",
    ("delta", "per head"): "chunk_dplr_delta_rule",
    ("delta", "per key"): "chunk_dplr_delta_rule",
}


# --- in the place of theirs: states [.., K, V], decays as logarithms, scale 1/sqrt(K), documents in one row ----------------------


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    erase: tuple[Tensor, Tensor] | None = None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrences themselves, in fp32 at least; erase is (a, b) of the state's transition D + b a^T."""
    low, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if cu_seqlens is None:
        n, length = q.shape[:2]
        bounds = [(row, 0, length) for row in range(n)]
    else:
        assert q.shape[0] == 1
        assert cu_seqlens.dtype == torch.int64
        ends = cu_seqlens.tolist()
        assert (ends[0], ends[-1]) == (0, q.shape[1])
        bounds = [(0, a, b) for a, b in itertools.pairwise(ends)]
        n = len(bounds)
    if initial_state is None:
        initial_state = q.new_zeros(n, q.shape[2], q.shape[3], v.shape[3])
    assert initial_state.shape == (n, q.shape[2], q.shape[3], v.shape[3])
    pieces, lasts = [], []
    for (row, start, end), s in zip(bounds, initial_state.unbind(0), strict=True):
        for t in range(start, end):
            key, value, old = k[row, t], v[row, t], s  # [H, K], [H, V], [H, K, V]
            if g is not None:
                s = s * g[row, t].exp().reshape(s.shape[0], -1, 1)
            if beta is not None:
                value = beta[row, t, :, None] * (value - torch.einsum("hk,hkv->hv", key, s))
            if erase is not None:
                a, b = (x[row, t].to(dtype) for x in erase)
                s = s + torch.einsum("hk,hj,hjv->hkv", b, a, old)
            s = s + torch.einsum("hk,hv->hkv", key, value)
            pieces.append(torch.einsum("hk,hkv->hv", q[row, t], s) * (q.shape[-1] ** -0.5 if scale is None else scale))
        lasts.append(s)
    return torch.stack(pieces).view(v.shape).to(low), torch.stack(lasts) if output_final_state else None


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    assert g is None or g.shape == q.shape[:3]
    return loop(
        q, k, v, g=g, scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )


def chunk_gla(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None,
):  # fmt: skip
    assert q.shape == k.shape == g.shape
    return loop(
        q, k, v, g=g, scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    cu_seqlens_cpu=None,
):  # fmt: skip
    assert beta.shape == q.shape[:3]
    return loop(
        q, k, v, beta=beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    assert beta.shape == g.shape == q.shape[:3]
    return loop(
        q, k, v, g=g, beta=beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, safe_gate=False, lower_bound=None, cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    assert g.shape == q.shape
    assert beta.shape == q.shape[:3]
    return loop(
        q, k, v, g=g, beta=beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_dplr_delta_rule(
    q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    safe_gate=False, chunk_size=None, lower_bound=None,
):  # fmt: skip
    assert gk.shape == a.shape == b.shape == q.shape
    return loop(
        q, k, v, g=gk, erase=(a, b), scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


PLACES = {
    "simple_gla": chunk_simple_gla,
    "gla": chunk_gla,
    "delta_rule": chunk_delta_rule,
    "gated_delta_rule": chunk_gated_delta_rule,
    "kda": chunk_kda,
    "generalized_delta_rule": chunk_dplr_delta_rule,
}


class Calls(list[tuple[str, dict[str, Any]]]):
    """What was called, with its arguments by name."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The package is there, on its own devices and in its own dtypes."""
    calls = Calls()

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((function.__name__, inspect.signature(function).bind(*args, **kwargs).arguments))
            return function(*args, **kwargs)

        return call

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for place, function in PLACES.items():
        module = types.ModuleType(f"fla.ops.{place}")
        setattr(module, function.__name__, recorded(function))
        monkeypatch.setitem(sys.modules, f"fla.ops.{place}", module)
    monkeypatch.setattr(fla, "FOUND", (0, 6, 0))
    return calls


@pytest.fixture
def here(theirs: Calls, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The same, and it runs on a CPU and in fp64 too."""
    monkeypatch.setattr(fla, "DEVICES", ("cpu",))
    monkeypatch.setattr(fla, "DTYPES", (*fla.DTYPES, torch.float64))
    return theirs


# --- the same numbers ---------------------------------------------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def tokens(kind: str, decay: str, length: int = T) -> dict[str, Tensor]:
    """Leaves by name."""
    shape = (B, length, H)
    named = {"q": random(*shape, K), "k": random(*shape, K), "v": random(*shape, V), "state": random(B, H, V, K)}
    channels = DECAYS[decay]
    if channels is not None:
        named["log_decay"] = (-torch.rand(*shape, *channels, dtype=torch.float64)).requires_grad_()
    if kind == "rule":
        named["beta"] = torch.rand(*shape, dtype=torch.float64).requires_grad_()
    if kind == "delta":
        named |= {name: (0.5 * torch.randn(*shape, K, dtype=torch.float64)).requires_grad_() for name in "ab"}
        named["strength"] = torch.rand(*shape, dtype=torch.float64).requires_grad_()
    return named


def results(kind: str, named: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs, the last state, and the gradients of a fixed sum over both."""
    y, state = SCANS[kind](**named, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    total = (y * weights).sum() + state.sin().sum()
    return [y, state, *torch.autograd.grad(total, list(named.values()))]


def documents() -> dict[str, Tensor]:
    """Starts in the middle, one after the other, at a row's first token and at padding, where nothing starts."""
    reset = torch.tensor([[False, False, True, False, True, True], [True, False, False, False, True, False]])
    valid = torch.tensor([[True] * 6, [True, True, False, True, False, True]])
    return {"reset": reset, "valid": valid}


@pytest.mark.parametrize("marks", ["none", "documents", "no start"])
@pytest.mark.parametrize(("kind", "decay"), list(CHOSEN))
def test_it_equals_the_token_loop(here: Calls, kind: str, decay: str, marks: str) -> None:
    """Prevents a transposed state, a scale, a sign or an order of decay and write that is theirs and not ours, in any gradient."""
    named, options = tokens(kind, decay), documents() if marks != "none" else {}
    if marks == "no start":
        options["reset"] = torch.zeros_like(options["reset"])
    expected = results(kind, named, backend="sequential", **options)
    assert not here
    actual = results(kind, named, backend="fla", **options)
    assert here.names == [CHOSEN[kind, decay]]
    for name, a, b in zip(["y", "state", *named], actual, expected, strict=True):
        assert_near(a, b, EXACT, name)


@pytest.mark.parametrize("kind", list(SCANS))
def test_calls_longer_than_a_slab_carry_the_state(here: Calls, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a key or step of the delta rule that stays behind when a long call is cut."""
    monkeypatch.setattr(tiles, "SLAB", 4)
    named = tokens(kind, "per head")
    actual, expected = (results(kind, named, backend=backend, **documents()) for backend in ("fla", "sequential"))
    assert len(here) == 2
    for name, a, b in zip(["y", "state", *named], actual, expected, strict=True):
        assert_near(a, b, EXACT, name)


@pytest.mark.parametrize("kind", list(SCANS))
def test_decays_to_nothing_are_bounded(here: Calls, kind: str) -> None:
    """Prevents minus infinity in their cumulative sums."""
    named = {name: x.detach() for name, x in tokens(kind, "per key").items()}
    named["log_decay"][:, 2] = -torch.inf
    if kind == "rule":
        named["log_decay"][:, 2] = -1e30
    y, _ = SCANS[kind](**named, backend="fla")
    wanted, _ = SCANS[kind](**named, backend="sequential")
    assert_near(y, wanted, EXACT, "y")
    given = here[0][1]
    assert given["gk" if kind == "delta" else "g"].min() == -746  # below it exp is 0 in fp64


def test_a_floor_reaches_the_general_rule(here: Calls) -> None:
    """Prevents RWKV-7 in tiles of 16 tokens where its bound allows 64; theirs must be negative."""
    named = tokens("delta", "per key")
    for floor in (-1.0, 0.0, None):
        delta_scan(**named, floor=floor, backend="fla")
    assert [given.get("lower_bound") for _, given in here] == [-1.0, None, None]


# --- precision ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SCANS))
@pytest.mark.parametrize("how", ["inputs", "named", "autocast"])
def test_products_are_low_and_gates_and_states_are_not(here: Calls, kind: str, how: str) -> None:
    """Prevents decays and states in bf16, products in fp32, and a result in another dtype than q's."""
    named = {name: x.detach().float() for name, x in tokens(kind, "per head").items()}
    if how == "inputs":
        named |= {name: named[name].bfloat16() for name in "qkv"}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y, state = SCANS[kind](**named, products=torch.bfloat16 if how == "named" else None, backend="fla")
    ((_, given),) = here
    assert {given[name].dtype for name in "qkvab" if name in given} == {torch.bfloat16}
    assert {x.dtype for name, x in given.items() if name in ("g", "gk", "beta", "initial_state")} == {torch.float32}
    assert (y.dtype, state.dtype) == (named["q"].dtype, torch.float32)


def test_one_precise_input_keeps_products_precise(here: Calls) -> None:
    """Prevents keys in fp32 that are rounded because the queries are not."""
    named = {name: x.detach().float() for name, x in tokens("linear", "per head").items()} | {
        "q": torch.ones(B, T, H, K).half()
    }
    with pytest.raises(RuntimeError, match=r"'fla' cannot run .* here: .*these are in torch.float32.*pass backend='chunked'"):
        gated_linear_scan(**named, backend="fla")


PRESETS = {
    "linear_attention": ([], "chunk_simple_gla"),
    "retnet": (["alpha"], "chunk_simple_gla"),
    "gla": (["alpha", "channels"], "chunk_gla"),
    "delta_net": (["eta"], "chunk_delta_rule"),
    "gated_delta_net": (["eta", "alpha"], "chunk_gated_delta_rule"),
    "rwkv7": (["eta", "alpha", "channels", "write"], "chunk_dplr_delta_rule"),
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_reach_the_kernel_of_their_rule(here: Calls, name: str) -> None:
    """Prevents a model in bf16 whose scan is taken in fp32, and a delta rule that goes the way of the general one."""
    gate_names, function = PRESETS[name]
    shape = (B, T, H, K) if "channels" in gate_names else (B, T, H)
    q, k, v = (torch.randn(B, T, H, n).bfloat16().requires_grad_() for n in (K, K, V))
    gates = {gate: torch.rand(shape) for gate in gate_names if gate != "channels"}
    y, _ = scan(getattr(presets, name)(), q, k, v, gates)
    assert here.names == [function]
    exact = {gate: x.double() for gate, x in gates.items()}
    wanted, _ = scan(getattr(presets, name)(), *(x.detach().double() for x in (q, k, v)), exact, backend="sequential")
    assert float((y.detach().double() - wanted).norm() / wanted.norm()) < 4 * torch.finfo(torch.bfloat16).eps


# --- where it runs ------------------------------------------------------------------------------------------------------------


def test_it_is_never_the_default_on_a_cpu(theirs: Calls) -> None:
    """Prevents kernels for a GPU that are started without one."""
    for kind in SCANS:
        named = {name: x.detach().bfloat16().requires_grad_() for name, x in tokens(kind, "per head").items()}
        SCANS[kind](**named)
    assert not theirs
    with pytest.raises(
        RuntimeError, match=r"'fla' cannot run .* here: .*needs a GPU; the inputs are on cpu.*pass backend='chunked'"
    ):
        delta_scan(**named, backend="fla")


@pytest.mark.parametrize(("length", "gradients", "default"), [(6, False, False), (6, True, True), (17, False, True)])
def test_it_is_the_default_for_long_calls_and_gradients(here: Calls, length: int, gradients: bool, default: bool) -> None:
    """Prevents a launch of many kernels for the few tokens of decoding."""
    named = {name: x.detach().requires_grad_(gradients) for name, x in tokens("rule", "per head", length).items()}
    delta_rule_scan(**named)
    assert bool(here) == default


def refused(kind: str, change: Callable[[dict[str, Any]], None], why: str, decay: str = "per head") -> Any:
    """A case: the arguments of a scan that they cannot run, and what is said."""
    return pytest.param(kind, decay, change, why, id=why)


CASES = [
    refused("linear", lambda x: x.update(decay_axis="value"), "no decay per value channel", "per value"),
    refused("delta", lambda x: x.update(strength=torch.rand(B, T, H, V).double()), "no strength per value channel"),
    refused("linear", lambda x: x.update(products=torch.float32), "bfloat16 or float16, these are in torch.float32"),
    refused("rule", lambda x: x.update(v=x["v"][..., :5], state=None), "even V; these are 4 and 5"),
    refused("rule", lambda x: x.update(q=x["q"][..., :3], k=x["k"][..., :3], state=None), "even V; these are 3 and 6"),
    refused(
        "linear",
        lambda x: x.update(
            {name: torch.randn(1, 2, 1, 258, dtype=torch.float64) for name in "qkv"}, log_decay=None, state=None
        ),
        "K up to 256 and an even V; these are 258 and 258",
    ),
]


@pytest.mark.parametrize(("kind", "decay", "change", "why"), CASES)
def test_what_it_cannot_express_is_refused_and_goes_on_as_before(
    here: Calls, kind: str, decay: str, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    """Prevents a call that is silently another recurrence, and a default that fails where there was a form that works."""
    arguments: dict[str, Any] = dict(tokens(kind, decay))
    change(arguments)
    with pytest.raises(RuntimeError, match=f"'fla' cannot run .* here: .*{why}.*pass backend='chunked'"):
        SCANS[kind](**arguments, backend="fla")
    for a, b in zip(SCANS[kind](**arguments), SCANS[kind](**arguments, backend="chunked"), strict=True):
        assert torch.equal(a, b)
    assert not here


def test_slots_are_refused(here: Calls) -> None:
    """Prevents half a slot memory by them and half an error."""
    named = {name: x for name, x in tokens("linear", "no decay").items() if name != "state"}
    with pytest.raises(RuntimeError, match="no decay per value channel"):
        slot_scan(**named, log_decay=-torch.rand(B, T, H, 3).double(), backend="fla")
    assert not here


def test_gradients_that_triton_miscompiles_are_refused(here: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents training that begins and fails in its first backward pass, as theirs does on such a machine."""
    monkeypatch.setattr(fla, "_miscompiles", lambda device: True)
    for kind in ("linear", "rule"):
        named = tokens(kind, "per head")
        results(kind, named)
        with pytest.raises(RuntimeError, match="miscompiles its gradients for decays per head"):
            SCANS[kind](**named, backend="fla")
        assert not here
        with torch.no_grad():
            SCANS[kind](**named, backend="fla")
        SCANS[kind](**tokens(kind, "per key"), backend="fla")
        SCANS[kind](**tokens(kind, "no decay"), backend="fla")
        assert len(here) == 3
        here.clear()
    delta_scan(**tokens("delta", "per head"), backend="fla")
    assert here.names == ["chunk_dplr_delta_rule"]


@pytest.mark.parametrize(
    ("capability", "triton", "wrong"),
    [(9, (3, 7, 0), True), (9, (3, 7, 1), False), (9, (3, 3, 1), False), (8, (3, 7, 0), False), (10, (3, 7, 0), False)],
)
def test_only_hopper_with_those_versions_miscompiles(
    monkeypatch: pytest.MonkeyPatch, capability: int, triton: tuple[int, ...], wrong: bool
) -> None:
    """Prevents a bound that shuts out machines that are right."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(fla, "version", lambda package: triton)
    assert fla._miscompiles(torch.device("cuda", 0)) == wrong
    assert not fla._miscompiles(torch.device("cpu"))


@pytest.mark.parametrize(("found", "why"), [((), "is not installed"), ((0, 5, 2), "fla-core 0.5.2 is older than 0.6")])
def test_without_the_package_it_says_how_to_get_it(
    here: Calls, monkeypatch: pytest.MonkeyPatch, found: tuple[int, ...], why: str
) -> None:
    """Prevents an import error in the middle of a model, and functions of other arguments."""
    monkeypatch.setattr(fla, "FOUND", found)
    named = tokens("rule", "per head")
    delta_rule_scan(**named)
    with pytest.raises(RuntimeError, match=rf"{why}.*pip install.*recollect\[fla\].*pass backend='chunked'"):
        delta_rule_scan(**named, backend="fla")
    assert not here


def test_naming_chunked_means_ours(here: Calls) -> None:
    """Prevents a peer that is compared with itself."""
    for name in ("retnet", "gated_delta_net"):
        q, k, v = (torch.randn(B, 20, H, n, dtype=torch.float64) for n in (K, K, V))
        scan(getattr(presets, name)(), q, k, v, {"alpha": torch.rand(B, 20, H).double()}, backend="chunked")
        assert not here
        scan(getattr(presets, name)(), q, k, v, {"alpha": torch.rand(B, 20, H).double()})
        assert len(here) == 1
        here.clear()


def test_what_runs_on_a_gpu_is_said(theirs: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a package of others that is used without a word, or missing without one."""
    assert "THE KERNELS OF flash-linear-attention 0.6.0" in describe_recurrences()
    monkeypatch.setattr(fla, "FOUND", ())
    assert "flash-linear-attention is not installed: pip install 'recollect[fla]'" in describe_recurrences()


def test_a_compiled_model_stays_one_graph(here: Calls) -> None:
    """Prevents a package that, once installed, breaks torch.compile(fullgraph=True)."""
    named = tokens("rule", "per head")
    wanted, _ = delta_rule_scan(**named, backend="chunked")
    compiled = torch.compile(lambda x: delta_rule_scan(**x)[0], fullgraph=True, backend="eager")
    assert_near(compiled(named), wanted, EXACT, "y")
    assert not here
    broken = torch.compile(lambda x: 2 * delta_rule_scan(**x, backend="fla")[0], backend="eager")
    assert_near(broken(named), 2 * wanted, EXACT, "named")
    assert here.names == ["chunk_gated_delta_rule"]
