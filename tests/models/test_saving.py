"""Saving and loading, in this process and in a fresh one, and Hugging Face's Trainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from recollect.models import RecollectForCausalLM, RecollectModel
from tests.models.conftest import NAMES, TOY, tiny, tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_saved_model_is_the_same_model(name: str, tied: bool, tmp_path) -> None:
    """Equal logits, tied weights stored once and tied again, the Auto classes find it."""
    model = tiny(name, dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (not a dict)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is RecollectForCausalLM
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is RecollectModel
    assert torch.equal(base(tokens(2, 9)).last_hidden_state, model.model(tokens(2, 9)).last_hidden_state)


def test_saved_dtype_and_shards(tmp_path) -> None:
    """bf16 weights come back as bf16 or as asked; several files are one model."""
    model = tiny(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = RecollectForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    assert RecollectForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_loads_in_a_fresh_process(tmp_path) -> None:
    """One import registers the Auto classes; nothing else of this process is needed."""
    model = tiny("attention", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, recollect.models\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(1, 10)[None]\n"
        "torch.save((model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)), sys.argv[2])\n"
    )
    result = tmp_path / "result.pt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(result)], check=True, env=environment, timeout=120)
    logits, sequence = torch.load(result)
    ids = torch.arange(1, 10)[None]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=0)
    assert torch.equal(sequence, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Hugging Face's Trainer needs accelerate (not a dependency)"
)
def test_trains_under_hugging_faces_trainer(tmp_path) -> None:
    """The model is an ordinary one to the Trainer: the loss falls."""
    model = tiny(TOY, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1, use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
