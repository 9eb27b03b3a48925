"""Compressed and columnar files: what is read, and what is refused by name. The files are written by the libraries' own code."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from recollect.data.files import ALL_SUFFIXES, find_files, read_documents
from recollect.data.formats import kind_of
from recollect.data.settings import SourceSettings

TEXTS = ["one\u2028é", "two\r\n", "", "three " * 50000]
LINES = "\n".join(json.dumps({"body": text, "id": i}) for i, text in enumerate(TEXTS)).encode()


def packed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        return zstandard.ZstdCompressor().compress(content)
    return content


def parquet(file: Path, texts: list[str | None], **options: object) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "body": pyarrow.array(texts, options.get("type", pyarrow.string()))})
    pyarrow.parquet.write_table(table, file, row_group_size=2)
    return file


def read(*files: Path, field: str = "body") -> list[str]:
    return [document.decode() for document in read_documents(files, field=field)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_kind_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    """Prevents lost, cut or reordered documents of a format; empty ones are left out, a text file is one document."""
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(packed(LINES, suffix))
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(packed("".join(TEXTS).encode(), suffix))
    plain = parquet(tmp_path / "plain.parquet", [*TEXTS])
    table = tmp_path / f"a.parquet{suffix}"
    table.write_bytes(packed(plain.read_bytes(), suffix))
    expected = [text for text in TEXTS if text]
    assert read(lines) == read(table) == expected
    assert read(text) == ["".join(TEXTS)]
    assert read(text, table, lines) == ["".join(TEXTS), *expected, *expected]
    assert kind_of(Path("A.JSONL.GZ")) == ".jsonl"


def test_several_zstandard_frames_are_one_file(tmp_path: Path) -> None:
    """Prevents reading only the first part of a file written by several threads or appended to."""
    (tmp_path / "a.txt.zst").write_bytes(packed(b"one ", ".zst") + packed(b"two", ".zst"))
    assert read(tmp_path / "a.txt.zst") == ["one two"]


def test_folders_give_all_kinds(tmp_path: Path) -> None:
    """Prevents files of a folder that are silently passed over; the default stays text and JSON lines."""
    names = ["a.jsonl.zst", "b.parquet", "c.txt.gz", "d.md", "e.bin", "f.bin.gz"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in find_files(tmp_path, suffixes=ALL_SUFFIXES)] == names[:4]
    assert [file.name for file in find_files(tmp_path)] == ["d.md"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    """Prevents training on the first half of a download that broke off; zstandard's own reader does not notice."""
    content = parquet(tmp_path / "plain.parquet", [*TEXTS]).read_bytes() if kind == ".parquet" else LINES
    whole = packed(content, suffix)
    file = tmp_path / f"a{kind}{suffix}"
    for size in (len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"cannot read .*a\{kind}\{suffix}: it is damaged or cut short"):
            read(file)
    file.write_bytes(b"no such format")
    with pytest.raises(ValueError, match=rf"cannot read .*a\{kind}\{suffix}: "):
        read(file)


def test_bad_tables_and_lines_are_named(tmp_path: Path) -> None:
    """Prevents a traceback, or training on nothing: the message names file, row or line, and the fields there are."""
    table = parquet(tmp_path / "a.parquet", ["x", "y", None])
    numbers = parquet(tmp_path / "n.parquet", [1, 2], type=pyarrow.int64())  # type: ignore[list-item]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(LINES + b'\n{"body": "\xff"}')
    broken = tmp_path / "b.parquet"
    broken.write_bytes(table.read_bytes()[:-20])
    for file, field, says in [
        (table, "text", r"a\.parquet has no column \"text\"; its columns are \['body', 'id'\]"),
        (table, "body", r"a\.parquet, row 3, column \"body\" is empty"),
        (numbers, "body", r"n\.parquet: column \"body\" holds int64, not text"),
        (broken, "body", r"cannot read .*b\.parquet: "),
        (lines, "text", r"a\.jsonl, line 1 has no string field \"text\"; its fields are \['body', 'id'\]"),
        (lines, "body", r"a\.jsonl, line 5 is not UTF-8: byte 0xff at offset 10 "),
    ]:
        with pytest.raises(ValueError, match=says):
            read(file, field=field)


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    """Prevents an ImportError that does not say which file needs what."""
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"reading .*{name} needs the package {package}; install it with: pip install"):
        read(tmp_path / name)


def test_sources_have_names(tmp_path: Path) -> None:
    """Prevents results whose sources cannot be told apart."""
    from recollect.data.sources import names_of

    (tmp_path / "books").mkdir()
    sources = [
        SourceSettings(paths=[str(tmp_path / "books")]),
        SourceSettings(paths=["x/c4.jsonl.zst", "y.txt"]),
        SourceSettings(paths=["z/c4.txt"]),
        SourceSettings(paths=["data/wiki/*.parquet"]),
        SourceSettings(dataset="org/pile", config="en"),
        SourceSettings(paths=["q.txt"], name="c4-2"),
    ]
    assert names_of(sources) == ["books", "c4", "c4-3", "wiki", "pile/en", "c4-2"]
