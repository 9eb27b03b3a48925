"""Memory structures: what is stored, how it is read, and the factors of its gradient.

A memory is a few matrices W [H, O, I] (its fast weights, rewritten by every token) and slow parameters that are learned like any
other. Reading is written once in terms of `apply(m, x)`, the product of matrix m with x at each token; a scan supplies dense
products, or the dual form in which no matrix is built per token. The gradient of a loss with respect to a matrix is, for every
token, an outer product G F^T: `pullback` gives these factors.

Axis legend: B batch, H heads, C tokens, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6

Apply = Callable[[int, Tensor], Tensor]  # (m, x [B, H, C, I]) -> [B, H, C, O]
Phi = Callable[[Tensor], Tensor]  # prediction [B, H, C, V] -> d loss / d prediction [B, H, C, V]
Factors = list[tuple[Tensor, Tensor]]  # per matrix (G [B, H, C, O], F [B, H, C, I])


class Parameters(NamedTuple):
    """What is learned of a memory: `fast`, the dual of its matrices before the first token, each [H, O, I]; `slow`, parameters that
    tokens do not rewrite, each [H, V]."""

    fast: tuple[Tensor, ...]
    slow: tuple[Tensor, ...] = ()


class Memory(NamedTuple):
    """A memory structure.

    Attributes:
        name: as in `MEMORIES`.
        shapes: (K, V) -> the (O, I) of each matrix.
        axes: per matrix, the axis on which channel-wise gates act: "input", "output", or "mean" (neither axis is a model axis, so
            the matrix takes the mean of the gate over channels).
        read: (apply, slow, q [B, H, C, K]) -> y [B, H, C, V].
        pullback: (weights, slow, k [B, H, C, K], phi) -> factors, the matrices `weights` [B, H, O, I] being the same at every token.
        n_slow: number of slow parameters, each [H, V]: the first starts at one, the others at zero.
        offset_free: matrices to which a constant can be added without changing read or pullback: a norm takes it away.
        initial_std: of the matrices before the first token, times I^(-1/2); 0: zeros.
        diagonal: the one "matrix" [1, K] multiplies element by element.
        residual: read adds q itself, so K must equal V.
        kind: "parametric"; or "slots" and "growing", which have a scan of their own.
        n_slots: for "slots".
        options: what its factory was given, for kernels that have some of them built in.
    """

    name: str
    shapes: Callable[[int, int], list[tuple[int, int]]]
    axes: tuple[str, ...]
    read: Callable[[Apply, Sequence[Tensor], Tensor], Tensor]
    pullback: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Phi], Factors]
    n_slow: int = 0
    offset_free: tuple[int, ...] = ()
    initial_std: float = 0.0
    diagonal: bool = False
    residual: bool = False
    kind: str = "parametric"
    n_slots: int = 0
    options: tuple[int | str | bool, ...] = ()

    def init(
        self,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        std: float | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Parameters:
        """Fresh parameters: normal matrices and norms at the identity.

        Args:
            n_heads, key_dim, value_dim: H, K, V.
            std: standard deviation of the matrices, >= 0; None: the structure's own, initial_std I^(-1/2).
            generator, dtype, device: as `torch.randn` takes them.
        Raises:
            ValueError: K and V differ and the structure needs them equal.
        """
        if (self.residual or self.diagonal) and key_dim != value_dim:
            raise ValueError(
                f"memory {self.name!r} adds the key to the value: K and V must be equal; got K={key_dim}, V={value_dim}"
            )
        fast = []
        for rows, columns in self.shapes(key_dim, value_dim):
            scale = self.initial_std * columns**-0.5 if std is None else std
            fast.append(scale * torch.randn(n_heads, rows, columns, generator=generator, dtype=dtype, device=device))
        slow = [torch.full((n_heads, value_dim), float(n == 0), dtype=dtype, device=device) for n in range(self.n_slow)]
        return Parameters(tuple(fast), tuple(slow))


def matrix() -> Memory:
    """One matrix: y = W q. The memory of linear attention, DeltaNet and their kin."""

    def pullback(weights: Sequence[Tensor], slow: Sequence[Tensor], k: Tensor, phi: Phi) -> Factors:
        return [(phi(k @ weights[0].mT), k)]

    return Memory("matrix", lambda k, v: [(v, k)], ("input",), lambda apply, slow, q: apply(0, q), pullback)


def vector() -> Memory:
    """One number per channel: y = w * q."""

    def pullback(weights: Sequence[Tensor], slow: Sequence[Tensor], k: Tensor, phi: Phi) -> Factors:
        return [(phi(k * weights[0]), k)]

    return Memory("vector", lambda k, v: [(1, k)], ("input",), lambda apply, slow, q: apply(0, q), pullback, diagonal=True)


def mlp(depth: int = 2, expansion: int = 4, activation: str = "gelu", *, residual: bool = True, norm: bool = True) -> Memory:
    """A perceptron of `depth` matrices: y = x + LayerNorm(W_depth ... act(W_1 x)), hidden size expansion * K.

    Depth 2 is the memory of Moneta, Yaad, Memora, Titans and TTT-MLP; depth 1, x + LayerNorm(W x), that of TTT-Linear.

    Args:
        depth: number of matrices, at least 1.
        expansion: hidden size over key dim.
        activation: "gelu" (tanh form), "silu", "relu" or "identity".
        residual: add the input; needs K = V.
        norm: LayerNorm of the output, with learned scale and shift per head (slow parameters).
    Raises:
        ValueError: an argument out of range.
    Source: Behrouz et al. 2025, arXiv 2504.13173, section 5.3; Sun et al. 2024, arXiv 2407.04620.
    """
    if depth < 1 or expansion < 1:
        raise ValueError(f"a perceptron memory has depth >= 1 and expansion >= 1; got depth={depth}, expansion={expansion}")
    act, act_pullback = _activation(activation)

    def shapes(key_dim: int, value_dim: int) -> list[tuple[int, int]]:
        widths = [key_dim, *([expansion * key_dim] * (depth - 1)), value_dim]
        return [(widths[m + 1], widths[m]) for m in range(depth)]

    def read(apply: Apply, slow: Sequence[Tensor], q: Tensor) -> Tensor:
        h = q
        for m in range(depth - 1):
            h = act(apply(m, h))
        u = apply(depth - 1, h)
        y = _normalise(u, slow) if norm else u
        return q + y if residual else y

    def pullback(weights: Sequence[Tensor], slow: Sequence[Tensor], k: Tensor, phi: Phi) -> Factors:
        inputs, hidden = [k], []
        for m in range(depth - 1):
            hidden.append(inputs[-1] @ weights[m].mT)
            inputs.append(act(hidden[-1]))
        g = _output_pullback(inputs[-1] @ weights[-1].mT, slow, k if residual else None, phi)
        factors = [(g, inputs[-1])]
        for m in reversed(range(depth - 1)):
            g = act_pullback(g @ weights[m + 1], hidden[m])
            factors.append((g, inputs[m]))
        return factors[::-1]

    axes = ("input", *(["mean"] * (depth - 2)), "output") if depth > 1 else ("input",)
    return Memory(
        "mlp",
        shapes,
        axes,
        read,
        pullback,
        n_slow=2 if norm else 0,
        offset_free=(depth - 1,) if norm else (),
        initial_std=1.0,
        residual=residual,
        options=(depth, expansion, activation, residual, norm),
    )


def gated_mlp(expansion: int = 4, activation: str = "silu", *, residual: bool = True, norm: bool = True) -> Memory:
    """A gated perceptron: y = x + LayerNorm(W_out (act(W_gate x) * (W_up x))), hidden size expansion * K.

    Args:
        expansion, activation, residual, norm: as in `mlp`.
    Raises:
        ValueError: an argument out of range.
    Source: Atlas++, arXiv 2505.23735; LaCT, arXiv 2505.23884.
    """
    if expansion < 1:
        raise ValueError(f"expansion is the hidden size over the key dim, at least 1; got {expansion}")
    act, act_pullback = _activation(activation)

    def read(apply: Apply, slow: Sequence[Tensor], q: Tensor) -> Tensor:
        u = apply(2, act(apply(0, q)) * apply(1, q))
        y = _normalise(u, slow) if norm else u
        return q + y if residual else y

    def pullback(weights: Sequence[Tensor], slow: Sequence[Tensor], k: Tensor, phi: Phi) -> Factors:
        gate, up = k @ weights[0].mT, k @ weights[1].mT
        opened = act(gate)
        hidden = opened * up
        g = _output_pullback(hidden @ weights[2].mT, slow, k if residual else None, phi)
        back = g @ weights[2]
        return [(act_pullback(back * up, gate), k), (back * opened, k), (g, hidden)]

    def shapes(key_dim: int, value_dim: int) -> list[tuple[int, int]]:
        return [(expansion * key_dim, key_dim), (expansion * key_dim, key_dim), (value_dim, expansion * key_dim)]

    return Memory(
        "gated_mlp",
        shapes,
        ("input", "input", "output"),
        read,
        pullback,
        n_slow=2 if norm else 0,
        offset_free=(2,) if norm else (),
        initial_std=1.0,
        residual=residual,
    )


def slots(n_slots: int = 64) -> Memory:
    """Two linear memories over slots with a softmax between them: the memory of Gated Slot Attention.

    Args:
        n_slots: at least 1; each forgets by an alpha of its own.
    Raises:
        ValueError: n_slots < 1.
    Source: arXiv 2409.07146.
    """
    if n_slots < 1:
        raise ValueError(f"n_slots is at least 1; got {n_slots}")
    return Memory("slots", lambda k, v: [], (), _no_read, _no_pullback, kind="slots", n_slots=n_slots)


def growing() -> Memory:
    """All keys and values: the memory of softmax attention, which grows by one pair per token."""
    return Memory("growing", lambda k, v: [], (), _no_read, _no_pullback, kind="growing")


def dense(weights: Sequence[Tensor], *, diagonal: bool = False) -> Apply:
    """`apply` for matrices that are the same at every token.

    Args:
        weights: each [B, H, O, I].
        diagonal: the one "matrix" is a row that multiplies element by element (`vector`).
    """
    if diagonal:
        return lambda m, x: x * weights[m]
    return lambda m, x: x @ weights[m].mT


def _normalise(u: Tensor, slow: Sequence[Tensor]) -> Tensor:
    """LayerNorm over channels with the scale and shift of each head [H, V]."""
    scale, shift = slow
    return F.layer_norm(u, u.shape[-1:], eps=NORM_EPS) * scale[:, None] + shift[:, None]


def _output_pullback(u: Tensor, slow: Sequence[Tensor], residual: Tensor | None, phi: Phi) -> Tensor:
    """d loss / d u, u being the output of the last matrix: through the norm (if there is one) and the residual."""
    if not slow:
        return phi(u if residual is None else residual + u)
    scale, shift = slow
    mean = u.mean(-1, keepdim=True)
    centred = u - mean
    rate = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    unit = centred * rate
    y = unit * scale[:, None] + shift[:, None]
    g = scale[:, None] * phi(y if residual is None else residual + y)
    return (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)) * rate


def _activation(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The function and its pullback (g, x) -> g act'(x), both differentiable again."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
    ),
    "silu": (F.silu, lambda g, x: g * x.sigmoid() * (1 + x * (1 - x.sigmoid()))),
    "relu": (F.relu, lambda g, x: g * (x > 0)),
    "identity": (lambda x: x, lambda g, x: g),
}


def _no_read(apply: Apply, slow: Sequence[Tensor], q: Tensor) -> Tensor:
    raise AssertionError("this memory is read by a scan of its own")


def _no_pullback(weights: Sequence[Tensor], slow: Sequence[Tensor], k: Tensor, phi: Phi) -> Factors:
    raise AssertionError("this memory is written by a scan of its own")


MEMORIES: dict[str, Callable[..., Memory]] = {
    "vector": vector,
    "matrix": matrix,
    "mlp": mlp,
    "gated_mlp": gated_mlp,
    "slots": slots,
    "growing": growing,
}
