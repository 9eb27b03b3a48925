"""Compressed and columnar files: gzip and zstandard streams, Parquet columns. The libraries are imported when a file needs them."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSIONS = (".gz", ".zst")


def missing_package(package: str, purpose: str) -> ValueError:
    """The error for a package that is not installed: what needs it and how to install it."""
    return ValueError(f"{purpose} needs the package {package}; install it with: pip install 'recollect[train]'")


def kind_of(file: Path) -> str:
    """The ending that says what a file holds, in lower case, without that of the compression: "a.jsonl.gz" is ".jsonl"."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def open_file(file: Path) -> BinaryIO:
    """The content of a file as a buffered stream, decompressed according to its name (.gz, .zst).

    Raises:
        ValueError: the package zstandard is missing.
        OSError: the file cannot be opened. Reading raises OSError, EOFError or zlib.error where a compressed file is damaged.
    """
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(file), 1 << 20)
    return file.open("rb")


class _Zstandard(io.RawIOBase):
    """A .zst file, decompressed. The library's own reader takes a file that is cut short for a short one; this one refuses it."""

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise missing_package("zstandard", f"reading {file}") from error
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._file = file.open("rb")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._file.read(1 << 17)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the compressed data end in the middle")
                return 0
            self._ready = memoryview(self._decompress(packed))
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def _decompress(self, packed: bytes) -> bytes:
        """What the next bytes of the file hold; a file may consist of several frames."""
        parts = []
        try:
            while packed:
                self._frame = self._frame or self._new_frame()
                parts.append(self._frame.decompress(packed))
                packed = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
        except self._error as error:
            raise EOFError(str(error)) from error
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        super().close()


def parquet_texts(file: Path, column: str) -> Iterator[bytes]:
    """The texts of a column of a .parquet file (compressed as a whole: read into memory), in order, as UTF-8.

    Raises:
        ValueError: pyarrow is missing, the file is no Parquet or damaged, the column is missing, not text, or has an empty cell.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_package("pyarrow", f"reading {file}") from error
    try:
        source: Any = file
        if file.suffix.lower() in COMPRESSIONS:
            with open_file(file) as stream:
                source = io.BytesIO(stream.read())
        with pyarrow.parquet.ParquetFile(source) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise ValueError(f'{file} has no column "{column}"; its columns are {sorted(schema.names)}; set `field`')
            kind = schema.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f'{file}: column "{column}" holds {kind}, not text; set `field` to one of text')
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                # As bytes: rows that are no UTF-8 then name themselves instead of failing in the middle of a batch.
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    yield _checked(value, f'{file}, row {row}, column "{column}"')
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {file}: {error}; restore it or leave it out") from error


def _checked(value: bytes | None, where: str) -> bytes:
    if value is None:
        raise ValueError(f"{where} is empty (null); drop such rows from the file")
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte 0x{value[error.start]:02x} at offset {error.start}") from error
    return value
