"""The papers' experiments: every stage can be planned, every command of the published scale is understood, and one runs to its page."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from recollect.cli import app
from recollect.comparison import Request
from recollect.comparison.options import parse_mixer
from recollect.comparison.plan import Plan, make_plan
from recollect.comparison.report.records import Run
from recollect.comparison.workload import make_workload
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.loading import OwnCoder
from recollect.evaluation.suites import Questions, build_suite
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.reproduction import EXPERIMENTS, find, miras, mta, recall, report
from recollect.reproduction.after import asked
from recollect.reproduction.continuing import SAME, continue_both
from recollect.reproduction.experiment import (
    TEXT,
    Asking,
    Continuing,
    Experiment,
    Looking,
    Plotting,
    Scale,
    Scaling,
    Stage,
    Timing,
    Training,
)
from recollect.reproduction.measured import Column, Measured
from recollect.reproduction.paper import write_paper
from recollect.reproduction.report import cell
from recollect.reproduction.runner import run
from recollect.training.recipe.check import check
from recollect.training.recipe.load import load_run

NAMES = (mta.NAMES, miras.NAMES, recall.NAMES)  # of all that their experiments train
SMALL = {"budget": "2steps", "width": 16, "layers": 1, "heads": 2, "batch_size": 2, "n_eval": 4, "n_eval_curve": 2}
STAGES = [(name, scale) for name in EXPERIMENTS for scale in ("tiny", "small")]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "book.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents. " * 1200)
    return str(file)


@pytest.mark.parametrize(("name", "scale"), STAGES)
def test_every_stage_can_be_planned(name: str, scale: Scale, text: str) -> None:
    """Prevents an experiment that fails hours later on an option that no mixer, task or suite has."""
    _plan(name, scale, text, {"width": 32, "layers": 2, "parameters": None})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), STAGES)
def test_every_stage_can_be_planned_at_its_size(name: str, scale: Scale, text: str) -> None:
    """Prevents a number of parameters that some mixer exceeds without SwiGLUs, and heads that do not divide."""
    _plan(name, scale, text, {})


def _plan(name: str, scale: Scale, text: str, smaller: dict[str, Any]) -> None:
    experiment = EXPERIMENTS[name]
    trained: dict[str, Plan] = {}
    for stage in experiment.stages(scale):
        if isinstance(stage, Training):
            fields = {
                key: [text if item == TEXT else item for item in value] if key == "data" else value
                for key, value in stage.request.items()
            }
            plan = make_plan(Request(**{**fields, **smaller}), command="")
            assert set(stage.names) <= {mixer["label"] for mixer in plan.mixers} or stage.names in NAMES
            trained[stage.column] = plan
        elif isinstance(stage, Looking | Timing):
            assert stage.of in trained
        elif isinstance(stage, Plotting | Scaling):
            assert set(stage.of) <= set(trained)
        elif isinstance(stage, Asking):
            assert stage.of in trained
            assert not stage.file or stage.file in experiment.files
            given = {"data": (text,)} if "data" in stage.options or stage.file else {}
            suite = build_suite(stage.suite, **{**stage.options, **given})
            assert set(stage.metrics) <= {metric.name for metric in suite.metrics}
            assert not stage.by or stage.by in suite.dimensions
            if isinstance(suite, Questions):
                assert dataclasses.replace(suite, n=1).items(_reader(trained[stage.of], stage.context))
    assert experiment.size[scale]


def _reader(plan: Plan, context: int | None) -> LanguageModel:
    """A model with the tokenizer that those of the plan have: lengths are in its tokens."""
    tokenizer = make_workload(plan.task, plan.task_options, plan.data).tokenizer  # type: ignore[attr-defined]
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 1, "layers": ["attention"], "mlp": False}
    model = RecollectForCausalLM(RecollectConfig(vocab_size=tokenizer.vocab_size, **sizes))
    return LanguageModel(model, OwnCoder(tokenizer), max_length=context)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_published_table_is_whole(name: str) -> None:
    """Prevents a row that has slipped by a column."""
    for table in EXPERIMENTS[name].published:
        assert table.rows
        assert all(len(values) == len(table.columns) for values in table.rows.values())
        assert table.note


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if EXPERIMENTS[name].beside])
def test_what_was_measured_stands_beside_each_claim(name: str, tmp_path: Path) -> None:
    """Prevents a claim without an answer, an answer to another claim, and numbers for what was not measured."""
    experiment = EXPERIMENTS[name]
    assert experiment.beside is not None
    assert set(experiment.beside(lambda head, model: 0.5)) == set(experiment.published[0].rows)
    assert set(experiment.beside(lambda head, model: math.nan).values()) == {"not measured"}
    cells: dict[str, list[float | None]] = {"Moneta": [2.5, 2.7], "Transformer++": [3.0, 3.2]}
    columns = [Column("bits/byte", "", cells, higher_is_better=False)]
    report.write(tmp_path, experiment, "tiny", Measured(columns, 60.0, (1, 1), {}))
    for file in ("table.txt", "table.md", "report.html"):
        assert "29 % lower, of a byte" in (tmp_path / file).read_text()  # 1 - 2 ** -0.5


def _commands(name: str) -> list[list[str]]:
    return [shlex.split(line) for line in EXPERIMENTS[name].paper]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_of_the_published_scale_is_understood(name: str) -> None:
    """Prevents a recipe that is not shipped, a setting that no run has, and an option that no command takes."""
    click = typer.main.get_command(app)
    for command in _commands(name):
        if command[0] in ("hf", "python"):  # what others bring; the first model of mta-retrofit
            continue
        assert command[0] == "recollect"
        if command[1] == "train":
            check(load_run(command[2], command[3:]))
            continue
        known = {flag for parameter in click.commands[command[1]].params for flag in parameter.opts}  # type: ignore[attr-defined]
        assert {word for word in command if word.startswith("-") and not word[1:2].isdigit()} <= known
        if command[1] == "evaluate" and command[3] != "harness":
            given = [command[i + 1].partition("=") for i, word in enumerate(command) if word == "-o"]
            options: dict[str, Any] = {key: value for key, _, value in given if key not in ("text", "facts", "background")}
            if "--data" in command:
                options["data"] = command[command.index("--data") + 1]
            build_suite(command[3], **{key: int(value) if key == "n" else value for key, value in options.items()})


@pytest.mark.parametrize("nodes", [None, 0, 8])
def test_a_script_of_the_published_scale_runs_on_a_cluster(nodes: int | None, tmp_path: Path) -> None:
    """Prevents trainings of hundreds of GPU days that run in one process, a script that goes on after a failure, and lost words."""
    said = tmp_path / "said"
    for name in ("sbatch", "torchrun", "recollect"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {said}\n')
        (tmp_path / name).chmod(0o755)
    path = write_paper(EXPERIMENTS["mta-long-context"], tmp_path)
    settings = {"PATH": f"{tmp_path}:/usr/bin:/bin", **({} if nodes is None else {"NODES": str(nodes)})}
    subprocess.run([path], check=True, env=settings)
    lines = said.read_text().splitlines()
    assert len(lines) == len(EXPERIMENTS["mta-long-context"].paper)
    words = "train long-context model.start_from=runs/mta-880m/model out=runs/mta-880m-4k"
    if nodes == 0:
        assert f"torchrun --standalone --nproc-per-node gpu -m recollect.cli {words}" in lines
    else:
        assert f"sbatch --wait --nodes {nodes or 4} examples/slurm/train.sbatch {words.removeprefix('train ')}" in lines
    assert lines[-1].startswith("recollect evaluate runs/mta-880m-4k perplexity --data validation")
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexit 3\n")
    assert subprocess.run([path], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}).returncode == 3


def test_a_script_that_is_run_again_makes_no_model_again(tmp_path: Path) -> None:
    """Prevents a second run of mta-retrofit's script from stopping at a folder that is not empty, or drawing other first weights."""
    lines = write_paper(EXPERIMENTS["mta-retrofit"], tmp_path).read_text().splitlines()
    made = [line for line in lines if "recollect retrofit" in line or "save_pretrained" in line]
    assert len(made) == 5
    assert [line.split(" ] || ")[0] for line in made[:2]] == ["[ -e models/fresh", "[ -e models/transformer-1.4b-mta"]
    assert all(" ] || " in line for line in made)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_script_of_the_published_scale_trains_what_it_asks(name: str) -> None:
    """Prevents a script that stops on a cluster at a model that another experiment would have trained."""
    made: set[str] = set()
    for command in _commands(name):
        needed = {word.removeprefix("model.start_from=").removesuffix("/model") for word in command if "start_from=" in word}
        needed |= {command[2].removesuffix("/model")} if command[1] in ("evaluate", "inspect", "retrofit") else set()
        assert needed <= made, shlex.join(command)
        made |= {word.removeprefix("out=") for word in command if word.startswith("out=")}
        made |= {command[i + 1] for i, word in enumerate(command) if word in ("--out", "--local-dir")}
        made |= set(re.findall(r"save_pretrained\('([^']*)'\)", command[-1]))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_command_asks_beyond_the_context_of_its_model(name: str) -> None:
    """Prevents a script of the published scale that stops at its second command: MTA's models read what they were trained on."""
    for command in _commands(name):
        lengths = [word.removeprefix("lengths=") for word in command if word.startswith("lengths=")]
        if command[1] != "evaluate" or "-880m" not in command[2] or not lengths:
            continue
        tuned = command[2].endswith("-4k")
        context = load_run("long-context" if tuned else Path(command[2]).name).data.seq_len
        assert all(int(length) <= context for given in lengths for length in given.split(",")), shlex.join(command)


def test_the_published_toy_model_is_that_of_the_paper() -> None:
    """Prevents another size under the paper's name: 3,418,368 parameters, and 144 of MTA's kernels."""
    words = _commands("mta-toy")[0]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    sizes = {name: int(given[f"--{name}"]) for name in ("layers", "width", "heads", "intermediate")}
    assert (given["--lr"], given["--schedule"], given["--dropout"], given["--precision"]) == ("1e-4", "constant", "0.1", "bf16")
    counts = []
    for mixer, options in map(parse_mixer, given["--mixers"].split(",")):
        config = RecollectConfig(
            vocab_size=32,
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=sizes["intermediate"],
            layers=[{"mixer": mixer, **options}] * sizes["layers"],
            tie_word_embeddings=True,
        )
        counts.append(sum(x.numel() for x in RecollectForCausalLM(config).parameters()))
    assert counts == [3_418_368, 3_418_512]


def of_stages(name: str, stages: tuple[Stage, ...], **rest: Any) -> Experiment:
    """An experiment at tiny scale alone."""
    published = EXPERIMENTS["mta-lm"].published
    size = {"tiny": "very small"}
    return Experiment(name=name, about=f"a <{name}>", published=published, tiny=stages, small=(), paper=(), size=size, **rest)


def test_an_experiment_runs_to_its_page_and_is_not_run_again(tmp_path: Path, text: str) -> None:
    """Prevents results in another column, a page without its published table, and work that is done twice."""
    experiment = of_stages(
        "toy",
        (
            Training(
                column="bits/byte",
                request={"task": "text", "data": [TEXT], "mixers": ["attention", "mamba2"]},
                names={"mamba2": "Mamba"},
            ),
            Asking(
                of="bits/byte", suite="perplexity", options={"data": (TEXT,), "positions": (64,), "tokens": 100}, by="position"
            ),
        ),
    )
    for _ in range(2):
        measured = run(experiment, "tiny", tmp_path / "out", seeds=2, text=[text], jobs=1, overrides=SMALL)
        assert [column.head for column in measured.columns] == [
            "bits/byte",
            "position 0-64 bits/byte",
            "position 64- bits/byte",
        ]
        assert {name: len(values) for name, values in measured.columns[1].cells.items()} == {"attention": 2, "Mamba": 2}
    report.write(tmp_path / "out", experiment, "tiny", measured)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a &lt;toy&gt;" in page
    assert "10.91" in page
    assert "Changed for this run: budget 2steps" in page
    assert "Mamba" in (tmp_path / "out" / "table.md").read_text()
    assert measured.parameters[0] <= measured.parameters[1]


def test_a_run_without_a_result_is_named_with_its_reason(tmp_path: Path, text: str) -> None:
    """Prevents a dash in a table that nobody can explain."""
    request = {"task": "text", "data": [TEXT], "mixers": ["attention"], "lr": 1e30, "clip": 0, "warmup": 0}
    experiment = of_stages("toy", (Training(column="bits/byte", request=request, names={"attention": "Transformer"}),))
    measured = run(experiment, "tiny", tmp_path / "out", seeds=1, text=[text], jobs=1, overrides={**SMALL, "budget": "4steps"})
    assert measured.columns[0].cells == {"Transformer": [None]}
    (note,) = measured.notes
    assert note.startswith("No result: Transformer, bits/byte, seed 0: failed")
    assert "training diverged at step" in note
    report.write(tmp_path / "out", experiment, "tiny", measured)
    assert "training diverged at step" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_is_of_one_experiment(tmp_path: Path, text: str) -> None:
    """Prevents tables of one experiment from being overwritten by those of another that trains alike."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/experiment.json").write_text('{"experiment": "mta-lm", "scale": "tiny"}')
    with pytest.raises(ValueError, match="holds mta-lm at scale tiny; give mta-lambada at scale tiny another --out"):
        run(EXPERIMENTS["mta-lambada"], "tiny", tmp_path / "out", seeds=1, text=[text])


def test_models_that_are_not_there_are_not_asked(tmp_path: Path, text: str) -> None:
    """Prevents one diverged run from taking the table of all the others with it."""
    for name in ("a0", "a2"):
        config = RecollectConfig(hidden_size=16, num_attention_heads=2, layers=["gated_delta_net"], mlp=False)
        RecollectForCausalLM(config).save_pretrained(tmp_path / name)

    def seeds(label: str, *statuses: str) -> list[Run]:
        each = [{"seed": i, "status": status, "folder": tmp_path / f"{label}{i}"} for i, status in enumerate(statuses)]
        return [Run(label=label, steps=1, points=(), reason="", **one) for one in each]  # type: ignore[arg-type]

    stage = Asking(of="x", suite="perplexity", options={"data": (TEXT,), "positions": (64,), "tokens": 100}, by="position")
    runs = {"A": seeds("a", "finished", "diverged", "finished"), "B": seeds("b", "diverged")}
    first, second = asked(stage, runs, tmp_path / "asked", text=[text], device="cpu").columns
    assert [cell is None for cell in first.cells["A"]] == [False, True, False]
    assert first.cells["B"] == second.cells["B"] == [None]


def test_what_needs_a_file_is_asked_where_it_is_given(tmp_path: Path, text: str) -> None:
    """Prevents a table that silently lacks its main column, a file under a name that nothing reads, and the wrong metric."""
    experiment = of_stages(
        "words",
        (
            Training(column="bits/byte", request={"task": "text", "data": [TEXT], "mixers": ["mamba2"]}),
            Timing(of="bits/byte"),
            Asking(
                of="bits/byte", suite="lambada", file="lambada", by="file", metrics=("perplexity", "accuracy"), head="words:"
            ),
        ),
        files={"lambada": "passages"},
    )
    common: dict[str, Any] = {"seeds": 1, "text": [text], "jobs": 1, "overrides": SMALL}
    without = run(experiment, "tiny", tmp_path / "out", **common)
    assert [column.head for column in without.columns] == ["bits/byte", "tokens/s"]
    assert "Not asked: lambada. Give it with --file lambada=PATH, passages" in without.notes
    assert without.columns[1].cells["mamba2"][0] > 0
    passages = tmp_path / "standard.jsonl"
    passages.write_text('{"text": "The rain fell on the roof"}\n')
    found = run(experiment, "tiny", tmp_path / "out", files={"lambada": str(passages)}, **common)
    accuracy, perplexity = found.columns[-2:]
    assert (accuracy.head, perplexity.head) == ("words: file standard accuracy", "words: file standard perplexity")
    assert (accuracy.unit, accuracy.cells) == ("%", {"mamba2": [0.0]})
    assert perplexity.cells["mamba2"][0] > 1
    assert (accuracy.higher_is_better, perplexity.higher_is_better) == (True, False)
    with pytest.raises(ValueError, match=r"words reads no file 'lambda'; it reads lambada \(passages\)"):
        run(experiment, "tiny", tmp_path / "out", files={"lambda": str(passages)}, **common)
    with pytest.raises(ValueError, match="no such file or folder"):
        run(experiment, "tiny", tmp_path / "out", files={"lambada": str(tmp_path / "none")}, **common)
    passages.write_text('{"words": "The rain fell on the roof"}\n')
    with pytest.raises(ValueError, match=r"standard.jsonl, line 1: .*text"):
        run(experiment, "tiny", tmp_path / "new", files={"lambada": str(passages)}, **common)
    assert not (tmp_path / "new").exists()


def test_a_retrofit_is_trained_on_beside_the_model_as_it_is(tmp_path: Path, text: str) -> None:
    """Prevents continuations that start from different models, and a stage that trains again what it has trained."""
    stage = Continuing(column="bits/byte", width=16, n_layers=2, heads=2, intermediate=16, steps=9, more_steps=9, layers="all")
    said: list[str] = []
    with pytest.raises(ValueError, match="a number of steps, as 300steps; got '2m'"):
        continue_both(stage, tmp_path, seeds=1, text=[text], say=said.append, budget="2m")
    for _ in range(2):
        cells, seconds, parameters = continue_both(
            stage, tmp_path, seeds=1, text=[text], say=said.append, device="cpu", budget="2steps"
        )
        assert {name: len(values) for name, values in cells.items()} == {SAME: 1, "Transformer -> mta": 1}
        assert parameters[1] > parameters[0]
        assert seconds > 0
    assert sum("finished" in line for line in said) == 3
    assert any("step 2/2" in line for line in said)


def test_text_is_asked_for_and_paper_is_not_run(tmp_path: Path) -> None:
    """Prevents a run that fails inside a worker, and a cluster's work begun on a laptop."""
    with pytest.raises(ValueError, match="mta-lm trains on text: name a file or folder with --data"):
        run(EXPERIMENTS["mta-lm"], "tiny", tmp_path, seeds=1)
    with pytest.raises(ValueError, match="list of commands"):
        run(EXPERIMENTS["mta-lm"], "paper", tmp_path, seeds=1)
    with pytest.raises(ValueError, match="did you mean 'mta-toy'"):
        find("mta-toi")


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0.5], "%", "50.0"),
        ([0.1, 0.3], "%", "20.0 (10.0, 30.0)"),
        ([2.5, 2.6], "", "2.550 (2.500, 2.600)"),
        ([2.5, None], "", "- (2.500, -)"),
        ([12345.6, 99.5], "", "6,223 (12,346, 99.500)"),
    ],
)
def test_a_cell_shows_every_seed(values: list[float | None], unit: str, expected: str) -> None:
    """Prevents a mean that hides a failed run."""
    assert cell(values, unit) == expected


def test_scales_are_all_described() -> None:
    """Prevents a scale without words for its size."""
    for experiment in EXPERIMENTS.values():
        assert set(experiment.size) == set(get_args(Scale)) - {"paper"}
