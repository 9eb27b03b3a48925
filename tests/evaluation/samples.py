"""For comparisons with lm-evaluation-harness: the text and tokenizer that both sides get, a test for two samples of one law."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from recollect.data.tokenizer import train_tokenizer
from recollect.tasks.babi import LABELS
from recollect.tasks.haystack import grammar_sentences

nltk = pytest.importorskip("nltk", minversion="3.9.1", reason="the harness's RULER needs NLTK >= 3.9.1, which lm-eval brings")
stats = pytest.importorskip("scipy.stats", reason="two-sample tests need SciPy, which lm-eval brings")

SEED = 42
LEVEL = 1e-3  # two sets of samples of one law differ by more once in a thousand seeds
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
FACT = re.compile(rf"(?:{'|'.join(PEOPLE)}) went to the \w+\.")


def same_law(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Probability that two sets of draws of one law differ at least so much: chi-square of names, Kolmogorov-Smirnov of numbers."""
    if isinstance(one[0], float):
        return float(stats.ks_2samp(one, other).pvalue)
    names = sorted({*one, *other})
    if len(names) == 1:
        return 1.0
    return float(stats.chi2_contingency([[Counter(some)[name] for name in names] for some in (one, other)]).pvalue)


class Material(NamedTuple):
    """What both sides are made of: a folder with the essay and the tokenizer, and both as objects."""

    folder: Path
    sentences: list[str]
    tokenizer: Tokenizer

    @property
    def essay(self) -> str:
        return str(self.folder / "essay.txt")

    def size(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)


def make_material(folder: Path) -> Material:
    """A grammar's sentences and BabiLong's facts, and a tokenizer trained on them."""
    sentences = grammar_sentences(1500, seed=1)
    facts = [f"{who} went to the {room}. Where is {who}?" for who, room in product(PEOPLE, LABELS[1])]
    (folder / "essay.txt").write_text("\n".join(sentences))
    (folder / "all.txt").write_text(" ".join(sentences + facts))
    file = train_tokenizer(folder / "all.txt", vocab_size=1000, out=folder)
    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|document|>").save_pretrained(folder / "tokenizer")
    return Material(folder, sentences, Tokenizer.from_file(str(file)))


def sentences_of(text: str) -> list[str]:
    """Of our grammar, which has no other full stops; the last may be cut."""
    return re.findall(r"[^ .?!][^.?!]*[.?!]?", " ".join(text.split()))
