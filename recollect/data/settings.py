"""Which text is read, and how it becomes rows of tokens: the `data` part of a training run."""

from __future__ import annotations

import dataclasses

import pydantic

STRICT = pydantic.ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One source of text.

    Attributes:
        paths: files, folders or globs; .txt, .jsonl, .parquet, also with .gz or .zst behind.
        dataset: instead of paths, a Hugging Face dataset, streamed: a name on the hub or a local folder.
        config: configuration of the dataset.
        split: split of the dataset.
        field: field that holds the text (jsonl, parquet, dataset).
        weight: share of the rows of a batch, relative to the other sources'; null: its share of the tokens.
        name: what results call it; null: the file's or dataset's name.
    """

    __pydantic_config__ = STRICT

    paths: list[str] = dataclasses.field(default_factory=list)
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    field: str = "text"
    weight: float | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which text, and how it becomes rows of tokens.

    Attributes:
        sources: what to train on.
        validation: what to evaluate on; empty: `holdout` of every source of files.
        holdout: share of each source's text that is never trained on, where `validation` is empty.
        tokenizer: "bytes", or a tokenizer.json (see `recollect tokenizer train`), or a folder that holds one.
        seq_len: tokens of a row.
        cut_documents: tokens do not see the documents before theirs in a row.
        carry: rows of consecutive steps are consecutive pieces of one stream, and memories go on from piece to piece
            (truncated back-propagation through time).
        shards: folder for tokenised text, kept and reused; null: `tokens` inside the run's folder.
    """

    __pydantic_config__ = STRICT

    sources: list[SourceSettings] = dataclasses.field(default_factory=list)
    validation: list[SourceSettings] = dataclasses.field(default_factory=list)
    holdout: float = 0.01
    tokenizer: str = "bytes"
    seq_len: int = 512
    cut_documents: bool = True
    carry: bool = False
    shards: str | None = None
