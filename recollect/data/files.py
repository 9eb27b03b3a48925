"""From paths, folders and globs to documents: bytes of valid UTF-8, read in a fixed order, with errors that name the file.

A text file is one document. A `.jsonl` file holds one document per line, a `.parquet` file one per row, in a field of text. Any of
them may be compressed (`.gz`, `.zst`).
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from recollect.data.formats import COMPRESSIONS, kind_of, open_file, parquet_texts

# Taken from folders; a file that is named itself, or matched by a glob, may end in anything.
SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")
# The same with all that `read_documents` can read.
ALL_SUFFIXES = tuple(end + packed for end in (*SUFFIXES, ".parquet") for packed in ("", *COMPRESSIONS))

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_files(paths: Paths, *, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files that `paths` mean, each once: in the order given, sorted inside a folder or glob.

    Args:
        paths: one or several of: a file; a folder, read recursively (endings of `suffixes`, hidden and empty files passed over);
            a glob ("**" means any depth), whose matches are files or folders.
        suffixes: endings of the files that are taken from folders.
    Raises:
        ValueError: a path that does not exist or cannot be looked at, a folder or glob without any text file, no path at all.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise ValueError("no data path given; name at least one text file, folder or glob")
    found: dict[Path, Path] = {}
    for path in map(Path, given):
        try:
            files = _expand(path, suffixes)
        except OSError as error:
            raise ValueError(f"cannot look at {error.filename or path}: {error.strerror or error}") from error
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _expand(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = _walk(path, suffixes)
        if not files:
            raise ValueError(f"folder {path} has no text file (endings {', '.join(suffixes)}); name a file or a glob instead")
        return files
    if path.exists():
        raise ValueError(f"{path} is neither a regular file nor a folder; save the text to a file first")
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [file for match in matches for file in (_walk(match, suffixes) if match.is_dir() else [match])]
        files = [file for file in found if _is_worth_reading(file)]
        if not files:
            raise ValueError(f"no file matches {path}")
        return files
    raise ValueError(f"no such file or folder: {path}")


def _walk(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if name.endswith(suffixes) and not name.startswith(".") and _is_worth_reading(file):
                found.append(file)
    return sorted(found)


def _is_worth_reading(file: Path) -> bool:
    """A regular file with content; also a dangling link, so that reading it says so."""
    return not file.exists() or (file.is_file() and file.stat().st_size > 0)


def read_documents(files: Sequence[Path], *, field: str = "text") -> Iterator[bytes]:
    """The non-empty documents of `files`, in order, as valid UTF-8.

    Args:
        files: what `find_files` found.
        field: field (.jsonl) or column (.parquet) that holds the text.
    Raises:
        ValueError: a file that cannot be read, is damaged, empty or not UTF-8 (with the offset of the first bad byte); a JSON
            line that cannot be read or has no string in `field` (with its number); a missing package (with its name).
    """
    for file in files:
        with _naming(file):
            if file.stat().st_size == 0:
                raise ValueError(f"{file} is empty; leave it out")
            kind = kind_of(file)
            if kind == ".parquet":
                texts = parquet_texts(file, field)
            elif kind == ".jsonl":
                texts = _json_lines(file, field)
            else:
                texts = iter([_whole(file)])
            yield from (text for text in texts if text)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of the system and of decompression, with the file's name."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: it is damaged or cut short ({error}); restore it or leave it out") from error
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error


def _whole(file: Path) -> bytes:
    with open_file(file) as stream:
        content = stream.read()
    _check_utf8(content, str(file))
    return content


def _check_utf8(content: bytes, what: str) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{what} is not UTF-8: {bad} ({error.reason}); convert the file or leave it out") from error


def _json_lines(file: Path, field: str) -> Iterator[bytes]:
    with open_file(file) as stream:
        # A binary stream's lines end at "\n" only: str.splitlines would also cut at U+2028 inside a text.
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_text(line, f"{file}, line {number}", field)


def _json_text(line: bytes, where: str, field: str) -> bytes:
    """The text of one JSON line."""
    _check_utf8(line, where)
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = f"its fields are {sorted(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        raise ValueError(f'{where} has no string field "{field}"; {has}')
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair at character {error.start}") from error
