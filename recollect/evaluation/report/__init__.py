"""What an evaluation found: a table, a picture and a page, written beside the rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from recollect.evaluation.report import figure, page, table
from recollect.evaluation.report.summary import with_margins
from recollect.evaluation.runner import PLAN
from recollect.evaluation.suites.base import Result, Suite
from recollect.training.checkpoint import replace_file

__all__ = ["write"]


def write(out: Path, suite: Suite, results: Sequence[Result], *, command: str = "") -> RenderableType:
    """Write table.txt, table.md, figure.png, figure.svg and report.html into `out`; each replaces its older version in one move.

    Args:
        out: folder of an evaluation.
        suite: what was asked.
        results: at least one.
        command: how to run it again; shown on the page.
    Returns:
        The table, for `rich.console.Console.print`.
    Raises:
        OSError: a file cannot be written.
    """
    plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    found = with_margins(suite, results)
    drawn = figure.draw(suite, results, f"{suite.name}: {plan.get('path', '')}")
    pictures = figure.files(drawn)
    files = {
        "table.txt": table.plain(suite, found).encode(),
        "table.md": table.markdown(suite, found).encode(),
        **pictures,
        "report.html": page.html(suite, results, found, plan, pictures["figure.svg"], command).encode(),
    }
    for name, data in files.items():
        replace_file(out / name, data)
    return table.table(suite, found)
