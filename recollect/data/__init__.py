"""Text as a stream of bytes: read, hold out, pack."""

from recollect.data.text import DOCUMENT_START, VOCAB_SIZE, ByteText, decode, encode

__all__ = ["DOCUMENT_START", "VOCAB_SIZE", "ByteText", "decode", "encode"]
