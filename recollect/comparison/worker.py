"""One run of a comparison in a process of its own: `python -m recollect.comparison.worker OUT/runs/LABEL-seedK`.

It reads OUT/comparison.json, trains, and writes into its own folder only: progress.jsonl, checkpoint/, model/, inspection.*.
SIGTERM, SIGINT and (with --attached) the end of its parent make it write a checkpoint and stop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from recollect.comparison.folder import PLAN, explain
from recollect.comparison.inspection import write_inspection
from recollect.comparison.model import make_model
from recollect.comparison.plan import Plan
from recollect.comparison.workload import Workload, make_workload
from recollect.evaluation.metrics import score
from recollect.models import RecollectForCausalLM
from recollect.models.memory import state_bytes
from recollect.training.allocator import keep_freed_memory
from recollect.training.checkpoint import Saving
from recollect.training.export import save_model
from recollect.training.folder import is_disk_full, locked
from recollect.training.journal import DISK_FULL, DONE, FAILED, STOPPED, Journal
from recollect.training.loop import Drawn, train, update
from recollect.training.optimiser import make_optimisers
from recollect.training.parallel import Scored
from recollect.user_modules import import_user_modules

CHECKPOINT_SECONDS = 20.0
ORPHAN_SECONDS = 60.0  # how long a worker whose parent has died may take to reach its next step
LOCK_SECONDS = 90.0  # longer than that: such a worker may still be writing into the folder


class Evaluator:
    """The held-out data, drawn once: all of them for the last evaluation, the first of them for the others."""

    def __init__(self, plan: Plan, workload: Workload, state_size: int) -> None:
        self.workload, self.state_size = workload, state_size
        batch_size = plan.training["batch_size"]
        self.last = list(workload.held_out(plan.n_eval, batch_size=batch_size))
        self.curve = list(workload.held_out(plan.n_eval_curve, batch_size=batch_size))

    def __call__(self, model: PreTrainedModel, *, final: bool) -> Mapping[str, float]:
        result = score(model, self.last if final else self.curve, self.workload.correct, n_bytes=self.workload.n_bytes)
        return {
            self.workload.metric: self.workload.result(result),
            "loss": result.loss,
            "n_eval": result.n,
            "state_bytes": self.state_size,
        }


def run(folder: Path, *, checkpoint_seconds: float = CHECKPOINT_SECONDS, stop: threading.Event | None = None) -> int:
    """Do the run of `folder`, from its last checkpoint if there is one. Returns the exit status."""
    stop = stop or threading.Event()
    journal = Journal(folder / "progress.jsonl")
    try:
        with locked(folder, wait_seconds=LOCK_SECONDS):
            return _run(folder, journal, checkpoint_seconds, stop)
    except Exception as error:  # whatever it is, the parent must hear of it, and the other runs go on
        traceback.print_exc()
        _say(journal, error)
        return DISK_FULL if is_disk_full(error) else FAILED


def _run(folder: Path, journal: Journal, checkpoint_seconds: float, stop: threading.Event) -> int:
    plan, label, seed = find_run(folder)
    model, workload = prepare(plan, label, seed)
    example = next(iter(workload.held_out(1, batch_size=1))).inputs[0]
    model.eval()
    evaluator = Evaluator(plan, workload, state_bytes(model, example))
    batch_size = plan.training["batch_size"]
    progress = train(
        Scored(model, precision=plan.precision),
        plan.training_of(label),
        data=Drawn(lambda step: workload.train_batch(batch_size, run_seed=seed, step=step)),
        evaluate=evaluator,
        eval_every=plan.eval_every_of(label),
        report=journal.write,
        saving=Saving(folder / "checkpoint", seconds=checkpoint_seconds),
        fingerprint=plan.config_hash,
        should_stop=stop.is_set,
    )
    if progress.step < plan.steps_of(label):
        journal.write({"event": "stopped", "step": progress.step})
        return STOPPED
    save_model(model, folder / "model", tokenizer=workload.tokenizer_file(folder))
    write_inspection(folder, model, workload)
    journal.write({"event": "done", "step": progress.step})
    return DONE


def find_run(folder: Path) -> tuple[Plan, str, int]:
    """Plan, label and seed that a run's folder belongs to.

    Raises:
        ValueError: the folder is none of the plan's.
    """
    plan = Plan.from_json((folder.parent.parent / PLAN).read_text(encoding="utf-8"))
    for label, seed in plan.runs():
        if folder.name == f"{label}-seed{seed}":
            return plan, label, seed
    raise ValueError(f"{folder} is no run of the comparison in {folder.parent.parent}")


def prepare(plan: Plan, label: str, seed: int) -> tuple[RecollectForCausalLM, Workload]:
    """Fresh model on its device, and the data.

    Raises:
        ValueError: the data or the user's modules have changed since the plan was made.
    """
    torch.set_num_threads(plan.threads)
    imported = import_user_modules(module["name"] for module in plan.imports)
    if imported != plan.imports:
        raise ValueError("a module given with --import has changed since the comparison began")
    workload = make_workload(plan.task, plan.task_options, plan.data)
    if workload.fingerprint != plan.data.get("fingerprint", ""):
        raise ValueError("the data have changed since the comparison began")
    model = make_model(plan.model_of(label), plan.mixer(label)["layers"], seed=seed, length=workload.length)
    if plan.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(plan.device))  # its generator is the one that checkpoints hold
    torch.nn.Module.to(model, plan.device)
    return model, workload


def time_steps(folder: Path, *, seconds: float) -> dict[str, float]:
    """Time a few training steps and a small evaluation of this run's mixer, writing nothing.

    Returns:
        {"step": seconds per step, "example": seconds per held-out example, "spent": seconds spent on timing}.
    """
    plan, label, seed = find_run(folder)
    model, workload = prepare(plan, label, seed)
    begun = time.perf_counter()
    batch_size = plan.training["batch_size"]
    config = plan.training_of(label, steps=1000)
    scored, optimisers = Scored(model, precision=plan.precision), make_optimisers(model, config)
    data = Drawn(lambda step: workload.train_batch(batch_size, run_seed=seed, step=step))
    model.train()
    durations: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(durations) < 5 or (time.perf_counter() < deadline and len(durations) < 200):
        started = time.perf_counter()
        step = len(durations)
        value, *_ = update(scored, optimisers, data.pieces(step), config, step)
        value.item()  # waits for a GPU
        durations.append(time.perf_counter() - started)
    model.eval()
    held_out = list(workload.held_out(batch_size, batch_size=batch_size))
    started = time.perf_counter()
    score(model, held_out, workload.correct)
    per_example = (time.perf_counter() - started) / sum(len(batch.inputs) for batch in held_out)
    timed = durations[2:]  # the first ones allocate, compile and warm up
    return {"step": sum(timed) / len(timed), "example": per_example, "spent": time.perf_counter() - begun}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m recollect.comparison.worker", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUT/runs/LABEL-seedK")
    parser.add_argument("--attached", action="store_true", help="stop when standard input closes (the parent has ended)")
    parser.add_argument("--time", type=float, metavar="SECONDS", help="time the steps instead, print JSON")
    parser.add_argument("--checkpoint-seconds", type=float, default=CHECKPOINT_SECONDS)
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if args.attached:
        threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    if args.time is not None:
        print(json.dumps(time_steps(args.folder, seconds=args.time)))
        return DONE
    args.folder.mkdir(parents=True, exist_ok=True)
    return run(args.folder, checkpoint_seconds=args.checkpoint_seconds, stop=stop)


def _watch_parent(stop: threading.Event) -> None:
    """Standard input is a pipe that only the parent holds: it ends when the parent does, even by SIGKILL."""
    while os.read(0, 1024):
        pass
    stop.set()
    time.sleep(ORPHAN_SECONDS)
    os._exit(STOPPED)


def _say(journal: Journal, error: Exception) -> None:
    try:
        journal.write({"event": "failed", "reason": explain(error)})
    except OSError as again:  # a full disk takes no journal either; the log and the exit status are left
        print(f"the journal cannot be written: {again}", file=sys.stderr)


if __name__ == "__main__":
    # Skip interpreter teardown: native thread pools may abort there, and everything is on the disk.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
