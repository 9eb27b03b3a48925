"""What trained models attend to, packed for the page: example predictions, kernels, attention maps.

A map [H, T, T] is causal, so only its lower triangle travels, packed: 22 KB per head at T = 128.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from recollect.comparison.report.records import Comparison, Run
from recollect.pages import packed

MAX_MAPS = 96  # head maps per mixer on the page (about 2 MB in base64 at T = 128); deep or wide models show their first heads
MAX_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One run's inspection.json with its tensors: maps [H, T, T] and kernels as the mixer holds them, by key."""

    label: str
    seed: int
    content: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


def load(comparison: Comparison) -> tuple[list[Inspection], list[str]]:
    """One inspection per mixer that has any (its first finished seed, else its first), and a sentence for every damaged one."""
    found, problems = [], []
    for label in comparison.labels:
        for run in sorted(comparison.runs[label], key=lambda run: run.status != "finished"):
            try:
                inspection = _load(run)
            except (OSError, ValueError, SafetensorError) as error:
                problems.append(f"The inspection of {label} seed {run.seed} could not be read: {error}")
                continue
            if inspection:
                found.append(inspection)
                break
    return found, problems


def examples(inspections: Sequence[Inspection]) -> list[dict[str, Any]]:
    """Examples that several mixers answered, joined: {"prompt", "target", "tags", "answers": [{"label", "seed", ...}]}."""
    joined: dict[tuple[str, str], dict[str, Any]] = {}
    for inspection in inspections:
        for example in inspection.content.get("examples") or []:
            prompt = str(example.get("prompt") or example.get("text") or "")
            target = str(example.get("target") or "")
            tags = example.get("tags") or {}
            card = joined.setdefault((prompt, target), {"prompt": prompt, "target": target, "tags": tags, "answers": []})
            answer = {"label": inspection.label, "seed": inspection.seed}
            card["answers"].append(
                {**answer, "prediction": str(example.get("prediction", "")), "correct": example.get("correct")}
            )
    return list(joined.values())[:MAX_EXAMPLES]


def first_query(inspection: Inspection) -> int | None:
    """The map row to open with: the prompt's last token, which predicts the answer's first; None where the maps end before it.

    The maps are of the first example, answer included.
    """
    examples: Sequence[Mapping[str, Any]] = inspection.content.get("examples") or [{}]
    first = examples[0]
    text, prompt = "", str(first.get("prompt") or "")
    for position, token in enumerate(inspection.content.get("map_tokens") or []):
        text += str(token)
        if text == prompt:
            return position
    return None


def kernels(inspection: Inspection, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The learned kernels, one entry per matrix: {"layer", "kind", "title", "rows", "cols", "first", "origin", "values"}.

    Rows of a KQ kernel are queries, oldest first, the current one last; its columns are keys, `origin` being the same key's.
    Rows of a head kernel are output heads, its columns input heads. values: row by row, four significant digits.
    """
    found = []
    for item in inspection.content.get("kernels") or []:
        tensor = inspection.tensors.get(item.get("key"))
        if tensor is None or tensor.ndim not in (3, 4):
            continue
        layer, name = int(item["layer"]), str(item["name"])
        for heads in np.ndindex(*tensor.shape[:-2]):
            matrix = tensor[heads]
            found.append(
                {
                    "layer": layer,
                    "kind": name,
                    "title": _kernel_title(name, heads, tensor.shape),
                    "rows": matrix.shape[0],
                    "cols": matrix.shape[1],
                    "first": heads[0] * matrix.shape[0] if name.startswith("head") else 0,
                    "origin": _origin(plan, inspection.label, layer, matrix.shape[1]),
                    "values": [_rounded(value) for value in matrix.ravel()],
                }
            )
    return found


def maps(inspection: Inspection) -> list[dict[str, Any]]:
    """The attention maps, one entry per layer and name: {"layer", "name", "heads", "total", "length"} and `packed`."""
    items = [item for item in inspection.content.get("maps") or [] if _is_map(inspection.tensors.get(item.get("key")))]
    per_map = max(1, MAX_MAPS // max(len(items), 1))
    found = []
    for item in items:
        tensor = inspection.tensors[item["key"]]
        shown = tensor[:per_map]
        length = shown.shape[-1]
        rows, cols = np.tril_indices(length)
        found.append(
            {
                "layer": int(item["layer"]),
                "name": str(item["name"]),
                "heads": shown.shape[0],
                "total": tensor.shape[0],
                "length": length,
                **packed(shown[:, rows, cols]),
            }
        )
    return found


def _load(run: Run) -> Inspection | None:
    path = run.folder / "inspection.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    tensors = path.with_suffix(".safetensors")
    return Inspection(label=run.label, seed=run.seed, content=content, tensors=load_file(tensors) if tensors.is_file() else {})


def _is_map(tensor: np.ndarray | None) -> bool:
    return tensor is not None and tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2] and tensor.size > 0


def _origin(plan: Mapping[str, Any], label: str, layer: int, c_k: int) -> int:
    """The column of a KQ kernel that reads the same key: the middle, or an end where the mixer pads keys on one side only."""
    mixer = next(mixer for mixer in plan["mixers"] if mixer["label"] == label)
    layers = mixer.get("layers") or []
    options = {**(mixer.get("options") or {}), **(layers[layer] if layer < len(layers) else {})}
    return {"left": c_k - 1, "right": 0}.get(options.get("pad_key", "both"), c_k // 2)


def _kernel_title(name: str, heads: tuple[int, ...], shape: tuple[int, ...]) -> str:
    if name.startswith("head"):
        return f"group {heads[0]}" if shape[0] > 1 else "all heads"
    if len(heads) == 1:
        return f"head {heads[0]}"
    group = heads[0] // shape[1] * shape[1]
    return f"head {group + heads[1]} to {heads[0]}"


def _rounded(value: float) -> float | None:
    return float(f"{float(value):.4g}") if np.isfinite(value) else None
