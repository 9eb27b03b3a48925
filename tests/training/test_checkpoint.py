"""A checkpoint is whole or it is not there, and gives back every bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.training import checkpoint
from recollect.training.checkpoint import Progress, Run, Saving, load_checkpoint, save_checkpoint
from recollect.training.config import TrainingConfig
from recollect.training.loop import Drawn, update
from recollect.training.optimiser import make_optimisers
from recollect.training.parallel import Scored
from tests.training.tiny import CONFIG, batch_at, bits, tiny_model


def fresh(*, seed: int = 0, fingerprint: str = "a", config: TrainingConfig = CONFIG) -> Run:
    model = tiny_model(seed=seed)
    return Run(model, make_optimisers(model, config), fingerprint)


def advance(run: Run, steps: range, config: TrainingConfig = CONFIG) -> Run:
    for step in steps:
        update(Scored(run.model), run.optimisers, Drawn(batch_at).pieces(step), config, step)
    return run


def trained(steps: int) -> Run:
    return advance(fresh(), range(steps))


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_checkpoint_restores_weights_moments_random_state_and_progress(tmp_path: Path, optimiser: str) -> None:
    """Whatever is missing makes the next step differ."""
    config = dataclasses.replace(CONFIG, optimiser=optimiser)
    run = advance(fresh(config=config), range(2), config)
    run.data = {"rows": [3, 4]}
    save_checkpoint(run, Progress(2, 1.5, 99), Saving(tmp_path))
    next_random = torch.rand(3)

    other = fresh(seed=5, config=config)
    progress, skipped = load_checkpoint(other, tmp_path)
    assert progress == Progress(2, 1.5, 99)
    assert skipped == []
    assert other.data == {"rows": [3, 4]}
    assert bits(other.model) == bits(run.model)
    assert torch.equal(torch.rand(3), next_random)
    names = {p: name for name, p in (*run.model.named_parameters(), *other.model.named_parameters())}
    old, new = ({names[p]: state for p, state in r.optimisers.states().items()} for r in (run, other))
    assert old.keys() == new.keys()
    for name, moments in old.items():
        assert all(torch.equal(tensor, new[name][key]) for key, tensor in moments.items())
    for r in (run, other):
        torch.manual_seed(0)
        advance(r, range(2, 4), config)
    assert bits(other.model) == bits(run.model)


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    """A long run must not fill the disk, nor must what a kill left behind."""
    run = trained(1)
    (tmp_path / ".step-00000002").mkdir()
    for step in (1, 2, 3, 10):
        save_checkpoint(run, Progress(step), Saving(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_the_best_stay_besides(tmp_path: Path) -> None:
    """The lowest validation loss is what one came for; a checkpoint without one is no rival."""
    run = trained(1)
    saving = Saving(tmp_path, keep_last=1, keep_best=2)
    for step, loss in enumerate((3.0, 1.0, None, 2.0, math.nan, 4.0)):
        save_checkpoint(run, Progress(step), saving, loss=loss)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (1, 3, 5)]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "json"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, damage: str) -> None:
    """Training on from half a file would give a wrong result without a word."""
    run = trained(1)
    save_checkpoint(run, Progress(1), Saving(tmp_path))
    advance(run, range(1, 2))
    newest = save_checkpoint(run, Progress(2), Saving(tmp_path))
    (weights,) = (newest / "model").iterdir()
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        shutil.rmtree(newest / "optimiser")
    else:
        (newest / "state.json").write_text("{")
    progress, skipped = load_checkpoint(fresh(), tmp_path)
    assert progress is not None
    assert progress.step == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_a_checkpoint_of_another_run_is_not_loaded(tmp_path: Path) -> None:
    """Same shapes, other recipe: only the fingerprint tells."""
    run = trained(1)
    save_checkpoint(run, Progress(1), Saving(tmp_path))
    before = bits(run.model)
    run.fingerprint = "b"
    with pytest.raises(ValueError, match="another configuration"):
        load_checkpoint(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert bits(run.model) == before


def test_a_checkpoint_of_another_model_is_not_loaded(tmp_path: Path) -> None:
    """A wider model with the same names would be filled in part."""
    save_checkpoint(trained(1), Progress(1), Saving(tmp_path))
    model = RecollectForCausalLM(RecollectConfig(vocab_size=32, hidden_size=32, layers=["mta", "mta"]))
    before = bits(model)
    with pytest.raises(ValueError, match="another version"):
        load_checkpoint(Run(model, make_optimisers(model, CONFIG), "a"), tmp_path)
    assert bits(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("unreadable", ["state.json", "model"])
def test_a_disk_that_cannot_be_read_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str) -> None:
    """A cable that hangs loose is no damage: going on from an older checkpoint, or from none, would throw hours away."""
    save_checkpoint(trained(1), Progress(1), Saving(tmp_path))

    def failing(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def read_or_fail(path: Path) -> Any:
            if unreadable in path.parts:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return read(path)

        return read_or_fail

    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
    monkeypatch.setattr(checkpoint, "_hash", failing(checkpoint._hash))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        load_checkpoint(fresh(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("place", ["tensors", "state.json"])
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Running out of space in the middle of a file leaves no half checkpoint behind."""
    run = trained(1)
    save_checkpoint(run, Progress(1), Saving(tmp_path))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "tensors":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, Progress(2), Saving(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A checkpoint from a stranger must not be able to run code."""
    folder = save_checkpoint(trained(1), Progress(1), Saving(tmp_path))
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    assert set(json.loads((folder / "state.json").read_text())["sha256"]) == files - {"state.json"}
