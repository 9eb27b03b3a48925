"""Attentional biases against autograd, their limits, and the paper's equations written out."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch
from torch import Tensor

from recollect.ops.miras.biases import (
    BIASES,
    AttentionalBias,
    dot_product,
    huber,
    l1,
    l2,
    l_infinity,
    lp,
    pseudo_huber,
    value_shift,
)

EXACT = 1e-12
CHANNELS = 8

CASES: dict[str, AttentionalBias] = {
    **{name: factory() for name, factory in BIASES.items()},
    "l1 soft": l1(2.0),
    "lp 1": lp(1),
    "lp 1.5": lp(1.5),
    "lp 2": lp(2),
    "lp 4": lp(4.0),
    "l_infinity soft": l_infinity(1.0),
    "huber norm": huber("norm"),
    "huber switch": huber("switch"),
    "huber switch_rms": huber("switch_rms", sharpness=3.0),
}
every = pytest.mark.parametrize("bias", CASES.values(), ids=CASES)
losses = {name: bias for name, bias in CASES.items() if bias.loss is not None}
every_loss = pytest.mark.parametrize("bias", losses.values(), ids=losses)
residual_losses = {name: bias for name, bias in losses.items() if bias.reads}
every_residual_loss = pytest.mark.parametrize("bias", residual_losses.values(), ids=residual_losses)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prediction and target [40, V] whose residuals go from far below to far above every threshold."""
    sizes = torch.logspace(-3, 1.5, 40, dtype=torch.float64)[:, None]
    target = random(40, CHANNELS, seed=seed)
    return target + sizes * random(40, CHANNELS, seed=seed + 1), target


def gates_of(bias: AttentionalBias, *shape: int) -> dict[str, Tensor]:
    return {gate: 0.2 + random(*(shape or (40, CHANNELS)), seed=9).abs() for gate in bias.gates}


def of_residual(bias: AttentionalBias, r: Tensor, **gates: Tensor) -> Tensor:
    return bias.grad(r, torch.zeros_like(r), **gates)


def near(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- what every bias is -----------------------------------------------------------------------------------------------------


@every_loss
def test_grad_equals_autograd_of_the_loss(bias: AttentionalBias) -> None:
    """A written-out gradient that drifted from its loss."""
    assert bias.loss is not None
    prediction, target = pair()
    prediction.requires_grad_()
    gates = gates_of(bias)
    (expected,) = torch.autograd.grad(bias.loss(prediction, target, **gates).sum(), prediction)
    near(bias.grad(prediction, target, **gates), expected)


@every
def test_outer_gradients_equal_finite_differences(bias: AttentionalBias) -> None:
    """The outer loop differentiates the gradient itself: with respect to the prediction, the target and the gates."""
    inputs = [x.requires_grad_() for x in (random(6, 4), random(6, 4, seed=3), *gates_of(bias, 6, 4).values())]

    def grad(prediction: Tensor, target: Tensor, *gates: Tensor) -> Tensor:
        return bias.grad(prediction, target, **dict(zip(bias.gates, gates, strict=True)))

    assert torch.autograd.gradcheck(grad, inputs)


@every
def test_a_perfect_prediction_has_finite_outer_gradients(bias: AttentionalBias) -> None:
    """0/0 in a norm or 0 to a negative power: NaN weights the first time a value is recalled exactly."""
    for dtype in (torch.float32, torch.float64):
        prediction = torch.ones(3, CHANNELS, dtype=dtype, requires_grad=True)
        gates = {gate: torch.full((3, 1), 0.5, dtype=dtype, requires_grad=True) for gate in bias.gates}
        grad = bias.grad(prediction, torch.ones_like(prediction), **gates)
        assert grad.dtype == dtype
        if not bias.reads:
            continue
        near(grad, torch.zeros_like(grad), 0.0)
        for leaf in torch.autograd.grad(grad.sum(), [prediction, *gates.values()], allow_unused=True):
            assert leaf is None or torch.isfinite(leaf).all()


@every
def test_a_gate_of_zero_is_finite(bias: AttentionalBias) -> None:
    """A scan fills slots without a token with zeros: a NaN there reaches real tokens through 0 * NaN."""
    residual = torch.tensor([[0.0] * CHANNELS, [2.0] * CHANNELS], requires_grad=True)
    gates = {gate: torch.zeros(2, 1, requires_grad=True) for gate in bias.gates}
    grad = of_residual(bias, residual, **gates)
    assert torch.isfinite(grad).all()
    if bias.reads:
        for leaf in torch.autograd.grad(grad.sum(), [residual, *gates.values()], allow_unused=True):
            assert leaf is None or torch.isfinite(leaf).all()


@every_residual_loss
def test_loss_is_least_at_a_perfect_prediction(bias: AttentionalBias) -> None:
    """A constant left in a smoothed loss, or a sign."""
    assert bias.loss is not None
    prediction, target = pair()
    gates = gates_of(bias)
    least = bias.loss(target, target, **gates)
    if bias.name != "value_shift":
        near(least, torch.zeros_like(least))
    assert (bias.loss(prediction, target, **gates) > least).all()


@every_loss
def test_convex_losses_have_monotone_gradients(bias: AttentionalBias) -> None:
    """<grad(a) - grad(b), a - b> >= 0: a step along the gradient never overshoots for small eta."""
    a, target = pair()
    b, gates = target + random(40, CHANNELS, seed=7), gates_of(bias)
    product = ((bias.grad(a, target, **gates) - bias.grad(b, target, **gates)) * (a - b)).sum(-1)
    assert (product >= -EXACT).all()


@every
def test_reads_says_whether_the_prediction_matters(bias: AttentionalBias) -> None:
    """A scan that skips the read for a bias that needs it, or reads in vain."""
    prediction, target = pair()
    gates = gates_of(bias)
    same = torch.equal(bias.grad(prediction, target, **gates), bias.grad(prediction + 1, target, **gates))
    assert same != bias.reads


@every
def test_rows_are_independent(bias: AttentionalBias) -> None:
    """A norm or mean over the wrong axis would mix tokens."""
    prediction, target = pair()
    gates = gates_of(bias)
    changed = prediction.clone()
    changed[0] += 100
    assert torch.equal(bias.grad(changed, target, **gates)[1:], bias.grad(prediction, target, **gates)[1:])


@pytest.mark.parametrize("bias", [bias for bias in CASES.values() if bias.gates], ids=lambda bias: bias.name)
def test_one_gate_per_token_equals_equal_gates_per_channel(bias: AttentionalBias) -> None:
    """[..., 1] and [..., V] are the two shapes of a gate."""
    prediction, target = pair()
    delta = 0.2 + random(40, 1).abs()
    wide = delta.expand(40, CHANNELS)
    near(bias.grad(prediction, target, delta=delta), bias.grad(prediction, target, delta=wide))
    if bias.loss is not None:
        near(bias.loss(prediction, target, delta=delta), bias.loss(prediction, target, delta=wide))


@pytest.mark.parametrize("name", BIASES)
def test_every_registered_bias_builds_from_json(name: str) -> None:
    """A default that a configuration file cannot hold."""
    parameters = inspect.signature(BIASES[name]).parameters.values()
    options = {p.name: p.default for p in parameters}
    built = BIASES[name](**json.loads(json.dumps(options)))
    assert built.name == name
    assert built.gates == BIASES[name]().gates


# --- the paper's equations and the limits -----------------------------------------------------------------------------------


def test_dot_product_is_the_hebbian_write() -> None:
    """The gradient is -v whatever was predicted, in the prediction's shape."""
    prediction, target = random(5, 3, CHANNELS), random(3, CHANNELS)
    near(dot_product().grad(prediction, target), -target.expand(5, 3, CHANNELS))


def test_lp_2_is_l2() -> None:
    """The power family contains the square exactly: the smoothing has no effect at p = 2."""
    prediction, target = pair()
    power, square = lp(2), l2()
    assert power.loss is not None
    assert square.loss is not None
    near(power.grad(prediction, target), square.grad(prediction, target))
    near(power.loss(prediction, target), square.loss(prediction, target), 1e-9)


@pytest.mark.parametrize("p", [1, 1.5, 2, 2.8, 3, 3.2, 4])
def test_lp_is_eq11_without_its_factor(p: float) -> None:
    """Eq. 11: sign(r) |r|^(p-1), where |r| is well above sqrt(eps)."""
    r = torch.tensor([-3.0, -0.5, 0.2, 1.0, 10.0], dtype=torch.float64)
    near(of_residual(lp(p), r), r.sign() * r.abs() ** (p - 1), 3e-5)


def test_l1_tends_to_the_sign() -> None:
    """Eq. 12, and the loss to the sum of |r|."""
    r = torch.tensor([-3.0, -0.05, 0.1, 20.0], dtype=torch.float64)
    sharp = l1(1000.0)
    assert sharp.loss is not None
    near(of_residual(sharp, r), r.sign())
    near(sharp.loss(r, torch.zeros_like(r)), r.abs().sum(), 4 * math.log(2) / 1000)


def test_l_infinity_tends_to_the_worst_channel() -> None:
    """Small temperature: the gradient is the sign of the largest |r|; the loss stays within temperature log(2V) of max |r|."""
    r = random(20, CHANNELS)
    worst = torch.nn.functional.one_hot(r.abs().argmax(-1), CHANNELS) * r.sign()
    near(of_residual(l_infinity(1e-5), r), worst, 1e-9)
    for temperature in (0.01, 0.1, 1.0):
        bias = l_infinity(temperature)
        assert bias.loss is not None
        below = r.abs().amax(-1) - bias.loss(r, torch.zeros_like(r))
        assert (below >= 0).all()
        assert (below <= temperature * math.log(2 * CHANNELS) + EXACT).all()
        assert (of_residual(bias, r).abs().sum(-1) <= 1 + EXACT).all()


def test_l_infinity_is_softmax_times_sign_for_clear_errors() -> None:
    """The form softmax(|r| / temperature) sign(r), up to exp(-2 |r| / temperature)."""
    r = random(20, CHANNELS).sign() * (1 + random(20, CHANNELS, seed=1).abs())
    near(of_residual(l_infinity(0.1), r), (r.abs() / 0.1).softmax(-1) * r.sign(), 1e-7)


def test_huber_coordinate_is_eq14() -> None:
    """Eq. 13 and 14, with their indicator masks."""
    prediction, target = pair()
    bias, delta = huber(), 0.2 + random(40, CHANNELS, seed=9).abs()
    assert bias.loss is not None
    r = prediction - target
    small = (r.abs() <= delta).double()
    near(bias.grad(prediction, target, delta=delta), small * r + (1 - small) * delta * r.sign())
    per_channel = small * r**2 / 2 + (1 - small) * delta * (r.abs() - delta / 2)
    near(bias.loss(prediction, target, delta=delta), per_channel.sum(-1))


def test_huber_norm_is_eq15() -> None:
    """Eq. 13 of |r|, and its gradient r min(1, delta / |r|), delta being the mean over channels."""
    prediction, target = pair()
    bias, delta = huber("norm"), 0.2 + random(40, CHANNELS, seed=9).abs()
    assert bias.loss is not None
    r, threshold = prediction - target, delta.mean(-1)
    length = r.norm(dim=-1)
    expected = torch.where(length <= threshold, length**2 / 2, threshold * (length - threshold / 2))
    near(bias.loss(prediction, target, delta=delta), expected, 1e-4)
    near(bias.grad(prediction, target, delta=delta), r * (threshold / length).clamp(max=1)[:, None], 1e-5)


@pytest.mark.parametrize(("kind", "width"), [("switch", 1.0), ("switch_rms", CHANNELS**0.5)])
def test_huber_switch_is_eq16(kind: str, width: float) -> None:
    """Eq. 16 and 26: r where |r| <= delta, else delta sign(r); "switch_rms" tests |r| / sqrt(V)."""
    prediction, target = pair()
    delta = 0.2 + random(40, 1, seed=9).abs()
    r = prediction - target
    inside = r.norm(dim=-1, keepdim=True) / width <= delta
    assert inside.any()
    assert not inside.all()
    bias = huber(kind, sharpness=1e9)
    assert bias.loss is None
    near(bias.grad(prediction, target, delta=delta), torch.where(inside, r, delta * r.sign()))


def test_the_literal_switch_jumps_and_the_rms_switch_does_not() -> None:
    """At the threshold the literal rule's step grows by sqrt(V); the rms test removes that for equal channels."""
    delta, direction = torch.ones(1, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)

    def jump(kind: str, threshold: float) -> float:
        just = direction / CHANNELS**0.5 * threshold
        below, above = (
            of_residual(huber(kind, sharpness=1e9), just * side, delta=delta).norm() for side in (0.999999, 1.000001)
        )
        return (above / below).item()

    assert jump("switch", 1.0) == pytest.approx(CHANNELS**0.5, rel=1e-4)
    assert jump("switch_rms", CHANNELS**0.5) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "bias", [huber(), huber("norm"), huber("switch"), huber("switch_rms"), pseudo_huber()], ids=lambda bias: bias.name
)
def test_a_large_threshold_gives_l2(bias: AttentionalBias) -> None:
    """Huber with a threshold above every error is the squared error."""
    prediction, target = pair()
    delta = torch.full((40, 1), 1e9, dtype=torch.float64)
    near(bias.grad(prediction, target, delta=delta), prediction - target)
    if bias.loss is not None:
        near(bias.loss(prediction, target, delta=delta), ((prediction - target) ** 2).sum(-1) / 2)


@pytest.mark.parametrize("bias", [huber(), huber("norm"), huber("switch"), pseudo_huber()], ids=lambda bias: bias.name)
def test_the_threshold_bounds_the_write(bias: AttentionalBias) -> None:
    """However wrong the prediction, no channel is written by more than delta: what makes Yaad robust."""
    delta = torch.full((1,), 0.3, dtype=torch.float64)
    write = of_residual(bias, 1e6 * random(40, CHANNELS), delta=delta)
    assert (write.abs() <= 0.3 + EXACT).all()


def test_pseudo_huber_tends_to_delta_times_sign() -> None:
    """A small threshold: the direction only."""
    r, delta = (
        random(40, CHANNELS).sign() * (0.1 + random(40, CHANNELS, seed=1).abs()),
        torch.full((1,), 1e-6, dtype=torch.float64),
    )
    near(of_residual(pseudo_huber(), r, delta=delta) / delta, r.sign(), 1e-9)


def test_value_shift_is_the_worst_case_over_shifts() -> None:
    """Eq. 17: the maximum of the squared error over |shift| <= delta, found by projected ascent on the shift."""
    bias, radius = value_shift(), 0.7
    assert bias.loss is not None
    prediction, target = random(6, CHANNELS), random(6, CHANNELS, seed=1)
    shift = radius * torch.nn.functional.normalize(random(6, CHANNELS, seed=2), dim=-1)
    for _ in range(500):
        shift = radius * torch.nn.functional.normalize(shift - 0.2 * (prediction - target - shift), dim=-1)
    worst = ((prediction - target - shift) ** 2).sum(-1) / 2
    delta = torch.full((6, 1), radius, dtype=torch.float64)
    near(bias.loss(prediction, target, delta=delta), worst, 1e-3)
    near(bias.grad(prediction, target, delta=delta), prediction - target - shift, 1e-5)
    near(bias.grad(prediction, target, delta=0 * delta), prediction - target)


# --- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lp(0.5), "at least 1.*p=0.5"),
        (lambda: lp(math.nan), "at least 1"),
        (lambda: l1(0.0), "sharpness must be positive; got 0.0"),
        (lambda: l_infinity(-1.0), "temperature must be positive; got -1.0"),
        (lambda: huber("smooth"), "'smooth'; known kinds: coordinate, norm, switch, switch_rms"),
        (lambda: huber(sharpness=0.0), "sharpness must be positive"),
    ],
)
def test_options_out_of_range_are_refused(make, message: str) -> None:
    """A typo in a configuration must not train."""
    with pytest.raises(ValueError, match=message):
        make()
