"""Fixtures of the runs' tests."""

from __future__ import annotations

import pytest

from recollect.training import reports


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither measure the machine nor draw curves: seconds per run."""
    monkeypatch.setattr(reports, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(reports, "draw_curves", lambda *_, **__: None)
