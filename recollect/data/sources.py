"""Sources of text as the settings name them: their files, their documents in a fixed order, their names, what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from recollect.data.files import ALL_SUFFIXES, find_files, read_documents
from recollect.data.formats import COMPRESSIONS, kind_of
from recollect.data.settings import SourceSettings


def source_files(source: SourceSettings) -> list[Path]:
    """The files of a source of paths, in their fixed order.

    Raises:
        ValueError: paths and dataset both given, or neither; bad paths (see `files.find_files`).
    """
    if bool(source.paths) == bool(source.dataset):
        what = "both `paths` and `dataset`" if source.paths else "neither `paths` nor `dataset`"
        raise ValueError(f"source {source.name or ''!r} has {what}; give one of them")
    return find_files(source.paths, suffixes=ALL_SUFFIXES)


def documents(source: SourceSettings) -> Iterator[str]:
    """The documents of a source of paths, in a fixed order; empty ones are left out.

    Raises:
        ValueError: as `source_files` and `files.read_documents`.
    """
    for document in read_documents(source_files(source), field=source.field):
        yield document.decode("utf-8")


def names_of(sources: Sequence[SourceSettings]) -> list[str]:
    """A name for each source, all different: the given one, else that of the dataset, file, folder or first path.

    Raises:
        ValueError: the same name given twice.
    """
    given = [source.name for source in sources if source.name]
    twice = {name for name in given if given.count(name) > 1}
    if twice:
        raise ValueError(f"two sources have the name {min(twice)!r}; give each its own")
    taken = set(given)
    names = []
    for source in sources:
        name = source.name
        if not name:
            plain = _plain_name(source)
            tries = (plain if i == 1 else f"{plain}-{i}" for i in range(1, len(sources) + 2))
            name = next(candidate for candidate in tries if candidate not in taken)
            taken.add(name)
        names.append(name)
    return names


def _plain_name(source: SourceSettings) -> str:
    if source.dataset:
        return Path(source.dataset).name + (f"/{source.config}" if source.config else "")
    path = Path(source.paths[0]) if source.paths else Path("text")
    if any(letter in path.name for letter in "*?["):
        path = path.parent
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return (path.name if path.is_dir() else path.stem) or "text"


def fingerprint_files(files: Sequence[Path], *, remembered: Path | None = None) -> str:
    """sha256 of the contents of files and of their kinds, in order, 64 hex digits; their names and places do not count.

    Args:
        files: the files.
        remembered: a JSON file of digests by path, size and time of change, kept up to date, so that files that have not changed
            since are not read again.
    Raises:
        ValueError: a file cannot be read.
    """
    known = _read_remembered(remembered)
    new = {}
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
            key = f"{file.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
            if key not in known:
                with file.open("rb") as stream:
                    known[key] = new[key] = _sha256(stream)
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
        digest.update(f"{kind_of(file)}:{file.suffix.lower() in COMPRESSIONS}:{known[key]};".encode())
    if new and remembered is not None:
        _write_remembered(remembered, {**_read_remembered(remembered), **new})
    return digest.hexdigest()


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_remembered(file: Path | None) -> dict[str, str]:
    """Nothing where the file is missing or broken: then the digests are computed again."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file else {}
    except (OSError, ValueError, TypeError):
        return {}


def _write_remembered(file: Path, digests: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(digests, stream, indent=0)
    os.replace(temporary, file)
