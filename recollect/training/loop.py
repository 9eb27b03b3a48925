"""One thin training loop: data, evaluation and reports come in as values or callables.

`recollect compare` runs it in its workers, `recollect train` on any number of processes; it needs no command line, no files
(checkpoints are optional), no particular data.

Axis legend: n rows, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recollect.models import set_inner_steps
from recollect.ops.forms import recorded
from recollect.tasks.base import IGNORE, Batch
from recollect.training.carry import Carry
from recollect.training.checkpoint import Progress, Run, Saving, load_checkpoint, save_checkpoint
from recollect.training.config import TrainingConfig
from recollect.training.optimiser import Optimisers, make_optimisers
from recollect.training.parallel import Scored, accumulating, inner
from recollect.training.schedule import learning_rate
from recollect.training.world import World, alone, totals

Event = dict[str, Any]


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message is the evidence."""


class Piece(NamedTuple):
    """Rows that one process handles at once: inputs and labels int64 [n, T] (IGNORE where nothing is asked), document_ids [n, T]."""

    inputs: Tensor
    labels: Tensor
    document_ids: Tensor | None = None


class Data(Protocol):
    """Training data, read in order."""

    def pieces(self, step: int) -> Sequence[Piece]:
        """What this process handles in an update, 0-based; asked once per update, in order."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON: the same for every process."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""


class Drawn:
    """Data that are a pure function of the step: step -> batch."""

    def __init__(self, batch_at: Callable[[int], Batch]) -> None:
        self.batch_at = batch_at

    def pieces(self, step: int) -> Sequence[Piece]:
        batch = self.batch_at(step)
        return [Piece(batch.inputs, batch.labels)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class Evaluate(Protocol):
    def __call__(self, model: PreTrainedModel, *, final: bool) -> Mapping[str, float]: ...


def train(
    model: PreTrainedModel | nn.Module,
    config: TrainingConfig,
    *,
    data: Data,
    evaluate: Evaluate | None = None,
    eval_every: int = 0,
    report: Callable[[Event], None] = lambda event: None,
    report_seconds: float = 0.5,
    saving: Saving | None = None,
    fingerprint: str = "",
    carry: Carry | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
    copies: int = 1,
) -> Progress:
    """Train `model` in place, from its newest whole checkpoint if there is one.

    A resumed run ends with the bits of an uninterrupted one (on the CPU; on a GPU up to its non-deterministic kernels).

    Args:
        model: a causal LM, on its device, freshly initialised; or what `parallel.distribute` made of one.
        config: optimiser, schedule, number of steps.
        data: of this process.
        evaluate: (the LM in eval mode, final=) -> metrics; called before the first step, every `eval_every` steps, at the end.
        eval_every: steps between evaluations; 0 means at the start and end only.
        report: takes events: {"event": "started" | "note" | "forms" | "step" | "evaluation" | "saved", "step": int, ...}.
        report_seconds: least time between two "step" events.
        saving: where and when checkpoints are written; None: nowhere. The end and a stop write one, too.
        fingerprint: identifies the run; checkpoints of another one are not loaded.
        carry: memories that go on from step to step; None: every row starts without.
        should_stop: asked before every step; True on any process writes a checkpoint and returns.
        world: the processes; None: this one alone.
        copies: processes that read the same rows, which count once.
    Returns:
        progress; `progress.step < config.steps` if it was stopped.
    Raises:
        NonFiniteLoss: loss or gradient norm is not finite.
        OSError: a checkpoint cannot be written.
    """
    module = Scored(model) if isinstance(model, PreTrainedModel) else model
    language_model = inner(module)
    world = world or alone(next(language_model.parameters()).device)
    run = Run(language_model, make_optimisers(language_model, config), fingerprint)
    progress = _resume(run, data, carry, saving, world, report)
    meter = _Meter(config, report, report_seconds, check_every=1 if world.device.type == "cpu" else 16)
    saved_at, saved_step = time.monotonic(), progress.step
    judged: tuple[int, float | None] = (-1, None)  # step of the last evaluation, its loss

    def save() -> None:
        nonlocal saved_at, saved_step
        assert saving is not None
        meter.flush(progress)
        run.data = data.state()
        run.carried = carry.tensors() if carry else {}
        save_checkpoint(run, progress, saving, world, loss=judged[1] if judged[0] == progress.step else None)
        report({"event": "saved", "step": progress.step})
        saved_at, saved_step = time.monotonic(), progress.step

    def look(final: bool) -> None:
        nonlocal judged
        metrics = _evaluate(language_model, evaluate, progress, report, final=final)
        judged = (progress.step, metrics.get("loss"))

    if progress.step == 0:
        look(False)
    module.train()
    told = False  # which form each op takes, in this process' first step
    while progress.step < config.steps:
        due = saving is not None and _is_due(saving, progress.step - saved_step, time.monotonic() - saved_at)
        stopping, due = _agree(world, should_stop(), due)
        if stopping:
            break
        if due:
            save()
        started = time.perf_counter()
        pieces = data.pieces(progress.step)
        with recorded() as taken:
            value, norm, n_tokens = update(module, run.optimisers, pieces, config, progress.step, world=world, carry=carry)
        n_tokens //= copies
        progress.step += 1
        progress.tokens += n_tokens
        progress.seconds += time.perf_counter() - started
        meter.add(value, norm, progress)
        if taken and not told:
            report({"event": "forms", "step": progress.step, "forms": [f"{op}: {form}" for op, form in sorted(taken)]})
        told = True
        final = progress.step == config.steps
        if final or (eval_every and progress.step % eval_every == 0):
            meter.flush(progress)
            look(final)
            if saving and saving.keep_best and not final:
                save()
    if saving and progress.step > saved_step:
        save()
    language_model.eval()
    return progress


def update(
    module: nn.Module,
    optimisers: Optimisers,
    pieces: Sequence[Piece],
    config: TrainingConfig,
    step: int,
    *,
    world: World | None = None,
    carry: Carry | None = None,
) -> tuple[Tensor, Tensor, int]:
    """One optimiser step on the mean over all labels of all pieces of all processes, with the learning rate of `step`.

    Args:
        module: what `parallel.distribute` returns, or `Scored`.
        pieces: of this process; gradients are summed over them before anything travels.
    Returns:
        loss and gradient norm before clipping as tensors (no synchronisation), and the number of tokens read by all processes.
    """
    world = world or alone(next(module.parameters()).device)
    n_labels, n_tokens = totals(
        world, sum(int((piece.labels != IGNORE).sum()) for piece in pieces), sum(piece.inputs.numel() for piece in pieces)
    )
    optimisers.set_rate(learning_rate(config, step))
    if config.inner_warmup and step <= config.inner_warmup:
        set_inner_steps(inner(module), min(1.0, (step + 1) / (config.inner_warmup + 1)))
    optimisers.zero_grad()
    sums = []
    for n, piece in enumerate(pieces):
        device = world.device
        ids = None if piece.document_ids is None else piece.document_ids.to(device, non_blocking=True)
        inputs, labels = piece.inputs.to(device, non_blocking=True), piece.labels.to(device, non_blocking=True)
        with accumulating(module, more=n + 1 < len(pieces)):
            total = module(inputs, labels, ids, carry.before(n, len(inputs)) if carry else None)
            # Gradients are averaged over the processes, but the loss is a mean over the labels of all.
            (total * (world.size / n_labels)).backward()
        if carry:
            carry.after(n)
        sums.append(total.detach())
    norm = clip(optimisers.parameters(), config.clip or math.inf)
    optimisers.step()
    value = torch.stack(sums).sum() / n_labels
    if world.size > 1:
        torch.distributed.all_reduce(value)
    return value, norm, int(n_tokens)


def clip(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `largest`; returns the norm before, the same on every process.

    Parameters may be spread over different sets of processes, which torch's own function does not take together.
    """
    groups: dict[Any, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            groups.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p.grad)
    norms = [torch.nn.utils.get_total_norm(grads, foreach=True) for grads in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for grads in groups.values():
        for grad in grads:
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor.to(grad.dtype))
    return norm.detach()


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


def _is_due(saving: Saving, n_steps: int, seconds: float) -> bool:
    """Whether a checkpoint is due, `n_steps` and `seconds` after the last one."""
    return n_steps > 0 and (seconds >= saving.seconds or bool(saving.steps and n_steps >= saving.steps))


def _agree(world: World, stopping: bool, due: bool) -> tuple[bool, bool]:
    """One answer for all: stop if any process wants to, save if the first one's clock says so."""
    n_stopping, n_due = totals(world, stopping, due and world.rank == 0)
    return n_stopping > 0, n_due > 0


def _resume(
    run: Run, data: Data, carry: Carry | None, saving: Saving | None, world: World, report: Callable[[Event], None]
) -> Progress:
    if carry:
        run.carried = carry.expected()
    found, skipped = load_checkpoint(run, saving.folder, world) if saving else (None, [])
    if found:
        data.restore(run.data)
        if carry:
            carry.restore(run.carried)
    progress = found or Progress()
    report({"event": "started", "step": progress.step, "resumed": found is not None})
    for note in skipped:
        report({"event": "note", "step": progress.step, "note": note})
    return progress


def _evaluate(
    model: PreTrainedModel, evaluate: Evaluate | None, progress: Progress, report: Callable[[Event], None], *, final: bool
) -> Mapping[str, float]:
    if evaluate is None:
        return {}
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
    return metrics
