"""What one training run needs to know besides the model and the data."""

from __future__ import annotations

import dataclasses
import difflib
import math

SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMISERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """AdamW with a schedule; every field changes the numbers of a run.

    Attributes:
        steps: optimiser steps in all.
        batch_size: examples per step.
        lr: peak learning rate.
        schedule: constant | linear | cosine | wsd (warm-up, stable, decay).
        warmup: linear warm-up; below 1 a share of the steps, else a number of steps.
        end_lr: learning rate at the last step as a share of the peak (linear, cosine, wsd).
        decay: share of the steps in which wsd decays.
        weight_decay: decoupled weight decay of the matrices (not of norms, biases, gates, kernels, embeddings).
        beta1, beta2, eps: AdamW's.
        clip: largest gradient norm; 0 switches clipping off.
        optimiser: adamw | muon (the weight matrices inside the layers by Muon, everything else by AdamW).
        muon_lr: peak learning rate of Muon's matrices; None: `lr`.
        decay_all: weight decay of every parameter instead of matrices only.
        inner_warmup: steps over which the inner step size of Miras memories rises linearly from 0; 0: off.
    """

    steps: int
    batch_size: int
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.0
    end_lr: float = 0.0
    decay: float = 0.2
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0
    optimiser: str = "adamw"
    muon_lr: float | None = None
    decay_all: bool = False
    inner_warmup: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            near = difflib.get_close_matches(self.schedule, SCHEDULES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown schedule {self.schedule!r}{hint} Known schedules: {', '.join(SCHEDULES)}")
        _require(self.optimiser in OPTIMISERS, "optimiser", self.optimiser, " or ".join(OPTIMISERS))
        _require(self.muon_lr is None or 0 < self.muon_lr < math.inf, "muon_lr", self.muon_lr, "positive and finite, or None")
        _require(self.inner_warmup >= 0, "inner_warmup", self.inner_warmup, "0 (off) or more")
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(0 < self.lr < math.inf, "lr", self.lr, "positive and finite")
        _require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        _require(0 <= self.end_lr <= 1, "end_lr", self.end_lr, "a share between 0 and 1")
        _require(0 < self.decay <= 1, "decay", self.decay, "a share above 0, at most 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "betas", (self.beta1, self.beta2), "in [0, 1)")
        _require(self.eps > 0, "eps", self.eps, "positive")
        _require(self.clip >= 0, "clip", self.clip, "0 (off) or more")


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {accepted}; got {value}")
