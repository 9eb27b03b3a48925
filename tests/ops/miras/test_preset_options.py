"""The presets' own options against the papers' recurrences, where `test_presets` has their defaults: exponents, depth, gated memory.

Axis legend: B batch, T time, H heads, C channels, O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from recollect.ops.miras import presets
from tests.laws import EXACT, assert_near
from tests.ops.miras import transcriptions as paper
from tests.ops.miras.cases import MODEL_DIM, Case, deep
from tests.ops.miras.equality import BACKENDS, expected, run
from tests.ops.miras.transcriptions import Result

CHUNK_SIZES = (1, 4)


def assert_matches(case: Case, backend: str) -> None:
    wanted, got = expected(case), run(case, backend)
    assert_near(got.y, wanted.y, EXACT, "y")
    assert sorted(got.memory) == sorted(wanted.memory)
    for part, tensor in wanted.memory.items():
        assert_near(got.memory[part], tensor, EXACT, part)


# --- exponents --------------------------------------------------------------------------------------------------------------

EXPONENTS = [
    (2.5, 6.0, "safe"),
    (2.5, 6.0, "ftrl"),
    (2.0, 3.0, "safe"),
    (4.0, 2.0, "safe"),
    (1.5, 2.5, "paper"),
    (3.0, 1.5, "ftrl"),
]


def moneta(p: float, q: float, mode: str, read: str, chunk_size: int) -> Case:
    spec = presets.moneta(p, q, mode, chunk_size=chunk_size, read=read)
    eta_base, decay = {"safe": (2e-2, 0.01), "paper": (1e-3, 0.03), "ftrl": (1e-3, 1.0)}[mode]
    made = deep(spec, chunk_size, names=("eta", "log_alpha"), eta_base=eta_base, channels=True, seed=21, decay=decay)

    def of_head(b: int, h: int) -> Result:
        forms = {"chunk_size": chunk_size, "p": p, "norm_exponent": q, "mode": mode, "read": read}
        return paper.moneta(*made.head(b, h, "eta", "alpha"), *made.start(h), **forms)

    return Case("moneta", "arXiv 2504.13173 Eq. 24", spec, made.inputs, made.gates, made.parameters, of_head)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("read", ["linear", "exact"])
@pytest.mark.parametrize(("p", "q", "mode"), EXPONENTS)
def test_moneta_of_other_exponents(p: float, q: float, mode: str, read: str, chunk_size: int, backend: str) -> None:
    """Prevents formulas that are right at (3, 4) alone, where powers have short cuts, and exponents that are not passed on."""
    assert_matches(moneta(p, q, mode, read, chunk_size), backend)


def test_monetas_norm_acts_in_the_case_above() -> None:
    """Prevents a test of "safe" whose memory never outgrows its first norm: every q would pass."""
    case = moneta(2.5, 6.0, "safe", "linear", 4)
    assert case.parameters is not None
    final = run(case, "sequential").memory
    for m, initial in enumerate(case.parameters.fast):
        grown = (final[f"carried[{m}]"].abs() ** 6).sum((-2, -1)) / (initial.abs() ** 6).sum((-2, -1))
        assert (grown > 1).any(), f"matrix {m}"


# --- depth ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_titans_of_other_depths(depth: int, chunk_size: int, backend: str) -> None:
    """Prevents a momentum that reaches the first and the last matrix only; gates of heads, which the parallel form takes."""
    spec = presets.titans(depth, chunk_size=chunk_size)
    names = ("eta", "log_alpha", "log_momentum")
    made = deep(spec, chunk_size, names=names, eta_base=1e-2, channels=False, seed=22)

    def of_head(b: int, h: int) -> Result:
        return paper.titans(*made.head(b, h, "eta", "alpha", "mu"), *made.start(h), chunk_size=chunk_size)

    assert len(made.parameters.fast) == depth
    assert_matches(Case("titans", "arXiv 2501.00663", spec, made.inputs, made.gates, made.parameters, of_head), backend)


# --- gated memory -----------------------------------------------------------------------------------------------------------


def gated(weights: Sequence[Tensor], slow: Sequence[Tensor], x: Tensor) -> Tensor:
    """Atlas++' memory (arXiv 2505.23735, section 5): x + LayerNorm(W_3 (gelu(W_1 x) * (W_2 x))), x [C]."""
    u = weights[2] @ (paper.gelu(weights[0] @ x) * (weights[1] @ x))
    centred = u - u.mean()
    return x + slow[0] * centred / torch.sqrt((centred**2).mean() + 1e-6) + slow[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("window", [1, 3])
def test_gated_atlas_matches_its_paper(window: int, chunk_size: int, backend: str) -> None:
    """Prevents an Atlas++ that is Atlas: another memory, another activation, a gate matrix that no step reaches."""
    spec = presets.atlas(window, gated=True, chunk_size=chunk_size)
    names = ("eta", "log_alpha", "log_momentum", "gamma")
    made = deep(spec, chunk_size, names=names, eta_base=1e-1, channels=False, seed=23)
    shapes = [tuple(w.shape[1:]) for w in made.parameters.fast]
    assert shapes == [(4 * MODEL_DIM, MODEL_DIM), (4 * MODEL_DIM, MODEL_DIM), (MODEL_DIM, 4 * MODEL_DIM)]

    def of_head(b: int, h: int) -> Result:
        q, k, v, eta, alpha, mu, gamma = made.head(b, h, "eta", "alpha", "mu", "gamma")
        weights, slow = made.start(h)
        frozen, outputs, surprise = weights, [], [torch.zeros_like(w) for w in weights]
        for t in range(q.shape[0]):
            if t % chunk_size == 0:
                frozen = weights
            leaves = [w.detach().clone().requires_grad_() for w in frozen]
            with torch.enable_grad():
                seen = range(max(0, t - window + 1), t + 1)
                loss = torch.stack([gamma[i] * (gated(leaves, slow, k[i]) - v[i]).square().sum() / 2 for i in seen]).sum()
                step = torch.autograd.grad(loss, leaves)
            surprise = [mu[t] * s - g for s, g in zip(surprise, step, strict=True)]
            weights = [alpha[t] * w for w in weights]
            if t % chunk_size == chunk_size - 1:
                weights = [w + eta[t] * paper.newton_schulz(s) for w, s in zip(weights, surprise, strict=True)]
            outputs.append(gated(weights, slow, q[t]))
        return Result(torch.stack(outputs), weights, momentum=surprise)

    assert_matches(Case("atlas", "arXiv 2505.23735", spec, made.inputs, made.gates, made.parameters, of_head), backend)
