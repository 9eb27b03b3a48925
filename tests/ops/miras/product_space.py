"""A deterministic sample of memory x bias x retention x rule x chunk size x read x ..., and inputs for its members.

Every pair of values of two axes stands in the sample: in a combination that runs if there is one, else in one that is refused.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.ops.miras import BIASES, MEMORIES, RETENTIONS, RULES, MirasSpec, MirasState, Parameters, scan
from tests.ops.miras.cases import Draw

BATCH, HEADS, WIDTH, LENGTH = 2, 2, 4, 11

Options = dict[str, Any]

# Options of each registered name under a label; a name that is not here stands with its defaults.
VARIANTS: dict[str, dict[str, dict[str, Options]]] = {
    "memory": {
        "mlp": {
            "mlp1": {"depth": 1},
            "mlp2": {"depth": 2, "expansion": 2},
            "mlp3-bare": {"depth": 3, "expansion": 2, "activation": "silu", "residual": False, "norm": False},
        },
        "gated_mlp": {"gated_mlp": {"expansion": 2}},
        "slots": {"slots": {"n_slots": 3}},
    },
    "bias": {
        "lp": {"lp3": {"p": 3.0}},
        "huber": {kind: {"kind": kind} for kind in ("coordinate", "norm", "switch", "switch_rms")},
    },
    "retention": {
        "lq": {f"lq-{mode}": {"q": 4, "mode": mode} for mode in ("safe", "paper", "ftrl")},
        "f_divergence": {f"f_divergence-{kind}": {"kind": kind} for kind in ("chi2", "hellinger")},
        "l2_coupled": {"l2_coupled": {"beta": 10.0}},
        "elastic_net": {"elastic_net": {"gamma": 0.02}},
        "elastic_net_ftrl": {"elastic_net_ftrl": {"gamma": 0.1}},
    },
    "rule": {
        "multi_step": {"multi_step": {"n_steps": 2}},
        "omega": {"omega": {"window": 3}},
        "muon": {"muon": {"window": 2}},
    },
}
REGISTRIES: dict[str, dict[str, Callable[..., Any]]] = {
    "memory": dict(MEMORIES),
    "bias": dict(BIASES),
    "retention": dict(RETENTIONS),
    "rule": dict(RULES),
}


def _parts(axis: str) -> dict[str, Any]:
    """Label -> built part, for every registered name of an axis."""
    made = {}
    for name, build in REGISTRIES[axis].items():
        for label, options in VARIANTS[axis].get(name, {name: {}}).items():
            made[label] = build(**options)
    return made


PARTS = {axis: _parts(axis) for axis in REGISTRIES}
AXES: dict[str, tuple[Any, ...]] = {
    **{axis: tuple(parts) for axis, parts in PARTS.items()},
    "chunk_size": (4, 1),
    "read": ("linear", "exact"),
    "gradient_at": ("previous", "decayed"),
    "gates": ("scalar", "channels"),
}


class Choice(NamedTuple):
    """One value per axis, by label."""

    memory: str
    bias: str
    retention: str
    rule: str
    chunk_size: int
    read: str
    gradient_at: str
    gates: str

    def spec(self) -> MirasSpec:
        """The spec, or ValueError where the choices have no meaning together."""
        return MirasSpec(
            memory=PARTS["memory"][self.memory],
            bias=PARTS["bias"][self.bias],
            retention=PARTS["retention"][self.retention],
            rule=PARTS["rule"][self.rule],
            chunk_size=self.chunk_size,
            read=self.read,
            gradient_at=self.gradient_at,
        )

    def __str__(self) -> str:
        return "-".join(str(value) for value in self)


def runs(choice: Choice) -> bool:
    """Whether the choices can be built together."""
    try:
        choice.spec()
    except ValueError:
        return False
    return True


def special_forms() -> list[Choice]:
    """Matrix memories that `scan` runs by ops of their own; gates "write": a write key of its own (RWKV-7)."""
    made = [
        Choice("matrix", bias, retention, rule, 1, "linear", gradient_at, gates)
        for bias, rule, retention, gradient_at, gates in itertools.product(
            ("dot_product", "l2"), ("gd", "multi_step", "implicit"), ("none", "l2"), AXES["gradient_at"], AXES["gates"]
        )
    ]
    made.append(Choice("matrix", "l2", "l2", "gd", 1, "linear", "previous", "write"))
    return [choice for choice in made if runs(choice)]


def pairwise_sample(n_tries: int = 20) -> tuple[list[Choice], list[Choice]]:
    """(combinations that run, combinations that are refused); together they hold every pair of values of two axes.

    Greedy: a pair that is still missing takes, of `n_tries` random completions that run, the one with the most missing pairs. A pair
    is only refused if no completion runs at all.
    """
    generator, names = random.Random(0), list(AXES)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x, y in itertools.product(AXES[names[a]], AXES[names[b]])
    }
    running = special_forms()
    for choice in running:
        missing -= _pairs(choice)
    refused: list[Choice] = []
    for pair in sorted(missing, key=lambda pair: (-len(AXES[names[pair[0][0]]]) * len(AXES[names[pair[1][0]]]), repr(pair))):
        if pair not in missing:
            continue
        given = dict(pair)
        options = [(given[axis],) if axis in given else AXES[name] for axis, name in enumerate(names)]
        drawn = [Choice(*(generator.choice(values) for values in options)) for _ in range(n_tries)]
        best = max((choice for choice in drawn if runs(choice)), key=lambda choice: len(missing & _pairs(choice)), default=None)
        if best is None:
            best = next((choice for choice in itertools.starmap(Choice, itertools.product(*options)) if runs(choice)), None)
        if best is None:
            refused.append(drawn[0])
            missing.discard(pair)
        else:
            running.append(best)
            missing -= _pairs(best)
    return running, refused


def _pairs(choice: Choice) -> set[Any]:
    return set(itertools.combinations(enumerate(choice), 2))


class Example(NamedTuple):
    """Arguments of `scan` for one choice."""

    spec: MirasSpec
    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    parameters: Parameters

    @property
    def learned(self) -> bool:
        """Whether the memory before the first token can be learned: forms with a scan of their own start from zeros."""
        own = self.spec.memory.kind != "parametric" or self.spec.rule.kind != "gradient" or self.spec.rule.implicit
        return not own and "write" not in self.gates

    def tensors(self) -> list[Tensor]:
        """Everything that has a gradient."""
        learned = [*self.parameters.fast, *self.parameters.slow] if self.learned else []
        return [self.q, self.k, self.v, *self.gates.values(), *learned]

    def sequence(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same with `change` of every tensor [B, T, ...]."""
        gates = {name: change(gate) for name, gate in self.gates.items()}
        return self._replace(q=change(self.q), k=change(self.k), v=change(self.v), gates=gates)

    def part(self, rows: slice, tokens: slice) -> Example:
        """Rows and tokens of the batch."""
        return self.sequence(lambda x: x[rows, tokens])

    def scan(self, state: MirasState | None = None, **options: Any) -> tuple[Tensor, MirasState]:
        """y and the next state."""
        return scan(
            self.spec,
            self.q,
            self.k,
            self.v,
            self.gates,
            state,
            parameters=self.parameters if self.learned else None,
            **options,
        )


def example(choice: Choice, *, seed: int = 0, length: int = LENGTH) -> Example:
    """Random inputs in the ranges that a mixer feeds, parameters moved off their initial values, fp64."""
    draw, spec = Draw(seed), choice.spec()
    tied = spec.memory.residual or spec.memory.diagonal or spec.memory.name == "mlp"
    value_dim = WIDTH if tied else WIDTH - 1
    n_steps = spec.rule.n_steps
    steps = (n_steps,) if spec.rule.name == "multi_step" else ()
    token = (BATCH, length, HEADS)
    written = (BATCH, length, *steps, HEADS)
    q, k, v = draw.unit(*token, WIDTH), draw.unit(*written, WIDTH), draw.normal(*written, value_dim)
    channels = (WIDTH,) if choice.gates != "scalar" and spec.rule.kind == "gradient" else ()
    step_channels = (value_dim,) if channels and spec.rule.implicit else channels
    gates = {}
    if spec.memory.kind == "parametric":
        gates["eta"] = 0.1 * draw.uniform(*written, *step_channels)
        if spec.retention.decays and spec.retention.couple is None:
            # Weak enough that no LayerNorm divides by the spread of a memory that has decayed to zero: that amplifies rounding.
            gates["log_alpha"] = (0.03 if spec.memory.n_slow else 1.0) * draw.log_alpha(*token, *channels)
    if spec.memory.kind == "slots":
        gates["log_alpha"] = draw.log_alpha(*token, spec.memory.n_slots)
    if choice.gates == "write":
        gates["write"] = draw.normal(*token, WIDTH)
    if "delta" in spec.bias.gates and spec.memory.kind == "parametric":
        gates["delta"] = draw.delta(*token, *((value_dim,) if channels else ()))
    if "momentum" in spec.rule.gates:
        gates["log_momentum"] = torch.log(torch.sigmoid(draw.normal(*token) + 1))
    if "gamma" in spec.rule.gates:
        gates["gamma"] = torch.sigmoid(draw.normal(*token))
    fresh = spec.memory.init(HEADS, WIDTH, value_dim, generator=draw.generator, dtype=torch.float64)
    # Rows of a softmax that are nearly equal make hidden units nearly equal, which amplifies rounding like a decayed memory does.
    spread = 2.0 if spec.retention.name == "kl" else 1.0
    fast = tuple(spread * (w + 0.3 * draw.normal(*w.shape)) for w in fresh.fast)
    slow = tuple(p + 0.2 * draw.normal(*p.shape) for p in fresh.slow)
    made = Example(spec, q, k, v, gates, Parameters(fast, slow))
    return made if made.learned else made._replace(parameters=Parameters(tuple(torch.zeros_like(w) for w in fast), slow))
