"""One example per preset and form: its spec, random inputs, and the transcription it must equal. Shared by the tests and the table.

Gates are drawn in the ranges of trained models: alpha = exp(-e^-0.5 sigmoid(u)), eta in (0, eta_base), delta = softplus(u) + 1e-3.

Axis legend: B batch, T time, H heads, K key dim, V value dim, M slots, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.miras import MirasSpec, Parameters, presets
from tests.ops.miras import transcriptions as paper
from tests.ops.miras.transcriptions import Result

BATCH, HEADS = 2, 2
KEY_DIM, VALUE_DIM = 5, 3
MODEL_DIM = 6  # K = V of memories with a residual


class Case(NamedTuple):
    """What goes into `scan`, and `expected(b, h)`, the transcription of row b and head h."""

    preset: str
    source: str
    spec: MirasSpec
    inputs: tuple[Tensor, Tensor, Tensor]
    gates: dict[str, Tensor]
    parameters: Parameters | None
    expected: Callable[[int, int], Result]


class Draw:
    """Random numbers of one case, in fp64, from its own seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape), dim=-1)

    def log_alpha(self, *shape: int) -> Tensor:
        """RWKV-7's decay, most of it close to 1 as it is initialised, now and then the strongest there is."""
        return -math.exp(-0.5) * torch.sigmoid(3 * self.normal(*shape) - 4)

    def delta(self, *shape: int) -> Tensor:
        return F.softplus(self.normal(*shape) + 0.54) + 1e-3


def of(tensor: Tensor, b: int, h: int) -> Tensor:
    """Row b and head h of [B, T, H, ...] -> [T, ...]."""
    return tensor[b, :, h]


# --- matrix memories ----------------------------------------------------------------------------------------------------------

LONG = 150  # crosses the borders of the scans' tiles


def _matrix_inputs(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    q, k = draw.normal(BATCH, LONG, HEADS, KEY_DIM), draw.unit(BATCH, LONG, HEADS, KEY_DIM)
    return q, k, draw.normal(BATCH, LONG, HEADS, VALUE_DIM)


def _linear(name: str, source: str, spec: MirasSpec, decay: str, *, step: bool = False, tied: bool = False) -> Case:
    """A memory of outer products; `decay`: none, constant (one number per head), token or channels; `tied`: k = 1 - alpha."""
    draw = Draw(1)
    q, k, v = _matrix_inputs(draw)
    shape = {"none": (), "constant": (1, 1, HEADS), "token": (BATCH, LONG, HEADS), "channels": (BATCH, LONG, HEADS, KEY_DIM)}
    gates: dict[str, Tensor] = {}
    log_alpha = torch.zeros(BATCH, LONG, HEADS, dtype=torch.float64)
    if decay != "none":
        log_alpha = draw.log_alpha(*shape[decay])
        gates["log_alpha"] = log_alpha = log_alpha.expand(BATCH, LONG, HEADS).clone() if decay == "constant" else log_alpha
    if step:
        gates["eta"] = 0.5 * draw.uniform(BATCH, LONG, HEADS)
    if tied:
        k = 1 - log_alpha.exp()

    def expected(b: int, h: int) -> Result:
        alpha, eta = of(log_alpha, b, h).exp(), of(gates["eta"], b, h) if step else None
        return paper.decayed_outer_products(of(q, b, h), of(k, b, h), of(v, b, h), alpha, eta)

    return Case(name, source, spec, (q, k, v), gates, None, expected)


def linear_attention() -> Case:
    return _linear("linear_attention", "arXiv 2006.16236", presets.linear_attention(), "none")


def retnet() -> Case:
    return _linear("retnet", "arXiv 2307.08621", presets.retnet(), "constant")


def lightning() -> Case:
    return _linear("lightning", "arXiv 2401.04658", presets.lightning(), "constant")


def mamba2() -> Case:
    return _linear("mamba2", "arXiv 2405.21060", presets.mamba2(), "token", step=True)


def gla() -> Case:
    return _linear("gla", "arXiv 2312.06635", presets.gla(), "channels")


def hgrn2() -> Case:
    return _linear("hgrn2", "arXiv 2404.07904", presets.hgrn2(), "channels", tied=True)


def gsa() -> Case:
    draw, n_slots = Draw(2), 4
    q, k, v = _matrix_inputs(draw)
    log_alpha = draw.log_alpha(BATCH, LONG, HEADS, n_slots)

    def expected(b: int, h: int) -> Result:
        return paper.gated_slot_attention(of(q, b, h), of(k, b, h), of(v, b, h), of(log_alpha, b, h).exp())

    return Case("gsa", "arXiv 2409.07146", presets.gsa(n_slots), (q, k, v), {"log_alpha": log_alpha}, None, expected)


def delta_net() -> Case:
    draw = Draw(3)
    q, k, v = _matrix_inputs(draw)
    beta = draw.uniform(BATCH, LONG, HEADS)

    def expected(b: int, h: int) -> Result:
        return paper.delta_net(of(q, b, h), of(k, b, h), of(v, b, h), of(beta, b, h))

    return Case("delta_net", "arXiv 2406.06484", presets.delta_net(), (q, k, v), {"eta": beta}, None, expected)


def gated_delta_net() -> Case:
    draw = Draw(4)
    q, k, v = _matrix_inputs(draw)
    beta, log_alpha = draw.uniform(BATCH, LONG, HEADS), draw.log_alpha(BATCH, LONG, HEADS)

    def expected(b: int, h: int) -> Result:
        return paper.delta_net(of(q, b, h), of(k, b, h), of(v, b, h), of(beta, b, h), of(log_alpha, b, h).exp())

    gates = {"eta": beta, "log_alpha": log_alpha}
    return Case("gated_delta_net", "arXiv 2412.06464", presets.gated_delta_net(), (q, k, v), gates, None, expected)


def rwkv7() -> Case:
    draw = Draw(5)
    q, kappa, v = _matrix_inputs(draw)
    rate, write = draw.uniform(*kappa.shape), draw.normal(*kappa.shape)
    log_alpha = draw.log_alpha(*kappa.shape)

    def expected(b: int, h: int) -> Result:
        decay = of(log_alpha, b, h).exp()
        return paper.rwkv7(of(q, b, h), of(kappa, b, h), of(v, b, h), of(rate, b, h), decay, of(write, b, h))

    gates = {"eta": rate, "log_alpha": log_alpha, "write": write}
    return Case("rwkv7", "arXiv 2503.14456", presets.rwkv7(), (q, kappa, v), gates, None, expected)


def longhorn(channels: bool = False) -> Case:
    draw = Draw(6)
    q, k, v = _matrix_inputs(draw)
    k = 2 * k
    beta = draw.uniform(BATCH, LONG, HEADS, VALUE_DIM) if channels else draw.uniform(BATCH, LONG, HEADS)

    def expected(b: int, h: int) -> Result:
        return paper.longhorn(of(q, b, h), of(k, b, h), of(v, b, h), of(beta, b, h))

    return Case("longhorn", "arXiv 2407.14207", presets.longhorn(), (q, k, v), {"eta": beta}, None, expected)


def delta_product() -> Case:
    draw, n = Draw(7), 3
    q = draw.normal(BATCH, LONG, HEADS, KEY_DIM)
    k, v = draw.unit(BATCH, LONG, n, HEADS, KEY_DIM), draw.normal(BATCH, LONG, n, HEADS, VALUE_DIM)
    beta, log_alpha = draw.uniform(BATCH, LONG, n, HEADS), draw.log_alpha(BATCH, LONG, HEADS)

    def expected(b: int, h: int) -> Result:
        alpha = of(log_alpha, b, h).exp()
        return paper.delta_product(of(q, b, h), k[b, :, :, h], v[b, :, :, h], beta[b, :, :, h], alpha)

    gates = {"eta": beta, "log_alpha": log_alpha}
    return Case("delta_product", "arXiv 2502.10297", presets.delta_product(n), (q, k, v), gates, None, expected)


def mesa() -> Case:
    draw, ridge = Draw(8), 0.7
    q, k, v = _matrix_inputs(draw)
    eta, log_alpha = draw.uniform(BATCH, LONG, HEADS), draw.log_alpha(BATCH, LONG, HEADS)

    def expected(b: int, h: int) -> Result:
        return paper.mesa(of(q, b, h), of(k, b, h), of(v, b, h), ridge, of(eta, b, h), of(log_alpha, b, h).exp())

    gates = {"eta": eta, "log_alpha": log_alpha}
    return Case("mesa", "arXiv 2309.05858", presets.mesa(ridge), (q, k, v), gates, None, expected)


def softmax_attention() -> Case:
    q, k, v = _matrix_inputs(Draw(9))

    def expected(b: int, h: int) -> Result:
        return paper.softmax_attention(of(q, b, h), of(k, b, h), of(v, b, h))

    return Case("softmax_attention", "arXiv 1706.03762", presets.softmax_attention(), (q, k, v), {}, None, expected)


MATRIX_CASES: dict[str, Callable[[], Case]] = {
    "linear_attention": linear_attention,
    "retnet": retnet,
    "lightning": lightning,
    "mamba2": mamba2,
    "gla": gla,
    "hgrn2": hgrn2,
    "gsa": gsa,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "rwkv7": rwkv7,
    "longhorn": longhorn,
    "longhorn-channels": lambda: longhorn(channels=True),
    "delta_product": delta_product,
    "mesa": mesa,
    "softmax_attention": softmax_attention,
}


# --- MLP memories -------------------------------------------------------------------------------------------------------------


class Deep(NamedTuple):
    """Inputs of a deep memory: q, k, v [B, T, H, C], gates by name, and its parameters, moved off their initial values."""

    inputs: tuple[Tensor, Tensor, Tensor]
    gates: dict[str, Tensor]
    parameters: Parameters

    def head(self, b: int, h: int, *names: str) -> tuple[Tensor, ...]:
        """q, k, v and the named gates of one head; "alpha" and "mu" undo the logarithm."""
        logarithms = {"alpha": "log_alpha", "mu": "log_momentum"}
        drawn = [of(self.gates[logarithms[n]], b, h).exp() if n in logarithms else of(self.gates[n], b, h) for n in names]
        return tuple(of(x, b, h) for x in self.inputs) + tuple(drawn)

    def start(self, h: int) -> tuple[list[Tensor], list[Tensor]]:
        """(fast, slow) of head h."""
        return [w[h] for w in self.parameters.fast], [p[h] for p in self.parameters.slow]


def deep(
    spec: MirasSpec,
    chunk_size: int,
    *,
    names: tuple[str, ...],
    eta_base: float,
    channels: bool,
    seed: int,
    std: float | None = None,
    decay: float = 1.0,
) -> Deep:
    """Inputs of 3.5 chunks (14 tokens where a chunk is one token); `decay` scales log alpha, `std` is that of the first weights."""
    draw, length = Draw(seed), 7 * chunk_size // 2 if chunk_size > 1 else 14
    shape = (BATCH, length, HEADS, MODEL_DIM)
    inputs = draw.unit(*shape), draw.unit(*shape), draw.normal(*shape)
    fresh = spec.memory.init(HEADS, MODEL_DIM, MODEL_DIM, std=std, generator=draw.generator, dtype=torch.float64)
    parameters = Parameters(fresh.fast, tuple(p + 0.2 * draw.normal(*p.shape) for p in fresh.slow))
    gate = shape if channels else shape[:-1]
    drawn = {
        "eta": eta_base * torch.sigmoid(draw.normal(*gate)),
        "log_alpha": decay * draw.log_alpha(*gate),
        "delta": draw.delta(*gate),
        "log_momentum": torch.log(torch.sigmoid(draw.normal(*gate[:3]) + 1)),
        "gamma": torch.sigmoid(draw.normal(*gate[:3])),
    }
    return Deep(inputs, {name: drawn[name] for name in names}, parameters)


def moneta(chunk_size: int, *, mode: str = "safe", read: str = "linear", channels: bool = True) -> Case:
    spec = presets.moneta(p=3, q=4, mode=mode, chunk_size=chunk_size, read=read)
    # "safe" acts where the memory outgrows its first norm: little decay, large steps; "paper" inflates under a strong decay.
    gating = {
        "safe": {"eta_base": 2e-2, "decay": 0.01},
        "paper": {"eta_base": 1e-3, "decay": 0.03},
        "ftrl": {"eta_base": 1e-3},
    }[mode]
    made = deep(spec, chunk_size, names=("eta", "log_alpha"), channels=channels, seed=11, **gating)

    def expected(b: int, h: int) -> Result:
        forms = {"chunk_size": chunk_size, "p": 3, "norm_exponent": 4, "mode": mode, "read": read}
        return paper.moneta(*made.head(b, h, "eta", "alpha"), *made.start(h), **forms)

    return Case("moneta", "arXiv 2504.13173 Eq. 24", spec, made.inputs, made.gates, made.parameters, expected)


def yaad(chunk_size: int, *, kind: str = "coordinate", channels: bool = True) -> Case:
    spec = presets.yaad(kind=kind, chunk_size=chunk_size)
    made = deep(spec, chunk_size, names=("eta", "log_alpha", "delta"), eta_base=1e-2, channels=channels, seed=12)
    if kind in ("norm", "switch"):  # thresholds on both sides of |r|
        made.gates["delta"] *= 2.5

    def expected(b: int, h: int) -> Result:
        return paper.yaad(*made.head(b, h, "eta", "alpha", "delta"), *made.start(h), chunk_size=chunk_size, kind=kind)

    return Case("yaad", "arXiv 2504.13173 Eq. 26", spec, made.inputs, made.gates, made.parameters, expected)


def memora(chunk_size: int, *, read: str = "linear", channels: bool = True) -> Case:
    spec = presets.memora(chunk_size=chunk_size, read=read)
    # alpha >= 0.98: logits that decay to 0 make all hidden units equal, and LayerNorm then divides by their vanishing spread; at the
    # full range of alpha one ulp of the first weights already moves y by 5e-13.
    gating = {"names": ("eta", "log_alpha"), "eta_base": 0.1, "channels": channels, "decay": 0.033}
    made = deep(spec, chunk_size, std=0.5, seed=13, **gating)

    def expected(b: int, h: int) -> Result:
        return paper.memora(*made.head(b, h, "eta", "alpha"), *made.start(h), chunk_size=chunk_size, read=read)

    return Case("memora", "arXiv 2504.13173 Eq. 27", spec, made.inputs, made.gates, made.parameters, expected)


def titans(chunk_size: int, *, depth: int = 2, channels: bool = True) -> Case:
    spec = presets.titans(depth=depth, chunk_size=chunk_size)
    names = ("eta", "log_alpha", "log_momentum")
    made = deep(spec, chunk_size, names=names, eta_base=1e-2, channels=channels, seed=14)

    def expected(b: int, h: int) -> Result:
        return paper.titans(*made.head(b, h, "eta", "alpha", "mu"), *made.start(h), chunk_size=chunk_size)

    return Case("titans", "arXiv 2501.00663 Eq. 13-14", spec, made.inputs, made.gates, made.parameters, expected)


def _ttt(name: str, spec: MirasSpec, chunk_size: int, channels: bool) -> Case:
    made = deep(spec, chunk_size, names=("eta",), eta_base=0.1, channels=channels, seed=15)
    ones = torch.ones(made.inputs[0].shape[1], dtype=torch.float64)

    def expected(b: int, h: int) -> Result:
        q, k, v, eta = made.head(b, h, "eta")
        return paper.gradient_descent(
            q, k, v, eta, ones, *made.start(h), chunk_size=chunk_size, losses=lambda t: paper.half_square
        )

    return Case(name, "arXiv 2407.04620 Eq. 7", spec, made.inputs, made.gates, made.parameters, expected)


def ttt_linear(chunk_size: int, *, channels: bool = False) -> Case:
    return _ttt("ttt_linear", presets.ttt_linear(chunk_size=chunk_size), chunk_size, channels)


def ttt_mlp(chunk_size: int, *, channels: bool = False) -> Case:
    return _ttt("ttt_mlp", presets.ttt_mlp(chunk_size=chunk_size), chunk_size, channels)


def omega(chunk_size: int, *, window: int = 3, channels: bool = False) -> Case:
    spec = presets.omega(window, chunk_size=chunk_size)
    made = deep(spec, chunk_size, names=("eta", "log_alpha", "gamma"), eta_base=1e-2, channels=channels, seed=16)

    def expected(b: int, h: int) -> Result:
        inputs = made.head(b, h, "eta", "alpha", "gamma")
        return paper.omega(*inputs, *made.start(h), window=window, chunk_size=chunk_size)

    return Case("omega", "arXiv 2505.23735 Eq. 9", spec, made.inputs, made.gates, made.parameters, expected)


def atlas(chunk_size: int, *, window: int = 3, channels: bool = False) -> Case:
    spec = presets.atlas(window, chunk_size=chunk_size)
    names = ("eta", "log_alpha", "log_momentum", "gamma")
    made = deep(spec, chunk_size, names=names, eta_base=1e-1, channels=channels, seed=17)

    def expected(b: int, h: int) -> Result:
        inputs = made.head(b, h, "eta", "alpha", "mu", "gamma")
        return paper.atlas(*inputs, *made.start(h), window=window, chunk_size=chunk_size)

    return Case("atlas", "arXiv 2505.23735 Eq. 32-33", spec, made.inputs, made.gates, made.parameters, expected)


CHUNK_SIZES = (1, 4, 16)


def _deep_cases() -> Iterator[tuple[str, Callable[[int], Case]]]:
    for mode, read in itertools.product(("safe", "paper", "ftrl"), ("linear", "exact")):
        yield f"moneta-{mode}-{read}", lambda c, m=mode, r=read: moneta(c, mode=m, read=r)
    for kind in ("coordinate", "norm", "switch", "switch_rms"):
        yield f"yaad-{kind}", lambda c, k=kind: yaad(c, kind=k)
    for read in ("linear", "exact"):
        yield f"memora-{read}", lambda c, r=read: memora(c, read=r)
    for depth in (1, 2, 3):
        yield f"titans-{depth}", lambda c, d=depth: titans(c, depth=d)
    yield "ttt_linear", ttt_linear
    yield "ttt_mlp", ttt_mlp
    yield "omega", omega
    yield "atlas", atlas
    for name, make in (("moneta", moneta), ("yaad", yaad), ("memora", memora), ("titans", titans)):
        yield f"{name}-scalar-gates", lambda c, m=make: m(c, channels=False)
    for name, make in (("ttt_linear", ttt_linear), ("ttt_mlp", ttt_mlp), ("omega", omega), ("atlas", atlas)):
        yield f"{name}-channels", lambda c, m=make: m(c, channels=True)


DEEP_CASES: dict[str, Callable[[int], Case]] = dict(_deep_cases())
