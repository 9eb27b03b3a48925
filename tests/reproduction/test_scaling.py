"""What training costs: the FLOPs are those of the products, and the picture shows every comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recollect.comparison.report.records import Point, Run
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.reproduction.after import scaled
from recollect.reproduction.measured import Trained
from recollect.reproduction.scaling import draw, flops


def run(folder: Path, *scores: float, seed: int = 0, status: str = "finished") -> Run:
    rest: dict[str, Any] = {
        "loss": 0.0,
        "seconds": 1.0,
        "tokens_per_second": 1.0,
        "state_bytes": 1,
        "n_eval": 8,
        "parameters": 5,
    }
    points = [
        Point(step=i + 1, score=score, tokens=100 * (i + 1), final=i + 1 == len(scores), **rest)
        for i, score in enumerate(scores)
    ]
    return Run(label="m", seed=seed, steps=2, points=tuple(points), status=status, reason="", folder=folder)  # type: ignore[arg-type]


def saved(folder: Path, mixer: str) -> Path:
    config = RecollectConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, layers=[mixer], intermediate_size=24)
    RecollectForCausalLM(config).save_pretrained(folder / "model")
    return folder


def products(length: int) -> int:
    """FLOPs per token of the model with plain attention: q, k, v, o, the SwiGLU's three, the head; forward and twice as many back."""
    weights = 4 * 16 * 16 + 3 * 16 * 24 + 16 * 32
    return 6 * weights + 3 * 2 * 2 * length * 16  # scores and values over the whole map


@pytest.mark.parametrize("length", [8, 64])
def test_flops_are_those_of_the_products(length: int, tmp_path: Path) -> None:
    """Prevents a count of the forward pass alone, of a batch instead of a token, and one that misses what a kernel does."""
    found = flops([run(saved(tmp_path, "attention"), 1.0)], length)
    assert found == pytest.approx(products(length), rel=0.12)  # PyTorch takes the scores once more in the backward pass


@pytest.mark.parametrize("mixer", ["mta", "yaad", "moneta", "memora", "mamba2", "gsa"])
def test_every_mixer_costs_more_than_its_projections(mixer: str, tmp_path: Path) -> None:
    """Prevents a memory that counts as free because compiled code runs it."""
    config = RecollectConfig.from_pretrained(saved(tmp_path, mixer) / "model")
    weights = sum(x.numel() for x in RecollectForCausalLM(config).parameters() if x.dim() == 2)
    found = flops([run(tmp_path, 1.0)], 64)
    assert found is not None
    assert found > 4 * weights


def test_a_model_that_did_not_finish_has_no_count(tmp_path: Path) -> None:
    """Prevents a table that fails because of one diverged run."""
    assert flops([run(tmp_path, status="failed")], 8) is None


def test_curves_are_over_flops_and_over_lengths(tmp_path: Path) -> None:
    """Prevents tokens where the axis says FLOPs, a line through one seed alone, and failed runs among the others."""
    short = Trained({"A": [run(tmp_path, 3.0, 2.0), run(tmp_path, 5.0, 4.0, seed=1)]}, 128)
    long = Trained({"A": [run(tmp_path, 2.0, 1.0), run(tmp_path, 9.0, seed=1, status="failed")]}, 512)
    left, right = draw([short, long], [{"A": 10.0}, {"A": 20.0}]).axes
    assert [list(line.get_xdata()) for line in left.lines] == [[2000.0, 4000.0]]
    assert [list(line.get_ydata()) for line in left.lines] == [[2.0, 1.0]]
    (mean,) = [line for line in right.lines if line.get_label() == "A"]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([128, 512], [3.0, 1.0])


def test_the_counts_are_columns(tmp_path: Path) -> None:
    """Prevents counts under another comparison's head."""
    folder = saved(tmp_path / "m", "attention")
    trained = [Trained({"A": [run(folder, 2.0)], "B": [run(folder, status="failed")]}, length) for length in (8, 64)]
    columns, (path,), notes = scaled(trained, tmp_path)
    assert [column.head for column in columns] == ["MFLOP/token, context 8", "MFLOP/token, context 64"]
    assert columns[0].cells["A"][0] < columns[1].cells["A"][0]
    assert columns[0].cells["B"] == [None]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert notes
