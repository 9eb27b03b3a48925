"""Learning rules: how the gradients of the attentional bias become changes D_t of the dual accumulator, Z_t = alpha_t Z_{t-1} + D_t.

`update` is the rule for one token, on whole gradients. `mixture` is the same rule for a chunk of tokens whose gradients are taken at
one point: the recurrence is then linear, so Z_t is a weighted sum of what was carried in and of the chunk's gradients, and only the
weights depend on the rule.

Axis legend: B batch, H heads, C tokens of a chunk, W window, O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.decay import cumulative_log_decay, decay_matrix


class Mixture(NamedTuple):
    """Z_t = keep_t Z_0 + boost_t S_0 - sum_i weights[t, i] g_i and S_C = momentum_keep S_0 - sum_i momentum_weights[i] g_i.

    keep, boost [..., C]; weights [..., C, W - 1 + C]; momentum_keep [...]; momentum_weights [..., W - 1 + C].
    """

    keep: Tensor
    weights: Tensor
    boost: Tensor | None = None
    momentum_keep: Tensor | None = None
    momentum_weights: Tensor | None = None


class LearningRule(NamedTuple):
    """A learning rule.

    Attributes:
        name: as in `RULES`.
        update: (g, gates, S) -> (D, S) for one token; g, D, S have the shape of a matrix, gates broadcast to it. S is None without
            momentum.
        gates: gates that it reads beside eta and alpha ("momentum", "gamma").
        momentum: whether it carries S, of the shape of the dual.
        window: tokens W whose gradients one update takes, the current one included.
        n_steps: updates per token (`multi_step`).
        implicit: the step is taken at the new state (`implicit`).
        n_iterations: Newton-Schulz iterations at a chunk's end (`muon`); 0: the dual changes at every token.
        kind: "gradient"; "least_squares" and "nonparametric" have a scan of their own.
        ridge: of "least_squares".
    """

    name: str
    update: Callable[[Tensor, Mapping[str, Tensor], Tensor | None], tuple[Tensor, Tensor | None]]
    gates: tuple[str, ...] = ()
    momentum: bool = False
    window: int = 1
    n_steps: int = 1
    implicit: bool = False
    n_iterations: int = 0
    kind: str = "gradient"
    ridge: float = 0.0


def gd() -> LearningRule:
    """Gradient descent: D_t = -eta_t g_t."""
    return LearningRule("gd", _descend)


def momentum() -> LearningRule:
    """Gradient descent with momentum: S_t = mu_t S_{t-1} - eta_t g_t, D_t = S_t.

    Source: Titans, arXiv 2501.00663, Eq. 13-14 (alpha here is what is kept, there what is forgotten).
    """
    return LearningRule("momentum", _accelerate, gates=("momentum",), momentum=True)


def multi_step(n_steps: int = 2) -> LearningRule:
    """`n_steps` descents per token, each on a key and value of its own: k [B, T, n, H, K], v [B, T, n, H, V], eta [B, T, n, H].

    With chunk_size 1 every step takes its gradient where the one before has led; with more, those of a chunk's tokens share one point.

    Args:
        n_steps: at least 1.
    Raises:
        ValueError: n_steps < 1.
    Source: DeltaProduct, arXiv 2502.10297.
    """
    if n_steps < 1:
        raise ValueError(f"multi_step takes at least one step per token; got {n_steps}")
    return LearningRule("multi_step", _descend, n_steps=n_steps)


def implicit() -> LearningRule:
    """The step taken at the new state: argmin over M of |M k - v|^2 weighted by eta, plus |M - M_{t-1}|^2.

    For a matrix memory with the l2 bias it is gradient descent with eta / (1 + eta |k|^2), stable for every eta; eta may be one
    number per value channel. Source: Longhorn, arXiv 2407.14207, Theorem 3.1.
    """
    return LearningRule("implicit", _descend, implicit=True)


def omega(window: int = 4) -> LearningRule:
    """Descent on the last `window` tokens: D_t = -eta_t sum over i in (t - window, t] of gamma_i g_i.

    The gate gamma [B, T, H] weighs a token in all the updates that it takes part in (1 if it is not given).

    Args:
        window: the current token included, at least 1; a document's first tokens have fewer.
    Raises:
        ValueError: window < 1.
    Source: Atlas, arXiv 2505.23735, section 4.
    """
    if window < 1:
        raise ValueError(f"the window counts tokens, the current one included: at least 1; got {window}")
    return LearningRule("omega", _descend, gates=("gamma",), window=window)


def muon(n_iterations: int = 5, window: int = 1) -> LearningRule:
    """Orthogonalised momentum: S_t = mu_t S_{t-1} - sum of gamma_i g_i over the window; at a chunk's end Z = keep Z_0 + eta_C NS(S).

    NS is `newton_schulz`, eta_C the gate at the chunk's last token; until then tokens read Z_0, decayed by their alphas. With
    chunk_size 1 and gamma this is Atlas' update.

    Args:
        n_iterations: of Newton-Schulz, at least 1.
        window: as in `omega`.
    Raises:
        ValueError: either is below 1.
    Source: Muon, Jordan et al. 2024; Atlas, arXiv 2505.23735; per chunk: LaCT, arXiv 2505.23884.
    """
    if n_iterations < 1 or window < 1:
        raise ValueError(f"muon has n_iterations >= 1 and window >= 1; got {n_iterations} and {window}")
    return LearningRule("muon", _gather, gates=("momentum", "gamma"), momentum=True, window=window, n_iterations=n_iterations)


def least_squares(ridge: float = 1.0) -> LearningRule:
    """Recursive least squares: M_t minimises the alpha-discounted sum of eta_i |M k_i - v_i|^2 plus ridge |M|^2, exactly.

    Args:
        ridge: > 0; it does not decay with alpha.
    Raises:
        ValueError: ridge is not positive.
    Source: Mesa layer, arXiv 2309.05858 and 2506.05233.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, or M is not determined by few keys; got {ridge}")
    return LearningRule("least_squares", _no_update, kind="least_squares", ridge=ridge)


def nonparametric() -> LearningRule:
    """No parameters are fitted: the read is the Nadaraya-Watson estimate over all pairs, softmax attention."""
    return LearningRule("nonparametric", _no_update, kind="nonparametric")


def mixture(
    rule: LearningRule,
    log_alpha: Tensor,
    eta: Tensor,
    *,
    log_momentum: Tensor | None = None,
    real: Tensor | None = None,
) -> Mixture:
    """The weights of a chunk, for gates that are one number per head.

    Args:
        rule: gd, multi_step, momentum or omega.
        log_alpha, eta, log_momentum: logarithms <= 0, eta >= 0; [..., C], 0 at slots without a token. No log_momentum: zeros.
        real: bool [..., C], False at slots without a token; None: all True. Only momentum reads it.
    Source: arXiv 2504.13173, Eq. 28; momentum: arXiv 2501.00663, Eq. 16-18.
    """
    c = cumulative_log_decay(log_alpha, dim=-1)
    keep, decay = c.exp(), decay_matrix(c)
    if rule.momentum:
        zero = torch.zeros_like(log_alpha)
        slowing = cumulative_log_decay(zero if log_momentum is None else log_momentum, dim=-1)
        entered = decay if real is None else decay * real.unsqueeze(-2)
        momentum_keep = slowing.exp()
        pulled = decay_matrix(slowing) * eta.unsqueeze(-2)
        boost = (entered @ momentum_keep.unsqueeze(-1)).squeeze(-1)
        return Mixture(keep, entered @ pulled, boost, momentum_keep[..., -1], pulled[..., -1, :])
    weights = decay * eta.unsqueeze(-2)
    if rule.window > 1:
        weights = weights @ _band(eta.shape[-1], rule.window, weights)
    return Mixture(keep, weights)


def newton_schulz(s: Tensor, n_iterations: int = 5) -> Tensor:
    """`s` with its singular values pushed towards 1, vectors kept.

    Args:
        s: [..., O, I], of any scale: values count relative to each matrix' norm, the root of their squares' sum.
        n_iterations: after 5, values of at least 0.002 of the norm lie between 0.68 and 1.21; smaller ones grow 3.4445-fold each.
    Returns:
        [..., O, I]; zeros for a matrix of zeros.
    Source: Jordan et al. 2024 (Muon), the quintic with coefficients (3.4445, -4.7750, 2.0315); their 1e-7 on the norm is here 1e-14 on
    its square, smooth at 0.
    """
    tall = s.shape[-2] > s.shape[-1]
    x = s.mT if tall else s
    x = x / (x.square().sum((-2, -1), keepdim=True) + 1e-14).sqrt()
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def _band(n_tokens: int, window: int, like: Tensor) -> Tensor:
    """[C, W - 1 + C]: 1 where token j - (W - 1) is among the last W tokens of t."""
    behind = torch.arange(n_tokens, device=like.device)[:, None] + (window - 1)
    behind = behind - torch.arange(window - 1 + n_tokens, device=like.device)
    return ((behind >= 0) & (behind < window)).to(like.dtype)


def _descend(g: Tensor, gates: Mapping[str, Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return -gates["eta"] * g, None


def _accelerate(g: Tensor, gates: Mapping[str, Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert s is not None
    s = gates["momentum"] * s - gates["eta"] * g
    return s, s


def _gather(g: Tensor, gates: Mapping[str, Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert s is not None
    return torch.zeros_like(g), gates["momentum"] * s - g


def _no_update(g: Tensor, gates: Mapping[str, Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
    raise AssertionError("this rule has a scan of its own")


RULES: dict[str, Callable[..., LearningRule]] = {
    "gd": gd,
    "momentum": momentum,
    "multi_step": multi_step,
    "implicit": implicit,
    "omega": omega,
    "muon": muon,
    "least_squares": least_squares,
    "nonparametric": nonparametric,
}
