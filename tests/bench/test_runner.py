"""What is timed, what is not, and what is kept, on toys with a clock of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recollect.bench import contenders, runner
from recollect.bench.contenders import missing
from recollect.bench.rows import DONE, FILE, SKIPPED, STOPPED, WRONG
from tests.bench.toys import SETTING, World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)  # a fifth of a second each time, and toys leave nothing behind
    return World()


def test_rows_hold_the_clocks_numbers(world: World, tmp_path: Path) -> None:
    """Prevents rows with other numbers than were measured, and a floor of other work."""
    bench = world.runner(tmp_path)
    bench.run([world.contender("linear", lambda length: length / 16)], [16, 32])
    row = bench.rows.at("linear", 32)
    assert row is not None
    assert (row["status"], row["seconds"], row["low"], row["high"]) == (DONE, 2.0, 2.0, 2.0)
    assert (row["tokens_per_second"], row["peak_bytes"]) == (16.0, 32000)
    assert row["floor_seconds"] == pytest.approx(32e3 / 1e6)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(line["contender"], line["length"]) for line in lines] == [("linear", None), ("linear", 16), ("linear", 32)]
    assert lines[0]["setting"]["dtype"] == "float32"


def test_contenders_take_turns_at_a_length(world: World, tmp_path: Path) -> None:
    """Prevents ratios of numbers that were measured minutes apart."""
    world.runner(tmp_path).run([world.contender(name, lambda length: 1.0) for name in ("a", "b")], [16])
    assert "".join(name for name, _ in world.calls).endswith("abab")


def test_a_short_step_is_called_several_times_a_round(world: World, tmp_path: Path) -> None:
    """Prevents rounds shorter than the clock can tell, or their sum taken for one step."""
    bench = world.runner(tmp_path)
    bench.run([world.contender("quick", lambda length: 1e-3)], [16])
    row = bench.rows.at("quick", 16)
    assert row is not None
    assert row["seconds"] == pytest.approx(1e-3)
    assert len(world.calls) > 2 * 15


def test_the_wrong_are_shown_and_not_timed(world: World, tmp_path: Path) -> None:
    """Prevents a fast kernel that computes something else from winning a table."""
    world.errors = {"wrong": 0.5, "nan": float("nan")}
    bench = world.runner(tmp_path)
    bench.run([world.contender(name, lambda length: 1.0) for name in ("right", "wrong", "nan")], [16])
    for name in ("wrong", "nan"):
        row = bench.rows.at(name, None)
        assert row is not None
        assert row["status"] == WRONG
        assert bench.rows.at(name, 16) is None
    assert {name for name, _ in world.calls} == {"right"}
    assert any("wrong, not timed" in line for line in world.said)


@pytest.mark.parametrize("where", ["greedy", "inside greedy"], ids=["in its own process", "among the others"])
def test_out_of_memory_ends_one_contender_only(where: str, world: World, tmp_path: Path) -> None:
    """Prevents one formulation that fills the memory from ending the whole run, or from being tried again at longer lengths."""
    world.full = {where: 32}
    bench = world.runner(tmp_path)
    bench.run([world.contender(name, lambda length: 1.0) for name in ("greedy", "modest")], [16, 32, 64])
    stopped = bench.rows.at("greedy", 32)
    assert stopped is not None
    assert (stopped["status"], stopped["reason"]) == (STOPPED, "out of memory")
    assert bench.rows.at("greedy", 64) is None
    assert list(bench.rows.points("greedy", "seconds")) == [16]
    assert list(bench.rows.points("modest", "seconds")) == [16, 32, 64]


def test_a_step_that_would_take_too_long_is_not_begun(world: World, tmp_path: Path) -> None:
    """Prevents hours at 64K for a quadratic contender: 1 s, 4 s, then 16 s are foreseen and 10 s allowed."""
    bench = world.runner(tmp_path)
    bench.run([world.contender("quadratic", lambda length: (length / 16) ** 2)], [16, 32, 64, 128])
    stopped = bench.rows.at("quadratic", 64)
    assert stopped is not None
    assert stopped["status"] == STOPPED
    assert "about 16 s, the limit is 10 s" in stopped["reason"]
    assert {length for _, length in world.calls} == {16, 32}


def test_a_second_run_measures_only_what_is_missing(world: World, tmp_path: Path) -> None:
    """Prevents measuring again after an interruption; and other settings or a torn line from being taken for these."""
    toys = [world.contender("a", lambda length: 1.0), world.contender("b", lambda length: 20.0 if length > 16 else 1.0)]
    world.runner(tmp_path).run(toys, [16, 32])
    with open(tmp_path / FILE, "a") as file:
        file.write('{"torn')
    world.calls.clear()
    again = world.runner(tmp_path)
    again.run(toys, [16, 32])
    assert world.calls == []
    again.run(toys, [16, 32, 64])
    assert {length for _, length in world.calls} == {64}
    world.calls.clear()
    world.runner(tmp_path, SETTING._replace(repeats=3)).run(toys, [16])
    assert {length for _, length in world.calls} == {16}


def test_an_interruption_keeps_finished_lengths(world: World, tmp_path: Path) -> None:
    """Prevents losing an hour of rows to Ctrl-C."""

    def seconds(length: int) -> float:
        if length == 32:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        world.runner(tmp_path).run([world.contender("a", seconds)], [16, 32])
    assert list(world.runner(tmp_path).rows.points("a", "seconds")) == [16]


def test_peers_that_are_not_installed_are_skipped(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an import error where a peer is missing, and silence about it."""
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None if name == "fla" else object())
    peer, other = (world.contender(name, lambda length: 1.0, needs=(name,)) for name in ("fla", "there"))
    bench = world.runner(tmp_path)
    bench.run([peer, other], [16])
    row = bench.rows.at("fla", None)
    assert row is not None
    assert row["status"] == SKIPPED
    assert "fla is not installed; python -m recollect.bench.peers says how" in row["reason"]
    assert list(bench.rows.points("there", "seconds")) == [16]


def test_what_a_device_lacks_is_a_reason(world: World) -> None:
    """Prevents interpreted Triton in a table of speeds."""
    contender = world.contender("a", lambda length: 1.0, lacks=contenders.only_cuda)
    assert missing(contender, SETTING) == "runs on a GPU only"
    assert missing(contender, SETTING._replace(device="cuda")) == ""
