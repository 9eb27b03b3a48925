"""The compiled form of Multi-Token Attention with strips as short as they can be."""

from __future__ import annotations

import pytest

from recollect.kernels import layout


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 12 rows, so that short sequences have several; dropout in ranges of as few rows as there can be."""
    for name, value in (("STRIP_BYTES", 1), ("STRIP_ROWS", 12), ("MASK_BYTES", 1)):
        monkeypatch.setattr(layout, name, value)
