"""A memory you can keep: read a book, save what the model remembers, load it in another process, and see what it is worth.

    python examples/keep_a_memory.py book.txt

The script trains a tiny byte-level model on the first half of the book (or takes one, --model), lets it read the second half, and
saves its memory at several places. A second process loads model and memories and reads passages again: without a memory, with the
memory of the place that they stand before, and, as a control, with the memory of another place. The numbers are bits per byte, with
the standard error over passages; lower is better.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.inference.text_model import load_text_model
from recollect.mixers import entry
from recollect.mixers.miras import Miras
from recollect.models import RecollectCache, RecollectConfig, RecollectForCausalLM, load_memory, remember, save_memory
from recollect.tasks import stream_seed
from recollect.training.config import TrainingConfig
from recollect.training.optimiser import Optimisers, make_optimisers
from recollect.training.schedule import learning_rate

WINDOW, N_STREAMS = 64, 64  # bytes of a step, in rows
STREAMS = (128, 512, 2048, 8192)  # bytes over which a memory is carried, lesson by lesson
SPAN = (12, 33)  # bytes that are new or repeated at a time
UNTIL = 2.0  # bits per byte of what is repeated, with which the first lesson ends
NEW = 0.2  # weight of new text in the later lessons' loss
PASSAGE, N_PLACES, DISTANCES = 128, 16, (0, 128, 512, 1024)


def read(path: Path) -> Tensor:
    """The bytes of a text as tokens [T]."""
    return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64))


def split(book: Tensor) -> tuple[Tensor, Tensor]:
    """The half to train on and the half to remember."""
    half = len(book) // 2
    if half < STREAMS[-1] + N_PLACES * PASSAGE:
        raise SystemExit(f"the book has {len(book):,} bytes; at least {2 * (STREAMS[-1] + N_PLACES * PASSAGE):,} are needed")
    return book[:half], book[half:]


def repeating(text: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """As many bytes as `text` has, in spans, each the next piece of `text` or one that was shown before, near or far.

    Recalling what was read is what a memory is for; plain text asks for it rarely.

    Returns:
        the bytes; and which of them can be known: those of spans shown before, from the third on.
    """
    length = len(text)
    row, known = torch.empty_like(text), torch.zeros(length, dtype=torch.bool)
    at = place = 0
    while at < length:
        size = min(int(draw.integers(*SPAN)), length - at)
        if at > size and draw.random() < 0.5:
            back = int(size * (at / size) ** draw.random())
            row[at : at + size] = row[at - back : at - back + size]
            known[at + 2 : at + size] = True
        else:
            row[at : at + size] = text[place : place + size]
            place += size
        at += size
    return row, known


def shuffled(length: int, draw: np.random.Generator) -> Tensor:
    """The printable characters in random order, again and again: every byte says which one follows, and nothing else does."""
    return torch.from_numpy(np.resize(draw.permutation(np.arange(32, 127)), length))


def extract(text: Tensor, length: int, draw: np.random.Generator) -> Tensor:
    """A stretch of the text."""
    start = int(draw.integers(len(text) - length))
    return text[start : start + length]


def make_model(text: Tensor, arguments: argparse.Namespace) -> RecollectForCausalLM:
    """Train a tiny model: first to repeat, where nothing else can be learned, then on text that repeats itself."""
    torch.manual_seed(arguments.seed)
    config = RecollectConfig(
        hidden_size=arguments.width, num_hidden_layers=2, num_attention_heads=2, layers=arguments.mixer, mlp=False
    )
    for layer in config.layers:
        if entry(layer["mixer"]).cls is Miras:
            layer["rope_theta"] = None  # the book is longer than the positions of training, where these memories go astray
    model = RecollectForCausalLM(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"training {arguments.mixer}, {n_parameters:,} parameters", flush=True)
    options = {"batch_size": N_STREAMS, "lr": arguments.lr, "weight_decay": 0.1}
    recipe = TrainingConfig(steps=arguments.first_steps, schedule="constant", warmup=100, **options)
    optimisers = make_optimisers(model, recipe)
    print(f"shuffled characters, streams of {WINDOW}")
    lesson(model, optimisers, recipe, shuffled, WINDOW, new=0.0, until=UNTIL)
    for length in STREAMS:
        last = length == STREAMS[-1]
        recipe = TrainingConfig(
            steps=arguments.steps, schedule="cosine" if last else "constant", warmup=0, end_lr=0.05, **options
        )
        print(f"text, streams of {length:,}")
        lesson(model, optimisers, recipe, functools.partial(extract, text), length, new=NEW)
    return model.eval()


def lesson(
    model: RecollectForCausalLM,
    optimisers: Optimisers,
    recipe: TrainingConfig,
    source: Callable[[int, np.random.Generator], Tensor],
    length: int,
    *,
    new: float,
    until: float = 0.0,
) -> None:
    """Train on streams of `length` tokens, window by window: the memory goes on from one to the next, the gradient does not.

    Args:
        source: (tokens, random numbers) -> text that repetitions are put into.
        new: weight of new text in the loss; what is repeated has 1.
        until: stop early once what is repeated costs fewer bits per byte.
    """
    losses: list[tuple[float, float]] = []
    windows: list[tuple[Tensor, Tensor]] = []
    for step in range(recipe.steps):
        if not windows:
            draw = np.random.default_rng(stream_seed("train", step))
            streams = [repeating(source(length + 1, draw), draw) for _ in range(N_STREAMS)]
            tokens, known = (torch.stack(parts) for parts in zip(*streams, strict=True))
            starts = range(0, length, WINDOW)
            windows = [(tokens[:, t : t + WINDOW + 1], known[:, t + 1 : t + WINDOW + 1]) for t in starts]
            cache = RecollectCache([None] * model.config.num_hidden_layers)
        piece, is_known = windows.pop(0)
        logits = model(piece[:, :-1], cache=cache).logits
        each = F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="none").view_as(is_known)
        weight = torch.where(is_known, 1.0, new)
        optimisers.set_rate(learning_rate(recipe, step))
        optimisers.zero_grad()
        ((each * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimisers.step()
        cache.detach()
        losses.append((each[~is_known].mean().item(), each[is_known].mean().item()))
        if (step + 1) % 50 == 0:
            fresh, repeated = (mean(list(column)) / math.log(2) for column in zip(*losses, strict=True))
            print(f"  step {step + 1}: new {fresh:.2f}, repeated {repeated:.2f} bits per byte", flush=True)
            if repeated < until:
                return
            losses.clear()


def write(arguments: argparse.Namespace) -> None:
    """Train or load, read, save what is remembered at N_PLACES places, and leave the rest to another process."""
    train_on, remembered = split(read(arguments.book))
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    model = load_text_model(arguments.model).model if arguments.model else make_model(train_on, arguments)
    model.save_pretrained(arguments.out / "model")
    print(f"model ready after {time.perf_counter() - begun:.0f} s")
    begun, cache = time.perf_counter(), None
    for place, text in enumerate(remembered.tensor_split(N_PLACES)):
        cache, report = remember(model, text, cache)
        save_memory(model, cache, arguments.out / f"memory-{place}.safetensors")
    print(
        f"read {len(remembered):,} bytes in {time.perf_counter() - begun:.0f} s; the memory takes {report.state_bytes:,} bytes"
    )
    script = [sys.executable, __file__, str(arguments.book), "--out", str(arguments.out), "--recall"]
    subprocess.run(script, check=True)


def recall(arguments: argparse.Namespace) -> None:
    """In a process that has read nothing: load model and memories, and read passages again."""
    _, remembered = split(read(arguments.book))
    model = load_text_model(arguments.out / "model").model
    memories = [load_memory(model, arguments.out / f"memory-{place}.safetensors") for place in range(N_PLACES)]
    ends = np.cumsum([len(text) for text in remembered.tensor_split(N_PLACES)]).tolist()
    kinds = ("no memory", "other memory", "memory", "difference")
    print(f"\n{f'{N_PLACES} passages of {PASSAGE} bytes, read':34}" + "".join(f"{kind:>17}" for kind in kinds))
    rows = []
    for distance in DISTANCES:
        losses: dict[str, list[float]] = {kind: [] for kind in kinds}
        for place, end in enumerate(ends):
            passage = remembered[end - distance - PASSAGE : end - distance]
            for kind, memory in zip(kinds, (None, memories[place - N_PLACES // 2], memories[place]), strict=False):
                losses[kind].append(bits(model, passage, memory))
            losses["difference"].append(losses["memory"][-1] - losses["other memory"][-1])
        print(
            f"{f'{distance:,} bytes before its end':34}"
            + "".join(f"{f'{mean(values):.3f} ± {error(values):.3f}':>17}" for values in losses.values())
        )
        rows.append({"distance": distance, **{kind: mean(values) for kind, values in losses.items()}})
    print("difference: memory minus other memory")
    (arguments.out / "result.json").write_text(json.dumps(rows, indent=1) + "\n")


def bits(model: RecollectForCausalLM, text: Tensor, cache: RecollectCache | None) -> float:
    """Bits per byte of a passage; every memory is asked anew."""
    return remember(model, text, cache)[1].loss / math.log(2)


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path, help="a plain text of 100 KB or more")
    parser.add_argument("--model", type=Path, help="a byte-level model to use instead of training one")
    parser.add_argument("--mixer", default="yaad", help="mixer or pattern of layers of the model to train")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--first-steps", type=int, default=2000, help="at most, of the lesson on shuffled characters")
    parser.add_argument("--steps", type=int, default=300, help="of each lesson on text")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kept_memory"))
    parser.add_argument("--recall", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (recall if arguments.recall else write)(arguments)


if __name__ == "__main__":
    main()
