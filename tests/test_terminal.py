"""Tables on terminals and in text files."""

from __future__ import annotations

import pytest
from rich.table import Table

from recollect import terminal

LONG = "The comparison [has] ended " * 6


def numbers(n_columns: int, *, no_wrap: bool = True) -> Table:
    table = Table("model")
    for i in range(n_columns):
        table.add_column(f"column\n{i}", no_wrap=no_wrap)
    table.add_row("mta", *[f"41.0 (45.8, 28.2, {i}.0)" for i in range(n_columns)])
    return table


@pytest.mark.parametrize("columns", ["40", "200"])
def test_no_number_is_cut_or_folded(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents numbers that lose their ends, or that stand below each other, in a terminal that is narrower than a table."""
    monkeypatch.setenv("COLUMNS", columns)
    terminal.show(LONG, numbers(6), "end")
    out = capsys.readouterr().out
    assert all(f"41.0 (45.8, 28.2, {i}.0)" in out for i in range(6))
    assert LONG in out  # a terminal wraps it; brackets are no markup
    assert "\x1b" not in out


def test_text_for_reading_is_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a table of sentences from being as wide as the longest one."""
    monkeypatch.setenv("COLUMNS", "60")
    table = Table("suite", "what")
    table.add_row("ruler", LONG)
    terminal.show(numbers(3), table)
    *_, last = capsys.readouterr().out.splitlines()
    assert len(last) <= 60


def test_files_hold_the_same_without_colours() -> None:
    """Prevents a file of 80 columns, or with the codes of a terminal."""
    text = terminal.text(LONG, numbers(8))
    assert LONG in text
    assert "41.0 (45.8, 28.2, 7.0)" in text
    assert max(map(len, text.splitlines())) > terminal.FILE_WIDTH
    assert "\x1b" not in text
