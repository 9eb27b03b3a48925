"""What a training loop reads: rows of tokens of several sources, mixed by weight; the same rows whatever the number of processes.

Axis legend: n rows, T time (seq_len).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recollect.data.mixing import choose_source, shares_of
from recollect.data.pieces import Integers, Pieces, split_holdout, whole_documents
from recollect.data.readers import Lanes, ShuffledRows
from recollect.data.settings import DataSettings, SourceSettings
from recollect.data.shards import Note, Tokens, open_tokens
from recollect.data.sources import names_of
from recollect.data.stream import StreamedRows
from recollect.data.tokenizer import Tokenizer, load_tokenizer
from recollect.tasks.base import IGNORE

STATE_FORMAT = 1


class TokenBatch(NamedTuple):
    """Rows of tokens.

    inputs: int64 [n, T].
    labels: int64 [n, T], the next token; IGNORE (-100) where that is a document's start.
    document_ids: int64 [n, T]; rises by one at every start of a document. None where documents are not cut.
    """

    inputs: Tensor
    labels: Tensor
    document_ids: Tensor | None


class Rows:
    """The rows of a run, in order: which row comes when is a function of the settings, the seed and the rows read so far.

    Every row comes from one source; the sources' shares of all rows so far are exact to one row at every moment. Within a source of
    files every token is read once in an epoch (see `readers.ShuffledRows`), and epochs follow each other without a pause. With
    `carry`, row i of every batch goes on where row i of the batch before ended (see `readers.Lanes`), and document ids go on too.

    Attributes:
        tokenizer: that of the settings.
        vocab_size, seq_len: of the rows.
        names: of the sources.
        shares: of the rows, by source.
        n_tokens: training tokens of every source; None for streams.
    """

    def __init__(
        self,
        data: DataSettings,
        *,
        seed: int,
        folder: str | os.PathLike[str],
        rank: int = 0,
        world: int = 1,
        tokenizer: Tokenizer | None = None,
        note: Note = lambda text: None,
    ) -> None:
        """Open the sources; tokenise those that no run has read before (the other processes wait).

        Args:
            data: which text, and how.
            seed: of the order.
            folder: for tokenised text, see `shards.open_tokens`.
            rank, world: number of this process, and of processes.
            tokenizer: that of the settings if it is loaded already.
            note: takes sentences about what happens.
        Raises:
            ValueError: settings that do not fit each other or the text, or bad files; the message names the source or file.
        """
        _check(data, rank=rank, world=world)
        self.tokenizer = tokenizer or load_tokenizer(data.tokenizer)
        self.vocab_size, self.seq_len = self.tokenizer.vocab_size, data.seq_len
        self.names = names_of(data.sources)
        self._data, self._seed, self._rank, self._world = data, seed, rank, world
        self._texts: list[tuple[Tokens, Pieces] | None] = []
        self._readers: list[ShuffledRows | StreamedRows] = []
        self._fingerprints: list[str] = []
        for k, (source, name) in enumerate(zip(data.sources, self.names, strict=True)):
            try:
                self._open(source, Path(folder), key=(seed, k), note=note)
            except ValueError as error:
                raise ValueError(f"source {name!r}: {error}") from error
        self.n_tokens = [text and text[1].n_tokens for text in self._texts]
        self.shares = shares_of([source.weight for source in data.sources], self.n_tokens, self.names)
        self._counts = [0] * len(self.names)
        self._lanes: list[Lanes | None] | None = None  # by source; made by the first batch
        self._lane_sources: list[int] = []

    def _open(self, source: SourceSettings, folder: Path, *, key: tuple[int, int], note: Note) -> None:
        if source.dataset and not source.paths:
            if self._data.carry:
                raise ValueError("`carry` reads several documents at once, which a streamed dataset does not give; use files")
            stream = StreamedRows(source, self.tokenizer, seq_len=self.seq_len, key=key)
            self._texts.append(None)
            self._readers.append(stream)
            self._fingerprints.append(stream.fingerprint)
            return
        tokens = open_tokens(source, self.tokenizer, folder, note=note)
        holdout = 0.0 if self._data.validation else self._data.holdout
        pieces, _ = parts_of(tokens, holdout=holdout, seq_len=self.seq_len)
        what = f"{tokens.fingerprint}:{holdout}:{self.seq_len if holdout else 0}"
        self._texts.append((tokens, pieces))
        self._readers.append(ShuffledRows(tokens, pieces, seq_len=self.seq_len, key=key))
        self._fingerprints.append(hashlib.sha256(what.encode()).hexdigest())

    @property
    def epochs(self) -> list[float]:
        """Epochs read so far of every source; of a stream, times that it has begun anew."""
        if self._lanes is not None:
            return [lanes.epochs() if lanes else 0.0 for lanes in self._lanes]
        return [reader.epochs(count) for reader, count in zip(self._readers, self._counts, strict=True)]

    def next(self, n_rows: int) -> TokenBatch:
        """This process's share of the next rows of the run: of rows 0 ... n_rows - 1 those with number rank, rank + world, ...

        All processes must ask for the same numbers of rows, in the same order.

        Args:
            n_rows: rows of all processes together, a multiple of `world`; with `carry` always the same.
        Raises:
            ValueError: n_rows does not fit, or the tokens on disk are damaged.
        """
        if n_rows < 1 or n_rows % self._world:
            raise ValueError(f"rows of a batch are a positive multiple of the {self._world} processes; got {n_rows}")
        tokens = np.empty((n_rows // self._world, self.seq_len + 1), np.int64)
        first_ids = self._read_lanes(n_rows, tokens) if self._data.carry else self._read_shuffled(n_rows, tokens)
        return as_batch(tokens, self.tokenizer, first_ids, cut_documents=self._data.cut_documents)

    def _read_shuffled(self, n_rows: int, out: Integers) -> Integers:
        for row in range(n_rows):
            k = choose_source(self.shares, self._counts)
            if row % self._world == self._rank:
                self._readers[k].read(self._counts[k], out[row // self._world])
            self._counts[k] += 1
        return np.zeros(len(out), np.int64)

    def _read_lanes(self, n_rows: int, out: Integers) -> Integers:
        if self._lanes is None:
            self._lanes = self._deal_lanes(n_rows)
        if n_rows != len(self._lane_sources):
            raise ValueError(
                f"`carry` needs the same rows in every batch: {len(self._lane_sources)} so far, now {n_rows}; keep batch_tokens"
            )
        first_ids = np.zeros(len(out), np.int64)
        seen = [0] * len(self.names)
        for row, k in enumerate(self._lane_sources):
            lanes = self._lanes[k]
            assert lanes is not None
            if row % self._world == self._rank:
                first_ids[row // self._world] = lanes.read(seen[k], out[row // self._world])
            seen[k] += 1
        for k, some in enumerate(self._lanes):
            if some:
                some.advance()
                self._counts[k] += some.n_lanes
        return first_ids

    def _deal_lanes(self, n_rows: int) -> list[Lanes | None]:
        """One lane per row of a batch, dealt to the sources by their shares."""
        counts = [0] * len(self.names)
        self._lane_sources = []
        for _ in range(n_rows):
            k = choose_source(self.shares, counts)
            self._lane_sources.append(k)
            counts[k] += 1
        if 0 in counts:
            raise ValueError(
                f"source {self.names[counts.index(0)]!r} gets none of the {n_rows} rows of a batch, so `carry` would never read it; "
                "raise batch_tokens or its weight"
            )
        lanes: list[Lanes | None] = []
        for k, (text, n_lanes) in enumerate(zip(self._texts, counts, strict=True)):
            assert text is not None
            lanes.append(Lanes(*text, seq_len=self.seq_len, key=(self._seed, k), n_lanes=n_lanes))
        return lanes

    def state(self) -> dict[str, Any]:
        """The position in all sources, as JSON; the same in every process, and for any number of processes."""
        sources = []
        for k, name in enumerate(self.names):
            position: dict[str, Any]
            if self._data.carry:
                lanes = self._lanes[k] if self._lanes else None
                position = {"lanes": [list(place) for place in lanes.places] if lanes else []}
            else:
                position = self._readers[k].position(self._counts[k])
            facts = {"fingerprint": self._fingerprints[k], "share": self.shares[k]}
            sources.append({"name": name, **facts, "rows": self._counts[k], "position": position})
        return {**self._identity(), "lanes": len(self._lane_sources), "sources": sources}

    def _identity(self) -> dict[str, Any]:
        return {"format": STATE_FORMAT, "seed": self._seed, "seq_len": self.seq_len, "carry": self._data.carry}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a `state`, of any rank and number of processes.

        Raises:
            ValueError: the state is of other text, another tokenizer, other shares, or another seed, seq_len or carry; nothing is
                changed then.
        """
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ValueError(f"the checkpoint's data have {key}={state.get(key)!r}, this run's {key}={here!r}; set it back")
        sources = state["sources"]
        if len(sources) != len(self.names):
            raise ValueError(f"the checkpoint has {len(sources)} sources, this run {len(self.names)}; set them back")
        for name, there, mine, share in zip(self.names, sources, self._fingerprints, self.shares, strict=True):
            if there["fingerprint"] != mine:
                raise ValueError(
                    f"source {name!r} holds other text, or the tokenizer or the held-out share is another, than when the checkpoint "
                    f"was written ({there['name']!r}); restore them, or start a new run"
                )
            if there["share"] != share:
                raise ValueError(
                    f"source {name!r} has share {share} of the rows, {there['share']} in the checkpoint; set weights back"
                )
        self._lanes, self._lane_sources = None, []
        if state["lanes"]:
            self._lanes = self._deal_lanes(int(state["lanes"]))
            for lanes, there in zip(self._lanes, sources, strict=True):
                assert lanes is not None
                lanes.places = [(int(epoch), int(token)) for epoch, token in there["position"]["lanes"]]
        elif not self._data.carry:
            for reader, there in zip(self._readers, sources, strict=True):
                reader.go_to(int(there["rows"]), there["position"])
        self._counts = [int(there["rows"]) for there in sources]


def parts_of(tokens: Tokens, *, holdout: float, seq_len: int) -> tuple[Pieces, Pieces]:
    """Training and held-out pieces of a source; all is for training where holdout is 0."""
    if holdout == 0:
        none = np.zeros(0, np.int64)
        return whole_documents(tokens.offsets), Pieces(none, none)
    return split_holdout(tokens.offsets, holdout=holdout, seq_len=seq_len)


def as_batch(tokens: Integers, tokenizer: Tokenizer, first_ids: Integers, *, cut_documents: bool) -> TokenBatch:
    """Rows of tokens [n, T + 1] as inputs and labels.

    Args:
        first_ids: id of the document that each row's first token belongs to [n].
    Raises:
        ValueError: a token that the tokenizer does not have: damaged data.
    """
    if tokens.max(initial=0) >= tokenizer.vocab_size:
        raise ValueError(
            f"tokens on disk are damaged: token {tokens.max()} of a vocabulary of {tokenizer.vocab_size}; delete the folder of "
            "tokenised text (data.shards), it is then made anew"
        )
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    labels = np.where(following == tokenizer.start, IGNORE, following)
    ids = None
    if cut_documents:
        starts = inputs == tokenizer.start
        starts[:, 0] = False
        ids = torch.from_numpy(np.cumsum(starts, axis=1, dtype=np.int64) + first_ids[:, None])
    return TokenBatch(torch.from_numpy(inputs.copy()), torch.from_numpy(labels), ids)


def _check(data: DataSettings, *, rank: int, world: int) -> None:
    if not data.sources:
        raise ValueError("no text to train on; give data.sources, such as [{paths: [book.txt]}]")
    if data.seq_len < 1:
        raise ValueError(f"seq_len is at least 1; got {data.seq_len}")
    if not 0 <= data.holdout < 1:
        raise ValueError(f"holdout is a share, at least 0 and below 1; got {data.holdout}")
    if not 0 <= rank < world:
        raise ValueError(f"rank is at least 0 and below the number of processes; got rank={rank}, world={world}")
