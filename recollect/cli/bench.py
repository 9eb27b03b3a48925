"""`recollect bench`."""

from __future__ import annotations

import difflib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from recollect.cli.shared import INTERRUPTED, SOME_FAILED, app, as_interrupt, refuse, say

if TYPE_CHECKING:
    from recollect.bench.setting import Setting

ALL = "all"
THREADS_PER_CORE = 4  # more are no use, and torch ends with the process where it cannot start them


class Asked(NamedTuple):
    """What was typed of sizes, machine and patience; None: left out."""

    device: str
    dtype: str | None
    batch: int
    heads: int | None
    head_dim: int | None
    shape: str | None
    layers: int | None
    chunk: int | None
    repeats: int
    limit: float | None
    threads: int | None


class Found(NamedTuple):
    """Of a suite: whether a contender is wrong or failed, and whether there is a time of any."""

    wrong: bool
    measured: bool


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
    shape: Annotated[
        str | None,
        typer.Option(
            help="A published size (mta-880m, miras-340m, ...) that heads, layers and vocabulary are of.", show_default="none"
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Depth of the models of train and decode.", show_default="the shape's; else 6 (train), a layer alone (decode)"
        ),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Chunk size of Miras memories.", show_default="their own, 16")] = None,
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
    Exit status 1: a contender is wrong or failed, or nothing could be measured here.
    """
    signal.signal(signal.SIGTERM, as_interrupt)
    from rich.console import Console

    progress = Console(stderr=True, force_terminal=False if os.environ.get("CI") else None)
    wrong, measured = False, False
    try:
        names = _suites(suite)
        asked = Asked(device, dtype, batch, heads, head_dim, shape, layers, chunk, repeats, limit, threads)
        settings = _settings(names, asked)
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
            found = _run(setting, tokens, only, out, progress)
            wrong, measured = wrong or found.wrong, measured or found.measured
    except KeyboardInterrupt:
        say(progress, f"interrupted; finished rows are kept in {out}. To go on, run the same command again")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    if wrong or not measured:
        raise SystemExit(SOME_FAILED)


def _run(setting: Setting, lengths: list[int], only: list[str] | None, out: Path, progress: Any) -> Found:
    """Measure a suite and print it."""
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
        return Found(wrong=False, measured=False)
    torch.set_num_threads(setting.threads)
    if torch.device(setting.device).index is not None:
        torch.cuda.set_device(setting.device)  # Triton launches on the current one
    try:
        with locked(out):
            rows = Rows(out, setting)
            if rows.rates is None:
                rows.keep(floor.rates(setting.device, setting.precision))
            assert rows.rates is not None
            rates = rows.rates
            runner = Runner(setting, REGISTERED[setting.suite], rows, rates, lambda line: say(progress, line), probe)
            runner.run(entered, lengths)
            names = [contender.name for contender in entered]
            shown = report.write(out, setting, rows, names, rates)
    except Busy as error:
        raise ValueError(str(error)) from error
    terminal.show(*shown)
    measured = report.measured(rows, names)
    if measured:
        print(f"rows: {rows.path}; picture: {out / setting.suite}.png\n")
    else:
        print(f"{setting.suite}: nothing could be measured here, for the reasons above; rows: {rows.path}\n")
    return Found(wrong=any(row["status"] in (WRONG, FAILED) for row in rows.rows), measured=measured)


def _suites(suite: str) -> list[str]:
    from recollect.bench.setting import SIZES

    if suite == ALL:
        return list(SIZES)
    if suite not in SIZES:
        near = difflib.get_close_matches(suite, (*SIZES, ALL), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown suite {suite!r}{hint} Suites: {', '.join((*SIZES, ALL))}")
    return [suite]


def _settings(suites: list[str], asked: Asked) -> list[Setting]:
    import torch

    from recollect.bench.setting import DTYPES, LIMITS, Setting
    from recollect.training.world import find_device

    where = find_device(asked.device)
    kind = torch.device(where).type
    if kind not in LIMITS:
        raise ValueError(f"--device is a CPU or a CUDA GPU; got {asked.device!r}")
    precision = asked.dtype or ("bfloat16" if kind == "cuda" else "float32")
    if precision not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}; got {asked.dtype!r}")
    for name in ("batch", "heads", "head_dim", "layers", "chunk", "repeats", "threads"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is at least 1; got {value}")
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if asked.threads is not None and asked.threads > most:
        raise ValueError(f"--threads is at most {most} here, {THREADS_PER_CORE} for each core; got {asked.threads}")
    if asked.head_dim is not None and asked.head_dim % 2:
        raise ValueError(f"--head-dim is even, for rotary positions; got {asked.head_dim}")
    if asked.limit is not None and not asked.limit > 0:
        raise ValueError(f"--limit is a positive number of seconds; got {asked.limit}")
    return [
        Setting(
            suite=suite,
            device=where,
            dtype=precision,
            batch=asked.batch,
            repeats=asked.repeats,
            limit=asked.limit or LIMITS[kind],
            threads=asked.threads or torch.get_num_threads(),
            **_sizes(suite, suites, asked),
        )
        for suite in suites
    ]


def _sizes(suite: str, suites: list[str], asked: Asked) -> dict[str, Any]:
    """The fields of a suite's Setting that say how large what is timed is.

    Raises:
        ValueError: an unknown shape, sizes beside a shape, or an option that none of the suites has.
    """
    from recollect.bench.setting import LAYERS, SIZES

    has_models, has_chunks = ("train", "decode"), ("miras", "train", "decode")
    for name, value, having in (("layers", asked.layers, has_models), ("chunk", asked.chunk, has_chunks)):
        if value is not None and not set(suites) & set(having):
            raise ValueError(f"--{name} is of the suites {', '.join(having)}; {suite} has none")
    heads, head_dim = asked.heads or SIZES[suite][0], asked.head_dim or SIZES[suite][1]
    sizes: dict[str, Any] = {"layers": LAYERS.get(suite, 0)}
    if asked.shape is not None:
        if asked.heads is not None or asked.head_dim is not None:
            raise ValueError("--shape says what --heads and --head-dim are; leave them out")
        from recollect.models import size

        config = size(asked.shape)
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        sizes = {"shape": asked.shape, "layers": config.num_hidden_layers}
        sizes |= {"vocabulary": config.vocab_size, "intermediate": config.intermediate_size}
    if suite not in has_models:
        sizes = {"shape": sizes.get("shape", "")}
    elif asked.layers is not None:
        sizes["layers"] = asked.layers
    chunk = asked.chunk if suite in has_chunks else None
    return {"heads": heads, "head_dim": head_dim, "chunk": chunk, **sizes}


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
            here = "; ".join(filter(None, [missing(contender, setting) or "yes", contender.note(setting)]))
            table.add_row(setting.suite, contender.name, contender.about, here)
    terminal.show(table)
