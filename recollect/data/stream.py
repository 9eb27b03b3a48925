"""Rows of a Hugging Face dataset that is streamed: read, tokenised and packed on the way, shuffled in blocks, exactly resumable.

Every process reads and tokenises the whole stream, since where a row begins depends on all documents before it. Where that is too
slow for the number of devices, save the dataset as files: those are tokenised once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.data.formats import missing_package
from recollect.data.pieces import Integers, permutation
from recollect.data.settings import SourceSettings
from recollect.data.tokenizer import Tokenizer

BLOCK_TOKENS = 1 << 20
BATCH_CHARACTERS = 1 << 18  # tokenised at once


class StreamedRows:
    """Rows of T + 1 tokens, T apart, of a stream of documents.

    The stream is read in blocks of about `block_tokens` tokens. Inside a block documents and then rows are shuffled; what is left
    at its end begins the next one, so that no token is lost. The dataset begins anew when it ends.

    A position is the dataset's own state at the begin of a block, the tokens left over from the one before, and a number of rows.
    """

    def __init__(
        self,
        source: SourceSettings,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        key: tuple[int, int],
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """
        Args:
            source: a source with a dataset.
            key: seed and number of the source.
            block_tokens: least tokens of a block (one of at least 64 rows).
        Raises:
            ValueError: a missing package, no such dataset, configuration, split or field.
        """
        self._source, self._tokenizer, self._seq_len, self._key = source, tokenizer, seq_len, key
        self._block_tokens = max(block_tokens, 64 * seq_len)
        self._dataset = open_dataset(source)
        self._initial = _copied(self._dataset.state_dict())
        path = str(source.dataset)
        place = Path(path).name if Path(path).exists() else path
        what = [place, source.config, source.split, source.field, tokenizer.fingerprint, self._block_tokens, BATCH_CHARACTERS]
        self.fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self._begin({"epoch": 0, "block": 0, "first": 0, "left": [], "dataset": self._initial})

    def _begin(self, position: Mapping[str, Any]) -> None:
        """Stand before a block; `position` is as `position` gives it."""
        self._here = _copied(position)
        self._dataset.load_state_dict(_copied(position["dataset"]))
        self._documents: Iterator[str] | None = None
        self._block: Integers | None = None

    def read(self, number: int, out: Integers) -> None:
        """Write row `number` of the stream to out [T + 1]; numbers do not fall.

        Raises:
            ValueError: a row of the dataset without text, or no text at all.
            OSError: the dataset cannot be read on.
        """
        self._go_to_block(number + 1)
        assert self._block is not None
        row = int(self._rows[number - self._here["first"]]) * self._seq_len
        out[:] = self._block[row : row + self._seq_len + 1]

    def epochs(self, number: int) -> float:
        """Times that the dataset has begun anew at the block of the last row."""
        return float(self._here["epoch"])

    def position(self, number: int) -> dict[str, Any]:
        """Where the stream stands when `number` rows have been taken, as JSON."""
        if number:
            self._go_to_block(number)  # a process that has read fewer of them itself may still be in an earlier block
        return _copied(self._here)

    def go_to(self, number: int, position: Mapping[str, Any]) -> None:
        """Stand where `position` was taken, at `number` rows."""
        self._begin(position)

    def _go_to_block(self, number: int) -> None:
        """Read on to the block that has the row before `number`."""
        if self._block is None:
            self._read_block()
        while number > self._here["first"] + len(self._rows):
            self._here = self._next
            self._read_block()

    def _read_block(self) -> None:
        """The tokens of the block that begins here, shuffled, and the position of the next one."""
        epoch, block = self._here["epoch"], self._here["block"]
        if self._documents is None:
            self._documents = self._texts()
        left = np.array(self._here["left"], np.int64)
        documents: list[NDArray[Any]] = []
        size = 0
        ended = False
        while size < self._block_tokens and not ended:
            texts, ended = self._some_texts()
            documents += self._tokenizer.encode_batch(texts)
            size = sum(1 + len(tokens) for tokens in documents)
        if ended and block == 0 and not documents:
            raise ValueError(f"dataset {self._source.dataset!r}, split {self._source.split!r}, holds no text")
        shuffled = self._shuffled(documents, epoch, block)
        tokens = np.concatenate([left, shuffled])
        n_rows = max(0, (len(tokens) - 1) // self._seq_len)
        self._block = tokens
        self._rows = permutation(n_rows, *self._key, epoch, block, "rows")
        if ended:
            self._dataset.load_state_dict(_copied(self._initial))
            self._documents = None
        self._next = {
            "epoch": epoch + ended,
            "block": 0 if ended else block + 1,
            "first": self._here["first"] + n_rows,
            "left": tokens[n_rows * self._seq_len :].tolist(),
            "dataset": _copied(self._initial if ended else self._dataset.state_dict()),
        }

    def _shuffled(self, documents: list[NDArray[Any]], epoch: int, block: int) -> Integers:
        """Documents in a random order, each after the start token, as one text."""
        order = permutation(len(documents), *self._key, epoch, block, "documents")
        start = np.array([self._tokenizer.start], np.int64)
        parts = [part for i in order for part in (start, documents[i])]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def _some_texts(self) -> tuple[list[str], bool]:
        """The next texts, about BATCH_CHARACTERS, and whether the dataset has ended."""
        assert self._documents is not None
        texts: list[str] = []
        size = 0
        while size < BATCH_CHARACTERS:
            text = next(self._documents, None)
            if text is None:
                return texts, True
            texts.append(text)
            size += len(text)
        return texts, False

    def _texts(self) -> Iterator[str]:
        """The non-empty texts from the dataset's state on."""
        rows = iter(self._dataset)
        n_read = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # whatever the dataset's own code and the network raise
                raise OSError(f"dataset {self._source.dataset!r} cannot be read on after {n_read} rows: {error}") from error
            if row is None:
                return
            n_read += 1
            text = row.get(self._source.field)
            if not isinstance(text, str):
                raise ValueError(
                    f"row {n_read} of dataset {self._source.dataset!r} has no text in field {self._source.field!r}; its fields are "
                    f"{sorted(row)}; set `field`, or drop rows without text"
                )
            if text:
                yield text


def open_dataset(source: SourceSettings) -> Any:
    """The dataset of a source as a `datasets.IterableDataset`.

    Raises:
        ValueError: the package is missing, or the dataset, configuration or split cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", f"streaming dataset {source.dataset!r}") from error
    try:
        return datasets.load_dataset(source.dataset, name=source.config, split=source.split, streaming=True)
    except Exception as error:  # many classes, most of them not of `datasets`
        raise ValueError(
            f"cannot open dataset {source.dataset!r} (config {source.config!r}, split {source.split!r}): {error}; check its name, "
            "config, split and the network"
        ) from error


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that later reading does not change."""
    return json.loads(json.dumps(state))
