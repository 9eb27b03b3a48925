"""One thin training loop: the data are a function of the step, everything else comes in as a value or a callable.

`recollect compare` runs it in its workers; it needs no command line, no files (checkpoints are optional), no particular data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recollect.tasks.base import Batch
from recollect.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from recollect.training.config import TrainingConfig
from recollect.training.loss import loss as batch_loss
from recollect.training.optimiser import make_optimiser
from recollect.training.schedule import learning_rate

Event = dict[str, Any]


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message is the evidence."""


class Evaluate(Protocol):
    def __call__(self, model: PreTrainedModel, *, final: bool) -> Mapping[str, float]: ...


def train(
    model: PreTrainedModel,
    config: TrainingConfig,
    *,
    batch_at: Callable[[int], Batch],
    evaluate: Evaluate | None = None,
    eval_every: int = 0,
    report: Callable[[Event], None] = lambda event: None,
    report_seconds: float = 0.5,
    checkpoints: Path | None = None,
    checkpoint_seconds: float = 30.0,
    fingerprint: str = "",
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train `model` in place, from its newest whole checkpoint if there is one.

    A resumed run ends with the bits of an uninterrupted one (on the CPU; on a GPU up to its non-deterministic kernels).

    Args:
        model: a causal LM, on its device, freshly initialised.
        config: optimiser, schedule, number of steps.
        batch_at: step (0-based) -> training batch; a pure function.
        evaluate: (model in eval mode, final=) -> metrics; called before the first step, every `eval_every` steps, at the end.
        eval_every: steps between evaluations; 0 means at the start and end only.
        report: takes events: {"event": "started" | "note" | "step" | "evaluation", "step": int, ...}.
        report_seconds: least time between two "step" events.
        checkpoints: folder for checkpoints, or None.
        checkpoint_seconds: time between two checkpoints; evaluations do not write any, the end and a stop do.
        fingerprint: identifies the run; checkpoints of another one are not loaded.
        should_stop: asked after every step; True writes a checkpoint and returns.
    Returns:
        progress; `progress.step < config.steps` if it was stopped.
    Raises:
        NonFiniteLoss: loss or gradient norm is not finite.
        OSError: a checkpoint cannot be written.
    """
    optimiser = make_optimiser(model, config)
    progress = _resume(model, optimiser, checkpoints, fingerprint, report)
    meter = _Meter(config, report, report_seconds, check_every=1 if _on_cpu(model) else 16)
    saved_at = time.monotonic()
    saved_step = progress.step
    if progress.step == 0:
        _evaluate(model, evaluate, progress, report, final=False)
    model.train()
    while progress.step < config.steps and not should_stop():
        started = time.perf_counter()
        batch = batch_at(progress.step)
        value, norm = train_step(model, optimiser, batch, config, progress.step)
        progress.step += 1
        progress.tokens += batch.inputs.numel()
        progress.seconds += time.perf_counter() - started
        meter.add(value, norm, progress)
        final = progress.step == config.steps
        if final or (eval_every and progress.step % eval_every == 0):
            meter.flush(progress)
            _evaluate(model, evaluate, progress, report, final=final)
        if checkpoints and not final and time.monotonic() - saved_at >= checkpoint_seconds:
            meter.flush(progress)
            save_checkpoint(checkpoints, model, optimiser, progress, fingerprint=fingerprint)
            saved_at, saved_step = time.monotonic(), progress.step
    if checkpoints and progress.step > saved_step:
        meter.flush(progress)
        save_checkpoint(checkpoints, model, optimiser, progress, fingerprint=fingerprint)
    model.eval()
    return progress


def train_step(
    model: PreTrainedModel, optimiser: torch.optim.Optimizer, batch: Batch, config: TrainingConfig, step: int
) -> tuple[Tensor, Tensor]:
    """One update with the learning rate of `step`; returns loss and gradient norm before clipping as tensors (no sync)."""
    rate = learning_rate(config, step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    value = batch_loss(model, batch.inputs, batch.labels)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf, foreach=True)
    optimiser.step()
    return value.detach(), norm.detach()


class _Meter:
    """Collects losses and norms as tensors; looks at them every `check_every` steps (each look is a device synchronisation)."""

    def __init__(
        self, config: TrainingConfig, report: Callable[[Event], None], report_seconds: float, *, check_every: int
    ) -> None:
        self.config, self.report, self.report_seconds, self.check_every = config, report, report_seconds, check_every
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.losses: list[float] = []
        self.reported_at = time.monotonic()
        self.norm = 0.0
        self.last = math.nan

    def add(self, loss: Tensor, norm: Tensor, progress: Progress) -> None:
        self.pending.append((progress.step - 1, loss, norm))
        if len(self.pending) >= self.check_every:
            self._look()
            if time.monotonic() - self.reported_at >= self.report_seconds:
                self.flush(progress)

    def flush(self, progress: Progress) -> None:
        """Report the mean loss since the last report."""
        self._look()
        if not self.losses:
            return
        self.report(
            {
                "event": "step",
                "step": progress.step,
                "loss": sum(self.losses) / len(self.losses),
                "lr": learning_rate(self.config, progress.step - 1),
                "grad_norm": self.norm,
                "seconds": progress.seconds,
                "tokens": progress.tokens,
            }
        )
        self.losses.clear()
        self.reported_at = time.monotonic()

    def _look(self) -> None:
        for step, loss, norm in self.pending:
            value, self.norm = loss.item(), norm.item()
            if not (math.isfinite(value) and math.isfinite(self.norm)):
                raise NonFiniteLoss(
                    f"training diverged at step {step + 1} of {self.config.steps}: loss {value}, gradient norm "
                    f"{self.norm:.4g}, learning rate {learning_rate(self.config, step):.4g} ({self.config.schedule}, peak "
                    f"{self.config.lr:.4g}), loss of the step before {self.last:.4g}; try a lower learning rate, a longer "
                    "warm-up or a smaller gradient clip"
                )
            self.losses.append(value)
            self.last = value
        self.pending.clear()


def _resume(
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    folder: Path | None,
    fingerprint: str,
    report: Callable[[Event], None],
) -> Progress:
    found, skipped = load_checkpoint(folder, model, optimiser, fingerprint=fingerprint) if folder else (None, [])
    progress = found or Progress()
    report({"event": "started", "step": progress.step, "resumed": found is not None})
    for note in skipped:
        report({"event": "note", "step": progress.step, "note": note})
    return progress


def _evaluate(
    model: PreTrainedModel, evaluate: Evaluate | None, progress: Progress, report: Callable[[Event], None], *, final: bool
) -> None:
    if evaluate is None:
        return
    model.eval()
    with torch.no_grad():
        metrics = evaluate(model, final=final)
    model.train()
    report(
        {
            "event": "evaluation",
            "step": progress.step,
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            "final": final,
            **metrics,
        }
    )


def _on_cpu(model: PreTrainedModel) -> bool:
    return next(model.parameters()).device.type == "cpu"
