"""`recollect list`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from recollect.cli.shared import app, refuse


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

    from recollect.comparison.defaults import defaults_of
    from recollect.comparison.written import OPTIONS
    from recollect.kernels import describe, describe_gpu, describe_recurrences
    from recollect.mixers import MIXERS, PATTERNS, available
    from recollect.tasks import TASKS, TEXT_TASKS
    from recollect.user_modules import import_user_modules

    try:
        import_user_modules(imports or [])
    except ValueError as error:
        refuse(error)

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
    written = {name: option.default for name, option in OPTIONS.items()}
    for name, cls in sorted({**TASKS, **TEXT_TASKS}.items()):
        fields = {f.name: f.default for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        options = {**fields, **(written if name in TEXT_TASKS else {}), **defaults_of(name).task_options}
        tasks.add_row(name, (cls.__doc__ or "").strip().splitlines()[0], said(options))
    text = said(defaults_of("text").task_options)
    tasks.add_row("text", "any UTF-8 text, in bytes or a tokenizer's tokens: --data FILE, folder or glob", text)
    console = Console()
    console.print(mixers)
    console.print(patterns)
    console.print(tasks)
    console.print(f"Multi-Token Attention and perceptron memories on the CPU: {describe()}", markup=False, highlight=False)
    console.print(f"Multi-Token Attention and perceptron memories on a GPU: {describe_gpu()}", markup=False, highlight=False)
    console.print(f"Linear recurrences and delta rules on a GPU: {describe_recurrences()}", markup=False, highlight=False)
