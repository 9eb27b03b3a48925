"""`recollect evaluate` and `recollect reproduce` as they are typed: what is printed, where it lies, and what wrong input is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from recollect.cli import app
from recollect.models import RecollectConfig, RecollectForCausalLM


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = RecollectConfig(hidden_size=16, num_attention_heads=2, layers=["gated_delta_net"], mlp=False)
    RecollectForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def invoke(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_an_evaluation_is_run_and_gone_on_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a command that leaves its results where nobody finds them, or asks again what has been answered."""
    monkeypatch.chdir(tmp_path)
    words = ("evaluate", model, "babilong", "-o", "qa=1", "-o", "lengths=0", "-o", "n=3")
    status, said = invoke(*words, "--limit", "1")
    assert (status, "1 asked" in said) == (0, True), said
    status, said = invoke(*words)
    assert (status, "2 asked" in said, "1 answered earlier" in said) == (0, True, True), said
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"rows.jsonl", "table.txt", "table.md", "figure.png", "report.html"}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert set(rows[0]["results"][0]["shown"]) == {"prompt", "said", "right"}


def test_the_suites_are_listed() -> None:
    """Prevents options that nobody can find."""
    status, said = invoke("evaluate", "--suites")
    assert status == 0
    for word in ("perplexity", "ruler", "needles", "babilong", "clutrr", "lambada", "commonsense", "harness"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a model and a suite"),
        (("MODEL", "rulr"), "did you mean 'ruler'"),
        (("MODEL", "ruler", "-o", "lenghts=5"), "did you mean 'lengths'"),
        (("MODEL", "perplexity"), "needs data"),
        (("MODEL", "perplexity", "--data", "missing.txt"), "no such file"),
        (("nowhere", "babilong", "-o", "n=1"), "nowhere is no causal language model"),
        (("MODEL", "babilong", "--dtype", "int8"), "dtype is auto"),
        (("MODEL", "harness"), "give a model and --option tasks="),
        (("MODEL", "harness", "-o", "tasks=piqa", "-o", "shots=x"), "shots must be an integer or null; got 'x'"),
        (("MODEL", "harness", "-o", "tasks=piqa", "-o", "shot=1"), "it has no option 'shot'. Its options: tasks, include_path"),
        (("MODEL", "harness", "-o", "tasks=piqa", "-o", "metadata=4096"), "metadata='{max_seq_lengths: [1024]}'; got 4096"),
        (("MODEL", "harness", "-o", "tasks=piqa", "-o", "essays=missing.txt"), "cannot read missing.txt: No such file"),
        (("MODEL", "harness", "-o", "tasks=piqa", "--data", "x"), "'harness' has no --data"),
        (("MODEL", "babilong", "-o", "n=1", "--device", "foo"), "device 'foo' cannot be used here"),
        (("MODEL", "babilong", "-o", "n=1", "--limit", "0"), "limit is at least 1; got 0"),
        (("MODEL", "ruler", "--context", "64"), "longer than the 64 tokens"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(
    words: tuple[str, ...], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents tracebacks, and folders of evaluations that never began."""
    monkeypatch.chdir(tmp_path)
    status, said = invoke("evaluate", *(model if word == "MODEL" else word for word in words))
    assert status == 2
    assert message in said, said


def test_a_model_that_gives_nan_keeps_finished_rows(tmp_path: Path) -> None:
    """Prevents scores of numbers that are none, and the loss of what was answered before."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "layers": ["gated_delta_net"], "mlp": False}
    broken = RecollectForCausalLM(RecollectConfig(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[ord("~")] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    for name, text in (("a", "It rained. " * 20), ("b", "It ~ snowed. " * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
    out = tmp_path / "out"
    words = ("evaluate", tmp_path / "model", "perplexity", "--data", tmp_path / "a.txt", "--data", tmp_path / "b.txt")
    status, said = invoke(*words, "--batch-tokens", "100", "--out", out)
    assert status == 2
    assert "logits are not finite" in said
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 1
    assert "a.txt" in rows[0]["id"]


def test_the_experiments_are_listed_and_written_as_commands(tmp_path: Path) -> None:
    """Prevents an experiment that nobody can find, and a recipe that cannot be run."""
    status, said = invoke("reproduce")
    assert status == 0
    assert "mta-toy" in said
    assert "miras-ablation-p" in said
    status, said = invoke("reproduce", "mta-lm", "--scale", "paper", "--out", tmp_path)
    assert status == 0
    assert "\ntrain mta-880m" in (tmp_path / "mta-lm.sh").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mta-toi",), "did you mean 'mta-toy'"),
        (("mta-lm",), "trains on text"),
        (("mta-toy", "--scale", "huge"), "scale is one of tiny, small, paper"),
        (("mta-toy", "--seeds", "0"), "--seeds is at least 1"),
    ],
)
def test_wrong_experiments_are_told(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """Prevents a misspelt experiment from being searched on a cluster."""
    status, said = invoke("reproduce", *words, "--out", tmp_path / "out")
    assert status == 2
    assert message in said, said
