"""Training goes on from models of others: retrofitted, in half precision, with their own tokenizer; and what comes out can be used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from recollect.cli import app
from recollect.data.tokenizer import ByteTokenizer, train_tokenizer
from recollect.inference.generation import continue_text
from recollect.inference.remembering import remember_files
from recollect.training.recipe.model_config import start_model
from recollect.training.recipe.settings import ModelSettings, RunSettings
from recollect.training.trainer import run_training
from tests.training.runs import stop_after, tiny_run, write_text

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama in bf16 with its tokenizer, retrofitted with Multi-Token Attention by the command."""
    tokenizer = train_tokenizer(write_text(tmp_path / "text.jsonl"), vocab_size=280, out=tmp_path / "stock")
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "stock")
    assert tokenizer.parent == tmp_path / "stock"
    done = CliRunner().invoke(app, ["retrofit", str(tmp_path / "stock"), "--out", str(tmp_path / "mta"), "--layers", "all"])
    assert done.exit_code == 0, done.output
    return tmp_path / "mta"


def run_from(folder: Path, place: Path, *, out: str = "run", **values: object) -> RunSettings:
    run = tiny_run(
        folder, out=out, data={"tokenizer": str(place / "tokenizer.json")}, optimiser={"lr": 1e-5, "warmup": 0}, **values
    )  # type: ignore[arg-type]
    return dataclasses.replace(run, model=ModelSettings(start_from=str(place)))


def test_half_precision_files_are_trained_in_full(tmp_path: Path, llama: Path) -> None:
    """In bf16 a step of 1e-5 leaves a kernel's 1 as it is: the new parameters would never learn."""
    run = run_from(tmp_path, llama)
    run_training(run, say=lambda line: None)
    weights = load_file(Path(run.out) / "model" / "model.safetensors")
    kernels = [weight for name, weight in weights.items() if "kq_pre" in name]
    assert kernels
    for kernel in kernels:
        assert kernel.dtype == torch.float32
        centre = kernel.flatten(1).amax(1)
        assert ((centre != 1) & ((centre - 1).abs() < 1e-3)).all()


@pytest.mark.parametrize("which", ["stock", "mta"])
def test_a_stock_and_a_retrofitted_model_start_in_fp32(tmp_path: Path, llama: Path, which: str) -> None:
    """Prevents half-precision optimiser states of whichever kind of model."""
    place = llama if which == "mta" else tmp_path / "stock"
    run = run_from(tmp_path, place)
    from recollect.data.tokenizer import load_tokenizer

    model = start_model(run, load_tokenizer(run.data.tokenizer))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bytes_are_refused_where_a_tokenizer_lies_beside_the_model(tmp_path: Path, llama: Path) -> None:
    """Prevents a trained Llama from being trained on bytes that mean other tokens to it, because bytes are the default."""
    run = run_from(tmp_path, llama)
    with pytest.raises(ValueError, match=r"set data\.tokenizer=.*tokenizer\.json"):
        start_model(run, ByteTokenizer())


def test_only_the_new_parameters_train_and_resume_bit_by_bit(tmp_path: Path, llama: Path) -> None:
    """`model.train_only=[new]` moves kernels and nothing else, and a stop changes no bit."""
    finished = []
    for out, stop in (("whole", None), ("cut", 3)):
        run = run_from(tmp_path, llama, out=out)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, train_only=["new"]))
        if stop:
            run_training(run, should_stop=stop_after(stop), say=lambda line: None)
        run_training(run, say=lambda line: None)
        finished.append(load_file(Path(run.out) / "model" / "model.safetensors"))
    before = load_file(llama / "model.safetensors")
    whole, cut = finished
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    moved = {name for name in whole if not torch.equal(whole[name].float(), before[name].float())}
    assert moved
    assert all(any(part in name for part in ("kq_", "head_")) for name in moved)


def test_what_was_trained_can_be_used(tmp_path: Path, llama: Path) -> None:
    """Prevents a model that `generate` cannot read after hours of training; memories of it are refused with a sentence."""
    run = run_from(tmp_path, llama, steps=2)
    run_training(run, say=lambda line: None)
    assert continue_text(Path(run.out), "the cat", n_tokens=4).startswith("the cat")
    with pytest.raises(ValueError, match="holds a retrofitted model"):
        remember_files(Path(run.out), [write_text(tmp_path / "more.txt")])


def test_wrong_retrofits_are_told(tmp_path: Path, llama: Path) -> None:
    """Prevents tracebacks of a damaged file and of a folder that is a file."""
    weights = tmp_path / "stock" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    done = CliRunner().invoke(app, ["retrofit", str(tmp_path / "stock"), "--out", str(tmp_path / "again")])
    assert done.exit_code == 2
    done = CliRunner().invoke(app, ["retrofit", str(llama), "--out", str(weights)])
    assert done.exit_code == 2


def test_a_source_that_ends_is_told(tmp_path: Path) -> None:
    """Prevents twenty passes over a small text from looking like one over a large one."""
    said: list[str] = []
    run_training(tiny_run(tmp_path, steps=130, eval_every=0), say=said.append)
    assert [line for line in said if "has been read to its end" in line and "begins anew" in line]
