"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recollect.cli import app
from recollect.comparison import compare
from tests.comparison.small import small

SMALL = {
    "--mixers": "attention,mta",
    "--budget": "300steps",
    "--task-option": "n_blocks=3",
    "-t": "n_letters=2",
    "--layers": "1",
    "--width": "16",
    "--heads": "2",
    "--intermediate": "16",
    "--batch-size": "4",
    "--dropout": "0.1",
    "--eval-every": "100",
    "--n-eval": "24",
    "--n-eval-curve": "8",
    "--device": "cpu",
}


def call(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_help_says_what_the_commands_do() -> None:
    status, out, _ = call("--help")
    assert status == 0
    for command in ("compare", "list", "generate", "remember"):
        assert command in out
    assert "WHOLE command" in call("compare", "--help")[1]


def test_list_shows_every_mixer_pattern_and_task() -> None:
    from recollect.mixers import PATTERNS, available
    from recollect.tasks import TASKS, TEXT_TASKS

    status, out, _ = call("list")
    assert status == 0
    for name in (*available(), *PATTERNS, *TASKS, *TEXT_TASKS, "text"):
        assert name in out
    for option in ("n_blocks=6", "vocab_size=0"):
        assert option in out, "the options are those that `compare` takes"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["find-blok"], "did you mean 'find-block'"),
        (["find-block", "--mixers", "atention"], "did you mean 'attention'"),
        (["find-block", "--mixers", "mta:c_qq=3"], "did you mean 'c_q'"),
        (["find-block", "-t", "n_leters=3"], "did you mean 'n_letters'"),
        (["find-block", "--budget", "17"], "budget '17'"),
        (["find-block", "--jobs", "0"], "--jobs"),
        (["find-block", "-t", "n_letters=30"], "n_letters"),
        (["text"], "--data"),
        (["text", "--data", "no_such_file.txt"], "no_such_file.txt"),
        (["recall", "-t", "n_pairs=60"], "length=64 is too short"),
        (["recall", "--tokenizer", "tokenizer.json"], "--tokenizer belongs to the task 'text'"),
        (["text", "--data", ".", "--tokenizer", "none.json"], "no tokenizer at none.json"),
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_one_sentence_on_stderr_and_status_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    status, out, err = call("compare", *words)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("recollect: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (b"too short", "too little text")],
)
def test_unsuitable_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(content)
    status, _, err = call("compare", "text", "--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "out"))
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_flag_is_status_2() -> None:
    status, _, err = call("compare", "find-block", "--mixer", "mta")
    assert status == 2
    assert "--mixers" in err


def test_ctrl_c_and_the_same_command_again_end_with_the_same_results(tmp_path: Path) -> None:
    """Status 130 and how to go on; then the results of a comparison that was never interrupted."""
    options = [*(word for pair in SMALL.items() for word in pair), "-t", "n_question=1"]
    words = [sys.executable, "-m", "recollect.cli", "compare", "find-block", *options]
    broken = subprocess.Popen(
        [*words, "--out", "broken", "--jobs", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A test runner in the background of a shell hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journals = [tmp_path / "broken" / "runs" / f"{label}-seed0" / "progress.jsonl" for label in ("attention", "mta")]
    # As soon as one has begun: on a busy machine it may end before the other begins.
    while broken.poll() is None and not any(path.exists() for path in journals):
        time.sleep(0.01)
    broken.send_signal(signal.SIGINT)
    _, err = broken.communicate(timeout=90)
    assert broken.returncode == 130, err
    assert "run the same command again" in err
    assert not any(row["final"] for row in rows_of(tmp_path / "broken"))

    request = small(budget="300steps", eval_every=100)
    for name in ("broken", "whole"):
        assert compare(request, out=tmp_path / name, jobs=2).failed == {}
    keys = ("mixer", "seed", "step", "error", "loss", "n_eval", "final")
    broken_rows, whole_rows = (
        {tuple(row[key] for key in keys) for row in rows_of(tmp_path / name)} for name in ("broken", "whole")
    )
    assert broken_rows == whole_rows
    assert len(whole_rows) == 8
    assert len(rows_of(tmp_path / "broken")) == 8


def rows_of(out: Path) -> list[dict[str, object]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_generate_continues_a_text(tmp_path: Path) -> None:
    """The same seed gives the same bytes; something that is no model is refused."""
    from recollect.models import RecollectConfig, RecollectForCausalLM

    RecollectForCausalLM(
        RecollectConfig(hidden_size=16, num_attention_heads=2, layers="mta", num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    words = ("generate", str(tmp_path), "--prompt", "To be", "--tokens", "5", "--seed", "1")
    status, out, _ = call(*words)
    assert status == 0
    assert out.startswith("To be")
    assert call(*words)[1] == out
    status, _, err = call("generate", str(tmp_path / "nowhere"), "--prompt", "x")
    assert status == 2
    assert "holds no model" in err


def test_generate_refuses_a_model_it_cannot_load_in_one_sentence(tmp_path: Path) -> None:
    """A damaged file ends without a traceback; a mixer of the user's own asks for --import."""
    from recollect.models import RecollectConfig, RecollectForCausalLM

    RecollectForCausalLM(RecollectConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:100])
    status, _, err = call("generate", str(tmp_path), "--prompt", "x")
    assert (status, err.count("\n")) == (2, 1)
    assert "damaged" in err
    config.write_text(config.read_text().replace('"attention"', '"my_mixer"'))
    status, _, err = call("generate", str(tmp_path), "--prompt", "x")
    assert (status, err.count("\n")) == (2, 1)
    assert "--import" in err


def test_list_never_cuts_a_name() -> None:
    """Or a narrow terminal shows names that cannot be typed."""
    from recollect.mixers import available

    out = CliRunner().invoke(app, ["list"], env={"COLUMNS": "60"}).stdout
    assert [name for name in available() if name not in out] == []


@pytest.fixture
def byte_model(tmp_path: Path) -> Path:
    """A small byte-level model's folder."""
    from recollect.models import RecollectConfig, RecollectForCausalLM

    layers = ["attention", {"mixer": "sliding_window", "window": 6}]
    RecollectForCausalLM(RecollectConfig(hidden_size=16, num_attention_heads=2, layers=layers)).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def test_remembering_is_kept_and_continued(byte_model: Path, tmp_path: Path) -> None:
    """Two texts at once, one after the other through a file, in other pieces: the same numbers; generation goes on from it."""
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("Ein schöner Tag. " * 20, encoding="utf-8")
    b.write_text("Noch einer.", encoding="utf-8")
    n_bytes = a.stat().st_size + b.stat().st_size
    model = str(byte_model)
    one, two, both = (str(tmp_path / name) for name in ("one", "two", "both"))
    status, whole, _ = call("remember", model, "--text", str(a), "--text", str(b), "--save", both)
    assert status == 0
    assert f"read {n_bytes:,} bytes at " in whole
    assert f"seen {n_bytes + 2:,} tokens" in whole
    assert f"written to {both}" in whole
    assert call("remember", model, "--text", str(a), "--save", one, "--piece", "7")[0] == 0
    status, then, _ = call("remember", model, "--text", str(b), "--load", one, "--save", two)
    assert status == 0
    assert f"seen {n_bytes + 2:,} tokens" in then
    said = [call("generate", model, "--prompt", "Und", "--tokens", "6", "--memory", path)[1] for path in (both, two)]
    assert said[0] == said[1]
    assert said[0].startswith("Und")
    assert "written" not in call("remember", model, "--text", str(b), "--load", one)[1], "numbers only"


def test_a_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    """Comparing, remembering and generating with tokens of one's own: nobody names the tokenizer twice."""
    text = tmp_path / "a.txt"
    text.write_text("The möwe sails over the sea, and over the land.\n" * 60, encoding="utf-8")
    tokenizer = str(tmp_path / "tokens.json")
    assert call("tokenizer", "train", str(text), "--vocab-size", "280", "--out", tokenizer)[0] == 0
    out = str(tmp_path / "out")
    words = ("compare", "text", "--data", str(text), "--tokenizer", tokenizer, "--mixers", "attention", "--budget", "2steps")
    small = ("--layers", "1", "--width", "16", "--heads", "2", "--intermediate", "16", "--seq-len", "16", "--batch-size", "2")
    status, _, err = call(*words, *small, "--n-eval", "4", "--out", out)
    assert status == 0, err
    last = rows_of(tmp_path / "out")[-1]
    assert 1.5 < float(str(last["loss"])) / math.log(2) / float(str(last["bits_per_byte"])) < 20, "bytes per token"
    model = f"{out}/runs/attention-seed0"
    status, said, err = call("remember", model, "--text", str(text), "--save", str(tmp_path / "memory"))
    assert status == 0, err
    assert f"read {text.stat().st_size:,} bytes at " in said
    status, said, err = call("generate", model, "--prompt", "The möwe", "--tokens", "3", "--memory", str(tmp_path / "memory"))
    assert status == 0, err
    assert said.startswith("The möwe")
    Path(model, "model", "tokenizer.json").unlink()
    status, _, err = call("generate", model, "--prompt", "x")
    assert status == 2
    assert "is no byte-level model: it has 280 symbols" in err


def test_what_cannot_be_remembered_is_one_sentence(byte_model: Path, tmp_path: Path) -> None:
    """Wrong texts, folders, models and damaged memories: status 2, the reason, nothing written."""
    from recollect.models import RecollectConfig, RecollectForCausalLM

    good, bad, empty, memory = (tmp_path / name for name in ("good.txt", "bad.txt", "empty.txt", "memory"))
    good.write_text("text")
    bad.write_bytes(b"xy\xff")
    empty.write_text("")
    model = str(byte_model)
    assert call("remember", model, "--text", str(good), "--save", str(memory))[0] == 0
    RecollectForCausalLM(RecollectConfig(hidden_size=16, num_attention_heads=2, layers="mta")).save_pretrained(
        tmp_path / "other"
    )
    damaged = tmp_path / "damaged"
    damaged.write_bytes(memory.read_bytes()[:-1] + b"?")
    new = str(tmp_path / "new")
    for words, message in (
        ([model, "--text", str(tmp_path / "none.txt")], "none.txt is no file"),
        ([model, "--text", str(empty)], "empty.txt is empty"),
        ([model, "--text", str(bad)], "not UTF-8: invalid start byte at offset 2"),
        ([model, "--text", str(good), "--piece", "0"], "at least 1; got 0"),
        ([str(tmp_path / "nowhere"), "--text", str(good)], "holds no model"),
        ([str(tmp_path / "other"), "--text", str(good), "--load", str(memory)], "saved by another model"),
        ([model, "--text", str(good), "--load", str(damaged)], "damaged"),
        ([model, "--text", str(good), "--load", str(good)], "not a whole state file"),
        ([model, "--text", str(good), "--load", str(tmp_path / "absent")], "absent"),
    ):
        status, out, err = call("remember", *words, "--save", new)
        assert (status, out, err.count("\n")) == (2, "", 1), words
        assert message in err
    status, _, err = call("remember", model, "--text", str(good), "--save", str(tmp_path / "no" / "memory"))
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no folder" in err
    status, _, err = call("generate", model, "--prompt", "", "--memory", str(memory))
    assert status == 2
    assert "prompt must not be empty" in err
    assert not Path(new).exists()
