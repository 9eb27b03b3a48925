"""Text as bytes: 256 of them and one symbol that starts a document."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

DOCUMENT_START = 256
VOCAB_SIZE = 257


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of `text` as tokens int64 [T]; put DOCUMENT_START before them where a document begins."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def decode(tokens: Tensor | NDArray[Any]) -> str:
    """The text of tokens [T]; bytes that are no UTF-8 become U+FFFD, DOCUMENT_START and IGNORE vanish."""
    return bytes(token for token in tokens.tolist() if 0 <= token < DOCUMENT_START).decode("utf-8", errors="replace")
