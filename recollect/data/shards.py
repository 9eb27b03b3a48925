"""Tokenised text on disk: written once, checked, memory-mapped and reused by every run and process that reads the same text.

A shard is a folder: tokens.bin (uint16 or uint32; every document is the start token and its tokens), offsets.npy (int64, where
each document starts, and the end), meta.json. Its name says what it was made from, so another text or tokenizer gets another folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.data.settings import SourceSettings
from recollect.data.sources import documents, fingerprint_files, source_files
from recollect.data.tokenizer import Tokenizer

FORMAT = 1
BATCH_CHARACTERS = 1 << 22  # encoded at once
CHECKED_BLOCKS = 1024  # of 1 MiB each: a file of up to 1 GiB is checked whole
NOTE_SECONDS = 10.0
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokenised documents.

    Attributes:
        tokens: all documents one after the other, each begun by the start token; unsigned integers [n_tokens], memory-mapped.
        offsets: where each document starts, and the end, int64 [n_documents + 1].
        start: id of the start token.
        vocab_size: all tokens are below.
        fingerprint: of text and tokenizer, independent of names and places.
        folder: where they lie.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    start: int
    vocab_size: int
    fingerprint: str
    folder: Path


def open_tokens(
    source: SourceSettings, tokenizer: Tokenizer, folder: str | os.PathLike[str], *, note: Note = lambda text: None
) -> Tokens:
    """The tokens of a source of files; tokenised the first time, then read from folder/<fingerprint>.

    Several processes may call it at once: one tokenises, the others wait. (Where the file system has no locks, each tokenises and
    the first to finish is used by all.) A process that is killed leaves nothing that is taken for a shard.

    Args:
        source: a source of paths.
        folder: for the shards of any number of sources and tokenizers.
        note: takes sentences about what happens: that text is tokenised, that a damaged shard is made anew.
    Raises:
        ValueError: bad files (see `files.read_documents`), or no text in them.
        OSError: the tokens cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    files = source_files(source)
    text = fingerprint_files(files, remembered=folder / "files.json")
    fingerprint = hashlib.sha256(f"{FORMAT}:{tokenizer.fingerprint}:{source.field}:{text}".encode()).hexdigest()
    shard = folder / fingerprint[:24]
    if _damage(shard) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{shard.name}.lock") as alone:
            damage = _damage(shard)  # another process may have made it while this one waited
            if damage is not None:
                if alone:
                    _remove(folder.glob(f".{shard.name}.tmp.*"))  # of processes that were killed
                if shard.exists():
                    note(f"the tokens in {shard} are damaged ({damage}); they are made anew")
                note(f"tokenising {_amount(files)}")
                _build(shard, documents(source), tokenizer, fingerprint=fingerprint, files=files, note=note)
    return _open(shard, tokenizer, fingerprint)


def _open(shard: Path, tokenizer: Tokenizer, fingerprint: str) -> Tokens:
    meta = json.loads((shard / "meta.json").read_text(encoding="utf-8"))
    return Tokens(
        # A plain array over the map: slices of np.memmap objects cost several times as much.
        tokens=np.asarray(np.memmap(shard / "tokens.bin", meta["dtype"], mode="r")),
        offsets=np.load(shard / "offsets.npy"),
        start=tokenizer.start,
        vocab_size=tokenizer.vocab_size,
        fingerprint=fingerprint,
        folder=shard,
    )


def _damage(shard: Path) -> str | None:
    """What is wrong with a shard; None if nothing."""
    try:
        meta = json.loads((shard / "meta.json").read_text(encoding="utf-8"))
        for name, facts in meta["files"].items():
            size = (shard / name).stat().st_size
            if size != facts["size"]:
                return f"{name} has {size} bytes instead of {facts['size']}"
            if _checksum(shard / name) != facts["crc32"]:
                return f"the checksum of {name} is wrong"
        return None if meta["format"] == FORMAT else f"format {meta['format']} instead of {FORMAT}"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else 'a file'}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"meta.json: {error!r}"


def _checksum(file: Path) -> int:
    """CRC-32 of a file, or of CHECKED_BLOCKS blocks spread over a larger one."""
    value, block = 0, 1 << 20
    n_blocks = -(-file.stat().st_size // block)
    n_checked = min(n_blocks, CHECKED_BLOCKS)
    with file.open("rb") as stream:
        for i in range(n_checked):
            stream.seek(i * n_blocks // n_checked * block)
            value = zlib.crc32(stream.read(block), value)
    return value


def _build(
    shard: Path, texts: Iterator[str], tokenizer: Tokenizer, *, fingerprint: str, files: Sequence[Path], note: Note
) -> None:
    """Write a shard under a temporary name, then rename it."""
    temporary = _new_folder(shard)
    try:
        try:
            dtype, n_documents, n_tokens = _write(temporary, texts, tokenizer, note)
            if n_documents == 0:
                raise ValueError(
                    f"{files[0]}{' and the other files' if len(files) > 1 else ''} hold no text, only empty documents"
                )
            parts = {name: _facts(temporary / name) for name in ("tokens.bin", "offsets.npy")}
            meta = {"format": FORMAT, "dtype": dtype, "n_documents": n_documents, "n_tokens": n_tokens, "files": parts}
            about = {"fingerprint": fingerprint, "text": [file.name for file in files]}
            _write_synced(temporary / "meta.json", json.dumps({**meta, **about}, indent=1))
            _publish(temporary, shard)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write tokens to {shard.parent}: {error.strerror or error}; free space or set data.shards"
            ) from error
    finally:
        _remove([temporary])


def _write(folder: Path, texts: Iterator[str], tokenizer: Tokenizer, note: Note) -> tuple[str, int, int]:
    """tokens.bin and offsets.npy; returns dtype, number of documents and of tokens."""
    # uint16 also for bytes: the start token is number 256.
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    start = np.array([tokenizer.start], dtype).tobytes()
    ends: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    n_tokens = 0
    noted = time.monotonic()
    with (folder / "tokens.bin").open("wb") as stream:
        for batch in _batches(texts):
            encoded = tokenizer.encode_batch(batch)
            for tokens in encoded:
                stream.write(start)
                stream.write(tokens.astype(dtype, copy=False).tobytes())
            ends.append(n_tokens + np.cumsum([1 + len(tokens) for tokens in encoded], dtype=np.int64))
            n_tokens = int(ends[-1][-1])
            if time.monotonic() - noted >= NOTE_SECONDS:
                note(f"{n_tokens / 1e6:.0f} million tokens so far")
                noted = time.monotonic()
        stream.flush()
        os.fsync(stream.fileno())
    offsets = np.concatenate(ends)
    with (folder / "offsets.npy").open("wb") as stream:
        np.save(stream, offsets)
        stream.flush()
        os.fsync(stream.fileno())
    return dtype.str, len(offsets) - 1, n_tokens


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in lists of about BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _facts(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size, "crc32": _checksum(file)}


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(temporary: Path, shard: Path) -> None:
    """Rename `temporary` to `shard`. A damaged one in its place is moved away; a whole one, of a process that was faster, stays."""
    for _ in range(10):
        try:
            temporary.rename(shard)
            return
        except OSError:
            if not shard.exists():
                raise
            if _damage(shard) is None:
                return
            aside = _new_folder(shard)
            with contextlib.suppress(OSError):  # another process moved it
                shard.rename(aside / "damaged")
            _remove([aside])
    raise OSError(None, f"another process keeps writing a damaged {shard.name}")


def _new_folder(shard: Path) -> Path:
    """An empty folder beside the shard; with the user's own permissions, where tempfile's would shut other users out."""
    folder = shard.parent / f".{shard.name}.tmp.{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Wait until no other process holds the lock, then hold it; the system frees it when the process ends, however it ends.

    Yields False where the system or the file system has no such locks.
    """
    with file.open("a") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True


def _amount(files: Sequence[Path]) -> str:
    size = sum(file.stat().st_size for file in files)
    what = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    return f"{what} ({size / 1e6:.1f} MB)"
