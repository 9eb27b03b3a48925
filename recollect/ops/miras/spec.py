"""A sequence mixer as four choices, and what it carries from token to token."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.miras.biases import AttentionalBias
from recollect.ops.miras.memories import Memory
from recollect.ops.miras.retentions import Retention
from recollect.ops.miras.rules import LearningRule


class Tail(NamedTuple):
    """The last W - 1 tokens, for rules with a window: k [B, W-1, H, K], v [B, W-1, H, V], gamma [B, W-1, H] (0: no token), and the
    bias' own gates [B, W-1, H, ...]."""

    k: Tensor
    v: Tensor
    gamma: Tensor
    gates: tuple[Tensor, ...]


class MirasState(NamedTuple):
    """What is carried from token to token; every tensor is batch first.

    Attributes:
        dual: Z per matrix [B, H, O, I]; for the growing memory keys and values [B, S, H, K or V].
        anchor: Z at the start of the open chunk, where its gradients are taken; None if every token takes its own.
        kept: per matrix, log of the product of alpha since the anchor [B, H, 1 or channels]; None unless reads need it (`framed`).
        momentum: S per matrix, or None.
        tail: the window's earlier tokens, or None.
        phase: int64 [B], tokens in the open chunk (steps, for rule multi_step).
    """

    dual: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...] | None
    kept: tuple[Tensor, ...] | None
    momentum: tuple[Tensor, ...] | None
    tail: Tail | None
    phase: Tensor


def held(dual: tuple[Tensor, ...], phase: Tensor | None = None) -> MirasState:
    """A state without an open chunk: of memories [B, ...] that take every token at once."""
    if phase is None:
        phase = torch.zeros(dual[0].shape[0], dtype=torch.int64, device=dual[0].device)
    return MirasState(dual, None, None, None, None, phase)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirasSpec:
    """A sequence mixer: memory structure x attentional bias x retention x learning rule.

        Z_t = alpha_t Z_{t-1} + D_t,   W_t = link(Z_t),   y_t = read(W_t; q_t)

    Attributes:
        memory, bias, retention, rule: the four choices.
        chunk_size: tokens that share one gradient point, the state before the first of them. It changes the model (1: every token
            takes its gradient at the state before it); how many tokens a scan computes at once never does.
        gradient_at: "previous": at W_{t-1}, Miras' and Titans' own; "decayed": at alpha_t W_{t-1}, Gated DeltaNet's (chunk_size 1).
        read: inside a chunk, where the retention is not linear: "linear" reads through the retention's `frame` at the chunk's start
            (matrix products only), "exact" through the link at every token. They differ where the
            retention is not linear: lq, kl, logit, f_divergence and the elastic nets; by how much, docs/math.md says.
    Raises:
        ValueError: choices that have no meaning together; the message names those that do.
    """

    memory: Memory
    bias: AttentionalBias
    retention: Retention
    rule: LearningRule
    chunk_size: int = 64
    gradient_at: str = "previous"
    read: str = "linear"

    def __post_init__(self) -> None:
        memory, bias, retention, rule = self.memory, self.bias, self.retention, self.rule
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size is at least 1; got {self.chunk_size}")
        if self.gradient_at not in ("previous", "decayed"):
            raise ValueError(f"gradient_at is 'previous' or 'decayed'; got {self.gradient_at!r}")
        if self.read not in ("linear", "exact"):
            raise ValueError(f"read is 'linear' or 'exact'; got {self.read!r}")
        if (memory.kind == "growing") != (rule.kind == "nonparametric"):
            raise ValueError(
                f"memory 'growing' and rule 'nonparametric' need each other (softmax attention); "
                f"got memory {memory.name!r} with rule {rule.name!r}"
            )
        if memory.kind == "growing" and (bias.name != "l2" or retention.name != "none"):
            raise ValueError(
                f"softmax attention is bias 'l2' with retention 'none'; got bias {bias.name!r}, retention {retention.name!r}"
            )
        if memory.kind == "slots" and (bias.name, retention.name, rule.name) != ("dot_product", "l2", "gd"):
            raise ValueError(
                "memory 'slots' has bias 'dot_product', retention 'l2' and rule 'gd'; "
                f"got bias {bias.name!r}, retention {retention.name!r}, rule {rule.name!r}"
            )
        if (rule.kind == "least_squares" or rule.implicit) and retention.name not in ("none", "l2"):
            raise ValueError(f"rule {rule.name!r} needs retention 'none' or 'l2'; got {retention.name!r}")
        if (rule.kind == "least_squares" or rule.implicit) and (memory.name, bias.name) != ("matrix", "l2"):
            raise ValueError(
                f"rule {rule.name!r} has a closed form for memory 'matrix' with bias 'l2' only; "
                f"got memory {memory.name!r}, bias {bias.name!r}: use rule 'gd', 'momentum', 'omega' or 'multi_step'"
            )
        if rule.implicit and self.chunk_size > 1:
            raise ValueError(f"rule 'implicit' takes its step at the new state: chunk_size must be 1; got {self.chunk_size}")
        if rule.n_iterations and memory.diagonal:
            raise ValueError("rule 'muon' orthogonalises matrices; memory 'vector' has none: use rule 'gd' or 'momentum'")
        if self.gradient_at == "decayed" and not (self.chunk_size == 1 and retention.decays and rule.kind == "gradient"):
            raise ValueError(
                "gradient_at='decayed' needs chunk_size=1, a retention that decays and a gradient rule; "
                f"got chunk_size={self.chunk_size}, retention {retention.name!r}, rule {rule.name!r}"
            )

    @property
    def stale(self) -> bool:
        """Whether the gradient point matters beyond the current token: an open chunk must then be carried."""
        return self.chunk_size > 1 and self.memory.kind == "parametric" and self.rule.kind == "gradient" and not self.hebbian

    @property
    def framed(self) -> bool:
        """Whether reads inside a chunk are linear and differ from the link: they then need the decay since its start."""
        return self.stale and self.read == "linear" and not self.retention.exact

    @property
    def linear(self) -> bool:
        """A matrix read as it is written: dual and weights are the same."""
        return self.memory.name == "matrix" and self.retention.name in ("none", "l2", "l2_coupled")

    @property
    def hebbian(self) -> bool:
        """A linear memory written without being read: no gradient point exists, and every chunk size is the same model."""
        return self.linear and not self.bias.reads and self.rule.name in ("gd", "multi_step")
