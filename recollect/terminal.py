"""Texts and tables on a terminal, or in a text file."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType
from rich.table import Table

FILE_WIDTH = 160


def show(*parts: RenderableType) -> None:
    """Print texts and tables. A table with more columns than the terminal is wide is wrapped by it: what must stay on one line
    (`no_wrap`) is neither folded nor cut."""
    _print(Console(), parts)


def text(*parts: RenderableType) -> str:
    """The same without colours, for a file."""
    file = io.StringIO()
    _print(Console(file=file, width=FILE_WIDTH, color_system=None), parts)
    return file.getvalue()


def _print(console: Console, parts: tuple[RenderableType, ...]) -> None:
    own, wide = console.width, Console(file=io.StringIO(), width=1000)
    for part in parts:
        if isinstance(part, Table):
            for column in part.columns:
                if column.no_wrap:
                    column.min_width = max(wide.measure(cell).maximum for cell in (column.header, *column.cells))
        console.width = own if isinstance(part, str) else max(own, wide.measure(part).minimum)
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
