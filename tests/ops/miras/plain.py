"""The recurrence of any combination at chunk size 1, one head of one sequence at a time, gradients by autograd through its own read.

    W = link(Z);  g = d loss / d W at the state before;  Z <- alpha Z + D(g);  Z <- settle(Z);  y = read(link(Z); q)

Biases and retentions are the library's own (each is tested alone); everything that puts them together is written here.

Axis legend: T time, K key dim, V value dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.ops.miras.product_space import BATCH, HEADS, Example
from tests.ops.miras.transcriptions import gelu, newton_schulz

Weights = list[Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def layer_norm(u: Tensor, slow: Sequence[Tensor]) -> Tensor:
    centred = u - u.mean()
    return slow[0] * centred / torch.sqrt((centred**2).mean() + 1e-6) + slow[1]


def read(label: str, weights: Sequence[Tensor], slow: Sequence[Tensor], x: Tensor) -> Tensor:
    """y [V] of one query or key [K], by the label of the memory in `product_space`."""
    if label == "vector":
        return weights[0][0] * x
    if label == "matrix":
        return weights[0] @ x
    if label == "mlp1":
        return x + layer_norm(weights[0] @ x, slow)
    if label == "mlp2":
        return x + layer_norm(weights[1] @ gelu(weights[0] @ x), slow)
    if label == "mlp3-bare":
        return weights[2] @ silu(weights[1] @ silu(weights[0] @ x))
    if label == "gated_mlp":
        return x + layer_norm(weights[2] @ (silu(weights[0] @ x) * (weights[1] @ x)), slow)
    raise AssertionError(f"no read is written for memory {label!r}")


# The axis of each matrix on which channel-wise gates act.
AXES = {
    "vector": ["input"],
    "matrix": ["input"],
    "mlp1": ["input"],
    "mlp2": ["input", "output"],
    "mlp3-bare": ["input", "mean", "output"],
    "gated_mlp": ["input", "input", "output"],
}


def spread(gate: Tensor, axis: str, constant: bool = False) -> Tensor:
    """A number or [channels] as it multiplies a matrix; `constant`: it must not vary along a row."""
    if gate.dim() == 0:
        return gate
    if axis == "output":
        return gate[:, None]
    return gate.mean() if axis == "mean" or constant else gate[None, :]


def recurrence(label: str, example: Example, b: int, h: int) -> tuple[Tensor, Weights]:
    """y [T, V] and the last Z of row b and head h."""
    spec, axes = example.spec, AXES[label]
    rule, retention = spec.rule, spec.retention
    gates = dict(retention.couple(example.gates)) if retention.couple is not None else dict(example.gates)
    initial = [w[h] for w in example.parameters.fast]
    slow = [p[h] for p in example.parameters.slow]

    def link(z: Sequence[Tensor]) -> Weights:
        return [retention.link(part[None, None], w[None])[0, 0] for part, w in zip(z, initial, strict=True)]

    def gate(name: str, t: int, j: int | None, default: float) -> Tensor:
        if f"log_{name}" in gates:
            logarithm = gates[f"log_{name}"]
            return (logarithm[b, t, h] if j is None else logarithm[b, t, j, h]).exp()
        if name not in gates:
            return torch.tensor(default, dtype=torch.float64)
        return gates[name][b, t, h] if j is None else gates[name][b, t, j, h]

    def gradient(z: Sequence[Tensor], t: int, j: int | None) -> Weights:
        k, v = (x[b, t, h] if j is None else x[b, t, j, h] for x in (example.k, example.v))
        options = {"delta": gate("delta", t, None, 1.0).reshape(-1)} if "delta" in spec.bias.gates else {}
        weights = [w.detach().clone().requires_grad_() for w in link(z)]
        with torch.enable_grad():
            prediction = read(label, weights, slow, k)
            if spec.bias.loss is not None:
                return list(torch.autograd.grad(spec.bias.loss(prediction, v, **options), weights, materialize_grads=True))
            signal = spec.bias.grad(prediction.detach(), v, **options)
            return list(torch.autograd.grad(prediction, weights, signal))

    def settled(before: Sequence[Tensor], after: Weights) -> Weights:
        settle = retention.settle
        if settle is None:
            return after
        return [settle(p[None, None], q[None, None], 1)[0, 0] for p, q in zip(before, after, strict=True)]

    z = [retention.start(w[None])[0] for w in initial]
    momentum = [torch.zeros_like(w) for w in z]
    outputs = []

    def decayed(z: Sequence[Tensor], t: int, j: int | None) -> Weights:
        alpha = gate("alpha", t, j, 1.0)
        return [spread(alpha, axis, retention.row_constant) * part for axis, part in zip(axes, z, strict=True)]

    for t in range(example.q.shape[1]):
        if rule.name == "multi_step":
            for j in range(rule.n_steps):
                before = z
                if retention.couple is not None:  # every step has an alpha of its own
                    z = decayed(z, t, j)
                elif j == 0:
                    z = decayed(z, t, None)
                g = gradient(z if spec.gradient_at == "decayed" else before, t, j)
                eta = [spread(gate("eta", t, j, 1.0), axis) for axis in axes]
                z = settled(before, [part - e * d for part, e, d in zip(z, eta, g, strict=True)])
        else:
            before, kept = z, decayed(z, t, None)
            point = kept if spec.gradient_at == "decayed" else z
            first = max(0, t - rule.window + 1)
            g = [torch.zeros_like(part) for part in z]
            for i in range(first, t + 1):
                g = [s + gate("gamma", i, None, 1.0) * d for s, d in zip(g, gradient(point, i, None), strict=True)]
            eta = [spread(gate("eta", t, None, 1.0), axis) for axis in axes]
            mu = gate("momentum", t, None, 1.0)
            if "write" in gates:  # M - (M k) (eta k)^T + v write^T
                key, value = example.k[b, t, h], example.v[b, t, h]
                move = [
                    torch.outer(value, gates["write"][b, t, h]) - torch.outer(part @ key, eta[0][0] * key) for part in point
                ]
            elif rule.name == "implicit":
                step = gate("eta", t, None, 1.0)
                step = step / (1 + step * example.k[b, t, h].square().sum())
                move = [-step.reshape(-1, 1) * d for d in g]
            elif rule.name == "momentum":
                momentum = [mu * s - e * d for s, e, d in zip(momentum, eta, g, strict=True)]
                move = momentum
            elif rule.name == "muon":
                momentum = [mu * s - d for s, d in zip(momentum, g, strict=True)]
                move = [e * newton_schulz(s, rule.n_iterations) for e, s in zip(eta, momentum, strict=True)]
            else:
                move = [-e * d for e, d in zip(eta, g, strict=True)]
            z = settled(before, [part + d for part, d in zip(kept, move, strict=True)])
        outputs.append(read(label, link(z), slow, example.q[b, t, h]))
    return torch.stack(outputs), z


def everywhere(label: str, example: Example) -> tuple[Tensor, Weights]:
    """y [B, T, H, V] and the last Z, each [B, H, O, I]."""
    heads = [[recurrence(label, example, b, h) for h in range(HEADS)] for b in range(BATCH)]
    y = torch.stack([torch.stack([y for y, _ in row], dim=1) for row in heads])
    n_matrices = len(heads[0][0][1])
    return y, [torch.stack([torch.stack([z[m] for _, z in row]) for row in heads]) for m in range(n_matrices)]
