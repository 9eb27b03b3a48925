"""Text in windows: what is read, what is held out, how it is packed, and what is refused. Expectations are built by hand."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from recollect.data import DOCUMENT_START, VOCAB_SIZE, TextWindows, decode, encode, load_tokenizer, train_tokenizer
from recollect.tasks import IGNORE


def unique_text(n_bytes: int, seed: int) -> bytes:
    """Random letters; any 12 of them stand once in all of a test's text, so a passage can be looked up."""
    return bytes(random.Random(seed).choices(b"abcdefghijklmnopqrstuvwxyz", k=n_bytes))


def held_out(text: TextWindows, batch_size: int = 3, n_windows: int | None = None) -> bytes:
    """All labels of the evaluation batches, in order."""
    batches = list(text.evaluation_batches(batch_size, n_windows=n_windows))
    return bytes(int(label) for batch in batches for label in batch.labels[batch.labels != IGNORE])


def write(folder: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_encode_decode_round_trip() -> None:
    """Prevents lost or shifted bytes; a broken character decodes to U+FFFD instead of failing."""
    assert decode(encode("naïve 試験 \u2028 \r\n")) == "naïve 試験 \u2028 \r\n"
    assert encode("é").tolist() == [0xC3, 0xA9]
    assert decode(torch.tensor([DOCUMENT_START, 0xC3, 65, IGNORE])) == "\ufffdA"
    assert encode("").shape == (0,)
    assert VOCAB_SIZE == 257


def test_one_book_is_cut_at_its_end(tmp_path: Path) -> None:
    """The last tenth is held out; every one of its bytes is a label once; none of it is in a training window."""
    book = unique_text(1000, 1)
    text = TextWindows(write(tmp_path, a_txt=book), seq_len=16)
    assert (text.n_train_bytes, text.n_evaluation_bytes) == (900, 100)
    assert (text.tokenizer.vocab_size, text.length) == (257, 16)
    assert held_out(text) == book[900:]
    batches = list(text.evaluation_batches(3))
    assert [batch.inputs.shape for batch in batches] == [(3, 16), (3, 16), (1, 16)]
    assert batches[0].inputs[0].tolist() == [DOCUMENT_START, *book[900:915]]
    assert batches[0].labels[0].tolist() == list(book[900:916])
    assert batches[-1].inputs[-1].tolist() == [*book[995:1000], *[DOCUMENT_START] * 11]
    assert batches[-1].labels[-1].tolist() == [*book[996:1000], *[IGNORE] * 12]


def test_training_windows_are_the_training_text(tmp_path: Path) -> None:
    """Labels are the next tokens; every place can be drawn, the held-out part never."""
    book = unique_text(300, 2)
    text = TextWindows(write(tmp_path, a_txt=book), seq_len=16)
    stream = [DOCUMENT_START, *book[:270]]
    inputs, labels, tags = text.train_batch(4000, seed=5)
    assert inputs.dtype == labels.dtype == torch.int64
    assert {tag["start"] for tag in tags} == set(range(271 - 16))
    for row in range(200):
        start = tags[row]["start"]
        assert inputs[row].tolist() == stream[start : start + 16]
        assert labels[row].tolist() == stream[start + 1 : start + 17]


def test_train_batch_is_a_function_of_the_seed(tmp_path: Path) -> None:
    """Prevents hidden state, which a resumed run could not restore."""
    text = TextWindows(write(tmp_path, a_txt=unique_text(2000, 3)), seq_len=8)
    first = text.train_batch(4, seed=1)
    text.train_batch(4, seed=2)
    again = text.train_batch(4, seed=1)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, text.train_batch(4, seed=2).inputs)


def test_document_starts_are_read_and_never_asked(tmp_path: Path) -> None:
    """Bits per byte counts real bytes only: the label is IGNORE exactly where the next token starts a document."""
    lines = "\n".join(json.dumps({"text": f"document {i} é", "id": i}) for i in range(60))
    text = TextWindows(write(tmp_path, a_jsonl=lines), seq_len=20)
    inputs, labels, _ = text.train_batch(300, seed=0)
    starts = inputs[:, 1:] == DOCUMENT_START
    assert bool(starts.any())
    assert torch.equal(labels[:, :-1] == IGNORE, starts)
    for row in inputs.tolist():
        for t, token in enumerate(row[:-2]):
            if token == DOCUMENT_START:
                assert row[t + 1 : t + 3] == list(b"do")


@pytest.mark.parametrize(
    "sizes", [[900, 700, 3000], [40] * 70, [5000, 10, 10, 10], [10, 10, 10, 5000, 30], [170, 1], [333] * 9]
)
@pytest.mark.parametrize("holdout", [0.1, 0.25])
def test_every_byte_is_in_exactly_one_part(tmp_path: Path, sizes: list[int], holdout: float) -> None:
    """Prevents leaked or lost text, whatever the documents' sizes; the share held out is the one asked for."""
    documents = [unique_text(size, seed) for seed, size in enumerate(sizes)]
    lines = "\n".join(json.dumps({"text": document.decode()}) for document in documents)
    text = TextWindows(write(tmp_path, a_jsonl=lines), seq_len=16, holdout=holdout)
    total = sum(sizes)
    held = held_out(text)
    train = bytes(token for token in text._train.tolist() if token != DOCUMENT_START)
    assert len(held) == text.n_evaluation_bytes
    assert len(train) == text.n_train_bytes
    assert Counter(held) + Counter(train) == Counter(b"".join(documents))
    assert len(held) >= 16
    assert abs(len(held) - holdout * total) <= total / (16 / holdout) + 1
    passages = {held[i : i + 12] for i in range(len(held) - 11)} & {train[i : i + 12] for i in range(len(train) - 11)}
    assert not passages


def test_long_documents_give_their_ends_and_short_ones_are_spread(tmp_path: Path) -> None:
    """Every book gives its own end; of short documents every tenth or so is held out, not a run at the end of the data."""
    books = [unique_text(1000, 1), unique_text(500, 2)]
    text = TextWindows(write(tmp_path, a_txt=books[0], b_txt=books[1]), seq_len=16)
    assert held_out(text) == books[0][900:] + books[1][450:]
    lines = "\n".join(json.dumps({"text": f"{i:04d}|"}) for i in range(1000))
    text = TextWindows(write(tmp_path / "short", a_jsonl=lines), seq_len=5)
    assert held_out(text) == b"".join(b"%04d|" % i for i in range(9, 1000, 10))


def test_limited_evaluation_spreads_over_the_text(tmp_path: Path) -> None:
    """Prevents a score of the first pages only; the windows are the same at every call."""
    book = unique_text(4000, 4)
    text = TextWindows(write(tmp_path, a_txt=book), seq_len=10)
    few = held_out(text, n_windows=10)
    assert few == b"".join(book[3600 + 40 * i : 3610 + 40 * i] for i in range(10))
    assert held_out(text, n_windows=10**9) == held_out(text, batch_size=7) == book[3600:]


def test_loss_over_labels_is_bits_per_byte(tmp_path: Path) -> None:
    """A uniform model over 256 bytes costs exactly 8 bits a byte, whatever the windows' filling."""
    text = TextWindows(write(tmp_path, a_txt=unique_text(777, 5)), seq_len=13)
    logits = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    logits[DOCUMENT_START] = -torch.inf
    total, count = 0.0, 0
    for batch in text.evaluation_batches(4):
        rows = logits.expand(*batch.labels.shape, VOCAB_SIZE).flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(rows, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"))
        count += int((batch.labels != IGNORE).sum())
    assert count == text.n_evaluation_bytes
    assert total / count / math.log(2) == pytest.approx(8, abs=1e-12)


def test_folders_files_and_globs_are_read_once_and_in_order(tmp_path: Path) -> None:
    """Prevents text that counts twice (also in both parts), order that depends on the file system, and hidden files."""
    names = ["a.txt", "b/c.md", "b/d.jsonl", "z.txt"]
    parts = [unique_text(400, seed) for seed in range(4)]
    write(tmp_path, z_txt=parts[3], a_txt=parts[0], b__c_md=parts[1], b__d_jsonl=json.dumps({"text": parts[2].decode()}))
    write(tmp_path, b__e_bin=b"\xff\xfe", empty_txt=b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_bytes(unique_text(400, 9))
    expected = b"".join(part[360:] for part in parts)
    assert held_out(TextWindows(tmp_path, seq_len=16)) == expected
    assert held_out(TextWindows([tmp_path / name for name in names], seq_len=16)) == expected
    assert held_out(TextWindows([tmp_path, tmp_path / "a.txt", str(tmp_path / "b" / "*.md")], seq_len=16)) == expected
    glob_all = TextWindows([str(tmp_path / "*.txt"), str(tmp_path / "b" / "[cd].*")], seq_len=16, evaluation_paths=None)
    assert held_out(glob_all) == b"".join(parts[i][360:] for i in (0, 3, 1, 2))
    assert held_out(TextWindows(str(tmp_path / "**" / "*.txt"), seq_len=16)) == b"".join(parts[i][360:] for i in (0, 3))


def test_a_file_named_like_a_glob_is_that_file(tmp_path: Path) -> None:
    """Prevents `book[1].txt` from being taken for a pattern."""
    book = unique_text(400, 1)
    (tmp_path / "book[1].txt").write_bytes(book)
    assert held_out(TextWindows(tmp_path / "book[1].txt", seq_len=16)) == book[360:]


def test_separate_evaluation_files(tmp_path: Path) -> None:
    """With evaluation_paths everything in `paths` trains and nothing of the evaluation files does."""
    write(tmp_path, a_txt=unique_text(400, 1), v_txt=unique_text(50, 2))
    text = TextWindows(tmp_path / "a.txt", seq_len=16, evaluation_paths=tmp_path / "v.txt")
    assert text.n_train_bytes == 400
    assert held_out(text) == unique_text(50, 2)
    with pytest.raises(ValueError, match=r"a\.txt is in both"):
        TextWindows(tmp_path / "a.txt", seq_len=16, evaluation_paths=tmp_path)
    (tmp_path / "none.jsonl").write_text('{"text": ""}')
    with pytest.raises(ValueError, match=r"none\.jsonl hold no text"):
        TextWindows(tmp_path / "a.txt", seq_len=16, evaluation_paths=tmp_path / "none.jsonl")


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    """Prevents a resumed run on other text: names and folders do not count, one byte, a boundary or the split does."""
    book = unique_text(1000, 1)
    write(tmp_path, a_txt=book, b__other_txt=book, c__x_txt=book[:500], c__y_txt=book[500:], d_txt=book[:-1] + b"!")

    def fingerprint(name: str, **options: float) -> str:
        return TextWindows(tmp_path / name, seq_len=16, **options).fingerprint

    assert fingerprint("a.txt") == fingerprint("b")
    assert len(fingerprint("a.txt")) == 64
    others = [fingerprint("c"), fingerprint("d.txt"), fingerprint("a.txt", holdout=0.2)]
    assert len({fingerprint("a.txt"), *others}) == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"abc\xe9t" * 9, r"a\.txt is not UTF-8: byte 0xe9 at offset 3 "),
        ("a.txt", "é".encode()[:1], r"a\.txt is not UTF-8: byte 0xc3 at offset 0 "),
        ("a.txt", b"short", r"a\.txt hold 5 bytes, seq_len=16 with holdout=0.1 needs 160"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y"}',
            r"a\.jsonl, line 3 has no string field \"text\"; its fields are \['body'\]",
        ),
        ("a.jsonl", b'{"text": 3}', r"line 1 has no string field"),
        ("a.jsonl", b"[1]", r"line 1 has no string field \"text\"; it is a list"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1 has half a surrogate pair at character 0"),
        ("a.jsonl", b'{"text": ""}', r"hold 0 bytes"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """Prevents a traceback, or training on nothing or on garbage: the message names file, line or offset."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        TextWindows(tmp_path / name, seq_len=16)


def test_bad_paths_are_named(tmp_path: Path) -> None:
    """Prevents a traceback for a path that cannot be read."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.txt").symlink_to(tmp_path / "nowhere")
    for paths, says in [
        (tmp_path / "no.txt", r"no such file or folder: .*no\.txt"),
        (str(tmp_path / "*.txt"), r"no file matches .*\*\.txt"),
        (tmp_path / "empty", r"folder .*empty has no text file"),
        (tmp_path / "links", r"cannot read .*gone\.txt: No such file"),
        (tmp_path / ("x" * 300), "cannot look at .*xxx: File name too long"),
        ("/dev/null", "neither a regular file nor a folder"),
        ([], "no data path given"),
    ]:
        with pytest.raises(ValueError, match=says):
            TextWindows(paths, seq_len=16)


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    """Prevents empty windows and an empty part; the least text that is accepted gives one whole window each."""
    path = write(tmp_path, a_txt=unique_text(1000, 1)) / "a.txt"
    for options, says in [
        ({"seq_len": 0}, "seq_len is at least 1"),
        ({"seq_len": 8, "holdout": 0.0}, "holdout is a share"),
        ({"seq_len": 8, "holdout": 1.0}, "holdout is a share"),
        ({"seq_len": 101}, "hold 1000 bytes, seq_len=101 with holdout=0.1 needs 1010"),
        ({"seq_len": 500, "holdout": 0.5}, "needs 1002"),
        ({"seq_len": 500, "evaluation_paths": str(tmp_path)}, "in both"),
    ]:
        with pytest.raises(ValueError, match=says):
            TextWindows(path, **options)
    text = TextWindows(path, seq_len=100)
    assert [batch.inputs.shape for batch in text.evaluation_batches(8)] == [(1, 100)]
    with pytest.raises(ValueError, match="at least 1"):
        text.train_batch(0, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        text.evaluation_batches(0)
    with pytest.raises(ValueError, match="at least 1"):
        text.evaluation_batches(1, n_windows=0)
    train = write(tmp_path / "t", a_txt=b"x" * 16, v_txt=b"y")
    assert TextWindows(train / "a.txt", seq_len=16, evaluation_paths=train / "v.txt").train_batch(1, seed=0).inputs.shape == (
        1,
        16,
    )
    with pytest.raises(ValueError, match="hold 16 bytes, seq_len=17 needs 17"):
        TextWindows(train / "a.txt", seq_len=17, evaluation_paths=train / "v.txt")


def test_characters_are_never_cut(tmp_path: Path) -> None:
    """Half a character at the seam would be a broken letter in both parts, and could not be tokenised."""
    book = "試験のé😀本" * 50
    for holdout in (0.1, 0.101, 0.102, 0.103, 0.104):
        text = TextWindows(write(tmp_path, a_txt=book), seq_len=16, holdout=holdout)
        held = held_out(text).decode("utf-8")
        assert book.endswith(held)
        assert text.n_train_bytes + text.n_evaluation_bytes == len(book.encode())


def test_another_tokenizer_asks_for_the_same_text(tmp_path: Path) -> None:
    """Bits per byte of two tokenizers compare only if they are held to account for the same bytes."""
    words = random.Random(0).choices(["house", "of", "the", "möwe", "sea", "\n", "and"], k=4000)
    lines = "\n".join(json.dumps({"text": " ".join(words[i : i + 50])}) for i in range(0, 4000, 50))
    folder = write(tmp_path / "text", a_jsonl=lines)
    tokenizer = load_tokenizer(train_tokenizer(folder, vocab_size=280, out=tmp_path))
    in_bytes = TextWindows(folder, seq_len=64)
    text = TextWindows(folder, seq_len=64, tokenizer=tokenizer)
    assert (text.n_train_bytes, text.n_evaluation_bytes) == (in_bytes.n_train_bytes, in_bytes.n_evaluation_bytes)
    assert text.fingerprint != in_bytes.fingerprint
    batches = list(text.evaluation_batches(4))
    asked = torch.cat([batch.labels[batch.labels != IGNORE] for batch in batches])
    assert tokenizer.decode(asked.numpy()) == held_out(in_bytes).decode()
    assert sum(text.n_bytes(batch.labels) for batch in batches) == text.n_evaluation_bytes
    assert len(asked) < text.n_evaluation_bytes / 2
    inputs, labels, _ = text.train_batch(200, seed=0)
    assert torch.equal(labels[:, :-1] == IGNORE, inputs[:, 1:] == tokenizer.start)
    assert bool((inputs == tokenizer.start).any())
    assert text.text(inputs[0]) in "".join("".join(json.loads(line)["text"]) for line in lines.splitlines())


def test_too_little_text_is_counted_in_tokens(tmp_path: Path) -> None:
    """200 bytes are enough for 16 bytes, not for 16 tokens of 13 bytes."""
    path = write(tmp_path, a_txt="hello there, " * 20) / "a.txt"
    tokenizer = load_tokenizer(train_tokenizer(path, vocab_size=265, out=tmp_path / "tokenizer.json"))
    assert TextWindows(path, seq_len=16).n_train_bytes
    with pytest.raises(ValueError, match=r"hold \d+ tokens, seq_len=200 with holdout=0.5 needs 402"):
        TextWindows(path, seq_len=200, holdout=0.5, tokenizer=tokenizer)
