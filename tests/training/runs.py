"""Whole runs that take a second: text, settings, and what a run has left in its folder."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from recollect.data.settings import DataSettings, SourceSettings
from recollect.training.journal import read_lines
from recollect.training.recipe.load import dump_run, load_run
from recollect.training.recipe.settings import (
    EngineSettings,
    LoggingSettings,
    ModelSettings,
    OptimiserSettings,
    RunSettings,
    SavingSettings,
)
from recollect.training.trainer import CHECKPOINTS, run_training

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "dog", "run", "by", "old", "barn", "at", "noon")


def write_text(path: Path, *, n_documents: int = 40, seed: int = 0) -> Path:
    """Documents of 5 to 60 words that a model can learn something of, as JSON lines."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(n_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tiny_run(
    folder: Path,
    *,
    out: str = "run",
    layers: Any = "mta",
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    optimiser: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    saving: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
    **values: Any,
) -> RunSettings:
    """A run in `folder`/`out` on a text in `folder`: 8 steps of 4 rows of 24 bytes, two layers of 16 dims; anything may be replaced.

    Tokens lie in `folder`, so that runs share them.
    """
    text = folder / "text.jsonl"
    if not text.is_file():
        write_text(text)
    return RunSettings(
        out=str(folder / out),
        **{"steps": 8, "batch_tokens": 96, "eval_every": 4, "eval_rows": 4, **values},
        model=ModelSettings(
            **{"layers": layers, "hidden_size": 16, "n_layers": 2, "n_heads": 2, "intermediate_size": 16, **(model or {})}
        ),
        data=DataSettings(
            **{
                "sources": [SourceSettings(paths=[str(text)])],
                "holdout": 0.1,
                "seq_len": 24,
                "shards": str(folder / "tokens"),
                **(data or {}),
            }
        ),
        optimiser=OptimiserSettings(**{"lr": 3e-3, "warmup": 2.0, **(optimiser or {})}),
        engine=EngineSettings(**{"device": "cpu", "threads": 1, **(engine or {})}),
        saving=SavingSettings(**(saving or {})),
        logging=LoggingSettings(**{"every_seconds": 0.0, "tensorboard": False, **(logging or {})}),
    )


def out_again(run: RunSettings, name: str) -> RunSettings:
    """The same run into another folder beside the first."""
    return dataclasses.replace(run, out=str(Path(run.out).parent / name))


def stop_after(n: int) -> Callable[[], bool]:
    """A `should_stop` that lets n steps pass."""
    asked = iter([False] * n)
    return lambda: next(asked, True)


def finish(run: RunSettings) -> dict[str, bytes]:
    """Run to the end, in silence; the bits of the model."""
    progress = run_training(run, say=lambda line: None)
    assert progress.step == run.steps
    return model_bits(run)


def model_bits(run: RunSettings) -> dict[str, bytes]:
    """Every tensor of the saved model, bit by bit."""
    tensors = load_file(Path(run.out) / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def journal(run: RunSettings) -> list[dict[str, Any]]:
    return read_lines(Path(run.out) / "progress.jsonl")


def losses(run: RunSettings) -> dict[int, float]:
    """Training loss by step; every step once."""
    steps = [event for event in journal(run) if event["event"] == "step"]
    assert len({event["step"] for event in steps}) == len(steps)
    return {event["step"]: event["loss"] for event in steps}


def validation(run: RunSettings) -> dict[int, float]:
    """Validation loss by step; every step once."""
    evaluations = [event for event in journal(run) if event["event"] == "evaluation"]
    assert len({event["step"] for event in evaluations}) == len(evaluations)
    return {event["step"]: event["loss"] for event in evaluations}


def write_run(run: RunSettings, path: Path) -> Path:
    """The run as a file for the command line."""
    path.write_text(dump_run(run), encoding="utf-8")
    assert load_run(path) == run
    return path


def checkpoints(run: RunSettings) -> list[str]:
    """Names of the folders."""
    return sorted(path.name for path in (Path(run.out) / CHECKPOINTS).iterdir())


def interrupted(run: RunSettings, name: str, stops: Sequence[int] = (3, 2)) -> RunSettings:
    """The same run in another folder, stopped and continued."""
    again = out_again(run, name)
    for stop in stops:
        run_training(again, should_stop=stop_after(stop), say=lambda line: None)
    finish(again)
    return again


def assert_exact_resumption(run: RunSettings) -> None:
    whole = finish(run)
    again = interrupted(run, "again")
    assert losses(again) == losses(run)
    assert validation(again) == validation(run)
    assert model_bits(again) == whole
