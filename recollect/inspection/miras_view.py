"""What a call of the Miras scan does token by token.

Axis legend: B batch (1), T time, H heads, K key dim, V value dim, C tokens of a chunk, n steps per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.inspection.strips import READ_NORM, Strip, forward_fill, norm_of, per_head, pieces, strip
from recollect.ops.miras import MirasSpec, MirasState, initial_state, scan
from recollect.ops.miras.inputs import named, on_axis

GATES = {
    "eta": ("Write strength (eta)", "The step size of the write; mean over channels."),
    "alpha": ("Retention (alpha)", "The share of the memory that is kept when the token comes; mean over channels."),
    "momentum": ("Momentum", "The share of the last write's direction that is kept."),
    "gamma": ("Token weight (gamma)", "The token's weight in the updates of the window that it takes part in."),
    "delta": ("Threshold (delta)", "Beyond it the bias no longer pulls in proportion to the error; mean over channels."),
}
SURPRISE = (
    "|d loss / d prediction|: the gradient of the attentional bias ({bias}) with respect to what the memory answers to the token's "
    "key, at the point where the layer takes its gradient ({point})."
)
GRADIENT = (
    "|d loss / d memory|: the gradient of the same loss with respect to the memory's matrices together, before step size, "
    "momentum and window."
)
BLIND = "Surprise: this layer writes without reading first (its bias is the dot product), so its memory cannot be surprised."
NO_LOSS = "Surprise: this layer erases under one key and writes under another, so its write is the gradient of no loss."


class Surprise(NamedTuple):
    """Norms [T, H] of the gradients with respect to prediction and memory, and where they were taken."""

    of_prediction: Tensor
    of_memory: Tensor
    point: str


def miras_strips(arguments: dict[str, Any]) -> tuple[list[Strip], list[str]]:
    """Strips of a call, and a sentence for each quantity that it does not have."""
    spec, length, several = arguments["spec"], arguments["q"].shape[1], arguments["v"].dim() == 5
    strips, missing = [], []
    with torch.no_grad():
        y, _ = scan(**arguments)
        stale = spec.stale
        stepwise = stale or (not spec.linear and spec.memory.kind == "parametric")
        norms, ends, surprise = _walk(arguments, length, stepwise)
        if not stepwise:
            surprise = _by_shifted_reads(arguments)
    if isinstance(surprise, Surprise):
        what = SURPRISE.format(bias=spec.bias.name, point=surprise.point)
        strips.append(strip("surprise", "Surprise", what, surprise.of_prediction))
        strips.append(strip("gradient", "Gradient at the memory", GRADIENT, surprise.of_memory))
    elif surprise:
        missing.append(surprise)
    gates = _gates(arguments)
    for name, (title, what) in GATES.items():
        if name in gates:
            strips.append(strip(name, title, what, per_head(gates[name], several and name == "eta")))
    if "eta" not in gates:
        missing.append("Write strength: this layer has no gate of its own for it.")
    if "alpha" not in gates:
        missing.append("Retention: this layer has no gate that forgets.")
    strips.append(strip("read", *READ_NORM, y[0].norm(dim=-1)))
    what = "Frobenius norm of the memory's matrices together" + (
        " (the slots' keys and values)." if spec.memory.kind == "slots" else "."
    )
    strips.append(strip("memory", "Memory norm", what, forward_fill(norms, ends, length), ends))
    return strips, missing


def _gates(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The gates as they act, alpha and momentum as themselves rather than as logarithms."""
    spec: MirasSpec = arguments["spec"]
    gates = dict(arguments["gates"])
    if spec.retention.couple is not None:
        gates = spec.retention.couple(gates)
    for name in ("alpha", "momentum"):
        if f"log_{name}" in gates:
            gates[name] = gates.pop(f"log_{name}").exp()
    return gates


def _walk(arguments: dict[str, Any], length: int, stepwise: bool) -> tuple[list[Tensor], list[int], Surprise | str]:
    """The memory's norm along the text; where the gradient points are states on the way, also the surprise."""
    spec: MirasSpec = arguments["spec"]
    state = arguments.get("state")
    if state is None:
        state = initial_state(
            spec, *(arguments[name] for name in ("q", "k", "v", "gates")), parameters=arguments.get("parameters")
        )
    norms, ends, slopes, gradients = [], [], [], []
    for _, last, piece in pieces(arguments, length, (spec.chunk_size if stepwise else None)):
        if stepwise:
            slope, gradient = _at_point(piece, state)
            slopes.append(slope)
            gradients.append(gradient)
        _, state = scan(**{**piece, "state": state})
        norms.append(norm_of(_weights(arguments, state.dual)))
        ends.append(last - 1)
    if not stepwise:
        return norms, ends, ""
    point = f"the memory at the start of the chunk of {spec.chunk_size}" if spec.stale else "the memory before the token"
    return norms, ends, Surprise(torch.cat(slopes), torch.cat(gradients), point)


def _weights(arguments: dict[str, Any], dual: Sequence[Tensor]) -> list[Tensor]:
    """What is read: the dual itself, or what the retention makes of it."""
    spec, parameters = arguments["spec"], arguments.get("parameters")
    if parameters is None:
        return list(dual)
    return [spec.retention.link(z, initial.to(z.dtype)) for z, initial in zip(dual, parameters.fast, strict=True)]


def _channels(gate: Tensor) -> Tensor:
    """A gate [..., H] or [..., H, channels] with an axis of channels."""
    return gate if gate.dim() == 4 else gate.unsqueeze(-1)


def _at_point(piece: dict[str, Any], state: MirasState) -> tuple[Tensor, Tensor]:
    """Norms [C, H] of the gradients of a chunk's tokens, all at the state before the first of them."""
    spec: MirasSpec = piece["spec"]
    found, exact = _gates(piece), state.dual[0].dtype
    k, v = (piece[name].transpose(1, 2).to(exact) for name in ("k", "v"))
    gates = tuple(_channels(found[name]).transpose(1, 2).to(exact) for name in spec.bias.gates)
    dual: Sequence[Tensor] = state.dual
    if spec.gradient_at == "decayed" and "alpha" in found:  # then a chunk is one token
        log_alpha, row_constant = _channels(found["alpha"])[:, 0].to(exact).log(), spec.retention.row_constant
        kept = (on_axis(log_alpha, axis, row_constant, log=True).exp() for axis in spec.memory.axes)
        dual = [z * alpha for z, alpha in zip(dual, kept, strict=True)]
    weights = _weights(piece, dual)
    slow = [] if piece.get("parameters") is None else [part.to(exact) for part in piece["parameters"].slow]
    slopes: list[Tensor] = []

    def phi(prediction: Tensor) -> Tensor:
        slopes.append(spec.bias.grad(prediction, v, **named(spec.bias.gates, gates)))
        return slopes[-1]

    factors = spec.memory.pullback(weights, slow, k, phi)
    if spec.memory.diagonal:
        squares = [(g * f).square().sum(-1) for g, f in factors]
    else:
        squares = [g.square().sum(-1) * f.square().sum(-1) for g, f in factors]
    return slopes[0].norm(dim=-1)[0].T, torch.stack(squares).sum(0).sqrt()[0].T


def _by_shifted_reads(arguments: dict[str, Any]) -> Surprise | str:
    """Surprise of a linear memory that takes every token on its own: what it would have answered to the next token's key.

    The read at t - 1 with the key of t in place of the query is the prediction at the memory before t; it starts empty.
    """
    spec: MirasSpec = arguments["spec"]
    if spec.hebbian or spec.memory.kind != "parametric":
        return BLIND
    if "write" in arguments["gates"]:
        return NO_LOSS
    n_steps = arguments["v"].shape[2] if arguments["v"].dim() == 5 else 1
    steps = arguments if arguments["v"].dim() == 4 else _single_steps(arguments)
    k, v, gates = steps["k"], steps["v"], _gates(steps)
    asked, point = k, "the memory before the token"
    if steps["spec"].gradient_at == "decayed" and "alpha" in gates:
        asked, point = k * _channels(gates["alpha"]), "the memory before the token, after its decay"
    answered, _ = scan(**{**steps, "q": torch.cat((asked[:, 1:], asked[:, :1]), dim=1)})
    predicted = torch.cat((torch.zeros_like(answered[:, :1]), answered[:, :-1]), dim=1)
    values = tuple(_channels(gates[name]) for name in spec.bias.gates)
    slope = spec.bias.grad(predicted, v, **named(spec.bias.gates, values)).norm(dim=-1)[0]
    sizes = torch.stack((slope, slope * k.norm(dim=-1)[0])).unflatten(1, (-1, n_steps)).square().sum(2).sqrt()
    return Surprise(sizes[0], sizes[1], point if n_steps == 1 else f"{point}; root of the squares' sum over {n_steps} steps")


def _single_steps(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call with n steps per token as one with n tokens: the decay acts before the first step."""
    spec: MirasSpec = arguments["spec"]
    n_steps = arguments["v"].shape[2]
    gates = {"eta": arguments["gates"]["eta"].flatten(1, 2)} if "eta" in arguments["gates"] else {}
    if (alpha := _gates(arguments).get("alpha")) is not None:
        later = torch.ones_like(alpha).unsqueeze(2).expand(-1, -1, n_steps - 1, *alpha.shape[2:])
        gates["alpha"] = torch.cat((alpha.unsqueeze(2), later), dim=2).flatten(1, 2)
    one = MirasSpec(
        memory=spec.memory,
        bias=spec.bias,
        retention=spec.retention,
        rule=spec.rule._replace(n_steps=1),
        gradient_at=spec.gradient_at,
        chunk_size=spec.chunk_size,
    )
    k, v = arguments["k"].flatten(1, 2), arguments["v"].flatten(1, 2)
    return {"spec": one, "q": k, "k": k, "v": v, "gates": gates, "state": arguments.get("state")}
