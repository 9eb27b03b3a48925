"""`recollect inspect`: what it writes, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from recollect.cli import app
from recollect.models import RecollectConfig, RecollectForCausalLM
from tests.inspection.small import TEXT, stored
from tests.inspection.test_page import data_of


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, words)], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    stored(root / "model", "mta", "titans")
    (root / "text.txt").write_text(TEXT)
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    RecollectForCausalLM(
        RecollectConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, layers=[{"mixer": "attention"}]
        )
    ).save_pretrained(root / "task")
    return root


def test_it_writes_a_page_of_the_layers_asked_for(folder: Path, tmp_path: Path) -> None:
    """Prevents a command that ends well without its page."""
    status, out, err = call(
        folder / "model", "--text", folder / "text.txt", "--out", tmp_path / "a.html", "--tokens", 50, "--layer", 1
    )
    assert (status, err) == (0, "")
    assert out.startswith("50 tokens")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert [one["label"] for one in data_of(page)["layers"]] == ["whole model", "layer 1: titans"]
    assert "model reads 50 tokens of text.txt" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("mixer", ["mta", "titans"])
def test_a_model_that_has_diverged_is_told(mixer: str, folder: Path, tmp_path: Path) -> None:
    """Prevents a page of missing numbers."""
    stored(tmp_path / "model", mixer)
    broken = RecollectForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "model")
    status, _, err = call(tmp_path / "model", "--text", folder / "text.txt", "--out", tmp_path / "a.html")
    assert status == 2
    assert "logits are not finite" in err
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("model", "text", "more", "message"),
    [
        ("model", "none.txt", [], "none.txt: there is no such file"),
        ("model", "empty.txt", [], "empty.txt is empty; give a file with text in it"),
        ("model", "latin.txt", [], "latin.txt is not UTF-8: unexpected end of data at offset 3"),
        ("none", "text.txt", [], "none holds no model"),
        ("task", "text.txt", [], "has 50 symbols and no tokenizer beside it: it cannot read text"),
        ("model", "text.txt", ["--layer", "7"], "layers of this model are 0 to 1; got 7"),
        ("model", "text.txt", ["--tokens", "1"], "tokens is at least 2"),
        ("model", "text.txt", ["--pool", "sum"], "--pool is max or mean; got 'sum'"),
        ("model", "text.txt", ["--import", "no_such_module_"], "--import no_such_module_ failed"),
        ("model", "text.txt", ["--out", "no/folder/a.html"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(folder: Path, model: str, text: str, more: list[str], message: str) -> None:
    """Prevents a traceback, and minutes of work before a mistake is found."""
    status, out, err = call(folder / model, "--text", folder / text, "--out", folder / "a.html", *more)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("recollect: ")
    assert err.count("\n") == 1
    assert not (folder / "a.html").exists()
