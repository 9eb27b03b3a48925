"""What a comparison found: a table, a picture and a page, from the folder that `recollect compare` writes."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import RenderableType

from recollect.comparison.report import curves, page
from recollect.comparison.report.records import read
from recollect.comparison.report.table import ResultTable, markdown_table, plain

__all__ = ["markdown", "write"]


def write(out: Path) -> RenderableType:
    """Write table.txt, curves.png, curves.svg and report.html into `out`, from what is there so far.

    Runs that failed or have not finished are shown as such; each file replaces its older version in one move.

    Args:
        out: folder of a `recollect compare` run; must hold comparison.json.
    Returns:
        The table, for `rich.console.Console.print`; it fits any width.
    Raises:
        ValueError: `out` holds no comparison.
        OSError: a file cannot be written.
    """
    out = Path(out)
    comparison = read(out)
    temporary = {name: out / f".{name}.tmp{os.getpid()}" for name in ("table.txt", "curves.png", "curves.svg", "report.html")}
    try:
        temporary["table.txt"].write_text(plain(comparison), encoding="utf-8")
        curves.save(comparison, temporary["curves.png"], temporary["curves.svg"])
        temporary["report.html"].write_text(page.html(comparison), encoding="utf-8")
        for name, path in temporary.items():
            os.replace(path, out / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return ResultTable(comparison)


def markdown(out: Path) -> str:
    """The table as Markdown, for a README or a log.

    Raises:
        ValueError: `out` holds no comparison.
    """
    return markdown_table(read(Path(out)))
