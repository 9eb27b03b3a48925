"""From paths, folders and globs to documents: bytes of valid UTF-8, read in a fixed order, with errors that name the file.

A text file is one document. A `.jsonl` file holds one document per line, in the field "text".
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

# Taken from folders; a file that is named itself, or matched by a glob, may end in anything.
SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_files(paths: Paths) -> list[Path]:
    """The files that `paths` mean, each once: in the order given, sorted inside a folder or glob.

    Args:
        paths: one or several of: a file; a folder, read recursively (endings of SUFFIXES, hidden and empty files passed over);
            a glob ("**" means any depth), whose matches are files or folders.
    Raises:
        ValueError: a path that does not exist or cannot be looked at, a folder or glob without any text file, no path at all.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise ValueError("no data path given; name at least one text file, folder or glob")
    found: dict[Path, Path] = {}
    for path in map(Path, given):
        try:
            files = _expand(path)
        except OSError as error:
            raise ValueError(f"cannot look at {error.filename or path}: {error.strerror or error}") from error
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = _walk(path)
        if not files:
            raise ValueError(f"folder {path} has no text file (endings {', '.join(SUFFIXES)}); name a file or a glob instead")
        return files
    if path.exists():
        raise ValueError(f"{path} is neither a regular file nor a folder; save the text to a file first")
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match]) if _is_worth_reading(file)]
        if not files:
            raise ValueError(f"no file matches {path}")
        return files
    raise ValueError(f"no such file or folder: {path}")


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if name.endswith(SUFFIXES) and not name.startswith(".") and _is_worth_reading(file):
                found.append(file)
    return sorted(found)


def _is_worth_reading(file: Path) -> bool:
    """A regular file with content; also a dangling link, so that reading it says so."""
    return not file.exists() or (file.is_file() and file.stat().st_size > 0)


def read_documents(files: Sequence[Path]) -> Iterator[bytes]:
    """The non-empty documents of `files`, in order, as valid UTF-8.

    Raises:
        ValueError: a file that cannot be read, is empty or is not UTF-8 (with the offset of the first bad byte); a JSON line
            that cannot be read or has no string "text" (with its number).
    """
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
        if not content:
            raise ValueError(f"{file} is empty; leave it out")
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = f"byte 0x{content[error.start]:02x} at offset {error.start}"
            raise ValueError(f"{file} is not UTF-8: {bad} ({error.reason}); convert the file or leave it out") from error
        if file.suffix == ".jsonl":
            yield from _json_lines(file, content)
        else:
            yield content


def _json_lines(file: Path, content: bytes) -> Iterator[bytes]:
    # Lines end at "\n" only: str.splitlines would also cut at U+2028 inside a text.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error.msg} at column {error.colno}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = f"its fields are {sorted(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
            raise ValueError(f'{file}, line {number} has no string field "text"; {has}')
        try:
            document = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{file}, line {number} has half a surrogate pair at character {error.start}") from error
        if document:
            yield document
