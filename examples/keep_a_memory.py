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
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import torch
from torch import Tensor

from recollect.comparison.generation import load_byte_model
from recollect.mixers import entry
from recollect.mixers.miras import Miras
from recollect.models import RecollectCache, RecollectConfig, RecollectForCausalLM, load_memory, remember, save_memory
from recollect.tasks import Batch, stream_seed
from recollect.training.config import TrainingConfig
from recollect.training.loop import train

PASSAGE = 256
LENGTH = 256
SPAN = 96
N_PASSAGES = 16
DISTANCES = (0, 1_000, 4_000, 16_000)


def read(path: Path) -> Tensor:
    """The bytes of a text as tokens [T]."""
    return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64))


def split(book: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """To train on; to remember; as long, for the control; never read. The control is the end of what was trained on."""
    n_unread = (N_PASSAGES + 1) * PASSAGE
    half = (len(book) - n_unread) // 2
    train_on, remembered, unread = book[:half], book[half:-n_unread], book[-n_unread:]
    remembered = remembered[:half]
    return train_on, remembered, train_on[-len(remembered) :], unread


def repeating_batch(text: Tensor, n_rows: int, *, seed: int) -> Batch:
    """Rows of spans, each either new text or one that the row has shown before: what a memory is for, and plain text shows rarely."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n_rows):
        row = text[:0]
        while len(row) <= LENGTH:
            size = int(draw.integers(SPAN // 4, SPAN))
            source = row if len(row) > size and draw.random() < 0.5 else text
            start = int(draw.integers(len(source) - size))
            row = torch.cat([row, source[start : start + size]])
        rows.append(row[: LENGTH + 1])
    tokens = torch.stack(rows)
    return Batch(tokens[:, :-1], tokens[:, 1:], [{} for _ in rows])


def make_model(text: Tensor, arguments: argparse.Namespace) -> RecollectForCausalLM:
    """Train a tiny model on the text."""
    torch.manual_seed(arguments.seed)
    config = RecollectConfig(
        hidden_size=arguments.width, num_hidden_layers=2, num_attention_heads=2, layers=arguments.mixer, mlp=False
    )
    for layer in config.layers:
        if entry(layer["mixer"]).cls is Miras:
            layer["rope_theta"] = None  # the book is longer than the positions of training, where these memories go astray
    model = RecollectForCausalLM(config)
    recipe = TrainingConfig(steps=arguments.steps, batch_size=16, lr=1e-2, warmup=0.1, end_lr=0.05, weight_decay=0.1)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"training {arguments.mixer}, {n_parameters:,} parameters, {recipe.steps} steps of {recipe.batch_size} x {LENGTH} bytes"
    )

    def report(event: dict[str, object]) -> None:
        if event["event"] == "step":
            print(f"  step {event['step']}: {float(str(event['loss'])) / math.log(2):.3f} bits per byte", flush=True)

    train(
        model,
        recipe,
        batch_at=lambda step: repeating_batch(text, recipe.batch_size, seed=stream_seed("train", arguments.seed, step)),
        report=report,
        report_seconds=15.0,
    )
    return model.eval()


def write(arguments: argparse.Namespace) -> None:
    """Train or load, read, save, and leave the rest to another process."""
    train_on, remembered, control, _ = split(read(arguments.book))
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    model = load_byte_model(arguments.model) if arguments.model else make_model(train_on, arguments)
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
    model = load_byte_model(arguments.out / "model")
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
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kept_memory"))
    parser.add_argument("--recall", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (recall if arguments.recall else write)(arguments)


if __name__ == "__main__":
    main()
