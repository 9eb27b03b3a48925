"""One suite: every contender is checked, then all that passed are timed in turn, length by length, until time or memory ends.

A contender that would take too long or too much at some length gets no further; the row there says why.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from recollect.bench.clock import foreseen, interleaved, once, synchroniser, timing
from recollect.bench.contenders import Contender, Step, Suite, missing
from recollect.bench.floor import Rates, floor
from recollect.bench.memory import MEASURABLE, Probe, gpu_peak_during, shortly
from recollect.bench.rows import DONE, FAILED, SKIPPED, STOPPED, WRONG, Row, Rows
from recollect.bench.setting import Setting, available_bytes
from recollect.comparison.report import units

ROUND = 0.02  # seconds that a round of a short step takes
LONG = 20.0  # seconds of silence that are announced

Tell = Callable[[str], None]
Prober = Callable[[str, Setting, int], Probe]


class Runner(NamedTuple):
    """setting; suite; rows: where measurements go; rates: of the machine; tell: called with a line for people; probe: one step in a
    process of its own (CPU only); now: the clock."""

    setting: Setting
    suite: Suite
    rows: Rows
    rates: Rates
    tell: Tell
    probe: Prober
    now: Callable[[], float] = time.perf_counter

    def run(self, contenders: Sequence[Contender], lengths: Sequence[int]) -> None:
        """Everything that is not there yet."""
        going = [contender for contender in contenders if self._can_run(contender)]
        checked: dict[str, bool] = {}
        for length in sorted(lengths):
            going = [contender for contender in going if not self._ended(contender, length)]
            todo = [contender for contender in going if self.rows.at(contender.name, length) is None]
            for contender in todo:
                if contender.name not in checked:
                    checked[contender.name] = self._passes(contender)
            going = [contender for contender in going if checked.get(contender.name, True)]
            self._measure([contender for contender in todo if checked[contender.name]], length)

    # --- whether ------------------------------------------------------------------------------------------------------------

    def _can_run(self, contender: Contender) -> bool:
        reason = missing(contender, self.setting)
        if reason:
            self.rows.add(contender.name, None, SKIPPED, reason, note=contender.note(self.setting))
        return not reason

    def _ended(self, contender: Contender, length: int) -> bool:
        """Whether it stopped or failed at this or a shorter length."""
        ends = [row for row in self.rows.of(contender.name) if row["length"] is not None and row["status"] != DONE]
        return any(row["length"] <= length for row in ends)

    def _passes(self, contender: Contender) -> bool:
        """Whether its outputs and gradients are right; a contender that is not is never timed."""
        note = contender.note(self.setting)
        if contender.check is None:
            self.rows.add(contender.name, None, DONE, "nothing to compare with", note=note)
            return True
        try:
            check = contender.check(self.setting)
        except Exception as error:  # whatever ours or a peer raises is the row's reason
            self.rows.add(contender.name, None, FAILED, shortly(error), note=note)
            self.tell(f"{contender.name}: failed on a short text: {shortly(error)}")
            return False
        measured: dict[str, Any] = {"error": check.error, "allowed": check.allowed, "note": note}
        if not check.passed:
            reason = f"relative error {check.error:.1e}, allowed {check.allowed:.1e}"
            self.rows.add(contender.name, None, WRONG, reason, **measured)
            self.tell(f"{contender.name}: wrong, not timed: {reason}")
            return False
        self.rows.add(contender.name, None, DONE, **measured)
        return True

    # --- one length ---------------------------------------------------------------------------------------------------------

    def _measure(self, contenders: Sequence[Contender], length: int) -> None:
        peaks = {c.name: peak for c in contenders if (peak := self._affordable(c, length)) is not None}
        entered = [contender for contender in contenders if contender.name in peaks]
        if not entered:
            return
        steps = self._warm(entered, length, peaks)
        seconds = self._timed(steps)
        for contender in entered:
            if contender.name in steps:
                row = self._row(contender, length, steps[contender.name], seconds[contender.name])
                self.rows.add(contender.name, length, DONE, peak_bytes=peaks[contender.name] or None, among=list(steps), **row)
        steps.clear()
        self._clean_up()
        if seconds:
            self.tell(
                f"{self.suite.name} {length:,}: " + ", ".join(f"{k} {pretty(timing(s).median)}" for k, s in seconds.items())
            )

    def _timed(self, steps: dict[str, Step]) -> dict[str, list[float]]:
        """Seconds of a step in every round; a round calls a short step several times and counts their mean."""
        wait = synchroniser(self.setting.device)
        first = {name: once(step, wait=wait, now=self.now) for name, step in steps.items()}
        calls = {name: min(100, 1 + int(ROUND / max(seconds, 1e-9))) for name, seconds in first.items()}
        expected = self.setting.repeats * sum(first[name] * calls[name] for name in steps)
        if expected > LONG:
            self.tell(f"{self.suite.name}: the next {self.setting.repeats} rounds take about {units.duration(expected)}")

        def repeated(step: Step, n_calls: int) -> None:
            for _ in range(n_calls):
                step()

        runs = {name: partial(repeated, step, calls[name]) for name, step in steps.items()}
        seconds = interleaved(runs, repeats=self.setting.repeats, warm_up=False, wait=wait, now=self.now)
        return {name: [total / calls[name] for total in series] for name, series in seconds.items()}

    def _affordable(self, contender: Contender, length: int) -> int | None:
        """Peak bytes of a step (0: not known yet), None if it stops here, with the reason in its row."""
        name, limit = contender.name, self.setting.limit
        seconds = foreseen(self.rows.points(name, "seconds"), length)
        needed, free = foreseen(self.rows.points(name, "peak_bytes"), length), available_bytes(self.setting.device)
        found = Probe(None, None)
        if seconds is not None and seconds > limit:
            reason = f"a step would take about {pretty(seconds)}, the limit is {limit:g} s"
        elif needed is not None and needed > free:
            reason = f"out of memory: needs about {units.size(needed)}, {units.size(free)} are free"
        else:
            if self.setting.kind == "cpu" and MEASURABLE:
                found = self.probe(f"{self.suite.name}/{name}", self.setting, length)
            reason = found.reason or self._too_slow(found.seconds or 0.0)
        if reason:
            self._stop(name, length, reason)
            return None
        return found.bytes or 0

    def _too_slow(self, seconds: float) -> str:
        limit = self.setting.limit
        return f"a step takes {pretty(seconds)}, the limit is {limit:g} s" if seconds > limit else ""

    def _stop(self, name: str, length: int, reason: str) -> None:
        expected = reason.startswith(("out of memory", "a step", "no end"))
        self.rows.add(name, length, STOPPED if expected else FAILED, reason)
        self.tell(f"{self.suite.name} {length:,}: {name} stops: {reason}")

    def _warm(self, contenders: Sequence[Contender], length: int, peaks: dict[str, int]) -> dict[str, Step]:
        """The steps, each called once or more, of the contenders that can; the peak on a GPU is taken here."""
        wait, on_gpu = synchroniser(self.setting.device), self.setting.kind == "cuda"
        steps: dict[str, Step] = {}
        inputs = None
        for contender in contenders:
            try:
                inputs = self.suite.inputs(self.setting, length) if inputs is None else inputs
                step = contender.prepare(self.setting, inputs)
                step()
                if on_gpu:
                    peaks[contender.name] = gpu_peak_during(step, self.setting.device)
                reason = self._too_slow(once(step, wait=wait, now=self.now)) if on_gpu else ""
            except Exception as error:  # whatever ours or a peer raises is the row's reason
                reason = shortly(error)
            if reason:
                self._stop(contender.name, length, reason)
                self._clean_up()
            else:
                steps[contender.name] = step
        return steps

    def _row(self, contender: Contender, length: int, step: Step, seconds: list[float]) -> Row:
        found = timing(seconds)
        row: Row = {"seconds": found.median, "low": found.low, "high": found.high, "all_seconds": seconds}
        row["tokens_per_second"] = self.setting.batch * (1 if contender.state_bytes else length) / found.median
        if contender.state_bytes is not None:
            row["state_bytes"] = contender.state_bytes(step)
        if contender.work is not None:
            work = contender.work(self.setting, length, step)
            row |= {"flops": work.flops, "bytes": work.bytes, "floor_seconds": floor(work, self.rates)}
        return row

    def _clean_up(self) -> None:
        gc.collect()
        if self.setting.kind == "cuda":
            torch.cuda.empty_cache()


def pretty(seconds: float) -> str:
    """0.0123 -> "12.3 ms"; 2.5e-5 -> "25.0 us"; 3.14 -> "3.14 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
