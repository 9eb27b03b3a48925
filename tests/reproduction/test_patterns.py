"""Learned kernels are counted per model and kind, and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recollect.comparison.report.records import Run
from recollect.models import RecollectForCausalLM
from recollect.reproduction.after import looked
from recollect.reproduction.experiment import Looking
from recollect.reproduction.patterns import draw, learned, shares
from tests.inspection.small import model_of


def saved(folder: Path, *entries: tuple[int, int]) -> Path:
    """A model of two layers of which the first has key-query kernels: fresh, but 0.5 at (queries back, keys right) of head 0."""
    options = {"mixer": "mta", "c_q": 3, "c_k": 5, "kq": True}
    model: RecollectForCausalLM = model_of(options, "attention")
    with torch.no_grad():
        for name in ("kq_pre", "kq_post"):
            kernel = model.model.layers[0].mixer.get_parameter(name)
            kernel.zero_()
            kernel[:, -1, 2] = 1.0
        for name in ("head_pre", "head_post"):
            model.model.layers[0].mixer.get_parameter(name).copy_(torch.eye(2))
        for back, right in entries:
            model.model.layers[0].mixer.get_parameter("kq_pre")[0, -1 - back, 2 + right] = 0.5
    model.save_pretrained(folder)
    return folder


def test_shares_are_of_a_models_own_kernels(tmp_path: Path) -> None:
    """Prevents counts over all models together, kinds that are mixed up, and kernels of the wrong layer."""
    models = [learned(saved(tmp_path / "a")), learned(saved(tmp_path / "b", (1, -1), (2, -2)))]
    assert {one.layer for model in models for one in model} == {0}
    found = shares(models)
    assert found["kq_pre"] == {"identity": [1.0, 0.5], "diagonal": [0.0, 0.5]}
    assert found["kq_post"] == {"identity": [1.0, 1.0]}
    assert found["head_pre"] == {"identity": [1.0, 1.0]}


def test_a_model_without_kernels_has_no_share(tmp_path: Path) -> None:
    """Prevents a share of nothing from being shown as zero."""
    assert shares([[], learned(saved(tmp_path))])["kq_pre"] == {"identity": [None, 1.0]}
    assert shares([[]]) == {}


def test_every_kernel_is_drawn_with_its_pattern(tmp_path: Path) -> None:
    """Prevents a picture with the head mixing in it, a missing kernel, and rows turned upside down."""
    figure = draw(learned(saved(tmp_path, (1, -1), (2, -2))), "title")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title().splitlines()[1] for axes in shown] == ["diagonal", "identity", "identity", "identity"]
    assert shown[0].images[0].get_array()[0, 0] == pytest.approx(0.5)  # two queries back, two keys to the left
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["-2", "0"]


def test_columns_are_kinds_and_failed_runs_are_open(tmp_path: Path) -> None:
    """Prevents a failed run from being looked at, and two mixers' patterns in one row."""
    saved(tmp_path / "runs" / "mta", (1, -1), (2, -2))

    def run(seed: int, status: str) -> Run:
        return Run(label="mta", seed=seed, steps=1, points=(), status=status, reason="", folder=tmp_path / "runs" / "mta")  # type: ignore[arg-type]

    columns, pictures, _ = looked(Looking(of="error", head="toy"), {"MTA": [run(0, "finished"), run(1, "failed")]}, tmp_path)
    assert columns[0].head == "toy: kernels before"
    assert columns[0].cells == {"identity": [0.5, None], "diagonal": [0.5, None]}
    assert [path.name for path in pictures] == ["MTA-seed0.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    two = {"MTA": [run(0, "finished")], "other": [run(0, "finished")]}
    assert set(looked(Looking(of="error", head="toy"), two, tmp_path)[0][1].cells) == {
        "MTA: identity",
        "other: identity",
    }
