"""`recollect compare`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from recollect.cli.shared import INTERRUPTED, SOME_FAILED, USER_ERROR, app, as_interrupt, one_thread, refuse, say

_DATA, _MODEL, _RECIPE, _RUN = "Data", "Model (default: the task's own)", "Recipe (default: the task's own)", "Running"
_BUDGET_HELP = (
    "Steps for every run (2000steps), or wall time for the WHOLE command (90s, 5m, 1h). Of a time, every mixer is timed for "
    "a moment, and the number of steps with which all runs together fit is fixed once and kept when the command is resumed. "
    "Every mixer gets the same number of steps, so the same data, unless --equal time."
)


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
    tokenizer: Annotated[
        str,
        typer.Option(help="bytes, or a tokenizer.json (see `recollect tokenizer train`; task text).", rich_help_panel=_DATA),
    ] = "bytes",
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
    precision: Annotated[
        str,
        typer.Option(help="fp32, or bf16: products of training in bf16, weights and evaluation in fp32.", rich_help_panel=_RUN),
    ] = "fp32",
    threads: Annotated[int, typer.Option(help="Threads of one run.", rich_help_panel=_RUN)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_RUN)] = "auto",
) -> None:
    """Train several mixers under the same budget and compare them: a table, learning curves and a page.

    The same command continues after an interruption, and ends with the numbers of an uninterrupted run.
    """
    signal.signal(signal.SIGTERM, as_interrupt)
    from rich.console import Console

    # A CI system's pseudo-terminal would fill its log with redrawn bars.
    progress = Console(stderr=True, force_terminal=False if os.environ.get("CI") else None)
    command = shlex.join(["recollect", *sys.argv[1:]])
    try:
        one_thread()
        from recollect.comparison import Request
        from recollect.comparison import compare as run
        from recollect.comparison.options import parse_options, split_outside

        request = Request(
            task=task,
            mixers=split_outside(mixers, ",") if mixers is not None else None,
            seeds=seeds,
            budget=budget,
            equal=equal,
            task_options=parse_options(task_option or [], of="--task-option"),
            data=data or [],
            eval_data=eval_data or [],
            tokenizer=tokenizer,
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
            precision=precision,
            threads=threads,
            device=device,
        )
        if jobs is not None and jobs < 1:
            raise ValueError(f"--jobs must be at least 1; got {jobs}")
        outcome = run(request, out=out, jobs=jobs, console=progress, command=command)
    except KeyboardInterrupt:
        say(progress, f"interrupted; to go on from the last checkpoints, run the same command again: {command}")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    except RuntimeError as error:
        refuse(error, status=SOME_FAILED)
    Console().print(outcome.table)
    print(f"report: {outcome.report}")
    for (label, seed), reason in outcome.failed.items():
        say(progress, f"failed: {label} seed {seed}: {reason}")
    if outcome.failed:
        from recollect.comparison.folder import DISK_FULL_TEXT

        raise SystemExit(USER_ERROR if DISK_FULL_TEXT in outcome.failed.values() else SOME_FAILED)
