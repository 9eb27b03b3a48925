"""`recollect evaluate`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import tempfile
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Tasks of lm-evaluation-harness, by name or YAML file.

    Attributes:
        tasks: names or files, with commas between them.
        include_path: folder of further tasks' YAML files.
        shots: solved examples before each question.
        metadata: what generated tasks are told, such as {max_seq_lengths: [4096]}; tokenizer, if it is not there, is the model's.
        essays, facts, books: files in place of the hub's, see `recollect.evaluation.harness.LocalData`.
    """

    tasks: str
    include_path: str | None = None
    shots: int | None = None
    metadata: dict[str, Any] | None = None
    essays: str | None = None
    facts: str | None = None
    books: str | None = None


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
    device: Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, cuda:1, ...")] = "auto",
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
        from recollect import terminal
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
                    "suite 'harness' has no --data: its tasks read the hub, files that a YAML file of yours names, or those of its "
                    "options essays, facts and books"
                )
            told = _harness_options(model, parse_options(option or [], of="--option"))
            return _harness(str(model), told, out, limit, context, batch_tokens, device, dtype, progress, command)
        if model is None or suite is None:
            raise ValueError("give a model and a suite: recollect evaluate MODEL SUITE; --suites lists the suites")
        options: dict[str, Any] = parse_options(option or [], of="--option")
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
    terminal.show(table)
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


def _harness_options(model: str | None, given: dict[str, Any]) -> HarnessOptions:
    from recollect.comparison.options import check_types

    known = [field.name for field in dataclasses.fields(HarnessOptions)]
    unknown = sorted(given.keys() - set(known))
    if model is None or unknown or "tasks" not in given:
        wrong = f"it has no option {unknown[0]!r}" if unknown else "give a model and --option tasks=piqa,arc_easy"
        raise ValueError(f"suite 'harness' asks tasks of lm-evaluation-harness: {wrong}. Its options: {', '.join(known)}")
    check_types(HarnessOptions, given, of=f"suite {HARNESS!r}")
    if not isinstance(given.get("metadata", {}), dict):
        raise ValueError(
            f"option metadata is names and values, as metadata='{{max_seq_lengths: [1024]}}'; got {given['metadata']!r}"
        )
    return HarnessOptions(**given)


def _harness(
    path: str,
    options: HarnessOptions,
    out: Path | None,
    limit: int | None,
    context: int | None,
    batch_tokens: int,
    device: str,
    dtype: str,
    console: Any,
    command: str,
) -> None:
    """Tasks of lm-evaluation-harness: its own results in OUT/results.json, a row per example in OUT/samples.jsonl, and a report.

    Its cache knows requests but not models, so OUT, as for our suites, belongs to one model and one set of options and files.
    """
    try:
        from recollect.evaluation.harness import LocalData, run_harness, tokenizer_of
    except ImportError as error:
        raise ValueError(str(error)) from error
    from recollect import terminal
    from recollect.evaluation.loading import load_language_model
    from recollect.evaluation.report import harness as report
    from recollect.evaluation.runner import claimed, describe
    from recollect.evaluation.suites.base import digests
    from recollect.training.folder import Busy

    # Its resampling's workers would inherit our handler of SIGTERM, by which they are ended, and print that they were interrupted.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    tasks = options.tasks.split(",")
    local = LocalData(options.essays, options.facts, options.books)
    said = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    files = {key: digests([value]) for key, value in local._asdict().items() if value is not None}
    model = load_language_model(path, device=device, dtype=dtype, max_length=context, batch_tokens=batch_tokens)
    plan = describe(model, HARNESS, said | files, {"path": path, "dtype": dtype})
    named = "-".join(Path(task).stem for task in tasks)
    try:
        with (
            claimed(out, f"{HARNESS}-{named}", plan) as folder,
            tempfile.TemporaryDirectory() as copy,
            _bar(HARNESS, console) as advance,
        ):
            results = run_harness(
                model,
                tasks,
                include_path=None if options.include_path is None else Path(options.include_path),
                limit=limit,
                n_shots=options.shots,
                metadata={"tokenizer": tokenizer_of(model.coder, Path(copy))} | (options.metadata or {}),
                local=local,
                cache=folder / "answers",
                progress=advance,
            )
            table = report.write(folder, {"model": plan["model"] | {"path": path}, **results}, command=command)
    except Busy as error:
        raise ValueError(str(error)) from error
    terminal.show(table)
    print(f"report: {folder / 'report.html'}")


def _list_suites() -> None:
    from rich.table import Table

    from recollect import terminal
    from recollect.evaluation.suites.base import REQUIRED, SUITES, options_of

    table = Table("suite", "what", "options")
    suites: dict[str, Any] = {**SUITES, HARNESS: HarnessOptions}
    for name, suite in sorted(suites.items()):
        options = [f"{key}={'...' if value is REQUIRED else value}" for key, value in options_of(suite).items()]
        table.add_row(name, (suite.__doc__ or "").strip().splitlines()[0], ", ".join(options))
    terminal.show(table)
