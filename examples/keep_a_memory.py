"""A memory you can keep: read a book, save what the model remembers, load it in another process, and see what it is worth.

    python examples/keep_a_memory.py book.txt

The script trains a tiny byte-level model on the first half of the book (or takes a model of `recollect compare text`, --model), lets
it read the second half, and saves its memory. A second process loads model and memory and reads again passages of the second half,
at several distances before its end, once with the memory and once without. As controls: passages with the memory of another stretch
of the book (of the same length, so that only what was read differs), and the last stretch of the book, which nobody has read, with
the memory. The numbers are bits per byte, with the standard error over passages; lower is better.
"""

from __future__ import annotations

import argparse
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

PASSAGE = 256
WINDOW, STREAM, N_STREAMS, SPAN = 64, 16_384, 64, (12, 33)
FIRST_STEPS, UNTIL, NEW = 2000, 2.0, 0.2
N_PASSAGES = 16
DISTANCES = (0, 1_000, 4_000, 16_000)


def read(path: Path) -> Tensor:
    """The bytes of a text as tokens [T]."""
    return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64))


def split(book: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """To train on; to remember; as long, for the control; never read. The control is the end of what was trained on."""
    n_unread = (N_PASSAGES + 1) * PASSAGE
    half = (len(book) - n_unread) // 2
    if half < DISTANCES[-1] + N_PASSAGES * PASSAGE:
        needed = 2 * (DISTANCES[-1] + N_PASSAGES * PASSAGE) + n_unread
        raise SystemExit(f"the book has {len(book):,} bytes; at least {needed:,} are needed")
    train_on, remembered, unread = book[:half], book[half:-n_unread], book[-n_unread:]
    remembered = remembered[:half]
    return train_on, remembered, train_on[-len(remembered) :], unread


def repeating(text: Tensor, length: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`length` bytes in spans, each either the next piece of `text` or one that was shown before, near or far; and which bytes are
    of the second kind and can be known to be (from the third of a span on).

    Recalling what was read is what a memory is for; plain text asks for it rarely.
    """
    row, known = torch.empty(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
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


def shuffled(draw: np.random.Generator) -> Tensor:
    """The printable characters in random order, twice: every byte says which one follows, and nothing else does."""
    return torch.from_numpy(draw.permutation(np.arange(32, 127))).repeat(2)


def extract(text: Tensor, draw: np.random.Generator) -> Tensor:
    """A stretch of the text that is long enough for a stream."""
    start = int(draw.integers(len(text) - STREAM))
    return text[start : start + STREAM]


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
    first = TrainingConfig(steps=FIRST_STEPS, schedule="constant", warmup=100, **options)
    then = TrainingConfig(steps=arguments.steps, schedule="cosine", warmup=0, end_lr=0.05, **options)
    optimisers = make_optimisers(model, first)
    lesson(model, optimisers, first, lambda draw: repeating(shuffled(draw), WINDOW + 1, draw), new=0.0, until=UNTIL)
    lesson(model, optimisers, then, lambda draw: repeating(extract(text, draw), STREAM + 1, draw), new=NEW)
    return model.eval()


def lesson(
    model: RecollectForCausalLM,
    optimisers: Optimisers,
    recipe: TrainingConfig,
    stream: Callable[[np.random.Generator], tuple[Tensor, Tensor]],
    *,
    new: float,
    until: float = 0.0,
) -> None:
    """Train on streams, window by window: the memory goes on from one to the next, the gradient does not.

    Args:
        new: weight of new text in the loss; what is repeated has 1.
        until: stop early once what is repeated costs fewer bits per byte.
    """
    losses: list[tuple[float, float]] = []
    windows: list[tuple[Tensor, Tensor]] = []
    for step in range(recipe.steps):
        if not windows:
            draw = np.random.default_rng(stream_seed("train", new > 0, step))
            tokens, known = (torch.stack(parts) for parts in zip(*(stream(draw) for _ in range(N_STREAMS)), strict=True))
            starts = range(0, tokens.shape[1] - 1, WINDOW)
            windows = [(tokens[:, t : t + WINDOW + 1], known[:, t + 1 : t + WINDOW + 1]) for t in starts]
            cache = RecollectCache([None] * model.config.num_hidden_layers)
        piece, is_known = windows.pop(0)
        logits = model(piece[:, :-1], past_key_values=cache).logits
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
    """Train or load, read, save, and leave the rest to another process."""
    train_on, remembered, control, _ = split(read(arguments.book))
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    model = load_text_model(arguments.model).model if arguments.model else make_model(train_on, arguments)
    model.save_pretrained(arguments.out / "model")
    print(f"model ready after {time.perf_counter() - begun:.0f} s")
    for name, text in (("memory", remembered), ("control", control)):
        begun = time.perf_counter()
        cache, report = remember(model, text)
        save_memory(model, cache, arguments.out / f"{name}.safetensors")
        print(
            f"{name}: read {report.n_tokens:,} bytes in {time.perf_counter() - begun:.0f} s at "
            f"{report.loss / math.log(2):.3f} bits per byte; state {report.state_bytes:,} bytes"
        )
    script = [sys.executable, __file__, str(arguments.book), "--out", str(arguments.out), "--recall"]
    subprocess.run(script, check=True)


def recall(arguments: argparse.Namespace) -> None:
    """In a process that has read nothing: load model and memory, and read passages."""
    _, remembered, _, unread = split(read(arguments.book))
    model = load_text_model(arguments.out / "model").model
    memory, control = (load_memory(model, arguments.out / f"{name}.safetensors") for name in ("memory", "control"))
    sets = {f"read, {distance:,} bytes before the end": passages(remembered, distance) for distance in DISTANCES}
    sets["never read"] = unread[: N_PASSAGES * PASSAGE].split(PASSAGE)
    print(
        f"\n{'passages of ' + str(PASSAGE) + ' bytes':40}{'no memory':>16}{'other memory':>16}{'memory':>16}{'difference':>16}"
    )
    rows = []
    for name, texts in sets.items():
        losses = {
            kind: [bits(model, text, cache) for text in texts]
            for kind, cache in (("no memory", None), ("other memory", control), ("memory", memory))
        }
        gain = [after - before for after, before in zip(losses["memory"], losses["other memory"], strict=True)]
        cells = [*losses.values(), gain]
        print(f"{name:40}" + "".join(f"{f'{mean(cell):.3f} ± {error(cell):.3f}':>16}" for cell in cells))
        rows.append({"passages": name, **{kind: mean(values) for kind, values in losses.items()}, "difference": mean(gain)})
    print("difference: memory minus other memory")
    (arguments.out / "result.json").write_text(json.dumps(rows, indent=1) + "\n")


def passages(text: Tensor, distance: int) -> tuple[Tensor, ...]:
    """The N_PASSAGES passages that end `distance` bytes before the end of the text."""
    end = len(text) - distance
    return text[end - N_PASSAGES * PASSAGE : end].split(PASSAGE)


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
    parser.add_argument("--steps", type=int, default=1000, help="steps on text")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kept_memory"))
    parser.add_argument("--recall", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (recall if arguments.recall else write)(arguments)


if __name__ == "__main__":
    main()
