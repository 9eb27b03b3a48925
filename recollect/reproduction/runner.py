"""Running an experiment: its comparisons and questions, stage by stage; what is finished is never run again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from recollect.comparison import Request, compare
from recollect.comparison.report.records import Run, read
from recollect.evaluation.loading import load_language_model
from recollect.evaluation.report.summary import lines
from recollect.evaluation.runner import evaluate
from recollect.evaluation.suites import build_suite
from recollect.reproduction import patterns, plot
from recollect.reproduction.continuing import continue_both
from recollect.reproduction.experiment import TEXT, Asking, Continuing, Experiment, Looking, Plotting, Scale, Stage, Training
from recollect.training.checkpoint import replace_file

Say = Callable[[str], None]
Runs = Mapping[str, Sequence[Run]]  # name of a model -> its runs, in order of the seeds


class Column(NamedTuple):
    """One measured column.

    head: of the table; unit: "%" or ""; cells: model -> one value per seed, in order of the seeds; None for a run that failed.
    higher_is_better: the direction.
    """

    head: str
    unit: str
    cells: dict[str, list[float | None]]
    higher_is_better: bool


class Measured(NamedTuple):
    """What a run of an experiment has measured; `seconds` of training in all; parameters of the models, smallest and largest;
    settings that were given in place of the experiment's own; PNGs that it drew."""

    columns: list[Column]
    seconds: float
    parameters: tuple[int, int]
    overrides: Mapping[str, Any]
    pictures: Sequence[Path] = ()


def run(
    experiment: Experiment,
    scale: Scale,
    out: Path,
    *,
    seeds: int,
    text: Sequence[str] = (),
    jobs: int | None = None,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Measured:
    """Run every stage of a scale in folders under `out`; the same call goes on where it was interrupted.

    Args:
        experiment, scale: what; not "paper", which is a list of commands.
        out: a folder of this experiment and scale alone.
        seeds: runs of every model.
        text: files for the stages that read text.
        jobs, device: as `recollect compare` takes them.
        overrides: fields of every request that win over the experiment's, such as {"budget": "20steps"}.
        console: where progress goes.
    Raises:
        ValueError: no text where one is needed, and what the stages refuse.
    """
    if scale == "paper":
        raise ValueError("scale 'paper' is a list of commands for a cluster; it is not run here")
    if experiment.needs_text(scale) and not text:
        raise ValueError(f"{experiment.name} trains on text: name a file or folder with --data")
    columns: list[Column] = []
    trained: dict[str, Runs] = {}
    seconds, parameters = 0.0, []
    pictures: list[Path] = []
    for number, stage in enumerate(experiment.stages(scale)):
        folder = out / f"{number}-{_file_name(_title(stage))}"
        if isinstance(stage, Training):
            fields = {**stage.request, **(overrides or {}), "seeds": seeds, "device": device}
            request = Request(**{key: _with_text(value, text) if key == "data" else value for key, value in fields.items()})
            compare(request, out=folder, jobs=jobs, console=console)
            found = read(folder)
            runs = {stage.names.get(label, label): found.runs[label] for label in found.labels}
            trained[stage.column] = runs
            columns.append(_trained(stage.column, found.metric, runs))
            last = [each.last for seeds_of in runs.values() for each in seeds_of if each.last]
            seconds += sum(point.seconds for point in last)
            parameters += [point.parameters for point in last]
        elif isinstance(stage, Continuing):
            folder.mkdir(parents=True, exist_ok=True)
            cells, took, sizes = continue_both(stage, folder, seeds=seeds, text=text, say=_teller(console))
            columns.append(Column(stage.column, "", cells, higher_is_better=False))
            seconds, parameters = seconds + took, parameters + sizes
        else:
            more, drawn = _after(stage, trained, folder, text, console)
            columns += more
            pictures += drawn
    measured = Measured(columns, seconds, (min(parameters), max(parameters)), dict(overrides or {}), pictures)
    replace_file(out / "measured.json", json.dumps([column._asdict() for column in columns], indent=2).encode())
    return measured


def _teller(console: Console | None) -> Say:
    def tell(line: str) -> None:
        if console:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return tell


def _trained(head: str, metric: str, runs: Runs) -> Column:
    cells = {name: [_score(each) for each in seeds] for name, seeds in runs.items()}
    return Column(head, "%" if metric == "error" else "", cells, higher_is_better=False)


def _score(run: Run) -> float | None:
    return run.last.score if run.status == "finished" and run.last else None


def _asked(stage: Asking, runs: Runs, folder: Path, text: Sequence[str], console: Console | None) -> list[Column]:
    """One column per value of the suite's dimension; None for runs that ended early and have no model."""
    options = {key: _with_text(value, text) if key == "data" else value for key, value in stage.options.items()}
    suite = build_suite(stage.suite, **options)
    metric = suite.metrics[0]
    answers: list[tuple[str, dict[str, float]]] = []
    for name, each in ((name, each) for name, seeds in runs.items() for each in seeds):
        answers.append((name, {}))
        if console:
            console.print(f"{stage.suite}: {name} seed {each.seed}", markup=False, highlight=False)
        if each.status != "finished":
            continue
        model = load_language_model(str(each.folder), max_length=stage.context)
        out = folder / f"{_file_name(name)}-seed{each.seed}"
        results = evaluate(model, suite, out, about={"path": each.folder.name}).results
        for line in lines(suite, results, by=[stage.by] if stage.by else []):
            if stage.by and not line.group:
                continue  # the line of everything
            head = f"{stage.by} {line.group[stage.by]}" if stage.by else f"{stage.suite} {metric.name}"
            answers[-1][1][head] = line.cells[0].value
    columns = []
    for head in dict.fromkeys(head for _, heads in answers for head in heads):
        cells: dict[str, list[float | None]] = {}
        for name, heads in answers:
            cells.setdefault(name, []).append(heads.get(head))
        columns.append(Column(head, metric.unit, cells, metric.higher_is_better))
    return columns


def _after(
    stage: Asking | Looking | Plotting,
    trained: Mapping[str, Runs],
    folder: Path,
    text: Sequence[str],
    console: Console | None,
) -> tuple[list[Column], list[Path]]:
    """What a stage makes of models that are trained: columns and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(stage, Asking):
        return _asked(stage, trained[stage.of], folder, text, console), []
    if isinstance(stage, Looking):
        return _looked(stage, trained[stage.of], folder)
    return _plotted(stage, [trained[name] for name in stage.of], folder)


def _looked(stage: Looking, runs: Runs, folder: Path) -> tuple[list[Column], list[Path]]:
    """A column per kind of kernel, a row per pattern; a picture per model that has key-query kernels."""
    columns: dict[str, Column] = {}
    pictures = []
    for name, seeds in runs.items():
        models = [patterns.learned(each.folder) if each.status == "finished" else [] for each in seeds]
        for kind, found in patterns.shares(models).items():
            column = columns.setdefault(kind, Column(f"{stage.head}: {patterns.KINDS[kind]}", "%", {}, higher_is_better=True))
            column.cells.update({f"{name}: {row}" if len(runs) > 1 else row: cells for row, cells in found.items()})
        for each, model in zip(seeds, models, strict=True):
            if any(one.kernel.kind.startswith("kq") for one in model):
                figure = patterns.draw(model, f"{stage.head}: {name}, seed {each.seed}")
                pictures.append(_save(figure, folder / f"{_file_name(name)}-seed{each.seed}.png"))
    return list(columns.values()), pictures


def _plotted(stage: Plotting, trained: Sequence[Runs], folder: Path) -> tuple[list[Column], list[Path]]:
    """Columns with the KiB of state, and the picture."""
    columns = []
    for of, runs in zip(stage.of, trained, strict=True):
        cells = {name: [each.last.state_bytes / 1024 if each.last else None for each in seeds] for name, seeds in runs.items()}
        columns.append(Column(f"{of.removesuffix(' error')} state, KiB", "", cells, higher_is_better=False))
    figure = plot.draw(plot.points(trained), "Accuracy against the size of the state")
    return columns, [_save(figure, folder / "state.png")]


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    replace_file(path, buffer.getvalue())
    return path


def _title(stage: Stage) -> str:
    if isinstance(stage, Asking):
        return stage.suite
    if isinstance(stage, Plotting):
        return "states"
    return f"kernels-{stage.head}" if isinstance(stage, Looking) else stage.column


def _with_text(value: Any, text: Sequence[str]) -> Any:
    return type(value)(path for item in value for path in (text if item == TEXT else [item]))


def _file_name(text: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in text)


PAPER = """#!/bin/bash
# {name}: {about}
#
# Every training is a job of $NODES nodes of 8 GPUs (the papers: 4, of models of 1 B and more 8), which goes on by itself after
# an interruption; with NODES=0 it runs here, on the GPUs of this machine. What has ended is not done again when the script is.
# Files that are yours to bring: validation (a folder of texts per domain), haystack.txt, essays.txt, pg19, babi.
set -e
NODES=${{NODES:-4}}

train() {{
    if [ "$NODES" -gt 0 ]; then
        sbatch --wait --nodes "$NODES" "${{TRAIN_SBATCH:-examples/slurm/train.sbatch}}" "$@"
    else
        torchrun --standalone --nproc-per-node gpu -m recollect.cli train "$@"
    fi
}}

{commands}
"""


def write_paper(experiment: Experiment, out: Path) -> Path:
    """The commands of the published scale as a shell script for a cluster.

    Raises:
        OSError: it cannot be written.
    """
    commands = "\n".join(
        command.removeprefix("recollect ") if command.startswith("recollect train ") else command
        for command in experiment.paper
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{experiment.name}.sh"
    replace_file(path, PAPER.format(name=experiment.name, about=experiment.about, commands=commands).encode())
    path.chmod(0o755)
    return path
