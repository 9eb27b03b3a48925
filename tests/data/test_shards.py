"""Tokenised text on disk: what is in it, when it is reused, when it is made anew, what a crash leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.data import shards
from recollect.data.settings import SourceSettings
from recollect.data.shards import open_tokens
from recollect.data.tokenizer import ByteTokenizer


class Counting(ByteTokenizer):
    """Bytes; knows how many texts it has encoded."""

    def __init__(self) -> None:
        self.n_texts = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        self.n_texts += len(texts)
        return super().encode_batch(texts)


class Slow(ByteTokenizer):
    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        time.sleep(0.5)
        return super().encode_batch(texts)


class Wide(ByteTokenizer):
    """A vocabulary that needs 32 bits."""

    vocab_size = 70000
    start = 69999
    fingerprint = "wide"


def source(tmp_path: Path, texts: Sequence[str] = ("one", "two é"), name: str = "a.jsonl") -> SourceSettings:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceSettings(paths=[str(file)])


def test_a_shard_is_the_documents(tmp_path: Path) -> None:
    """Prevents shifted documents: each is the start token and its bytes, offsets say where."""
    for tokenizer in (ByteTokenizer(), Wide()):
        tokens = open_tokens(source(tmp_path), tokenizer, tmp_path / "t")
        assert tokens.tokens.tolist() == [tokenizer.start, *b"one", tokenizer.start, *"two é".encode()]
        assert tokens.offsets.tolist() == [0, 4, 11]
        assert tokens.tokens.itemsize == (4 if tokenizer.vocab_size > 65536 else 2)
        assert not tokens.tokens.flags.writeable
        assert json.loads((tokens.folder / "meta.json").read_text())["n_tokens"] == 11


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents offsets that begin anew with every batch of documents."""
    texts = ["x" * n for n in range(1, 30)]
    whole = open_tokens(source(tmp_path, texts), ByteTokenizer(), tmp_path / "whole")
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 20)
    parts = open_tokens(source(tmp_path, texts), ByteTokenizer(), tmp_path / "parts")
    assert whole.offsets.tolist() == parts.offsets.tolist() == np.cumsum([0, *range(2, 31)]).tolist()
    assert whole.tokens.tolist() == parts.tokens.tolist()


def test_the_same_text_is_tokenised_once(tmp_path: Path) -> None:
    """Prevents hours of tokenising again, also for moved and renamed files; another text, field or tokenizer is not the same."""
    tokenizer = Counting()
    first = open_tokens(source(tmp_path), tokenizer, tmp_path / "t")
    assert tokenizer.n_texts == 2
    again = open_tokens(source(tmp_path), tokenizer, tmp_path / "t")
    moved = open_tokens(source(tmp_path, name="b/other.jsonl"), tokenizer, tmp_path / "t")
    assert tokenizer.n_texts == 2
    assert first.fingerprint == again.fingerprint == moved.fingerprint
    changed = open_tokens(source(tmp_path, ("one", "two e")), tokenizer, tmp_path / "t")
    assert tokenizer.n_texts == 4
    assert changed.tokens.tolist()[-1] == ord("e")
    wide = open_tokens(source(tmp_path), Wide(), tmp_path / "t")
    text = open_tokens(source(tmp_path, name="a.txt"), tokenizer, tmp_path / "t")
    assert len({first.fingerprint, changed.fingerprint, wide.fingerprint, text.fingerprint}) == 4
    assert first.tokens.tolist() == again.tokens.tolist()


def test_another_field_is_another_shard(tmp_path: Path) -> None:
    """Prevents training on the tokens of a field that is no longer asked for."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "body": "y"}')
    for field, byte in [("text", b"x"), ("body", b"y")]:
        tokens = open_tokens(SourceSettings(paths=[str(tmp_path / "a.jsonl")], field=field), ByteTokenizer(), tmp_path / "t")
        assert tokens.tokens.tolist() == [256, *byte]


def test_a_file_changed_in_place_is_noticed(tmp_path: Path) -> None:
    """Prevents old tokens for new text of the same size: the remembered digest goes by size and time of change."""
    a = source(tmp_path, ("one",))
    open_tokens(a, ByteTokenizer(), tmp_path / "t")
    facts = os.stat(a.paths[0])
    source(tmp_path, ("eno",))
    os.utime(a.paths[0], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert open_tokens(a, ByteTokenizer(), tmp_path / "t").tokens.tolist() == [256, *b"eno"]
    (tmp_path / "t" / "files.json").write_text("[broken")
    assert open_tokens(a, ByteTokenizer(), tmp_path / "t").tokens.tolist() == [256, *b"eno"]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_made_anew(tmp_path: Path, name: str, harm: str) -> None:
    """Prevents training on garbage, and a run that cannot start because of an old file; it says so."""
    a = source(tmp_path, ["text " * 100] * 20)
    notes: list[str] = []
    first = open_tokens(a, ByteTokenizer(), tmp_path / "t", note=notes.append)
    whole = first.tokens.tolist()
    assert [note.split(" ")[0] for note in notes] == ["tokenising"]
    file = first.folder / name
    content = bytearray(file.read_bytes())
    del first
    if harm == "gone":
        file.unlink()
    else:
        middle = len(content) // 2 if name != "meta.json" else content.index(b"crc32") + 8
        content[middle] = content[middle] ^ 1
        file.write_bytes(content if harm == "flip" else content[:-7])
    assert open_tokens(a, ByteTokenizer(), tmp_path / "t", note=notes.append).tokens.tolist() == whole
    assert "are damaged" in notes[1]
    open_tokens(a, ByteTokenizer(), tmp_path / "t", note=notes.append)
    assert len(notes) == 3
    assert not list((tmp_path / "t").glob("*.tmp.*"))


def build(folder: Path, paths: list[str], queue: Any) -> None:
    tokenizer = Counting()
    notes: list[str] = []
    tokens = open_tokens(SourceSettings(paths=paths), tokenizer, folder, note=notes.append)
    queue.put((tokenizer.n_texts, int(tokens.tokens.astype(int).sum())))


def die_building(folder: Path, paths: list[str]) -> None:
    open_tokens(SourceSettings(paths=paths), Slow(), folder)


def test_processes_at_once_build_one_shard(tmp_path: Path) -> None:
    """Prevents two processes that write the same file, and a lock that a killed process leaves behind."""
    context = multiprocessing.get_context("fork")
    a = source(tmp_path, ["text " * 1000] * 200)
    folder = tmp_path / "t"
    killed = context.Process(target=die_building, args=(folder, a.paths))
    killed.start()
    while not list(folder.glob(".*.tmp.*")):
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    queue = context.Queue()
    processes = [context.Process(target=build, args=(folder, a.paths, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(n_texts for n_texts, _ in results) == [0, 0, 0, 200]
    assert {total for _, total in results} == {200 * (256 + 1000 * sum(b"text "))}
    assert not list(folder.glob(".*.tmp.*"))


def test_without_locks_the_first_is_used_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a crash, or half a shard, where the file system cannot lock and two processes finish after each other."""
    import contextlib

    @contextlib.contextmanager
    def no_lock(file: Path) -> Any:
        yield False

    monkeypatch.setattr(shards, "_lock", no_lock)
    a = source(tmp_path)
    inner, number = [], []

    class Meanwhile(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[Any]:
            if not inner:
                inner.append(open_tokens(a, ByteTokenizer(), tmp_path / "t"))
                number.append(inner[0].folder.stat().st_ino)
            return super().encode_batch(texts)

    outer = open_tokens(a, Meanwhile(), tmp_path / "t")
    assert inner[0].folder == outer.folder
    assert outer.folder.stat().st_ino == number[0]  # the first one stays
    assert inner[0].tokens.tolist() == outer.tokens.tolist() == [256, *b"one", 256, *"two é".encode()]
    assert not list((tmp_path / "t").glob(".*.tmp.*"))


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a shard that ends where the disk was full."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    a = source(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"cannot write tokens to .*: No space left on device; free space or set data\.shards"
        ):
            open_tokens(a, ByteTokenizer(), tmp_path / "t")
    assert not list((tmp_path / "t").glob(".*.tmp.*"))
    assert open_tokens(a, ByteTokenizer(), tmp_path / "t").tokens.tolist() == [256, *b"one", 256, *"two é".encode()]


def test_bad_text_is_named(tmp_path: Path) -> None:
    """Prevents a half-written shard of a file with a bad line, and an empty one."""
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": ')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    for name, says in [("bad", r"bad\.jsonl, line 2 is not JSON"), ("empty", r"empty\.jsonl hold no text")]:
        for _ in range(2):
            with pytest.raises(ValueError, match=says):
                open_tokens(SourceSettings(paths=[str(tmp_path / f"{name}.jsonl")]), ByteTokenizer(), tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").iterdir() if not path.name.endswith(".lock")] == ["files.json"]
