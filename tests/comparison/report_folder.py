"""Folders as `recollect compare` leaves them, with made-up but plausible numbers, for the tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
STEPS = 1500


def make_folder(
    out: Path,
    *,
    mixers: Sequence[str] = ("attention", "talking_heads", "diff", "mta"),
    ends: Mapping[str, float] | None = None,
    n_seeds: int = 3,
    metric: str = "error",
    task: str = "find-block",
    stop: Mapping[tuple[str, int], int] | None = None,
    inspected: bool = True,
) -> Path:
    """Write comparison.json, results.jsonl and inspections.

    Args:
        out: folder to fill; made if missing.
        mixers: labels.
        ends: final score per label; the learning curves fall from chance to about these.
        n_seeds: seeds 0 .. n_seeds - 1.
        metric, task: as in the plan.
        stop: (label, seed) -> step after which that run has no more evaluations; 0 is a run that never started.
        inspected: whether finished runs have inspections.
    """
    error = metric == "error"
    ends = ends or {
        "attention": 0.91 if error else 2.31,
        "talking_heads": 0.82 if error else 2.29,
        "diff": 0.6 if error else 2.25,
        "mta": 0.012 if error else 2.1,
    }
    plan = {
        "version": 3,
        "task": task,
        "task_options": {"n_blocks": 8, "n_letters": 5, "n_question": 2},
        "metric": metric,
        "chance": 1 / 8 if error else None,
        "mixers": [
            {"label": label, "mixer": label, "options": {}, "layers": [{"mixer": label}] * 3, "parameters": 137_216 + 54 * i}
            for i, label in enumerate(mixers)
        ],
        "seeds": list(range(n_seeds)),
        "steps": STEPS,
        "budget": "1500steps",
        "model": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32},
        "training": {"lr": 4e-3, "schedule": "cosine", "batch_size": 64, "length": 56},
        "n_eval": 1000,
        "config_hash": "0123456789abcdef",
        "command": f"recollect compare {task} --seeds {n_seeds}",
        "machine": {"cores": 2},
        "created": "2026-02-03T04:05:06+00:00",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(plan))
    lines = []
    for i, label in enumerate(mixers):
        for seed in range(n_seeds):
            last = (stop or {}).get((label, seed), STEPS)
            lines += _evaluations(plan, label, seed, ends.get(label, 0.5), last, speed=1 + 0.3 * i)
            folder = out / "runs" / f"{label}-seed{seed}"
            if last:
                folder.mkdir(parents=True)
            if inspected and last == STEPS:
                _inspect(folder, label, seed, right=ends.get(label, 0.5) < 0.3)
    (out / "results.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    return out


def _evaluations(
    plan: Mapping[str, Any], label: str, seed: int, end: float, last: int, *, speed: float
) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, len(label)])
    error = plan["metric"] == "error"
    start = 0.99 if error else 6.0
    end = min(1.0, end * (1 + 0.25 * rng.standard_normal())) if error else end + 0.01 * rng.standard_normal()
    lines = []
    for step in range(75, last + 1, 75):
        done = 1 / (1 + math.exp(-(step / STEPS - 0.45) * 14))
        score = math.exp(math.log(start) * (1 - done) + math.log(max(end, 1e-4)) * done)
        score = round(min(1.0, score) * 1000) / 1000 if error else score
        lines.append(
            {
                "task": plan["task"],
                "mixer": label,
                "seed": seed,
                "step": step,
                "steps": STEPS,
                plan["metric"]: score,
                "loss": score * (2.3 if error else math.log(2)),
                "seconds": step * 0.04 * speed,
                "tokens": step * 64 * 56,
                "tokens_per_second": 64 * 56 / (0.04 * speed),
                "parameters": 137_216,
                "state_bytes": 86_016,
                "n_eval": 1000 if step == STEPS else 500,
                "config_hash": plan["config_hash"],
                "final": step == STEPS,
            }
        )
    return lines


def _inspect(folder: Path, label: str, seed: int, *, right: bool) -> None:
    rng = np.random.default_rng([7, seed])
    letters = "abcdefghijklmnopqrstuvwxyz"
    content: dict[str, Any] = {"examples": [], "maps": [], "kernels": []}
    shared = np.random.default_rng(5)  # all mixers answer the same examples
    for i in range(5):
        blocks = ["".join(shared.choice(list(letters), 5, replace=False)) for _ in range(8)]
        target = blocks[int(shared.integers(8))]
        prompt = ".".join(blocks) + "#" + target[3] + target[1]
        prediction = target if right or i == 1 else target[:2] + "xq" + target[4]
        example = {
            "text": prompt + target,
            "prompt": prompt,
            "target": target,
            "prediction": prediction,
            "correct": prediction == target,
        }
        content["examples"].append({**example, "tags": {"blocks": 8}})
    hostile = {
        "text": HOSTILE,
        "prompt": HOSTILE,
        "target": "<b>",
        "prediction": "<i>",
        "correct": False,
        "tags": {"<u>": "<s>"},
    }
    content["examples"].append(hostile)
    content["map_tokens"] = list(content["examples"][0]["text"])
    length = len(content["map_tokens"])
    tensors: dict[str, np.ndarray] = {}

    def add(kind: str, layer: int, name: str, value: np.ndarray) -> None:
        tensors[f"layer{layer}.{name}"] = value.astype(np.float32)
        content[kind].append({"layer": layer, "name": name, "key": f"layer{layer}.{name}"})

    for layer in range(3):
        logits = rng.standard_normal((2, length, length)) * 1.5 + 5 * np.eye(length, k=-1 - layer)
        before = _softmax(logits)
        if label != "mta":
            add("maps", layer, "attention", before)
            continue
        add("maps", layer, "before", before)
        add("maps", layer, "after", _softmax(2 * logits + 4 * np.eye(length, k=-6)))
        kernel = 0.25 * rng.standard_normal((2, 2, 9))
        kernel[:, 1, 4] += 1
        add("kernels", layer, "kq_pre", kernel)
        add("kernels", layer, "head_post", np.eye(2)[None] + 0.2 * rng.standard_normal((1, 2, 2)))
    (folder / "inspection.json").write_text(json.dumps(content))
    save_file(tensors, folder / "inspection.safetensors")


def _softmax(logits: np.ndarray) -> np.ndarray:
    masked = np.where(np.tri(logits.shape[-1], dtype=bool), logits, -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
