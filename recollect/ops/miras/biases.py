"""Attentional biases: what a memory minimises when it is asked to map a key to a value.

A bias is a loss of the memory's prediction and the value, and that loss' gradient with respect to the prediction. The gradient is
all that an update needs, and it is written out: the outer loop differentiates through it, so where the textbook gradient jumps
(sign, norm) a smooth one stands here, and the loss is its exact integral. Losses of the residual are least at a perfect prediction,
and zero there (`value_shift` aside).

Axis legend: V value dim; leading axes are free. r = prediction - target is the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # |x| is read as sqrt(x^2 + EPS): Miras, Remark 5


class AttentionalBias(NamedTuple):
    """An attentional bias.

    Attributes:
        name: as in `BIASES`.
        loss: (prediction [..., V], target [..., V], **gates) -> [...]; None for a rule that is the gradient of no loss.
        grad: same arguments -> [..., V], the derivative of `loss` with respect to the prediction.
        gates: names of the keyword arguments that both take, each >= 0 and broadcastable to [..., V]; 0 gives finite values too.
        reads: whether the gradient depends on the prediction; if not, writing needs no read.
        options: what its factory was given, for kernels that have some of them built in.
    """

    name: str
    loss: Callable[..., Tensor] | None
    grad: Callable[..., Tensor]
    gates: tuple[str, ...] = ()
    reads: bool = True
    options: tuple[float | str, ...] = ()


def dot_product() -> AttentionalBias:
    """Hebbian: loss -<prediction, target>, gradient -target. The bias of linear attention and its gated kin.

    Source: arXiv 2504.13173, section 4, without its factor 2, which eta absorbs.
    """

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return -(prediction * target).sum(-1)

    def grad(prediction: Tensor, target: Tensor) -> Tensor:
        return (-target).expand_as(prediction)

    return AttentionalBias("dot_product", loss, grad, reads=False)


def l2() -> AttentionalBias:
    """Squared error: loss |r|^2 / 2, gradient r. The bias of the DeltaNet family, Titans and Memora.

    Source: arXiv 2504.13173, section 4.
    """
    return _of_residual("l2", lambda r: r.square().sum(-1) / 2, lambda r: r)


def l1(sharpness: float = 10.0) -> AttentionalBias:
    """Smooth absolute error: loss sum of log cosh(sharpness r) / sharpness, gradient tanh(sharpness r).

    The write is bounded by 1 per channel whatever the error: large errors tell only their sign ("value-less memory").

    Args:
        sharpness: > 0; the gradient is linear for |r| below about 1 / sharpness, a sign above. The paper gives no number.
    Raises:
        ValueError: sharpness is not positive.
    Source: arXiv 2504.13173, Eq. 12 and Remark 5.
    """
    _require_positive("sharpness", sharpness)

    def loss(r: Tensor) -> Tensor:
        log_cosh = torch.logaddexp(sharpness * r, -sharpness * r) - math.log(2)
        return log_cosh.sum(-1) / sharpness

    return _of_residual("l1", loss, lambda r: torch.tanh(sharpness * r), options=(sharpness,))


def lp(p: float = 3.0) -> AttentionalBias:
    """p-th power error: loss sum of (r^2 + eps)^(p/2) / p, less its value at r = 0; gradient r (r^2 + eps)^((p-2)/2).

    The 1/p makes the gradient sign(r) |r|^(p-1), so that eta keeps one scale across p (the paper's factor p is absorbed by eta).
    p > 2 amplifies outliers: bound the values. p near 1 is steep at r = 0 (1000 at p = 1), and gradients through a long text can grow
    without bound: `l1` is the gentler one.

    Args:
        p: exponent >= 1. 2 is `l2`; 3, the default, is Moneta's; 1 is another smoothing of `l1`.
    Raises:
        ValueError: p < 1 (the loss is not convex).
    Source: arXiv 2504.13173, Eq. 10-11; |r| smoothed by eps = 1e-6, Remark 5, at every p and without its tanh.
    """
    if not p >= 1:
        raise ValueError(f"the exponent of lp is at least 1 (below, the loss is not convex); got p={p}")

    def loss(r: Tensor) -> Tensor:
        return ((r.square() + EPS).pow(p / 2) - EPS ** (p / 2)).sum(-1) / p

    def slope(r: Tensor) -> Tensor:
        smoothed = r.square() + EPS
        return r * (smoothed.sqrt() if p == 3 else smoothed.pow(p / 2 - 1))  # a square root costs a tenth of a power

    return _of_residual("lp", loss, slope, options=(p,))


def l_infinity(temperature: float = 0.1) -> AttentionalBias:
    """Smooth largest error: loss temperature * log of the mean of exp(+-r / temperature), a soft maximum of |r|.

    The gradient is the softmax of (r, -r) / temperature, its second half taken from its first: about softmax(|r|) sign(r), all the
    write going to the worst channels, its l1 norm below 1.

    Args:
        temperature: > 0, in units of r; small is close to max |r|, which lies within temperature * log(2V) of the loss.
    Raises:
        ValueError: temperature is not positive.
    Source: ours; arXiv 2504.13173 names p = infinity without a formula.
    """
    _require_positive("temperature", temperature)

    def signed(r: Tensor) -> Tensor:
        return torch.cat([r, -r], -1) / temperature

    def loss(r: Tensor) -> Tensor:
        return temperature * (torch.logsumexp(signed(r), -1) - math.log(2 * r.shape[-1]))

    def grad(r: Tensor) -> Tensor:
        up, down = signed(r).softmax(-1).chunk(2, -1)
        return up - down

    return _of_residual("l_infinity", loss, grad, options=(temperature,))


def huber(kind: str = "coordinate", *, sharpness: float = 10.0) -> AttentionalBias:
    """Huber: squared error up to the threshold `delta`, absolute error beyond. Yaad's bias, in its four readings.

    The gate `delta` >= 0 is broadcastable to [..., V]; every kind but "coordinate" takes its mean over channels. In all but
    "coordinate" one outlying channel affects the step of the others.

    Args:
        kind: "coordinate": each channel on its own, gradient clip(r, -delta, delta) (Eq. 13-14).
            "norm": Huber of |r|, gradient r min(1, delta / |r|) (Eq. 15), |r| smoothed by eps = 1e-6.
            "switch": literally Eq. 16 and 26, r if |r| <= delta, else delta sign(r). The gradient of no loss: its length jumps by
            sqrt(V) at the threshold.
            "switch_rms": the same with |r| / sqrt(V) in the test, which takes the jump away for equal channels.
        sharpness: > 0; sign(r) is read as tanh(sharpness r) by the switches.
    Raises:
        ValueError: unknown kind, or sharpness is not positive.
    Source: arXiv 2504.13173, Eq. 13-16 and 26. The paper's delta has one entry per channel but is compared with a norm; only
        "coordinate" gives both a meaning, hence the default.
    """
    _require_positive("sharpness", sharpness)

    def of_size(size: Tensor, delta: Tensor) -> Tensor:
        """size^2 / 2 below delta, delta (size - delta / 2) above, in one expression."""
        inside = torch.minimum(size, delta)
        return inside * (size - inside / 2)

    def coordinate_loss(r: Tensor, delta: Tensor) -> Tensor:
        return of_size(r.abs(), delta).sum(-1)

    def coordinate_grad(r: Tensor, delta: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(r, delta), -delta)

    def norm_loss(r: Tensor, delta: Tensor) -> Tensor:
        delta = delta.mean(-1, keepdim=True)
        least = torch.full_like(delta, math.sqrt(EPS))  # |r| at r = 0
        return (of_size(_length(r), delta) - of_size(least, delta)).squeeze(-1)

    def norm_grad(r: Tensor, delta: Tensor) -> Tensor:
        return r * (delta.mean(-1, keepdim=True) / _length(r)).clamp(max=1)

    def switch(r: Tensor, delta: Tensor, *, size: Tensor) -> Tensor:
        delta = delta.mean(-1, keepdim=True)
        return torch.where(size <= delta, r, delta * torch.tanh(sharpness * r))

    def switch_grad(r: Tensor, delta: Tensor) -> Tensor:
        return switch(r, delta, size=r.detach().square().sum(-1, keepdim=True).sqrt())

    def switch_rms_grad(r: Tensor, delta: Tensor) -> Tensor:
        return switch(r, delta, size=r.detach().square().mean(-1, keepdim=True).sqrt())

    kinds: dict[str, tuple[Callable[..., Tensor] | None, Callable[..., Tensor]]] = {
        "coordinate": (coordinate_loss, coordinate_grad),
        "norm": (norm_loss, norm_grad),
        "switch": (None, switch_grad),
        "switch_rms": (None, switch_rms_grad),
    }
    if kind not in kinds:
        raise ValueError(f"unknown kind of huber {kind!r}; known kinds: {', '.join(kinds)}")
    return _of_residual("huber", *kinds[kind], gates=("delta",), options=(kind, sharpness))


def pseudo_huber() -> AttentionalBias:
    """Smooth Huber: loss sum of delta^2 (sqrt(1 + (r / delta)^2) - 1), gradient r / sqrt(1 + (r / delta)^2).

    The gate `delta` >= 0, broadcastable to [..., V], bounds the write of each channel; it is taken as at least 1e-6.
    Source: ours, a drop-in for the coordinate-wise Huber of arXiv 2504.13173, Eq. 13.
    """

    def stretch(r: Tensor, delta: Tensor) -> Tensor:
        return (1 + (r / delta.clamp(min=EPS)).square()).sqrt()

    def loss(r: Tensor, delta: Tensor) -> Tensor:
        return (r.square() / (1 + stretch(r, delta))).sum(-1)  # no difference of near numbers where r is small

    return _of_residual("pseudo_huber", loss, lambda r, delta: r / stretch(r, delta), gates=("delta",))


def value_shift() -> AttentionalBias:
    """Robust to a value that an adversary moves by up to `delta`: the worst case of l2, loss |r|^2 / 2 + delta |r| + delta^2 / 2.

    The gradient r + delta r / |r| keeps a length of at least delta away from r = 0; |r| is smoothed by eps = 1e-6, so it is 0 there.
    The gate `delta` >= 0 is broadcastable to [..., V]; its mean over channels is the radius of the shift.
    Source: arXiv 2504.13173, Eq. 17 and the closed form below it.
    """

    def loss(r: Tensor, delta: Tensor) -> Tensor:
        radius, length = delta.mean(-1), (_length(r) - math.sqrt(EPS)).squeeze(-1)
        return r.square().sum(-1) / 2 + radius * length + radius.square() / 2

    def grad(r: Tensor, delta: Tensor) -> Tensor:
        return r + delta.mean(-1, keepdim=True) * r / _length(r)

    return _of_residual("value_shift", loss, grad, gates=("delta",))


BIASES: dict[str, Callable[..., AttentionalBias]] = {
    "dot_product": dot_product,
    "l2": l2,
    "l1": l1,
    "lp": lp,
    "l_infinity": l_infinity,
    "huber": huber,
    "pseudo_huber": pseudo_huber,
    "value_shift": value_shift,
}


def _of_residual(
    name: str,
    loss: Callable[..., Tensor] | None,
    grad: Callable[..., Tensor],
    *,
    gates: tuple[str, ...] = (),
    options: tuple[float | str, ...] = (),
) -> AttentionalBias:
    """The bias whose loss and gradient depend on prediction - target alone."""

    def shifted(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda prediction, target, **values: f(prediction - target, **values)

    return AttentionalBias(name, None if loss is None else shifted(loss), shifted(grad), gates, options=options)


def _length(r: Tensor) -> Tensor:
    """|r| [..., 1], smooth at 0."""
    return (r.square().sum(-1, keepdim=True) + EPS).sqrt()


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive; got {value}")
