"""How well a model predicts text: perplexity and bits per byte, by domain and by position in the context."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from recollect.data.files import ALL_SUFFIXES, find_files, read_documents
from recollect.evaluation.language_model import LanguageModel, Scored
from recollect.evaluation.rolling import depths
from recollect.evaluation.suites.base import Item, Metric, Result, Suite, digests, per_byte, per_token, register_suite

TOKEN_BYTES = 4  # about


@register_suite
@dataclass(frozen=True, kw_only=True)
class Perplexity(Suite):
    """Perplexity and bits per byte of documents of any length.

    A recollect model carries its state through a document, so that its tokens are predicted from all before them; a model with a
    limited context (or --context) reads windows of that length, each of which sees `overlap` tokens of the one before. A position
    is that in the window, so it stays below the context's length. A guess gives every token of the
    vocabulary the same probability.

    Attributes:
        data: files, folders or globs; a domain is a file, or the folder below one that is given.
        field: field of .jsonl and .parquet that holds the text.
        overlap: tokens that a window sees again unscored; only with a limited context.
        positions: ends of the stretches of positions that are reported apart, in tokens.
        documents: of each domain, at most; 0: all.
        tokens: of each document, at most; 0: all.
        ends: take a document's last `tokens` instead of its first: what was held out of a book that a model was trained on (its last
            tenth, where nothing else was said).
        piece: tokens that a call of the model takes; changes nothing but speed.
    Raises:
        ValueError: an option out of range.
    """

    name: ClassVar[str] = "perplexity"
    metrics: ClassVar[tuple[Metric, ...]] = (per_byte(), per_token("perplexity", math.exp), per_token("nats/token"))
    dimensions: ClassVar[tuple[str, ...]] = ("domain", "position")
    along: ClassVar[str] = "position"
    data: tuple[str, ...]
    field: str = "text"
    overlap: int = 0
    positions: tuple[int, ...] = (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    documents: int = 0
    tokens: int = 0
    ends: bool = False
    piece: int = 1024

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.documents < 0 or self.tokens < 0 or self.piece < 1:
            raise ValueError("overlap, documents and tokens are 0 or more, piece is at least 1")
        if self.ends and not self.tokens:
            raise ValueError("ends takes the last tokens of a document: say how many, --option tokens=...")
        if list(self.positions) != sorted(set(self.positions)) or (self.positions and self.positions[0] < 1):
            raise ValueError(f"positions are ends of stretches in ascending order; got {self.positions}")

    def items(self, model: LanguageModel) -> list[Item]:
        """One per document: (domain, text)."""
        found = []
        for domain, file in self._files():
            for number, document in enumerate(read_documents([file], field=self.field)):
                if self.documents and number >= self.documents:
                    break
                found.append(Item(f"{file}:{number}", (domain, document)))
        return found

    def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
        texts = [self._tokens(model, item.ask[1]) for item in items]
        found = model.log_probs(texts, piece=self.piece, overlap=self.overlap)
        return [self._stretches(model, *item.ask, *each) for item, *each in zip(items, texts, found, strict=True)]

    def batches(self, model: LanguageModel, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Short documents together, about as many tokens as a batch holds; two long ones, which may take hours, never."""
        ends = accumulate(min(len(item.ask[1]) / TOKEN_BYTES, self.tokens or math.inf) for item in items)
        for _, alike in groupby(zip(items, ends, strict=True), lambda pair: pair[1] // model.batch_tokens):
            yield [item for item, _ in alike]

    def fingerprint(self) -> dict[str, Any]:
        return {"data": digests(file for _, file in self._files())} | {
            name: getattr(self, name) for name in ("field", "overlap", "positions", "documents", "tokens", "ends")
        }

    def _files(self) -> list[tuple[str, Path]]:
        """(domain, file), as they are given."""
        found = []
        for path in self.data:
            for file in find_files(path, suffixes=ALL_SUFFIXES):
                is_below = Path(path).is_dir() and file.parent != Path(path)
                domain = file.relative_to(path).parts[0] if is_below else Path(path).name if Path(path).is_dir() else file.stem
                found.append((domain, file))
        return found

    def _tokens(self, model: LanguageModel, document: bytes) -> NDArray[np.int64]:
        """Those that are asked."""
        tokens = np.asarray(model.encode(document.decode("utf-8")), np.int64)
        return tokens[-self.tokens :] if self.ends else tokens[: self.tokens or None]

    def _stretches(
        self, model: LanguageModel, domain: str, document: bytes, tokens: NDArray[np.int64], scored: Scored
    ) -> list[Result]:
        values, _ = scored
        n_bytes = len(document) if not self.tokens else len(model.coder.decode(tokens.tolist()).encode())
        results = []
        depth = depths(len(values), model.max_length, self.overlap)
        for begin, end in pairwise((0, *self.positions, max(len(values), *self.positions, 0) + 1)):
            here = (depth >= begin) & (depth < end)
            if not here.any():
                continue
            # Bytes of the document are shared out by tokens: which bytes a token stands for not every tokenizer can say.
            n = int(here.sum())
            numbers = {"log_prob": float(values[here].sum()), "n_tokens": n, "n_bytes": n_bytes * n / len(values)}
            guess = numbers | {"log_prob": -math.log(model.model.config.vocab_size) * n}
            results.append(Result({"domain": domain, "position": self._stretch(begin)}, numbers, {}, guess))
        return results

    def _stretch(self, begin: int) -> str:
        end = next((end for end in self.positions if begin < end), None)
        return f"{begin:,}-{end:,}" if end else f"{begin:,}-"
