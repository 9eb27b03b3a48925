"""Data: fixed where they must be fixed, different where they must differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recollect.comparison.workload import Workload, make_workload


def workloads(folder: Path) -> list[Workload]:
    (folder / "a.txt").write_text("To be, or not to be, that is the question. " * 50)
    return [
        make_workload("find-block", {"n_blocks": 3}),
        make_workload("recall", {}),
        make_workload("text", {"seq_len": 16, "holdout": 0.2}, {"paths": [str(folder)]}),
    ]


def test_training_data_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """The same for every mixer, other ones for every seed and step."""
    for workload in workloads(tmp_path):
        first = workload.train_batch(4, run_seed=0, step=0).inputs
        assert first.shape == (4, workload.length)
        assert torch.equal(first, workload.train_batch(4, run_seed=0, step=0).inputs)
        assert not torch.equal(first, workload.train_batch(4, run_seed=0, step=1).inputs)
        assert not torch.equal(first, workload.train_batch(4, run_seed=1, step=0).inputs)
        assert int(first.max()) < workload.vocab_size


def test_held_out_examples_do_not_depend_on_how_many_are_asked(tmp_path: Path) -> None:
    """The points of a learning curve and its end are measured on the same examples (of a task: the first ones)."""
    for workload in workloads(tmp_path)[:2]:
        few = torch.cat([batch.inputs for batch in workload.held_out(5, batch_size=4)])
        many = torch.cat([batch.inputs for batch in workload.held_out(10, batch_size=4)])
        assert len(few) == 5
        assert torch.equal(many[:5], few)


def test_text_counts_held_out_windows(tmp_path: Path) -> None:
    text = workloads(tmp_path)[2]
    assert sum(len(batch.inputs) for batch in text.held_out(7, batch_size=4)) == 7
    assert text.fingerprint


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("tekst", {}, "did you mean 'text'"),
        ("text", {"seqlen": 3}, "did you mean 'seq_len'"),
        ("find-block", {"n_letters": "x"}, "n_letters must be an integer"),
    ],
)
def test_unknown_names_are_refused(task: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_workload(task, options, {"paths": ["x"]})
