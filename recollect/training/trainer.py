"""`recollect train`: from a run's settings to a trained model in a folder, on any number of processes, from wherever it stopped.

    OUT/run.yaml          the resolved run
    OUT/progress.jsonl    every report
    OUT/checkpoints/      where it goes on from
    OUT/tokens/           tokenised text
    OUT/model/            the trained model, as Hugging Face saves it
    OUT/curves.png        loss, learning rate and speed over the run

Axis legend: n rows, T time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import gc
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from recollect.data.rows import Rows, TokenBatch
from recollect.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from recollect.data.validation import validation_rows
from recollect.models import RecollectForCausalLM, new_parameters
from recollect.models.memory import growing_mixers
from recollect.state import fingerprint
from recollect.tasks.base import IGNORE, stream_seed
from recollect.training.carry import Carry
from recollect.training.checkpoint import Progress, Saving, replace_file
from recollect.training.config import TrainingConfig
from recollect.training.export import save_model
from recollect.training.folder import changes, locked
from recollect.training.loop import Piece, train
from recollect.training.parallel import distribute
from recollect.training.recipe.check import batch_rows, check, n_steps
from recollect.training.recipe.load import dump_run, load_run, normal
from recollect.training.recipe.model_config import start_model
from recollect.training.recipe.settings import RunSettings
from recollect.training.reports import JOURNAL, Reports
from recollect.training.world import World, joined, totals, wait

CHECKPOINTS, MODEL, RUN = "checkpoints", "model", "run.yaml"
OWN = (CHECKPOINTS, "tokens", "tensorboard")  # what a run that was cut short before its first checkpoint may leave
FREE = ("out", "eval_every", "eval_rows", "saving", "logging")  # may differ when a run goes on: they change no weight


def run_training(
    run: RunSettings, *, should_stop: Callable[[], bool] = lambda: False, say: Callable[[str], None] = print, live: bool = False
) -> Progress:
    """Train what `run` describes, or go on with it. Several processes call it alike, as torchrun starts them.

    Args:
        run: see `settings`.
        should_stop: asked before every step; True on any process saves and returns.
        say: takes lines for a person, on the first process only.
        live: draw a bar that moves.
    Returns:
        progress; `step` is less than the run's if it was stopped.
    Raises:
        ValueError: the run cannot start, or the folder holds another one.
        recollect.training.loop.NonFiniteLoss: training diverged; the last checkpoint stays.
        recollect.training.folder.Busy: another process trains into the folder.
        OSError: the disk is full or not writable; the last checkpoint stays.
    """
    run = normal(run)
    check(run)
    transformers_logging.disable_progress_bar()
    if run.engine.threads:
        torch.set_num_threads(run.engine.threads)
    out = Path(run.out)
    with joined(run.engine.device) as world, _own(out, world):
        if world.rank == 0:
            _store(run, out)
        wait(world)
        return _Training(run, out, world, say if world.rank == 0 else lambda line: None, live and world.rank == 0)(should_stop)


def identity(run: RunSettings) -> dict[str, Any]:
    """Whatever changes a weight: the settings without those that may differ when a run goes on."""
    values = {name: value for name, value in dataclasses.asdict(run).items() if name not in FREE}
    values["data"] = {name: value for name, value in values["data"].items() if name != "shards"}
    values["engine"] = {name: values["engine"][name] for name in ("precision",)}
    return values


class Part(NamedTuple):
    """Which piece of every row a process reads: number `place` of `n`, of equal length."""

    place: int = 0
    n: int = 1

    def of(self, batch: TokenBatch) -> TokenBatch:
        return TokenBatch(*(None if x is None else x.chunk(self.n, dim=1)[self.place] for x in batch))  # type: ignore[arg-type]


class RowData:
    """The loop's view of `Rows`: micro-batches of this process, the next batch being read while the last one is learned from."""

    def __init__(
        self,
        rows: Rows,
        *,
        n_rows: int,
        micro_batch: int,
        part: Part | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.rows, self.n_rows, self.micro_batch, self.part, self.note = rows, n_rows, micro_batch, part or Part(), note
        self.n_read = [0] * len(rows.names)  # whole times, of every source
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self.position = rows.state()
        self.coming: Future[tuple[TokenBatch, dict[str, Any]]] | None = None

    def pieces(self, step: int) -> Sequence[Piece]:
        batch, self.position = self._read() if self.coming is None else self.coming.result()
        self._tell_rounds()
        self.coming = self.reader.submit(self._read)
        ids = [None] * len(batch.inputs) if batch.document_ids is None else batch.document_ids.split(self.micro_batch)
        parts = zip(batch.inputs.split(self.micro_batch), batch.labels.split(self.micro_batch), ids, strict=False)
        return [Piece(*part) for part in parts]

    def state(self) -> dict[str, Any]:
        return self.position

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows.restore(state)
        self.position, self.coming = self.rows.state(), None
        self.n_read = [int(epochs) for epochs in self.rows.epochs]

    def bytes_per_token(self, tokenizer: Tokenizer) -> float:
        """Mean over the batch that comes next, which is read ahead for it."""
        self.coming = self.coming or self.reader.submit(self._read)
        n_tokens, n_bytes = _size(self.coming.result()[0], tokenizer)
        return n_bytes / max(1, n_tokens)

    def _tell_rounds(self) -> None:
        """A source that ends begins anew: whoever has less text than tokens to train on should know."""
        now = [int(epochs) for epochs in self.rows.epochs]
        for name, before, after in zip(self.rows.names, self.n_read, now, strict=True):
            if after > before:
                times = "once" if after == 1 else f"{after} times"
                self.note(f"source {name!r} has been read to its end {times} and begins anew, in another order")
        self.n_read = now

    def _read(self) -> tuple[TokenBatch, dict[str, Any]]:
        batch = self.part.of(self.rows.next(self.n_rows))
        return batch, self.rows.state()


class _Training:
    """One process's part of a run."""

    def __init__(self, run: RunSettings, out: Path, world: World, say: Callable[[str], None], live: bool) -> None:
        self.run, self.out, self.world, self.say, self.live = run, out, world, say, live
        share = run.engine.tensor_parallel * run.engine.sequence_parallel  # processes that read the same rows
        self.part = Part(world.rank % run.engine.sequence_parallel, run.engine.sequence_parallel)
        if world.size % share:
            there = "is 1" if world.size == 1 else f"are {world.size}"
            raise ValueError(
                f"engine.tensor_parallel={run.engine.tensor_parallel} and engine.sequence_parallel={run.engine.sequence_parallel} "
                f"need a multiple of {share} processes; there {there}: start them with torchrun"
            )
        self.readers = World(world.rank // share, world.size // share, world.device)
        self.n_rows = batch_rows(run)
        if self.n_rows % self.readers.size:
            raise ValueError(
                f"a batch has {self.n_rows} rows (batch_tokens={run.batch_tokens}, seq_len={run.data.seq_len}), which "
                f"{self.readers.size} processes cannot share: set batch_tokens to a multiple of "
                f"{self.readers.size * run.data.seq_len}"
            )
        self.n_own = self.n_rows // self.readers.size
        self.micro_batch = min(run.engine.micro_batch or self.n_own, self.n_own)
        if run.data.carry and self.n_own % self.micro_batch:
            raise ValueError(f"with carry, micro_batch={self.micro_batch} must divide the {self.n_own} rows of a process")
        self.tokenizer = load_tokenizer(run.data.tokenizer)
        self.folder = Path(run.data.shards or out / "tokens")
        self.config = training_config(run)

    def __call__(self, should_stop: Callable[[], bool]) -> Progress:
        run, world = self.run, self.world
        model = self._model()
        module = self._distribute(model)
        data = RowData(self._rows(), n_rows=self.n_rows, micro_batch=self.micro_batch, part=self.part, note=self.say)
        validation = self._validation(module)
        carry = self._carry(model)
        self._announce(model)
        torch.manual_seed(stream_seed("train", run.seed, world.rank))  # dropout differs between processes
        with Reports(
            run,
            self.out,
            world,
            n_parameters=model.num_parameters(),
            config=self.config,
            bytes_per_token=validation.bytes_per_token if validation else data.bytes_per_token(self.tokenizer),
            say=self.say,
            live=self.live,
        ) as reports:
            progress = train(
                module,
                self.config,
                data=data,
                evaluate=validation,
                eval_every=run.eval_every,
                report=reports,
                report_seconds=run.logging.every_seconds,
                saving=self._saving(),
                fingerprint=fingerprint(identity(run)),
                carry=carry,
                should_stop=should_stop,
                world=world,
                copies=run.engine.tensor_parallel,
            )
            if progress.step == self.config.steps:
                save_model(model, self.out / MODEL, world, tokenizer=tokenizer_file(run.data.tokenizer))
                reports.finish()
                self.say(f"finished: {self.out / MODEL}")
            else:
                self.say(f"stopped at step {progress.step} of {self.config.steps}; the same command goes on")
        del module, model
        if self.world.size > 1:
            gc.collect()  # FSDP's buffers must go before the process group does
        return progress

    def _model(self) -> PreTrainedModel:
        """The same weights on every process."""
        run = self.run
        torch.manual_seed(stream_seed("train", run.seed))
        model = start_model(run, self.tokenizer)
        growing = growing_mixers(model) if run.data.carry and isinstance(model, RecollectForCausalLM) else []
        if growing:
            raise ValueError(f"data.carry needs memories of constant size; those of {', '.join(growing)} grow with every token")
        if run.model.train_only is not None:
            train_only(model, run.model.train_only)
        return model

    def _distribute(self, model: PreTrainedModel) -> nn.Module:
        engine = self.run.engine
        has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
        if engine.compile and self.world.device.type == "cpu" and not has_compiler:
            raise ValueError(
                "engine.compile needs a C++ compiler on a CPU (g++ or clang++); install one, or set engine.compile=false"
            )
        return distribute(
            model,
            self.world,
            strategy=engine.strategy,
            precision=engine.precision,
            tensor_parallel=engine.tensor_parallel,
            sequence_parallel=engine.sequence_parallel,
            checkpoint_activations=engine.checkpoint_activations,
            compile_blocks=engine.compile,
        )

    def _rows(self) -> Rows:
        """What this process reads to train on."""
        return Rows(
            self.run.data,
            seed=self.run.seed,
            folder=self.folder,
            rank=self.readers.rank,
            world=self.readers.size,
            tokenizer=self.tokenizer,
            note=self.say,
        )

    def _validation(self, module: nn.Module) -> Validation | None:
        """None where nothing is held out."""
        run = self.run
        whole = validation_rows(
            run.data, self.tokenizer, run.eval_rows, folder=self.folder, batch_rows=self.micro_batch, note=self.say
        )
        rows = {name: [self.part.of(batch) for batch in batches] for name, batches in whole.items()}
        return Validation(module, rows, self.tokenizer, self.world, self.readers) if rows else None

    def _carry(self, model: PreTrainedModel) -> Carry | None:
        if not self.run.data.carry:
            return None
        assert isinstance(model, RecollectForCausalLM)
        return Carry(model, n_lanes=self.n_own, micro_batch=self.micro_batch, world=self.readers)

    def _saving(self) -> Saving:
        settings = self.run.saving
        return Saving(
            self.out / CHECKPOINTS,
            seconds=60 * settings.every_minutes,
            steps=settings.every_steps,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
        )

    def _announce(self, model: PreTrainedModel) -> None:
        n_all, n_trained = model.num_parameters(), model.num_parameters(only_trainable=True)
        trained = "" if n_trained == n_all else f", {n_trained:,} of them trained"
        shape = f"{self.config.steps:,} steps of {self.n_rows} x {self.run.data.seq_len} tokens"
        self.say(f"{n_all:,} parameters{trained}; {shape}; {self.out}")


class Validation:
    """Loss and bits per byte of every validation source, shared out among the processes.

    Calling it gives {"loss": nats per token over all sources, "bits_per_byte"}, and for several sources "loss/NAME" and
    "bits_per_byte/NAME" besides.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Mapping[str, Sequence[TokenBatch]],
        tokenizer: Tokenizer,
        world: World,
        readers: World,
    ) -> None:
        self.module, self.batches = module, batches
        self.sizes = {name: [_size(batch, tokenizer) for batch in some] for name, some in batches.items()}
        self.world, self.readers = world, readers  # those that share a layer's matrices read the same rows, and count alike

    def __call__(self, model: PreTrainedModel, *, final: bool) -> Mapping[str, float]:
        metrics: dict[str, float] = {}
        whole = [0.0, 0.0, 0.0]
        for name, batches in self.batches.items():
            sums = totals(self.world, *self._sums(batches, self.sizes[name]))
            whole = [a + b for a, b in zip(whole, sums, strict=True)]
            if len(self.batches) > 1:
                metrics.update({f"{key}/{name}": value for key, value in _rates(sums).items()})
        return {**_rates(whole), **metrics}

    @property
    def bytes_per_token(self) -> float:
        """Mean over all rows."""
        n_tokens, n_bytes = (
            sum(column) for column in zip(*(size for some in self.sizes.values() for size in some), strict=True)
        )
        return n_bytes / n_tokens

    def _sums(self, batches: Sequence[TokenBatch], sizes: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
        """Nats, tokens and bytes of this process's share. All call the model equally often: FSDP's processes go in step."""
        nats = n_tokens = n_bytes = 0.0
        for turn in range(0, len(batches), self.readers.size):
            mine = turn + self.readers.rank
            batch = batches[min(mine, len(batches) - 1)]
            moved = [None if x is None else x.to(self.world.device) for x in batch]
            value = self.module(*moved).item()
            if mine < len(batches):
                nats, n_tokens, n_bytes = nats + value, n_tokens + sizes[mine][0], n_bytes + sizes[mine][1]
        return nats, n_tokens, n_bytes


def _size(batch: TokenBatch, tokenizer: Tokenizer) -> tuple[float, float]:
    """Tokens that are asked, and their bytes."""
    labels = batch.labels[batch.labels != IGNORE]
    return labels.numel(), float(tokenizer.bytes_of(labels.numpy()).sum())


def training_config(run: RunSettings) -> TrainingConfig:
    """The loop's part of the settings."""
    settings = dataclasses.asdict(run.optimiser)
    return TrainingConfig(steps=n_steps(run), batch_size=batch_rows(run), optimiser=settings.pop("name"), **settings)


def train_only(model: nn.Module, globs: Sequence[str]) -> None:
    """Freeze every parameter whose name matches none of the globs; the glob "new" stands for what a retrofit has added.

    Raises:
        ValueError: a glob that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    globs = [name for glob in globs for name in (new_parameters(model) if glob == "new" else [glob])]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ValueError(
                f"model.train_only: no parameter's name matches {glob!r}; names look like {names[len(names) // 2]!r}"
            )
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, glob) for glob in globs))


@contextlib.contextmanager
def _own(out: Path, world: World) -> Iterator[None]:
    """The first process holds the folder's lock."""
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            yield
    else:
        yield


def _store(run: RunSettings, out: Path) -> None:
    """Write the resolved run; refuse a folder that holds another one. One that has come to nothing yet gives way."""
    path = out / RUN
    if path.is_file() and not ((out / MODEL).exists() or any((out / CHECKPOINTS).glob("*"))):
        path.unlink()
        (out / JOURNAL).unlink(missing_ok=True)
    if path.is_file():
        old = load_run(path)
        different = [f"{name}: {str(a)[:60]} -> {str(b)[:60]}" for name, a, b in changes(identity(old), identity(run))]
        if different:
            raise ValueError(
                f"{out} holds another run ({'; '.join(different[:4])}); give another out=, or continue its weights with "
                f"model.start_from={out}"
            )
    elif strangers := sorted(p.name for p in out.iterdir() if not p.name.startswith(".") and p.name not in OWN):
        raise ValueError(f"{out} holds other files ({', '.join(strangers[:3])}) and no run; give a new or empty folder")
    replace_file(path, dump_run(run).encode())


def _rates(sums: Sequence[float]) -> dict[str, float]:
    nats, n_tokens, n_bytes = sums
    return {"loss": nats / n_tokens, "bits_per_byte": nats / max(1.0, n_bytes) / math.log(2)}
