"""CLUTRR's files: short family stories with bracketed names, two people of each, and what the one is to the other."""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from recollect.tasks.family import KIND_OF, RELATIONS
from recollect.tasks.files import numbered_lines

# In the order of the task numbers, from 1.
NOISES = ("clean", "supporting", "irrelevant", "disconnected")


class Row(NamedTuple):
    """One row of a CLUTRR file: `target` is what b is to a; `chain` are the k relations that lead from a to b."""

    story: str
    clean_story: str
    a: str
    b: str
    target: str
    chain: tuple[str, ...]
    noise: str
    k: int


def read_rows(path: str) -> tuple[Row, ...]:
    """The rows of a CLUTRR file as JSON lines, or of a folder's *.jsonl files in order of their names: those for testing
    (*test*.jsonl) where there are some, else all.

    A row holds `story`, `clean_story`, `query` ("('A', 'B')"), `target`, `f_comb` ("father-sister") and `task_name`
    ("task_1.2": task 1 to 4 is the noise, 2 is k). Tasks 5 and above (mixtures) are read with the noise "mixed".

    Raises:
        ValueError: no such file, no rows, a row of another form, a target that is none of the 18.
    """
    where = Path(path)
    files = (sorted(where.glob("*test*.jsonl")) or sorted(where.glob("*.jsonl"))) if where.is_dir() else [where]
    if not files or not files[0].exists():
        raise ValueError(f"files={path!r} holds no rows of CLUTRR; give a *.jsonl file or a folder of them")
    return tuple(row for file in files for row in _read_file(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=32)
def _read_file(path: Path, _modified: int) -> tuple[Row, ...]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a UTF-8 text file: {error}") from error
    for number, line in numbered_lines(text):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
            raise ValueError(f"{path}, line {number}: not a row of CLUTRR ({type(error).__name__}: {error})") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    return tuple(rows)


def _row(row: dict[str, Any]) -> Row:
    query = row["query"]
    a, b = ast.literal_eval(query) if isinstance(query, str) else query
    if row["target"] not in RELATIONS:
        raise ValueError(f"the target {row['target']!r} is none of {', '.join(RELATIONS)}")
    task, k = row["task_name"].removeprefix("task_").split(".")
    noise = NOISES[int(task) - 1] if 1 <= int(task) <= len(NOISES) else "mixed"
    chain = _split(row["f_comb"])
    if len(chain) != int(k):
        raise ValueError(f"f_comb {row['f_comb']!r} has {len(chain)} relations, task_name says {k}")
    return Row(row["story"], row["clean_story"], str(a), str(b), row["target"], chain, noise, int(k))


def _split(comb: str) -> tuple[str, ...]:
    """ "father-mother-in-law" -> father, mother-in-law."""
    words: list[str] = []
    for part in comb.replace("-in-law", " in law").split("-"):
        words.append(part.replace(" ", "-"))
        if words[-1] not in KIND_OF:
            raise ValueError(f"f_comb {comb!r} holds the unknown relation {words[-1]!r}")
    return tuple(words)
