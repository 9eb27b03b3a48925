"""Retentions: how a memory keeps what it holds while it takes in what is new.

Every retention of Miras is a recurrence of one form, linear in a dual accumulator Z, and a map from Z to the weights W:

    Z_t = alpha_t Z_{t-1} + D_t,    W_t = link(Z_t)

with D_t from the learning rule (-eta_t g_t for gradient descent). What Z is depends on the retention: the weights themselves (l2),
logits (KL, Bregman), the running sum of gradients (FTRL forms). Where no such form exists (f-divergences, the local elastic net), Z
moves linearly inside a chunk and `settle` takes the non-linear step at its end; with one token per chunk that is the exact update.

`frame` is how weights are read inside a chunk without building one matrix per token: a linear function of what Z has gained.

Axis legend: B batch, H heads, O rows (outputs) and I columns (inputs, fan-in) of a matrix. Every map acts on each matrix alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-8  # added to l_q norms


class Frame(NamedTuple):
    """Weights inside a chunk, as a linear function of Z_t = decay Z_anchor + gained, `decay` being the product of alphas since.

    W_t is read as decay * moving + fixed + scale * gained, with `gained` less its row means if `centred`.

    Attributes:
        moving: [B, H, O, I], what decays with Z.
        fixed: [H, O, I] or [B, H, O, I], what does not; None: 0.
        scale: [B, H, 1, 1] or [1, 1, 1, 1], one factor per matrix; None: 1.
        centred: whether rows of what is gained are taken from their means.
        even: whether `fixed` is one number everywhere. Where a norm follows, a scan leaves such an offset out: it would cancel,
            and take digits with it.
    """

    moving: Tensor
    fixed: Tensor | None = None
    scale: Tensor | None = None
    centred: bool = False
    even: bool = False

    def weights(self, decay: Tensor | float, gained: Tensor) -> Tensor:
        """The weights this frame reads, [B, H, O, I], for one token; a scan multiplies queries by them without building them.

        Args:
            decay: broadcastable to [B, H, O, I].
            gained: [B, H, O, I], Z_t - decay Z_anchor.
        """
        gained = gained - gained.mean(-1, keepdim=True) if self.centred else gained
        gained = gained if self.scale is None else gained * self.scale
        kept = self.moving * decay
        return kept + gained if self.fixed is None else kept + self.fixed + gained


Gates = Mapping[str, Tensor]
Link = Callable[[Tensor, Tensor], Tensor]  # (Z [B, H, O, I], initial [H, O, I]) -> W [B, H, O, I]
Settle = Callable[[Tensor, Tensor, "Tensor | int"], Tensor]  # (Z_anchor, Z_t, n tokens since: int or int [B]) -> Z [B, H, O, I]


def _identity(z: Tensor, initial: Tensor) -> Tensor:
    return z


def _as_given(initial: Tensor) -> Tensor:
    return initial


def _read_directly(anchor: Tensor, initial: Tensor) -> Frame:
    return Frame(anchor)


class Retention(NamedTuple):
    """A retention. `initial` [H, O, I] is what is learned of a matrix: its dual before the first token.

    Attributes:
        name: as in `RETENTIONS`.
        link: (Z [B, H, O, I], initial) -> weights [B, H, O, I].
        start: initial -> Z_0 [H, O, I].
        frame: (Z_anchor [B, H, O, I], initial) -> Frame, the read inside the chunk that Z_anchor begins.
        settle: (Z_anchor, Z_t, n) -> Z, the non-linear step at the end of a chunk, n tokens (int, or int [B]) after its beginning;
            n = 0 changes nothing. None: identity. The weights at token t, exactly, are link(settle(Z_anchor, Z_t, n_t)).
        exact: whether the frame reads exactly these at every token.
        decays: whether an alpha gate has a meaning; if not, alpha is 1.
        row_constant: whether alpha must be the same for all inputs I of a row.
        options: what its factory was given, for kernels that have some of them built in.
        couple: gates -> gates, for a retention that derives some gates from others; None: identity.
    """

    name: str
    link: Link = _identity
    start: Callable[[Tensor], Tensor] = _as_given
    frame: Callable[[Tensor, Tensor], Frame] = _read_directly
    settle: Settle | None = None
    exact: bool = True
    decays: bool = True
    row_constant: bool = False
    couple: Callable[[Gates], dict[str, Tensor]] | None = None
    options: tuple[float | str | None, ...] = ()


# --- l2 and its kin: Z is the memory ----------------------------------------------------------------------------------------


def none() -> Retention:
    """Keep everything: W_t = W_{t-1} - eta g. The step that minimises <W, g> + |W - W_{t-1}|^2 / (2 eta).

    Source: arXiv 2504.13173, Eq. 5.
    """
    return Retention("none", decays=False)


def l2() -> Retention:
    """Decay: W_t = alpha W_{t-1} - eta g, alpha and eta independent gates. Yaad's and Titans' retention.

    Source: arXiv 2504.13173, section 4 and Eq. 26.
    """
    return Retention("l2")


def l2_coupled(beta: float = 1.0) -> Retention:
    """Local and global l2 with one gate: W_t minimises <W, g> + |W - W_{t-1}|^2 / (2 theta) + |W|^2 / beta.

    Hence alpha = beta / (beta + 2 theta) and eta = theta alpha: a larger step forgets more. The gate "eta" is read as theta.

    Args:
        beta: > 0; large keeps more.
    Raises:
        ValueError: beta is not positive; from `couple`, if the gates have an alpha of their own or no eta.
    Source: arXiv 2504.13173, section 5.3, before the gates are decoupled.
    """
    _require(beta > 0, f"beta must be positive; got {beta}")

    def couple(gates: Gates) -> dict[str, Tensor]:
        given = {"alpha", "log_alpha"} & gates.keys()
        _require("eta" in gates, "retention 'l2_coupled' derives alpha from the gate 'eta': pass it")
        _require(not given, f"retention 'l2_coupled' derives alpha from eta: drop the gate {', '.join(sorted(given))}")
        log_alpha = -torch.log1p(2 * gates["eta"] / beta)
        return {**gates, "eta": gates["eta"] * log_alpha.exp(), "log_alpha": log_alpha}

    return Retention("l2_coupled", couple=couple)


def towards_initial() -> Retention:
    """Decay towards the learned initial weights instead of zero: W_t = W_0 + alpha (W_{t-1} - W_0) - eta g; Z is W - W_0.

    Source: ours; global retention |W - W_0|^2 in the terms of arXiv 2504.13173, section 3.3.
    """

    def link(z: Tensor, initial: Tensor) -> Tensor:
        return initial + z

    def frame(anchor: Tensor, initial: Tensor) -> Frame:
        return Frame(anchor, fixed=initial)

    return Retention("towards_initial", link, torch.zeros_like, frame)


# --- the scaled simplex: rows of positive weights with a fixed sum ----------------------------------------------------------


def kl(scale: float | None = None) -> Retention:
    """KL to the previous weights and entropy, on rows of positive weights that sum to c: Z are logits, W = c softmax(Z) per row.

    Equals W_t = c softmax(alpha log W_{t-1} - eta g) for alpha constant along a row, the logarithm never being taken. Memora's.

    The frame is first order about equal weights: W_t is read as c/I + decay (W_anchor - c/I) + c/I (gained less its row means), which
    keeps the row sums. Its error grows as the logits move away from zero: keep the alphas of a chunk near 1 in product.

    Args:
        scale: c, the sum of a row; None: its length I, so that the mean weight is 1.
    Raises:
        ValueError: scale is not positive.
    Source: arXiv 2504.13173, Eq. 19-21 and 27. Rows over the fan-in, c and the read inside a chunk are ours; the paper leaves them
        open, except that it reads linearly after one exact "lag" token, where the linear recurrence may leave the simplex.
    """
    _require(scale is None or scale > 0, f"scale is the sum of a row, positive; got {scale}")

    def link(z: Tensor, initial: Tensor) -> Tensor:
        return _total(scale, z) * z.softmax(-1)

    def frame(anchor: Tensor, initial: Tensor) -> Frame:
        mean = _total(scale, anchor) / anchor.shape[-1]
        fixed = torch.full_like(initial, mean)
        return Frame(link(anchor, initial) - mean, fixed, _mean_weight(scale, anchor), centred=True, even=True)

    return Retention("kl", link, frame=frame, exact=False, row_constant=True, options=(scale,))


def f_divergence(kind: str | Divergence = "chi2", scale: float | None = None) -> Retention:
    """f-divergence to the previous weights, on rows of positive weights that sum to c: Z are the weights.

    W_t minimises <W, eta g> + sum of W' f(W / W') over the row, W' = W_{t-1}: W_t = W' (f')^{-1}(-eta g - zeta), zeta such that the
    row sums to c. Inside a chunk steps add up and are read as for `kl`; the chunk's end takes one such step with their sum. A
    learned initial is read as logits, W_0 = c softmax(initial). There is no alpha.

    Args:
        kind: the divergence, normalised to f''(1) = 1 so that eta keeps one scale:
            "kl": f = x log x; the update of `kl` with alpha = 1.
            "reverse_kl": f = -log x; weights fall as 1 / (1 + step), never fast to zero.
            "hellinger": f = 2 (sqrt(x) - 1)^2; between the two.
            "jensen_shannon": f = 2 x log x - 2 (1 + x) log((1 + x) / 2).
            "chi2": f = (x - 1)^2 / 2; the step is linear and weights can reach zero, where they stay: hard forgetting.
            Or any other, as a `Divergence`.
        scale: c, the sum of a row; None: its length I.
    Raises:
        ValueError: unknown kind, or scale is not positive.
    Source: arXiv 2504.13173, Eq. 18. Where f'(0) is finite (chi2) W >= 0 binds, which Eq. 18 does not treat: the inverse is 0 there.
    """
    if isinstance(kind, str) and kind not in DIVERGENCES:
        raise ValueError(f"unknown f-divergence {kind!r}; known: {', '.join(DIVERGENCES)}, or a Divergence of your own")
    _require(scale is None or scale > 0, f"scale is the sum of a row, positive; got {scale}")
    divergence = DIVERGENCES[kind] if isinstance(kind, str) else kind

    def start(initial: Tensor) -> Tensor:
        return _total(scale, initial) * initial.softmax(-1)

    def frame(anchor: Tensor, initial: Tensor) -> Frame:
        return Frame(anchor, scale=_mean_weight(scale, anchor), centred=True)

    def settle(anchor: Tensor, z: Tensor, n: Tensor | int) -> Tensor:
        return torch.where(_per_row(n, z) > 0, _simplex_step(divergence, anchor, z - anchor, _total(scale, z)), z)

    return Retention("f_divergence", start=start, frame=frame, settle=settle, exact=False, decays=False)


class Divergence(NamedTuple):
    """The generator f of an f-divergence, seen from its inverse derivative; f''(1) = 1.

    Attributes:
        ratio: y -> x, where y = constant - f'(x): decreasing and convex.
        give: x -> 1 / f''(x), by how much `ratio` falls with y.
        one: the y of x = 1.
        pole: the y at which x is infinite; -inf if there is none.
    """

    ratio: Callable[[Tensor], Tensor]
    give: Callable[[Tensor], Tensor]
    one: float
    pole: float


DIVERGENCES = {
    "kl": Divergence(lambda y: torch.exp(-y), lambda x: x, 0.0, -math.inf),
    "reverse_kl": Divergence(torch.reciprocal, torch.square, 1.0, 0.0),
    "hellinger": Divergence(lambda y: 4 / y.square(), lambda x: x.pow(1.5), 2.0, 0.0),
    "jensen_shannon": Divergence(
        lambda y: torch.exp(-y / 2) / -torch.expm1(-y / 2), lambda x: x * (1 + x) / 2, 2 * math.log(2), 0.0
    ),
    "chi2": Divergence(lambda y: F.relu(1 - y), lambda x: (x > 0).to(x.dtype), 0.0, -math.inf),
}


def _simplex_step(divergence: Divergence, weights: Tensor, step: Tensor, total: float) -> Tensor:
    """argmin over rows of W >= 0 that sum to `total` of -<W, step> + sum of weights f(W / weights), and its exact gradient.

    W = weights ratio(zeta + gap), gap >= 0 being how far an entry's step is behind the largest of its row. The row sum falls with
    zeta, which a fixed number of bisections finds; one Newton step at the root, of value zero, then carries the implicit gradient.
    """
    gap = step.detach().amax(-1, keepdim=True) - step

    def row_sum(zeta: Tensor) -> Tensor:
        return (weights * divergence.ratio(zeta + gap)).sum(-1, keepdim=True)

    with torch.no_grad():
        high = torch.full_like(gap[..., :1], divergence.one)  # every ratio is at most 1: the sum is not above total
        low = (divergence.one - gap.amax(-1, keepdim=True)).clamp(min=divergence.pole)  # nor below it here
        for _ in range(70 if gap.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            above = row_sum(middle) > total
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        fall = (weights * divergence.give(divergence.ratio(high + gap))).sum(-1, keepdim=True)
    mass = row_sum(high)
    zeta = high + (mass - mass.detach()) / fall
    return weights * divergence.ratio(zeta + gap)


# --- elastic nets: forgetting to exactly zero -------------------------------------------------------------------------------


def elastic_net(gamma: float = 1e-3) -> Retention:
    """Decay and soft threshold: W_t = S(alpha W_{t-1} - eta g), S shrinking every weight by gamma and small ones to zero.

    It minimises <W, g> + |W - W_{t-1}|^2 / (2 s) + |W|^2 / (2 b) + |W|_1 / a with alpha = b / (b + s), eta = s alpha and
    gamma = eta / a. Inside a chunk only the decay acts, which is also what is read; its end takes the threshold n gamma of its n
    tokens at once.

    Args:
        gamma: >= 0, in units of weights per token.
    Raises:
        ValueError: gamma is negative.
    Source: arXiv 2504.13173, Eq. 22, with the exact threshold; the paper's arctan surrogate never reaches zero.
    """
    _require(gamma >= 0, f"gamma is a threshold, at least 0; got {gamma}")

    def settle(anchor: Tensor, z: Tensor, n: Tensor | int) -> Tensor:
        n = _per_row(n, z)
        return torch.where(n > 0, soft_threshold(z, n.to(z.dtype) * gamma), z)

    return Retention("elastic_net", settle=settle, exact=False, options=(gamma,))


def elastic_net_ftrl(gamma: float = 1e-3) -> Retention:
    """Soft threshold of the running sum of gradients: Z_t = alpha Z_{t-1} - eta g, W_t = S(Z_t), which shrinks by gamma.

    With alpha = 1 it minimises <W, sum of g> + |W|^2 / (2 eta) + |W|_1 / a with gamma = eta / a. Weights at zero keep their sum and
    can come back. The frame keeps the weights above the threshold at the anchor as they are and gives what is gained its mean
    slope, the fraction of weights above.

    Args:
        gamma: >= 0, in units of Z.
    Raises:
        ValueError: gamma is negative.
    Source: arXiv 2504.13173, Eq. 23, with the 1/2 that is missing there; alpha != 1 is ours (dual averaging with decay).
    """
    _require(gamma >= 0, f"gamma is a threshold, at least 0; got {gamma}")

    def link(z: Tensor, initial: Tensor) -> Tensor:
        return soft_threshold(z, gamma)

    def frame(anchor: Tensor, initial: Tensor) -> Frame:
        above = (anchor.abs() > gamma).to(anchor.dtype)
        return Frame(above * anchor, fixed=-gamma * above * anchor.sign(), scale=above.mean((-2, -1), keepdim=True))

    return Retention("elastic_net_ftrl", link, frame=frame, exact=False)


def soft_threshold(z: Tensor, gamma: Tensor | float) -> Tensor:
    """sign(z) max(0, |z| - gamma), element by element.

    Args:
        z: any shape.
        gamma: >= 0, broadcastable to z.
    Source: arXiv 2504.13173, Eq. 22-23, S_gamma.
    """
    if isinstance(gamma, Tensor):
        return z - torch.clamp(z, -gamma, gamma)
    return z - z.clamp(-gamma, gamma)


# --- mirror maps ------------------------------------------------------------------------------------------------------------


def lq(q: float = 4.0, mode: str = "safe", *, radius: float | None = None) -> Retention:
    """l_q stability: Z is a decaying sum of gradients, W a map of it whose scale depends on its l_q norm. Moneta's retention.

    Norms are taken per matrix and head. The frame of "paper" and "safe" freezes the factor W / Z at the anchor; that of "ftrl" keeps
    the anchor's weights (the map is homogeneous) and gives what is gained the mean slope.

    Args:
        q: exponent, > 1 for "ftrl", in [2, 5] for "paper", >= 2 for "safe". 2 is `l2` in every mode. 4 is Moneta's.
        mode: "safe": W = Z min(1, (rho / |Z|_q)^(q-2)): identity until the memory outgrows rho, then shrinking as in the paper.
            "paper": W = Z / |Z|_q^(q-2), literally Eq. 24. For q > 3 it inverts scale: as Z decays, W grows. Keep alpha >= 0.99.
            "ftrl": W = Z |Z|^(q-2) / m^(q-2), m the q-mean of |Z|: what minimises -<W, Z> + a multiple of |W|_r^2 with r = q/(q-1),
            that is what the regulariser behind the paper's formula gives; q is the dual exponent, q = 4 meaning r = 4/3.
        radius: rho of "safe"; None: |initial|_q. A memory that starts at zero needs one, or it stays there.
    Raises:
        ValueError: an argument out of range.
    Source: arXiv 2504.13173, Variant 4 of section 4 and Eq. 24, which drops the |Z|^(q-2) of the minimiser in its numerator.
        "safe", the mean instead of the sum in "ftrl", and eps = 1e-8 added to norms are ours.
    """
    if mode not in ("safe", "paper", "ftrl"):
        raise ValueError(f"unknown mode of lq {mode!r}; known modes: safe, paper, ftrl")
    least = "more than 1" if mode == "ftrl" else "at least 2"
    _require(q > 1 if mode == "ftrl" else q >= 2, f"q is {least} in mode {mode!r}; got {q}")
    _require(q <= 5 or mode != "paper", f"q is at most 5 in mode 'paper', or powers of eps leave the range of fp32; got {q}")
    _require(
        radius is None or (radius > 0 and mode == "safe"), f"radius is positive and for mode 'safe'; got {radius} with {mode!r}"
    )

    def factor(z: Tensor, initial: Tensor) -> Tensor:
        """W / Z [..., 1, 1] of "paper" and "safe"."""
        norm = q_norm(z, q) + NORM_EPS
        if mode == "paper":
            return norm.pow(2 - q)
        rho = q_norm(initial, q) + NORM_EPS if radius is None else radius
        return (rho / norm).clamp(max=1).pow(q - 2)

    def scaled(z: Tensor, initial: Tensor) -> Tensor:
        return z * factor(z, initial)

    def scaled_frame(anchor: Tensor, initial: Tensor) -> Frame:
        frozen = factor(anchor, initial)
        return Frame(anchor * frozen, scale=frozen)

    def mirrored(z: Tensor, initial: Tensor) -> Tensor:
        size = q_mean(z)
        return size * (z / size) * power(z / size)

    def mirrored_frame(anchor: Tensor, initial: Tensor) -> Frame:
        slope = (q - 1) * power(anchor / q_mean(anchor)).mean((-2, -1), keepdim=True)
        return Frame(mirrored(anchor, initial), scale=slope)

    def q_mean(z: Tensor) -> Tensor:
        return q_norm(z, q) / (z.shape[-2] * z.shape[-1]) ** (1 / q) + NORM_EPS

    def power(unit: Tensor) -> Tensor:
        """|unit|^(q-2); the term inside keeps its gradient finite at zero and changes nothing above 1e-12."""
        return (unit.square() + 1e-24).pow(q / 2 - 1)

    link, frame = (mirrored, mirrored_frame) if mode == "ftrl" else (scaled, scaled_frame)
    return Retention("lq", link, frame=frame, exact=q == 2, options=(q, mode, radius))


def q_norm(z: Tensor, q: float) -> Tensor:
    """The l_q norm of each matrix; no overflow or underflow of the powers, gradient 0 at z = 0.

    Args:
        z: [..., O, I].
        q: exponent, > 1 (finite).
    Returns:
        [..., 1, 1].
    """
    largest = torch.linalg.vector_norm(z.detach(), torch.inf, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    unit = z / largest
    powers = unit.square().square() if q == 4 else unit.abs().pow(q)  # Moneta's, a third of the time
    return largest * powers.sum((-2, -1), keepdim=True).clamp(min=1).pow(1 / q)  # the sum is at least 1, unless z = 0


def logit() -> Retention:
    """Bregman divergence of the binary entropy: weights in (0, 1), Z their logits: logit W_t = alpha logit W_{t-1} - eta g.

    The frame is exact in the decay of its mean only: W_t is read as 1/2 + decay (W_anchor - 1/2) + slope * gained, with the mean
    slope of the sigmoid over the matrix.

    Source: arXiv 2504.13173, Variant 5 (alpha = 1); alpha is the weight of a global binary entropy, as for `kl`.
    """

    def link(z: Tensor, initial: Tensor) -> Tensor:
        return z.sigmoid()

    def frame(anchor: Tensor, initial: Tensor) -> Frame:
        weights = anchor.sigmoid()
        slope = (weights * (1 - weights)).mean((-2, -1), keepdim=True)
        return Frame(weights - 0.5, fixed=torch.full_like(initial, 0.5), scale=slope)

    return Retention("logit", link, frame=frame, exact=False)


RETENTIONS: dict[str, Callable[..., Retention]] = {
    "none": none,
    "l2": l2,
    "l2_coupled": l2_coupled,
    "towards_initial": towards_initial,
    "kl": kl,
    "f_divergence": f_divergence,
    "elastic_net": elastic_net,
    "elastic_net_ftrl": elastic_net_ftrl,
    "lq": lq,
    "logit": logit,
}


def _total(scale: float | None, rows: Tensor) -> float:
    """The sum c of a row."""
    return float(rows.shape[-1]) if scale is None else scale


def _mean_weight(scale: float | None, rows: Tensor) -> Tensor | None:
    """c / I, the scale of a frame; None where it is 1."""
    return None if scale is None else rows.new_full((1, 1, 1, 1), scale / rows.shape[-1])


def _per_row(n: Tensor | int, like: Tensor) -> Tensor:
    """An int, or an int per row of the batch [B], as [1 or B, 1, 1, 1]."""
    return torch.as_tensor(n, device=like.device).reshape(-1, 1, 1, 1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
