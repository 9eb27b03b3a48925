"""`recollect compare` as a function: plan, train every mixer with every seed, report."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path

from rich.console import Console, RenderableType

from recollect.comparison import folder as folders
from recollect.comparison.budget import choose_steps, measure
from recollect.comparison.folder import Results
from recollect.comparison.options import parse_budget
from recollect.comparison.plan import Plan, Request, make_plan, moved, usable_cores
from recollect.comparison.pool import run_all
from recollect.comparison.progress import Display, Silent, make_display
from recollect.mixers import entry
from recollect.mixers.multi_token import MultiTokenAttention
from recollect.training.folder import Busy, locked
from recollect.training.journal import Event, read_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a comparison came to.

    Attributes:
        out: its folder.
        table: the result table, for `rich.console.Console.print`.
        report: the page to open.
        failed: (label, seed) -> reason, of the runs that failed.
    """

    out: Path
    table: RenderableType
    report: Path
    failed: dict[tuple[str, int], str]


def compare(
    request: Request,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> Outcome:
    """Train every mixer with every seed under the same budget, and report. The same request goes on where it was interrupted.

    Args:
        request: what to compare.
        out: folder for everything; None: comparisons/TASK-HASH.
        jobs: runs at a time; None: one per core (divided by the threads of a run), on a GPU one.
        console: where progress goes; None: nowhere.
        command: how the user said it, for the report.
    Raises:
        ValueError, TypeError, OSError: a wrong request, unsuitable data, a folder that holds something else; nothing is lost.
        KeyboardInterrupt: after every worker has written a checkpoint.
    """
    begun = time.monotonic()
    plan = make_plan(request, command=command or _command(request, out))
    out = Path(out) if out is not None else folders.default_folder(plan)
    folders.look(out, plan)  # before anything is written
    jobs = jobs or default_jobs(plan)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out):
            stored = folders.look(out, plan)  # again: another process may have been here in between
            _tell_beginning(plan, stored, out, console)
            plan = moved(stored, plan) if stored else plan
            if plan != stored:
                folders.store(out, plan)
            plan = _with_steps(out, plan, jobs, begun, console)
            failed = _train(out, plan, jobs, make_display(plan, console) if console else Silent())
    except Busy as error:
        raise ValueError(f"{error}; wait for it, or give another --out") from error
    return Outcome(out=out, table=_report(out), report=out / "report.html", failed=failed)


def default_jobs(plan: Plan) -> int:
    """One run per core, as far as there are runs; one on a GPU."""
    if not plan.device.startswith("cpu"):
        return 1
    return max(1, min(len(plan.runs()), usable_cores() // plan.threads))


def _tell_beginning(plan: Plan, stored: Plan | None, out: Path, console: Console | None) -> None:
    if console is None:
        return
    known = stored is not None
    done = sum(folders.is_done(out, *key) for key in plan.runs())
    if known and done == len(plan.runs()):
        text = f"{out} holds this comparison, finished"
    elif known:
        text = f"{out} holds this comparison, {done} of {len(plan.runs())} runs finished; going on"
    else:
        n = len(plan.mixers)
        runs = len(plan.runs())
        text = (
            f"comparing {n} mixer{'s' * (n > 1)} on {plan.task}, {runs} run{'s' * (runs > 1)}, budget {plan.budget}, in {out}"
        )
    if any(issubclass(entry(layer["mixer"]).cls, MultiTokenAttention) for mixer in plan.mixers for layer in mixer["layers"]):
        text += f"\nMulti-Token Attention on the CPU: {plan.machine['multi_token_attention']}"
    if stored and done < len(plan.runs()):
        changed = [
            f"{k} {stored.machine.get(k)} -> {plan.machine[k]}"
            for k in plan.machine
            if stored.machine.get(k) != plan.machine[k]
        ]
        if changed:
            text += f"; begun under other conditions ({', '.join(changed)}), so numbers may differ in the last digits"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _with_steps(out: Path, plan: Plan, jobs: int, begun: float, console: Console | None) -> Plan:
    """The plan with its steps: a time budget is turned into steps once, and stored."""
    if plan.steps is not None:
        return plan
    seconds = parse_budget(plan.budget)[1]
    assert seconds is not None

    def say(text: str) -> None:
        if console:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        costs = measure(out, plan, jobs=jobs, seconds=min(5.0, max(1.0, seconds / 100)), say=say)
        steps = choose_steps(plan, costs, seconds=seconds, spent=time.monotonic() - begun, jobs=jobs)
    except BaseException:
        folders.forget(out)  # nothing is trained yet, and another budget should not meet this plan
        raise
    plan = dataclasses.replace(plan, steps=steps)
    folders.store(out, plan)
    say(f"steps in {plan.budget}: {steps if isinstance(steps, int) else ', '.join(f'{k} {v}' for k, v in steps.items())}")
    return plan


def _train(out: Path, plan: Plan, jobs: int, display: Display) -> dict[tuple[str, int], str]:
    results = Results(out, plan)
    open_runs = []
    with display:

        def hear(label: str, seed: int, event: Event) -> None:
            if event["event"] == "evaluation":
                results.add(label, seed, event)
            display.hear(label, seed, event)

        for key in plan.runs():
            if folders.is_done(out, *key):
                for event in read_lines(folders.run_folder(out, *key) / "progress.jsonl"):
                    if event["event"] in ("evaluation", "done"):
                        results.add(*key, event) if event["event"] == "evaluation" else display.hear(*key, event)
            else:
                open_runs.append(key)
        return run_all(out, plan, open_runs, jobs=jobs, hear=hear)


def _report(out: Path) -> RenderableType:
    # Here, because drawing needs matplotlib, which takes a second that an error message should not.
    from recollect.comparison.report import write

    return write(out)


def _command(request: Request, out: str | Path | None) -> str:
    """The command line that says the same."""
    words = ["recollect", "compare", request.task]
    defaults = Request(task=request.task)
    for field in dataclasses.fields(Request):
        value, default = vars(request)[field.name], vars(defaults)[field.name]
        if field.name == "task" or value == default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "mixers":
            words += [flag, ",".join(value)]
        elif field.name == "task_options":
            words += [word for name, v in value.items() for word in ("--task-option", f"{name}={v}")]
        elif field.name in ("data", "eval_data", "imports"):
            words += [word for v in value for word in ("--import" if field.name == "imports" else flag, str(v))]
        else:
            words += [flag, str(value)]
    return shlex.join(words + (["--out", str(out)] if out is not None else []))
