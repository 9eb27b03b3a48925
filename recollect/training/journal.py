"""A run's journal, `progress.jsonl`: what the worker says, one JSON object per line, and how the parent listens."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from recollect.training.checkpoint import replace_file

Event = dict[str, Any]

DONE, FAILED, STOPPED, DISK_FULL = 0, 3, 4, 5  # a worker's exit status


class Journal:
    """The worker's side. Lines are flushed; evaluations are on the disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: Event) -> None:
        """Append one event; "started" first forgets what happened after the step it starts from."""
        if event["event"] == "started":
            self._cut(event["step"], resumed=event["resumed"])
        durable = event["event"] not in ("step", "note")
        append_line(self.path, json.dumps(clean(event), sort_keys=True), durable=durable)

    def _cut(self, step: int, *, resumed: bool) -> None:
        kept = [
            e
            for e in read_lines(self.path)
            if resumed and e.get("event") in ("step", "evaluation") and e.get("step", 0) <= step
        ]
        replace_file(self.path, "".join(json.dumps(e, sort_keys=True) + "\n" for e in kept).encode())


class Listener:
    """The parent's side: `new()` gives the events since the last call, whole lines only, none of them twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.inode = 0
        self.given: set[bytes] = set()

    def new(self) -> list[Event]:
        try:
            with open(self.path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                replaced, self.inode = inode != self.inode, inode
                if replaced:  # by a resumed worker, which has kept what happened up to its checkpoint
                    self.offset = 0
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = [line for line in whole.splitlines(keepends=True) if not replaced or line not in self.given]
        self.given.update(lines)
        return parse_lines(b"".join(lines))


def append_line(path: Path, line: str, *, durable: bool) -> None:
    """Append one line, whole or not at all.

    Raises:
        OSError: the disk is full or not writable; the file is then as before.
    """
    data = (line + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            while written < len(data):  # a nearly full disk takes a part; asking for the rest raises
                written += file.write(data[written:])
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def drop_partial_line(path: Path) -> None:
    """Remove the end of a file that a crash has left without a line end; no file, nothing to do."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def read_lines(path: Path) -> list[Event]:
    """Every whole line of a JSON-lines file; [] if there is no file."""
    try:
        return parse_lines(path.read_bytes())
    except FileNotFoundError:
        return []


def parse_lines(data: bytes) -> list[Event]:
    """JSON objects of the lines; a line that a crash has cut off is left out."""
    events = []
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def clean(event: Event) -> Event:
    """Numbers that JSON lacks (NaN, infinity) become null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in event.items()}
