"""The measurements as JSON lines, one per contender and length, each written whole as soon as it is there and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recollect import state
from recollect.bench.floor import Rates
from recollect.bench.setting import Setting
from recollect.training.journal import append_line, clean, drop_partial_line, read_lines

FILE = "rows.jsonl"
DONE, STOPPED, WRONG, FAILED, SKIPPED = "done", "stopped", "wrong", "failed", "skipped"
KEPT = (DONE, STOPPED)  # what is not tried again; a peer may have been installed and a bug been fixed since

Row = dict[str, Any]


class Rows:
    """The rows of one setting in OUT/rows.jsonl. Rows of other settings and failures of earlier runs stay in the file and are not seen.

    A row is a contender, a length (None: said of all), a status of the five above with its reason, and what was measured. One line more
    holds what the machine reaches: `rates`, None until they are kept.
    """

    def __init__(self, out: Path, setting: Setting) -> None:
        self.path = out / FILE
        described = setting.described()
        self.about = {"settings": state.fingerprint(described), "setting": described}
        drop_partial_line(self.path)
        self.rows: list[Row] = []
        self.rates: Rates | None = None
        for row in read_lines(self.path):
            if row.get("settings") != self.about["settings"]:
                continue
            if "rates" in row:
                self.rates = Rates(**row["rates"])
            elif row.get("status") in KEPT:
                self._hold(row)

    def keep(self, rates: Rates) -> None:
        """Append what the machine reaches, so that every row's floor, also after an interruption, is of the same rates.

        Raises:
            OSError: the file cannot be written; it is then as before.
        """
        append_line(self.path, json.dumps({**self.about, "rates": rates._asdict()}, sort_keys=True), durable=True)
        self.rates = rates

    def add(self, contender: str, length: int | None, status: str, reason: str = "", **measured: Any) -> None:
        """Append one row; it takes the place of an earlier one of this contender and length.

        Raises:
            OSError: the file cannot be written; it is then as before.
        """
        row = {"contender": contender, "length": length, "status": status, "reason": reason, **measured}
        append_line(self.path, json.dumps(clean({**self.about, **row}), sort_keys=True), durable=True)
        self._hold(row)

    def at(self, contender: str, length: int | None) -> Row | None:
        """The row of a contender and length."""
        return next((row for row in self.rows if (row["contender"], row["length"]) == (contender, length)), None)

    def of(self, contender: str) -> list[Row]:
        """Every row of a contender."""
        return [row for row in self.rows if row["contender"] == contender]

    def points(self, contender: str, measure: str) -> dict[int, float]:
        """length -> a measure, of the lengths at which it is there, in their order."""
        found = {row["length"]: row[measure] for row in self.of(contender) if row["status"] == DONE and row.get(measure)}
        return dict(sorted(found.items()))

    def _hold(self, row: Row) -> None:
        self.rows = [held for held in self.rows if (held["contender"], held["length"]) != (row["contender"], row["length"])]
        self.rows.append(row)
