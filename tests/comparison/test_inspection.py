"""What the report shows of a model is what the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recollect.comparison.inspection import inspect
from recollect.comparison.model import make_model, n_parameters
from recollect.comparison.plan import make_plan
from recollect.comparison.workload import make_workload
from recollect.models.memory import state_bytes
from tests.comparison.small import small


@pytest.mark.parametrize("label", ["attention", "mta", "diff", "talking_heads"])
def test_task_examples_maps_and_kernels(label: str) -> None:
    """Predictions are the argmax; maps are causal and rows of "attention" sum to one; kernels have their sizes."""
    plan = make_plan(small(mixers=[label], layers=2))
    workload = make_workload(plan.task, plan.task_options)
    model = make_model(plan.model_of(label), plan.mixer(label)["layers"], seed=0).eval()
    described, tensors = inspect(model, workload)
    assert len(described["examples"]) == 8
    batch = next(iter(workload.held_out(8, batch_size=8)))
    for row, example in enumerate(described["examples"]):
        asked = batch.labels[row] >= 0
        predicted = model(input_ids=batch.inputs[row : row + 1]).logits[0].argmax(-1)[asked]
        assert example["prediction"] == workload.text(predicted)
        assert example["target"] == workload.text(batch.labels[row][asked])
        assert example["correct"] == bool((predicted == batch.labels[row][asked]).all())
        assert example["text"].startswith(example["prompt"])
        assert example["prompt"].endswith(example["tags"]["question"])
    assert len(described["map_tokens"]) == workload.length
    assert {entry["key"] for kind in ("maps", "kernels") for entry in described[kind]} == set(tensors)
    assert {entry["layer"] for entry in described["maps"]} == {0, 1}
    for entry in described["maps"]:
        values = tensors[entry["key"]]
        assert values.dtype == torch.float32
        assert values.shape[1:] == (workload.length, workload.length)
        assert torch.equal(values, values.tril())
    if label == "mta":
        assert {(entry["layer"], entry["name"]) for entry in described["kernels"]} == {
            (layer, name) for layer in (0, 1) for name in ("kq_pre", "kq_post", "head_pre", "head_post")
        }
        assert tensors["layer0.kq_pre"].shape == (2, 6, 5)
        assert tensors["layer0.head_pre"].shape == (1, 2, 2)


def test_text_examples_are_greedy_continuations(tmp_path: Path) -> None:
    """Continued by state, compared with running the whole text again for every byte."""
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question. " * 20)
    plan = make_plan(small(task="text", task_options={}, data=[str(tmp_path)], seq_len=12, mixers=["mta"]))
    workload = make_workload("text", plan.task_options, plan.data)
    model = make_model(plan.model_of("mta"), plan.mixer("mta")["layers"], seed=0).eval()
    example = inspect(model, workload)[0]["examples"][0]
    tokens = next(iter(workload.held_out(8, batch_size=8))).inputs[:1, :6]
    for _ in range(6):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert example["prediction"] == workload.text(tokens[0, 6:])


def test_state_bytes_count_keys_and_values() -> None:
    """Attention keeps two times width numbers per token and layer, in fp32, and a little about positions."""
    plan = make_plan(small(mixers=["attention"], layers=2))
    model = make_model(plan.model_of("attention"), plan.mixer("attention")["layers"], seed=0).eval()
    sizes = [state_bytes(model, torch.zeros(length, dtype=torch.int64)) for length in (10, 20)]
    assert 0 <= sizes[1] - sizes[0] - 10 * 2 * 2 * 16 * 4 <= 10 * 2 * 8
    assert n_parameters(model) == plan.mixer("attention")["parameters"]


def test_the_seed_changes_the_weights() -> None:
    plan = make_plan(small())
    models = [make_model(plan.model_of("mta"), plan.mixer("mta")["layers"], seed=seed) for seed in (0, 0, 1)]
    weights = [model.model.embed_tokens.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
