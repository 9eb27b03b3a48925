"""What `recollect compare TASK` does when nothing else is said: one entry per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """Sizes, recipe and budget of one task.

    Attributes:
        mixers: who is compared.
        task_options: fields of the task (of the text stream: `seq_len`, `holdout`).
        mixer_options: task options -> options per mixer name; what the user writes after the mixer's name wins.
        layers, width, heads: of the model; None for `intermediate` is the model's own rule (about 8/3 of the width).
        batch_size, lr, schedule, warmup, end_lr, weight_decay, dropout: recipe.
        budget: as on the command line.
        n_evaluations: points of the learning curve; evaluations come every steps / n_evaluations steps.
        n_eval: held-out examples of the last evaluation; n_eval_curve: of the earlier ones (the first of the same examples).
    """

    mixers: tuple[str, ...] = ("attention", "talking_heads", "diff", "mta")
    task_options: Options = dataclasses.field(default_factory=dict)
    mixer_options: Callable[[Options], Mapping[str, Options]] = lambda task_options: {}
    layers: int
    width: int
    heads: int
    intermediate: int | None = None
    mlp: bool = True
    batch_size: int
    lr: float
    schedule: str = "cosine"
    warmup: float = 0.02
    end_lr: float = 0.0
    weight_decay: float = 0.0
    dropout: float = 0.0
    budget: str
    n_evaluations: int = 20
    n_eval: int
    n_eval_curve: int


def _find_block_kernels(task: Options) -> dict[str, Options]:
    """Multi-Token Attention for this task: key-query convolutions in every layer (the models are shallow), as wide as a block.

    `mta` is the paper's second version with kernels that reach a block's length to either side, 6 x 11 for blocks of five; `mta_toy`
    is the paper's own module for the task: one L x (2N - 1) convolution before the softmax and nothing else.
    """
    n_question, n_letters = int(task["n_question"]), int(task["n_letters"])
    wide = {"kq": True, "c_k": 2 * n_letters + 1}
    return {"mta": wide, "mta_v1": wide, "mta_v2": wide, "mta_toy": {"c_q": n_question, "c_k": 2 * n_letters - 1}}


_WRITTEN = Defaults(  # tasks in text, byte by byte
    layers=2,
    width=64,
    heads=2,
    batch_size=32,
    lr=3e-3,
    warmup=0.05,
    budget="1000steps",
    n_eval=500,
    n_eval_curve=100,
)

DEFAULTS: dict[str, Defaults] = {
    "ruler": dataclasses.replace(_WRITTEN, task_options={"length": 768, "shortest": 448, "answer_tokens": 40}),
    "needles": dataclasses.replace(_WRITTEN, task_options={"length": 384, "shortest": 256, "start": "random"}),
    "babilong": dataclasses.replace(
        _WRITTEN, task_options={"instruction": False, "examples": False, "answer_format": False, "answer_tokens": 20}
    ),
    "kinship": dataclasses.replace(_WRITTEN, task_options={"instruction": False, "k_max": 3}),
    "find-block": Defaults(
        task_options={"n_blocks": 6, "n_letters": 5, "n_question": 2},
        mixer_options=_find_block_kernels,
        layers=3,
        width=64,
        heads=2,
        intermediate=128,
        batch_size=64,
        lr=1e-2,
        warmup=0.05,
        budget="1000steps",
        n_eval=2000,
        n_eval_curve=250,
    ),
    "recall": Defaults(  # mixers only, as is usual for it: with SwiGLUs, learning to recall takes several times as many steps
        layers=2,
        width=64,
        heads=2,
        mlp=False,
        batch_size=64,
        lr=3e-3,
        budget="1500steps",
        n_eval=2000,
        n_eval_curve=500,
    ),
    "text": Defaults(
        task_options={"seq_len": 256, "holdout": 0.1},
        layers=4,
        width=128,
        heads=4,
        batch_size=8,
        lr=3e-3,
        warmup=0.05,
        end_lr=0.05,
        weight_decay=0.1,
        budget="400steps",
        n_evaluations=10,
        n_eval=512,
        n_eval_curve=64,
    ),
}


def defaults_of(task: str) -> Defaults:
    """Defaults of a task; a task that has no entry of its own (a user's) gets those of `recall`."""
    return DEFAULTS.get(task, DEFAULTS["recall"])
