"""Rows to evaluate on: always the same ones, spread over the validation text, or over what is held out of the training text.

Axis legend: n rows, T time (seq_len).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from recollect.data.pieces import Integers, Order
from recollect.data.rows import TokenBatch, as_batch, parts_of
from recollect.data.settings import DataSettings, SourceSettings
from recollect.data.shards import Note, open_tokens
from recollect.data.sources import names_of, source_files
from recollect.data.stream import StreamedRows
from recollect.data.tokenizer import Tokenizer


def validation_rows(
    data: DataSettings,
    tokenizer: Tokenizer,
    n_rows: int,
    *,
    folder: str | os.PathLike[str],
    batch_rows: int = 16,
    note: Note = lambda text: None,
) -> dict[str, list[TokenBatch]]:
    """Rows of every validation source, or without any of what `holdout` keeps back of every training source of files.

    Rows do not overlap and do not depend on seed, rank or epoch. Where n_rows is enough for all of a source, every token of it is
    a label once (the last row is filled up with start tokens, which are not asked).

    Args:
        data: which text; with `validation`, none of its files may be a training file.
        n_rows: most rows of a source; fewer than it has are spread evenly over it (of a stream: those at its begin).
        folder: for tokenised text, see `shards.open_tokens`.
        batch_rows: rows of a batch; the last may have fewer.
        note: takes sentences about what happens.
    Returns:
        name of source -> batches; empty where there is neither validation nor holdout.
    Raises:
        ValueError: bad files, a file that is trained on and evaluated on, too little text.
    """
    if n_rows < 1 or batch_rows < 1:
        raise ValueError(f"n_rows and batch_rows are at least 1; got n_rows={n_rows}, batch_rows={batch_rows}")
    sources = data.validation or data.sources
    holdout = 0.0 if data.validation else data.holdout
    if data.validation:
        _check_apart(data)
    batches = {}
    for source, name in zip(sources, names_of(sources), strict=True):
        if not data.validation and (holdout == 0 or source.dataset):
            continue
        try:
            if source.dataset and not source.paths:
                rows = _of_stream(source, tokenizer, data.seq_len, n_rows)
            else:
                tokens = open_tokens(source, tokenizer, folder, note=note)
                pieces = parts_of(tokens, holdout=holdout, seq_len=data.seq_len)[0 if data.validation else 1]
                order = Order(tokens.tokens, pieces, np.arange(len(pieces.begins)), start=tokens.start)
                rows = _spread(order, data.seq_len, n_rows, fill=tokens.start)
            batches[name] = [
                as_batch(part, tokenizer, np.zeros(len(part), np.int64), cut_documents=data.cut_documents)
                for part in _parts(rows, batch_rows)
            ]
        except ValueError as error:
            raise ValueError(f"validation source {name!r}: {error}") from error
    return batches


def _spread(text: Order, seq_len: int, n_rows: int, *, fill: int) -> Integers:
    """At most n_rows of the windows of a text: [n, T + 1]."""
    n_windows = max(1, -(-(text.n_tokens - 1) // seq_len))
    n = min(n_rows, n_windows)
    rows = np.full((n, seq_len + 1), fill, np.int64)
    for row, window in zip(rows, np.arange(n) * n_windows // n, strict=True):
        position = int(window) * seq_len
        text.read(position, row[: text.n_tokens - position])
    return rows


def _of_stream(source: SourceSettings, tokenizer: Tokenizer, seq_len: int, n_rows: int) -> Integers:
    """At most n_rows rows from the begin of a stream, none twice: [n, T + 1]."""
    stream = StreamedRows(source, tokenizer, seq_len=seq_len, key=(0, 0), block_tokens=1)
    rows = []
    for number in range(n_rows):
        row = np.empty(seq_len + 1, np.int64)
        stream.read(number, row)
        if stream.epochs(number) > 0:
            break
        rows.append(row)
    if not rows:
        raise ValueError(
            f"too little text: dataset {source.dataset!r} does not fill one row of {seq_len} tokens; lower seq_len"
        )
    return np.stack(rows)


def _parts(rows: Integers, size: int) -> Iterator[Integers]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _check_apart(data: DataSettings) -> None:
    def files(sources: list[SourceSettings]) -> set[os.PathLike[str]]:
        return {file.resolve() for source in sources if source.paths for file in source_files(source)}

    both = files(list(data.sources)) & files(list(data.validation))
    if both:
        raise ValueError(f"{min(map(str, both))} is in both data.sources and data.validation; leave it out of one")
