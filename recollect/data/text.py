"""Byte-level language modelling on any UTF-8 text: 256 bytes and one symbol that starts a document.

Axis legend: n rows, T time (seq_len).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.data.files import Paths, find_files, read_documents
from recollect.tasks.base import IGNORE, Batch

DOCUMENT_START = 256
VOCAB_SIZE = 257


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of `text` as tokens int64 [T]; put DOCUMENT_START before them where a document begins."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """The text of tokens [T]; bytes that are no UTF-8 become U+FFFD, DOCUMENT_START and IGNORE vanish."""
    return bytes(token for token in tokens.tolist() if 0 <= token < DOCUMENT_START).decode("utf-8", errors="replace")


class ByteText:
    """A text to train on and a held-out part to evaluate on, both packed into windows of `seq_len` bytes.

    Documents are concatenated, each after DOCUMENT_START. Labels are the next byte, IGNORE where a document starts, so that the
    mean cross entropy over labels / ln 2 is bits per byte of the real text.

    What is held out: documents are gathered in order into groups just long enough that `holdout` of one is `seq_len` bytes (a
    long document is a group by itself); the last `holdout` of every group is held out and never trained on. So a book gives its
    end, several books give their ends, and of many short documents some are held out whole (at most one per group is cut).
    A held-out piece starts with DOCUMENT_START even where it continues a document: nothing of the training part is its context.

    Attributes:
        vocab_size: 257.
        length: T, tokens of a window.
        n_train_bytes, n_evaluation_bytes: bytes of text in the two parts.
        fingerprint: sha256 of the documents and of which of their bytes are held out, 64 hex digits.
    """

    name = "text"
    vocab_size = VOCAB_SIZE

    def __init__(self, paths: Paths, *, seq_len: int, holdout: float = 0.1, evaluation_paths: Paths | None = None) -> None:
        """Read the text into memory (2 bytes per byte; about 4 while reading).

        Args:
            paths: files, folders or globs to train on (see `files.find_files`).
            seq_len: T >= 1.
            holdout: share held out, in (0, 1); unused with evaluation_paths.
            evaluation_paths: files to evaluate on instead; then all of `paths` is for training.
        Raises:
            ValueError: nothing found, a file that is empty, unreadable, not UTF-8 or in both parts, or too little text.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is at least 1; got {seq_len}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout is a share between 0 and 1, exclusive; got {holdout}")
        files = find_files(paths)
        if evaluation_paths is None:
            # So many bytes leave seq_len bytes for evaluation and seq_len for training.
            n_least = ceil(max(seq_len / holdout, (seq_len + 1) / (1 - holdout)))
            train, held = _split(list(read_documents(files)), n_least=n_least, holdout=holdout)
            given = f"seq_len={seq_len} with holdout={holdout}"
        else:
            n_least = seq_len
            train, held = list(read_documents(files)), list(read_documents(_apart(files, find_files(evaluation_paths))))
            given = f"seq_len={seq_len}"
        self.length = seq_len
        self.n_train_bytes, self.n_evaluation_bytes = (sum(map(len, part)) for part in (train, held))
        self.fingerprint = _fingerprint(train, held)
        self._train, self._held = _stream(train), _stream(held)
        if evaluation_paths is not None and self.n_evaluation_bytes == 0:
            raise ValueError(f"evaluation_paths={evaluation_paths} hold no text, only empty documents")
        if len(self._train) <= seq_len or self.n_evaluation_bytes == 0:
            what = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more together"
            raise ValueError(
                f"too little text: {what} hold {self.n_train_bytes} bytes, {given} needs {n_least}; add text or lower seq_len"
            )

    def train_batch(self, n: int, *, seed: int) -> Batch:
        """n windows at uniform places of the training text, a pure function of (text, n, seed): int64 [n, T]; tag `start`."""
        if n < 1:
            raise ValueError(f"n, the number of windows, is at least 1; got {n}")
        starts = np.random.default_rng(seed).integers(len(self._train) - self.length, size=n)
        return _windows(self._train, starts, self.length)

    def evaluation_batches(self, batch_size: int, *, n_bytes: int | None = None) -> Iterator[Batch]:
        """The held-out text in windows that do not overlap: every held-out byte is a label exactly once.

        A window's first bytes have no context but the window itself, so the score depends (alike for all models) on seq_len.

        Args:
            batch_size: rows of a batch; the last may have fewer. The last window is filled up with DOCUMENT_START, not asked.
            n_bytes: if given, only ceil(n_bytes / T) windows, spread evenly over the held-out text, always the same ones.
        """
        if batch_size < 1 or (n_bytes is not None and n_bytes < 1):
            raise ValueError(f"batch_size and n_bytes are at least 1; got batch_size={batch_size}, n_bytes={n_bytes}")
        n_windows = ceil((len(self._held) - 1) / self.length)
        chosen = np.arange(n_windows)
        if n_bytes is not None:
            n_chosen = min(n_windows, ceil(n_bytes / self.length))
            chosen = np.arange(n_chosen) * n_windows // n_chosen
        starts = np.split(chosen * self.length, range(batch_size, len(chosen), batch_size))
        return (_windows(self._held, part, self.length) for part in starts)

    def text(self, tokens: Tensor) -> str:
        """A readable form of tokens [T]."""
        return decode(tokens)


def _split(documents: list[bytes], *, n_least: int, holdout: float) -> tuple[list[bytes], list[bytes]]:
    """Training and held-out pieces: the last `holdout` of every group of documents that has at least n_least bytes."""
    groups: list[list[bytes]] = [[]]
    size = 0
    for document in documents:
        if size >= n_least:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += len(document)
    if size < n_least:
        if len(groups) == 1:
            return documents, []
        groups[-2:] = [groups[-2] + groups[-1]]
    train: list[bytes] = []
    held: list[bytes] = []
    for group in groups:
        left = sum(map(len, group))
        left -= ceil(left * holdout)
        for document in group:
            cut = min(left, len(document))
            left -= cut
            train += [document[:cut]] if cut else []
            held += [document[cut:]] if cut < len(document) else []
    return train, held


def _stream(documents: list[bytes]) -> NDArray[np.uint16]:
    """One array of tokens: DOCUMENT_START and the bytes of each document."""
    stream = np.full(sum(map(len, documents)) + len(documents), DOCUMENT_START, np.uint16)
    end = 0
    for document in documents:
        stream[end + 1 : end + 1 + len(document)] = np.frombuffer(document, np.uint8)
        end += 1 + len(document)
    return stream


def _windows(stream: NDArray[np.uint16], starts: NDArray[np.int64], length: int) -> Batch:
    """Windows [n, T] of `stream` at starts [n]; labels are the next tokens, IGNORE at document starts and past the end."""
    places = starts[:, None] + np.arange(length + 1)
    tokens = stream.take(places, mode="clip").astype(np.int64)
    tokens[places >= len(stream)] = DOCUMENT_START
    labels = np.where(tokens[:, 1:] == DOCUMENT_START, IGNORE, tokens[:, 1:])
    tags = [{"start": start} for start in starts.tolist()]
    return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(labels), tags)


def _fingerprint(train: list[bytes], held: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in (train, held):
        digest.update(f"{len(part)};".encode())
        for document in part:
            digest.update(f"{len(document)}:".encode())
            digest.update(document)
    return digest.hexdigest()


def _apart(files: list[Path], evaluation_files: list[Path]) -> list[Path]:
    """The evaluation files, which must not be training files."""
    both = {file.resolve() for file in files} & {file.resolve() for file in evaluation_files}
    if both:
        raise ValueError(f"{min(both)} is in both the training and the evaluation paths; leave it out of one")
    return evaluation_files
