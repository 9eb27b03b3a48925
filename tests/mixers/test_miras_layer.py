"""The Miras layers against their papers' equations, written here token by token, with the mixer's own weights and autograd's gradients.

Each layer runs in its default backend (compiled where there is one) and in plain chunks. Parameters are moved off their initial values
(`tests.laws.maker`), sequences are longer than two chunks and a period of the positions, and a chunk's gradients are all taken at the
weights before it.

Axis legend: T time, D model dim, H heads, K head dim, O rows and I columns of a matrix.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recollect.mixers import build
from recollect.mixers.miras import Miras, MirasConfig, default_eta_base
from recollect.ops.miras import BIASES, Parameters, scan
from tests.laws import assert_near, maker, sequence

EXACT = 1e-12
DIM, N_HEADS, SIZE, LENGTH = 32, 2, 16, 40  # a head dim that the compiled form has
Weights = dict[str, Tensor]
Matrices = list[Tensor]
Loss = Callable[[int, Tensor], Tensor]  # (t, residual [H, K]) -> loss of each head [H]


# --- what stands around the memory: rows x [T, D] ---------------------------------------------------------------------------


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def heads(x: Tensor) -> Tensor:
    """[T, H K] -> [T, H, K]."""
    return x.reshape(x.shape[0], N_HEADS, -1)


def branch(w: Weights, name: str, x: Tensor) -> Tensor:
    """silu of the causal depthwise convolution of W x, tap by tap, the last tap being the token's own; W x without one: [T, H, K]."""
    u = x @ w[f"{name}.linear.weight"].T
    if f"{name}.conv.weight" not in w:
        return heads(u)
    taps, y = w[f"{name}.conv.weight"], torch.zeros_like(u)
    for t in range(u.shape[0]):
        for back in range(min(t + 1, taps.shape[1])):
            y[t] += taps[:, -1 - back] * u[t - back]
    return heads(y * sigmoid(y))


def turned(x: Tensor, position: int, n_turned: int) -> Tensor:
    """The first n_turned channels of x [H, K], pair by pair, as complex numbers; the others as they are."""
    pairs = torch.complex(x[:, 0:n_turned:2], x[:, 1:n_turned:2])
    angle = position * 1e4 ** (-torch.arange(0, n_turned, 2, dtype=torch.float64) / n_turned)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((torch.stack((pairs.real, pairs.imag), dim=-1).reshape(x.shape[0], -1), x[:, n_turned:]), dim=1)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def low_rank(w: Weights, name: str, x: Tensor) -> Tensor:
    return (x @ w[f"{name}.down.weight"].T) @ w[f"{name}.up.weight"].T + w[f"{name}.up.bias"]


# --- the memory: matrices [H, O, I] of every head ---------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """The tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """[H, O, I] and [H, I] -> [H, O]."""
    return (matrix * x[:, None, :]).sum(-1)


def recall(w: Weights, matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """x + LayerNorm(W_n gelu(... gelu(W_1 x))): [H, K] -> [H, K]."""
    u = product(matrices[0], x)
    for matrix in matrices[1:]:
        u = product(matrix, gelu(u))
    centred = u - u.mean(-1, keepdim=True)
    return x + w["slow.0"] * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) + w["slow.1"]


def on_axis(gate: Tensor, n: int, depth: int) -> Tensor:
    """A token's gate [H] or [H, K] as it multiplies matrix n: columns of the first, rows of the last."""
    if gate.dim() == 1:
        return gate[:, None, None]
    return gate[:, None, :] if n == 0 else gate[:, :, None]


class Tokens(NamedTuple):
    """q, k, v [T, H, K]; the gates by name, each [T, H] or [T, H, K]; the layer's weights, its learned memory among them."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    w: Weights
    chunk_size: int

    @property
    def start(self) -> Matrices:
        """The memory before the first token."""
        return [self.w[name] for name in ("fast.0", "fast.1") if name in self.w]

    def gate(self, name: str, t: int) -> Matrices:
        """The gate of token t, for each matrix."""
        depth = len(self.start)
        return [on_axis(self.gates[name][t], n, depth) for n in range(depth)]

    def opens(self, t: int) -> bool:
        """Whether token t is the first of a chunk."""
        return t % self.chunk_size == 0

    def gradient(self, t: int, matrices: Matrices, loss: Loss | None = None) -> Matrices:
        """d loss / d matrices of token t, by autograd; without a loss, |r|^2 / 2."""
        leaves = [matrix.detach().clone().requires_grad_() for matrix in matrices]
        with torch.enable_grad():
            residual = recall(self.w, leaves, self.k[t]) - self.v[t]
            value = (residual**2).sum(-1) / 2 if loss is None else loss(t, residual)
            return list(torch.autograd.grad(value.sum(), leaves))

    def window(self, t: int, matrices: Matrices) -> Matrices:
        """The gradients of the last four tokens, each weighted by its own gamma, together."""
        total = [torch.zeros_like(matrix) for matrix in matrices]
        for i in range(max(0, t - 3), t + 1):
            total = [s + c * g for s, c, g in zip(total, self.gate("gamma", i), self.gradient(i, matrices), strict=True)]
        return total

    def read(self, t: int, matrices: Matrices) -> Tensor:
        return recall(self.w, matrices, self.q[t])


def descent(tokens: Tokens, *, loss: Loss | None = None) -> Tensor:
    """W_t = alpha_t W_{t-1} - eta_t g_t: Eq. 28 of arXiv 2504.13173; without alpha, Eq. 7 of TTT, arXiv 2407.04620."""
    matrices, frozen, outputs = tokens.start, tokens.start, []
    for t in range(LENGTH):
        frozen = matrices if tokens.opens(t) else frozen
        alpha = tokens.gate("alpha", t) if "alpha" in tokens.gates else [1.0 for _ in matrices]
        g, eta = tokens.gradient(t, frozen, loss), tokens.gate("eta", t)
        matrices = [a * m - e * d for a, m, e, d in zip(alpha, matrices, eta, g, strict=True)]
        outputs.append(tokens.read(t, matrices))
    return torch.stack(outputs)


def yaad(tokens: Tokens) -> Tensor:
    """Eq. 26, the Huber loss of |r|; the threshold is the mean of the channels' deltas."""

    def huber(t: int, r: Tensor) -> Tensor:
        size, delta = torch.sqrt((r**2).sum(-1) + 1e-6), tokens.gates["delta"][t].mean(-1)
        return torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))

    return descent(tokens, loss=huber)


def moneta(tokens: Tokens) -> Tensor:
    """Eq. 24-25 at (p, q) = (3, 4): W = A min(1, (|A_0| / |A|)_4^2), the factor frozen inside a chunk."""

    def cubed(t: int, r: Tensor) -> Tensor:
        return ((r**2 + 1e-6) ** 1.5).sum(-1) / 3

    def size(a: Tensor) -> Tensor:
        return (a**4).sum((1, 2), keepdim=True) ** 0.25 + 1e-8

    carried, frozen, factors, outputs = tokens.start, tokens.start, tokens.start, []
    for t in range(LENGTH):
        if tokens.opens(t):
            factors = [((size(a0) / size(a)) ** 2).clamp(max=1) for a0, a in zip(tokens.start, carried, strict=True)]
            frozen = [s * a for s, a in zip(factors, carried, strict=True)]
        g, eta, alpha = tokens.gradient(t, frozen, cubed), tokens.gate("eta", t), tokens.gate("alpha", t)
        carried = [c * a - e * d for c, a, e, d in zip(alpha, carried, eta, g, strict=True)]
        outputs.append(tokens.read(t, [s * a for s, a in zip(factors, carried, strict=True)]))
    return torch.stack(outputs)


def memora(tokens: Tokens) -> Tensor:
    """Eq. 27 on logits, W = I softmax(Z) along rows, to first order about equal weights inside a chunk.

    The first matrix' rows run over the inputs, so its alpha is the mean over channels; its eta keeps its channels.
    """

    def rows(z: Tensor) -> Tensor:
        shares = torch.exp(z)
        return z.shape[-1] * shares / shares.sum(-1, keepdim=True)

    logits, anchor, frozen, outputs = tokens.start, tokens.start, tokens.start, []
    since = [torch.ones_like(z) for z in logits]
    for t in range(LENGTH):
        if tokens.opens(t):
            anchor, frozen, since = logits, [rows(z) for z in logits], [torch.ones_like(z) for z in logits]
        first, last = tokens.gate("alpha", t)
        alpha = [first.mean(-1, keepdim=True), last]
        g, eta = tokens.gradient(t, frozen), tokens.gate("eta", t)
        logits = [a * z - e * d for a, z, e, d in zip(alpha, logits, eta, g, strict=True)]
        since = [a * s for a, s in zip(alpha, since, strict=True)]
        moved = [z - s * z0 for z, s, z0 in zip(logits, since, anchor, strict=True)]
        seen = [1 + s * (m - 1) + d - d.mean(-1, keepdim=True) for s, m, d in zip(since, frozen, moved, strict=True)]
        outputs.append(tokens.read(t, seen))
    return torch.stack(outputs)


def titans(tokens: Tokens) -> Tensor:
    """Eq. 13-14 of arXiv 2501.00663: S_t = mu_t S_{t-1} - eta_t g_t, W_t = alpha_t W_{t-1} + S_t."""
    matrices, frozen, outputs = tokens.start, tokens.start, []
    surprise = [torch.zeros_like(m) for m in matrices]
    for t in range(LENGTH):
        frozen = matrices if tokens.opens(t) else frozen
        g, eta, mu = tokens.gradient(t, frozen), tokens.gate("eta", t), tokens.gate("momentum", t)
        surprise = [c * s - e * d for c, s, e, d in zip(mu, surprise, eta, g, strict=True)]
        matrices = [a * m + s for a, m, s in zip(tokens.gate("alpha", t), matrices, surprise, strict=True)]
        outputs.append(tokens.read(t, matrices))
    return torch.stack(outputs)


def omega(tokens: Tokens) -> Tensor:
    """Eq. 9 of arXiv 2505.23735: descent on the last four tokens."""
    matrices, frozen, outputs = tokens.start, tokens.start, []
    for t in range(LENGTH):
        frozen = matrices if tokens.opens(t) else frozen
        g, eta, alpha = tokens.window(t, frozen), tokens.gate("eta", t), tokens.gate("alpha", t)
        matrices = [a * m - e * d for a, m, e, d in zip(alpha, matrices, eta, g, strict=True)]
        outputs.append(tokens.read(t, matrices))
    return torch.stack(outputs)


def orthogonalised(s: Tensor) -> Tensor:
    """Muon's quintic on the singular values: five rounds of 3.4445 x - 4.7750 x^3 + 2.0315 x^5, from x over their length."""
    u, sigma, v = torch.linalg.svd(s, full_matrices=False)
    sigma = sigma / torch.sqrt((sigma**2).sum(-1, keepdim=True) + 1e-14)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return (u * sigma[:, None, :]) @ v


def atlas(tokens: Tokens) -> Tensor:
    """Eq. 32-33 of arXiv 2505.23735: S gathers the gradients, and the last token of a chunk takes the step eta NS(S)."""
    matrices, frozen, outputs = tokens.start, tokens.start, []
    surprise = [torch.zeros_like(m) for m in matrices]
    for t in range(LENGTH):
        frozen = matrices if tokens.opens(t) else frozen
        g, mu, alpha = tokens.window(t, frozen), tokens.gate("momentum", t), tokens.gate("alpha", t)
        surprise = [c * s - d for c, s, d in zip(mu, surprise, g, strict=True)]
        matrices = [a * m for a, m in zip(alpha, matrices, strict=True)]
        if tokens.opens(t + 1):
            steps = [e * orthogonalised(s) for e, s in zip(tokens.gate("eta", t), surprise, strict=True)]
            matrices = [m + step for m, step in zip(matrices, steps, strict=True)]
        outputs.append(tokens.read(t, matrices))
    return torch.stack(outputs)


class Layer(NamedTuple):
    """memory: the transcription; eta_base: the largest step; channels: whether gates have one number per channel, not per head."""

    memory: Callable[[Tokens], Tensor]
    eta_base: float
    channels: bool = False


LAYERS = {
    "miras": Layer(descent, 0.05, channels=True),
    "moneta": Layer(moneta, 0.01, channels=True),
    "yaad": Layer(yaad, 0.05, channels=True),
    "memora": Layer(memora, 0.8, channels=True),
    "titans": Layer(titans, 0.025),
    "ttt_linear": Layer(descent, 0.05),
    "ttt_mlp": Layer(descent, 0.05),
    "omega": Layer(omega, 0.025),
    "atlas": Layer(atlas, 0.025),
}


def transcribed(
    layer: Layer, w: Weights, x: Tensor, *, period: int | None = 16, n_turned: int = 8, chunk_size: int = 16
) -> Tensor:
    """y [T, D] of one row x [T, D]."""
    q, k, v = (branch(w, name, x) for name in "qkv")
    places = [t if period is None else t % period for t in range(LENGTH)]
    q, k = (unit(torch.stack([turned(z[t], places[t], n_turned) for t in range(LENGTH)])) for z in (q, k))

    def gate(name: str) -> Tensor:
        u = low_rank(w, name, x)
        return heads(u) if layer.channels else u

    gates = {"eta": layer.eta_base * sigmoid(gate("eta"))}
    if "alpha.up.bias" in w:
        gates["alpha"] = torch.exp(-math.exp(-0.5) * sigmoid(gate("alpha")))
    if "own.delta.up.bias" in w:
        gates["delta"] = torch.log1p(torch.exp(gate("own.delta"))) + 1e-3
    for name in ("momentum", "gamma"):  # one number per head, whatever the others are
        if f"rule_gates.{name}.up.bias" in w:
            gates[name] = sigmoid(low_rank(w, f"rule_gates.{name}", x))
    y = layer.memory(Tokens(q, k, v, gates, w, chunk_size))
    y = w["norm.weight"] * y / torch.sqrt((y**2).mean(-1, keepdim=True) + 1e-5)
    opened = heads(x @ w["gate.weight"].T)
    return (y * opened * sigmoid(opened)).flatten(1) @ w["o.weight"].T


@functools.cache
def prepared(name: str) -> tuple[Miras, Tensor, Tensor]:
    """The mixer, x [B, T, D] and the transcription's y, once for both backends."""
    mixer, x = maker(name, dim=DIM, n_heads=N_HEADS)(), sequence(2, LENGTH, dim=DIM)
    assert isinstance(mixer, Miras)
    with torch.no_grad():
        for fast in mixer.fast if name == "moneta" else ():
            fast *= 0.1  # which the memory outgrows: its norm then acts
        if name == "yaad":
            mixer.own["delta"].up.bias += 4.0  # thresholds on both sides of |r|
    return mixer, x, expected(LAYERS[name], mixer, x)


def expected(layer: Layer, mixer: Miras, x: Tensor, **options: Any) -> Tensor:
    w = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    return torch.stack([transcribed(layer, w, row, **options) for row in x])


def assert_equals(mixer: Miras, x: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        y, _ = mixer(x)
    assert_near(y / wanted.abs().max(), wanted / wanted.abs().max(), EXACT, "y")


@pytest.mark.parametrize("backend", ["default", "chunked"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_paper(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a layer that feeds its memory something else: a gate in another range or on another axis, a norm before the rotation."""
    if backend == "chunked":
        module = sys.modules[scan.__module__]
        module.backends()  # plugins register themselves once, in the real list
        monkeypatch.setattr(module, "PREFERRED", [])
    assert_equals(*prepared(name))


VARIANTS: dict[str, tuple[dict[str, Any], Layer, dict[str, Any]]] = {
    "positions without a period": ({"rope_period": None}, LAYERS["miras"], {"period": None}),
    "every channel turned": ({"rope_fraction": 1.0}, LAYERS["miras"], {"n_turned": 16}),
    "one pair turned": ({"rope_fraction": 0.1}, LAYERS["miras"], {"n_turned": 2}),
    "no positions": ({"rope_theta": None}, LAYERS["miras"], {"n_turned": 0}),
    "no convolutions": ({"conv_width": None}, LAYERS["miras"], {}),
    "seven taps": ({"conv_width": 7}, LAYERS["miras"], {}),
    "gates of heads": ({"channel_gates": False}, Layer(descent, 0.05), {}),
    "own step size": ({"eta_base": 0.02}, Layer(descent, 0.02, channels=True), {}),
    "narrow heads": ({"head_dim": 8}, LAYERS["miras"], {"n_turned": 4}),
    "short chunks": ({"chunk_size": 5}, LAYERS["miras"], {"chunk_size": 5}),
    "every token its own gradient": ({"chunk_size": 1}, LAYERS["miras"], {"chunk_size": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_options_mean_what_they_say(variant: str) -> None:
    """Prevents an option that is accepted and does something else, or nothing."""
    given, layer, options = VARIANTS[variant]
    mixer, x = maker("miras", dim=DIM, n_heads=N_HEADS, **given)(), sequence(2, LENGTH, dim=DIM)
    assert_equals(mixer, x, expected(layer, mixer, x, **options))


# --- gates ------------------------------------------------------------------------------------------------------------------


def fresh(name: str, **options: Any) -> Miras:
    mixer = build(name, dim=DIM, n_heads=N_HEADS, **options)
    assert isinstance(mixer, Miras)
    return mixer.double()


@pytest.mark.parametrize("name", LAYERS)
def test_gates_stay_in_their_ranges(name: str) -> None:
    """Prevents a step without a bound, a memory that forgets all at once or grows, and a threshold of zero, whatever the weights."""
    mixer = fresh(name)
    with torch.no_grad():
        for part, parameter in mixer.named_parameters():
            if part.endswith(("up.weight", "up.bias")):
                parameter.normal_(std=30.0)
        gates = mixer.gates(sequence(2, 50, dim=DIM))
    ranges = {
        "eta": (0.0, LAYERS[name].eta_base),
        "log_alpha": (-math.exp(-0.5), 0.0),
        "delta": (1e-3, math.inf),
        "momentum": (0.0, 1.0),
        "gamma": (0.0, 1.0),
    }
    for gate, values in gates.items():
        low, high = ranges[gate]
        assert low <= values.min() < values.max() <= high, gate
        assert math.isinf(high) or values.max() - values.min() > 0.9 * (high - low), f"{gate} does not use its range"
    channels = {"eta", "log_alpha", "delta"} if LAYERS[name].channels else set()
    assert all(values.dim() == (4 if gate in channels else 3) for gate, values in gates.items())


def test_a_threshold_can_be_the_same_for_every_token() -> None:
    """Prevents a fixed threshold that still sees the token, is not learned, or acts otherwise than the same one from a map."""
    mapped, fixed = fresh("yaad"), fresh("yaad", bias_gates="constant")
    x = sequence(2, LENGTH, dim=DIM)
    with torch.no_grad():
        fixed.own["delta"].bias.normal_(std=2.0)
        same = {name: part for name, part in fixed.state_dict().items() if not name.startswith("own")}
        mapped.load_state_dict(same, strict=False)
        mapped.own["delta"].up.bias.copy_(fixed.own["delta"].bias)  # of a fresh layer, whose maps are constants
    y, wanted = fixed(x)[0], mapped(x)[0]
    assert_near(y, wanted, EXACT, "y")
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert_near(fixed.own["delta"].bias.grad, mapped.own["delta"].up.bias.grad, EXACT, "gradient of the threshold")
    with torch.no_grad():
        mapped.own["delta"].up.weight.normal_()
    assert torch.equal(fixed.gates(x)["delta"], fixed.gates(x.flip(0))["delta"])
    assert not torch.allclose(mapped(x)[0], wanted)
    fixed.reset_parameters()
    assert float(fixed.own["delta"].bias.detach().std()) == 0.0


def test_layers_have_the_gates_of_their_papers() -> None:
    """Prevents a TTT that forgets, a Titans without momentum, an Atlas whose window has no weights."""
    own = {"yaad": {"delta"}, "titans": {"momentum"}, "omega": {"gamma"}, "atlas": {"momentum", "gamma"}}
    for name in LAYERS:
        forgets = set() if name.startswith("ttt") else {"log_alpha"}
        assert set(fresh(name).gates(sequence(1, 2, dim=DIM))) == {"eta", *forgets, *own.get(name, set())}, name


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gates_start_where_they_should(name: str, again: bool) -> None:
    """Prevents a memory that starts forgetful or frozen, also where parameters are drawn anew (as after loading a part of a model)."""
    mixer = fresh(name)
    if again:
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.fill_(7.0)
        mixer.reset_parameters()
    with torch.no_grad():
        gates = mixer.gates(sequence(2, 9, dim=DIM))
    n = SIZE if LAYERS[name].channels else N_HEADS
    low, logit = (-12, -2.3) if name == "memora" else (-10, 0.0)
    ramp = torch.tensor([low + 5 * i / (n - 1) for i in range(n)], dtype=torch.float64)  # over channels, or heads
    wanted = {
        "eta": torch.tensor(LAYERS[name].eta_base / (1 + math.exp(-logit)), dtype=torch.float64),
        "log_alpha": -math.exp(-0.5) / (1 + torch.exp(-ramp)),
        "delta": torch.tensor(1.0, dtype=torch.float64),
        "momentum": torch.tensor(0.5, dtype=torch.float64),
        "gamma": torch.tensor(0.5, dtype=torch.float64),
    }
    for gate, values in gates.items():
        tolerance = {"delta": 5e-3, "eta": 1e-8}.get(gate, 1e-9)  # first biases are drawn in fp32
        assert_near(values, wanted[gate].expand_as(values), tolerance, gate)


def test_one_head_with_one_gate_starts_slow() -> None:
    """Prevents a division by zero, or a fast decay, where the ramp has one step only."""
    mixer = build("titans", dim=8, n_heads=1).double()
    assert mixer.gates(torch.zeros(1, 1, 8, dtype=torch.float64))["log_alpha"].item() == pytest.approx(
        -math.exp(-0.5) / (1 + math.exp(10)), rel=1e-9
    )


@pytest.mark.parametrize("name", LAYERS)
def test_the_learned_memory_starts_at_its_scale(name: str) -> None:
    """Prevents a memory whose hidden units saturate or vanish: std I^(-1/2), of Memora's logits 1/2; the norm is the identity."""
    torch.manual_seed(0)
    mixer = build(name, dim=256, n_heads=4)
    assert len(mixer.fast) == (1 if name == "ttt_linear" else 2)
    for fast in mixer.fast:
        std = 0.5 if name == "memora" else fast.shape[-1] ** -0.5
        assert float(fast.detach().std()) == pytest.approx(std, rel=0.02)
        assert abs(float(fast.detach().mean())) < 0.05 * std
    scale, shift = mixer.slow
    assert torch.equal(scale, torch.ones(4, 64))
    assert not shift.any()


# --- the largest step -------------------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[dict[str, Any], float]] = {
    "dot_product": ({"bias": "dot_product"}, 0.05),
    "l2": ({"bias": "l2"}, 0.05),
    "value_shift": ({"bias": "value_shift"}, 0.05),
    "l1": ({"bias": "l1"}, 0.005),
    "lp": ({"bias": "lp"}, 0.01),
    "l_infinity": ({"bias": "l_infinity"}, 0.01),
    "pseudo_huber": ({"bias": "pseudo_huber"}, 0.02),
    "huber": ({"bias": "huber"}, 0.01),
    "huber by channels": ({"bias": {"name": "huber", "kind": "coordinate"}}, 0.01),
    "huber of the norm": ({"bias": {"name": "huber", "kind": "norm"}}, 0.05),
    "gated memory": ({"memory": "gated_mlp"}, 0.05),
    "momentum": ({"rule": "momentum"}, 0.025),
    "window": ({"rule": {"name": "omega", "window": 2}}, 0.025),
    "window of one token": ({"rule": {"name": "omega", "window": 1}}, 0.05),
    "muon": ({"rule": "muon"}, 0.025),
    "l1 with momentum": ({"bias": "l1", "rule": "momentum"}, 0.0025),
    "kl": ({"retention": "kl"}, 0.8),
    "kl with l1": ({"retention": "kl", "bias": "l1"}, 0.8),
    "kl with momentum": ({"retention": "kl", "rule": "momentum"}, 0.4),
    "matrix": ({"memory": "matrix"}, 0.125),
    "matrix, every token": ({"memory": "matrix", "chunk_size": 1}, 1.0),
    "matrix, long chunks": ({"memory": "matrix", "chunk_size": 64}, 1 / 32),
    "matrix, l1": ({"memory": "matrix", "bias": "l1"}, 0.125),
    "vector": ({"memory": "vector", "chunk_size": 4}, 0.5),
}


@pytest.mark.parametrize("case", STEPS)
def test_default_largest_step(case: str) -> None:
    """Prevents a step size that was measured for one bias, rule or memory from being used by another."""
    options, wanted = STEPS[case]
    mixer = fresh("miras", **options)
    assert default_eta_base(mixer.spec) == pytest.approx(wanted, rel=1e-12)
    assert mixer.eta_base == default_eta_base(mixer.spec)


def test_every_bias_has_a_measured_step() -> None:
    """Prevents a new bias that takes the step of the least squares unnoticed."""
    assert {name for name in STEPS if name in BIASES} == set(BIASES)


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64])
def test_a_matrix_does_not_diverge_on_one_key(chunk_size: int) -> None:
    """Prevents a chunk whose steps together overshoot: the error of a pair that is written again and again must not grow."""
    mixer = fresh("miras", memory="matrix", retention="none", chunk_size=chunk_size)
    key, value = torch.zeros(1, 1, 1, 4, dtype=torch.float64), torch.ones(1, 1, 1, 4, dtype=torch.float64)
    key[..., 0] = 1
    length = 8 * chunk_size
    eta = torch.full((1, length, 1), mixer.eta_base, dtype=torch.float64)  # the gate wide open
    q, v = key.expand(1, length, 1, 4), value.expand(1, length, 1, 4)
    y, _ = scan(mixer.spec, q, q, v, {"eta": eta})
    assert (y - v).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora", "titans", "ttt_mlp"])
def test_a_memory_forgets_where_it_began(name: str) -> None:
    """Prevents first gates so near to chaos that training soon crosses it: with twice the step and four times the forgetting of a
    fresh layer, a change of the first weights must still fade in 512 tokens; gradients through a long text grow as it does."""
    torch.manual_seed(0)
    mixer = build(name, dim=96, n_heads=2).double()
    heads = (1, 512, 2, 48)
    common = torch.randn(1, 1, 2, 48, dtype=torch.float64)  # tokens of a text are alike
    q, k, v = (torch.nn.functional.normalize(torch.randn(heads, dtype=torch.float64) + 0.65 * common, dim=-1) for _ in range(3))
    with torch.no_grad():
        gates = mixer.gates(torch.zeros(1, 512, 96, dtype=torch.float64))
    gates["eta"] = 2 * gates["eta"]
    if "log_alpha" in gates:
        gates["log_alpha"] = 4 * gates["log_alpha"]
    memory = Parameters(*(tuple(part.detach() for part in parts) for parts in mixer.memory_parameters()))
    moved = memory._replace(fast=tuple(part + 1e-6 * torch.randn_like(part) for part in memory.fast))
    one, other = (scan(mixer.spec, q, k, 3 * v, gates, parameters=each)[0] for each in (memory, moved))
    apart = (one - other).norm(dim=-1).mean(dim=(0, 2))
    assert apart[-64:].mean() < apart[:8].mean()


# --- refusals ---------------------------------------------------------------------------------------------------------------

CLOSED = {"memory": "matrix", "chunk_size": 1, "channel_gates": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dim": 0}, "dim and n_heads must be positive; got dim=0"),
    ({"n_heads": 0}, "dim and n_heads must be positive; .* n_heads=0"),
    ({"layer": -1}, "layer is a 0-based depth; got -1"),
    ({"conv_width": 0}, "conv_width counts the inputs that a token sees, its own included: at least 1; got 0"),
    ({"n_heads": 5}, "n_heads must divide dim: dim=32, n_heads=5"),
    ({"n_heads": 32}, "rotary positions need an even head dim; got 1: set head_dim, or rope_theta=None"),
    ({"head_dim": 7}, "rotary positions need an even head dim; got 7"),
    ({"head_dim": 0}, "head_dim"),
    ({"head_dim": -2, "rope_theta": None}, "head_dim"),
    ({"rope_theta": 0.0}, "rope_theta is positive and finite, or None; got 0.0"),
    ({"rope_theta": math.inf}, "rope_theta is positive and finite, or None; got inf"),
    ({"rope_theta": math.nan}, "rope_theta is positive and finite, or None; got nan"),
    ({"rope_fraction": 0.0}, r"rope_fraction is the share of channels that is rotated, in \(0, 1\]; got 0.0"),
    ({"rope_fraction": 1.5}, r"rope_fraction is the share .* got 1.5"),
    ({"rope_fraction": math.nan}, r"rope_fraction is the share .* got nan"),
    ({"rope_period": 0}, "rope_period counts tokens: at least 1, or None; got 0"),
    ({"eta_base": 0.0}, "eta_base is positive and finite; got 0.0"),
    ({"eta_base": -0.1}, "eta_base is positive and finite; got -0.1"),
    ({"eta_base": math.inf}, "eta_base is positive and finite; got inf"),
    ({"eta_base": math.nan}, "eta_base is positive and finite; got nan"),
    ({"gate_rank": 0}, "gate_rank is at least 1; got 0"),
    ({"bias_gates": "head"}, "bias_gates is 'token' or 'constant'; got 'head'"),
    ({"bias_gates": "constant"}, "bias 'l2' has no gates that bias_gates='constant' could fix"),
    ({"chunk_size": 0}, "chunk_size is at least 1; got 0"),
    ({"read": "rough"}, "read is 'linear' or 'exact'; got 'rough'"),
    ({"gradient_at": "next"}, "gradient_at is 'previous' or 'decayed'; got 'next'"),
    ({"gradient_at": "decayed"}, "gradient_at='decayed' needs chunk_size=1"),
    ({"memory": "slots", "bias": "dot_product"}, "memory 'slots' has a mixer of its own: 'gsa'"),
    (
        {"memory": "growing", "retention": "none", "rule": "nonparametric"},
        "memory 'growing' has a mixer of its own: 'attention'",
    ),
    ({"rule": "multi_step"}, "rule 'multi_step' needs several keys per token; it has a mixer of its own: 'delta_product'"),
    ({"rule": "momentum", "channel_gates": True}, "rule 'momentum' takes one gate per head: leave channel_gates out"),
    ({"rule": "omega", "channel_gates": True}, "rule 'omega' takes one gate per head"),
    ({"rule": "muon", "channel_gates": True}, "rule 'muon' takes one gate per head"),
    ({"rule": "least_squares", **CLOSED}, "rule 'least_squares' takes one gate per head"),
    ({"rule": "implicit"}, "rule 'implicit' has a closed form for memory 'matrix' with bias 'l2' only"),
    ({"memory": "perceptron"}, "unknown memory 'perceptron'; known: vector, matrix, mlp"),
    ({"bias": "l7"}, "unknown bias 'l7'; known: dot_product, l2"),
    ({"retention": {"name": "never"}}, "unknown retention 'never'; known: none, l2"),
    ({"rule": "newton"}, "unknown rule 'newton'; known: gd, momentum"),
    ({"bias": {"p": 3.0}}, "unknown bias 'None'"),
    ({"bias": {"name": "lp", "q": 3.0}}, "bias 'lp' has no option 'q'; its options: p"),
    ({"rule": {"name": "gd", "window": 3}}, "rule 'gd' has no option 'window'; its options: none"),
    ({"memory": {"name": "mlp", "depth": 0}}, "a perceptron memory has depth >= 1"),
    ({"bias": {"name": "lp", "p": 0.5}}, "the exponent of lp is at least 1"),
    ({"retention": {"name": "lq", "q": 1.5}}, "q is at least 2 in mode 'safe'"),
    ({"rule": {"name": "omega", "window": 0}}, "the window counts tokens"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda part: str(part) if isinstance(part, dict) else "")
def test_refusals(options: dict[str, Any], message: str) -> None:
    """Prevents a layer that builds and then fails inside, or quietly is another one: the message names the value and what works."""
    with pytest.raises(ValueError, match=message):
        MirasConfig(**{"dim": DIM, "n_heads": N_HEADS, **options})


@pytest.mark.parametrize(
    "options", [{"rope_theta": None, "head_dim": 7}, {"rope_theta": None, "n_heads": 32}, {"head_dim": 6, "n_heads": 5}]
)
def test_what_a_refusal_proposes_works(options: dict[str, Any]) -> None:
    """Prevents advice that leads to the next error: odd heads without positions, and heads of a size of their own."""
    mixer = build("miras", **{"dim": DIM, "n_heads": N_HEADS, **options})
    assert mixer(sequence(1, 3, dim=DIM).float())[0].shape == (1, 3, DIM)
