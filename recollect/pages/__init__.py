"""What reports are put into: HTML pages that need nothing but themselves, no network and no other file."""

from recollect.pages.document import asset, page, script_json, section
from recollect.pages.packing import packed
from recollect.pages.parts import Cell, command, folded, note, notes, picture, row, table

__all__ = [
    "Cell",
    "asset",
    "command",
    "folded",
    "note",
    "notes",
    "packed",
    "page",
    "picture",
    "row",
    "script_json",
    "section",
    "table",
]
