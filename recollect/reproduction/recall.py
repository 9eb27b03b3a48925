"""What a state can hold: recall against the size of the state, which Zoology and both papers' baselines are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recollect.reproduction.experiment import Experiment, Plotting, Published, Stage, Training

NAMES = {
    "attention": "Transformer",
    "sliding_window:window=16": "sliding window, 16",
    "mta": "MTA",
    "retnet": "RetNet",
    "gla": "GLA",
    "mamba2": "Mamba2",
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "rwkv7": "RWKV-7",
    "yaad": "Yaad",
    "moneta": "Moneta",
    "memora": "Memora",
}

_ZOOLOGY = "Zoology: 64 to 1024 tokens, 4 to 256 pairs, 32 epochs of 180,000 texts."


def _widths(widths: Sequence[int], mixers: Sequence[str], n_pairs: int, length: int, budget: str) -> tuple[Stage, ...]:
    def training(width: int) -> Training:
        request: dict[str, Any] = {
            "task": "recall",
            "task_options": {"length": length, "n_pairs": n_pairs},
            "mixers": list(mixers),
            "width": width,
            "heads": max(1, width // 32),
            "budget": budget,
        }
        return Training(column=f"width {width} error", request=request, names=NAMES)

    return (*map(training, widths), Plotting(of=tuple(f"width {width} error" for width in widths)))


RECALL = Experiment(
    name="recall-state",
    about="Multi-query associative recall against the bytes of state (Zoology's figure; arXiv 2312.04927)",
    published=(
        Published(
            title="hazyresearch/zoology, README: accuracy at about 17, 67 and 130 thousand numbers of state; two layers, 32 epochs",
            columns=("17K", "67K", "130K"),
            rows={
                "Transformer": (1.0, 1.0, 1.0),
                "sliding window": (None, 0.51, 0.66),
                "GLA": (0.77, 0.95, None),
                "Mamba2": (0.69, 0.80, 0.84),
                "DeltaNet": (0.96, None, 0.995),
                "Gated DeltaNet": (0.89, 0.99, None),
                "RWKV-7": (0.82, None, 0.915),
            },
            note=(
                "Accuracies: one less the error. Read from a picture, to 0.01, at the nearest size; a mean over texts of 64 to 1024 "
                "tokens with 4 to 256 pairs."
            ),
        ),
    ),
    tiny=_widths((32, 64), ("attention", "sliding_window:window=16", "mamba2", "gated_delta_net", "yaad"), 4, 64, "1500steps"),
    small=_widths((32, 64, 128), tuple(NAMES), 16, 256, "3000steps"),
    paper=tuple(
        f"recollect compare recall --mixers {','.join(NAMES)} --seeds 3 --budget 16000steps --batch-size 256 --width {width} "
        f"--heads {max(1, width // 64)} -t length=256 -t n_pairs=16 -t vocab_size=8192 --device cuda --out recall-{width}"
        for width in (64, 128, 256)
    ),
    size={
        "tiny": f"texts of 64 tokens with 4 pairs, 1500 steps of 64; {_ZOOLOGY}",
        "small": f"texts of 256 tokens with 16 pairs, 3000 steps of 64; {_ZOOLOGY}",
    },
)

EXPERIMENTS = (RECALL,)
