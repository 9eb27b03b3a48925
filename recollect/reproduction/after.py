"""What is made of models once they are trained: they are asked, looked at, drawn against states and FLOPs, and timed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from recollect.comparison.report.records import Run
from recollect.evaluation.loading import load_language_model
from recollect.evaluation.report.summary import Line, lines
from recollect.evaluation.runner import evaluate
from recollect.evaluation.suites import Suite, build_suite
from recollect.reproduction import patterns, plot, scaling
from recollect.reproduction.experiment import Asking, Experiment, Looking, Plotting, Scaling, Timing, with_text
from recollect.reproduction.measured import Column, Made, Runs, Say, Trained
from recollect.training.checkpoint import replace_file


def make(
    stage: Asking | Looking | Plotting | Scaling | Timing,
    trained: Mapping[str, Trained],
    folder: Path,
    *,
    experiment: Experiment,
    text: Sequence[str],
    files: Mapping[str, str],
    device: str,
    say: Say,
) -> Made:
    """Run a stage that trains nothing.

    Args:
        stage: what to do.
        trained: column -> the comparison of an earlier stage.
        folder: for what it writes.
        experiment: whose stage it is.
        text, files: the user's; see `recollect.reproduction.runner.run`.
        device: where questions are asked.
        say: takes lines of progress.
    Raises:
        ValueError: what a suite refuses; a file that is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(stage, Asking):
        if stage.file and stage.file not in files:
            return Made(
                (), notes=[f"Not asked: {stage.suite}. Give it with --file {stage.file}=PATH, {experiment.files[stage.file]}"]
            )
        return asked(stage, trained[stage.of].runs, folder, text=text, files=files, device=device, say=say)
    if isinstance(stage, Looking):
        return looked(stage, trained[stage.of].runs, folder)
    if isinstance(stage, Timing):
        return timed(stage, trained[stage.of].runs)
    some = [trained[name] for name in stage.of]
    return plotted(stage, some, folder) if isinstance(stage, Plotting) else scaled(some, folder)


def asked(
    stage: Asking,
    runs: Runs,
    folder: Path,
    *,
    text: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    device: str = "auto",
    say: Say = print,
) -> Made:
    """One column per value of the suite's dimension; None for runs that ended early and have no model."""
    options = {key: with_text(value, text) if key == "data" else value for key, value in stage.options.items()}
    if stage.file:
        options["data"] = ((files or {})[stage.file],)
    suite = build_suite(stage.suite, **options)
    wanted = [i for i, metric in enumerate(suite.metrics) if metric.name in stage.metrics] or [0]
    answers: list[tuple[str, dict[tuple[str, int], float]]] = []
    for name, each in ((name, each) for name, seeds in runs.items() for each in seeds):
        answers.append((name, {}))
        if each.status != "finished":
            continue
        say(f"{stage.suite}: {name} seed {each.seed}")
        model = load_language_model(str(each.folder), max_length=stage.context, device=device)
        results = evaluate(
            model, suite, folder / f"{file_name(name)}-seed{each.seed}", about={"path": each.folder.name}
        ).results
        for line in lines(suite, results, by=[stage.by] if stage.by else []):
            if line.group or not stage.by:  # not the line of everything
                answers[-1][1].update({(_head(stage, suite, line, i), i): line.cells[i].value for i in wanted})
    columns = []
    for head, i in dict.fromkeys(key for _, values in answers for key in values):
        cells: dict[str, list[float | None]] = {}
        for name, values in answers:
            cells.setdefault(name, []).append(values.get((head, i)))
        columns.append(Column(head, suite.metrics[i].unit, cells, suite.metrics[i].higher_is_better))
    return Made(columns)


def _head(stage: Asking, suite: Suite, line: Line, metric: int) -> str:
    """Of a column: what the stage says, the group, the metric."""
    group = f"{stage.by} {line.group[stage.by]}" if stage.by else suite.name
    return " ".join(filter(None, (stage.head, group, suite.metrics[metric].name)))


def looked(stage: Looking, runs: Runs, folder: Path) -> Made:
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
                pictures.append(_save(figure, folder / f"{file_name(name)}-seed{each.seed}.png"))
    return Made(list(columns.values()), pictures)


def plotted(stage: Plotting, trained: Sequence[Trained], folder: Path) -> Made:
    """Columns with the KiB of state, and the picture."""
    columns = []
    for of, (runs, _) in zip(stage.of, trained, strict=True):
        cells = {name: [each.last.state_bytes / 1024 if each.last else None for each in seeds] for name, seeds in runs.items()}
        columns.append(Column(f"{of.removesuffix(' error')} state, KiB", "", cells, higher_is_better=False))
    figure = plot.draw(plot.points([each.runs for each in trained]), "Accuracy against the size of the state")
    return Made(columns, [_save(figure, folder / "state.png")])


def scaled(trained: Sequence[Trained], folder: Path) -> Made:
    """Columns with the million FLOPs of a token's training, and the picture."""
    columns, counts = [], []
    for runs, length in trained:
        count = {name: scaling.flops(seeds, length) for name, seeds in runs.items()}
        cells = {name: [None if n is None else n / 1e6] for name, n in count.items()}
        columns.append(Column(f"MFLOP/token, context {length}", "", cells, higher_is_better=False))
        counts.append(count)
    return Made(columns, [_save(scaling.draw(trained, counts), folder / "scaling.png")], [scaling.NOTE])


def timed(stage: Timing, runs: Runs) -> Made:
    """Tokens a second, of every seed."""
    cells = {name: [_speed(each) for each in seeds] for name, seeds in runs.items()}
    return Made(
        [Column("tokens/s", "", cells, higher_is_better=True)], notes=["Speeds are those of runs side by side on one machine."]
    )


def file_name(text: str) -> str:
    """A name as a file or folder may have it."""
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in text)


def _speed(run: Run) -> float | None:
    return run.last.tokens_per_second if run.status == "finished" and run.last else None


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    replace_file(path, buffer.getvalue())
    return path
