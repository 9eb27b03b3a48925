"""Running an experiment: its comparisons and questions, stage by stage; what is finished is never run again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recollect.comparison import Request, compare
from recollect.comparison.report.records import Run, read
from recollect.comparison.report.summary import describe
from recollect.evaluation.suites import Local, build_suite
from recollect.reproduction.after import file_name, make
from recollect.reproduction.continuing import continue_both
from recollect.reproduction.experiment import (
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
    with_text,
)
from recollect.reproduction.measured import Column, Measured, Runs, Say, Trained
from recollect.training.checkpoint import replace_file


def run(
    experiment: Experiment,
    scale: Scale,
    out: Path,
    *,
    seeds: int,
    text: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
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
        files: name -> file or folder, of `experiment.files`; what needs one that is not given is left out, and a note says so.
        jobs, device: as `recollect compare` takes them.
        overrides: fields of every request that win over the experiment's, such as {"budget": "20steps"}.
        console: where progress goes.
    Raises:
        ValueError: no text where one is needed, a file that the experiment does not know or that is not there, a folder of another
            experiment, and what the stages refuse.
    """
    if scale == "paper":
        raise ValueError("scale 'paper' is a list of commands for a cluster; it is not run here")
    if experiment.needs_text(scale) and not text:
        raise ValueError(f"{experiment.name} trains on text: name a file or folder with --data")
    _check_files(experiment, scale, files or {})
    _claim(out, {"experiment": experiment.name, "scale": scale})
    say = _teller(console)
    columns: list[Column] = []
    trained: dict[str, Trained] = {}
    seconds, parameters = 0.0, []
    pictures: list[Path] = []
    notes: list[str] = []
    for number, stage in enumerate(experiment.stages(scale)):
        folder = out / f"{number}-{file_name(_title(stage))}"
        if isinstance(stage, Training):
            fields = {**stage.request, **(overrides or {}), "seeds": seeds, "device": device}
            request = Request(**{key: with_text(value, text) if key == "data" else value for key, value in fields.items()})
            compare(request, out=folder, jobs=jobs, console=console)
            found = read(folder)
            runs = {stage.names.get(label, label): found.runs[label] for label in found.labels}
            trained[stage.column] = Trained(runs, int(found.plan["training"]["length"]))
            columns.append(_column(stage.column, found.metric, runs))
            notes += [
                f"No result: {name}, {stage.column}, seed {run.seed}: {describe(run, found.metric)}"
                for name, each in runs.items()
                for run in each
                if run.status != "finished"
            ]
            last = [each.last for seeds_of in runs.values() for each in seeds_of if each.last]
            seconds += sum(point.seconds for point in last)
            parameters += [point.parameters for point in last]
        elif isinstance(stage, Continuing):
            folder.mkdir(parents=True, exist_ok=True)
            cells, took, sizes = continue_both(
                stage, folder, seeds=seeds, text=text, device=device, budget=(overrides or {}).get("budget"), say=say
            )
            columns.append(Column(stage.column, "", cells, higher_is_better=False))
            seconds, parameters = seconds + took, parameters + sizes
        else:
            made = make(stage, trained, folder, experiment=experiment, text=text, files=files or {}, device=device, say=say)
            columns += made.columns
            pictures += made.pictures
            notes += made.notes
    measured = Measured(columns, seconds, (min(parameters), max(parameters)), dict(overrides or {}), pictures, notes)
    replace_file(out / "measured.json", json.dumps([column._asdict() for column in columns], indent=2).encode())
    return measured


def _claim(out: Path, owner: Mapping[str, str]) -> None:
    """A folder is of one experiment at one scale: another's tables would be overwritten.

    Raises:
        ValueError: the folder is another's.
    """
    path = out / "experiment.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != owner:
            theirs = f"{found.get('experiment')} at scale {found.get('scale')}"
            raise ValueError(f"{out} holds {theirs}; give {owner['experiment']} at scale {owner['scale']} another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(owner).encode())


def _check_files(experiment: Experiment, scale: Scale, files: Mapping[str, str]) -> None:
    """Refuse before hours of training what could not be asked after them."""
    known = ", ".join(f"{name} ({what})" for name, what in experiment.files.items())
    for name, path in files.items():
        if name not in experiment.files:
            raise ValueError(f"{experiment.name} reads no file {name!r}; it reads {known or 'none'}")
        if not Path(path).exists():
            raise ValueError(f"--file {name}={path}: no such file or folder")
    for stage in experiment.stages(scale):
        if isinstance(stage, Asking) and stage.file in files:
            suite = build_suite(stage.suite, **stage.options, data=(files[stage.file],))
            assert isinstance(suite, Local)
            suite.read()


def _teller(console: Console | None) -> Say:
    def tell(line: str) -> None:
        if console:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return tell


def _column(head: str, metric: str, runs: Runs) -> Column:
    cells = {name: [_score(each) for each in seeds] for name, seeds in runs.items()}
    return Column(head, "%" if metric == "error" else "", cells, higher_is_better=False)


def _score(run: Run) -> float | None:
    return run.last.score if run.status == "finished" and run.last else None


def _title(stage: Stage) -> str:
    if isinstance(stage, Asking):
        return stage.suite
    if isinstance(stage, Looking):
        return f"kernels-{stage.head}"
    fixed = {Plotting: "states", Scaling: "scaling", Timing: "speeds"}
    return fixed.get(type(stage)) or stage.column  # type: ignore[union-attr]  # the rest trains and has one
