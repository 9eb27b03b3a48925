"""What a recurrent memory does, token by token: how surprised it is, how strongly it writes, what it keeps, what a read draws from.

Everything is computed from the call that the layer really makes (`recording`), by making it again: in pieces with carried state (the
memory along the way), with other queries (what it would have answered), or with a graph (what a read depends on). The ops promise
that pieces give what the whole gives.

Axis legend: B batch (1), T time, H heads, K key dim, V value dim, n chosen reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.inspection.miras_view import miras_strips
from recollect.inspection.recording import OPS, Call, recorded
from recollect.inspection.strips import READ_NORM, Strip, forward_fill, pieces, strip
from recollect.mixers import Mixer

N_READS = 12
WEIGHTS = (
    "Exact: this memory is linear in the values, y_t = sum over s of weight(t, s) v_s, before the layer's own norm and gate. "
    "The weight is signed."
)
STEP_WEIGHTS = (
    "Exact: this memory is linear in the values, before the layer's own norm and gate. A token writes {n} values in {n} steps; shown "
    "is the sum of their signed weights in read t."
)
CHANNEL_WEIGHTS = (
    "Exact: this memory is linear in the values with a weight of its own for every channel; shown is the root mean square of the "
    "weights of value s in read t over the channels."
)
SLOPES = (
    "The memory is not linear in the values. Shown is the norm of the gradient of y_t . u with respect to value v_s, u being "
    "y_t / |y_t| held fixed: how far the read moves along its own direction, at most, for a small unit step of v_s (autograd, "
    "first order)."
)
LAYER_SLOPES = (
    "The norm of the gradient of y_t . u with respect to the layer's input x_s, y being the layer's output and u = y_t / |y_t| held "
    "fixed."
)


class Reads(NamedTuple):
    """what: a sentence; queries: int [n], the tokens t whose reads were followed; values [H, n, T]: from every token s, 0 after t."""

    what: str
    queries: list[int]
    values: Tensor


class Remembered(NamedTuple):
    """strips: a value per token and head; reads: None if it has none; missing: a sentence for everything it cannot show."""

    strips: list[Strip]
    reads: Reads | None
    missing: list[str]


def remember(mixer: Mixer, x: Tensor, *, n_reads: int = N_READS) -> Remembered:
    """What the memory of a recurrent layer does with a text.

    Args:
        mixer: any; one that calls none of our recurrences shows its output alone.
        x: its input, [1, T, D].
        n_reads: reads to follow back, evenly over the text, the last token's among them.
    """
    with torch.no_grad(), recorded(mixer) as calls:
        y, _ = mixer(x)
    queries = chosen_reads(x.shape[1], n_reads)
    if not calls:
        size = strip("output", "Output norm", "|y_t| of the layer's output, all heads together.", y[0].norm(dim=-1)[:, None])
        reads = _follow(lambda x: mixer(x[:, :, 0])[0][:, :, None], x[:, :, None], queries, "slope", LAYER_SLOPES)
        return Remembered(
            [size], reads, ["This mixer calls none of the recurrences that can be looked into: only its output is shown."]
        )
    call = _detached(calls[0])
    view = {"scan": _miras, "least_squares_scan": _least_squares, "selective_scan": _selective}[call.op]
    return view(call.arguments, queries)


def chosen_reads(length: int, n_reads: int) -> list[int]:
    """Tokens whose reads are followed, evenly spaced, the last one included."""
    n = min(n_reads, length)
    return sorted({math.ceil((i + 1) * length / n) - 1 for i in range(n)})


def _miras(arguments: dict[str, Any], queries: Sequence[int]) -> Remembered:
    """A call of `recollect.ops.miras.scan`."""
    spec, v = arguments["spec"], arguments["v"]
    strips, missing = miras_strips(arguments)
    by_channel = spec.rule.implicit and arguments["gates"]["eta"].dim() == 4
    linear = spec.memory.kind == "slots" or (
        spec.linear and spec.bias.name in ("l2", "dot_product") and not spec.rule.n_iterations
    )
    several = v.dim() == 5
    if not linear:
        kind, what = "slope", SLOPES
    elif by_channel:
        kind, what = "channels", CHANNEL_WEIGHTS
    else:
        kind, what = "weight", STEP_WEIGHTS.format(n=v.shape[2]) if several else WEIGHTS

    def run(values: Tensor) -> Tensor:
        return OPS["scan"](**{**arguments, "v": values.unflatten(3, (v.shape[2], -1)).transpose(2, 3) if several else values})[
            0
        ]

    # Steps of one token: their values side by side as one wide value of the head.
    flat = v.transpose(2, 3).flatten(3) if several else v
    reads = _follow(run, flat, queries, kind, what, n_steps=v.shape[2] if several else 1)
    return Remembered(strips, reads, missing)


def _least_squares(arguments: dict[str, Any], queries: Sequence[int]) -> Remembered:
    """A call of `least_squares_scan`: the memory is solved for at every token."""
    scan, k, v = OPS["least_squares_scan"], arguments["k"], arguments["v"]
    with torch.no_grad():
        y, _ = scan(**arguments)
        answered, _ = scan(**{**arguments, "q": torch.cat((k[:, 1:], k[:, :1]), dim=1)})
        predicted = torch.cat((torch.zeros_like(answered[:, :1]), answered[:, :-1]), dim=1)
        ends, norms, state = [], [], arguments.get("state")
        for _, last, piece in pieces(arguments, v.shape[1]):
            _, state = scan(**{**piece, "state": state})
            ends.append(last - 1)
            norms.append(state[0].flatten(2).norm(dim=-1))
    strips = [
        strip(
            "surprise",
            "Surprise",
            "|M k_t - v_t|: how far the optimal memory of the tokens before t is from the value that t brings "
            "(the gradient of the l2 bias with respect to the prediction).",
            (predicted - v)[0].norm(dim=-1),
        )
    ]
    if arguments.get("eta") is not None:
        strips.append(
            strip("eta", "Write strength (eta)", "The weight of the token in the least-squares fit.", arguments["eta"][0])
        )
    if arguments.get("log_decay") is not None:
        strips.append(strip("alpha", "Retention (alpha)", "What is kept of the sums so far.", arguments["log_decay"][0].exp()))
    strips.append(strip("read", *READ_NORM, y[0].norm(dim=-1)))
    what = "Frobenius norm of G, the decayed sum of v k^T; the memory itself is G (P + ridge)^-1."
    strips.append(strip("memory", "Memory norm", what, forward_fill(norms, ends, v.shape[1]), ends))
    return Remembered(strips, _follow(lambda v: scan(**{**arguments, "v": v})[0], v, queries, "weight", WEIGHTS), [])


def _selective(arguments: dict[str, Any], queries: Sequence[int]) -> Remembered:
    """A call of `selective_scan`: one memory, whose channels are not divided among heads."""
    scan, x = OPS["selective_scan"], arguments["x"]
    arguments = {**arguments, "skip": None}
    with torch.no_grad():
        y, _ = scan(**arguments)
        ends, norms, state = [], [], arguments.get("state")
        for _, last, piece in pieces(arguments, x.shape[1]):
            _, state = scan(**{**piece, "state": state})
            ends.append(last - 1)
            norms.append(state.flatten(1).norm(dim=-1)[:, None])
    dt, rate = arguments["dt"][0], arguments["A"]
    kept = torch.cat([(some[..., None] * rate).exp().mean((1, 2)) for some in dt.split(64)])
    strips = [
        strip("eta", "Write strength (dt)", "The step size, mean over channels.", dt.mean(-1)[:, None]),
        strip("alpha", "Retention", "exp(dt A), mean over channels and state entries.", kept[:, None]),
        strip("read", READ_NORM[0], "|h_t c_t|, without the direct path from input to output.", y[0].norm(dim=-1)[:, None]),
        strip("memory", "Memory norm", "Frobenius norm of the state h.", forward_fill(norms, ends, x.shape[1]), ends),
    ]
    reads = _follow(
        lambda x: scan(**{**arguments, "x": x[:, :, 0]})[0][:, :, None], x[:, :, None], queries, "channels", CHANNEL_WEIGHTS
    )
    missing = [
        "Surprise: this layer writes without reading first (its bias is the dot product), so its memory cannot be surprised.",
        "Heads: the layer has none; everything is over all channels.",
    ]
    return Remembered(strips, reads, missing)


def _follow(
    run: Callable[[Tensor], Tensor], values: Tensor, queries: Sequence[int], kind: str, what: str, *, n_steps: int = 1
) -> Reads:
    """Reads traced back to values [1, T, H, V]: one backward pass each; heads do not mix, so all heads share it.

    kind: "weight", "channels" or "slope". A linear memory's Jacobian is diagonal, with the same entry for all channels if it is
    "weight", so the gradient of the sum of the read's channels is that diagonal.
    """
    leaf = values.detach().clone().requires_grad_()
    found = []
    with torch.enable_grad():
        y = run(leaf)
        for t in queries:
            read = y[0, t]
            direction = torch.ones_like(read)
            if kind == "slope":
                direction = read.detach() / read.detach().norm(dim=-1, keepdim=True).clamp(min=1e-30)
            (gradient,) = torch.autograd.grad((read * direction).sum(), leaf, retain_graph=True)
            g = gradient[0].float()
            if kind == "weight":
                size = g.unflatten(-1, (n_steps, -1)).mean(-1).sum(-1)
            else:
                size = g.square().mean(-1).sqrt() if kind == "channels" else g.norm(dim=-1)
            found.append(size.T.cpu())
    return Reads(what, list(queries), torch.stack(found, dim=1))


def _detached(call: Call) -> Call:
    """The call with tensors that belong to no graph."""

    def free(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, dict):
            return {name: free(part) for name, part in value.items()}
        if isinstance(value, tuple):
            parts = [free(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return Call(call.op, {name: value if name == "spec" else free(value) for name, value in call.arguments.items()})
