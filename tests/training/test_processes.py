"""Several processes are one run: the same curve, checkpoints for any number of them, and an end when one of them dies.

Most tests fork their processes from a server that has imported torch (`processes.train_on`); those marked slow go through torchrun.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recollect.mixers import MIXERS
from recollect.training.recipe.settings import RunSettings
from recollect.training.trainer import CHECKPOINTS, run_training
from tests.training.processes import command, started, train_on
from tests.training.runs import finish, journal, losses, out_again, stop_after, tiny_run, validation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback and forkserver as Linux has them")

# Rounding must not be amplified by AdamW (see test_trainer.SMOOTH), so that 1e-5 is far above it and far below any mistake.
OPTIMISER = {"lr": 0.03, "eps": 1.0, "clip": 1.0}
LAYERS = ["mta", "memora"]
CLOSE = 1e-5


def a_run(folder: Path, **settings: Any) -> RunSettings:
    return tiny_run(
        folder, **{"layers": LAYERS, "optimiser": OPTIMISER, "eval_rows": 13, "steps": 6, "eval_every": 3, **settings}
    )


def assert_same_curve(run: RunSettings, reference: RunSettings) -> None:
    assert losses(run) == pytest.approx(losses(reference), abs=CLOSE)
    assert validation(run) == pytest.approx(validation(reference), abs=CLOSE)


def assert_same_run(n: int, run: RunSettings, one: RunSettings) -> None:
    """`run` on n processes has the curve of `one` on one, and counts the same tokens."""
    finish(one)
    train_on(n, run)
    assert_same_curve(run, one)
    assert tokens(run) == tokens(one)


def tokens(run: RunSettings) -> list[int]:
    return [event["tokens"] for event in journal(run) if event["event"] == "step"]


# The same numbers


@pytest.mark.parametrize(
    "engine",
    [
        {"strategy": "ddp", "micro_batch": 1},
        {"strategy": "fsdp"},
        pytest.param({"strategy": "ddp"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "fsdp", "micro_batch": 1, "checkpoint_activations": True}, marks=pytest.mark.slow),
    ],
    ids=["ddp-micro", "fsdp", "ddp", "fsdp-micro-recompute"],
)
def test_two_processes_have_the_curve_of_one(tmp_path: Path, engine: dict[str, Any]) -> None:
    """Rows read twice, gradients averaged over rows with different numbers of labels, a clipping norm of a part of the gradient, a
    validation row lost or counted twice."""
    one, two = a_run(tmp_path, out="one"), a_run(tmp_path, out="two", engine=engine)
    assert_same_run(2, two, one)
    norms = [[event["grad_norm"] for event in journal(run) if event["event"] == "step"] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.slow
def test_three_processes_share_what_does_not_divide(tmp_path: Path) -> None:
    """13 validation rows in batches of one for three processes: the last turn has one batch for all of them."""
    one = a_run(tmp_path, out="one", batch_tokens=6 * 24)
    three = a_run(tmp_path, out="three", batch_tokens=6 * 24, engine={"strategy": "fsdp", "micro_batch": 1})
    finish(one)
    train_on(3, three)
    assert_same_curve(three, one)


def test_tensor_parallel_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    """Processes that share matrices must read the same rows, in validation, too; and count them once."""
    one = a_run(tmp_path, out="one")
    two = a_run(tmp_path, out="two", engine={"strategy": "fsdp", "tensor_parallel": 2, "micro_batch": 2})
    assert_same_run(2, two, one)


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (["mta", "memora"], {}),
        (["yaad", "gated_delta_net"], {"data": {"cut_documents": False}}),
        (["sliding_window", "titans"], {"engine": {"micro_batch": 2, "checkpoint_activations": True}}),
    ],
    ids=["mta-memora", "yaad-gated_delta_net", "sliding_window-titans-recompute"],
)
def test_processes_that_share_a_row_have_the_curve_of_one(tmp_path: Path, layers: Any, settings: dict[str, Any]) -> None:
    """A state that is lost between the pieces of a row, or whose gradient does not come back; tokens counted twice."""
    engine = {"strategy": "ddp", "sequence_parallel": 2, **settings.get("engine", {})}
    one = a_run(tmp_path, out="one", layers=layers, **settings)
    two = a_run(tmp_path, out="two", layers=layers, **{**settings, "engine": engine})
    assert_same_run(2, two, one)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_three_processes_share_a_row_with_every_mixer(tmp_path: Path, mixer: str) -> None:
    """A middle piece both takes and gives; a state that changes its shape on the way, or holds what cannot travel."""
    engine = {"strategy": "ddp", "sequence_parallel": 3}
    one = a_run(tmp_path, out="one", layers=mixer, steps=3)
    three = a_run(tmp_path, out="three", layers=mixer, steps=3, engine=engine)
    finish(one)
    train_on(3, three)
    assert_same_curve(three, one)


@pytest.mark.slow
def test_two_by_two_processes_share_rows(tmp_path: Path) -> None:
    """Data and sequence parallelism at once: a state must not go to another row's reader."""
    one = a_run(tmp_path, out="one", layers="yaad")
    four = a_run(tmp_path, out="four", layers="yaad", engine={"strategy": "ddp", "sequence_parallel": 2, "micro_batch": 1})
    assert_same_run(4, four, one)


@pytest.mark.slow
def test_four_processes_two_by_two_have_the_curve_of_one(tmp_path: Path) -> None:
    """Data and tensor parallelism at once."""
    one = a_run(tmp_path, out="one")
    four = a_run(tmp_path, out="four", engine={"strategy": "fsdp", "tensor_parallel": 2, "micro_batch": 1})
    assert_same_run(4, four, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "engine"),
    [(2, {"strategy": "ddp"}), (2, {"strategy": "fsdp"}), (4, {"strategy": "fsdp", "tensor_parallel": 2, "micro_batch": 1})],
    ids=["ddp", "fsdp", "fsdp-tensor"],
)
def test_muon_on_processes_has_the_curve_of_one(tmp_path: Path, processes: int, engine: dict[str, Any]) -> None:
    """Newton-Schulz of half a matrix is not half of Newton-Schulz (it runs in bf16, hence the wider bound)."""
    settings: dict[str, Any] = {"optimiser": {"name": "muon", "lr": 0.01, "eps": 1.0}, "layers": "mta"}
    one, many = a_run(tmp_path, out="one", **settings), a_run(tmp_path, out="many", **settings, engine=engine)
    finish(one)
    train_on(processes, many)
    assert losses(many) == pytest.approx(losses(one), abs=1e-3)
    assert losses(one)[6] < losses(one)[1] - 0.1


@pytest.mark.slow
def test_train_only_on_two_processes(tmp_path: Path) -> None:
    """DDP waits for gradients of frozen parameters that never come; FSDP must not mix both kinds."""
    settings: dict[str, Any] = {"model": {"train_only": ["*.mixer.*"]}}
    one = a_run(tmp_path, out="one", **settings)
    finish(one)
    for strategy in ("ddp", "fsdp"):
        two = a_run(tmp_path, out=strategy, **settings, engine={"strategy": strategy})
        train_on(2, two)
        assert_same_curve(two, one)


@pytest.mark.slow
def test_bf16_on_two_processes_learns(tmp_path: Path) -> None:
    """FSDP casts weights and what goes into a block; memories and norms must live with that."""
    two = a_run(
        tmp_path,
        optimiser={"lr": 1e-2},
        steps=20,
        eval_every=0,
        data={"carry": True},
        layers="yaad",
        engine={"strategy": "fsdp", "precision": "bf16"},
    )
    train_on(2, two)
    assert validation(two)[20] < validation(two)[0] - 0.8


# Checkpoints


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, strategy: str) -> None:
    """One process, then two, then one: no row is lost or read twice, no moment of the optimiser is lost or halved."""
    one = a_run(tmp_path, out="one")
    finish(one)
    parts = a_run(tmp_path, out="parts")
    run_training(parts, should_stop=stop_after(2), say=lambda line: None)
    two = a_run(tmp_path, out="parts", engine={"strategy": strategy})
    said = train_on(2, two, stop=2)
    assert "going on from step 2" in said[0]
    assert said[1] == ""
    finish(parts)
    assert_same_curve(parts, one)


def test_memories_are_carried_from_two_processes_to_one(tmp_path: Path) -> None:
    """Every lane finds its memory again, whoever had it; then the other way, and with other micro-batches."""
    settings: dict[str, Any] = {"layers": ["yaad", "mamba2"], "data": {"carry": True}, "steps": 8, "eval_every": 4}
    one = a_run(tmp_path, out="one", **settings)
    finish(one)
    parts = a_run(tmp_path, out="parts", **settings)
    train_on(2, a_run(tmp_path, out="parts", **settings, engine={"strategy": "fsdp", "micro_batch": 1}), stop=3)
    run_training(parts, should_stop=stop_after(2), say=lambda line: None)
    train_on(2, a_run(tmp_path, out="parts", **settings, engine={"strategy": "ddp"}))
    assert_same_curve(parts, one)


def test_a_stop_of_one_process_stops_all(tmp_path: Path) -> None:
    """Only one of them got the signal; the others would wait for it in the next step."""
    run = a_run(tmp_path)
    train_on(2, run, stop=2)
    assert [path.name for path in (Path(run.out) / CHECKPOINTS).iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("part", "shard"),
    [
        ("model", 1),
        ("optimiser", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("model", 0), ("optimiser", 1)]),
    ],
)
def test_two_processes_skip_the_same_broken_checkpoint(tmp_path: Path, part: str, shard: int) -> None:
    """Each checks some of the files; where one of them finds a file missing, the others must hear of it, or they read different
    checkpoints or wait for each other for ever."""
    one = a_run(tmp_path, out="one", layers="mta")
    finish(one)
    two = a_run(tmp_path, out="two", layers="mta", engine={"strategy": "fsdp"}, saving={"every_steps": 2, "keep_last": 3})
    train_on(2, two, stop=5)
    newest = Path(two.out) / CHECKPOINTS / "step-00000005"
    sorted((newest / part).iterdir())[shard].unlink()
    said = train_on(2, two, seconds=30)
    assert "skipped the checkpoint step-00000005" in said[0]
    assert "going on from step 4" in said[0]
    assert_same_curve(two, one)


# Refusals and death


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": 72}, "3 rows .* 2 processes cannot share"),
        ({"engine": {"strategy": "none"}}, "'none' would train 2 separate copies"),
    ],
)
def test_what_two_processes_cannot_do_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """A sentence, on every process, instead of a hang."""
    with pytest.raises(RuntimeError, match=message):
        train_on(2, a_run(tmp_path, **settings), seconds=30)


def test_a_folder_of_another_run_is_refused_by_all(tmp_path: Path) -> None:
    """Only the first process looks; the others wait for it."""
    run = a_run(tmp_path)
    run_training(run, should_stop=stop_after(1), say=lambda line: None)
    with pytest.raises(RuntimeError, match=r"process 0[\s\S]*holds another run|process 1[\s\S]*[Cc]onnection"):
        train_on(2, a_run(tmp_path, seed=1), seconds=30)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_has_the_curve_of_one_process(tmp_path: Path, strategy: str) -> None:
    """The command as users give it: ends with status 0, says everything once, leaves a model."""
    one = a_run(tmp_path, out="one")
    finish(one)
    two = a_run(tmp_path, out="two", engine={"strategy": strategy, "threads": 1})
    done = subprocess.run(command(two, processes=2), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: ") == 1
    assert "Traceback" not in done.stderr
    assert_same_curve(two, one)
    assert (Path(two.out) / "model" / "config.json").is_file()


@pytest.mark.slow
def test_torchrun_tells_why_it_refuses(tmp_path: Path) -> None:
    """A wrong setting ends the job at once with its sentence and a status that is not 0."""
    run = a_run(tmp_path)
    run_training(run, should_stop=stop_after(1), say=lambda line: None)
    other = a_run(tmp_path, seed=1)
    done = subprocess.run(command(other, processes=2), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "holds another run (seed: 0 -> 1)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_one_goes_on(tmp_path: Path, rank: int, strategy: str) -> None:
    """The others would otherwise wait for the dead one until somebody looks."""
    settings: dict[str, Any] = {"steps": 400, "eval_every": 0, "layers": "mta", "saving": {"every_steps": 20}}
    run = a_run(tmp_path, **settings, engine={"strategy": strategy})
    log = tmp_path / "log"
    with started(command(run, processes=2), log=log) as job:
        wait_for_checkpoint(run, job)
        os.kill(worker_of(job.pid, rank), signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait(timeout=60) != 0
        assert time.monotonic() - killed < 60
    text = log.read_text()
    assert f"local_rank: {rank}" in text
    assert "Signal 9 (SIGKILL)" in text
    said = list[str]()
    run_training(out_again(a_run(tmp_path, **settings), Path(run.out).name), say=said.append, should_stop=stop_after(5))
    assert any(line.startswith("going on from step ") for line in said)
    assert not any("skipped" in line for line in said)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(tmp_path: Path) -> None:
    """What a scheduler sends at the end of the allotted time."""
    run = a_run(tmp_path, steps=4000, eval_every=0, layers="mta", saving={"every_steps": 50})
    with started(command(run, processes=2), log=tmp_path / "log") as job:
        wait_for_checkpoint(run, job)
        shutil.rmtree(Path(run.out) / CHECKPOINTS)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) != 0
    text = (tmp_path / "log").read_text()
    assert "the same command goes on" in text
    assert list((Path(run.out) / CHECKPOINTS).glob("step-*"))


def wait_for_checkpoint(run: RunSettings, job: subprocess.Popen[bytes], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not list((Path(run.out) / CHECKPOINTS).glob("step-*")):
        assert job.poll() is None, "the job ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)


def worker_of(launcher: int, rank: int) -> int:
    """The process that torchrun has started for a rank."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"torchrun has no process of rank {rank}")
