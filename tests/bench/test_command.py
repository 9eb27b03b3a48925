"""`recollect bench` as it is typed: tables, files, what wrong input is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import peers
from recollect.bench import floor, memory
from recollect.bench.runner import Runner
from recollect.cli import app, bench
from recollect.models import sizes

TINY = ("--lengths", "16,32", "--heads", "2", "--head-dim", "8", "--repeats", "2", "--device", "cpu")


def invoke(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["bench", *(str(word) for word in words)], env={"COLUMNS": "400"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_suite_is_measured_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a command that leaves its numbers where nobody finds them, or measures again what is there."""
    monkeypatch.setattr(floor, "rates", lambda device, dtype: floor.Rates(1e9, 1e9))
    out = tmp_path / "out"
    words = ("mta", *TINY, "--contenders", "native,sdpa", "--out", out)
    status, said, err = invoke(*words)
    assert status == 0, err
    for word in ("native", "sdpa", "time ~ T^", "roofline", "peak memory", "16", "32", "GFLOP/s", "plain attention"):
        assert word in said
    assert {path.name for path in out.iterdir()} >= {"rows.jsonl", "mta.md", "mta.png", "mta.svg"}
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["rates"] for row in rows if "rates" in row] == [{"flops": 1e9, "bytes": 1e9}]
    timed = [row for row in rows if row.get("length")]
    assert {(row["contender"], row["length"]) for row in timed} == {(n, t) for n in ("native", "sdpa") for t in (16, 32)}
    assert all(row["low"] <= row["seconds"] <= row["high"] and row["floor_seconds"] > 0 for row in timed)
    assert all("error" in row for row in rows if row.get("length", "") is None)
    status, again, err = invoke(*words)
    assert (status, err) == (0, ""), "nothing was left to measure"
    assert len((out / "rows.jsonl").read_text().splitlines()) == len(rows)
    assert "sdpa" in again


def test_what_was_not_timed_in_turn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a heading "in turn" over rows of two runs, and floors of other rates than the heading names."""
    drawn = iter((floor.Rates(1e9, 1e9), floor.Rates(7e9, 7e9)))
    monkeypatch.setattr(floor, "rates", lambda device, dtype: next(drawn))
    monkeypatch.setattr(memory, "probe", lambda key, setting, length: memory.Probe(1000, 1e-3))
    words = ("mta", *TINY, "--out", tmp_path, "--contenders")
    _, first, _ = invoke(*words, "sdpa")
    assert "timed in different runs" not in first
    _, second, _ = invoke(*words, "sdpa,materialized,post_only")
    note = "at 16, 32 timed in different runs, not in turn: materialized, post_only | sdpa"
    assert note in second
    assert note in (tmp_path / "mta.md").read_text()
    assert "products 1 GFLOP/s" in second
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    floors = [row["flops"] / 1e9 for row in rows if row.get("length")]
    assert [row["floor_seconds"] for row in rows if row.get("length")] == pytest.approx(
        [max(a, row["bytes"] / 1e9) for a, row in zip(floors, (row for row in rows if row.get("length")), strict=True)]
    )


def test_a_run_that_measures_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a success without a number, and the name of a picture that was not drawn."""
    monkeypatch.setattr(floor, "rates", lambda device, dtype: floor.Rates(1e9, 1e9))
    status, said, err = invoke("mta", *TINY, "--contenders", "triton", "--out", tmp_path)
    assert (status, err) == (1, "")
    assert "mta: nothing could be measured here" in said
    assert "triton (runs on a GPU only; not yet measured on a GPU by its authors)" in said
    assert ".png" not in said
    assert not list(tmp_path.glob("*.png"))


GOALS = {  # of the table in docs/kernels.md
    "mta --lengths 4096": ("sdpa", "triton"),
    "train --shape mta-880m": ("attention", "mta", "mta_hybrid"),
    "train --shape miras-340m": ("attention", "yaad", "moneta", "memora"),
    "decode --shape miras-340m": ("attention", "yaad", "moneta", "memora"),
}


def documented() -> list[str]:
    """The commands of the table of goals, without their first two words."""
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    block = text.split("## On a GPU")[1].split("```bash\n")[1].split("```")[0]
    return [line.split("#")[0].strip().removeprefix("recollect bench ") for line in block.splitlines()]


@pytest.mark.parametrize("command", documented())
def test_the_goals_commands_run_at_a_tiny_size(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a goal that no command measures: what docs/kernels.md says, with its shape, lengths and batch made tiny."""
    monkeypatch.setattr(floor, "rates", lambda device, dtype: floor.Rates(1e9, 1e9))
    monkeypatch.setattr(
        memory, "probe", lambda key, setting, length: memory.Probe(1000, 1e-3)
    )  # no process knows the tiny shape
    goal = next(goal for goal in GOALS if command.startswith(goal))
    monkeypatch.setitem(sizes.SIZES, command.partition("--shape ")[2].split(" ")[0], sizes.Size(32, 4, 2, 64, 50, 32, "moneta"))
    words = [*command.split(), "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]
    for option, tiny in (("--lengths", "24"), ("--batch", "2"), ("--layers", "2")):
        if option in words:
            words[words.index(option) + 1] = tiny
    if command.startswith("mta"):
        words += ["--heads", "2", "--head-dim", "8"]
    status, said, err = invoke(*words)
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    timed = {row["contender"] for row in rows if row.get("length") == 24 and row["status"] == "done"}
    assert timed == set(GOALS[goal]) - {"triton"}, said
    assert {row["setting"]["batch"] for row in rows} == {2 if "--batch" in words else 1}
    assert {row["setting"]["chunk"] for row in rows} == {64 if "--chunk" in words else None}


def test_every_goal_has_a_command() -> None:
    """Prevents a row of the table without one."""
    assert sorted(goal for command in documented() for goal in GOALS if command.startswith(goal)) == sorted(GOALS)


def test_a_shape_gives_all_sizes(tmp_path: Path) -> None:
    """Prevents a training step at 6 layers of 512 under the name of the 880M shape."""
    asked = bench.Asked("cpu", None, 1, None, None, "mta-880m", None, None, 10, None, None)
    for found in bench._settings(["mta", "train", "decode"], asked):
        assert (found.shape, found.heads, found.head_dim) == ("mta-880m", 16, 96)
        of_a_model = (0, 257, None) if found.suite == "mta" else (24, 128_256, 4096)
        assert (found.layers, found.vocabulary, found.intermediate) == of_a_model
    shallow = bench._settings(["decode"], asked._replace(layers=4))[0]
    assert (shallow.layers, shallow.shape) == (4, "mta-880m")


def test_the_contenders_are_listed_with_what_they_lack(tmp_path: Path) -> None:
    """Prevents names that nobody can find, and a folder for a mere question."""
    status, said, _ = invoke("--list", "--device", "cpu", "--out", tmp_path / "out")
    assert status == 0
    for word in (
        "native",
        "liger",
        "fla_gla",
        "mamba_ssm",
        "titans_pytorch",
        "flex_attention",
        "gated_delta_net",
        "GPU only",
        "moneta_triton",
    ):
        assert word in said
    kernels = [line for line in said.splitlines() if "Triton" in line and "GPU only" in line]
    assert len(kernels) == 9
    assert all("not yet measured on a GPU by its authors" in line for line in kernels)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mtaa",), "did you mean 'mta'"),
        (("mta", "--contenders", "natve"), "did you mean 'native'"),
        (("mta", "--lengths", "12,x"), "--lengths"),
        (("mta", "--lengths", "16,16"), "different whole numbers"),
        (("mta", "--lengths", "0"), "at least 2"),
        (("mta", "--repeats", "0"), "--repeats is at least 1"),
        (("mta", "--threads", "100000"), "--threads is at most"),
        (("mta", "--head-dim", "7"), "--head-dim is even"),
        (("mta", "--limit", "0"), "--limit is a positive number"),
        (("train", "--layers", "0"), "--layers is at least 1"),
        (("mta", "--layers", "2"), "--layers is of the suites train, decode; mta has none"),
        (("mta", "--chunk", "2"), "--chunk is of the suites miras, train, decode; mta has none"),
        (("train", "--shape", "mta-88m"), "did you mean 'mta-880m'"),
        (("train", "--shape", "mta-880m", "--heads", "2"), "leave them out"),
        (("mta", "--dtype", "int8"), "--dtype is one of float32"),
        (("mta", "--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
        (("mta", "--device", "nowhere"), "device 'nowhere' cannot be used here"),
        (("mta", "--out", "file/out"), "file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_sentence(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents tracebacks, and files of a run that never began."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    status, out, err = invoke(*words)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback after Ctrl-C."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupted)
    status, _, err = invoke("mta", *TINY, "--out", tmp_path)
    assert status == 130
    assert "run the same command again" in err


def test_peers_are_printed_with_their_install_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a hint, `python -m bench.peers`, that leads nowhere."""
    peers.main()
    said = capsys.readouterr().out
    for word in ("flash-attn", "liger-kernel", "flash-linear-attention", "mamba-ssm", "titans-pytorch", "--no-deps"):
        assert word in said
