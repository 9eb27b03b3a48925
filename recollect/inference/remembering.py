"""Reading texts into a model's memory, and keeping it in a file."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recollect.inference.text_model import load_text_model
from recollect.models import RecollectForCausalLM, load_memory, remember, save_memory

BLOCK = 1 << 16


class Remembered(NamedTuple):
    """n_bytes read now, n_seen by the memory in all, document starts included; bits_per_byte of what was read; state_bytes."""

    n_bytes: int
    n_seen: int
    bits_per_byte: float
    state_bytes: int


def remember_files(
    folder: Path,
    texts: Sequence[Path],
    *,
    load: Path | None = None,
    save: Path | None = None,
    piece: int = 512,
    progress: Callable[[int], None] = lambda n_bytes: None,
    imports: Sequence[str] = (),
) -> Remembered:
    """Read texts of any length at constant memory, each after a document start.

    Args:
        folder: a model of text, or a run's folder.
        texts: UTF-8 files, in order.
        load: memory to go on from; None: an empty one.
        save: file to write the memory to; None: only the numbers are wanted.
        piece: tokens that one call of the model takes.
        progress: called with the number of bytes that have just been read from the files.
        imports: modules that register the model's mixers.
    Raises:
        ValueError: no text, a text that is empty, unreadable or no UTF-8; what `load_text_model` and `load_memory` refuse.
        OSError: the memory cannot be written.
    """
    if not texts:
        raise ValueError("no text to remember; name at least one file")
    if save is not None and not save.absolute().parent.is_dir():  # now, not after hours of reading
        raise ValueError(f"{save} cannot be written: there is no folder {save.absolute().parent}")
    for text in texts:
        if not text.is_file() or not text.stat().st_size:
            raise ValueError(f"{text} is {'empty; leave it out' if text.is_file() else 'no file'}")
    model, tokenizer = load_text_model(folder, imports)
    if not isinstance(model, RecollectForCausalLM):
        raise ValueError(f"{folder} holds a retrofitted model; memories of models built by recollect can be kept, not its")
    cache = None if load is None else load_memory(model, load)
    n_bytes = 0

    def stream() -> Iterator[Tensor]:
        for text in texts:
            yield torch.tensor([tokenizer.start])
            for ids in tokenizer.encode_stream(characters(text)):
                yield torch.from_numpy(ids.astype(np.int64))

    def characters(path: Path) -> Iterator[str]:
        nonlocal n_bytes
        decoder = codecs.getincrementaldecoder("utf-8")()
        for block in read_blocks(path):
            yield decoder.decode(block)
            n_bytes += len(block)
            progress(len(block))

    cache, report = remember(model, stream(), cache, piece=piece)
    if save is not None:
        save_memory(model, cache, save)
    return Remembered(n_bytes, cache.n_seen, report.loss * report.n_scored / n_bytes / math.log(2), report.state_bytes)


def read_blocks(path: Path, size: int = BLOCK) -> Iterator[bytes]:
    """A file in blocks of `size` bytes, checked to be UTF-8 on the way.

    Raises:
        ValueError: it cannot be read or is no UTF-8 (with the offset of the first bad byte).
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(size):
                held = len(decoder.getstate()[0])  # bytes of a character that the last block has begun
                decoder.decode(block)
                yield block
                offset += len(block)
            held = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        at = offset - held + error.start
        raise ValueError(f"{path} is not UTF-8: {error.reason} at offset {at}; convert the file or leave it out") from error
