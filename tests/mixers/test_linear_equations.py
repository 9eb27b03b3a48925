"""The recurrent mixers against their papers' layers, written here token by token from the equations, with the mixer's own weights.

Sequences are longer than a tile of the scans, and parameters are moved off their initial values (`tests.laws.maker`).

Axis legend: B batch, T time, D model dim, H heads, K key dim, V value dim, E inner channels, N state dim, M slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.mixers import Mixer
from tests.laws import maker, sequence

EXACT = 1e-12
N_HEADS, LENGTH = 4, 70
Weights = dict[str, Tensor]


def weights_of(mixer: Mixer) -> Weights:
    return {name: parameter.detach() for name, parameter in mixer.named_parameters()}


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution of x [T, C], tap by tap: the last tap is the token's own."""
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for tap in range(weight.shape[1]):
            past = t - (weight.shape[1] - 1) + tap
            if past >= 0:
                y[t] += weight[:, tap] * x[past]
    return y if bias is None else y + bias


def heads(x: Tensor, n_heads: int = N_HEADS) -> Tensor:
    """[T, H K] -> [T, H, K]."""
    return x.view(x.shape[0], n_heads, -1)


def branch(w: Weights, name: str, x: Tensor, n_heads: int = N_HEADS) -> Tensor:
    """silu(conv(W x)) cut into heads, W x without a convolution: [T, H, K]."""
    y = x @ w[f"{name}.linear.weight"].T
    if f"{name}.conv.weight" in w:
        y = F.silu(convolved(y, w[f"{name}.conv.weight"]))
    return heads(y, n_heads)


def rms(x: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-5) -> Tensor:
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, t: int, theta: float = 1e4) -> Tensor:
    """Rotary position t on [H, K] by complex numbers."""
    size = x.shape[-1]
    angle = t * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    pairs = torch.view_as_complex(x.reshape(x.shape[0], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)


def outer(v: Tensor, k: Tensor) -> Tensor:
    """[H, V] and [H, K] -> v k^T [H, V, K]."""
    return v[:, :, None] * k[:, None, :]


def read(memory: Tensor, q: Tensor) -> Tensor:
    """M q: [H, V, K] and [H, K] -> [H, V]."""
    return (memory * q[:, None, :]).sum(-1)


def forgetting(w: Weights, x: Tensor) -> Tensor:
    """Mamba-2's decay exp(-exp(a) softplus(W x + b)): [T, H]."""
    step = torch.log1p(torch.exp(x @ w["alpha.linear.weight"].T + w["alpha.bias"]))
    return torch.exp(-torch.exp(w["alpha.log_rate"]) * step)


def low_rank(w: Weights, name: str, x: Tensor, middle: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    return middle(x @ w[f"{name}.down.weight"].T) @ w[f"{name}.up.weight"].T + w.get(f"{name}.up.bias", torch.zeros(()))


def scanned(memory: Tensor, step: Callable[[int, Tensor], tuple[Tensor, Tensor]], length: int = LENGTH) -> Tensor:
    """Outputs of (t, memory) -> (memory, y) one token after the other: [T, ...]."""
    outputs = []
    for t in range(length):
        memory, y = step(t, memory)
        outputs.append(y)
    return torch.stack(outputs)


# --- the layers, each for one row x [T, D] ----------------------------------------------------------------------------------


def linear_attention(w: Weights, x: Tensor) -> Tensor:
    """Katharopoulos et al., Eq. 9: sums of phi(k) v^T and phi(k) are the state; here as the attention they equal."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    q, k = (torch.where(z > 0, z + 1, z.exp()) for z in (q, k))
    rows = []
    for t in range(LENGTH):
        weight = (q[t] * k[: t + 1]).sum(-1)  # [t + 1, H]
        scale = (weight.sum(0) + 1e-6 * q.shape[-1] ** 0.5)[:, None]  # the layer scales q by K^(-1/2)
        rows.append((weight[:, :, None] * v[: t + 1]).sum(0) / scale)
    return torch.stack(rows).flatten(1) @ w["o.weight"].T


def retnet(w: Weights, x: Tensor) -> Tensor:
    """Sun et al., Eq. 5 in its parallel form: (Q K^T * D) V with D[n, m] = gamma^(n - m)."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    q = torch.stack([turned(q[t], t) for t in range(LENGTH)])
    k = torch.stack([turned(k[t], t) for t in range(LENGTH)]) / math.sqrt(k.shape[-1])
    y = torch.zeros_like(v)
    for h in range(N_HEADS):
        gamma = 1 - 2.0 ** (-5 - h)
        for n in range(LENGTH):
            for m in range(n + 1):
                y[n, h] += gamma ** (n - m) * (q[n, h] @ k[m, h]) * v[m, h]
    gate = F.silu(heads(x @ w["gate.weight"].T))
    return (rms(y) * gate).flatten(1) @ w["o.weight"].T


def lightning(w: Weights, x: Tensor) -> Tensor:
    """MiniMax-01's layer, the first of one layer."""
    q, k, v = (F.silu(branch(w, name, x)) for name in "qkv")
    slope = torch.tensor([2 ** (-8 * (h + 1) / N_HEADS) for h in range(N_HEADS)], dtype=torch.float64) * (1 + 1e-5)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.exp(-slope)[:, None, None] * memory + outer(v[t], k[t])
        return memory, read(memory, q[t])

    y = scanned(outer(v[0], k[0]) * 0, step).flatten(1)
    return (torch.sigmoid(x @ w["gate.weight"].T) * rms(y, w["norm.weight"], 1e-6)) @ w["o.weight"].T


def gla(w: Weights, x: Tensor) -> Tensor:
    """Yang et al. 2024, Eq. 3 and section 4.4."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    alpha = heads(torch.sigmoid(low_rank(w, "alpha", x)) ** (1 / 16))

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = memory * alpha[t][:, None, :] + outer(v[t], k[t])
        return memory, read(memory, q[t] / math.sqrt(q.shape[-1]))

    y = scanned(outer(v[0], k[0]) * 0, step)
    return (rms(y, w["norm.weight"]) * F.silu(heads(x @ w["gate.weight"].T))).flatten(1) @ w["o.weight"].T


def hgrn2(w: Weights, x: Tensor) -> Tensor:
    """Qin et al., Eq. 4-8, in a layer that has a floor under its decay."""
    q, f, v = (branch(w, name, x) for name in "qfv")
    floor = torch.sigmoid(w["floor"])
    alpha = floor + (1 - floor) * torch.sigmoid(f)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = memory * alpha[t][:, None, :] + outer(v[t], 1 - alpha[t])
        return memory, read(memory, F.silu(q[t]) / math.sqrt(q.shape[-1]))

    y = scanned(outer(v[0], f[0]) * 0, step).flatten(1)
    return rms(y, w["norm.weight"]) @ w["o.weight"].T


def gsa(w: Weights, x: Tensor) -> Tensor:
    """Zhang et al. 2024, section 3: slots of keys and of values, forgotten and written by the same gate."""
    q, k, v = (F.silu(branch(w, name, x)) for name in "qkv")
    alpha = heads(torch.sigmoid(x @ w["f.weight"].T) ** (1 / 8))
    size = k.shape[-1]

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.cat((k[t], v[t]), -1)
        memory = alpha[t][:, :, None] * memory + (1 - alpha[t])[:, :, None] * new[:, None, :]
        weight = read(memory[..., :size], q[t]).softmax(-1)
        return memory, (weight[:, :, None] * memory[..., size:]).sum(1)

    y = scanned(torch.zeros(N_HEADS, alpha.shape[-1], size + v.shape[-1], dtype=torch.float64), step).flatten(1)
    return rms(F.silu(y), w["norm.weight"]) @ w["o.weight"].T


def delta_net(w: Weights, x: Tensor) -> Tensor:
    """Yang et al. 2024, Eq. 2-3: the old value is read, a mix of it and the new one is written in its place."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    q, k, beta = unit(q) / math.sqrt(q.shape[-1]), unit(k), torch.sigmoid(x @ w["beta.weight"].T)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        old = read(memory, k[t])
        new = beta[t][:, None] * v[t] + (1 - beta[t])[:, None] * old
        memory = memory - outer(old, k[t]) + outer(new, k[t])
        return memory, read(memory, q[t])

    return rms(scanned(outer(v[0], k[0]) * 0, step), w["norm.weight"]).flatten(1) @ w["o.weight"].T


def gated_delta_net(w: Weights, x: Tensor) -> Tensor:
    """Yang et al. 2024, Eq. 10: S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    q, k, beta = unit(q) / math.sqrt(q.shape[-1]), unit(k), torch.sigmoid(x @ w["beta.weight"].T)
    alpha, eye = forgetting(w, x), torch.eye(k.shape[-1], dtype=torch.float64)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        transition = alpha[t][:, None, None] * (eye - beta[t][:, None, None] * outer(k[t], k[t]))
        memory = memory @ transition + outer(beta[t][:, None] * v[t], k[t])
        return memory, read(memory, q[t])

    y = scanned(outer(v[0], k[0]) * 0, step)
    return (rms(y, w["norm.weight"]) * F.silu(heads(x @ w["gate.weight"].T))).flatten(1) @ w["o.weight"].T


def delta_product(w: Weights, x: Tensor) -> Tensor:
    """Siems et al., section 3, with a forget gate: generalised Householder steps after one decay."""
    n_steps = 2
    q = unit(branch(w, "q", x))
    k = unit(branch(w, "k", x, n_steps * N_HEADS)).unflatten(1, (n_steps, N_HEADS))
    v = branch(w, "v", x, n_steps * N_HEADS).unflatten(1, (n_steps, N_HEADS))
    beta = 2 * torch.sigmoid(x @ w["beta.weight"].T).unflatten(1, (n_steps, N_HEADS))
    alpha, eye = forgetting(w, x), torch.eye(k.shape[-1], dtype=torch.float64)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = alpha[t][:, None, None] * memory
        for j in range(n_steps):
            strength = beta[t, j][:, None, None]
            memory = memory @ (eye - strength * outer(k[t, j], k[t, j])) + strength * outer(v[t, j], k[t, j])
        return memory, read(memory, q[t] / math.sqrt(q.shape[-1]))

    y = scanned(outer(v[0, 0], k[0, 0]) * 0, step)
    return (rms(y, w["norm.weight"]) * F.silu(heads(x @ w["gate.weight"].T))).flatten(1) @ w["o.weight"].T


def mesa(w: Weights, x: Tensor) -> Tensor:
    """von Oswald et al., Eq. 5-8: weighted ridge regression on all pairs so far, solved anew for every token."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    q, k = unit(q), unit(k)
    gamma, beta = (torch.sigmoid(x @ w[f"{name}.weight"].T + w[f"{name}.bias"]) for name in ("gamma", "beta"))
    ridge = torch.diag_embed(torch.log1p(torch.exp(w["ridge"])) + 0.25)
    rows = []
    for t in range(LENGTH):
        weight = torch.stack([beta[i] * gamma[i + 1 : t + 1].prod(0) for i in range(t + 1)])  # [t + 1, H]
        fit = torch.einsum("th,thv,thk->hvk", weight, v[: t + 1], k[: t + 1])
        system = torch.einsum("th,thj,thk->hjk", weight, k[: t + 1], k[: t + 1]) + ridge
        rows.append(read(fit, torch.linalg.solve(system, q[t])))
    return rms(torch.stack(rows), w["norm.weight"]).flatten(1) @ w["o.weight"].T


def rwkv7(w: Weights, x: Tensor) -> Tensor:
    """Peng et al., section 4, in a layer of depth 1 of 3."""
    shifted = torch.cat((torch.zeros(1, x.shape[1], dtype=torch.float64), x[:-1]))
    x_r, x_w, x_k, x_v, x_a, x_g = (x + (shifted - x) * w[f"mix_{name}"] for name in "rwkvag")
    r, k, v = heads(x_r @ w["r.weight"].T), heads(x_k @ w["k.weight"].T), heads(x_v @ w["v.weight"].T)
    decay = heads(torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(w, "w", x_w, torch.tanh))))
    rate = heads(torch.sigmoid(low_rank(w, "a", x_a)))
    gate = low_rank(w, "g", x_g, torch.sigmoid)
    kappa = unit(k * w["erase"])
    write = k * (1 + (rate - 1) * w["replace"])
    size = k.shape[-1]

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        transition = torch.diag_embed(decay[t]) - outer(kappa[t], rate[t] * kappa[t])
        memory = memory @ transition + outer(v[t], write[t])
        return memory, read(memory, r[t])

    y = scanned(outer(v[0], k[0]) * 0, step)
    y = torch.stack(
        [
            F.layer_norm(y[:, h], (size,), w["norm_weight"][h], w["norm_bias"][h], eps=size * 1e-5)
            + (r[:, h] * write[:, h]) @ w["bonus"][h][:, None] * v[:, h]
            for h in range(N_HEADS)
        ],
        dim=1,
    )
    return (y.flatten(1) * gate) @ w["o.weight"].T


def selection(w: Weights, x: Tensor, n_state: int = 16) -> tuple[Tensor, ...]:
    """u, z, the time steps before their activation, and the two vectors of size N, of Mamba's block."""
    inner = w["selection.into.weight"].shape[0] // 2
    both = x @ w["selection.into.weight"].T
    u = F.silu(convolved(both[:, :inner], w["selection.conv.weight"], w["selection.conv.bias"]))
    selected = u @ w["selection.select.weight"].T
    rank = selected.shape[1] - 2 * n_state
    dt = selected[:, :rank] @ w["selection.dt.weight"].T + w["selection.dt.bias"]
    return u, both[:, inner:], dt, selected[:, rank : rank + n_state], selected[:, rank + n_state :]


def mamba(w: Weights, x: Tensor) -> Tensor:
    """Gu & Dao, Algorithm 2, with A discretised exactly and B by Euler's rule as in the released code."""
    u, z, dt, b, c = selection(w, x)
    dt, rate = torch.log1p(dt.exp()), -torch.exp(w["log_rate"])

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.exp(dt[t][:, None] * rate) * memory + (dt[t] * u[t])[:, None] * b[t]
        return memory, memory @ c[t] + w["selection.skip"] * u[t]

    y = scanned(torch.zeros_like(rate), step)
    return (y * F.silu(z)) @ w["selection.out.weight"].T


def longhorn(w: Weights, x: Tensor) -> Tensor:
    """Liu et al., Theorem 3.1: each row of the memory minimises |m - m_{t-1}|^2 + beta (m.k - u)^2, here by solving the system."""
    u, z, logits, k, q = selection(w, x)
    beta = torch.sigmoid(logits)
    eye = torch.eye(k.shape[1], dtype=torch.float64)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        system = eye + beta[t][:, None, None] * k[t][:, None] * k[t]
        target = memory + (beta[t] * u[t])[:, None] * k[t]
        memory = torch.linalg.solve(system, target)
        return memory, memory @ q[t] + w["selection.skip"] * u[t]

    y = scanned(torch.zeros(u.shape[1], k.shape[1], dtype=torch.float64), step)
    return (y * F.silu(z)) @ w["selection.out.weight"].T


def mamba2(w: Weights, x: Tensor) -> Tensor:
    """Dao & Gu, section 7, as the matrix of its section 3.1: y = (L * C B^T) (dt u)."""
    inner, n_heads = w["norm.weight"].shape[0], w["skip"].shape[0]
    n_state = (w["conv.weight"].shape[0] - inner) // 2
    z, mixed, dt = (x @ w["into.weight"].T).split((inner, inner + 2 * n_state, n_heads), dim=1)
    u, b, c = F.silu(convolved(mixed, w["conv.weight"], w["conv.bias"])).split((inner, n_state, n_state), dim=1)
    u, dt = heads(u, n_heads), torch.log1p(torch.exp(dt + w["dt_bias"]))
    decay = torch.exp(-torch.exp(w["log_rate"]) * dt)
    y = torch.zeros_like(u)
    for t in range(LENGTH):
        for s in range(t + 1):
            weight = decay[s + 1 : t + 1].prod(0) * (c[t] @ b[s]) * dt[s]
            y[t] += weight[:, None] * u[s]
        y[t] += w["skip"][:, None] * u[t]
    return rms(y.flatten(1) * F.silu(z), w["norm.weight"]) @ w["out.weight"].T


LAYERS: dict[str, tuple[Callable[[Weights, Tensor], Tensor], dict[str, int]]] = {
    "linear_attention": (linear_attention, {}),
    "retnet": (retnet, {}),
    "lightning": (lightning, {}),
    "gla": (gla, {}),
    "hgrn2": (hgrn2, {"layer": 1, "n_layers": 3}),
    "gsa": (gsa, {}),
    "delta_net": (delta_net, {}),
    "gated_delta_net": (gated_delta_net, {}),
    "delta_product": (delta_product, {}),
    "mesa": (mesa, {}),
    "rwkv7": (rwkv7, {"layer": 1, "n_layers": 3}),
    "mamba": (mamba, {}),
    "longhorn": (longhorn, {}),
    "mamba2": (mamba2, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_mixer_equals_its_paper(name: str) -> None:
    """Prevents a mixer under a paper's name that computes something else: a transposed gate, a missing scale, norm or tap."""
    layer, options = LAYERS[name]
    mixer, x = maker(name, **options)(), sequence(2, LENGTH)
    with torch.no_grad():
        y, _ = mixer(x)
        expected = torch.stack([layer(weights_of(mixer), row) for row in x])
    assert (y - expected).abs().max() <= EXACT * max(1.0, float(expected.abs().max()))


# --- other libraries --------------------------------------------------------------------------------------------------------


def test_mamba_equals_transformers() -> None:
    """Prevents one misreading of the paper in mixer and transcription alike. Theirs scans in fp32."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer, x = maker("mamba")(), sequence(2, LENGTH)
    w = weights_of(mixer)
    config = MambaConfig(hidden_size=16, state_size=16, expand=2, conv_kernel=4, use_bias=False, time_step_rank=1)
    other = MambaMixer(config, 0).double()
    theirs = {"A_log": w["log_rate"], "D": w["selection.skip"], "conv1d.weight": w["selection.conv.weight"][:, None]}
    theirs |= {"conv1d.bias": w["selection.conv.bias"], "in_proj.weight": w["selection.into.weight"]}
    theirs |= {"x_proj.weight": w["selection.select.weight"], "out_proj.weight": w["selection.out.weight"]}
    theirs |= {f"dt_proj.{name}": w[f"selection.dt.{name}"] for name in ("weight", "bias")}
    other.load_state_dict(theirs)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], other(x).double(), atol=1e-5, rtol=1e-5)


def test_mamba2_equals_transformers() -> None:
    """Prevents one misreading of the paper in mixer and transcription alike. Theirs scans in fp32."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    mixer, x = maker("mamba2")(), sequence(2, LENGTH)
    w = weights_of(mixer)
    config = Mamba2Config(
        hidden_size=16,
        num_heads=8,
        head_dim=4,
        state_size=16,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        use_bias=False,
        chunk_size=32,
    )
    other = Mamba2Mixer(config, 0).double()
    theirs = {"A_log": w["log_rate"], "D": w["skip"], "dt_bias": w["dt_bias"], "conv1d.weight": w["conv.weight"][:, None]}
    theirs |= {"conv1d.bias": w["conv.bias"], "in_proj.weight": w["into.weight"]}
    theirs |= {"norm.weight": w["norm.weight"], "out_proj.weight": w["out.weight"]}
    other.load_state_dict(theirs)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], other(x).double(), atol=1e-5, rtol=1e-5)


def test_lightning_equals_transformers() -> None:
    """Prevents other slopes than MiniMax's in a deep layer. Theirs keeps its decays in fp32."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    mixer, x = maker("lightning", layer=1, n_layers=3)(), sequence(2, LENGTH)
    w = weights_of(mixer)
    config = MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4, num_hidden_layers=3, block_size=32
    )
    other = MiniMaxLightningAttention(config, 1).double()
    per_head = torch.stack([w[f"{name}.linear.weight"].view(N_HEADS, -1, 16) for name in "qkv"], dim=1)
    theirs = {"qkv_proj.weight": per_head.reshape(-1, 16), "norm.weight": w["norm.weight"]}
    theirs |= {"output_gate.weight": w["gate.weight"], "out_proj.weight": w["o.weight"]}
    other.load_state_dict(theirs, strict=False)
    with torch.no_grad():
        y, _ = other(x, None, None)
        torch.testing.assert_close(mixer(x)[0], y, atol=1e-5, rtol=1e-5)
