"""Miras layers: any memory, attentional bias, retention and learning rule between short convolutions and a gated norm.

Moneta, Yaad, Memora, Titans, TTT and Atlas are this one class with other choices.

Axis legend: B batch, T time, D model dim, H heads, K head dim.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.mixers.base import MixerConfig, register
from recollect.mixers.blocks import Constant, HeadNorm, LowRank, exact, l2_normalize
from recollect.mixers.recurrent import Branch, Cached, RecurrentMixer, check_width, no_inputs, run_branches
from recollect.mixers.stream import Steps
from recollect.ops.attention import rotary
from recollect.ops.miras import BIASES, MEMORIES, RETENTIONS, RULES, MirasSpec, MirasState, Parameters, initial_state, scan

LOG_ALPHA_FLOOR = -math.exp(-0.5)  # RWKV-7's range of decays: alpha in (0.545, 1)

CAREFUL_STEPS = {"l1": 0.005, "lp": 0.01, "l_infinity": 0.01, "huber": 0.01, "pseudo_huber": 0.02}  # see `default_eta_base`

Choice = str | Mapping[str, Any]  # "lp" or {"name": "lp", "p": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirasConfig(MixerConfig):
    """Options of a Miras layer.

    The four choices are names from `recollect.ops.miras`, or dicts of a name and its options: "lp", {"name": "lp", "p": 2.5}.

    Attributes:
        memory: "mlp", "gated_mlp", "matrix" or "vector".
        bias: attentional bias: "l2", "lp", "huber", ...
        retention: "l2", "lq", "kl", ...
        rule: "gd", "momentum", "omega", "muon", "implicit" or "least_squares".
        chunk_size: tokens that share one gradient point. It changes the model: keep the value that it was trained with.
        read: "linear" or "exact"; see `MirasSpec`.
        gradient_at: "previous" or "decayed"; see `MirasSpec`.
        head_dim: K; None: dim / n_heads.
        conv_width: taps of the convolutions after q, k, v; None: none.
        rope_theta: base of the rotary wavelengths of q and k; None: no positions.
        rope_fraction: share of the channels that is rotated, in (0, 1]. A perceptron is no function of q . k, so a key that is
            rotated as a whole is another key at every position; the other channels say what it is wherever it stands.
        rope_period: positions are taken modulo this (as TTT does by its chunk), so that a long text shows the memory no angle that
            training has not; None: positions since the document's start.
        eta_base: largest inner step size; None: `default_eta_base`.
        channel_gates: eta and alpha (and delta) for every channel instead of every head; None: where the rule allows it.
        gate_rank: middle width of the gates' low-rank maps; None: 32 up to D = 1024, else 64.
        bias_gates: "token": the bias' own gates (Huber's threshold delta) are maps of the token; "constant": learned numbers, the
            same for all tokens.
    Raises:
        ValueError: a number out of its range; what `spec` refuses; choices that are a mixer of their own (slots, softmax attention,
            several steps per token); channel-wise gates with a rule that takes one number per head.
    """

    memory: Choice = "mlp"
    bias: Choice = "l2"
    retention: Choice = "l2"
    rule: Choice = "gd"
    chunk_size: int = 16
    read: str = "linear"
    gradient_at: str = "previous"
    head_dim: int | None = None
    conv_width: int | None = 4
    rope_theta: float | None = 1e4
    rope_fraction: float = 0.5
    rope_period: int | None = 16
    eta_base: float | None = None
    channel_gates: bool | None = None
    gate_rank: int | None = None
    bias_gates: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("conv_width", self.conv_width)
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim is at least 1, or None; got {self.head_dim}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"n_heads must divide dim: dim={self.dim}, n_heads={self.n_heads}")
        size = self.head_size
        if self.rope_theta is not None and (size < 2 or size % 2):
            raise ValueError(f"rotary positions need an even head dim; got {size}: set head_dim, or rope_theta=None")
        if self.rope_theta is not None and not 0.0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is positive and finite, or None; got {self.rope_theta}")
        if not 0.0 < self.rope_fraction <= 1.0:
            raise ValueError(f"rope_fraction is the share of channels that is rotated, in (0, 1]; got {self.rope_fraction}")
        if self.rope_period is not None and self.rope_period < 1:
            raise ValueError(f"rope_period counts tokens: at least 1, or None; got {self.rope_period}")
        if self.eta_base is not None and not 0.0 < self.eta_base < math.inf:
            raise ValueError(f"eta_base is positive and finite; got {self.eta_base}")
        if self.gate_rank is not None and self.gate_rank < 1:
            raise ValueError(f"gate_rank is at least 1; got {self.gate_rank}")
        if self.bias_gates not in ("token", "constant"):
            raise ValueError(f"bias_gates is 'token' or 'constant'; got {self.bias_gates!r}")
        spec = self.spec()
        if self.bias_gates == "constant" and not spec.bias.gates:
            raise ValueError(f"bias {spec.bias.name!r} has no gates that bias_gates='constant' could fix")
        elsewhere = {"slots": "gsa", "growing": "attention"}
        if spec.memory.kind in elsewhere:
            raise ValueError(f"memory {spec.memory.name!r} has a mixer of its own: {elsewhere[spec.memory.kind]!r}")
        if spec.rule.n_steps > 1:
            raise ValueError("rule 'multi_step' needs several keys per token; it has a mixer of its own: 'delta_product'")
        if self.channel_gates and not _channels_allowed(spec):
            raise ValueError(f"rule {spec.rule.name!r} takes one gate per head: leave channel_gates out or set it to False")

    @property
    def head_size(self) -> int:
        """K."""
        return self.head_dim or self.dim // self.n_heads

    def spec(self) -> MirasSpec:
        """The four choices as values.

        Raises:
            ValueError: an unknown name or option, or choices that have no meaning together.
        """
        return MirasSpec(
            memory=_choose("memory", MEMORIES, self.memory),
            bias=_choose("bias", BIASES, self.bias),
            retention=_choose("retention", RETENTIONS, self.retention),
            rule=_choose("rule", RULES, self.rule),
            chunk_size=self.chunk_size,
            gradient_at=self.gradient_at,
            read=self.read,
        )


@register(
    "miras", config=MirasConfig, summary="any memory x bias x retention x rule", source="arXiv 2504.13173", state="constant"
)
@register(
    "moneta",
    config=MirasConfig,
    options={"bias": {"name": "lp", "p": 3.0}, "retention": {"name": "lq", "q": 4.0}},
    summary="Moneta: perceptron memory, l_3 bias, l_4 retention",
    source="arXiv 2504.13173",
    state="constant: 8 K^2 numbers per head, and the open chunk's start",
)
@register(
    "yaad",
    config=MirasConfig,
    options={"bias": {"name": "huber", "kind": "norm"}},
    summary="Yaad: perceptron memory, Huber bias with a learned threshold, l_2 retention",
    source="arXiv 2504.13173",
    state="constant: 8 K^2 numbers per head, and the open chunk's start",
)
@register(
    "memora",
    config=MirasConfig,
    options={"retention": "kl"},
    summary="Memora: perceptron memory, l_2 bias, KL retention (weights are softmaxes)",
    source="arXiv 2504.13173",
    state="constant: 8 K^2 numbers per head, and the open chunk's start",
)
@register(
    "titans",
    config=MirasConfig,
    options={"rule": "momentum"},
    summary="Titans' long-term memory: perceptron, l_2 bias, forgetting, momentum",
    source="arXiv 2501.00663",
    state="constant: 16 K^2 numbers per head, and the open chunk's start",
)
@register(
    "ttt_linear",
    config=MirasConfig,
    options={"memory": {"name": "mlp", "depth": 1}, "retention": "none", "channel_gates": False},
    summary="TTT-Linear: matrix memory with a norm and a residual, gradient descent",
    source="arXiv 2407.04620",
    state="constant: K^2 numbers per head, and the open chunk's start",
)
@register(
    "ttt_mlp",
    config=MirasConfig,
    options={"retention": "none", "channel_gates": False},
    summary="TTT-MLP: perceptron memory, gradient descent",
    source="arXiv 2407.04620",
    state="constant: 8 K^2 numbers per head, and the open chunk's start",
)
@register(
    "omega",
    config=MirasConfig,
    options={"rule": "omega"},
    summary="OmegaNet: perceptron memory, descent on the last four tokens",
    source="arXiv 2505.23735",
    state="constant: 8 K^2 numbers per head, the open chunk's start and the last tokens",
)
@register(
    "atlas",
    config=MirasConfig,
    options={"rule": {"name": "muon", "window": 4}},
    summary="Atlas: perceptron memory, Muon on the last four tokens",
    source="arXiv 2505.23735",
    state="constant: 16 K^2 numbers per head, the open chunk's start and the last tokens",
)
class Miras(RecurrentMixer):
    """A Miras layer.

    q, k, v = silu(conv4(W x)); q and k rotated and of norm one; gates from low-rank maps of x;
    y = W_o (norm(memory read) * silu(W_g x)).
    The memory before the first token is learned (of a plain matrix memory it is zero).

    Titans, TTT, OmegaNet and Atlas have their own memories in this layer, so that comparing names compares memories. Their papers'
    layers have: no positions (Titans: `rope_theta=None`); all channels rotated, a learned factor on the step of a chunk's i-th token
    that starts at 1 / i, steps divided by K, in the Transformer form no convolutions (TTT: `rope_fraction=1`, `conv_width=None`);
    polynomial features of keys and queries (OmegaNet, Atlas), which are not here.

    Source: Behrouz et al. 2025, arXiv 2504.13173, sections 5.3-5.4. The paper leaves the gates' ranges and initial values, the axes
    they act on, activation and order in the layer open; what we chose is in docs/math.md.
    """

    config: MirasConfig

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        dim, n_heads, size = config.dim, config.n_heads, config.head_size
        self.spec = config.spec()
        self.channels = _channels_allowed(self.spec) if config.channel_gates is None else config.channel_gates
        self.eta_base = default_eta_base(self.spec) if config.eta_base is None else config.eta_base
        self.step_share = 1.0  # of the inner step size; `models.set_inner_steps` warms it up
        self.q = Branch(dim, n_heads, size, conv_width=config.conv_width)
        self.k = Branch(dim, n_heads, size, conv_width=config.conv_width)
        self.v = Branch(dim, n_heads, size, conv_width=config.conv_width)
        rank = config.gate_rank or (32 if dim <= 1024 else 64)
        n_gates = n_heads * (size if self.channels else 1)
        first = first_gates(self.spec)
        self.eta = LowRank(dim, rank, n_gates, bias=first.eta)
        forgetting = _ramp(*first.alpha, size if self.channels else n_heads) * (n_heads if self.channels else 1)
        self.alpha = LowRank(dim, rank, n_gates, bias=forgetting) if _forgets(self.spec) else None
        own = partial(Constant, bias=0.54) if config.bias_gates == "constant" else partial(LowRank, dim, rank, bias=0.54)
        self.own = nn.ModuleDict({name: own(n_gates) for name in self.spec.bias.gates})
        self.rule_gates = nn.ModuleDict({name: LowRank(dim, rank, n_heads, bias=0.0) for name in self.spec.rule.gates})
        learned = not self.spec.linear
        drawn = self.spec.memory.init(n_heads, size, size, std=0.0)
        self.fast = nn.ParameterList([torch.empty_like(part) for part in drawn.fast] if learned else [])
        self.slow = nn.ParameterList([torch.empty_like(part) for part in drawn.slow])
        self.gate = nn.Linear(dim, n_heads * size, bias=False)
        self.norm = HeadNorm(size)
        self.o = nn.Linear(n_heads * size, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights; the memory's matrices normal with std I^(-1/2) (logits of the KL retention: 1/2), its norm the identity."""
        super().reset_parameters()
        for fast in self.fast:
            fast.normal_(std=0.5 if self.spec.retention.row_constant else fast.shape[-1] ** -0.5)
        for n, slow in enumerate(self.slow):
            nn.init.constant_(slow, float(n == 0))

    def start(self, batch_size: int) -> tuple[MirasState, Cached]:
        """The learned memory, and inputs of zeros."""
        weight, size = self.o.weight, self.config.head_size
        none = weight.new_zeros(batch_size, 0, self.config.n_heads, size)
        gates = dict.fromkeys(("eta", *self.spec.bias.gates), none if self.channels else none[..., 0])
        if self.alpha is not None:
            gates["log_alpha"] = gates["eta"]
        memory = initial_state(self.spec, none, none, none, gates, parameters=self.memory_parameters())
        return memory, no_inputs((self.q, self.k, self.v), batch_size)

    def fresh(self, batch_size: int) -> tuple[MirasState | None, Cached]:
        """No memory: the scan starts one, and then knows that no chunk is open."""
        return None, no_inputs((self.q, self.k, self.v), batch_size)

    def mix(self, x: Tensor, memory: MirasState | None, inputs: Cached, steps: Steps) -> tuple[Tensor, MirasState, Cached]:
        """See `RecurrentMixer.mix`."""
        (q, k, v), inputs = run_branches((self.q, self.k, self.v), x, inputs, steps)
        q, k = (l2_normalize(self._rotate(x, steps.positions)) for x in (q, k))
        y, memory = scan(
            self.spec,
            q,
            k,
            v,
            self.gates(x),
            memory,
            parameters=self.memory_parameters(),
            reset=steps.reset,
            valid=steps.valid,
            decay_floor=None if self.spec.retention.couple else LOG_ALPHA_FLOOR,
        )
        y = self.norm(y, self.gate(x).unflatten(-1, (self.config.n_heads, -1)))
        return self.o(y.flatten(2)), memory, inputs

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The first channels of x [B, T, H, K] by their positions."""
        theta = self.config.rope_theta
        if theta is None:
            return x
        positions = positions if self.config.rope_period is None else positions % self.config.rope_period
        size = max(2, int(x.shape[-1] * self.config.rope_fraction) // 2 * 2)
        if size == x.shape[-1]:
            return rotary(x, positions, theta=theta)
        return torch.cat((rotary(x[..., :size], positions, theta=theta), x[..., size:]), dim=-1)

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """What a token tells the memory, by name, in fp32 (fp64 for fp64).

        Args:
            x: [B, T, D].
        Returns:
            each [B, T, H], or [B, T, H, K] with `channel_gates`:
            "eta" in (0, step_share * eta_base); "log_alpha" in (-exp(-1/2), 0), unless the retention has none or derives it;
            the bias' own, above 1e-3; the rule's own in (0, 1), always [B, T, H].
        """

        def heads(u: Tensor, channels: bool) -> Tensor:
            (u,) = exact(u)
            return u.unflatten(-1, (self.config.n_heads, -1)) if channels else u

        found = {"eta": self.step_share * self.eta_base * torch.sigmoid(heads(self.eta(x), self.channels))}
        if self.alpha is not None:
            found["log_alpha"] = LOG_ALPHA_FLOOR * torch.sigmoid(heads(self.alpha(x), self.channels))
        for name, generator in self.own.items():
            found[name] = F.softplus(heads(generator(x), self.channels)) + 1e-3
        for name, generator in self.rule_gates.items():
            found[name] = torch.sigmoid(heads(generator(x), False))
        return found

    def memory_parameters(self) -> Parameters | None:
        """What is learned of the memory; None if it starts from zeros."""
        return Parameters(tuple(self.fast), tuple(self.slow)) if len(self.fast) else None


def default_eta_base(spec: MirasSpec) -> float:
    """The largest inner step size of a layer; see `first_gates` for what it starts with.

    For perceptrons, the middle of the range in which a fresh memory recalls random pairs best after one pass; that range hardly moves
    with the width (16 to 128), the chunk (1 to 64) and the number of pairs (16 to 128). Biases that do not pull harder the farther
    off a channel is, or pull at the farthest ones most, take less: with more the gradient through a long text grows without bound.
    LOG.md has the figures of both. A matrix has no norm that would hold it: a chunk's steps together must stay below 2, even if all
    its keys are one.

    Args:
        spec: any; memory, bias, retention and rule count, and of a matrix or vector the chunk size.
    Returns:
        in (0, 1]; measured for keys and queries of norm one.
    """
    if spec.memory.name in ("matrix", "vector"):
        return min(1.0, 2.0 / spec.chunk_size)
    of_norm = spec.bias.name == "huber" and spec.bias.options[0] == "norm"
    base = 0.8 if spec.retention.row_constant else 0.05 if of_norm else CAREFUL_STEPS.get(spec.bias.name, 0.05)
    return base / 2 if spec.rule.momentum or spec.rule.window > 1 else base


class FirstGates(NamedTuple):
    """Logits that gates start with: of eta, and of alpha from the first channel to the last."""

    eta: float
    alpha: tuple[float, float]


def first_gates(spec: MirasSpec) -> FirstGates:
    """Where the gates of a layer start: half of `eta_base`, and slow forgetting, since the norm behind a perceptron multiplies the
    gradient of weights that have decayed by what they have lost, chunk after chunk.

    Weights that are softmaxes start with an eleventh of `eta_base`, and forget slower: forgetting makes their rows even, and what is
    left is all that the norm sees. With the larger steps the memory is chaotic on long texts, without any no recall is learned;
    LOG.md has the figures.
    """
    return FirstGates(-2.3, (-12.0, -7.0)) if spec.retention.row_constant else FirstGates(0.0, (-10.0, -5.0))


def _channels_allowed(spec: MirasSpec) -> bool:
    """Whether gates may act on channels: rules that mix a chunk's gradients need one number per head."""
    return not (spec.rule.momentum or spec.rule.window > 1 or spec.rule.kind != "gradient")


def _forgets(spec: MirasSpec) -> bool:
    """Whether there is an alpha gate: it has a meaning, and the retention does not derive it from eta."""
    return spec.retention.decays and spec.retention.couple is None


def _ramp(low: float, high: float, n: int) -> list[float]:
    """n numbers from low to high."""
    return [low + (high - low) * i / max(1, n - 1) for i in range(n)]


def _choose(axis: str, known: Mapping[str, Callable[..., Any]], choice: Choice) -> Any:
    """Build one of the four choices from its name and options."""
    options: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = str(options.pop("name", None))
    if name not in known:
        raise ValueError(f"unknown {axis} {name!r}; known: {', '.join(known)}")
    accepted = inspect.signature(known[name]).parameters
    for option in options:
        if option not in accepted:
            takes = ", ".join(accepted) or "none"
            raise ValueError(f"{axis} {name!r} has no option {option!r}; its options: {takes}")
    return known[name](**options)
