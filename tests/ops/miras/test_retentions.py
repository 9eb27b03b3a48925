"""Retentions: closed forms against numerical optimisation of what they minimise, frames against the exact read.

Axis legend: B batch, H heads, O rows and I columns of a matrix, c the sum of a row on the simplex.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.miras.retentions import (
    DIVERGENCES,
    RETENTIONS,
    Divergence,
    Retention,
    elastic_net,
    elastic_net_ftrl,
    f_divergence,
    kl,
    l2,
    l2_coupled,
    logit,
    lq,
    none,
    q_norm,
    soft_threshold,
    towards_initial,
)

EXACT = 1e-12
SHAPE = (2, 3, 4, 5)  # B, H, O, I

CASES: dict[str, Retention] = {
    **{name: factory() for name, factory in RETENTIONS.items()},
    "kl scaled": kl(scale=2.5),
    **{f"f_divergence {kind}": f_divergence(kind) for kind in DIVERGENCES},
    "f_divergence scaled": f_divergence("hellinger", scale=1.0),
    "elastic_net large": elastic_net(0.2),
    "elastic_net_ftrl large": elastic_net_ftrl(0.5),
    "lq 2": lq(2),
    "lq 3": lq(3.0),
    "lq radius": lq(4.0, radius=0.5),
    "lq paper": lq(4.0, "paper"),
    "lq paper 2": lq(2.0, "paper"),
    "lq ftrl": lq(4.0, "ftrl"),
    "lq ftrl 1.2": lq(1.2, "ftrl"),
    "lq ftrl 2": lq(2.0, "ftrl"),
}
every = pytest.mark.parametrize("retention", CASES.values(), ids=CASES)
settling = pytest.mark.parametrize(
    "retention", [case for case in CASES.values() if case.settle], ids=[name for name, case in CASES.items() if case.settle]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def started(retention: Retention, initial: Tensor) -> Tensor:
    """Z_0 for a batch of two."""
    return retention.start(initial).expand(SHAPE[0], *initial.shape).clone()


def exact_weights(retention: Retention, anchor: Tensor, z: Tensor, initial: Tensor, n: int) -> Tensor:
    return retention.link(z if retention.settle is None else retention.settle(anchor, z, n), initial)


# --- what every retention is ------------------------------------------------------------------------------------------------


@every
def test_the_frame_is_exact_at_its_anchor(retention: Retention) -> None:
    """Gradients of a chunk are taken at these weights: the read before the first token must be the link's."""
    initial = random(*SHAPE[1:])
    for anchor in (started(retention, initial), started(retention, initial) * (1 + 0.3 * uniform(*SHAPE, seed=1))):
        frame = retention.frame(anchor, initial)
        near(frame.weights(1.0, torch.zeros(SHAPE, dtype=torch.float64)), retention.link(anchor, initial))


@every
def test_a_frame_called_exact_equals_the_link(retention: Retention) -> None:
    """`exact` lets a scan use the matrix form without a doubt; where it is False the two must differ, or the flag is idle."""
    initial = random(*SHAPE[1:])
    anchor = started(retention, initial)
    alpha = 0.9 if retention.decays else 1.0
    gained = random(*SHAPE, seed=2)
    read = retention.frame(anchor, initial).weights(alpha, gained)
    exact = exact_weights(retention, anchor, alpha * anchor + gained, initial, 3)
    assert torch.allclose(read, exact, rtol=EXACT, atol=EXACT) == retention.exact


@every
def test_a_frame_is_made_of_what_a_scan_can_multiply(retention: Retention) -> None:
    """moving and fixed are whole matrices, scale one number per matrix: no other shape is a matrix product."""
    initial = random(*SHAPE[1:])
    frame = retention.frame(started(retention, initial), initial)
    assert frame.moving.shape == SHAPE
    assert frame.fixed is None or frame.fixed.shape in (SHAPE, SHAPE[1:])
    assert frame.scale is None or frame.scale.shape in ((2, 3, 1, 1), (1, 1, 1, 1))


@every
def test_matrices_are_independent(retention: Retention) -> None:
    """A norm, mean or threshold over the batch or the heads: other rows of the batch would change an answer by a bit."""
    initial = random(*SHAPE[1:])
    anchor = started(retention, initial)

    def everything(anchor: Tensor, z: Tensor) -> list[Tensor]:
        frame = retention.frame(anchor, initial)
        return [exact_weights(retention, anchor, z, initial, 2), frame.weights(0.9, z - anchor)]

    gained = random(*SHAPE, seed=2)
    changed = gained.clone()
    changed[1] *= 7
    changed[0, 2] += 5
    for before, after in zip(everything(anchor, anchor + gained), everything(anchor, anchor + changed), strict=True):
        assert torch.equal(before[0, :2], after[0, :2])


@every
def test_gradients_equal_finite_differences(retention: Retention) -> None:
    """Through the start, the link, the settled step and the frame: the learned initial must be trainable."""
    shape = (1, 1, 2, 3)
    initial = random(*shape[1:], seed=4).requires_grad_()
    gained = (0.4 * random(*shape, seed=5)).requires_grad_()

    def reads(initial: Tensor, gained: Tensor) -> tuple[Tensor, ...]:
        anchor = retention.start(initial)[None] + 0.1
        if retention.name == "f_divergence":
            anchor = retention.start(initial)[None]
        z = anchor + gained
        return exact_weights(retention, anchor, z, initial, 1), retention.frame(anchor, initial).weights(0.9, gained)

    assert torch.autograd.gradcheck(reads, (initial, gained))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_memory_is_finite(retention: Retention, dtype: torch.dtype) -> None:
    """Z = 0 divides by a norm of zero: a NaN there, forward or backward, ends a training run at its first step."""
    initial = torch.zeros(SHAPE[1:], dtype=dtype, requires_grad=True)
    anchor = started(retention, initial)
    gained = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    weights = exact_weights(retention, anchor, anchor + gained, initial, 1)
    read = retention.frame(anchor, initial).weights(0.9, gained)
    assert weights.dtype == read.dtype == dtype
    assert torch.isfinite(weights).all()
    assert torch.isfinite(read).all()
    for leaf in torch.autograd.grad((weights + read).sum(), (initial, gained)):
        assert torch.isfinite(leaf).all()


@settling
def test_settling_after_no_token_changes_no_bit(retention: Retention) -> None:
    """Padding is the identity on the state: a row of the batch without tokens keeps its memory exactly, and its gradient."""
    assert retention.settle is not None
    anchor = started(retention, random(*SHAPE[1:])).float().requires_grad_()
    moved = anchor + random(*SHAPE, seed=1).float() * torch.tensor([0.0, 0.1]).reshape(2, 1, 1, 1)
    settled = retention.settle(anchor, moved, torch.tensor([0, 3]))
    assert torch.equal(settled[0], anchor[0])
    assert not torch.equal(settled[1], moved[1])
    near(settled[1], retention.settle(anchor, moved, 3)[1], 0.0)
    (grad,) = torch.autograd.grad(settled[0].sum(), anchor)
    assert torch.equal(grad[0], torch.ones_like(grad[0]))


@pytest.mark.parametrize("name", RETENTIONS)
def test_every_registered_retention_builds_from_json(name: str) -> None:
    """A default that a configuration file cannot hold."""
    options = {p.name: p.default for p in inspect.signature(RETENTIONS[name]).parameters.values()}
    assert RETENTIONS[name](**json.loads(json.dumps(options))).name == name


# --- numerical optimisation -------------------------------------------------------------------------------------------------


def argmin(objective: Callable[[Tensor], Tensor], start: Tensor, weights: Callable[[Tensor], Tensor] = lambda u: u) -> Tensor:
    """The weights(u) of least objective, by L-BFGS over u in fp64 and three steps of Newton's: a search by values of the objective ends
    where it no longer tells them apart, 1e-8 from the minimum."""
    u = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [u], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = objective(weights(u))
        value.backward()
        return value

    search.step(closure)

    def value(flat: Tensor) -> Tensor:
        return objective(weights(flat.view_as(start)))

    flat = u.detach().flatten()
    for _ in range(3):  # the pseudo-inverse: a softmax does not change along ones
        slope, curvature = torch.func.grad(value)(flat), torch.func.hessian(value)(flat)
        flat = flat - torch.linalg.pinv(curvature, rtol=1e-10, hermitian=True) @ slope
    return weights(flat.view_as(start))


def separable_argmin(objective: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The W in [-10, 10] of least objective(W), convex and element by element, by ternary search: no derivative is used."""
    low, high = torch.full(shape, -10.0, dtype=torch.float64), torch.full(shape, 10.0, dtype=torch.float64)
    for _ in range(120):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        worse = objective(left) > objective(right)
        low, high = torch.where(worse, left, low), torch.where(worse, high, right)
    return (low + high) / 2


def on_simplex(total: float) -> Callable[[Tensor], Tensor]:
    return lambda u: total * u.softmax(-1)


G = random(4, 5, seed=20)
PREVIOUS = random(4, 5, seed=21)
POSITIVE = 5 * (0.7 * PREVIOUS).softmax(-1)  # rows sum to c = I


def one(w: Tensor) -> Tensor:
    """[O, I] as a batch of one matrix."""
    return w[None, None]


# --- l2 ---------------------------------------------------------------------------------------------------------------------


def test_none_and_l2_carry_the_weights() -> None:
    """Z is W: the recurrence alone is the update."""
    for retention in (none(), l2()):
        assert retention.exact
        assert torch.equal(retention.link(one(G), PREVIOUS[None]), one(G))
        assert torch.equal(retention.start(PREVIOUS[None]), PREVIOUS[None])
    assert not none().decays
    assert l2().decays


@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_l2_coupled_minimises_local_plus_global(beta: float) -> None:
    """alpha = beta / (beta + 2 theta): a missing factor 2 (as in community code) is another minimum."""
    theta = torch.tensor(0.3, dtype=torch.float64)
    couple = l2_coupled(beta).couple
    assert couple is not None
    gates = couple({"eta": theta, "delta": theta})
    assert gates["delta"] is theta
    found = argmin(lambda w: (w * G).sum() + ((w - PREVIOUS) ** 2).sum() / (2 * theta) + (w**2).sum() / beta, PREVIOUS)
    near(gates["log_alpha"].exp() * PREVIOUS - gates["eta"] * G, found, 1e-8)


def test_l2_coupled_refuses_an_alpha() -> None:
    """A gate that would be overwritten without a word."""
    couple, gate = l2_coupled().couple, torch.ones(1)
    assert couple is not None
    with pytest.raises(ValueError, match="drop the gate log_alpha"):
        couple({"eta": gate, "log_alpha": gate})
    with pytest.raises(ValueError, match="'eta': pass it"):
        couple({})


def test_towards_initial_decays_the_difference() -> None:
    """W_t = W_0 + alpha (W_{t-1} - W_0) - eta g, token by token."""
    retention, initial = towards_initial(), random(*SHAPE[1:])
    z, w = started(retention, initial), initial.expand(SHAPE).clone()
    for t in range(6):
        alpha, step = 0.8 + 0.02 * t, random(*SHAPE, seed=30 + t)
        z, w = alpha * z + step, initial + alpha * (w - initial) + step
        near(retention.link(z, initial), w)


# --- the simplex ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0, 12.0])
def test_kl_minimises_divergence_plus_entropy(scale: float | None) -> None:
    """Eq. 19: alpha and eta of the gates from those of the objective, on rows that sum to c."""
    a, e, total = 2.0, 0.3, 5.0 if scale is None else scale
    previous = total * PREVIOUS.softmax(-1)

    def objective(w: Tensor) -> Tensor:
        return (w * G).sum() + (w * (w / previous).log()).sum() / e + (w * w.log()).sum() / a

    z = a / (a + e) * PREVIOUS - a * e / (a + e) * G
    near(kl(scale).link(one(z), PREVIOUS[None])[0, 0], argmin(objective, PREVIOUS, on_simplex(total)), 1e-12)


def test_kl_is_eq27() -> None:
    """Softmax(alpha log W - eta g), token by token, alpha constant along a row: logits are carried, the logarithm is never taken."""
    retention, initial = kl(), random(*SHAPE[1:])
    z = started(retention, initial)
    w = retention.link(z, initial)
    for t in range(8):
        alpha, step = 0.8 + 0.2 * uniform(2, 3, 4, 1, seed=40 + t), random(*SHAPE, seed=50 + t)
        z = alpha * z - step
        w = 5 * torch.softmax(alpha * w.log() - step, -1)
        near(retention.link(z, initial), w)
        near(w.sum(-1), torch.full(SHAPE[:3], 5.0, dtype=torch.float64))


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda x: x * x.log(),
    "reverse_kl": lambda x: -x.log(),
    "hellinger": lambda x: 2 * (x.sqrt() - 1) ** 2,
    "jensen_shannon": lambda x: 2 * x * x.log() - 2 * (1 + x) * ((1 + x) / 2).log(),
    "chi2": lambda x: (x - 1) ** 2 / 2,
}


def settle_one(kind: str, previous: Tensor, step: Tensor, scale: float | None = None) -> Tensor:
    settle = f_divergence(kind, scale).settle
    assert settle is not None
    return settle(one(previous), one(previous + step), 1)[0, 0]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_are_normalised(kind: str) -> None:
    """f(1) = 0 and f''(1) = 1: the step size means the same in every divergence; `ratio` inverts f', `give` is 1 / f''."""
    x = torch.tensor([1.0, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    f = GENERATORS[kind](x)
    (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    divergence = DIVERGENCES[kind]
    near(f[0], torch.zeros_like(f[0]))
    near(curvature[0], torch.ones_like(f[0]))
    if kind == "chi2":
        assert torch.equal(divergence.give(x), torch.ones_like(x))  # and 0 at x = 0, where the bound holds
    else:
        near(divergence.give(x), 1 / curvature)
    near(divergence.ratio(divergence.one + slope[0] - slope), x)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_f_divergence_minimises_its_divergence(kind: str, scale: float | None) -> None:
    """Eq. 18 on rows that sum to c; the steps are small enough that no weight of chi2 reaches zero."""
    total, eta = 5.0 if scale is None else scale, 0.15
    previous = total * (0.7 * PREVIOUS).softmax(-1)

    def objective(w: Tensor) -> Tensor:
        return (eta * w * G).sum() + (previous * GENERATORS[kind](w / previous)).sum()

    settled = settle_one(kind, previous, -eta * G, scale)
    near(settled, argmin(objective, PREVIOUS, on_simplex(total)), 1e-12)
    near(settled.sum(-1), torch.full((4,), total, dtype=torch.float64))


def test_a_divergence_of_ones_own_is_taken() -> None:
    """Prevents the general case from being five special ones: Cressie and Read's f of power 3, x^3 / 6 up to a line, f' = x^2 / 2."""
    cubic = Divergence(lambda y: (1 - 2 * y).clamp_min(0).sqrt(), torch.reciprocal, 0.0, -math.inf)
    weights = torch.rand(1, 2, 3, 6, dtype=torch.float64) + 0.5
    weights = 6 * weights / weights.sum(-1, keepdim=True)
    step = 0.1 * torch.randn(1, 2, 3, 6, dtype=torch.float64)
    settle = f_divergence(cubic).settle
    assert settle is not None
    settled = settle(weights, weights + step, 1)
    ratio = settled / weights
    slope = ratio.square() / 2 - step  # stationary: f'(W / W') - step is one number per row
    assert (slope.amax(-1) - slope.amin(-1)).max() < 1e-9
    torch.testing.assert_close(settled.sum(-1), weights.sum(-1), atol=1e-9, rtol=0)


def test_chi2_with_weights_at_zero_minimises_its_divergence() -> None:
    """The bound W >= 0, which Eq. 18 leaves out: every support is tried, the best feasible one kept."""
    w, step = POSITIVE[0], 3 * G[0]
    best, least = w, math.inf
    for alive in itertools.product([False, True], repeat=5):
        if not any(alive):
            continue
        on = torch.tensor(alive, dtype=torch.float64)
        zeta = ((w * on * (1 + step)).sum() - 5) / (w * on).sum()  # stationary, with the row sum, on this support
        candidate = w * on * (1 + step - zeta)
        value = (-candidate * step).sum() + (w * GENERATORS["chi2"](candidate / w)).sum()
        if (candidate >= 0).all() and value < least:
            best, least = candidate, value.item()
    assert (best == 0).any()
    near(settle_one("chi2", POSITIVE, 3 * G)[0], best)


def test_chi2_weights_at_zero_stay_there() -> None:
    """Hard forgetting: a dead weight must not make the row a NaN, even if its step is the largest."""
    dead = torch.tensor([[0.0, 2.0, 3.0]], dtype=torch.float64)
    settled = settle_one("chi2", dead, torch.tensor([[50.0, 0.1, 0.2]], dtype=torch.float64), scale=5.0)
    near(settled, torch.tensor([[0.0, 1.88, 3.12]], dtype=torch.float64))


def test_f_divergence_kl_is_kl_without_decay() -> None:
    """Two retentions, one update: the multiplier search against the softmax."""
    steps = random(6, *SHAPE, seed=60)
    plain, general, initial = kl(), f_divergence("kl"), random(*SHAPE[1:])
    assert general.settle is not None
    z, w = started(plain, initial), started(general, initial)
    for step in steps:
        z, w = z + step, general.settle(w, w + step, 1)
        near(w, plain.link(z, initial), 1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_divergence_survives_large_steps(kind: str, dtype: torch.dtype) -> None:
    """Steps far beyond a trained range: positive, finite, on the simplex, with finite gradients; no pole is crossed."""
    settle = f_divergence(kind).settle
    assert settle is not None
    for size in (1e-6, 1.0, 30.0, 1e3):
        w = one(POSITIVE).to(dtype).requires_grad_()
        step = (size * one(G)).to(dtype).requires_grad_()
        settled = settle(w, w + step, 1)
        assert (settled >= 0).all()
        near(
            settled.sum(-1).double(), torch.full((1, 1, 4), 5.0, dtype=torch.float64), 2e-3 if dtype == torch.float32 else 1e-9
        )
        for leaf in torch.autograd.grad((settled * one(PREVIOUS).to(dtype)).sum(), (w, step)):
            assert torch.isfinite(leaf).all()


# --- elastic nets -----------------------------------------------------------------------------------------------------------


def test_elastic_net_minimises_eq22() -> None:
    """|W - W'|^2 / (2 s) + |W|^2 / (2 b) + |W|_1 / a: the three gates from the three coefficients."""
    s, b, a = 0.4, 1.5, 2.0
    alpha = b / (b + s)
    eta = s * alpha
    retention = elastic_net(s * b / (a * (s + b)))
    assert retention.settle is not None

    def objective(w: Tensor) -> Tensor:
        return w * G + (w - PREVIOUS) ** 2 / (2 * s) + w**2 / (2 * b) + w.abs() / a

    settled = retention.settle(one(PREVIOUS), one(alpha * PREVIOUS - eta * G), 1)[0, 0]
    assert (settled == 0).any()
    near(settled, separable_argmin(objective, (4, 5)), 1e-7)


def test_elastic_net_over_a_chunk_is_the_threshold_n_times() -> None:
    """S_(n gamma) = S_gamma ... S_gamma: without new gradients a chunk forgets as much as its tokens would one by one."""
    settle = elastic_net(0.1).settle
    assert settle is not None
    z = one(PREVIOUS)
    for _ in range(7):
        z = settle(z, z, 1)
    near(settle(one(PREVIOUS), one(PREVIOUS), 7), z)


def test_elastic_net_ftrl_minimises_eq23() -> None:
    """<W, sum of g> + |W|^2 / (2 eta) + |W|_1 / a, with the 1/2 that the print lacks."""
    eta, a = 0.5, 1.2

    def objective(w: Tensor) -> Tensor:
        return w * G + w**2 / (2 * eta) + w.abs() / a

    weights = elastic_net_ftrl(eta / a).link(one(-eta * G), PREVIOUS[None])[0, 0]
    assert (weights == 0).any()
    near(weights, separable_argmin(objective, (4, 5)), 1e-7)


def test_elastic_net_ftrl_reads_the_kept_weights_exactly() -> None:
    """While no weight crosses the threshold, decay alone is read without error."""
    retention, initial = elastic_net_ftrl(0.3), random(*SHAPE[1:])
    anchor = torch.where(initial.abs() < 0.5, 0.5 * initial, initial).expand(SHAPE)
    read = retention.frame(anchor, initial).weights(0.9, torch.zeros(SHAPE, dtype=torch.float64))
    near(read, retention.link(0.9 * anchor, initial))


def test_soft_threshold_shrinks_and_cuts() -> None:
    """The definition, with a number and with a tensor for a threshold."""
    z = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.3, 1.5])
    expected = torch.tensor([-1.5, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert torch.equal(soft_threshold(z, 0.5), expected)
    assert torch.equal(soft_threshold(z, torch.tensor(0.5)), expected)


# --- mirror maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1.2, 4 / 3, 1.5, 2.0, 3.0, 4.0, 5.0])
def test_lq_ftrl_minimises_with_the_dual_exponent(q: float) -> None:
    """-<W, A> + |W|_r^2 / (2 N^((q-2)/q)), r = q / (q - 1): convex, so a zero gradient is the minimum, and L-BFGS finds no lower."""
    r, size = q / (q - 1), G.numel() ** ((q - 2) / q)

    def objective(w: Tensor) -> Tensor:
        return (-w * G).sum() + (w.abs() ** r).sum() ** (2 / r) / (2 * size)

    weights = lq(q, "ftrl").link(one(G), PREVIOUS[None])[0, 0].detach().requires_grad_()
    least = objective(weights)
    (slope,) = torch.autograd.grad(least, weights)
    near(slope, torch.zeros_like(slope), 1e-6)  # eps = 1e-8 in the norm
    assert objective(argmin(objective, PREVIOUS)) >= least - 1e-9
    if 1.3 < q <= 3:
        near(argmin(objective, PREVIOUS), weights.detach(), 1e-5)


@pytest.mark.parametrize("q", [2.0, 3.0, 4.0, 5.0])
def test_lq_modes_are_what_they_say(q: float) -> None:
    """Eq. 24 and our two maps, written out with plain norms over each matrix."""
    z, initial = random(*SHAPE), 0.8 * random(*SHAPE[1:], seed=1)
    for b, h in itertools.product(range(2), range(3)):
        a = z[b, h]
        norm, rho = (a.abs() ** q).sum() ** (1 / q), (initial[h].abs() ** q).sum() ** (1 / q)
        mean = (a.abs() ** q).mean() ** (1 / q)
        expected = {
            "paper": a / (norm + 1e-8) ** (q - 2),
            "safe": a * min(1.0, ((rho + 1e-8) / (norm + 1e-8)).item() ** (q - 2)),
            "ftrl": a * a.abs() ** (q - 2) / (mean + 1e-8) ** (q - 2),
        }
        for mode, weights in expected.items():
            near(lq(q, mode).link(z, initial)[b, h], weights, 1e-7 if mode == "ftrl" else EXACT)


def test_lq_2_is_l2_in_every_mode() -> None:
    """q = 2 is the identity."""
    for mode in ("safe", "paper", "ftrl"):
        near(lq(2, mode).link(one(G), PREVIOUS[None]), one(G))
        assert lq(2, mode).exact


def test_lq_safe_is_the_identity_until_the_memory_outgrows_its_start() -> None:
    """No inflation as Z decays, and a bound on the weights: what distinguishes it from the paper's map."""
    retention, initial = lq(), random(*SHAPE[1:])
    z = started(retention, initial)
    for size in (1.0, 0.5, 1e-3):
        assert torch.equal(retention.link(size * z, initial), size * z)
    for size in (1.5, 10.0, 1e4):
        norms, rho = q_norm(retention.link(size * z, initial), 4.0), q_norm(initial, 4.0)
        near(norms, (rho / size).expand_as(norms), 1e-6)  # rho^2 / |Z|


def test_lq_paper_4_inverts_scale() -> None:
    """|W|_4 = 1 / |Z|_4: the property that makes alpha < 0.99 dangerous in this mode."""
    z = random(*SHAPE)
    near(q_norm(lq(4, "paper").link(z, z[0]), 4.0), 1 / q_norm(z, 4.0), 1e-6)


def test_lq_safe_with_a_radius_can_start_at_zero() -> None:
    """A memory that starts at zero has radius zero, hence weights zero for ever; a radius of its own frees it."""
    z, zero = random(*SHAPE), torch.zeros(SHAPE[1:], dtype=torch.float64)
    assert lq().link(z, zero).abs().max() < 1e-12
    norms = q_norm(lq(radius=0.7).link(z, zero), 4.0)
    near(norms, 0.49 / q_norm(z, 4.0), 1e-6)


@pytest.mark.parametrize("mode", ["safe", "paper"])
def test_the_moneta_read_lags_by_one_factor_only(mode: str) -> None:
    """Inside a chunk W / Z is frozen at the anchor: the read is the exact one times (factor at the anchor) / (factor now)."""
    retention, initial = lq(4.0, mode), random(*SHAPE[1:])
    anchor, gained = 1.3 * started(retention, initial), 0.2 * random(*SHAPE, seed=3)
    z = 0.97 * anchor + gained
    now, then = q_norm(z, 4.0), q_norm(anchor, 4.0)
    read = retention.frame(anchor, initial).weights(0.97, gained)
    near(read, retention.link(z, initial) * (now / then) ** 2, 1e-7)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_q_norm_neither_overflows_nor_vanishes(size: float) -> None:
    """|z|^4 leaves fp32 beyond 1e9 and below 1e-9."""
    z = (size * random(*SHAPE)).float()
    expected = (z.double().abs() ** 4).sum((-2, -1), keepdim=True) ** 0.25
    near(q_norm(z, 4.0).double() / expected, torch.ones_like(expected), 1e-6)


@pytest.mark.parametrize("decays", [False, True])
def test_logit_minimises_its_bregman_divergence(decays: bool) -> None:
    """V5 with the inner product <grad F(W'), W - W'>, and with the global binary entropy that an alpha stands for."""
    e, a = 0.6, 1.7 if decays else math.inf
    previous = PREVIOUS.sigmoid()

    def entropy(w: Tensor) -> Tensor:
        return w * w.log() + (1 - w) * (1 - w).log()

    def objective(w: Tensor) -> Tensor:
        tangent = entropy(previous) + PREVIOUS * (w - previous)
        return (w * G + (entropy(w) - tangent) / e + entropy(w) / a).sum()

    kept = 1 / (1 + e / a)
    near(
        logit().link(one(kept * PREVIOUS - kept * e * G), PREVIOUS[None])[0, 0],
        argmin(objective, PREVIOUS, torch.sigmoid),
        1e-8,
    )


# --- the read inside a chunk of Memora --------------------------------------------------------------------------------------


Reads = dict[str, list[tuple[Tensor, Tensor]]]  # way of reading -> (read, exact read) of each token


def relative_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    error, size = (sum(x.square().sum().item() for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs]))
    return math.sqrt(error / size)


def memora_reads(
    anchors: list[Tensor],
    read: Callable[[list[Tensor], Tensor], Tensor],
    *,
    eta: float,
    least_alpha: float,
    size: float,
    seed: int,
) -> Reads:
    """Sixteen tokens with gradients of l2 at the anchors, alpha and eta uniform in [least_alpha, 1] and [0, eta], unit keys and
    queries, values of rms `size`; read centred (the frame), uncentred (weights plus what Z gained), and frozen."""
    retention, dim = kl(), anchors[0].shape[-1]
    held = [retention.link(z, z[0]).requires_grad_() for z in anchors]
    frames = [retention.frame(z, z[0]) for z in anchors]
    k, q = (F.normalize(random(16, dim, seed=seed + n), dim=-1) for n in (1, 2))
    v, etas, alphas = size * random(16, dim, seed=seed + 3), eta * uniform(16, seed=seed + 4), uniform(16, seed=seed + 5)
    duals, decay, reads = anchors, 1.0, {"centred": [], "uncentred": [], "frozen": []}
    for t in range(16):
        alpha = least_alpha + (1 - least_alpha) * alphas[t].item()
        grads = torch.autograd.grad((read(held, k[t]) - v[t]).square().sum() / 2, held)
        duals, decay = [alpha * z - etas[t] * g for z, g in zip(duals, grads, strict=True)], decay * alpha
        gained = [z - decay * anchor for z, anchor in zip(duals, anchors, strict=True)]
        weights = {
            "centred": [frame.weights(decay, g) for frame, g in zip(frames, gained, strict=True)],
            "uncentred": [decay * w + g for w, g in zip(held, gained, strict=True)],
            "frozen": held,
        }
        exact = read([retention.link(z, z[0]) for z in duals], q[t])
        for name, ws in weights.items():
            reads[name].append((read(ws, q[t]).detach(), exact.detach()))
    return reads


def memora_matrix_reads(eta: float, least_alpha: float, seed: int) -> Reads:
    anchors = [one(0.5 * random(16, 16, seed=seed))]
    return memora_reads(anchors, lambda w, x: w[0][0, 0] @ x, eta=eta, least_alpha=least_alpha, size=1.0, seed=seed)


def memora_perceptron_reads(eta: float, least_alpha: float, seed: int) -> Reads:
    """What the memory adds to its input, which is left out of errors and of values."""
    anchors = [one(0.5 * random(64, 16, seed=seed)), one(0.5 * random(16, 64, seed=seed + 6))]

    def read(w: list[Tensor], x: Tensor) -> Tensor:
        return F.layer_norm(w[1][0, 0] @ F.gelu(w[0][0, 0] @ x, approximate="tanh"), (16,), eps=1e-6)

    return memora_reads(anchors, read, eta=eta, least_alpha=least_alpha, size=0.5, seed=seed)


@pytest.mark.parametrize("least_alpha", [0.98, 0.9])
def test_memora_matrix_read_stays_within_its_bound(least_alpha: float) -> None:
    """Steps up to 0.1: the centred read is within 0.06 of the exact one, and better than an uncentred or a frozen read."""
    runs = [memora_matrix_reads(0.1, least_alpha, seed) for seed in range(100, 130, 10)]
    error = {name: relative_error([pair for run in runs for pair in run[name]]) for name in runs[0]}
    assert error["centred"] < 0.06
    assert error["centred"] < error["frozen"] / 2
    assert error["centred"] < error["uncentred"] / 2


@pytest.mark.parametrize("eta", [0.003, 0.01, 0.03, 0.1])
def test_memora_perceptron_read_stays_within_its_bound(eta: float) -> None:
    """LayerNorm(W1 gelu(W2 x)), 16 tokens, alpha >= 0.98, eta up to 0.1, values of rms 1/2: within 0.066 of the exact read, the
    uncentred linear read being at least twice as far off."""
    runs = [memora_perceptron_reads(eta, 0.98, seed) for seed in range(200, 230, 10)]
    error = {name: relative_error([pair for run in runs for pair in run[name]]) for name in runs[0]}
    assert error["centred"] < 0.066
    assert error["centred"] < error["frozen"]
    assert error["centred"] < error["uncentred"] / 2


def test_the_kl_read_keeps_row_sums_and_is_second_order_near_equal_weights() -> None:
    """Rows keep their sum at any size; about equal weights halving the logits quarters the error."""
    retention, z, gained = kl(scale=3.0), random(*SHAPE), random(*SHAPE, seed=1)

    def error(size: float) -> float:
        frame = retention.frame(size * z, z[0])
        near(frame.weights(0.9, gained).sum(-1), torch.full(SHAPE[:3], 3.0, dtype=torch.float64))
        exact = retention.link(0.9 * size * z + size * gained, z[0])
        return (frame.weights(0.9, size * gained) - exact).abs().max().item()

    assert error(1e-3) / error(5e-4) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_f_divergence_read_is_second_order_near_equal_weights(kind: str) -> None:
    """One frame for all divergences, as they agree to first order: f''(1) = 1."""
    retention, initial, step = f_divergence(kind, scale=3.0), torch.zeros(SHAPE[1:], dtype=torch.float64), random(*SHAPE)
    anchor = started(retention, initial)

    def error(size: float) -> float:
        exact = exact_weights(retention, anchor, anchor + size * step, initial, 1)
        return (retention.frame(anchor, initial).weights(1.0, size * step) - exact).abs().max().item()

    assert error(1e-3) < 1e-5
    if kind != "chi2":  # linear: no error at all
        assert error(1e-3) / error(5e-4) == pytest.approx(4, rel=0.02)


# --- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: l2_coupled(0.0), "beta must be positive; got 0.0"),
        (lambda: kl(-1.0), "positive; got -1.0"),
        (lambda: f_divergence("total_variation"), "'total_variation'; known: kl, reverse_kl, hellinger, jensen_shannon, chi2"),
        (lambda: f_divergence(scale=0.0), "positive; got 0.0"),
        (lambda: elastic_net(-0.1), "at least 0; got -0.1"),
        (lambda: elastic_net_ftrl(-0.1), "at least 0; got -0.1"),
        (lambda: lq(4.0, "exact"), "'exact'; known modes: safe, paper, ftrl"),
        (lambda: lq(1.5), "at least 2 in mode 'safe'; got 1.5"),
        (lambda: lq(1.0, "ftrl"), "more than 1 in mode 'ftrl'; got 1.0"),
        (lambda: lq(6.0, "paper"), "at most 5 in mode 'paper'"),
        (lambda: lq(4.0, "paper", radius=1.0), "for mode 'safe'; got 1.0 with 'paper'"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Retention], message: str) -> None:
    """A typo in a configuration must not train."""
    with pytest.raises(ValueError, match=message):
        make()
