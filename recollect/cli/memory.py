"""`recollect generate` and `recollect remember`: using a model of text and what it remembers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from recollect.cli.shared import INTERRUPTED, app, one_thread, refuse

_MODEL = "OUT of a `recollect train`, OUT/runs/LABEL-seedK of a `recollect compare text`, or a model's folder."


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help=_MODEL)],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate; of a byte-level model these are bytes.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    memory: Annotated[Path | None, typer.Option(help="What the model has read before: a file of `recollect remember`.")] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers the model's mixers.")
    ] = None,
) -> None:
    """Continue a text."""
    try:
        one_thread()
        from recollect.inference.generation import continue_text

        text = continue_text(
            model, prompt, n_tokens=tokens, temperature=temperature, seed=seed, memory=memory, imports=imports or []
        )
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    print(text)


@app.command()
def remember(
    model: Annotated[Path, typer.Argument(help=_MODEL)],
    text: Annotated[list[Path], typer.Option(help="Text file to read, however long; repeatable, read in order.")],
    save: Annotated[Path | None, typer.Option(help="File for the memory; leave it out to see only the numbers.")] = None,
    load: Annotated[Path | None, typer.Option(help="Memory to go on from.", show_default="an empty one")] = None,
    piece: Annotated[int, typer.Option(help="Tokens read at a time; changes no result.")] = 512,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module or .py file that registers the model's mixers.")
    ] = None,
) -> None:
    """Read texts into a model's memory and keep it in a file.

    The file is for this model only. `recollect generate --memory` goes on from it, and so does `--load`, with the results of
    an uninterrupted reading. Bits per byte tell how well the texts were predicted: with --load, what the memory is worth.
    """
    from rich.console import Console
    from rich.progress import Progress

    try:
        one_thread()
        from recollect.inference.remembering import remember_files

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
        refuse(error)
    print(f"read {result.n_bytes:,} bytes at {result.bits_per_byte:.4f} bits per byte")
    print(f"the memory has seen {result.n_seen:,} tokens and takes {result.state_bytes:,} bytes")
    if save is not None:
        print(f"written to {save}")
