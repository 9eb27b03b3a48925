"""Learning rules: one token's update against loops over numbers, a chunk's weights against the recurrence they stand for.

Axis legend: T time, C tokens of a chunk, W window, O rows and I columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recollect.ops.miras.rules import (
    RULES,
    LearningRule,
    gd,
    implicit,
    least_squares,
    mixture,
    momentum,
    multi_step,
    muon,
    newton_schulz,
    nonparametric,
    omega,
)
from tests.laws import assert_near
from tests.ops.miras.cases import Draw

EXACT = 1e-12
SHAPE = (2, 3)

# --- one token --------------------------------------------------------------------------------------------------------------

DESCENTS = {"gd": gd(), "multi_step": multi_step(3), "implicit": implicit(), "omega": omega(3)}


@pytest.mark.parametrize("name", DESCENTS)
def test_descent_update_equals_loop(name: str) -> None:
    """Prevents a step up the gradient, a step size on the wrong entry, and a momentum where there is none."""
    draw = Draw(1)
    g, eta = draw.normal(*SHAPE), draw.uniform(*SHAPE)
    delta, s = DESCENTS[name].update(g, {"eta": eta}, None)
    wanted = torch.tensor([[-float(eta[o, i]) * float(g[o, i]) for i in range(3)] for o in range(2)], dtype=torch.float64)
    assert_near(delta, wanted, EXACT, name)
    assert s is None


def test_momentum_update_equals_loop() -> None:
    """Prevents a momentum that decays what it has just taken in, or that the step size multiplies again."""
    draw, rule = Draw(2), momentum()
    g, eta, mu = draw.normal(5, *SHAPE), draw.uniform(5), draw.uniform(5)
    s, held = torch.zeros(SHAPE, dtype=torch.float64), [[0.0] * 3 for _ in range(2)]
    for t in range(5):
        delta, after = rule.update(g[t], {"eta": eta[t], "momentum": mu[t]}, s)
        held = [[float(mu[t]) * held[o][i] - float(eta[t]) * float(g[t, o, i]) for i in range(3)] for o in range(2)]
        assert after is not None
        s = after
        assert_near(s, torch.tensor(held, dtype=torch.float64), EXACT, f"S after token {t}")
        assert_near(delta, s, 0.0, f"D of token {t}")


def test_muon_update_equals_loop() -> None:
    """Prevents a step size inside the momentum that is orthogonalised: it would cancel. The dual waits for the chunk's end."""
    draw, rule = Draw(3), muon()
    g, mu = draw.normal(5, *SHAPE), draw.uniform(5)
    s, held = torch.zeros(SHAPE, dtype=torch.float64), [[0.0] * 3 for _ in range(2)]
    for t in range(5):
        delta, after = rule.update(g[t], {"eta": torch.tensor(0.3, dtype=torch.float64), "momentum": mu[t]}, s)
        held = [[float(mu[t]) * held[o][i] - float(g[t, o, i]) for i in range(3)] for o in range(2)]
        assert after is not None
        s = after
        assert_near(s, torch.tensor(held, dtype=torch.float64), EXACT, f"S after token {t}")
        assert not delta.any()


@pytest.mark.parametrize("rule", [least_squares(), nonparametric()], ids=lambda rule: rule.name)
def test_rules_without_a_gradient_have_no_update(rule: LearningRule) -> None:
    """Prevents a rule with a scan of its own from running as descent."""
    with pytest.raises(AssertionError, match="a scan of its own"):
        rule.update(torch.ones(SHAPE), {}, None)


def test_what_a_rule_says_of_itself() -> None:
    """Prevents a rule whose state or gates a scan does not provide."""
    facts = {name: (r.momentum, r.window, r.n_steps, r.gates) for name, r in ((name, make()) for name, make in RULES.items())}
    assert facts == {
        "gd": (False, 1, 1, ()),
        "momentum": (True, 1, 1, ("momentum",)),
        "multi_step": (False, 1, 2, ()),
        "implicit": (False, 1, 1, ()),
        "omega": (False, 4, 1, ("gamma",)),
        "muon": (True, 1, 1, ("momentum", "gamma")),
        "least_squares": (False, 1, 1, ()),
        "nonparametric": (False, 1, 1, ()),
    }
    assert [name for name, make in RULES.items() if make().name != name] == []
    assert (muon(3, 6).n_iterations, muon(3, 6).window, omega(7).window, multi_step(5).n_steps) == (3, 6, 7, 5)


# --- a chunk ----------------------------------------------------------------------------------------------------------------

LENGTH = 7


class Chunk:
    """Numbers in place of matrices: the gates of a chunk, Z and S before it, and the gradients of the window's and its tokens."""

    def __init__(self, window: int, seed: int) -> None:
        draw = Draw(seed)
        self.log_alpha = draw.log_alpha(LENGTH)
        self.log_momentum = torch.log(torch.sigmoid(draw.normal(LENGTH)))
        self.eta = draw.uniform(LENGTH)
        self.z, self.s = (float(x) for x in draw.normal(2))
        self.window = window
        self.g = draw.normal(window - 1 + LENGTH)

    def without(self, t: int) -> None:
        """No token in slot t: the identity on everything."""
        self.log_alpha[t] = self.log_momentum[t] = self.eta[t] = 0.0

    def gradient(self, t: int) -> float:
        """The sum over the window that ends with token t; the chunk's token 0 follows W - 1 earlier ones."""
        return sum(float(self.g[t + w]) for w in range(self.window))

    def recurrence(self, *, accelerated: bool, real: list[bool]) -> tuple[list[float], float]:
        """Z after every token, and S after the last, from Z_t = alpha_t Z_{t-1} + D_t."""
        z, s, path = self.z, self.s, []
        for t in range(LENGTH):
            if real[t]:
                alpha, eta, mu = math.exp(self.log_alpha[t]), float(self.eta[t]), math.exp(self.log_momentum[t])
                s = mu * s - eta * self.gradient(t) if accelerated else s
                z = alpha * z + (s if accelerated else -eta * self.gradient(t))
            path.append(z)
        return path, s


@pytest.mark.parametrize("gap", [None, 0, 3, LENGTH - 1])
@pytest.mark.parametrize(
    "rule", [gd(), multi_step(2), omega(1), omega(3), omega(2 * LENGTH)], ids=lambda r: f"{r.name}{r.window}"
)
def test_mixture_equals_the_recurrence(rule: LearningRule, gap: int | None) -> None:
    """Prevents weights that decay a token's own gradient, forget the window's earlier tokens, or read the chunk's future."""
    chunk, real = Chunk(rule.window, seed=4), [t != gap for t in range(LENGTH)]
    if gap is not None:
        chunk.without(gap)
    mix = mixture(rule, chunk.log_alpha, chunk.eta, real=torch.tensor(real))
    assert (mix.boost, mix.momentum_keep, mix.momentum_weights) == (None, None, None)
    wanted, _ = chunk.recurrence(accelerated=False, real=real)
    actual = mix.keep * chunk.z - mix.weights @ chunk.g
    assert_near(actual, torch.tensor(wanted, dtype=torch.float64), EXACT, "Z")
    for t in range(LENGTH):
        assert not mix.weights[t, rule.window + t :].any()  # exact zeros: no bit of the future


@pytest.mark.parametrize("gap", [None, 0, 3, LENGTH - 1])
@pytest.mark.parametrize("decelerating", [True, False])
def test_mixture_of_momentum_equals_the_recurrence(gap: int | None, decelerating: bool) -> None:
    """Prevents a double decay in the wrong order, a first momentum that is lost, and padding that keeps pushing."""
    chunk, real = Chunk(1, seed=5), [t != gap for t in range(LENGTH)]
    if not decelerating:
        chunk.log_momentum.zero_()
    if gap is not None:
        chunk.without(gap)
    mix = mixture(
        momentum(),
        chunk.log_alpha,
        chunk.eta,
        log_momentum=chunk.log_momentum if decelerating else None,
        real=None if gap is None else torch.tensor(real),
    )
    assert mix.boost is not None
    assert mix.momentum_keep is not None
    assert mix.momentum_weights is not None
    wanted, last = chunk.recurrence(accelerated=True, real=real)
    actual = mix.keep * chunk.z + mix.boost * chunk.s - mix.weights @ chunk.g
    assert_near(actual, torch.tensor(wanted, dtype=torch.float64), EXACT, "Z")
    s = mix.momentum_keep * chunk.s - mix.momentum_weights @ chunk.g
    assert_near(s, torch.tensor(last, dtype=torch.float64), EXACT, "S")
    assert not mix.weights.triu(1).any()


def test_mixture_keeps_leading_axes() -> None:
    """Prevents heads that share one decay."""
    chunks = [Chunk(3, seed) for seed in (6, 7)]
    log_alpha, eta = (torch.stack([getattr(chunk, name) for chunk in chunks]) for name in ("log_alpha", "eta"))
    mix = mixture(omega(3), log_alpha, eta)
    for n, chunk in enumerate(chunks):
        alone = mixture(omega(3), chunk.log_alpha, chunk.eta)
        assert_near(mix.weights[n], alone.weights, EXACT, f"weights {n}")
        assert_near(mix.keep[n], alone.keep, EXACT, f"keep {n}")


# --- Newton-Schulz ----------------------------------------------------------------------------------------------------------


def with_singular_values(sigma: Tensor, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U diag(sigma) V^T, U, V^T) for random orthonormal columns of U and rows of V^T."""
    draw, n = Draw(seed), sigma.shape[0]
    u, v = torch.linalg.qr(draw.normal(rows, n)).Q, torch.linalg.qr(draw.normal(columns, n)).Q.T
    return (u * sigma) @ v, u, v


SPECTRUM = torch.tensor([1.0, 0.5, 0.2, 0.02, 0.0025], dtype=torch.float64)  # down to 0.002 of the norm


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (9, 5), (5, 9)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_newton_schulz_pushes_singular_values_to_one(rows: int, columns: int, scale: float) -> None:
    """Prevents an iteration that turns vectors or signs or depends on the scale, of tall matrices and of wide ones."""
    s, u, v = with_singular_values(scale * SPECTRUM, rows, columns)
    x = newton_schulz(s)
    inner = u.T @ x @ v.T  # diagonal if the vectors are kept; its entries are the new singular values with their signs
    values = inner.diagonal()
    assert_near(inner, torch.diag(values), 1e-10, "vectors")
    assert_near(x, (u * values) @ v, 1e-10, "nothing outside of them")
    assert 0.68 < values.min() < values.max() < 1.21
    assert_near(newton_schulz(-s), -x, EXACT, "sign")


def polynomial(sigma: Tensor, n_iterations: int) -> Tensor:
    """What the quintic of Jordan et al. does to the singular values."""
    sigma = sigma / sigma.square().sum().sqrt()
    for _ in range(n_iterations):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return sigma


@pytest.mark.parametrize("n_iterations", [1, 3, 5, 8])
def test_newton_schulz_is_the_quintic_on_singular_values(n_iterations: int) -> None:
    """Prevents other coefficients, or another number of iterations than asked for."""
    s, u, v = with_singular_values(SPECTRUM, 6, 8)
    assert_near(newton_schulz(s, n_iterations), (u * polynomial(SPECTRUM, n_iterations)) @ v, 1e-11, "x")


def test_newton_schulz_range_of_every_share() -> None:
    """Prevents a stated range that some singular value above 0.002 of the norm leaves; a smaller one grows by 3.4445^5."""
    shares = torch.logspace(math.log10(2e-3), 0, 500, dtype=torch.float64)
    pair = torch.stack((shares, (1 - shares.square()).clamp(min=0).sqrt()), dim=-1)  # of norm one
    values = newton_schulz(torch.diag_embed(pair)).diagonal(dim1=-2, dim2=-1)[:, 0]
    assert 0.68 < values.min() < values.max() < 1.21
    tiny = newton_schulz(torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64)))[1, 1]
    assert float(tiny) == pytest.approx(1e-6 * 3.4445**5, rel=1e-3)


def test_newton_schulz_of_batches_and_of_nothing() -> None:
    """Prevents one matrix of a batch from scaling another, and a division by zero at a momentum that is still empty."""
    draw = Draw(8)
    s = draw.normal(2, 3, 4, 6) * torch.tensor([1e-2, 1.0, 1e2], dtype=torch.float64)[:, None, None]
    together = newton_schulz(s)
    for b in range(2):
        for h in range(3):
            assert_near(together[b, h], newton_schulz(s[b, h]), EXACT, f"matrix {b}, {h}")
    zero = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    x = newton_schulz(zero)
    (gradient,) = torch.autograd.grad(x.sum(), zero)
    assert not x.any()
    assert torch.isfinite(gradient).all()


def test_newton_schulz_gradient_by_finite_differences() -> None:
    """Prevents an orthogonalisation through which the outer loop learns nothing, or something else."""
    for shape in ((3, 4), (4, 3)):
        assert torch.autograd.gradcheck(newton_schulz, (Draw(9).normal(*shape).requires_grad_(),))


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: multi_step(0), "multi_step takes at least one step per token; got 0"),
        (lambda: multi_step(-1), "multi_step takes at least one step per token; got -1"),
        (lambda: omega(0), "the window counts tokens, the current one included: at least 1; got 0"),
        (lambda: muon(0), "n_iterations >= 1 and window >= 1; got 0 and 1"),
        (lambda: muon(5, 0), "n_iterations >= 1 and window >= 1; got 5 and 0"),
        (lambda: least_squares(0.0), "ridge must be positive, or M is not determined by few keys; got 0.0"),
        (lambda: least_squares(-1.0), "ridge must be positive.*got -1.0"),
        (lambda: least_squares(math.nan), "ridge must be positive.*got nan"),
    ],
)
def test_refused_rules(make: Callable[[], LearningRule], message: str) -> None:
    """Prevents a rule that takes no step, sees no token, or solves a singular system."""
    with pytest.raises(ValueError, match=message):
        make()
