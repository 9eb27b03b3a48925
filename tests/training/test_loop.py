"""The loop: an interrupted run ends with the bits of an uninterrupted one; divergence stops with evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from recollect.evaluation.metrics import score
from recollect.training.checkpoint import Saving
from recollect.training.loop import Drawn, NonFiniteLoss, train
from recollect.training.reports import describe
from tests.training.tiny import CONFIG, TASK, batch_at, bits, tiny_model


def evaluate(model: PreTrainedModel, *, final: bool) -> Mapping[str, float]:
    result = score(model, [TASK.sample(16, seed=1)], TASK.correct)
    return {"loss": result.loss, "error": result.error}


def stop_after(n: int) -> Any:
    """A `should_stop` that says yes when it is asked for the n-th time."""
    asked = iter([False] * n)
    return lambda: next(asked, True)


def evaluations(events: list[dict[str, Any]]) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events if event["event"] == "evaluation"}


@pytest.mark.parametrize("stops", [(1,), (5,), (3, 4, 1)])
def test_resumed_run_equals_uninterrupted_run_bit_by_bit(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Catches a lost moment, a lost random state (dropout is on), a batch drawn twice, a shifted schedule."""
    whole, events = tiny_model(), list[dict[str, Any]]()
    train(whole, CONFIG, data=Drawn(batch_at), evaluate=evaluate, eval_every=4, report=events.append)
    pieces = list[dict[str, Any]]()
    for stop in (*stops, None):
        model = tiny_model()
        progress = train(
            model,
            CONFIG,
            data=Drawn(batch_at),
            evaluate=evaluate,
            eval_every=4,
            report=pieces.append,
            saving=Saving(tmp_path),
            should_stop=stop_after(stop) if stop else lambda: False,
        )
    assert progress.step == CONFIG.steps
    assert bits(model) == bits(whole)
    assert evaluations(pieces) == evaluations(events)
    assert sorted(evaluations(events)) == [0, 4, 8, 12]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    """Starting it again loads the end and does nothing."""
    model = tiny_model()
    train(model, CONFIG, data=Drawn(batch_at), saving=Saving(tmp_path))
    again = tiny_model(seed=3)

    def no_data(step: int) -> Any:
        raise AssertionError("no batch may be asked for")

    assert train(again, CONFIG, data=Drawn(no_data), saving=Saving(tmp_path)).step == CONFIG.steps
    assert bits(again) == bits(model)


def test_evaluation_changes_nothing() -> None:
    """Evaluating draws no random numbers and leaves training mode as it was."""
    never = tiny_model()
    train(never, CONFIG, data=Drawn(batch_at))
    often = tiny_model()
    train(often, CONFIG, data=Drawn(batch_at), evaluate=evaluate, eval_every=1)
    assert bits(often) == bits(never)


def test_dropout_is_off_in_evaluation() -> None:
    """The released code of the paper's task evaluated with dropout on."""
    seen = []

    def look(model: PreTrainedModel, *, final: bool) -> Mapping[str, float]:
        seen.append(model.training)
        return {}

    train(tiny_model(), CONFIG, data=Drawn(batch_at), evaluate=look, eval_every=6)
    assert seen == [False] * 3


def test_divergence_stops_with_evidence(tmp_path: Path) -> None:
    """A run whose loss is NaN would otherwise train on and be reported as merely bad; no checkpoint of it may stay."""
    config = dataclasses.replace(CONFIG, lr=1e30, warmup=0, clip=0, schedule="constant", weight_decay=0)
    with pytest.raises(NonFiniteLoss, match=r"diverged at step \d+ of 12: loss .*gradient norm .*learning rate 1e\+30"):
        train(tiny_model(), config, data=Drawn(batch_at), saving=Saving(tmp_path, 1e9))
    assert not list(tmp_path.glob("step-*"))


def test_training_learns() -> None:
    """The loss on held-out data falls: gradient, sign and schedule are right."""
    events = list[dict[str, Any]]()
    config = dataclasses.replace(CONFIG, steps=60, lr=1e-2)
    train(tiny_model(dropout=0.0), config, data=Drawn(batch_at), evaluate=evaluate, report=events.append)
    losses = evaluations(events)
    assert losses[60] < losses[0] - 0.5


def test_the_forms_of_the_ops_are_told_once() -> None:
    """Prevents a record that does not say which kernels a run took: of its first step here, told once."""
    events = list[dict[str, Any]]()
    train(tiny_model(), dataclasses.replace(CONFIG, steps=2), data=Drawn(batch_at), report=events.append)
    (told,) = (event for event in events if event["event"] == "forms")
    assert told["forms"] in (["multi_token_attention: native"], ["multi_token_attention: blocked"])
    assert describe(told, 2) == f"forms on this device: {told['forms'][0]}"
