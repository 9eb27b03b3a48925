"""What the user sees while a comparison runs: one bar per run, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from recollect.comparison.plan import Plan
from recollect.training.journal import Event

Key = tuple[str, int]


class Display(Protocol):
    """Hears what the workers say. Use as a context manager."""

    def __enter__(self) -> Display: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def hear(self, label: str, seed: int, event: Event) -> None: ...


class Status:
    """What is known of one run."""

    def __init__(self, name: str, steps: int, metric: str) -> None:
        self.name, self.steps, self.metric = name, steps, metric
        self.step = 0
        self.loss: float | None = None
        self.score: float | None = None
        self.note = "waiting"
        self._begun: tuple[float, int] | None = None

    def hear(self, event: Event) -> None:
        kind = event["event"]
        self.step = event.get("step", self.step)
        if kind == "launched":
            self.note = "starting"
        elif kind == "started":
            self._begun = (time.monotonic(), self.step)
            self.note = ""
        elif kind in ("step", "evaluation"):
            self.loss = event.get("loss")
            self.note = ""
            if kind == "evaluation":
                self.score = event.get(self.metric)
        elif kind in ("done", "failed", "stopped"):
            self.note = kind

    @property
    def result(self) -> str:
        """The metric, as far as it is known."""
        if self.score is None:
            return ""
        return f"error {100 * self.score:5.1f} %" if self.metric == "error" else f"{self.score:.3f} bits/byte"

    @property
    def loss_text(self) -> str:
        return "" if self.loss is None else f"loss {self.loss:.3f}"

    @property
    def eta(self) -> str:
        """Time left, from the pace since this process began."""
        if self.note:
            return self.note
        if self.step >= self.steps:
            return "finishing"
        if self._begun is None or self.step <= self._begun[1]:
            return ""
        left = (time.monotonic() - self._begun[0]) / (self.step - self._begun[1]) * (self.steps - self.step)
        return clock(left) + " left"


def clock(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bars:
    """One bar per run."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.statuses = _statuses(plan)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(8, min(24, console.width - 72))),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[result]:>13}"),
            TextColumn("{task.fields[loss]:>11}"),
            TextColumn("{task.fields[eta]}"),
            console=console,
        )
        self.tasks: dict[Key, TaskID] = {
            key: self.progress.add_task(escape(s.name), total=s.steps, result="", loss="", eta=s.note)
            for key, s in self.statuses.items()
        }

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def hear(self, label: str, seed: int, event: Event) -> None:
        status = self.statuses[label, seed]
        status.hear(event)
        self.progress.update(
            self.tasks[label, seed], completed=status.step, result=status.result, loss=status.loss_text, eta=status.eta
        )
        if event["event"] in ("note", "failed"):
            self.progress.console.print(
                f"{status.name}: {event.get('note') or event.get('reason')}", markup=False, highlight=False
            )


class Lines:
    """One line per evaluation."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.statuses = _statuses(plan)
        self.console = console

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def hear(self, label: str, seed: int, event: Event) -> None:
        status = self.statuses[label, seed]
        status.hear(event)
        kind = event["event"]
        if kind == "evaluation":
            parts = [f"step {status.step}/{status.steps}", status.result, status.loss_text, status.eta]
            self._print(f"{status.name}: {', '.join(part for part in parts if part)}")
        elif kind == "started" and event["resumed"]:
            self._print(f"{status.name}: goes on from step {status.step}")
        elif kind in ("note", "failed"):
            self._print(f"{status.name}: {event.get('note') or event.get('reason')}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Silent:
    """Nothing, for programs."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def hear(self, label: str, seed: int, event: Event) -> None:
        pass


def make_display(plan: Plan, console: Console) -> Display:
    """Bars in a terminal that has room for them, lines elsewhere."""
    if console.is_terminal and len(plan.runs()) < max(4, console.height - 4):
        return Bars(plan, console)
    return Lines(plan, console)


def _statuses(plan: Plan) -> dict[Key, Status]:
    return {(label, seed): Status(f"{label} seed {seed}", plan.steps_of(label), plan.metric) for label, seed in plan.runs()}
