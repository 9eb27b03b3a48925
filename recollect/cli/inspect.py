"""`recollect inspect`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from recollect.cli.shared import INTERRUPTED, app, one_thread, refuse

_MODEL = (
    "OUT of a `recollect train`, OUT/runs/LABEL-seedK of a `recollect compare text`, the folder of any causal model of transformers "
    "(retrofitted or not), or its name on the Hugging Face hub."
)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    text: Annotated[Path, typer.Option(help="UTF-8 file that the model reads from its beginning.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("inspection.html"),
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to read, document start included.", show_default="1024, or the model's context")
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Layer to look into, counted from 0; repeatable.", show_default="all")
    ] = None,
    pool: Annotated[
        str, typer.Option(help="What a cell of the map of a long text shows: max (the strongest entry in it) or mean.")
    ] = "max",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "cpu",
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers the model's mixers; repeatable.")
    ] = None,
) -> None:
    """Show what a model does with a text, on one page that needs no network.

    Attention maps before and after every convolution and head mixing, kernels with their pattern named, head-mixing matrices; of
    memories surprise, write strength, retention, reads and the memory's norm at every token, and which tokens a read draws from.
    """
    from rich.console import Console
    from rich.progress import Progress

    command = shlex.join(["recollect", *sys.argv[1:]])
    try:
        one_thread()
        if not out.absolute().parent.is_dir():  # now, not after minutes of work
            raise ValueError(f"{out} cannot be written: there is no folder {out.absolute().parent}")
        if pool not in ("max", "mean"):
            raise ValueError(f"--pool is max or mean; got {pool!r}")
        words = _read(text)
        from recollect.evaluation.loading import load_language_model
        from recollect.inspection import html, inspect_text

        loaded = load_language_model(model, imports=imports or [], device=device)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("looking", total=None)
            found = inspect_text(
                loaded.model,
                loaded.coder,
                words,
                n_tokens=tokens,
                layers=layer or None,
                pool=pool,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        out.write_text(html(found, model=Path(model).resolve().name, text=text.name, command=command), encoding="utf-8")
    except KeyboardInterrupt:
        print("recollect: interrupted; no page was written", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    print(f"{len(found.tokens):,} tokens, {out.stat().st_size / 2**20:.1f} MiB: {out}")


def _read(path: Path) -> str:
    """The text of a file, in the words of `recollect` where it is none."""
    if not path.is_file():
        raise ValueError(f"--text {path}: there is no such file")
    try:
        words = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8: {error.reason} at offset {error.start}; convert the file") from error
    if not words:
        raise ValueError(f"--text {path} is empty; give a file with text in it")
    return words
