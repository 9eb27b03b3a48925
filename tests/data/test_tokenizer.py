"""Tokenizers: nothing of a text is lost, documents' starts cannot be written in a text, bytes are counted right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from recollect.data.tokenizer import PIECE_CHARACTERS, START, ByteTokenizer, FileTokenizer, load_tokenizer, train_tokenizer

TEXT = "The naïve cat's 試験 sat.\r\n\tOn the mat,  twice \u2028 — 12,345 times.\n\n\nThe end 🙂\n"


def trained(tmp_path: Path, vocab_size: int = 300) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 50 + "the cat sat on the mat\n" * 50, encoding="utf-8", newline="")
    return train_tokenizer(file, vocab_size=vocab_size, out=tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_survives(tmp_path: Path, kind: str) -> None:
    """Prevents lost or changed characters, white space and line ends included, and wrong counts of bytes."""
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else trained(tmp_path))
    texts = [TEXT, "", "é", " two  spaces ", "\n", "never seen: ǅ ☃ \x00"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype.kind == "u"
        assert tokenizer.decode(ids) == text
        assert int(tokenizer.bytes_of(ids).sum()) == len(text.encode())
        assert tokenizer.start not in ids
        assert ids.max(initial=0) < tokenizer.vocab_size
    assert tokenizer.decode(torch.tensor([tokenizer.start, -100])) == ""
    assert tokenizer.bytes_of(torch.tensor([[tokenizer.start, -100]])).tolist() == [[0, 0]]


def test_bytes_are_the_project_s_bytes() -> None:
    """Prevents a second byte-level vocabulary: ids and start are those of `recollect.data.text`."""
    from recollect.data import DOCUMENT_START, VOCAB_SIZE, encode

    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode_batch([TEXT])[0].tolist() == encode(TEXT).tolist()
    assert (tokenizer.vocab_size, tokenizer.start) == (VOCAB_SIZE, DOCUMENT_START)


def test_bytes_of_each_token(tmp_path: Path) -> None:
    """Prevents bits per byte over wrong bytes: the bytes of a token are what it adds to the text, also half a character."""
    tokenizer = load_tokenizer(trained(tmp_path))
    (ids,) = tokenizer.encode_batch([TEXT])
    said = np.cumsum(tokenizer.bytes_of(ids)).tolist()
    for n, n_bytes in enumerate(said, start=1):
        assert tokenizer.decode(ids[:n]) == TEXT.encode()[:n_bytes].decode("utf-8", "replace")
    assert len(ids) < len(TEXT.encode())  # some tokens are of several bytes


def test_a_text_cannot_write_a_start(tmp_path: Path) -> None:
    """Prevents documents that are cut, and tokens of no bytes, where a text happens to hold the start token's name."""
    tokenizer = load_tokenizer(trained(tmp_path))
    (ids,) = tokenizer.encode_batch([f"a{START}b"])
    assert tokenizer.start not in ids
    assert tokenizer.decode(ids) == f"a{START}b"


def test_long_texts_are_encoded_as_in_one_piece(tmp_path: Path) -> None:
    """Prevents tokens that depend on where a long text is divided for speed: the library's own encoding of the whole is the same."""
    file = trained(tmp_path)
    rng = random.Random(0)
    words = ["the", "cat", " ", "  ", "\n", "\n\n", "\r\n", "\t", "é", ".", "\n", "12"]
    text = "".join(rng.choices(words, k=PIECE_CHARACTERS * 3))
    whole = tokenizers.Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    tokenizer = load_tokenizer(file)
    first, second, third = tokenizer.encode_batch([text, "the cat", "x" * (PIECE_CHARACTERS + 9)])
    assert first.tolist() == whole
    assert [tokenizer.decode(second), tokenizer.decode(third)] == ["the cat", "x" * (PIECE_CHARACTERS + 9)]


def test_a_stream_has_the_tokens_of_the_whole(tmp_path: Path) -> None:
    """Wherever its parts end: a word cut in two would be read as other tokens, and be remembered as such."""
    text = "\n".join(f"line {i} of the möwe's book, {i * 7919 % 1000} words" for i in range(PIECE_CHARACTERS // 12))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for tokenizer in (load_tokenizer(train_tokenizer(tmp_path / "a.txt", vocab_size=300, out=tmp_path)), ByteTokenizer()):
        (whole,) = tokenizer.encode_batch([text])
        for size in (1 << 10, 50_001):
            stretches = list(tokenizer.encode_stream(text[i : i + size] for i in range(0, len(text), size)))
            assert len(stretches) > 2
            assert np.array_equal(np.concatenate(stretches), whole)
    assert max(map(len, ByteTokenizer().encode_stream(["é" * 100] * 9))) == 200, "bytes need no line end to be cut at"


def test_fingerprint_is_of_the_tokenizer(tmp_path: Path) -> None:
    """Prevents tokens of one tokenizer being read with another; a copy elsewhere is the same."""
    file = trained(tmp_path)
    copy = tmp_path / "copy.json"
    copy.write_bytes(file.read_bytes())
    other = train_tokenizer(tmp_path / "text.txt", vocab_size=299, out=tmp_path / "other.json")
    assert other == tmp_path / "other.json"
    prints = [load_tokenizer(path).fingerprint for path in (file, copy, file.parent, other, "bytes")]
    assert prints[0] == prints[1] == prints[2]
    assert len(set(prints)) == 3
    assert sorted(path.name for path in file.parent.iterdir()) == ["tokenizer.json"]


def test_a_model_s_own_start_is_taken(tmp_path: Path) -> None:
    """Prevents documents that start with a token the model knows as something else, as when a pretrained model is continued."""
    file = trained(tmp_path)
    saved = json.loads(file.read_text())
    saved["added_tokens"].append({**saved["added_tokens"][0], "id": 300, "content": "<s>"})
    file.write_text(json.dumps(saved))
    assert load_tokenizer(file).start == 0
    config = file.parent / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": START}))
    assert load_tokenizer(file.parent).start == 300
    assert load_tokenizer(file.parent).vocab_size == 301
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<s>"}))
    assert load_tokenizer(file.parent).start == 300
    config.write_text(json.dumps({"bos_token": "<none>"}))
    with pytest.raises(ValueError, match="its start token '<none>' is not among its special tokens"):
        load_tokenizer(file.parent)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer_config\.json"):
        load_tokenizer(file.parent)


def test_sentence_pieces_are_counted() -> None:
    """Prevents counting the marks of SentencePiece vocabularies as text: "▁" is a space, "<0xE2>" one byte."""
    vocabulary = {"<s>": 0, "<unk>": 1, "▁": 2, "▁cat": 3, "é": 4, "cat": 5, **{f"<0x{i:02X}>": 6 + i for i in range(256)}}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    plain = tokenizers.Tokenizer(model)
    plain.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    plain.add_special_tokens(["<s>"])
    tokenizer = FileTokenizer(plain, start="<s>", where="here")
    assert tokenizer.bytes_of([0, 2, 3, 4, 5, 6 + 0xE2, -100]).tolist() == [0, 1, 4, 2, 3, 1, 0]
    (ids,) = tokenizer.encode_batch(["é 試"])
    assert tokenizer.decode(ids) == "é 試"
    assert int(tokenizer.bytes_of(ids).sum()) == len("é 試".encode())


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    """Prevents a traceback, and bits per byte of tokens that are not pieces of the text."""
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "<s>": 2}, unk_token="[UNK]"))
    words.add_special_tokens(["<s>"])
    words.decoder = tokenizers.decoders.WordPiece()
    words.save(str(tmp_path / "words.json"))
    nameless = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    nameless.save(str(tmp_path / "nameless.json"))
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "short.txt").write_text("abc")
    for path, says in [
        (tmp_path / "missing.json", r"no tokenizer at .*missing\.json"),
        (tmp_path, r"no tokenizer at .*tokenizer\.json"),
        (tmp_path / "no.json", r"no\.json is not a tokenizer"),
        (tmp_path / "nameless.json", r"nameless\.json has no token that can start a document"),
        (tmp_path / "words.json", r"words\.json: tokens of this kind \(decoder WordPiece\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="start token 'a' is not among its special tokens"):  # text may encode to it
        FileTokenizer(nameless, start="a", where="here")
    with pytest.raises(ValueError, match="vocab_size is at least 257"):
        train_tokenizer(tmp_path / "short.txt", vocab_size=256, out=tmp_path / "t")
    with pytest.raises(ValueError, match="the text gives only 259 tokens, vocab_size=400"):
        train_tokenizer(tmp_path / "short.txt", vocab_size=400, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()
