"""`recollect evaluate`."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recollect.cli.shared import INTERRUPTED, app, as_interrupt, one_thread, refuse, say

if TYPE_CHECKING:
    from recollect.evaluation.language_model import LanguageModel
    from recollect.evaluation.suites.base import Suite

HARNESS = "harness"
_MODEL = (
    "OUT of a `recollect train`, OUT/runs/LABEL-seedK of a compare, a saved model's folder, or a name on the Hugging Face hub."
)


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help=_MODEL)] = None,
    suite: Annotated[str | None, typer.Argument(help="What to ask; --suites lists them.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File, folder or glob that the suite reads (its option `data`); repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the suite, name=value; repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; an unfinished evaluation in it is continued.", show_default="evaluations/SUITE-HASH"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only the first n.")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the model may see at a time.", show_default="any number; of other models, their own limit"
        ),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 8192,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (as saved), float32, bfloat16, float16.")] = "auto",
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers mixers or suites; repeatable.")
    ] = None,
    suites: Annotated[bool, typer.Option("--suites", help="List the suites with their options and exit.")] = False,
) -> None:
    """Ask a model a suite of questions: a table, a picture, a page, and a row per example.

    The same command continues after an interruption.
    """
    signal.signal(signal.SIGTERM, as_interrupt)
    from rich.console import Console

    progress = Console(stderr=True, force_terminal=False if os.environ.get("CI") else None)
    command = shlex.join(["recollect", *sys.argv[1:]])
    try:
        one_thread()
        from recollect.comparison.options import parse_options
        from recollect.evaluation.suites import build_suite
        from recollect.user_modules import import_user_modules

        import_user_modules(imports or [])
        if suites:
            _list_suites()
            return
        if suite == HARNESS:
            if data:
                raise ValueError(
                    "suite 'harness' has no --data: its tasks read the hub, or files that a YAML file of yours names"
                )
            options: dict[str, Any] = parse_options(option or [], of="--option")
            return _harness(model, options, out, limit, context, batch_tokens, device, dtype, progress)
        if model is None or suite is None:
            raise ValueError("give a model and a suite: recollect evaluate MODEL SUITE; --suites lists the suites")
        options = parse_options(option or [], of="--option")
        if data:
            options["data"] = tuple(data)
        asked = build_suite(suite, **options)
        from recollect.evaluation.loading import load_language_model

        loaded = load_language_model(model, device=device, dtype=dtype, max_length=context, batch_tokens=batch_tokens)
        table, report, words = _run(loaded, asked, out, {"path": model, "dtype": dtype}, limit, progress, command)
    except KeyboardInterrupt:
        say(progress, f"interrupted; finished rows are kept. To go on, run the same command again: {command}")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    Console().print(table)
    print(words)
    print(f"report: {report}")


def _run(
    model: LanguageModel, suite: Suite, out: Path | None, about: dict[str, Any], limit: int | None, console: Any, command: str
) -> tuple[Any, Path, str]:
    """(table, page, a sentence) of an evaluation."""
    from recollect.evaluation import report
    from recollect.evaluation.runner import evaluate
    from recollect.training.folder import Busy

    try:
        with _bar(suite.name, console) as advance:
            done = evaluate(model, suite, out, about=about, limit=limit, progress=advance)
    except Busy as error:
        raise ValueError(str(error)) from error
    table = report.write(done.out, suite, done.results, command=command)
    kept = f", {done.n_kept:,} answered earlier" if done.n_kept else ""
    return table, done.out / "report.html", f"{done.n_asked:,} asked in {done.seconds:.1f} s{kept}"


@contextlib.contextmanager
def _bar(name: str, console: Any) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; takes (answered, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _harness(
    path: str | None,
    options: dict[str, Any],
    out: Path | None,
    limit: int | None,
    context: int | None,
    batch_tokens: int,
    device: str,
    dtype: str,
    console: Any,
) -> None:
    """Tasks of lm-evaluation-harness: its own results in OUT/results.json, a row per example in OUT/samples.jsonl, a table.

    Its cache knows requests but not models, so OUT, as for our suites, belongs to one model and one set of options.
    """
    from rich.console import Console
    from rich.table import Table

    unknown = sorted(options.keys() - {"tasks", "include_path", "shots"})
    if path is None or unknown or "tasks" not in options:
        wrong = f"it has no option {unknown[0]!r}" if unknown else "give a model and --option tasks=piqa,arc_easy"
        raise ValueError(
            f"suite 'harness' asks tasks of lm-evaluation-harness: {wrong}. Its options: tasks, include_path, shots"
        )
    try:
        from recollect.evaluation.harness import run_harness, write_harness
    except ImportError as error:
        raise ValueError(str(error)) from error
    from recollect.evaluation.loading import load_language_model
    from recollect.evaluation.runner import claimed, describe
    from recollect.training.folder import Busy

    tasks, shots = str(options["tasks"]).split(","), options.get("shots")
    if shots is not None and (not isinstance(shots, int) or isinstance(shots, bool)):
        raise ValueError(f"option shots is a whole number; got {shots!r}")
    model = load_language_model(path, device=device, dtype=dtype, max_length=context, batch_tokens=batch_tokens)
    plan = describe(model, HARNESS, options, {"path": path, "dtype": dtype})
    named = "-".join(Path(task).stem for task in tasks)
    try:
        with claimed(out, f"{HARNESS}-{named}", plan) as folder, _bar(HARNESS, console) as advance:
            results = run_harness(
                model,
                tasks,
                include_path=None if options.get("include_path") is None else Path(options["include_path"]),
                limit=limit,
                n_shots=shots,
                cache=folder / "answers",
                progress=advance,
            )
            lines = write_harness({"model": plan["model"] | {"path": path}, **results}, folder)
    except Busy as error:
        raise ValueError(str(error)) from error
    table = Table("task", "metric", "value", "standard error", box=None)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    print(f"results: {folder / 'results.json'}")


def _list_suites() -> None:
    from rich.console import Console
    from rich.table import Table

    from recollect.evaluation.suites.base import REQUIRED, SUITES, options_of

    table = Table("suite", "what", "options")
    for name, suite in sorted(SUITES.items()):
        options = [f"{key}={'...' if value is REQUIRED else value}" for key, value in options_of(suite).items()]
        table.add_row(name, (suite.__doc__ or "").strip().splitlines()[0], ", ".join(options))
    table.add_row(HARNESS, "Tasks of lm-evaluation-harness, by name or YAML file.", "tasks=..., include_path=None, shots=None")
    Console().print(table)
