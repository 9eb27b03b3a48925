"""`recollect reproduce`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from recollect.cli.shared import INTERRUPTED, SOME_FAILED, app, as_interrupt, one_thread, refuse, say


@app.command()
def reproduce(
    experiment: Annotated[
        str | None, typer.Argument(help="One of the papers' experiments; without it they are listed.")
    ] = None,
    scale: Annotated[str, typer.Option(help="tiny: minutes on two cores; small: hours; paper: writes the commands.")] = "tiny",
    seeds: Annotated[int, typer.Option(help="Runs of every model.")] = 1,
    data: Annotated[
        list[str] | None, typer.Option(help="Text to train on, where the experiment needs one; repeatable.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: a file that the experiment asks about where it is given (see its notes); repeatable."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Steps of every run (300steps), instead of the scale's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="reproductions/EXPERIMENT-SCALE")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time.", show_default="one per core; on a GPU 1")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Run an experiment of the papers and print measured beside published numbers.

    The same command continues after an interruption; finished runs are reused.
    """
    signal.signal(signal.SIGTERM, as_interrupt)
    from rich.console import Console

    progress = Console(stderr=True, force_terminal=False if os.environ.get("CI") else None)
    try:
        one_thread()
        from recollect import terminal
        from recollect.reproduction import SCALES, find, report
        from recollect.reproduction.paper import write_paper
        from recollect.reproduction.runner import run

        if experiment is None:
            _list()
            return
        found = find(experiment)
        if scale not in SCALES:
            raise ValueError(f"scale is one of {', '.join(SCALES)}; got {scale!r}")
        if seeds < 1:
            raise ValueError(f"--seeds is at least 1; got {seeds}")
        folder = out or Path("reproductions") / f"{found.name}-{scale}"
        if scale == "paper":
            path = write_paper(found, folder)
            print(path.read_text(encoding="utf-8"), end="")
            print(f"written to {path}", file=sys.stderr)
            return
        measured = run(
            found,
            scale,
            folder,
            seeds=seeds,
            text=data or [],
            files=_files(file or []),
            jobs=jobs,
            device=device,
            overrides={} if budget is None else {"budget": budget},
            console=progress,
        )
        shown = report.write(folder, found, scale, measured)
    except KeyboardInterrupt:
        say(progress, "interrupted; to go on, run the same command again")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    except RuntimeError as error:
        refuse(error, status=SOME_FAILED)
    terminal.show(*shown)
    print(f"report: {folder / 'report.html'}")
    if any(None in values for column in measured.columns for values in column.cells.values()):
        raise SystemExit(SOME_FAILED)


def _files(given: list[str]) -> dict[str, str]:
    """NAME=PATH of each.

    Raises:
        ValueError: no name or no path.
    """
    pairs = [(each, *each.partition("=")) for each in given]
    for each, name, _, path in pairs:
        if not (name and path):
            raise ValueError(f"--file is NAME=PATH, as lambada=lambada.jsonl; got {each!r}")
    return {name: path for _, name, _, path in pairs}


def _list() -> None:
    from rich.table import Table

    from recollect import terminal
    from recollect.reproduction import EXPERIMENTS

    table = Table("experiment", "what")
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.about)
    terminal.show(table)
