"""Values of a run that cannot work, found before anything is loaded; and its length in rows and steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from recollect.data.settings import DataSettings, SourceSettings
from recollect.training.recipe.model_config import model_config
from recollect.training.recipe.problems import listing
from recollect.training.recipe.settings import EngineSettings, OptimiserSettings, RunSettings


def check(run: RunSettings) -> None:
    """Refuse values that cannot work, all at once. Files, tokenizers and saved models are not opened.

    Raises:
        ValueError: one sentence per problem: setting, what is accepted, the value.
    """
    problems = [
        *_run(run),
        *_model(run),
        *_data(run.data),
        *_optimiser(run.optimiser),
        *_engine(run.engine),
        *_saving(run),
    ]
    if problems:
        raise ValueError(listing("this run cannot start", problems))


def batch_rows(run: RunSettings) -> int:
    """Rows of one optimiser step over all processes: `batch_tokens` in whole rows, at least one."""
    return max(1, round(run.batch_tokens / run.data.seq_len))


def n_steps(run: RunSettings) -> int:
    """Optimiser steps of a run: `steps`, or as many whole batches as `tokens` needs."""
    if run.steps is not None:
        return run.steps
    if run.tokens is None:
        raise ValueError("a run needs steps or tokens")
    return max(1, math.ceil(run.tokens / (batch_rows(run) * run.data.seq_len)))


def _refused(holds: bool, name: str, value: object, accepted: str) -> Iterator[str]:
    """The sentence, where the condition does not hold (NaN holds none)."""
    if not holds:
        yield f"{name} must be {accepted}; got {value}"


def _run(run: RunSettings) -> Iterator[str]:
    if run.steps is None and run.tokens is None:
        yield "give the length of the run: steps=1000 or tokens=1e9"
    elif run.steps is not None and run.tokens is not None:
        yield f"give steps or tokens, not both; got steps={run.steps} and tokens={run.tokens:g}"
    yield from _refused(run.steps is None or run.steps >= 1, "steps", run.steps, "at least 1")
    yield from _refused(run.tokens is None or 0 < run.tokens < math.inf, "tokens", run.tokens, "positive and finite")
    yield from _refused(bool(run.out.strip()), "out", repr(run.out), "the name of a folder")
    yield from _refused(0 <= run.seed < 2**63, "seed", run.seed, "0 or more, below 2**63")
    yield from _refused(run.eval_every >= 0, "eval_every", run.eval_every, "0 (at the end only) or more")
    yield from _refused(run.eval_rows >= 1, "eval_rows", run.eval_rows, "at least 1")
    if run.data.seq_len < 2:
        yield f"data.seq_len must be at least 2; got {run.data.seq_len}"
    elif run.data.seq_len % max(1, run.engine.sequence_parallel):
        yield f"engine.sequence_parallel={run.engine.sequence_parallel} must divide data.seq_len={run.data.seq_len}"
    elif run.batch_tokens < run.data.seq_len:
        yield (
            f"batch_tokens={run.batch_tokens} is less than one row of data.seq_len={run.data.seq_len}; "
            "raise batch_tokens or shorten the rows"
        )

    if run.data.carry and run.engine.sequence_parallel > 1:
        yield "data.carry and engine.sequence_parallel exclude each other: both hand the states on"


def _model(run: RunSettings) -> Iterator[str]:
    model = run.model
    shape = {
        "size": model.size,
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "intermediate_size": model.intermediate_size,
    }
    given = [f"model.{name}" for name, value in shape.items() if value is not None]
    if model.train_only == []:
        yield "model.train_only is empty, so nothing would be trained; give names, or null for all"
    if model.start_from is not None:
        if given:
            yield f"model.start_from brings its own shape; leave out {', '.join(given)}"
    elif model.size is None and model.layers is None:
        yield "which model? give model.start_from (a saved model), model.size (mta-300m) or model.layers (mta)"
    else:
        try:
            model_config(run, vocab_size=257)
        except (ValueError, TypeError) as error:
            yield f"model: {error}"


def _data(data: DataSettings) -> Iterator[str]:
    if not data.sources:
        yield "no text to train on; give data.sources, as in data.sources=[book.txt]"
    for name, sources in (("data.sources", data.sources), ("data.validation", data.validation)):
        for index, source in enumerate(sources):
            yield from _source(f"{name}.{index}", source)
        named = [source.name for source in sources if source.name is not None]
        for twice in sorted({one for one in named if named.count(one) > 1}):
            yield f"{name}: two sources are named {twice!r}; results need names of their own"
    weights = [source.weight for source in data.sources]
    if None in weights and any(weight is not None for weight in weights):
        yield f"data.sources: give every source a weight or none; source {weights.index(None)} has none"
    elif len(weights) > 1 and any(source.weight is None and source.dataset is not None for source in data.sources):
        yield "data.sources: a streamed dataset has no known length, so beside other sources all need a weight"
    yield from _refused(0 <= data.holdout < 1, "data.holdout", data.holdout, "a share, 0 or more and below 1")
    yield from _refused(bool(data.tokenizer.strip()), "data.tokenizer", repr(data.tokenizer), '"bytes", a file or a folder')


def _source(name: str, source: SourceSettings) -> Iterator[str]:
    if bool(source.paths) == (source.dataset is not None):
        yield f"{name} needs either paths or a dataset; got {'both' if source.paths else 'neither'}"
    if source.config is not None and source.dataset is None:
        yield f"{name}.config belongs to a dataset; files have none"
    weight = source.weight
    yield from _refused(weight is None or 0 < weight < math.inf, f"{name}.weight", weight, "positive and finite, or null")
    yield from _refused(bool(source.field), f"{name}.field", repr(source.field), "the name of a field")


def _optimiser(settings: OptimiserSettings) -> Iterator[str]:
    s = settings
    for holds, name, accepted in (
        (0 < s.lr < math.inf, "lr", "positive and finite"),
        (s.muon_lr is None or 0 < s.muon_lr < math.inf, "muon_lr", "positive and finite, or null"),
        (0 <= s.warmup < math.inf, "warmup", "0 or more"),
        (0 <= s.end_lr <= 1, "end_lr", "a share of the peak, 0 to 1"),
        (0 < s.decay <= 1, "decay", "a share of the steps, above 0, at most 1"),
        (0 <= s.weight_decay < math.inf, "weight_decay", "0 or more"),
        (0 <= s.beta1 < 1, "beta1", "0 or more, below 1"),
        (0 <= s.beta2 < 1, "beta2", "0 or more, below 1"),
        (0 < s.eps < math.inf, "eps", "positive"),
        (0 <= s.clip < math.inf, "clip", "0 (off) or more"),
        (s.inner_warmup >= 0, "inner_warmup", "0 (off) or more"),
    ):
        yield from _refused(holds, f"optimiser.{name}", vars(s)[name], accepted)
    if s.muon_lr is not None and s.name != "muon":
        yield f"optimiser.muon_lr needs optimiser.name=muon; got {s.name}"


def _engine(settings: EngineSettings) -> Iterator[str]:
    s = settings
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", s.device) is not None
    yield from _refused(known, "engine.device", repr(s.device), "auto, cpu, cuda or cuda:N")
    yield from _refused(s.threads is None or s.threads >= 1, "engine.threads", s.threads, "at least 1, or null")
    yield from _refused(s.tensor_parallel >= 1, "engine.tensor_parallel", s.tensor_parallel, "at least 1")
    yield from _refused(s.micro_batch is None or s.micro_batch >= 1, "engine.micro_batch", s.micro_batch, "at least 1, or null")
    yield from _refused(s.sequence_parallel >= 1, "engine.sequence_parallel", s.sequence_parallel, "at least 1")
    if s.sequence_parallel > 1 and s.strategy != "ddp":
        yield f"engine.sequence_parallel={s.sequence_parallel} needs engine.strategy=ddp; got {s.strategy}"
    if s.tensor_parallel > 1 and s.strategy != "fsdp":
        yield f"engine.tensor_parallel={s.tensor_parallel} needs engine.strategy=fsdp; got {s.strategy}"


def _saving(run: RunSettings) -> Iterator[str]:
    s = run.saving
    yield from _refused(s.every_minutes > 0, "saving.every_minutes", s.every_minutes, "positive")
    yield from _refused(s.every_steps >= 0, "saving.every_steps", s.every_steps, "0 (none) or more")
    yield from _refused(s.keep_last >= 1, "saving.keep_last", s.keep_last, "at least 1")
    yield from _refused(s.keep_best >= 0, "saving.keep_best", s.keep_best, "0 or more")
    yield from _refused(run.logging.every_seconds >= 0, "logging.every_seconds", run.logging.every_seconds, "0 or more")
    held_out = run.data.holdout > 0 and any(source.paths for source in run.data.sources)
    if s.keep_best > 0 and not run.data.validation and not held_out:
        yield f"saving.keep_best={s.keep_best} needs a validation loss; give data.validation or data.holdout"
