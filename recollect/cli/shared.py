"""What the commands share: the app, exit statuses, how an error is told."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

OK, SOME_FAILED, USER_ERROR, DIVERGED, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sequence models that attend to many tokens at once and that memorise at test time.",
)


@app.callback()
def _root() -> None:
    """A callback makes `recollect` a command of subcommands however few there are."""


def one_thread() -> None:
    """Nothing here is large enough for two threads, and idle ones that spin on busy cores cost up to 300 times (workers see to it
    themselves, by OMP_WAIT_POLICY)."""
    import torch

    torch.set_num_threads(1)


def as_interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def tell(error: Exception) -> None:
    """One sentence on stderr."""
    from recollect.comparison.folder import explain

    print(f"recollect: {explain(error)}", file=sys.stderr)


def refuse(error: Exception, *, status: int = USER_ERROR) -> NoReturn:
    """Tell the error and end with an exit status."""
    tell(error)
    raise SystemExit(status) from None


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
