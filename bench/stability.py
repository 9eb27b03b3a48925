"""A long stream through Moneta, Yaad and Memora: is everything finite, and do the memories stay bounded?

    python -m bench.stability --text FILE [--tokens 65536] [--figure FILE.png]

A model of two layers of width 64 as it is initialised reads random bytes and the text, in pieces, its state carried on; in fp32 and
bf16. Reported: the root mean square of the weights of each layer's memory, over that of the initial memory, after every piece.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from recollect.mixers.miras import Miras
from recollect.models import RecollectCache, RecollectConfig, RecollectForCausalLM
from recollect.models.cache import cache_of

MODELS, PIECE = ("moneta", "yaad", "memora"), 2048


class Course(NamedTuple):
    """One run: growth of the memory's weights after every piece, the largest logit, whether everything was finite."""

    growth: list[float]
    largest: float
    finite: bool


def weights(mixer: Miras, cache: RecollectCache, layer: int) -> Tensor:
    """Root mean square of the memory's weights, 0-dim."""
    state = cache.states[layer].memory
    linked = [mixer.spec.retention.link(z, initial) for z, initial in zip(state.dual, mixer.fast, strict=True)]
    return torch.cat([w.double().flatten() for w in linked]).square().mean().sqrt()


@torch.no_grad()
def stream(name: str, tokens: Tensor, dtype: torch.dtype) -> Course:
    """Read `tokens` [T] in pieces."""
    torch.manual_seed(0)
    config = RecollectConfig(vocab_size=257, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, layers=name)
    model = RecollectForCausalLM(config).to(dtype).eval()
    mixers = [block.mixer for block in model.model.layers]
    cache, first, growth, largest, finite = None, None, [], 0.0, True
    for piece in tokens.split(PIECE):
        out = model(piece[None], cache=cache, use_cache=True)
        cache = cache_of(out)
        size = torch.stack([weights(mixer, cache, layer) for layer, mixer in enumerate(mixers)]).mean()
        first = size if first is None else first
        growth.append(float(size / first))
        largest = max(largest, float(out.logits.abs().max()))
        finite = finite and bool(out.logits.isfinite().all()) and bool(size.isfinite())
    return Course(growth, largest, finite)


def draw(courses: dict[str, Course], path: Path) -> None:
    """Growth over tokens, one line per run."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for label, course in courses.items():
        axes.plot(np.arange(1, len(course.growth) + 1) * PIECE, course.growth, label=label)
    axes.set(xlabel="tokens", ylabel="rms of the memory's weights / after the first piece", yscale="log")
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a plain text of at least --tokens bytes")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--figure", type=Path, help="also draw the growth to this file")
    arguments = parser.parse_args()
    raw = arguments.text.read_bytes()[: arguments.tokens]
    if len(raw) < arguments.tokens:
        parser.error(f"{arguments.text} has {len(raw)} bytes; --tokens asks for {arguments.tokens}")
    streams = {
        "random": torch.randint(256, (arguments.tokens,), generator=torch.Generator().manual_seed(0)),
        "text": torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).astype(np.int64)),
    }
    courses = {}
    print("| model | stream | dtype | finite | weights: last / first | largest / first | smallest / first | largest logit |")
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for kind, tokens in streams.items():
            for dtype in (torch.float32, torch.bfloat16):
                course = stream(name, tokens, dtype)
                short = str(dtype).removeprefix("torch.")
                courses[f"{name}, {kind}, {short}"] = course
                growth = course.growth
                print(
                    f"| {name} | {kind} | {short} | {'yes' if course.finite else 'NO'} | {growth[-1]:.2f} | {max(growth):.2f} "
                    f"| {min(growth):.2f} | {course.largest:.1f} |",
                    flush=True,
                )
    if arguments.figure:
        draw(courses, arguments.figure)


if __name__ == "__main__":
    main()
