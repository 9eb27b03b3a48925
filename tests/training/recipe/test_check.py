"""What of a run is refused before it starts, its model and its length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recollect.models import RecollectConfig
from recollect.training.recipe.check import batch_rows, check, n_steps
from recollect.training.recipe.load import load_run
from recollect.training.recipe.model_config import model_config

TEXT = "data.sources=[book.txt]"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.sources=[]"], "no text to train on"),
        (["steps=null"], "give the length of the run"),
        (["steps=0"], "steps must be at least 1; got 0"),
        (["tokens=.inf"], "tokens must be positive and finite"),
        (["batch_tokens=100"], "batch_tokens=100 is less than one row of data.seq_len=256"),
        (["optimiser.lr=.nan"], "optimiser.lr must be positive and finite; got nan"),
        (["optimiser.beta2=1"], "optimiser.beta2 must be 0 or more, below 1"),
        (["optimiser.muon_lr=1e-2"], "optimiser.muon_lr needs optimiser.name=muon"),
        (["engine.device=gpu"], "engine.device must be auto, cpu, cuda or cuda:N; got 'gpu'"),
        (["engine.tensor_parallel=2"], "needs engine.strategy=fsdp"),
        (["engine.sequence_parallel=2"], "needs engine.strategy=ddp"),
        (["engine.sequence_parallel=2", "engine.strategy=ddp", "data.carry=true"], "exclude each other"),
        (["engine.sequence_parallel=3", "engine.strategy=ddp", "data.seq_len=64"], "must divide data.seq_len=64"),
        (["data.sources=[{paths: [a], dataset: b}]"], "data.sources.0 needs either paths or a dataset; got both"),
        (["data.validation=[{name: a}]"], "data.validation.0 needs either paths or a dataset; got neither"),
        (["data.sources=[{paths: a, weight: 1}, b]"], "give every source a weight or none; source 1 has none"),
        (["data.sources=[a, {dataset: b}]"], "a streamed dataset has no known length"),
        (["data.sources=[{paths: a, name: x}, {paths: b, name: x}]"], "two sources are named 'x'"),
        (["data.holdout=0", "saving.keep_best=1"], "needs a validation loss"),
        (["model.layers=mtaa"], "did you mean 'mta'?"),
        (["model.size=mta-30m"], "did you mean 'mta-300m'?"),
        (["model.options.c_qq=2"], "did you mean 'c_q'?"),
        (["model.n_heads=3"], "model: layers[0]"),
        (["model.layers=null"], "which model?"),
    ],
)
def test_impossible_values_are_refused(overrides: list[str], sentence: str) -> None:
    """Prevents hours of tokenising before a value is found to be impossible."""
    run = load_run("tiny", [TEXT, *overrides])
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        check(run)
    assert len(str(caught.value).splitlines()) == 1, "no other setting is blamed"


def test_all_impossible_values_are_reported_at_once() -> None:
    """Prevents a round of corrections per value."""
    with pytest.raises(ValueError, match="3 problems") as caught:
        check(load_run("tiny", ["optimiser.clip=-1", "saving.keep_last=0"]))
    assert len(str(caught.value).splitlines()) == 4


# --- the model and the length of a run


def test_given_fields_win_over_the_size() -> None:
    """Prevents overrides of a shape that the size swallows, and a SwiGLU that keeps the width of another model dim."""
    config = model_config(load_run("moneta-340m", ["model.hidden_size=256", "model.n_layers=3", "model.layers=mta+yaad"]), 500)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (256, 3, 16)
    assert (config.intermediate_size, config.vocab_size) == (768, 500)
    assert [layer["mixer"] for layer in config.layers] == ["mta", "yaad", "mta"]
    assert model_config(load_run("moneta-340m", ["model.n_layers=3"]), 500).intermediate_size == 2752


def test_saved_models_are_refused_in_words(tmp_path: Path) -> None:
    """Prevents training on from a folder without a model, from another package's model, or with another tokenizer."""
    run = load_run("long-context", [f"model.start_from={tmp_path}"])
    with pytest.raises(ValueError, match=r"no config\.json"):
        model_config(run, 300)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', not 'recollect'"):
        model_config(run, 300)
    config.write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        model_config(run, 300)
    RecollectConfig(vocab_size=257, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 257 tokens, the tokenizer 300"):
        model_config(run, 300)
    with pytest.raises(ValueError, match="there is no folder"):
        model_config(load_run("tiny", ["model.start_from=not/there"]), 300)


def test_length_in_rows_and_steps() -> None:
    """Prevents a run that is a batch short, and a batch of no row."""
    run = load_run("tiny", ["batch_tokens=1000", "data.seq_len=256", "tokens=2049"])
    assert (batch_rows(run), n_steps(run)) == (4, 3), (
        "1000 tokens are 3.9 rows; 2,049 tokens are two batches of 1,024 and one token"
    )
    assert n_steps(load_run("tiny", ["steps=7"])) == 7
