"""Lines are whole, in order, and forgotten where a resumed run begins again."""

from __future__ import annotations

import json
import math
from pathlib import Path

from recollect.training.journal import Journal, Listener, append_line, read_lines


def test_a_listener_hears_every_event_once(tmp_path: Path) -> None:
    """Also when it looks while a line is half written."""
    path = tmp_path / "progress.jsonl"
    journal, listener = Journal(path), Listener(path)
    assert listener.new() == []
    journal.write({"event": "started", "step": 0, "resumed": False})
    journal.write({"event": "step", "step": 1, "loss": 2.0})
    assert [e["event"] for e in listener.new()] == ["started", "step"]
    with open(path, "a") as file:
        file.write('{"event": "st')
        file.flush()
        assert listener.new() == []
        file.write('ep", "step": 2}\n')
    assert [e["step"] for e in listener.new()] == [2]


def test_a_resumed_run_forgets_what_it_does_again(tmp_path: Path) -> None:
    """Or the learning curve would hold steps twice; the listener is not told again what was kept."""
    path = tmp_path / "progress.jsonl"
    journal, listener = Journal(path), Listener(path)
    journal.write({"event": "started", "step": 0, "resumed": False})
    for step in range(1, 6):
        journal.write({"event": "evaluation", "step": step})
    listener.new()
    journal.write({"event": "started", "step": 2, "resumed": True})
    assert [(e["event"], e["step"]) for e in read_lines(path)] == [("evaluation", 1), ("evaluation", 2), ("started", 2)]
    journal.write({"event": "evaluation", "step": 3, "again": True})
    assert [(e["event"], e["step"]) for e in listener.new()] == [("started", 2), ("evaluation", 3)]
    journal.write({"event": "started", "step": 0, "resumed": False})
    assert [e["event"] for e in read_lines(path)] == ["started"]


def test_lines_are_json(tmp_path: Path) -> None:
    """NaN is not JSON, and other programs read these files."""
    path = tmp_path / "progress.jsonl"
    Journal(path).write({"event": "step", "step": 1, "loss": math.nan, "lr": math.inf})
    assert json.loads(path.read_text()) == {"event": "step", "step": 1, "loss": None, "lr": None}


def test_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, '{"a": 1}', durable=True)
    with open(path, "a") as file:
        file.write('{"a": 2')
    assert read_lines(path) == [{"a": 1}]
