"""What the layers around a recurrence are made of: short convolution, low-rank map, norm per head, l2 normalisation.

Axis legend: B batch, T time, H heads, V channels of a head, C channels, W width of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in fp32, those in fp64 as they are."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def draw(linear: nn.Linear, *, gain: float = 1.0) -> None:
    """Fill a linear map: weight normal with std gain / sqrt(inputs), cut at 3 std, as the attention mixers; bias zero."""
    std = gain * linear.in_features**-0.5
    nn.init.trunc_normal_(linear.weight, std=std, a=-3 * std, b=3 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def l2_normalize(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis, in fp32 (fp64 for fp64), returned in x's dtype; smooth at 0."""
    (wide,) = exact(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time: y_t = activation(sum_j weight[:, W - 1 - j] x_{t - j} + bias).

    Padding and what precedes the document count as zeros. Sums are in fp32 (fp64 for fp64).

    Args:
        channels: C.
        width: taps W >= 1, the token's own included.
        activation: "silu" or None.
        bias: whether there is one (Mamba has it).
    """

    def __init__(self, channels: int, width: int = 4, activation: str | None = "silu", *, bias: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a short convolution needs at least one tap; got width={width}")
        if activation not in ("silu", None):
            raise ValueError(f"activation is 'silu' or None; got {activation!r}")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform on (-1/sqrt(W), 1/sqrt(W)), PyTorch's rule for a depthwise convolution, which the original layers keep."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_state(self, batch_size: int) -> Tensor:
        """The cache before the first token: zeros [B, W - 1, C]."""
        channels, width = self.weight.shape
        return self.weight.new_zeros(batch_size, width - 1, channels)

    def forward(
        self, x: Tensor, cached: Tensor | None = None, valid: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve a piece.

        Args:
            x: [B, T, C].
            cached: [B, W - 1, C], the inputs before the piece; None: zeros.
            valid: bool [B, T], False at padding; None: no padding. reset: bool [B, T], True where a document starts; None: nowhere.
        Returns:
            y [B, T, C] in x's dtype (0 before the activation and without bias at leading padding), and the next cache, which
            keeps inputs of the current document only.
        """
        n_tokens, width = x.shape[1], self.weight.shape[1]
        if valid is not None:
            x = torch.where(valid[..., None], x, 0.0)
        before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if cached is None else cached.to(x.dtype)
        inputs = torch.cat((before, x), dim=1)
        segment = None if reset is None else F.pad(reset.cumsum(dim=1), (width - 1, 0))[..., None]
        wide, weight = exact(inputs, self.weight)
        y = wide[:, width - 1 :] * weight[:, -1]
        for back in range(1, width):
            here = slice(width - 1 - back, width - 1 - back + n_tokens)
            past = wide[:, here]
            if segment is not None:
                past = torch.where(segment[:, here] == segment[:, width - 1 :], past, 0.0)
            y = torch.addcmul(y, past, weight[:, width - 1 - back])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.activation is not None:
            y = ACTIVATIONS[self.activation](y)
        kept = inputs[:, n_tokens:]
        if segment is not None:
            kept = torch.where(segment[:, n_tokens:] == segment[:, -1:], kept, 0.0)
        return y.to(x.dtype), kept.contiguous()


def shift_back(x: Tensor, cached: Tensor, valid: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The input one token earlier, 0 at the first token of a document.

    Args:
        x: [B, T, D]. cached: [B, 1, D], the input before the piece.
        valid: bool [B, T], False at padding, which counts as 0. reset: bool [B, T], True where a document starts. None: nowhere.
    Returns:
        [B, T, D], and the next cache.
    """
    if valid is not None:
        x = torch.where(valid[..., None], x, 0.0)
    before = torch.cat((cached.to(x.dtype), x[:, :-1]), dim=1)
    if reset is not None:
        before = torch.where(reset[..., None], 0.0, before)
    return before, x[:, -1:].clone()


class Constant(nn.Module):
    """Learned numbers that are the same whatever the input: a `LowRank` of rank 0.

    Args:
        out: how many.
        bias: their initial value.
    """

    def __init__(self, out: int, *, bias: float) -> None:
        super().__init__()
        self.initial = bias
        self.bias = nn.Parameter(torch.empty(out))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All at the initial value."""
        nn.init.constant_(self.bias, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., out]."""
        return self.bias.expand(*x.shape[:-1], -1)


class LowRank(nn.Module):
    """up(activation(down(x))) + bias: a map through `rank` channels that starts as the constant `bias`.

    Args:
        dim, rank, out: sizes of input, middle and output.
        bias: initial bias, a number or one per output; None: no bias.
        activation: of the middle: "tanh", "sigmoid", "silu", "relu" or None.
        gain: std of the initial up weight times sqrt(rank); 0 starts as a constant.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        out: int,
        *,
        bias: float | list[float] | None = 0.0,
        activation: str | None = None,
        gain: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(bias, list) and len(bias) != out:
            raise ValueError(f"initial bias needs one number per output: {len(bias)} numbers for {out} outputs")
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation is None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.initial, self.activation, self.gain = bias, activation, gain
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias is not None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Down as every projection, up with `gain`, the bias as given."""
        draw(self.down)
        if self.gain:
            draw(self.up, gain=self.gain)
        else:
            nn.init.zeros_(self.up.weight)
        if isinstance(self.initial, list):
            bias = self.up.bias
            bias.copy_(torch.tensor(self.initial, dtype=torch.float64, device="cpu").to(bias.dtype))
        elif self.initial is not None:
            nn.init.constant_(self.up.bias, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., out]."""
        middle = self.down(x)
        return self.up(middle if self.activation is None else ACTIVATIONS[self.activation](middle))


class HeadNorm(nn.Module):
    """RMS norm of every head's channels, times a weight shared by the heads, times an activation of a gate if one is given.

    On [B, T, H V] it is the norm of all heads together.

    Args:
        head_dim: V.
        eps: added to the mean square.
        gate: activation of the gate, "silu" or "sigmoid".
        affine: whether there is a weight.
    """

    def __init__(self, head_dim: int, *, eps: float = 1e-5, gate: str = "silu", affine: bool = True) -> None:
        super().__init__()
        if gate not in ("silu", "sigmoid"):
            raise ValueError(f"gate is 'silu' or 'sigmoid'; got {gate!r}")
        self.eps, self.gate = eps, gate
        self.weight = nn.Parameter(torch.empty(head_dim)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., V] and gate [..., V] -> [..., V] in x's dtype; in fp32 (fp64 for fp64)."""
        (wide,) = exact(x)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.to(y.dtype)
        if gate is not None:
            y = y * ACTIVATIONS[self.gate](*exact(gate))
        return y.to(x.dtype)


@runtime_checkable
class Resettable(Protocol):
    """A module that knows how its parameters start."""

    def reset_parameters(self) -> None: ...


def reset(module: nn.Module) -> None:
    """Fresh parameters for every part of `module`, in the order of registration; linear maps by `draw`."""
    for part in module.children():
        if isinstance(part, nn.Linear):
            draw(part)
        elif isinstance(part, Resettable):
            part.reset_parameters()
        elif isinstance(part, nn.ModuleDict):
            reset(part)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with log(1 + exp(x)) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


@torch.no_grad()
def draw_time_steps(bias: Tensor, *, low: float = 1e-3, high: float = 0.1) -> None:
    """Fill a bias so that softplus(bias) is log-uniform on (low, high).

    Source: the released code of Mamba (arXiv 2312.00752, section 3.6 and appendix), kept by Mamba-2 and Gated DeltaNet.
    """
    bias.uniform_(math.log(low), math.log(high))
    bias.copy_(inverse_softplus(bias.double().exp()))
