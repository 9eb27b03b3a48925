"""Reading files in blocks: every byte once, in order, and none that is no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from recollect.inference.remembering import read_blocks


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_blocks_are_the_file(size: int, tmp_path: Path) -> None:
    """Characters that two or more blocks share are no error."""
    content = "aé€😀z".encode()
    (tmp_path / "text").write_bytes(content)
    blocks = list(read_blocks(tmp_path / "text", size))
    assert b"".join(blocks) == content
    assert max(map(len, blocks)) <= size


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"ab\xffc", 2),
        ("aé".encode() + b"y\xff", 4),
        ("a€".encode()[:3], 1),
        ("€".encode()[:2] + b"x", 0),
        ("😀😀".encode()[:7], 4),
    ],
)
def test_the_first_bad_byte_is_named(content: bytes, offset: int, size: int, tmp_path: Path) -> None:
    """Wherever the blocks end, and at the end of the file: the offset in the file."""
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=rf"text is not UTF-8: .* at offset {offset}; convert"):
        list(read_blocks(tmp_path / "text", size))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*absent: No such file"):
        list(read_blocks(tmp_path / "absent"))
