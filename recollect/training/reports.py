"""What a training run tells while it runs: lines, a journal, TensorBoard, Weights & Biases, trackio; and a picture at the end."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from recollect.training.config import TrainingConfig
from recollect.training.curves import draw_curves
from recollect.training.journal import Event, Journal, read_lines
from recollect.training.recipe.settings import RunSettings
from recollect.training.world import World

JOURNAL = "progress.jsonl"


class Sink(Protocol):
    """Takes numbers of a step."""

    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Reports:
    """Takes the loop's events on the first process, does nothing on the others.

    Each "step" event gets: bits_per_byte (of the loss, with the mean bytes of a token of the validation text, or of the first batch),
    tokens_per_second (of all processes, since the last event), mfu (share of the machine's measured matrix-
    product rate that 6 operations per parameter and token make; attention and memories not counted), memory_gb (of this process),
    eta_seconds.
    """

    def __init__(
        self,
        run: RunSettings,
        out: Path,
        world: World,
        *,
        n_parameters: int,
        config: TrainingConfig,
        bytes_per_token: float,
        say: Callable[[str], None],
        live: bool = False,
    ) -> None:
        self.run, self.out, self.world, self.config, self.say = run, out, world, config, say
        self.n_parameters, self.bytes_per_token = n_parameters, bytes_per_token
        self.journal = Journal(out / JOURNAL)
        self.sinks: list[Sink] = []
        self.rate = 0.0
        self.bar = _Bar(config.steps) if live else None
        self.before = (0, 0.0)  # tokens, seconds of the last step event

    def __enter__(self) -> Reports:
        if self.world.rank == 0:
            self.rate = self.world.size * matmul_rate(self.world.device, self.run.engine.precision)
            if self.bar:
                self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sink in self.sinks:
            with contextlib.suppress(Exception):  # a logger's trouble must not hide the run's own
                sink.close()
        if self.bar:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        if self.world.rank:
            return
        if event["event"] == "started":
            self.sinks = make_sinks(self.run, self.out, step=event["step"] + 1 if event["resumed"] else 0)
        if event["event"] == "step":
            event = self._measured(event)
        self.journal.write(event)
        numbers = {key: float(value) for key, value in event.items() if isinstance(value, int | float) and key != "step"}
        if event["event"] in ("step", "evaluation"):
            prefix = "train" if event["event"] == "step" else "validation"
            for sink in tuple(self.sinks):
                try:
                    sink.write(event["step"], {f"{prefix}/{key}": value for key, value in numbers.items()})
                except Exception as error:  # of whatever kind: a logger's trouble must not end the run
                    self.sinks = [other for other in self.sinks if other is not sink]
                    self.say(f"{type(sink).__name__} has failed and is left out from here on: {error}")
        line = describe(event, self.config.steps)
        if self.bar and event["event"] == "step":
            self.bar.update(event["step"], line)
        elif line:
            self.say(line)

    def finish(self) -> None:
        """Draw the run."""
        if self.world.rank == 0:
            self.journal.write({"event": "done", "step": self.config.steps})
            draw_curves(read_lines(self.out / JOURNAL), self.out / "curves.png", title=self.out.name)

    def _measured(self, event: Event) -> Event:
        tokens, seconds = self.before
        if event["seconds"] < seconds or not tokens:
            tokens, seconds = 0, 0.0
        took = event["seconds"] - seconds
        speed = (event["tokens"] - tokens) / took if took > 0 else 0.0
        self.before = (event["tokens"], event["seconds"])
        left = self.config.steps - event["step"]
        return {
            **event,
            **({"bits_per_byte": event["loss"] / math.log(2) / self.bytes_per_token} if self.bytes_per_token else {}),
            "tokens_per_second": speed,
            "mfu": 6 * self.n_parameters * speed / self.rate if self.rate else 0.0,
            "memory_gb": memory_bytes(self.world.device) / 1e9,
            "eta_seconds": left * event["seconds"] / max(1, event["step"]),
        }


def describe(event: Event, steps: int) -> str:
    """One line for a person; "" for events that need none."""
    kind, step = event["event"], event["step"]
    if kind == "started":
        return f"going on from step {step}" if event["resumed"] else ""
    if kind == "note":
        return str(event["note"])
    if kind == "forms":
        return f"forms on this device: {', '.join(event['forms'])}"
    if kind == "saved":
        return f"step {step}: checkpoint written"
    if kind == "evaluation":
        named = [f"{key.split('/', 1)[1]} {value:.4f}" for key, value in event.items() if key.startswith("bits_per_byte/")]
        more = f" ({', '.join(named)})" if named else ""
        return f"step {step}: validation loss {event['loss']:.4f}, {event['bits_per_byte']:.4f} bits per byte{more}"
    bits = f", {event['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in event else ""
    return (
        f"step {step}/{steps}: loss {event['loss']:.4f}{bits}, gradient norm {event['grad_norm']:.3g}, lr {event['lr']:.3g}, "
        f"{event['tokens_per_second']:,.0f} tokens/s, MFU {100 * event['mfu']:.0f} %, {event['memory_gb']:.1f} GB, "
        f"{_duration(event['eta_seconds'])} left"
    )


def make_sinks(run: RunSettings, out: Path, *, step: int) -> list[Sink]:
    """The loggers that the settings ask for; what TensorBoard has from `step` on, of a process that was killed, is forgotten.

    Raises:
        ValueError: one whose package is not installed.
    """
    sinks: list[Sink] = []
    if run.logging.tensorboard and (module := _optional("torch.utils.tensorboard")):
        sinks.append(_TensorBoard(module.SummaryWriter(log_dir=str(out / "tensorboard"), purge_step=step)))
    for name in ("wandb", "trackio"):
        if getattr(run.logging, name):
            module = _optional(name)
            if module is None:
                raise ValueError(f"logging.{name} needs the package {name}: pip install {name}, or set logging.{name}=false")
            sinks.append(_Service(module, project=run.logging.project, name=out.name))
    return sinks


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """wandb, and trackio, which has its calls."""

    def __init__(self, module: Any, *, project: str, name: str) -> None:
        self.module = module
        module.init(project=project, name=name, resume="allow")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.module.log(numbers, step=step)

    def close(self) -> None:
        self.module.finish()


class _Bar:
    """A bar that moves, on a terminal."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=Console(stderr=True))
        self.task = self.progress.add_task("starting", total=steps)

    def start(self) -> None:
        self.progress.start()

    def update(self, step: int, line: str) -> None:
        self.progress.update(self.task, completed=step, description=line)

    def stop(self) -> None:
        self.progress.stop()


def matmul_rate(device: torch.device, precision: str = "fp32", *, seconds: float = 0.2) -> float:
    """Operations per second of large matrix products in this process: the best of a moment's tries."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def memory_bytes(device: torch.device) -> float:
    """What this process holds: on a GPU its peak there, else resident memory (0 where the system does not tell)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
