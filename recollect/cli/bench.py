"""`recollect bench`."""

from __future__ import annotations

import difflib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recollect.cli.shared import INTERRUPTED, SOME_FAILED, app, as_interrupt, refuse, say

if TYPE_CHECKING:
    from recollect.bench.setting import Setting

ALL = "all"


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="mta, miras, decode, train or all.")] = ALL,
    lengths: Annotated[str | None, typer.Option(help="Tokens, comma-separated.", show_default="512,1024,...,65536")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of every timing; the median is shown with the lowest and highest.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, float64.", show_default="bfloat16 on a GPU, else float32")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    heads: Annotated[int | None, typer.Option(help="Heads.", show_default="16 (mta, decode), 8 (miras, train)")] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Channels of a head.", show_default="96 (mta, decode), 64 (miras, train)")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a step may take; a contender that takes longer stops there.", show_default="10, on a GPU 5"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on the CPU.", show_default="torch's own")] = None,
    contenders: Annotated[
        str | None, typer.Option(help="Comma-separated names; --list shows them.", show_default="all that can run")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for rows, tables and pictures; what is measured there already is not measured again.")
    ] = Path("bench-out"),
    show: Annotated[bool, typer.Option("--list", help="List the contenders and whether they can run here, and exit.")] = False,
) -> None:
    """Time attention and memories side by side: right before fast, in turn, against the machine's floor.

    Every contender is compared with its oracle first and timed only if it is right. The same command goes on after an interruption.
    """
    signal.signal(signal.SIGTERM, as_interrupt)
    from rich.console import Console

    progress = Console(stderr=True, force_terminal=False if os.environ.get("CI") else None)
    wrong = False
    try:
        names = _suites(suite)
        settings = _settings(names, device, dtype, batch, heads, head_dim, repeats, limit, threads)
        tokens = _lengths(lengths)
        only = None if contenders is None else [name.strip() for name in contenders.split(",")]
        if only is not None:
            from recollect.bench import suites  # noqa: F401 (registers the contenders)
            from recollect.bench.contenders import check_names

            check_names(names, only)
        if show:
            _list(settings, only)
            return
        out.mkdir(parents=True, exist_ok=True)
        for setting in settings:
            wrong |= _run(setting, tokens, only, out, progress)
    except KeyboardInterrupt:
        say(progress, f"interrupted; finished rows are kept in {out}. To go on, run the same command again")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    if wrong:
        raise SystemExit(SOME_FAILED)


def _run(setting: Setting, lengths: list[int], only: list[str] | None, out: Path, progress: Any) -> bool:
    """Measure a suite and print it; whether a contender is wrong or failed."""
    import torch

    from recollect import terminal
    from recollect.bench import floor, report
    from recollect.bench.contenders import chosen
    from recollect.bench.memory import probe
    from recollect.bench.rows import FAILED, WRONG, Rows
    from recollect.bench.runner import Runner
    from recollect.bench.suites import SUITES as REGISTERED
    from recollect.training.folder import Busy, locked

    entered = chosen(setting.suite, only)
    if not entered:  # --contenders names those of other suites
        return False
    torch.set_num_threads(setting.threads)
    if torch.device(setting.device).index is not None:
        torch.cuda.set_device(setting.device)  # Triton launches on the current one
    try:
        with locked(out):
            rows = Rows(out, setting)
            rates = floor.rates(setting.device, setting.precision)
            runner = Runner(setting, REGISTERED[setting.suite], rows, rates, lambda line: say(progress, line), probe)
            runner.run(entered, lengths)
            shown = report.write(out, setting, rows, [contender.name for contender in entered], rates)
    except Busy as error:
        raise ValueError(str(error)) from error
    terminal.show(*shown)
    print(f"rows: {rows.path}; picture: {out / setting.suite}.png\n")
    return any(row["status"] in (WRONG, FAILED) for row in rows.rows)


def _suites(suite: str) -> list[str]:
    from recollect.bench.setting import SIZES

    if suite == ALL:
        return list(SIZES)
    if suite not in SIZES:
        near = difflib.get_close_matches(suite, (*SIZES, ALL), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown suite {suite!r}{hint} Suites: {', '.join((*SIZES, ALL))}")
    return [suite]


def _settings(
    suites: list[str],
    device: str,
    dtype: str | None,
    batch: int,
    heads: int | None,
    head_dim: int | None,
    repeats: int,
    limit: float | None,
    threads: int | None,
) -> list[Setting]:
    import torch

    from recollect.bench.setting import DTYPES, LIMITS, SIZES, Setting
    from recollect.training.world import find_device

    where = find_device(device)
    kind = torch.device(where).type
    if kind not in LIMITS:
        raise ValueError(f"--device is a CPU or a CUDA GPU; got {device!r}")
    precision = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if precision not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
    for name, value in (("batch", batch), ("heads", heads), ("head-dim", head_dim), ("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is at least 1; got {value}")
    if head_dim is not None and head_dim % 2:
        raise ValueError(f"--head-dim is even, for rotary positions; got {head_dim}")
    if limit is not None and not limit > 0:
        raise ValueError(f"--limit is a positive number of seconds; got {limit}")
    return [
        Setting(
            suite=suite,
            device=where,
            dtype=precision,
            batch=batch,
            heads=heads or SIZES[suite][0],
            head_dim=head_dim or SIZES[suite][1],
            repeats=repeats,
            limit=limit or LIMITS[kind],
            threads=threads or torch.get_num_threads(),
        )
        for suite in suites
    ]


def _lengths(words: str | None) -> list[int]:
    from recollect.bench.setting import LENGTHS

    if words is None:
        return list(LENGTHS)
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 2 or len(set(found)) < len(found):
        raise ValueError(f"--lengths are different whole numbers of at least 2, comma-separated (512,1024); got {words!r}")
    return sorted(found)


def _list(settings: list[Setting], only: list[str] | None) -> None:
    from rich.table import Table

    from recollect import terminal
    from recollect.bench import suites  # noqa: F401 (registers the contenders)
    from recollect.bench.contenders import chosen, missing

    table = Table("suite", "contender", "what", "here")
    for setting in settings:
        for contender in chosen(setting.suite, only):
            here = missing(contender, setting) or "; ".join(filter(None, ["yes", contender.note(setting)]))
            table.add_row(setting.suite, contender.name, contender.about, here)
    terminal.show(table)
