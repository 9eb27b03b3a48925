"""Streamed datasets: nothing lost or repeated, resumed exactly, errors with the dataset's name. The datasets are local folders."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from recollect.data.rows import Rows
from recollect.data.settings import DataSettings, SourceSettings
from recollect.data.stream import StreamedRows
from recollect.data.tokenizer import ByteTokenizer
from recollect.data.validation import validation_rows
from tests.data.test_rows import START, documents, in_turn, same

T = 16


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is looked up on a hub, nothing is kept outside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 64 rows, so that a few thousand bytes have several."""
    monkeypatch.setattr("recollect.data.stream.BATCH_CHARACTERS", 50)
    monkeypatch.setattr("recollect.data.stream.BLOCK_TOKENS", 1)


def dataset(tmp_path: Path, texts: list[Any], field: str = "text") -> str:
    """A dataset of three files of JSON lines."""
    folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({field: text}) for text in texts[part::3]]
        (folder / f"train-{part}.jsonl").write_text("\n".join(lines))
    return str(folder)


def stream(folder: str, *, seed: int = 0) -> StreamedRows:
    return StreamedRows(SourceSettings(dataset=folder), ByteTokenizer(), seq_len=T, key=(seed, 0), block_tokens=1)


def read(rows: StreamedRows, first: int, last: int) -> list[list[int]]:
    out = np.empty((last - first, T + 1), np.int64)
    for number in range(first, last):
        rows.read(number, out[number - first])
    return out.tolist()


def test_no_token_is_lost_or_repeated(tmp_path: Path) -> None:
    """Prevents lost tails of blocks and of epochs: the inputs of two epochs are every token twice, up to the last row."""
    texts = documents(150, 1)
    rows = stream(dataset(tmp_path, texts))
    total = sum(len(text) + 1 for text in texts)
    assert total > 3 * 64 * T  # several blocks
    inputs = [token for row in read(rows, 0, 2 * total // T) for token in row[:T]]
    expected = Counter([START] * 150 + [byte for text in texts for byte in text.encode()])
    missing = expected + expected
    missing.subtract(inputs)
    assert min(missing.values()) == 0
    assert sum(missing.values()) == 2 * total - len(inputs) < T
    assert rows.epochs(0) == 1
    assert rows.position(len(inputs) // T)["block"] > 1


def test_documents_are_whole_and_shuffled(tmp_path: Path) -> None:
    """Prevents documents torn apart at the seams of blocks, and a stream in its own order; the seed makes the order."""
    texts = documents(150, 2, longest=20)
    folder = dataset(tmp_path, texts)
    one, again, other = (read(stream(folder, seed=seed), 0, 60) for seed in (0, 0, 1))
    assert one == again != other
    spelt = [bytes(t if t != START else 0 for t in row).decode() for row in one]
    whole = [part for row in spelt for part in row.split("\0")[1:-1]]
    assert len(whole) > 10
    assert set(whole) <= set(texts)
    in_order = [text for part in range(3) for text in texts[part::3]]
    assert sorted(whole, key=in_order.index) != whole


def test_blocks_and_epochs_have_their_own_order(tmp_path: Path) -> None:
    """Prevents batches of one book, and documents with the same neighbours in every epoch."""
    (book,) = documents(1, 7, shortest=1023, longest=1023)
    folder = dataset(tmp_path, [book])
    orders = []
    for seed in (0, 1):
        rows = read(stream(folder, seed=seed), 0, 63)
        places = [book.index(bytes(t for t in row[:T] if t != START).decode()) for row in rows]
        assert sum(b == a + 16 for a, b in itertools.pairwise(places)) < 10
        orders.append(places)
    assert orders[0] != orders[1]
    short = stream(dataset(tmp_path, ["abcd"[i % 4] + f"{i:03d}" for i in range(200)]))
    neighbours = []
    for first in (0, 62):
        spelt = [bytes(t if t != START else 0 for t in row).decode() for row in read(short, first, first + 62)]
        parts = [[part for part in row.split("\0") if len(part) == 4] for row in spelt]
        neighbours.append({pair for row in parts for pair in itertools.pairwise(row)})
    assert min(map(len, neighbours)) > 60
    assert len(neighbours[0] & neighbours[1]) < 10


@pytest.mark.parametrize("n_read", [0, 1, 63, 64, 65, 200, 500])
def test_resumed_is_uninterrupted(tmp_path: Path, n_read: int) -> None:
    """Prevents skipped or repeated rows after a checkpoint at the seams of blocks and epochs, and within them."""
    folder = dataset(tmp_path, documents(150, 3))
    rows = stream(folder)
    read(rows, 0, n_read)
    if n_read in (200, 500):
        assert rows.position(n_read)["first"] > 0  # not the first block
    position = json.loads(json.dumps(rows.position(n_read)))
    assert stream(folder).position(n_read) == position  # of a process that has read none of these rows itself
    rest = read(rows, n_read, n_read + 150)
    resumed = stream(folder)
    read(resumed, 0, 10)
    resumed.go_to(n_read, position)
    assert resumed.position(n_read) == position
    assert read(resumed, n_read, n_read + 150) == rest
    assert rows.position(n_read + 150) == resumed.position(n_read + 150)


def test_processes_together_read_what_one_reads(tmp_path: Path) -> None:
    """Prevents positions that depend on which rows a process read itself; a stream mixes with files."""
    (tmp_path / "a.txt").write_text("A" * 500)
    data = DataSettings(
        sources=[
            SourceSettings(dataset=dataset(tmp_path, documents(150, 4)), weight=2),
            SourceSettings(paths=[str(tmp_path / "a.txt")], weight=1),
        ],
        seq_len=T,
        holdout=0.0,
    )
    one = Rows(data, seed=0, folder=tmp_path / "t")
    halves = [Rows(data, seed=0, folder=tmp_path / "t", rank=rank, world=2) for rank in range(2)]
    for _ in range(70):
        assert same(one.next(2), in_turn([half.next(2) for half in halves]))
        states = [json.dumps(rows.state()) for rows in (one, *halves)]
        assert len(set(states)) == 1
    four = Rows(data, seed=0, folder=tmp_path / "t", rank=3, world=6)
    four.restore(json.loads(json.dumps(halves[1].state())))
    assert torch.equal(one.next(6).inputs[3:4], four.next(6).inputs)
    assert one.n_tokens == [None, 501]
    assert (one.next(600).inputs == ord("A")).any(dim=1).sum() == 200


def test_validation_reads_a_stream_once(tmp_path: Path) -> None:
    """Prevents rows evaluated twice where the stream is shorter than asked."""
    texts = documents(60, 5)
    data = DataSettings(validation=[SourceSettings(dataset=dataset(tmp_path, texts), name="v")], seq_len=T)
    batches = validation_rows(data, ByteTokenizer(), 10**4, folder=tmp_path / "t")["v"]
    total = sum(len(text) + 1 for text in texts)
    assert sum(len(batch.inputs) for batch in batches) == (total - 1) // T
    fixed = validation_rows(data, ByteTokenizer(), 3, folder=tmp_path / "t")["v"]
    assert torch.equal(fixed[0].inputs, batches[0].inputs[:3])


def test_bad_datasets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback from inside a library: the message names the dataset and what to change."""
    bad = dataset(tmp_path, ["x", None, 3], field="body")
    good = dataset(tmp_path, documents(30, 6))
    empty = dataset(tmp_path, ["", "", ""])
    for options, says in [
        ({"dataset": str(tmp_path / "none")}, "cannot open dataset .*none"),
        ({"dataset": good, "split": "test"}, "split 'test'.*Bad split"),
        ({"dataset": good, "config": "en"}, "config 'en'"),
        ({"dataset": bad}, r"row 1 of dataset .* has no text in field 'text'; its fields are \['body'\]"),
        ({"dataset": empty}, "holds no text"),
    ]:
        source = SourceSettings(**options)
        with pytest.raises(ValueError, match=says):
            read(StreamedRows(source, ByteTokenizer(), seq_len=T, key=(0, 0)), 0, 1)
    data = DataSettings(sources=[SourceSettings(dataset=good)], carry=True)
    with pytest.raises(ValueError, match="a streamed dataset does not give; use files"):
        Rows(data, seed=0, folder=tmp_path / "t")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets; install it with: pip install"):
        stream(good)
