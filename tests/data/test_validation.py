"""What is held out and what is evaluated on: apart from the training text, whole, fixed."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from recollect.data.pieces import Order, Pieces, permutation, shorten, split_holdout
from recollect.data.rows import Rows
from recollect.data.settings import DataSettings, SourceSettings
from recollect.data.tokenizer import load_tokenizer
from recollect.data.validation import validation_rows
from tests.data.test_rows import START, documents, settings

BYTES = load_tokenizer("bytes")


def asked(batches: list) -> list[int]:
    """All labels of batches, in order."""
    return [label for batch in batches for label in batch.labels.flatten().tolist() if label != -100]


@pytest.mark.parametrize("seed", range(30))
def test_pieces_hold_every_token_once(seed: int) -> None:
    """Prevents leaked and lost text, whatever the documents' sizes; and a share far from the one asked for."""
    rng = random.Random(seed)
    sizes = [rng.choice([1, 2, 5, 40, 3000]) + rng.randint(0, 3) for _ in range(rng.randint(3, 80))]
    offsets = np.cumsum([0, *sizes])
    holdout, seq_len = rng.choice([0.02, 0.1, 0.3, 0.5]), rng.choice([1, 7, 16])
    try:
        train, held = split_holdout(offsets, holdout=holdout, seq_len=seq_len)
    except ValueError:
        assert sum(sizes) < max(seq_len / holdout, (seq_len + 1) / (1 - holdout)) + 1
        return
    starts = set(offsets[:-1].tolist())
    empty = {begin for begin, size in zip(offsets.tolist(), sizes, strict=False) if size == 1}
    content: list[int] = []
    for begin, length in zip(*(np.concatenate(both) for both in zip(train, held, strict=True)), strict=True):
        assert length > 1 or begin in empty
        content += range(begin + 1, begin + length)
        assert not starts & set(range(begin + 1, begin + length))
    expected = [i for i in range(sum(sizes)) if i not in starts]
    assert sorted(content) == expected
    assert train.n_tokens > seq_len
    assert seq_len <= held.n_tokens
    assert abs(held.n_tokens - holdout * sum(sizes)) <= 2 * len(held.begins) + sum(sizes) / (seq_len / holdout) + 1


def test_a_book_gives_its_end_and_short_documents_some_whole() -> None:
    """Prevents a held-out part from the middle of a book, and documents cut without need."""
    train, held = split_holdout(np.array([0, 1001]), holdout=0.1, seq_len=16)
    assert [part.tolist() for part in (*train, *held)] == [[0], [900], [899], [102]]
    train, held = split_holdout(np.arange(0, 1001, 5), holdout=0.1, seq_len=5)
    assert held.begins.tolist() == list(range(45, 1000, 50))
    assert set(held.lengths) == {5}
    # 20 tokens more are too few for a group, so the last group has 70 tokens and gives 7: a document, and 2 tokens of one.
    train, held = split_holdout(np.arange(0, 1021, 5), holdout=0.1, seq_len=5)
    assert held.begins.tolist() == [*range(45, 950, 50), 1012, 1015]
    assert held.lengths.tolist()[-2:] == [3, 5]
    assert train.n_tokens == 1020 - 19 * 5 - 7
    # The cut would leave nothing but a start token of the second document to the training part: it is held out whole.
    train, held = split_holdout(np.array([0, 80, 100]), holdout=0.19, seq_len=5)
    assert [part.tolist() for part in (*train, *held)] == [[0], [80], [80], [20]]


@pytest.mark.parametrize("seed", range(30))
def test_shortened_pieces_hold_every_token_once(seed: int) -> None:
    """Prevents a lane without text and tokens read twice, whatever the documents' sizes and the number of lanes."""
    rng = random.Random(seed)
    lengths = np.array([rng.choice([1, 2, 5, 40, 3000]) + rng.randint(0, 3) for _ in range(rng.randint(1, 20))])
    n_parts = rng.randint(1, 20)
    begins = np.cumsum(lengths) - lengths
    if (lengths - 1).sum() < n_parts:
        with pytest.raises(ValueError, match="too little text"):
            shorten(Pieces(begins, lengths), n_parts)
        return
    short = shorten(Pieces(begins, lengths), n_parts)
    assert len(short.begins) >= n_parts
    content = [i for begin, length in zip(*short, strict=True) for i in range(begin + 1, begin + length)]
    assert content == [i for begin, length in zip(begins, lengths, strict=True) for i in range(begin + 1, begin + length)]
    assert short.lengths.max() - 1 <= -(-(lengths - 1).sum() // n_parts)


def test_permutation_is_one_and_never_changes() -> None:
    """Prevents a resumed run in another order, also with other versions of the libraries; and an order that is not random."""
    word = int.from_bytes(hashlib.blake2b(b"(0, 1, 'rows')", digest_size=8).digest(), "little")
    keys = []
    for _ in range(50):  # SplitMix64 as published
        word = (word + 0x9E3779B97F4A7C15) % 2**64
        z = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        keys.append(z ^ (z >> 31))
    assert permutation(50, 0, 1, "rows").tolist() == sorted(range(50), key=keys.__getitem__)
    firsts = Counter()
    for seed in range(3000):
        order = permutation(5, seed)
        assert sorted(order) == list(range(5))
        firsts[tuple(order.tolist())] += 1
    assert len(firsts) == 120
    assert max(firsts.values()) < 50  # 25 on average
    assert permutation(0, 1).tolist() == []


def test_order_reads_pieces_as_documents() -> None:
    """Prevents wrong seams: any stretch of the text in order is that of the documents written one after the other."""
    tokens = np.arange(100, dtype=np.uint16)
    pieces = Pieces(np.array([0, 10, 50, 60]), np.array([4, 1, 7, 3]))
    order = Order(tokens, pieces, np.array([2, 0, 3, 1]), start=999)
    text = [999, *range(51, 57), 999, 1, 2, 3, 999, 61, 62, 999]
    assert order.n_tokens == len(text)
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            out = np.empty(end - begin, np.int64)
            order.read(begin, out)
            assert out.tolist() == text[begin:end]


def test_holdout_is_not_trained_on(tmp_path: Path) -> None:
    """Prevents evaluation on training text: the two together are the text, and share no passage."""
    texts = documents(120, 1, longest=400)
    data = settings(tmp_path, texts, holdout=0.1)
    rows = Rows(data, seed=0, folder=tmp_path / "t")
    (name, batches), *others = validation_rows(data, BYTES, 10**6, folder=tmp_path / "t").items()
    assert not others
    assert name == rows.names[0]
    n_tokens = rows.n_tokens[0]
    assert n_tokens is not None
    train = bytes(t for t in rows.next((n_tokens - 1) // 16).inputs.flatten().tolist() if t != START)
    held = bytes(asked(batches))
    total = "".join(texts).encode()
    assert 0.09 < len(held) / len(total) < 0.11
    assert not {held[i : i + 12] for i in range(len(held) - 11)} & {train[i : i + 12] for i in range(len(train) - 11)}
    missing = Counter(total)
    missing.subtract(held + train)
    assert min(missing.values()) == 0
    assert sum(missing.values()) <= 16  # the epoch's tail


def test_every_validation_token_is_asked_once(tmp_path: Path) -> None:
    """Prevents a score of a part of the text: the last row is filled up, and the filling is not asked."""
    texts = documents(30, 2)
    data = settings(tmp_path, texts, holdout=0.5)
    file = data.sources[0].paths[0]
    apart = DataSettings(sources=[], validation=[SourceSettings(paths=[file], name="v")], seq_len=16)
    batches = validation_rows(apart, BYTES, 10**6, folder=tmp_path / "t", batch_rows=7)["v"]
    assert asked(batches) == [byte for text in texts for byte in text.encode()]
    n_rows = -(-(sum(map(len, texts)) + 29) // 16)
    assert [len(batch.inputs) for batch in batches] == [7] * (n_rows // 7) + [n_rows % 7] * (n_rows % 7 > 0)
    assert {batch.inputs.shape[1] for batch in batches} == {16}
    few = validation_rows(apart, BYTES, 4, folder=tmp_path / "t")["v"]
    everything = torch.cat([batch.inputs for batch in batches])
    assert torch.equal(few[0].inputs, everything[[i * n_rows // 4 for i in range(4)]])
    assert few[0].document_ids is not None


def test_a_text_shorter_than_a_row_is_evaluated(tmp_path: Path) -> None:
    """Prevents an error, or a read past the end, for a small validation file."""
    (tmp_path / "v.txt").write_text("abc")
    data = DataSettings(validation=[SourceSettings(paths=[str(tmp_path / "v.txt")])], seq_len=16)
    ((batch,),) = validation_rows(data, BYTES, 5, folder=tmp_path / "t").values()
    assert batch.inputs.tolist() == [[START, *b"abc", *[START] * 12]]
    assert batch.labels.tolist() == [[*b"abc", *[-100] * 13]]


def test_with_validation_all_text_is_for_training(tmp_path: Path) -> None:
    """Prevents text that is neither trained nor evaluated on."""
    data = settings(tmp_path, ["a" * 500], holdout=0.1, validation=[SourceSettings(paths=["elsewhere.txt"])])
    assert Rows(data, seed=0, folder=tmp_path / "t").n_tokens == [501]


def test_training_files_are_refused_for_validation(tmp_path: Path) -> None:
    """Prevents a validation loss on training text."""
    data = settings(tmp_path, documents(30, 3))
    both = DataSettings(sources=data.sources, validation=[SourceSettings(paths=[str(Path(data.sources[0].paths[0]).parent)])])
    with pytest.raises(ValueError, match=r"0\.jsonl is in both data\.sources and data\.validation"):
        validation_rows(both, BYTES, 4, folder=tmp_path / "t")
    assert validation_rows(data, BYTES, 4, folder=tmp_path / "t") == {}  # holdout is 0
    with pytest.raises(ValueError, match="at least 1"):
        validation_rows(data, BYTES, 0, folder=tmp_path / "t")
