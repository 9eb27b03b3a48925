"""The learning rate is a pure function of the step."""

from __future__ import annotations

import dataclasses
import math

import pytest

from recollect.training.config import SCHEDULES, TrainingConfig
from recollect.training.schedule import learning_rate, warmup_steps

BASE = TrainingConfig(steps=100, batch_size=1, lr=2.0, warmup=10, end_lr=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_starts_above_zero(schedule: str) -> None:
    """A first step with learning rate zero would be a step for nothing."""
    config = dataclasses.replace(BASE, schedule=schedule)
    assert [learning_rate(config, step) for step in range(10)] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])


def test_schedules_match_their_formulas() -> None:
    """Each formula written out once more, at three steps behind the warm-up."""
    for step in (10, 55, 99):
        done = (step - 10) / 90
        expected = {
            "constant": 2.0,
            "linear": 2.0 * (0.1 + 0.9 * (1 - done)),
            "cosine": 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2),
            "wsd": 2.0 * (0.1 + 0.9 * (1.0 if done < 0.8 else (1 - done) / 0.2)),
        }
        for schedule, value in expected.items():
            assert learning_rate(dataclasses.replace(BASE, schedule=schedule), step) == pytest.approx(value, rel=1e-12)


def test_warmup_below_one_is_a_share() -> None:
    """A time budget fixes the steps late, so a warm-up must be expressible as a share."""
    assert warmup_steps(dataclasses.replace(BASE, warmup=0.05)) == 5
    assert warmup_steps(dataclasses.replace(BASE, warmup=1000)) == 100


def test_a_step_outside_the_run_is_refused() -> None:
    """Cosine would silently go up again behind the end."""
    with pytest.raises(ValueError, match="outside the run"):
        learning_rate(BASE, 100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("lr", 0.0), ("warmup", -1), ("end_lr", 2), ("clip", -1), ("beta2", 1.0), ("batch_size", 0), ("decay", 0)],
)
def test_a_bad_recipe_is_refused(field: str, value: float) -> None:
    """The message names the field and the value."""
    with pytest.raises(ValueError, match=f"must be .*; got .*{value}"):
        TrainingConfig(**{"steps": 1, "batch_size": 1, field: value})


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        TrainingConfig(steps=1, batch_size=1, schedule="cosin")
