"""Reading the files that users give to tasks: text, and rows that are lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_text(option: str, path: str | Path) -> str:
    """The text of a UTF-8 file.

    Args:
        option: what users call this file; for messages.
    Raises:
        ValueError: it cannot be read; names the option, the file and the reason.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read as a UTF-8 text file: {error}") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that are not blank. Only a line feed ends a line: rows of JSON may hold the other signs that
    `str.splitlines` takes for ends."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
