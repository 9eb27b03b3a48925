"""`scan` away from fp64 and away from mild gates: half inputs, the strongest decays, long chunks, and the error of linear reads.

Axis legend: B batch, T time, H heads, K key dim, V value dim, C channels.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from recollect import state as states
from recollect.ops.miras import MirasSpec, Parameters, presets, scan
from recollect.ops.miras.biases import l2
from recollect.ops.miras.retentions import elastic_net, elastic_net_ftrl, logit
from tests.laws import assert_near
from tests.ops.miras.cases import DEEP_CASES, MATRIX_CASES, Case, Draw
from tests.ops.miras.equality import error

FORMS = {**MATRIX_CASES, **{name: (lambda make=make: make(4)) for name, make in DEEP_CASES.items()}}


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The case with every tensor in `dtype`; learned parameters stay in fp32 or above, as a mixed-precision model keeps them."""
    kept = torch.promote_types(dtype, torch.float32)
    parameters = case.parameters
    if parameters is not None:
        parameters = Parameters(tuple(w.to(kept) for w in parameters.fast), tuple(p.to(kept) for p in parameters.slow))
    q, k, v = (x.to(dtype) for x in case.inputs)
    return case._replace(inputs=(q, k, v), gates={name: g.to(dtype) for name, g in case.gates.items()}, parameters=parameters)


@pytest.mark.parametrize("name", FORMS)
def test_half_inputs_are_computed_in_single_precision(name: str) -> None:
    """Prevents a state in bf16, an output of another dtype, and rounding beyond that of the inputs themselves."""
    half = cast(FORMS[name](), torch.bfloat16)
    rounded = cast(half, torch.float64)  # the same numbers in fp64
    y, state = scan(half.spec, *half.inputs, half.gates, parameters=half.parameters)
    assert y.dtype == torch.bfloat16
    assert {leaf.dtype for _, leaf in states.leaves(state) if leaf.is_floating_point()} == {torch.float32}
    wanted, _ = scan(rounded.spec, *rounded.inputs, rounded.gates, parameters=rounded.parameters)
    assert error(y.double(), wanted) < 2**-7  # bf16 rounds by up to 2^-9 of the value


@pytest.mark.parametrize("name", FORMS)
def test_single_precision_is_near(name: str) -> None:
    """Prevents a form that is exact in fp64 only because fp64 forgives the order of its operations."""
    case = FORMS[name]()
    wanted, _ = scan(case.spec, *case.inputs, case.gates, parameters=case.parameters)
    single = cast(case, torch.float32)
    y, _ = scan(single.spec, *single.inputs, single.gates, parameters=single.parameters)
    assert_near(y.double(), wanted, 1e-3 if name.startswith("moneta") else 1e-4, name)


STRONG = {
    "yaad": presets.yaad(chunk_size=64),
    "moneta": presets.moneta(chunk_size=64),
    "memora": presets.memora(chunk_size=64),
    "titans": presets.titans(chunk_size=64),
    "gla": presets.gla(),
    "rwkv7": presets.rwkv7(),
    "gated_delta_net": presets.gated_delta_net(),
}


def strong_inputs(
    name: str, spec: MirasSpec, log_alpha: float, channels: bool
) -> tuple[list[Tensor], dict[str, Tensor], Parameters]:
    """fp32 tensors of 80 tokens whose decay is `log_alpha` at every second token."""
    draw, shape = Draw(3), (1, 80, 2, 8)
    gate = shape if channels else shape[:-1]
    inputs = [x.float().requires_grad_() for x in (draw.unit(*shape), draw.unit(*shape), draw.normal(*shape))]
    decay = torch.where(torch.arange(80) % 2 == 0, log_alpha, 0.0)[None, :, None].expand(shape[:-1])
    gates = {"eta": 0.01 * torch.rand(gate, generator=draw.generator)}
    gates["log_alpha"] = (decay[..., None].expand(shape) if channels else decay).clone().requires_grad_()
    if name == "yaad":
        gates["delta"] = torch.ones(gate)
    if name == "titans":
        gates["log_momentum"] = torch.full(shape[:-1], log_alpha).requires_grad_()
    if name == "rwkv7":
        gates["write"] = torch.rand(shape, generator=draw.generator)
    if name == "gla":
        del gates["eta"]
    return inputs, gates, spec.memory.init(2, 8, 8, generator=draw.generator)


@pytest.mark.parametrize("channels", [False, True], ids=["scalar", "channels"])
@pytest.mark.parametrize("log_alpha", [-math.exp(-0.5), -1e4])
@pytest.mark.parametrize("name", STRONG)
def test_strong_decay_neither_overflows_nor_drifts(name: str, log_alpha: float, channels: bool) -> None:
    """Prevents exp(+64 * 0.6) and beyond: outputs and every gradient finite in fp32, and the chunked form near the sequential one."""
    if name == "gated_delta_net" and channels:
        return
    spec, found = STRONG[name], []
    for backend in ("chunked", "sequential"):
        inputs, gates, parameters = strong_inputs(name, spec, log_alpha, channels)
        y, state = scan(spec, inputs[0], inputs[1], inputs[2], gates, parameters=parameters, backend=backend)
        wanted = [*inputs, *(gate for gate in gates.values() if gate.requires_grad)]
        total = y.sum() + sum(leaf.sum() for _, leaf in states.leaves(state) if leaf.requires_grad)
        gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
        assert all(torch.isfinite(part).all() for part in (y, *gradients))
        found.append((y, *gradients))
    if name == "memora":  # weights decay to all equal, and LayerNorm divides by their rounding errors: finite is all there is
        return
    for n, (actual, expected) in enumerate(zip(*found, strict=True)):
        assert_near(actual, expected, 1e-3, f"{name}: {'y' if n == 0 else f'gradient {n}'}")


# --- linear reads inside a chunk ----------------------------------------------------------------------------------------------


def read_error(spec: MirasSpec, *, alpha: float, eta: float, std: float | None) -> float:
    """|y_linear - y_exact| / |y_exact - q| over 64 tokens, 16 channels, alpha in [alpha, 1], eta in [eta / 2, eta]."""
    draw, shape = Draw(6), (1, 64, 2, 16)
    q, k, v = draw.unit(*shape), draw.unit(*shape), draw.normal(*shape)
    gates = {"eta": eta * (1 + draw.uniform(*shape)) / 2, "alpha": alpha + (1 - alpha) * draw.uniform(*shape)}
    parameters = spec.memory.init(2, 16, 16, std=std, generator=draw.generator, dtype=torch.float64)
    linear, exact = (
        scan(dataclasses.replace(spec, read=read), q, k, v, gates, parameters=parameters)[0] for read in ("linear", "exact")
    )
    return float((linear - exact).norm() / (exact - q).norm())


@pytest.mark.parametrize(("eta", "bound"), [(0.003, 0.06), (0.01, 0.06), (0.03, 0.08), (0.1, 0.12)])
def test_memora_linear_read_is_near_the_exact_one(eta: float, bound: float) -> None:
    """Prevents an uncentred or frozen read (0.06 to 0.6 and 0.06 to 0.2 at these steps) from passing as the centred one."""
    assert read_error(presets.memora(chunk_size=16), alpha=0.98, eta=eta, std=0.5) < bound


def test_memora_linear_read_under_strong_decay() -> None:
    """States how far it degrades: below 0.2 with alpha down to 0.9 (a frozen read: 0.4)."""
    assert read_error(presets.memora(chunk_size=16), alpha=0.9, eta=0.03, std=0.5) < 0.2


STATED: dict[
    str, tuple[MirasSpec, dict[float, tuple[float, float]]]
] = {  # docs/math.md: eta -> bound at chunk 16 and at chunk 64
    "kl": (presets.memora(), {0.1: (0.12, 0.2), 0.4: (0.27, 0.6), 0.8: (0.45, 0.9)}),
    "safe": (presets.moneta(mode="safe"), {0.01: (0.002, 0.003), 0.03: (0.02, 0.11)}),
    "paper": (presets.moneta(mode="paper"), {0.01: (0.006, 0.03), 0.03: (0.03, 0.2)}),
    "ftrl": (presets.moneta(mode="ftrl"), {0.01: (0.35, 0.6), 0.03: (0.5, 0.75)}),
    "logit": (dataclasses.replace(presets.yaad(), bias=l2(), retention=logit()), {0.1: (0.03, 0.15), 0.4: (0.15, 0.5)}),
    "elastic_net_ftrl": (
        dataclasses.replace(presets.yaad(), bias=l2(), retention=elastic_net_ftrl()),
        {0.01: (0.005, 0.005), 0.05: (0.003, 0.003)},
    ),
    "elastic_net": (
        dataclasses.replace(presets.yaad(), bias=l2(), retention=elastic_net()),
        {0.01: (0.2, 0.2), 0.05: (0.1, 0.1)},
    ),
}


@pytest.mark.parametrize(("name", "eta"), [(name, eta) for name, (_, bounds) in STATED.items() for eta in bounds])
def test_linear_reads_keep_the_stated_bounds(name: str, eta: float) -> None:
    """Prevents a table in the docs that nobody has computed, and a frame that has become worse than it says."""
    spec, bounds = STATED[name]
    for chunk_size, bound in zip((16, 64), bounds[eta], strict=True):
        std = 0.5 if name == "kl" else None
        found = read_error(dataclasses.replace(spec, chunk_size=chunk_size), alpha=0.998, eta=eta, std=std)
        assert found < bound, (chunk_size, found)


@pytest.mark.parametrize(("mode", "alpha", "bound"), [("safe", 1.0, 0.02), ("safe", 0.98, 0.02), ("paper", 0.99, 0.05)])
def test_moneta_linear_read_is_near_the_exact_one(mode: str, alpha: float, bound: float) -> None:
    """Prevents a factor of another chunk, or of one matrix on the other."""
    assert read_error(presets.moneta(mode=mode, chunk_size=16), alpha=alpha, eta=1e-3, std=None) < bound
