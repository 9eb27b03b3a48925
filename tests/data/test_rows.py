"""Rows of tokens: what an epoch holds, how sources mix, how a run resumes, how lanes go on. Expectations are built by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.data.mixing import choose_source, shares_of
from recollect.data.rows import Rows, TokenBatch
from recollect.data.settings import DataSettings, SourceSettings

START = 256


def documents(n: int, seed: int, *, shortest: int = 3, longest: int = 60) -> list[str]:
    """Random letters; any 12 of them stand once in all of a test's text."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(shortest, longest))) for _ in range(n)]


def write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def settings(tmp_path: Path, *sources: list[str], weights: list[float | None] | None = None, **options: Any) -> DataSettings:
    folder = tmp_path / f"text{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    paths = [write(folder / f"{i}.jsonl", texts) for i, texts in enumerate(sources)]
    weights = weights or [None] * len(paths)
    return DataSettings(
        sources=[SourceSettings(paths=[path], weight=weight) for path, weight in zip(paths, weights, strict=True)],
        **{"seq_len": 16, "holdout": 0.0, **options},
    )


def rows_of(tmp_path: Path, data: DataSettings, **options: Any) -> Rows:
    return Rows(data, **{"seed": 0, "folder": tmp_path / "tokens", **options})


def same(a: TokenBatch, b: TokenBatch) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def joined(batches: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def in_turn(batches: list[TokenBatch]) -> TokenBatch:
    """Row i of the whole is row i // world of process i % world."""
    return TokenBatch(*(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*batches, strict=True)))


def test_an_epoch_is_all_tokens_once(tmp_path: Path) -> None:
    """Prevents lost and repeated text: the inputs of an epoch are the documents, but for a tail shorter than a row and one token."""
    texts = documents(50, 1)
    rows = rows_of(tmp_path, settings(tmp_path, texts))
    total = sum(len(text) + 1 for text in texts)
    assert rows.n_tokens == [total]
    n_rows = (total - 1) // 16
    for _ in range(2):
        inputs = rows.next(n_rows).inputs
        missing = Counter([START] * 50 + [byte for text in texts for byte in text.encode()])
        missing.subtract(inputs.flatten().tolist())
        assert min(missing.values()) == 0
        assert sum(missing.values()) == total - n_rows * 16 <= 16


def test_rows_are_cut_from_whole_documents(tmp_path: Path) -> None:
    """Prevents shifted labels and documents torn apart: between two starts of a row stands a whole one, at its ends a part."""
    texts = documents(80, 2, longest=20)
    batch = rows_of(tmp_path, settings(tmp_path, texts)).next((sum(len(text) + 1 for text in texts) - 1) // 16)
    labels = torch.where(batch.labels == -100, START, batch.labels)
    assert torch.equal(labels[:, :-1], batch.inputs[:, 1:])
    assert torch.equal(batch.labels == -100, labels == START)
    spelt = [bytes(token if token != START else 0 for token in row).decode() for row in batch.inputs.tolist()]
    stream = "\0" + "\0".join(texts) + "\0"
    whole = [part for row in spelt for part in row.split("\0")[1:-1]]
    assert len(whole) > 20
    assert all(f"\0{part}\0" in stream for part in whole)
    assert all(part in stream for row in spelt for part in row.split("\0"))


def test_document_ids_rise_at_starts(tmp_path: Path) -> None:
    """Prevents attention into the document before; a row may begin within a document."""
    texts = documents(40, 3)
    data = settings(tmp_path, texts)
    batch = rows_of(tmp_path, data).next(8)
    assert batch.document_ids is not None
    for tokens, ids in zip(batch.inputs.tolist(), batch.document_ids.tolist(), strict=True):
        for t in range(1, 16):
            assert ids[t] - ids[t - 1] == (tokens[t] == START)
    uncut = rows_of(tmp_path, settings(tmp_path, texts, cut_documents=False)).next(8)
    assert uncut.document_ids is None
    assert torch.equal(uncut.labels, batch.labels)


@pytest.mark.parametrize("carry", [False, True])
def test_order_depends_on_seed_and_epoch(tmp_path: Path, carry: bool) -> None:
    """Prevents runs with different seeds, or epochs of one run, that read the same order; the same seed reads the same."""
    texts = documents(50, 4)
    data = settings(tmp_path, texts, carry=carry)
    n = (sum(len(text) + 1 for text in texts) - 1) // 16
    n = n if not carry else 8
    first = rows_of(tmp_path, data)
    one = [first.next(n).inputs for _ in range(20)]
    again = rows_of(tmp_path, data)
    assert all(torch.equal(again.next(n).inputs, part) for part in one)
    assert not torch.equal(rows_of(tmp_path, data, seed=1).next(n).inputs, one[0])
    seen = {part.flatten().numpy().tobytes() for part in one}
    assert len(seen) == len(one)


def test_documents_and_rows_are_shuffled(tmp_path: Path) -> None:
    """Prevents batches of one book, and documents with the same neighbours in every epoch."""
    (book,) = documents(1, 12, shortest=1600, longest=1600)
    inputs = rows_of(tmp_path, settings(tmp_path, [book])).next(100).inputs
    places = [book.index(bytes(row[row != START].tolist()).decode()) for row in inputs]
    assert sorted(places) == [0, *range(15, 1599, 16)]
    assert sum(b == a + 16 for a, b in itertools.pairwise(places)) < 10
    rows = rows_of(tmp_path, settings(tmp_path, ["abcd"[i % 4] + f"{i:03d}" for i in range(200)]))
    neighbours = []
    for _ in range(2):
        spelt = [bytes(t if t != START else 0 for t in row).decode() for row in rows.next(62).inputs.tolist()]
        parts = [[part for part in row.split("\0") if len(part) == 4] for row in spelt]
        neighbours.append({pair for row in parts for pair in itertools.pairwise(row)})
    assert min(map(len, neighbours)) > 60
    assert len(neighbours[0] & neighbours[1]) < 10


@pytest.mark.parametrize("carry", [False, True])
def test_processes_together_read_what_one_reads(tmp_path: Path, carry: bool) -> None:
    """Prevents rows that two processes both read, or none."""
    data = settings(tmp_path, documents(50, 5), documents(30, 6), weights=[2, 1], carry=carry)
    one = rows_of(tmp_path, data)
    parts = [rows_of(tmp_path, data, rank=rank, world=3) for rank in range(3)]
    for _ in range(30):
        assert same(one.next(12), in_turn([part.next(12) for part in parts]))
        states = [json.dumps(part.state()) for part in (one, *parts)]
        assert len(set(states)) == 1


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, 23])
def test_resumed_is_uninterrupted(tmp_path: Path, carry: bool, steps: int) -> None:
    """Prevents repeated or skipped rows after a checkpoint, within and across epochs, also on another number of processes."""
    data = settings(tmp_path, documents(40, 7), documents(60, 8), carry=carry)
    whole = rows_of(tmp_path, data, rank=1, world=2)
    for _ in range(steps):
        whole.next(6)
    state = json.loads(json.dumps(whole.state()))
    rest = joined([rows.next(6) for rows in [whole] for _ in range(20)])
    halves = [rows_of(tmp_path, data, rank=rank, world=3) for rank in range(3)]
    for part in halves:
        part.next(6)  # where it stood does not matter
        part.restore(state)
        assert part.state() == state
    steps_read = [in_turn([part.next(6) for part in halves]) for _ in range(20)]
    assert same(rest, joined([TokenBatch(*(tensor[1::2] for tensor in batch)) for batch in steps_read]))


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    """Prevents a run that goes on with other text, order or mixture than it began with; moved files are the same text."""
    texts = documents(40, 9)
    state = rows_of(tmp_path, settings(tmp_path, texts, texts[:20], weights=[1, 3])).state()
    rows_of(tmp_path, settings(tmp_path, texts, texts[:20], weights=[2, 6])).restore(state)
    for options, says in [
        ({"weights": [1, 2]}, "share"),
        ({"seq_len": 8, "weights": [1, 3]}, "seq_len=16, this run's seq_len=8"),
        ({"carry": True, "weights": [1, 3]}, "carry=False"),
        ({"holdout": 0.3, "weights": [1, 3]}, "held-out share"),
    ]:
        other = rows_of(tmp_path, settings(tmp_path, texts, texts[:20], **options))
        with pytest.raises(ValueError, match=says):
            other.restore(state)
    with pytest.raises(ValueError, match="seed=0, this run's seed=5"):
        rows_of(tmp_path, settings(tmp_path, texts, texts[:20], weights=[1, 3]), seed=5).restore(state)
    with pytest.raises(ValueError, match="2 sources, this run 1"):
        rows_of(tmp_path, settings(tmp_path, texts)).restore(state)
    with pytest.raises(ValueError, match=r"source '0' holds other text"):
        rows_of(tmp_path, settings(tmp_path, [*texts[:-1], "another"], texts[:20], weights=[1, 3])).restore(state)


def test_rows_mix_by_weight(tmp_path: Path) -> None:
    """Prevents a mixture other than asked: of the first n rows each source has its share, exact to a row, for every n."""
    sources = [[letter * 40] * 9 for letter in "abc"]
    rows = rows_of(tmp_path, settings(tmp_path, *sources, weights=[5, 3, 1.5]))
    counts = Counter[str]()
    for n in range(1, 200):
        row = rows.next(1).inputs[0]
        counts[chr(int(row[row != START][0]))] += 1
        for letter, weight in zip("abc", [5, 3, 1.5], strict=True):
            assert abs(counts[letter] - n * weight / 9.5) < 1
    by_size = rows_of(tmp_path, settings(tmp_path, ["a" * 299], ["b" * 99]))
    assert by_size.shares == [0.75, 0.25]


@pytest.mark.parametrize("seed", range(40))
def test_shares_are_exact_to_a_row(seed: int) -> None:
    """Prevents a starved source: the rule holds for any shares, where taking the furthest behind would not."""
    rng = random.Random(seed)
    weights = [rng.choice([rng.random() ** 4 + 1e-4, 1.0]) for _ in range(rng.randint(1, 12))]
    shares = [weight / sum(weights) for weight in weights]
    counts = [0] * len(shares)
    for n in range(1, 1000):
        counts[choose_source(shares, counts)] += 1
        assert max(abs(count - n * share) for count, share in zip(counts, shares, strict=True)) < 1


def test_weights_are_checked() -> None:
    """Prevents a source that is silently never read, or a mixture nobody asked for."""
    assert shares_of([None], [None], ["a"]) == [1.0]
    assert shares_of([None, None], [30, 10], ["a", "b"]) == [0.75, 0.25]
    for weights, sizes, says in [
        ([1.0, 0.0], [1, 1], "weight of source 'b' is a positive number; got 0"),
        ([1.0, float("nan")], [1, 1], "weight of source 'b'"),
        ([1.0, None], [1, 1], "source 'b' has no weight and others have"),
        ([None, None], [5, None], "streamed source 'b' is not known"),
    ]:
        with pytest.raises(ValueError, match=says):
            shares_of(weights, sizes, ["a", "b"])


def lanes_read(rows: Rows, n_lanes: int, steps: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and document ids of every lane, over all steps; labels are checked against the next step's inputs."""
    tokens: list[list[int]] = [[] for _ in range(n_lanes)]
    ids: list[list[int]] = [[] for _ in range(n_lanes)]
    last = None
    for _ in range(steps):
        batch = rows.next(n_lanes)
        assert batch.document_ids is not None
        if last is not None:
            first = batch.inputs[:, 0]
            assert torch.equal(last, torch.where(first == START, -100, first))
        last = batch.labels[:, -1]
        for lane in range(n_lanes):
            tokens[lane] += batch.inputs[lane].tolist()
            ids[lane] += batch.document_ids[lane].tolist()
    return tokens, ids


def test_lanes_read_documents_from_begin_to_end(tmp_path: Path) -> None:
    """Prevents a memory that is carried into another text: lanes spell whole documents, and ids change exactly at their starts."""
    texts = documents(21, 10, shortest=5, longest=90)
    rows = rows_of(tmp_path, settings(tmp_path, texts, carry=True))
    tokens, ids = lanes_read(rows, 4, 60)
    read = []
    for lane, numbers in zip(tokens, ids, strict=True):
        assert lane[0] == START
        changes = [b - a for a, b in itertools.pairwise(numbers)]
        assert changes == [int(token == START) for token in lane[1:]]
        read.append(bytes(token if token != START else 0 for token in lane).decode().split("\0")[1:-1])
    # Each lane reads 5 or 6 documents per epoch; two epochs are over in every lane.
    for epoch in range(2):
        dealt = [lane[epoch * n : epoch * n + n] for lane, n in zip(read, [6, 5, 5, 5], strict=True)]
        assert sorted(text for lane in dealt for text in lane) == sorted(texts)
    assert rows.epochs[0] > 2


def test_a_book_is_shared_by_the_lanes(tmp_path: Path) -> None:
    """Prevents lanes without text where there are fewer documents than lanes: a book is cut, each byte is read once an epoch."""
    (book,) = documents(1, 11, shortest=1001, longest=1001)
    tokens, ids = lanes_read(rows_of(tmp_path, settings(tmp_path, [book], carry=True)), 4, 30)
    parts = [bytes(t if t != START else 0 for t in lane).decode().split("\0")[1] for lane in tokens]
    assert sum(map(len, parts)) == 1001
    assert sorted(parts, key=book.index) == [book[at : at + 251] for at in (0, 251, 502, 753)]  # equal, but for the last
    assert [max(numbers) for numbers in ids] == [1] * 4


def test_lanes_are_shared_by_the_sources(tmp_path: Path) -> None:
    """Prevents a source without a lane, and a batch that changes its size in the middle of the documents."""
    data = settings(tmp_path, ["a" * 500], ["b" * 500], weights=[3, 1], carry=True)
    rows = rows_of(tmp_path, data)
    for _ in range(5):
        inputs = rows.next(8).inputs
        assert Counter(chr(int(row[row != START][0])) for row in inputs) == {"a": 6, "b": 2}
    with pytest.raises(ValueError, match="8 so far, now 4"):
        rows.next(4)
    with pytest.raises(ValueError, match="'1' gets none of the 1 rows"):
        rows_of(tmp_path, data).next(1)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    """Prevents a traceback: every sentence names what to change."""
    data = settings(tmp_path, ["a" * 15])
    for options, says in [
        ({"data": data}, "source '0': too little text: 16 tokens, a row needs 17"),
        ({"data": settings(tmp_path, ["a" * 40], seq_len=0)}, "seq_len is at least 1"),
        ({"data": settings(tmp_path, ["a" * 40], holdout=1.0)}, "holdout is a share"),
        ({"data": settings(tmp_path, ["a" * 40], holdout=0.1)}, "41 tokens, seq_len=16 with holdout=0.1 needs 160"),
        ({"data": DataSettings()}, "no text to train on"),
        ({"data": DataSettings(sources=[SourceSettings()])}, "neither `paths` nor `dataset`"),
        ({"data": DataSettings(sources=[SourceSettings(paths=["a"], dataset="b")])}, "both `paths` and `dataset`"),
        ({"data": data, "rank": 2, "world": 2}, "rank=2, world=2"),
        ({"data": DataSettings(sources=[SourceSettings(paths=["a"], name="x")] * 2)}, "two sources have the name 'x'"),
    ]:
        with pytest.raises(ValueError, match=says):
            rows_of(tmp_path, **options)  # type: ignore[arg-type]
    rows = rows_of(tmp_path, settings(tmp_path, ["a" * 40]), world=2)
    with pytest.raises(ValueError, match="multiple of the 2 processes; got 3"):
        rows.next(3)
