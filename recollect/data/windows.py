"""Text in windows of equal length, held in memory: what `recollect compare text` trains and evaluates on.

Axis legend: n rows, T time (seq_len).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recollect.data.files import Paths, find_files, read_documents
from recollect.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from recollect.tasks.base import IGNORE, Batch


class TextWindows:
    """A text to train on and a held-out part to evaluate on, both packed into windows of `seq_len` tokens.

    Documents are concatenated, each after the tokenizer's start token. Labels are the next token, IGNORE where a document starts:
    what is asked is the real text and nothing else.

    What is held out: documents are gathered in order into groups just long enough that `holdout` of one is `seq_len` bytes (a
    long document is a group by itself); the last `holdout` of every group, in whole characters, is held out and never trained on.
    So a book gives its end, several books give their ends, and of many short documents some are held out whole (at most one per
    group is cut). The parts are the same for every tokenizer. A held-out piece begins with the start token even where it continues
    a document: nothing of the training part is its context.

    Attributes:
        tokenizer: as given.
        length: T, tokens of a window.
        n_train_bytes, n_evaluation_bytes: bytes of text in the two parts.
        fingerprint: sha256 of the documents, of which of their bytes are held out, and of the tokenizer, 64 hex digits.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        seq_len: int,
        holdout: float = 0.1,
        evaluation_paths: Paths | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Read the text into memory (2 bytes per token, 4 if there are more than 65,536 tokens; more while reading).

        Args:
            paths: files, folders or globs to train on (see `files.find_files`).
            seq_len: T >= 1.
            holdout: share held out, in (0, 1); unused with evaluation_paths.
            evaluation_paths: files to evaluate on instead; then all of `paths` is for training.
            tokenizer: None: bytes.
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
        self.length, self.tokenizer = seq_len, tokenizer or ByteTokenizer()
        self.n_train_bytes, self.n_evaluation_bytes = (sum(map(len, part)) for part in (train, held))
        self.fingerprint = _fingerprint(train, held, self.tokenizer)
        self._train, self._held = _stream(train, self.tokenizer), _stream(held, self.tokenizer)
        if evaluation_paths is not None and self.n_evaluation_bytes == 0:
            raise ValueError(f"evaluation_paths={evaluation_paths} hold no text, only empty documents")
        if len(self._train) <= seq_len or self.n_evaluation_bytes == 0:
            what = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more together"
            n_tokens = len(self._train) - len(train) + (0 if evaluation_paths else len(self._held) - len(held))
            unit = "tokens" if isinstance(self.tokenizer, FileTokenizer) else "bytes"
            raise ValueError(
                f"too little text: {what} hold {n_tokens} {unit}, {given} needs {n_least}; add text or lower seq_len"
            )

    def train_batch(self, n: int, *, seed: int) -> Batch:
        """n windows at uniform places of the training text, a pure function of (text, n, seed): int64 [n, T]; tag `start`."""
        if n < 1:
            raise ValueError(f"n, the number of windows, is at least 1; got {n}")
        starts = np.random.default_rng(seed).integers(len(self._train) - self.length, size=n)
        return _windows(self._train, starts, self.length, self.tokenizer.start)

    def evaluation_batches(self, batch_size: int, *, n_windows: int | None = None) -> Iterator[Batch]:
        """The held-out text in windows that do not overlap: every held-out token is a label exactly once.

        A window's first tokens have no context but the window itself, so the score depends (alike for all models) on seq_len.

        Args:
            batch_size: rows of a batch; the last may have fewer. The last window is filled up with start tokens, not asked.
            n_windows: if given, only so many, spread evenly over the held-out text, always the same ones.
        """
        if batch_size < 1 or (n_windows is not None and n_windows < 1):
            raise ValueError(f"batch_size and n_windows are at least 1; got batch_size={batch_size}, n_windows={n_windows}")
        n_all = ceil((len(self._held) - 1) / self.length)
        n_chosen = n_all if n_windows is None else min(n_all, n_windows)
        chosen = np.arange(n_chosen) * n_all // n_chosen
        starts = np.split(chosen * self.length, range(batch_size, len(chosen), batch_size))
        return (_windows(self._held, part, self.length, self.tokenizer.start) for part in starts)

    def n_bytes(self, labels: Tensor) -> int:
        """Bytes of text that the asked ones of some labels stand for."""
        return int(self.tokenizer.bytes_of(labels.numpy()).sum())

    def text(self, tokens: Tensor) -> str:
        """A readable form of tokens [T]."""
        return self.tokenizer.decode(tokens.numpy())


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
            cut = _between_characters(document, max(0, min(left, len(document))))
            left -= cut
            train += [document[:cut]] if cut else []
            held += [document[cut:]] if cut < len(document) else []
    return train, held


def _between_characters(document: bytes, place: int) -> int:
    """The first place from `place` on where no character of UTF-8 is cut."""
    while place < len(document) and document[place] & 0xC0 == 0x80:
        place += 1
    return place


def _stream(documents: Sequence[bytes], tokenizer: Tokenizer) -> NDArray[Any]:
    """One array of tokens: the start token and the tokens of each document."""
    parts = tokenizer.encode_batch([document.decode("utf-8") for document in documents])
    stream = np.full(sum(map(len, parts)) + len(parts), tokenizer.start, np.min_scalar_type(tokenizer.vocab_size - 1))
    end = 0
    for part in parts:
        stream[end + 1 : end + 1 + len(part)] = part
        end += 1 + len(part)
    return stream


def _windows(stream: NDArray[Any], starts: NDArray[np.int64], length: int, start: int) -> Batch:
    """Windows [n, T] of `stream` at starts [n]; labels are the next tokens, IGNORE at start tokens and past the end."""
    places = starts[:, None] + np.arange(length + 1)
    tokens = stream.take(places, mode="clip").astype(np.int64)
    tokens[places >= len(stream)] = start
    labels = np.where(tokens[:, 1:] == start, IGNORE, tokens[:, 1:])
    tags = [{"start": place} for place in starts.tolist()]
    return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(labels), tags)


def _fingerprint(train: list[bytes], held: list[bytes], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256()
    for part in (train, held):
        digest.update(f"{len(part)};".encode())
        for document in part:
            digest.update(f"{len(document)}:".encode())
            digest.update(document)
    digest.update(tokenizer.fingerprint.encode())
    return digest.hexdigest()


def _apart(files: list[Path], evaluation_files: list[Path]) -> list[Path]:
    """The evaluation files, which must not be training files."""
    both = {file.resolve() for file in files} & {file.resolve() for file in evaluation_files}
    if both:
        raise ValueError(f"{min(both)} is in both the training and the evaluation paths; leave it out of one")
    return evaluation_files
