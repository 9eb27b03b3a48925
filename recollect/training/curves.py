"""The picture of a training run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from recollect.training.checkpoint import replace_file
from recollect.training.journal import Event


def draw_curves(events: Sequence[Event], path: Path, *, title: str) -> None:
    """Training and validation loss, gradient norm, learning rate and speed over the steps, as a PNG; written whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [event for event in events if event.get("event") == "step"]
    evaluations = [event for event in events if event.get("event") == "evaluation" and event.get("loss") is not None]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    at = [event["step"] for event in steps]
    loss, norm, rate, speed = axes.flat
    loss.plot(at, [event["loss"] for event in steps], color="#9db7d5", label="training")
    loss.plot(
        [e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o-", ms=3, color="#1f4e79", label="validation"
    )
    loss.set_ylabel("loss, nats per token")
    loss.legend(frameon=False)
    for axis, key, label in (
        (norm, "grad_norm", "gradient norm"),
        (rate, "lr", "learning rate"),
        (speed, "tokens_per_second", "tokens per second"),
    ):
        axis.plot(at, [event.get(key) for event in steps], color="#1f4e79")
        axis.set_ylabel(label)
    norm.set_yscale("log")
    speed.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    replace_file(path, picture.getvalue())
