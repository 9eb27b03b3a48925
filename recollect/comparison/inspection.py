"""What a trained model does, for the report: examples it answers, where it attends, the kernels it has learned.

Axis legend: T time, H heads, G groups of c_h heads, n examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from recollect.comparison.workload import Workload
from recollect.evaluation.metrics import spread
from recollect.mixers import Mixer
from recollect.models import RecollectForCausalLM
from recollect.models.cache import cache_of
from recollect.models.layers import Block
from recollect.tasks.base import IGNORE, Batch
from recollect.training.checkpoint import replace_file
from recollect.training.loss import labelled_logits

N_EXAMPLES = 8
MAP_TOKENS = 128
CONTINUATION = 64
KERNELS = ("kq_pre", "kq_post", "head_pre", "head_post")


def inspect(model: RecollectForCausalLM, workload: Workload) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Look into a trained model.

    Returns:
        a JSON-able dict with "examples", "map_tokens", "maps", "kernels", and the tensors that its "key"s name: maps [H, T, T]
        with T cut to MAP_TOKENS, kernels [H, c_q, c_k], [H, c_h, c_q, c_k] or [G, c_h, c_h], all fp32 on the CPU.
    """
    model.eval()
    batch = next(iter(workload.held_out(N_EXAMPLES, batch_size=N_EXAMPLES)))
    with torch.no_grad():
        if workload.metric == "error":
            examples = _answers(model, workload, batch)
        else:
            examples = _continuations(model, workload, batch)
        shown = batch.inputs[0, :MAP_TOKENS]
        maps, map_tensors = _maps(model, shown)
    kernels, kernel_tensors = _kernels(model)
    words = [workload.text(token[None]) for token in shown]
    return {"examples": examples, "map_tokens": words, "maps": maps, "kernels": kernels}, {**map_tensors, **kernel_tensors}


def write_inspection(folder: Path, model: RecollectForCausalLM, workload: Workload) -> None:
    """`inspect`, written to `folder`/inspection.json and .safetensors."""
    description, tensors = inspect(model, workload)
    replace_file(folder / "inspection.safetensors", save(tensors))
    replace_file(folder / "inspection.json", json.dumps(description, indent=1, ensure_ascii=False).encode())


def _answers(model: RecollectForCausalLM, workload: Workload, batch: Batch) -> list[dict[str, Any]]:
    """What the model says at the labelled positions."""
    logits, _ = labelled_logits(model, batch.inputs, batch.labels)
    predictions = spread(logits.argmax(dim=-1).cpu(), batch.labels)
    right = workload.correct(predictions, batch.labels)
    examples = []
    for inputs, labels, predicted, score, tags in zip(batch.inputs, batch.labels, predictions, right, batch.tags, strict=True):
        asked = labels != IGNORE
        first = int(asked.nonzero()[0])
        # An answer at the end is cut off the prompt; questions spread over the text leave it whole.
        prompt = inputs[: first + 1] if bool(asked[first:].all()) else inputs
        examples.append(
            {
                "text": workload.text(inputs),
                "prompt": workload.text(prompt),
                "target": workload.text(labels[asked]),
                "prediction": workload.text(predicted[asked]),
                "correct": float(score) == 1.0,
                "tags": tags,
            }
        )
    return examples


def _continuations(model: RecollectForCausalLM, workload: Workload, batch: Batch) -> list[dict[str, Any]]:
    """How the model goes on from the first part of a held-out text, always taking the likeliest byte."""
    length = batch.inputs.shape[1]
    continued = min(CONTINUATION, length // 2)
    prompt = batch.inputs[:, : length - continued]
    device = next(model.parameters()).device
    tokens = prompt.to(device)
    outputs = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    said = []
    for _ in range(continued):
        token = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)
        said.append(token)
        outputs = model(input_ids=token, cache=cache_of(outputs), use_cache=True)
    prediction = torch.cat(said, dim=1).cpu()
    target = batch.inputs[:, length - continued :]
    return [
        {
            "text": workload.text(batch.inputs[i]),
            "prompt": workload.text(prompt[i]),
            "target": workload.text(target[i]),
            "prediction": workload.text(prediction[i]),
            "correct": bool((prediction[i] == target[i]).all()),
            "tags": batch.tags[i] if batch.tags else {},
        }
        for i in range(len(batch.inputs))
    ]


def _maps(model: RecollectForCausalLM, tokens: Tensor) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Attention maps of one sequence [T], layer by layer."""
    mixers = _mixers(model)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, args: seen.__setitem__(layer, args[0])

    hooks = [mixer.register_forward_pre_hook(keep(layer)) for layer, mixer in enumerate(mixers)]
    try:
        model(input_ids=tokens[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    described, tensors = [], {}
    for layer, mixer in enumerate(mixers):
        for name, values in mixer.maps(seen[layer]).items():
            key = f"layer{layer}.{name}"
            described.append({"layer": layer, "name": name, "key": key})
            tensors[key] = values[0].float().cpu().contiguous()
    return described, tensors


def _kernels(model: RecollectForCausalLM) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Convolution kernels and head-mixing matrices of every layer."""
    described, tensors = [], {}
    for layer, mixer in enumerate(_mixers(model)):
        for name, values in mixer.named_parameters(recurse=False):
            if name in KERNELS:
                key = f"layer{layer}.{name}"
                described.append({"layer": layer, "name": name, "key": key})
                tensors[key] = values.detach().float().cpu().contiguous().clone()
    return described, tensors


def _mixers(model: RecollectForCausalLM) -> list[Mixer]:
    """The mixer of every layer; those inside of another mixer belong to it."""
    return [module.mixer for module in model.modules() if isinstance(module, Block)]
