"""Pieces of HTML that several pages have. They escape the texts that they are given."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table that is set apart. text; kind: its CSS class."""

    text: str
    kind: str


def row(name: str, cells: Iterable[str | Cell], *, kind: str = "", before: str = "") -> str:
    """A line of a `table` as HTML.

    Args:
        name: text at its head.
        cells: texts.
        kind: CSS class of the line.
        before: HTML before the name.
    """
    inside = "".join(
        f"<td class='{cell.kind}'>{escape(cell.text)}</td>" if isinstance(cell, Cell) else f"<td>{escape(cell)}</td>"
        for cell in cells
    )
    start = f"<tr class='{kind}'>" if kind else "<tr>"
    return f"{start}<th scope='row'>{before}{escape(name)}</th>{inside}</tr>"


def table(caption: str, heads: Sequence[str], rows: Iterable[str], *, show_caption: bool = True) -> str:
    """A table in a box, scrolled sideways where the page is narrower.

    Args:
        caption: text above it.
        heads: texts of the head, the column of names included.
        rows: HTML lines, see `row`.
        show_caption: False: the caption names the table to screen readers alone.
    """
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in heads)
    return (
        f"<div class='box'>{f'<p>{escape(caption)}</p>' if show_caption else ''}"
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(caption)}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def note(text: str) -> str:
    """A small paragraph."""
    return f"<p class='note'>{escape(text)}</p>"


def notes(texts: Iterable[str], kind: str = "notes") -> str:
    """Sentences below each other; kind: "notes", small, or "warn", which is not overlooked."""
    return f"<ul class='{kind}'>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def command(text: str) -> str:
    """A command line that breaks between its words; "" where there is none."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in text.split())
    return f"<code>{words}</code>" if words else ""


def picture(data: bytes, alt: str) -> str:
    """A picture, SVG or PNG, as a part of the page; alt: what it shows, for who cannot see it."""
    kind = "png" if data.startswith(b"\x89PNG") else "svg+xml"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f"<div class='picture'><img alt='{escape(alt)}' src='{source}'></div>"


def folded(summary: str, value: object) -> str:
    """A value as indented JSON that opens on a click; what has no form in JSON is shown as its `str`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>{escape(summary)}</summary><pre class='plan'>{escape(text)}</pre></details>"
