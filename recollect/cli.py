"""The command line. Thin: it turns words into a request and prints what comes back."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

OK, SOME_FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sequence models that attend to many tokens at once and that memorise at test time.",
)

_DATA, _MODEL, _RECIPE, _RUN = "Data", "Model (default: the task's own)", "Recipe (default: the task's own)", "Running"
_BUDGET_HELP = (
    "Steps for every run (2000steps), or wall time for the WHOLE command (90s, 5m, 1h). Of a time, every mixer is timed for "
    "a moment, and the number of steps with which all runs together fit is fixed once and kept when the command is resumed. "
    "Every mixer gets the same number of steps, so the same data, unless --equal time."
)


def main() -> None:
    """Entry point of the console script."""
    # Before torch is imported: two spinning OpenMP threads on busy cores cost up to 300 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()


@app.callback()
def _root() -> None:
    """A callback makes `recollect` a command of subcommands however few there are."""


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="find-block, recall, text (with --data), or a task of your own (--import).")],
    mixers: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; options after colons: attention,mta:c_q=2:c_k=9. See `recollect list`.",
            show_default="attention,talking_heads,diff,mta",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds (0 to n-1); a seed changes data, weights and dropout.")] = 1,
    budget: Annotated[str | None, typer.Option(help=_BUDGET_HELP, show_default="the task's own")] = None,
    equal: Annotated[
        str, typer.Option(help="'data': the same steps for all; 'time': the same time for all (needs a time budget).")
    ] = "data",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything; an unfinished comparison in it is continued.", show_default="comparisons/TASK-HASH"
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text file, folder or glob (task text); repeatable.", rich_help_panel=_DATA)
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="Text to evaluate on, instead of a held-out part of --data.", rich_help_panel=_DATA)
    ] = None,
    task_option: Annotated[
        list[str] | None,
        typer.Option("--task-option", "-t", help="Option of the task, name=value; repeatable.", rich_help_panel=_DATA),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of an example (task text).", rich_help_panel=_DATA)] = None,
    layers: Annotated[int | None, typer.Option(help="Layers.", rich_help_panel=_MODEL)] = None,
    width: Annotated[int | None, typer.Option(help="Model dim.", rich_help_panel=_MODEL)] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.", rich_help_panel=_MODEL)] = None,
    intermediate: Annotated[int | None, typer.Option(help="Hidden size of the SwiGLU.", rich_help_panel=_MODEL)] = None,
    mlp: Annotated[
        bool | None,
        typer.Option(
            "--mlp/--no-mlp", help="With or without SwiGLUs beside the mixers (recall: without).", rich_help_panel=_MODEL
        ),
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option(help="Parameters of every model: its SwiGLUs are as wide as that takes.", rich_help_panel=_MODEL),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Of the attention weights, where a mixer has it.", rich_help_panel=_MODEL)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_RECIPE)] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear, cosine or wsd.", rich_help_panel=_RECIPE)] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Below 1 a share of the steps, else steps.", rich_help_panel=_RECIPE)
    ] = None,
    end_lr: Annotated[
        float | None, typer.Option(help="Last learning rate as a share of the peak.", rich_help_panel=_RECIPE)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.", rich_help_panel=_RECIPE)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of weight matrices only.", rich_help_panel=_RECIPE)] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; 0: off.", rich_help_panel=_RECIPE)] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.", rich_help_panel=_RECIPE)] = None,
    n_eval: Annotated[
        int | None, typer.Option(help="Held-out examples of the last evaluation.", rich_help_panel=_RECIPE)
    ] = None,
    n_eval_curve: Annotated[
        int | None, typer.Option(help="Held-out examples of the earlier ones.", rich_help_panel=_RECIPE)
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module or .py file that registers mixers or tasks; repeatable.", rich_help_panel=_RUN),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time; changes no result.", show_default="one per core; on a GPU 1", rich_help_panel=_RUN),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of one run.", rich_help_panel=_RUN)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_RUN)] = "auto",
) -> None:
    """Train several mixers under the same budget and compare them: a table, learning curves and a page.

    The same command continues after an interruption, and ends with the numbers of an uninterrupted run.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    from rich.console import Console

    # A CI system's pseudo-terminal would fill its log with redrawn bars.
    progress = Console(stderr=True, force_terminal=False if os.environ.get("CI") else None)
    command = shlex.join(["recollect", *sys.argv[1:]])
    try:
        _one_thread()
        from recollect.comparison import Request
        from recollect.comparison import compare as run
        from recollect.comparison.options import parse_options

        request = Request(
            task=task,
            mixers=mixers.split(",") if mixers is not None else None,
            seeds=seeds,
            budget=budget,
            equal=equal,
            task_options=parse_options(task_option or [], of="--task-option"),
            data=data or [],
            eval_data=eval_data or [],
            imports=imports or [],
            layers=layers,
            width=width,
            heads=heads,
            intermediate=intermediate,
            parameters=parameters,
            mlp=mlp,
            dropout=dropout,
            batch_size=batch_size,
            seq_len=seq_len,
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            end_lr=end_lr,
            weight_decay=weight_decay,
            clip=clip,
            eval_every=eval_every,
            n_eval=n_eval,
            n_eval_curve=n_eval_curve,
            threads=threads,
            device=device,
        )
        if jobs is not None and jobs < 1:
            raise ValueError(f"--jobs must be at least 1; got {jobs}")
        outcome = run(request, out=out, jobs=jobs, console=progress, command=command)
    except KeyboardInterrupt:
        _say(progress, f"interrupted; to go on from the last checkpoints, run the same command again: {command}")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        _refuse(error)
    except RuntimeError as error:
        _refuse(error, status=SOME_FAILED)
    Console().print(outcome.table)
    print(f"report: {outcome.report}")
    for (label, seed), reason in outcome.failed.items():
        _say(progress, f"failed: {label} seed {seed}: {reason}")
    if outcome.failed:
        from recollect.comparison.folder import DISK_FULL_TEXT

        raise SystemExit(USER_ERROR if DISK_FULL_TEXT in outcome.failed.values() else SOME_FAILED)


@app.command("list")
def list_(
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers mixers or tasks.")
    ] = None,
) -> None:
    """Mixers (what, source, state) and tasks (what, options)."""
    import dataclasses

    from rich.console import Console
    from rich.table import Column, Table

    import recollect.tasks.find_block
    import recollect.tasks.recall  # noqa: F401 (each registers its task)
    from recollect.comparison.defaults import defaults_of
    from recollect.comparison.user_modules import import_user_modules
    from recollect.kernels import describe
    from recollect.mixers import MIXERS, PATTERNS, available
    from recollect.tasks.base import TASKS

    try:
        import_user_modules(imports or [])
    except ValueError as error:
        _refuse(error)

    def said(options: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={value}" for name, value in options.items())

    mixers = Table(
        Column("mixer", no_wrap=True),
        "what",
        "source",
        "state",
        title="Mixers: recollect compare TASK --mixers a,b",
        title_justify="left",
    )
    for name in available():
        mixers.add_row(name, MIXERS[name].summary, MIXERS[name].source, MIXERS[name].state)
    patterns = Table(
        Column("pattern", no_wrap=True),
        "what",
        "source",
        "layers, repeated over the depth",
        title="Patterns of layers, in the place of a mixer; a+b alternates any two mixers",
        title_justify="left",
    )
    for name, pattern in PATTERNS.items():
        layers = [turn if isinstance(turn, str) else said(turn) for turn in pattern.layers]
        patterns.add_row(name, pattern.summary, pattern.source, " | ".join(layers))
    tasks = Table(
        Column("task", no_wrap=True),
        "what",
        "options (--task-option name=value)",
        title="Tasks: recollect compare TASK",
        title_justify="left",
    )
    for name, cls in sorted(TASKS.items()):
        fields = {f.name: f.default for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        tasks.add_row(name, (cls.__doc__ or "").strip().splitlines()[0], said({**fields, **defaults_of(name).task_options}))
    text = said(defaults_of("text").task_options)
    tasks.add_row("text", "any UTF-8 text, byte by byte: --data FILE, folder or glob", text)
    console = Console()
    console.print(mixers)
    console.print(patterns)
    console.print(tasks)
    console.print(f"Multi-Token Attention on the CPU: {describe()}", markup=False, highlight=False)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A model of `recollect compare text`: OUT/runs/LABEL-seedK/model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="Bytes to generate.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest byte.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    memory: Annotated[Path | None, typer.Option(help="What the model has read before: a file of `recollect remember`.")] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers the model's mixers.")
    ] = None,
) -> None:
    """Continue a text with a byte-level model."""
    try:
        _one_thread()
        from recollect.comparison.generation import continue_text

        text = continue_text(
            model, prompt, n_tokens=tokens, temperature=temperature, seed=seed, memory=memory, imports=imports or []
        )
    except (ValueError, TypeError, OSError) as error:
        _refuse(error)
    print(text)


@app.command()
def remember(
    model: Annotated[Path, typer.Argument(help="A model of `recollect compare text`: OUT/runs/LABEL-seedK/model.")],
    text: Annotated[list[Path], typer.Option(help="Text file to read, however long; repeatable, read in order.")],
    save: Annotated[Path | None, typer.Option(help="File for the memory; leave it out to see only the numbers.")] = None,
    load: Annotated[Path | None, typer.Option(help="Memory to go on from.", show_default="an empty one")] = None,
    piece: Annotated[int, typer.Option(help="Bytes read at a time; changes no result.")] = 512,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers the model's mixers.")
    ] = None,
) -> None:
    """Read texts into a byte-level model's memory and keep it in a file.

    The file is for this model only. `recollect generate --memory` goes on from it, and so does `--load`, with the results of
    an uninterrupted reading. Bits per byte tell how well the texts were predicted: with --load, what the memory is worth.
    """
    from rich.console import Console
    from rich.progress import Progress

    try:
        _one_thread()
        from recollect.comparison.remembering import remember_files

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("reading", total=sum(file.stat().st_size for file in text if file.is_file()))
            result = remember_files(
                model,
                text,
                load=load,
                save=save,
                piece=piece,
                progress=lambda n_bytes: bar.advance(task, n_bytes),
                imports=imports or [],
            )
    except KeyboardInterrupt:
        print("recollect: interrupted; no memory was written", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        _refuse(error)
    print(f"read {result.n_bytes:,} bytes at {result.bits_per_byte:.4f} bits per byte")
    print(f"the memory has seen {result.n_seen:,} tokens and takes {result.state_bytes:,} bytes")
    if save is not None:
        print(f"written to {save}")


def _one_thread() -> None:
    """Nothing here is large enough for two threads, and idle ones that spin on busy cores cost up to 300 times (workers see to it
    themselves, by OMP_WAIT_POLICY)."""
    import torch

    torch.set_num_threads(1)


def _as_interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _refuse(error: Exception, *, status: int = USER_ERROR) -> NoReturn:
    """One sentence on stderr, and the exit status."""
    from recollect.comparison.folder import explain

    print(f"recollect: {explain(error)}", file=sys.stderr)
    raise SystemExit(status) from None


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
