"""Each paper's recurrence, token by token, for one head of one sequence: loops in fp64 that share no line with the library.

Gradients of MLP memories come from autograd through the forward pass written here, so a hand-written pullback is tested by them.
Gates are [T] (one number a token) or [T, channels]. Chunks start at token 0; a chunk's gradients are taken at the weights before it.

Axis legend: T time, K key dim, V value dim, O and I output and input axis of one weight matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Weights = list[Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Result(NamedTuple):
    """Outputs y [T, V]; what is carried after the last token (A, Z, M, ...); the weights W read from it, if they differ; momentum."""

    y: Tensor
    carried: Weights
    weights: Weights | None = None
    momentum: Weights | None = None


# --- matrix memories: M [V, K], read M q --------------------------------------------------------------------------------------


def decayed_outer_products(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor | None = None) -> Result:
    """M_t = M_{t-1} Diag(alpha_t) + eta_t v_t k_t^T.

    Linear attention (Katharopoulos et al. 2020; alpha = 1), RetNet (Sun et al. 2023) and Lightning Attention (alpha constant), Mamba-2
    (Dao and Gu 2024; alpha_t and step size scalars), GLA (Yang et al. 2024; alpha_t [K]), HGRN2 (Qin et al. 2024; k_t = 1 - alpha_t).
    """
    memory, outputs = q.new_zeros(v.shape[1], k.shape[1]), []
    for t in range(q.shape[0]):
        step = 1.0 if eta is None else eta[t]
        memory = memory @ torch.diag(alpha[t].expand(k.shape[1])) + step * torch.outer(v[t], k[t])
        outputs.append(memory @ q[t])
    return Result(torch.stack(outputs), [memory])


def gated_slot_attention(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Result:
    """GSA (arXiv 2409.07146): slots K~ [M, K] and V~ [M, V] keep alpha_t [M] and take in 1 - alpha_t of the token."""
    n_slots = alpha.shape[1]
    keys, values, outputs = q.new_zeros(n_slots, k.shape[1]), q.new_zeros(n_slots, v.shape[1]), []
    for t in range(q.shape[0]):
        keys = torch.diag(alpha[t]) @ keys + torch.outer(1 - alpha[t], k[t])
        values = torch.diag(alpha[t]) @ values + torch.outer(1 - alpha[t], v[t])
        logits = keys @ q[t]
        shares = torch.exp(logits - logits.max())
        outputs.append(values.T @ (shares / shares.sum()))
    return Result(torch.stack(outputs), [keys, values])


def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor | None = None) -> Result:
    """M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T: DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464)."""
    memory, identity, outputs = q.new_zeros(v.shape[1], k.shape[1]), torch.eye(k.shape[1], dtype=q.dtype), []
    for t in range(q.shape[0]):
        kept = memory if alpha is None else alpha[t] * memory
        memory = kept @ (identity - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        outputs.append(memory @ q[t])
    return Result(torch.stack(outputs), [memory])


def rwkv7(q: Tensor, kappa: Tensor, v: Tensor, a: Tensor, w: Tensor, write: Tensor) -> Result:
    """S_t = S_{t-1} (Diag(w_t) - kappa_t (a_t * kappa_t)^T) + v_t k~_t^T: RWKV-7 (arXiv 2503.14456, Eq. 15-17); a, w, write [T, K]."""
    memory, outputs = q.new_zeros(v.shape[1], kappa.shape[1]), []
    for t in range(q.shape[0]):
        memory = memory @ (torch.diag(w[t]) - torch.outer(kappa[t], a[t] * kappa[t])) + torch.outer(v[t], write[t])
        outputs.append(memory @ q[t])
    return Result(torch.stack(outputs), [memory])


def longhorn(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Result:
    """The exact proximal step of |M k - v|^2 weighted by beta_t [V], row by row: Longhorn (arXiv 2407.14207, Theorem 3.1)."""
    value_dim, key_dim = v.shape[1], k.shape[1]
    memory, identity, outputs = q.new_zeros(value_dim, key_dim), torch.eye(key_dim, dtype=q.dtype), []
    for t in range(q.shape[0]):
        weights, rows = beta[t].expand(value_dim), []
        for i in range(value_dim):
            step = weights[i] / (1 + weights[i] * (k[t] @ k[t]))
            rows.append(memory[i] @ (identity - step * torch.outer(k[t], k[t])) + step * v[t, i] * k[t])
        memory = torch.stack(rows)
        outputs.append(memory @ q[t])
    return Result(torch.stack(outputs), [memory])


def delta_product(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Result:
    """Decay once, then n delta steps: DeltaProduct (arXiv 2502.10297). k [T, n, K], v [T, n, V], beta [T, n]."""
    memory, identity, outputs = q.new_zeros(v.shape[2], k.shape[2]), torch.eye(k.shape[2], dtype=q.dtype), []
    for t in range(q.shape[0]):
        memory = alpha[t] * memory
        for j in range(k.shape[1]):
            key, value, step = k[t, j], v[t, j], beta[t, j]
            memory = memory @ (identity - step * torch.outer(key, key)) + step * torch.outer(value, key)
        outputs.append(memory @ q[t])
    return Result(torch.stack(outputs), [memory])


def mesa(q: Tensor, k: Tensor, v: Tensor, ridge: float, eta: Tensor, alpha: Tensor) -> Result:
    """M_t = G_t (P_t + ridge I)^-1, G_t = alpha_t G + eta_t v k^T, P_t = alpha_t P + eta_t k k^T: the Mesa layer (arXiv 2309.05858)."""
    key_dim = k.shape[1]
    values, keys, outputs = q.new_zeros(v.shape[1], key_dim), q.new_zeros(key_dim, key_dim), []
    for t in range(q.shape[0]):
        values = alpha[t] * values + eta[t] * torch.outer(v[t], k[t])
        keys = alpha[t] * keys + eta[t] * torch.outer(k[t], k[t])
        outputs.append(values @ torch.linalg.inv(keys + ridge * torch.eye(key_dim, dtype=q.dtype)) @ q[t])
    return Result(torch.stack(outputs), [values, keys])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Causal softmax attention with scale 1/sqrt(K) (Vaswani et al. 2017), a Nadaraya-Watson estimate over the tokens kept."""
    outputs = []
    for t in range(q.shape[0]):
        weights = torch.exp(k[: t + 1] @ q[t] / math.sqrt(q.shape[1]))
        outputs.append(weights @ v[: t + 1] / weights.sum())
    return Result(torch.stack(outputs), [k, v])


# --- MLP memories: x + LN(W_n gelu(... gelu(W_1 x))) --------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def forward(weights: Sequence[Tensor], slow: Sequence[Tensor], x: Tensor) -> Tensor:
    """The memory network of TTT and of Miras: residual and LayerNorm (eps 1e-6) around matrices with GELU between; x [K] -> [V]."""
    hidden = weights[0] @ x
    for weight in weights[1:]:
        hidden = weight @ gelu(hidden)
    centred = hidden - hidden.mean()
    scale, shift = slow
    return x + scale * centred / torch.sqrt((centred**2).mean() + 1e-6) + shift


def gradients(loss: Loss, weights: Sequence[Tensor], slow: Sequence[Tensor], key: Tensor, value: Tensor) -> Weights:
    """d loss(M(weights; key), value) / d weights, by autograd."""
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    with torch.enable_grad():
        return list(torch.autograd.grad(loss(forward(leaves, slow, key), value), leaves))


def half_square(prediction: Tensor, target: Tensor) -> Tensor:
    """l2: |r|^2 / 2."""
    return ((prediction - target) ** 2).sum() / 2


def power(p: float) -> Loss:
    """l_p smoothed: sum (r^2 + 1e-6)^(p/2) / p."""
    return lambda prediction, target: (((prediction - target) ** 2 + 1e-6) ** (p / 2)).sum() / p


def on_axis(gate: Tensor, layer: int, n_layers: int) -> Tensor:
    """A token's gate (a number or [channels]) as it multiplies weight matrix `layer`: inputs of the first, outputs of the last."""
    if gate.dim() == 0:
        return gate
    if layer == 0:
        return gate[None, :]
    if layer == n_layers - 1:
        return gate[:, None]
    return gate.mean()


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> Weights:
    return [a + b for a, b in zip(left, right, strict=True)]


def scaled(gate: Tensor, weights: Sequence[Tensor]) -> Weights:
    """Each weight matrix times the token's gate on its axis."""
    return [on_axis(gate, layer, len(weights)) * weight for layer, weight in enumerate(weights)]


def gradient_descent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    chunk_size: int,
    losses: Callable[[int], Loss],
) -> Result:
    """W_t = alpha_t W_{t-1} - eta_t grad l_t(W at the chunk's start; k_t, v_t): Eq. 28. `losses(t)` is token t's loss.

    With alpha = 1 and l2: TTT-Linear and TTT-MLP (arXiv 2407.04620, Eq. 7), whose mini-batches have 16 tokens.
    """
    weights, frozen, outputs = list(initial), list(initial), []
    for t in range(q.shape[0]):
        if t % chunk_size == 0:
            frozen = weights
        step = gradients(losses(t), frozen, slow, k[t], v[t])
        weights = add(scaled(alpha[t], weights), scaled(-eta[t], step))
        outputs.append(forward(weights, slow, q[t]))
    return Result(torch.stack(outputs), weights)


def yaad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    delta: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    chunk_size: int,
    kind: str,
) -> Result:
    """Yaad (arXiv 2504.13173, Eq. 26): Huber loss in four readings, l2 decay. A threshold for a norm is the mean over channels."""

    def loss(t: int) -> Loss:
        def value(prediction: Tensor, target: Tensor) -> Tensor:
            r, threshold = prediction - target, delta[t].mean()
            if kind == "coordinate":  # Eq. 13 on every coordinate
                limit = delta[t].expand(r.shape)
                return torch.where(r.abs() <= limit, r**2 / 2, limit * (r.abs() - limit / 2)).sum()
            if kind == "norm":  # Eq. 15
                size = torch.sqrt((r**2).sum() + 1e-6)
                return torch.where(size <= threshold, size**2 / 2, threshold * (size - threshold / 2))
            size = r.norm() if kind == "switch" else r.norm() / math.sqrt(r.shape[0])
            # Eq. 16 literally: eta grad l2 while the test holds, else eta delta grad l1, with Sign(r) as tanh(10 r) (Remark 5).
            smooth_absolute = torch.log(torch.cosh(10 * r)).sum() / 10
            return (r**2).sum() / 2 if size <= threshold else threshold * smooth_absolute

        return value

    return gradient_descent(q, k, v, eta, alpha, initial, slow, chunk_size=chunk_size, losses=loss)


def moneta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    chunk_size: int,
    p: float,
    norm_exponent: float,
    mode: str,
    read: str,
) -> Result:
    """Moneta (arXiv 2504.13173, Eq. 24-25): A_t = alpha_t A_{t-1} - eta_t grad l_p(W; k_t, v_t), W = psi(A), one norm per matrix.

    Every norm has 1e-8 added. Read `"exact"`: W_t = psi(A_t). Read `"linear"`, from A at the chunk's start: modes "paper" and "safe"
    freeze the factor psi(A) / A; mode "ftrl" decays psi(A) and adds what A has gained times the mean of (q - 1) |A / m|^(q-2).
    """

    def norm(a: Tensor) -> Tensor:
        return (a.abs() ** norm_exponent).sum() ** (1 / norm_exponent) + 1e-8

    def mean_norm(a: Tensor) -> Tensor:
        return (a.abs() ** norm_exponent).mean() ** (1 / norm_exponent) + 1e-8

    radius = [norm(a) for a in initial]

    def factor(a: Tensor, layer: int) -> Tensor:
        """psi(A) / A."""
        if mode == "paper":
            return norm(a) ** (2 - norm_exponent)
        if mode == "safe":
            return torch.clamp((radius[layer] / norm(a)) ** (norm_exponent - 2), max=1.0)
        return (a.abs() / mean_norm(a)) ** (norm_exponent - 2)

    carried, outputs = list(initial), []
    anchor, factors, frozen = carried, carried, carried
    since = [torch.ones_like(a) for a in carried]
    for t in range(q.shape[0]):
        if t % chunk_size == 0:
            anchor, since = carried, [torch.ones_like(a) for a in carried]
            factors = [factor(a, layer) for layer, a in enumerate(carried)]
            frozen = [s * a for s, a in zip(factors, carried, strict=True)]
        step = gradients(power(p), frozen, slow, k[t], v[t])
        carried = add(scaled(alpha[t], carried), scaled(-eta[t], step))
        since = scaled(alpha[t], since)
        if read == "exact" or chunk_size == 1:
            seen = [factor(a, layer) * a for layer, a in enumerate(carried)]
        elif mode == "ftrl":
            seen = [
                s * w + (norm_exponent - 1) * f.mean() * (a - s * a0)
                for s, w, f, a, a0 in zip(since, frozen, factors, carried, anchor, strict=True)
            ]
        else:
            seen = [f * a for f, a in zip(factors, carried, strict=True)]
        outputs.append(forward(seen, slow, q[t]))
    return Result(torch.stack(outputs), carried, [factor(a, layer) * a for layer, a in enumerate(carried)])


def memora(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    chunk_size: int,
    read: str,
) -> Result:
    """Memora (arXiv 2504.13173, Eq. 27) on logits: Z_t = alpha_t Z_{t-1} - eta_t grad l2(W; k_t, v_t), rows of W = c softmax(Z), c = I.

    Retention must not vary along a softmax row: the first matrix (rows run over the inputs) uses the mean of alpha_t over channels.
    Read `"linear"`: to first order around the uniform row, W_t = abar_t (W - 1) + 1 + (Z_t - abar_t Z) minus its row mean.
    """

    def rows(z: Tensor) -> Tensor:
        shares = torch.exp(z - z.max(dim=1, keepdim=True).values)
        return z.shape[1] * shares / shares.sum(dim=1, keepdim=True)

    logits, outputs, n_layers = list(initial), [], len(initial)
    anchor, frozen = logits, [rows(z) for z in logits]
    since = [torch.ones_like(z) for z in logits]
    for t in range(q.shape[0]):
        if t % chunk_size == 0:
            anchor, frozen = logits, [rows(z) for z in logits]
            since = [torch.ones_like(z) for z in logits]
        kept = [alpha[t].mean() if layer < n_layers - 1 else on_axis(alpha[t], layer, n_layers) for layer in range(n_layers)]
        step = gradients(half_square, frozen, slow, k[t], v[t])
        logits = add([a * z for a, z in zip(kept, logits, strict=True)], scaled(-eta[t], step))
        since = [a * s for a, s in zip(kept, since, strict=True)]
        if read == "exact" or chunk_size == 1:
            seen = [rows(z) for z in logits]
        else:
            moved = [z - s * z0 for z, s, z0 in zip(logits, since, anchor, strict=True)]
            seen = [s * (w - 1) + 1 + m - m.mean(dim=1, keepdim=True) for s, w, m in zip(since, frozen, moved, strict=True)]
        outputs.append(forward(seen, slow, q[t]))
    return Result(torch.stack(outputs), logits, [rows(z) for z in logits])


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    mu: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    chunk_size: int,
) -> Result:
    """Titans (arXiv 2501.00663, Eq. 13-14, 16-18): S_t = mu_t S_{t-1} - eta_t grad l2; W_t = alpha_t W_{t-1} + S_t.

    alpha_t is what is kept (one minus the paper's), and l2 carries a factor 1/2.
    """
    weights, frozen, outputs = list(initial), list(initial), []
    surprise = [torch.zeros_like(w) for w in initial]
    for t in range(q.shape[0]):
        if t % chunk_size == 0:
            frozen = weights
        step = gradients(half_square, frozen, slow, k[t], v[t])
        surprise = add(scaled(mu[t], surprise), scaled(-eta[t], step))
        weights = add(scaled(alpha[t], weights), surprise)
        outputs.append(forward(weights, slow, q[t]))
    return Result(torch.stack(outputs), weights, momentum=surprise)


def _window_gradient(
    t: int, window: int, gamma: Tensor, k: Tensor, v: Tensor, frozen: Sequence[Tensor], slow: Sequence[Tensor]
) -> Weights:
    """sum of gamma_i grad l2(frozen; k_i, v_i) over the last `window` tokens up to t, all at the current chunk's start."""
    total = [torch.zeros_like(w) for w in frozen]
    for i in range(max(0, t - window + 1), t + 1):
        total = add(total, scaled(gamma[i], gradients(half_square, frozen, slow, k[i], v[i])))
    return total


def omega(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    window: int,
    chunk_size: int,
) -> Result:
    """The Omega rule (Atlas, arXiv 2505.23735, Eq. 9 and 13): a gradient step on the last `window` tokens, weighted by gamma_i."""
    weights, frozen, outputs = list(initial), list(initial), []
    for t in range(q.shape[0]):
        if t % chunk_size == 0:
            frozen = weights
        step = _window_gradient(t, window, gamma, k, v, frozen, slow)
        weights = add(scaled(alpha[t], weights), scaled(-eta[t], step))
        outputs.append(forward(weights, slow, q[t]))
    return Result(torch.stack(outputs), weights)


def newton_schulz(matrix: Tensor, n_iterations: int = 5) -> Tensor:
    """Muon's quintic iteration towards the nearest semi-orthogonal matrix (Jordan et al. 2024), on the wider orientation.

    Jordan's code guards against a zero matrix with norm + 1e-7; here, as in the library, with sqrt(norm^2 + 1e-14).
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / torch.sqrt((x**2).sum() + 1e-14)
    for _ in range(n_iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def atlas(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    mu: Tensor,
    gamma: Tensor,
    initial: Sequence[Tensor],
    slow: Sequence[Tensor],
    *,
    window: int,
    chunk_size: int,
) -> Result:
    """Atlas (arXiv 2505.23735, Eq. 32-33): S_t = mu_t S_{t-1} - sum_window gamma_i grad l2; W = alpha W + eta NS5(S).

    In chunks alpha acts at every token, as everywhere, and the step is taken once, at the chunk's last token and with its eta.
    """
    weights, frozen, outputs = list(initial), list(initial), []
    surprise = [torch.zeros_like(w) for w in initial]
    for t in range(q.shape[0]):
        if t % chunk_size == 0:
            frozen = weights
        step = _window_gradient(t, window, gamma, k, v, frozen, slow)
        surprise = add(scaled(mu[t], surprise), [-g for g in step])
        weights = scaled(alpha[t], weights)
        if t % chunk_size == chunk_size - 1:
            weights = add(weights, scaled(eta[t], [newton_schulz(s) for s in surprise]))
        outputs.append(forward(weights, slow, q[t]))
    return Result(torch.stack(outputs), weights, momentum=surprise)
