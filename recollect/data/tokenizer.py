"""Text to tokens and back: bytes, or a file of the tokenizers library; and training a byte-level BPE on one's own text."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from recollect.data.files import ALL_SUFFIXES, Paths, find_files, read_documents
from recollect.data.formats import missing_package
from recollect.data.text import DOCUMENT_START, VOCAB_SIZE, decode

if TYPE_CHECKING:
    import tokenizers
    import torch

    Ids: TypeAlias = Sequence[int] | NDArray[Any] | torch.Tensor

START = "<|document|>"
# Where a tokenizer does not say which token begins a text: the first of these that it has.
STARTS = (START, "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", "<|endoftext|>", "<eos>", "</s>")
PIECE_CHARACTERS = 1 << 16  # longer documents are encoded in pieces of about this size
PIECES_AT_ONCE = 1024


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocab_size: ids are 0 ... vocab_size - 1.
        start: id of the token that is put before every document; text never encodes to it.
        fingerprint: what text becomes depends on nothing else; equal for equal tokenizers wherever their files are.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Tokens of each text, unsigned integers [T], without the start token."""

    def encode_stream(self, parts: Iterable[str]) -> Iterator[NDArray[Any]]:
        """The tokens of the text that the parts are together, cut wherever, a stretch at a time."""

    def decode(self, ids: Ids) -> str:
        """The text of tokens [T]; start and negative ids (labels that are not asked) vanish, broken characters are U+FFFD."""

    def bytes_of(self, ids: Ids) -> NDArray[np.int64]:
        """Bytes of UTF-8 text that each token stands for, int64 of the shape of ids; 0 for start and negative ids."""


class ByteTokenizer:
    """256 bytes and `DOCUMENT_START`."""

    vocab_size = VOCAB_SIZE
    start = DOCUMENT_START
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_stream(self, parts: Iterable[str]) -> Iterator[NDArray[Any]]:
        return (self.encode_batch([part])[0] for part in parts)

    def decode(self, ids: Ids) -> str:
        return decode(np.asarray(ids))

    def bytes_of(self, ids: Ids) -> NDArray[np.int64]:
        tokens = np.asarray(ids)
        return ((tokens >= 0) & (tokens < DOCUMENT_START)).astype(np.int64)


class FileTokenizer:
    """A tokenizer of the tokenizers library whose tokens are pieces of the text: byte-level (as GPT-2's) or SentencePiece-like.

    Special tokens that stand in a text ("<s>") are encoded as the characters they are.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, start: str, where: str) -> None:
        """
        Args:
            tokenizer: changed in place: no truncation, no padding.
            start: the token that begins a document.
            where: what errors call it.
        Raises:
            ValueError: no such special token, or tokens that are not pieces of the text (WordPiece), so that bits per byte have no
                meaning.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        text = tokenizer.to_str()
        description = json.loads(text)
        if start not in _special_tokens(description):
            raise ValueError(f"{where}: its start token {start!r} is not among its special tokens; correct bos_token")
        self._tokenizer = tokenizer
        self.description = text
        self._bytes = _bytes_of_tokens(description, tokenizer.get_vocab(with_added_tokens=True), where)
        self._is_byte_level = "ByteLevel" in _kinds(description["decoder"])
        self.start = _special_tokens(description)[start]
        self.vocab_size = len(self._bytes)
        self.fingerprint = hashlib.sha256(f"{self.start}:{text}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        # In pieces, some at a time: one long text would use one thread, and the library about 100 bytes of memory per token.
        pieces = [list(cut_text(text)) if self._is_byte_level else [text] for text in texts]
        flat = [piece for some in pieces for piece in some]
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        encoded = (
            np.array(encoding.ids, dtype)
            for first in range(0, len(flat), PIECES_AT_ONCE)
            for encoding in self._tokenizer.encode_batch_fast(flat[first : first + PIECES_AT_ONCE], add_special_tokens=False)
        )
        return [np.concatenate([next(encoded) for _ in some]) for some in pieces]

    def encode_stream(self, parts: Iterable[str]) -> Iterator[NDArray[Any]]:
        # Held back: what comes after the last line end at which any tokenizer of this kind would cut; of other kinds everything.
        held = ""
        for part in parts:
            held += part
            if self._is_byte_level:
                *whole, held = cut_text(held)
                yield from self.encode_batch(whole)
        yield from self.encode_batch([held])

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode([token for token in np.asarray(ids).tolist() if token >= 0 and token != self.start])

    def bytes_of(self, ids: Ids) -> NDArray[np.int64]:
        tokens = np.asarray(ids)
        return np.where(tokens >= 0, self._bytes[np.maximum(tokens, 0)], 0)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by name or file.

    Args:
        path: "bytes", a tokenizer.json of the tokenizers library, or a folder that holds one (such as that of a model). A
            document starts with the folder's bos_token (tokenizer_config.json), else its eos_token, else the first of STARTS
            among its special tokens.
    Raises:
        ValueError: no such file, not a tokenizer, no token to start a document with, or a kind that loses text.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"no tokenizer at {file}; give 'bytes', a tokenizer.json or a folder that holds one")
    try:
        import tokenizers
    except ImportError as error:
        raise missing_package("tokenizers", f"reading {file}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error
    known = _special_tokens(json.loads(tokenizer.to_str()))
    start = _configured_start(file.parent / "tokenizer_config.json") or next((s for s in STARTS if s in known), None)
    if start is None:
        raise ValueError(
            f"{file} has no token that can start a document; name one as bos_token in a tokenizer_config.json beside it"
        )
    return FileTokenizer(tokenizer, start=start, where=str(file))


def tokenizer_file(tokenizer: str | os.PathLike[str]) -> Path | None:
    """The file of what `load_tokenizer` takes; None for bytes, or if there is none."""
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    return file if file.is_file() else None


def _configured_start(file: Path) -> str | None:
    """bos_token, else eos_token of a tokenizer_config.json; None without the file."""
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return str(token)
    return None


def train_tokenizer(
    paths: Paths, *, vocab_size: int, out: str | os.PathLike[str], field: str = "text", progress: bool = False
) -> Path:
    """Train a byte-level BPE on text files and write it; a crash leaves no half-written file.

    Args:
        paths: files, folders, globs (see `files.find_files`).
        vocab_size: tokens in all: 256 bytes, the start token "<|document|>" (id 0), and merges; at least 257.
        out: a file to write, or a folder in which to write tokenizer.json.
        field: field that holds the text (jsonl, parquet).
        progress: the library's progress bars on stderr.
    Returns:
        the file.
    Raises:
        ValueError: bad paths or files, or vocab_size out of range; also where the text is too small for so many tokens.
    """
    files = find_files(paths, suffixes=ALL_SUFFIXES)
    texts = (piece for document in read_documents(files, field=field) for piece in cut_text(document.decode("utf-8")))
    tokenizer = learn_tokenizer(texts, vocab_size=vocab_size, progress=progress)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens, vocab_size={vocab_size} is asked; add text or ask for fewer"
        )
    file = Path(out) if Path(out).suffix == ".json" else Path(out) / "tokenizer.json"
    write_tokenizer(tokenizer.to_str(), file)
    return file


def learn_tokenizer(texts: Iterable[str], *, vocab_size: int, progress: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE learned from texts: `vocab_size` tokens as `train_tokenizer` has them, fewer where the texts give no more.

    Raises:
        ValueError: vocab_size out of range.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is at least 257, 256 bytes and the start of a document; got {vocab_size}")
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise missing_package("tokenizers", "training a tokenizer") from error
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(description: str, file: Path) -> None:
    """Write the JSON of a tokenizer; a crash leaves no half-written file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".tokenizer.") as folder:
        Path(folder, file.name).write_text(description, encoding="utf-8")
        os.replace(Path(folder, file.name), file)


def cut_text(text: str) -> Iterator[str]:
    """`text` in pieces of about PIECE_CHARACTERS, cut only after a single line end between two characters that are no white space:
    there the usual pre-tokenizers cut too, so the tokens are those of the whole text."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = text.find("\n", begin + PIECE_CHARACTERS) + 1
        while end and (end == len(text) or text[end].isspace() or text[end - 2].isspace()):
            end = text.find("\n", end) + 1
        if not end:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _bytes_of_tokens(description: dict[str, Any], vocabulary: dict[str, int], where: str) -> NDArray[np.int64]:
    """Bytes of text of every id [vocab_size]; 0 for special tokens."""
    kinds = set(_kinds(description.get("decoder")))
    if "ByteLevel" in kinds:
        count: Callable[[str], int] = len  # one character of the vocabulary per byte
    elif kinds & {"ByteFallback", "Metaspace"}:
        count = _sentence_piece_bytes
    else:
        raise ValueError(
            f"{where}: tokens of this kind (decoder {', '.join(sorted(kinds)) or 'none'}) are not pieces of the text, so bits per "
            "byte have no meaning; use a byte-level or SentencePiece tokenizer, such as `recollect tokenizer train` makes"
        )
    n_bytes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        n_bytes[index] = count(token)
    for added in description.get("added_tokens") or []:  # these stand in the vocabulary as they stand in the text
        n_bytes[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
    return n_bytes


def _special_tokens(description: dict[str, Any]) -> dict[str, int]:
    """Ids of the tokens that text does not encode to, as long as `encode_special_tokens` is set."""
    return {added["content"]: int(added["id"]) for added in description.get("added_tokens") or [] if added["special"]}


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The kinds of a decoder and of those it consists of."""
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", []):
            yield from _kinds(part)


def _sentence_piece_bytes(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("▁", " ").encode("utf-8"))
