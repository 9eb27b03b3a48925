"""The stage that retrofits: a stock Llama is trained, then trained on as it is and with what was added, on the same data."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from recollect.models import retrofit
from recollect.reproduction.experiment import Continuing
from recollect.training.journal import read_lines
from recollect.training.recipe.load import load_run
from recollect.training.trainer import MODEL, run_training

SAME, CHANGED = "Transformer -> Transformer", "Transformer -> {}"


def continue_both(
    stage: Continuing,
    folder: Path,
    *,
    seeds: int,
    text: Sequence[str],
    say: Callable[[str], None],
    device: str = "auto",
    budget: str | None = None,
) -> tuple[dict[str, list[float | None]], float, list[int]]:
    """Bits per byte of held-out text per seed, of either continuation; seconds of training; parameters of both models.

    Every training goes on where it was interrupted, and one that is finished is not run again.

    Args:
        budget: of each training, in place of the stage's own: steps, as "300steps".
    Raises:
        ValueError: a budget that is no number of steps.
    """
    if budget is not None:
        if not (found := re.fullmatch(r"(\d+)steps", budget)) or not int(found[1]):
            raise ValueError(f"the budget of a continued training is a number of steps, as 300steps; got {budget!r}")
        stage = dataclasses.replace(stage, steps=int(found[1]), more_steps=int(found[1]))
    names = (SAME, CHANGED.format(stage.mixer))
    values: dict[str, list[float | None]] = {name: [] for name in names}
    seconds, parameters = 0.0, []
    for seed in range(seeds):
        place = folder / f"seed{seed}"
        base = place / "base"
        if not (base / "config.json").is_file():
            torch.manual_seed(seed)
            _llama(stage).save_pretrained(base)
        first = _train(stage, place / "first", base, seed, text, stage.steps, stage.lr, device, say)
        seconds += first[1]
        changed = place / "retrofitted"
        if not (changed / "config.json").is_file():
            retrofit(str(place / "first" / MODEL), mixer=stage.mixer, layers=stage.layers).save_pretrained(changed)
        for name, start in zip(names, (place / "first" / MODEL, changed), strict=True):
            out = place / ("same" if name == SAME else "changed")
            value, took, size = _train(stage, out, start, seed + 1000, text, stage.more_steps, stage.more_lr, device, say)
            values[name].append(value)
            seconds += took
            parameters.append(size)
    return values, seconds, parameters


def _llama(stage: Continuing) -> PreTrainedModel:
    """A byte-level Llama with fresh weights."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=stage.width,
        intermediate_size=stage.intermediate,
        num_hidden_layers=stage.n_layers,
        num_attention_heads=stage.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _train(
    stage: Continuing,
    out: Path,
    start: Path,
    seed: int,
    text: Sequence[str],
    steps: int,
    lr: float,
    device: str,
    say: Callable[[str], None],
) -> tuple[float | None, float, int]:
    """Bits per byte at the end, seconds, parameters."""
    if not (out / MODEL).is_dir():
        settings = {
            "model": {"start_from": str(start)},
            "data.sources": [str(path) for path in text],
            "data.shards": str(out.parent.parent / "tokens"),
            "out": str(out),
            "seed": seed,
            "steps": steps,
            "engine.device": device,
            "eval_every": 0,
            "logging.tensorboard": False,
            "optimiser.lr": lr,
            "optimiser.warmup": max(1, steps // 20),
        }
        run_training(load_run("tiny", [f"{name}={json.dumps(value)}" for name, value in settings.items()]), say=say)
    events = read_lines(out / "progress.jsonl")
    last = [event for event in events if event["event"] == "evaluation"][-1]
    trained = [event for event in events if event["event"] == "step"]
    value = float(last.get("bits_per_byte") or math.nan)
    n = sum(weight.numel() for weight in load_file(out / MODEL / "model.safetensors").values())
    return (value if math.isfinite(value) else None), float(trained[-1]["seconds"]) if trained else 0.0, n
