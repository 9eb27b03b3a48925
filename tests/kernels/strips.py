"""The compiled form of Multi-Token Attention with strips and segments as short as they can be."""

from __future__ import annotations

import pytest

from recollect.kernels import layout


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 12 rows and up to four segments of at least 24, so that short sequences have several; dropout in ranges as short as
    there can be."""
    small_sizes = {"STRIP_BYTES": 1, "STRIP_ROWS": 12, "MASK_BYTES": 1, "TASKS": 1000, "SEGMENT_ROWS": 24}
    for name, value in small_sizes.items():
        monkeypatch.setattr(layout, name, value)
