"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from recollect.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the update number `step` (0-based: 0 .. steps - 1).

    Warm-up is linear and its first update is not zero: (step + 1) / (warm-up steps + 1) of the peak. The decaying schedules
    go from the peak after the warm-up to `end_lr * lr` at the end of the run; wsd is flat until the last `decay` share of it.

    Raises:
        ValueError: step outside the run.
    """
    if not 0 <= step < config.steps:
        raise ValueError(f"step {step} is outside the run of {config.steps} steps")
    warmup = warmup_steps(config)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (config.end_lr + (1 - config.end_lr) * _share(config, done))


def warmup_steps(config: TrainingConfig) -> int:
    """Warm-up in steps, at most the whole run."""
    steps = config.warmup * config.steps if config.warmup < 1 else config.warmup
    return min(config.steps, round(steps))


def _share(config: TrainingConfig, done: float) -> float:
    """What is left of the peak, 1 .. 0, after the share `done` in [0, 1) of the steps behind the warm-up."""
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "wsd":
        return min(1.0, (1 - done) / config.decay)
    return 1.0
