"""Text as tokens: read, tokenised, held out, packed into rows. `TextWindows` is small text in memory, `Rows` any amount from disk."""

from recollect.data.rows import Rows, TokenBatch
from recollect.data.text import DOCUMENT_START, VOCAB_SIZE, decode, encode
from recollect.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from recollect.data.validation import validation_rows
from recollect.data.windows import TextWindows

__all__ = [
    "DOCUMENT_START",
    "VOCAB_SIZE",
    "Rows",
    "TextWindows",
    "TokenBatch",
    "Tokenizer",
    "decode",
    "encode",
    "load_tokenizer",
    "train_tokenizer",
    "validation_rows",
]
