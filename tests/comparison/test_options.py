"""What users write in words."""

from __future__ import annotations

import dataclasses

import pytest

from recollect.comparison.options import check_types, parse_budget, parse_mixer, parse_options, split_outside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000steps", (2000, None)),
        ("1 step", (1, None)),
        ("10_000 steps", (10000, None)),
        ("90s", (None, 90)),
        ("5m", (None, 300)),
        ("1.5min", (None, 90)),
        ("1h", (None, 3600)),
        ("1h30m5s", (None, 5405)),
    ],
)
def test_budget_is_steps_or_time(text: str, expected: tuple[int | None, float | None]) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "17", "5x", "steps", "0steps", "0s", "-5m", "m", "5m1h", "nan s"])
def test_a_budget_without_a_unit_or_sense_is_refused(text: str) -> None:
    """17 could be steps, seconds or minutes: guessing would waste hours."""
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)


def test_a_mixer_carries_its_options() -> None:
    assert parse_mixer("mta:c_q=2:norm=none:kq=true:rope_theta=1e4") == (
        "mta",
        {"c_q": 2, "norm": "none", "kq": True, "rope_theta": 1e4},
    )
    assert parse_mixer(" attention ") == ("attention", {})
    assert parse_mixer("moneta:bias={name: lp, p: 4}:c=1") == ("moneta", {"bias": {"name": "lp", "p": 4}, "c": 1})
    assert split_outside("attention,moneta:bias={name: lp, p: 4},x", ",") == ["attention", "moneta:bias={name: lp, p: 4}", "x"]


@pytest.mark.parametrize("parts", [["c_q"], ["=3"], ["c_q=1", "c_q=2"], ["c_q=[1"]])
def test_a_part_that_is_no_option_is_refused(parts: list[str]) -> None:
    with pytest.raises(ValueError, match="mixer x"):
        parse_options(parts, of="mixer x")


def test_a_value_of_the_wrong_type_is_refused() -> None:
    """`c_q=two` must not reach the arithmetic; 1 is a fine float, true is no integer."""

    @dataclasses.dataclass
    class Options:
        count: int
        rate: float
        window: int | None

    check_types(Options, {"count": 2, "rate": 1, "window": None, "unknown": object()}, of="x")
    for wrong in ({"count": "two"}, {"count": True}, {"count": 1.5}, {"rate": "a"}, {"window": "a"}, {"rate": None}):
        with pytest.raises(ValueError, match=r"x: \w+ must be .*; got"):
            check_types(Options, wrong, of="x")
