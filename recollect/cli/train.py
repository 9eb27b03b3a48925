"""`recollect train` and `recollect tokenizer`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recollect.cli.shared import DIVERGED, OK, STOPPED, USER_ERROR, app, refuse, tell

if TYPE_CHECKING:
    from recollect.training.recipe.settings import RunSettings

tokenizer_app = typer.Typer(no_args_is_help=True, help="Tokenizers for `recollect train`.")
app.add_typer(tokenizer_app, name="tokenizer")


def _help(context: typer.Context, wanted: bool) -> None:
    """The usual help, and every setting of a run."""
    if wanted:
        from recollect.training.recipe.explain import explain

        print(context.get_help())
        print(explain())
        raise typer.Exit


@app.command(add_help_option=False)
def train(
    run: Annotated[str | None, typer.Argument(help="RUN.yaml, or the name of a recipe.", metavar="RUN.yaml|RECIPE")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file: optimiser.lr=1e-3", metavar="[KEY=VALUE]...")
    ] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the recipes that are shipped and exit.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the whole run as YAML and exit.")] = False,
    help_: Annotated[
        bool, typer.Option("--help", help="Explain this command and every setting.", callback=_help, is_eager=True)
    ] = False,
) -> None:
    """Train a model as RUN.yaml or a recipe says, on one process or on those that torchrun starts.

    The same command goes on from the last checkpoint after an interruption.
    SIGTERM and Ctrl-C save a checkpoint first. Exit status: 0 finished, 75 stopped (run it again), 2 the run is wrong, 3 it diverged.
    """
    from recollect.training.recipe.load import dump_run, load_run

    if recipes:
        _list_recipes()
        return
    try:
        if run is None:
            raise ValueError("which run? Give RUN.yaml or the name of a recipe; `recollect train --recipes` lists them")
        loaded = load_run(run, settings or [])
        if show:
            print(dump_run(loaded), end="")
            return
    except (ValueError, OSError) as error:
        refuse(error)
    status = _train(loaded)
    # Skip interpreter teardown: threads of gloo and of loggers may abort there, and everything is on the disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@tokenizer_app.command("train")
def tokenizer_train(
    text: Annotated[list[str], typer.Argument(help="Text files, folders or globs.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("tokenizer.json"),
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, the one that starts a document included.")] = 8192,
) -> None:
    """Train a byte-level BPE on your own text; `recollect train RUN.yaml data.tokenizer=tokenizer.json` uses it."""
    try:
        from recollect.data.tokenizer import load_tokenizer, train_tokenizer

        train_tokenizer(text, vocab_size=vocab_size, out=out)
        print(f"written to {out}: {load_tokenizer(out).vocab_size:,} tokens")
    except (ValueError, OSError) as error:
        refuse(error)


def _train(run: RunSettings) -> int:
    """The exit status of a run."""
    from recollect.training.folder import Busy
    from recollect.training.loop import NonFiniteLoss
    from recollect.training.trainer import run_training, training_config

    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    live = sys.stderr.isatty() and not os.environ.get("CI")
    try:
        progress = run_training(run, should_stop=lambda: bool(asked), say=lambda line: print(line, flush=True), live=live)
    except NonFiniteLoss as error:
        print(f"recollect: {error}; the last checkpoint is in {run.out}", file=sys.stderr)
        return DIVERGED
    except (ValueError, TypeError, OSError, Busy) as error:
        tell(error)
        return USER_ERROR
    return OK if progress.step == training_config(run).steps else STOPPED


def _list_recipes() -> None:
    from rich.console import Console
    from rich.table import Table

    from recollect.training.recipe.load import recipes

    table = Table("recipe", "what")
    for name, about in recipes().items():
        table.add_row(name, about)
    Console().print(table)
