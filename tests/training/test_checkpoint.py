"""A checkpoint is whole or it is not there, and gives back every bit."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from recollect.training import checkpoint
from recollect.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from recollect.training.loop import train_step
from recollect.training.optimiser import make_optimiser
from tests.training.tiny import CONFIG, batch_at, bits, tiny_model


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = tiny_model()
    optimiser = make_optimiser(model, CONFIG)
    for step in range(steps):
        train_step(model, optimiser, batch_at(step), CONFIG, step)
    return model, optimiser


def test_a_checkpoint_restores_weights_moments_random_state_and_progress(tmp_path: Path) -> None:
    """Whatever is missing makes the next step differ."""
    model, optimiser = trained(2)
    save_checkpoint(tmp_path, model, optimiser, Progress(2, 1.5, 99), fingerprint="a")
    next_random = torch.rand(3)

    other = tiny_model(seed=5)
    fresh = make_optimiser(other, CONFIG)
    progress, skipped = load_checkpoint(tmp_path, other, fresh, fingerprint="a")
    assert progress == Progress(2, 1.5, 99)
    assert skipped == []
    assert bits(other) == bits(model)
    assert torch.equal(torch.rand(3), next_random)
    old, new = optimiser.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys()
    for index, moments in old.items():
        assert all(torch.equal(tensor, new[index][name]) for name, tensor in moments.items())


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    """A long run must not fill the disk."""
    model, optimiser = trained(1)
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, model, optimiser, Progress(step), fingerprint="a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "json"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, damage: str) -> None:
    """Training on from half a file would give a wrong result without a word."""
    model, optimiser = trained(1)
    save_checkpoint(tmp_path, model, optimiser, Progress(1), fingerprint="a")
    train_step(model, optimiser, batch_at(1), CONFIG, 1)
    newest = save_checkpoint(tmp_path, model, optimiser, Progress(2), fingerprint="a")
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        (newest / "optimiser.safetensors").unlink()
    else:
        (newest / "state.json").write_text("{")
    progress, skipped = load_checkpoint(tmp_path, tiny_model(), make_optimiser(tiny_model(), CONFIG), fingerprint="a")
    assert progress is not None
    assert progress.step == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_a_checkpoint_of_another_run_is_not_loaded(tmp_path: Path) -> None:
    """Same shapes, other recipe: only the fingerprint tells."""
    model, optimiser = trained(1)
    save_checkpoint(tmp_path, model, optimiser, Progress(1), fingerprint="a")
    before = bits(model)
    progress, skipped = load_checkpoint(tmp_path, model, optimiser, fingerprint="b")
    assert progress is None
    assert "another configuration" in skipped[0]
    assert bits(model) == before


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of space in the middle of a file leaves no half checkpoint behind."""
    model, optimiser = trained(1)
    save_checkpoint(tmp_path, model, optimiser, Progress(1), fingerprint="a")

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, model, optimiser, Progress(2), fingerprint="a")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A checkpoint from a stranger must not be able to run code."""
    model, optimiser = trained(1)
    folder = save_checkpoint(tmp_path, model, optimiser, Progress(1), fingerprint="a")
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert set(json.loads((folder / "state.json").read_text())["sha256"]) == {"model.safetensors", "optimiser.safetensors"}
