"""What an experiment of a paper is here: which models are trained and asked what at which scale, and what was published.

stages   a comparison trains the models and gives one column; questions ask the models of an earlier comparison; their kernels are
         looked at; accuracy is drawn against the size of their states, bits per byte against FLOPs and contexts; speeds are read
         off; a retrofit is trained on
scales   "tiny" ends in minutes on two cores, "small" in hours; "paper" is the list of commands for a cluster
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Scale = Literal["tiny", "small", "paper"]
SCALES: tuple[Scale, ...] = ("tiny", "small", "paper")
TEXT = "TEXT"  # stands for the user's text in the `data` of a request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers of a paper, to stand beside measured ones.

    Attributes:
        title: what they are, where they stand, how large the models were.
        columns: heads of the columns.
        rows: model -> a number or text per column; None where the paper has none.
        note: what keeps them from being compared number by number.
    """

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float | str | None, ...]]
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Train several mixers and take the comparison's own metric: error %, or bits per byte.

    Attributes:
        column: head of the column.
        request: fields of `recollect.comparison.Request`, seeds excepted; `data=[TEXT]` is the user's.
        names: mixer as typed -> name in the table, where it is another.
    """

    column: str
    request: Mapping[str, Any]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """Ask every model of an earlier stage a suite of `recollect evaluate`; one column per value of `by`.

    Attributes:
        of: column of the `Training` whose models are asked.
        suite: name of the suite.
        options: its options; `data=(TEXT,)` is the user's.
        by: dimension of the suite that makes the columns; "": one column for all.
        context: tokens that the models may see at a time; None: their own limit.
        metrics: names of the suite's metrics; none: its first.
        file: the suite's `data` is what the user gives under this name; the stage is left out where nothing is given.
        head: what the columns begin with.
    """

    of: str
    suite: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by: str = ""
    context: int | None = None
    metrics: tuple[str, ...] = ()
    file: str = ""
    head: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looking:
    """Name the pattern of every learned kernel of the models of an earlier stage: a row per pattern, a column per kind of kernel, and
    a picture per model.

    Attributes:
        of: column of the `Training` whose models are looked at.
        head: what the columns begin with.
    """

    of: str
    head: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plotting:
    """Draw accuracy against bytes of state, a line per mixer over earlier stages; one column each with the bytes.

    Attributes:
        of: columns of the `Training` stages, whose metric is the error.
    """

    of: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Count the FLOPs that a token of training takes, and draw bits per byte against FLOPs and against the training context.

    Attributes:
        of: columns of `Training` stages that differ in the length of their texts, shortest first.
    """

    of: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Read off how many tokens a second the models of an earlier stage were trained on, `jobs` at a time.

    Attributes:
        of: column of the `Training`.
    """

    of: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuing:
    """Train a stock Llama on the user's text, then go on with it twice: as it is, and retrofitted. Bits per byte of held-out text.

    Attributes:
        column: head of the column.
        mixer, layers: of the retrofit.
        width, n_layers, heads, intermediate: of the Llama (byte-level).
        steps: of the first training; more_steps: of each continuation.
        lr, more_lr: their learning rates.
    """

    column: str
    mixer: str = "mta"
    layers: str = "every-4th"
    width: int = 128
    n_layers: int = 4
    heads: int = 4
    intermediate: int = 344
    steps: int = 300
    more_steps: int = 100
    lr: float = 2e-3
    more_lr: float = 5e-4


Means = Callable[[str, str], float]
"""Of a column (its head) and a model: the mean over the seeds, a share for what is printed in %; NaN where it was not measured."""

Stage = Training | Asking | Looking | Plotting | Scaling | Timing | Continuing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of a paper.

    Attributes:
        name: what users type.
        about: one line: what is shown, and where in which paper.
        published: what the paper reports.
        tiny, small: the stages of these scales.
        paper: commands that run it as published, one per line.
        size: in words, how far the scales are from the paper's models.
        files: name of a file that the user may give -> what it is.
        beside: words for rows of the first published table, from what was measured here: a column of their own.
    """

    name: str
    about: str
    published: tuple[Published, ...]
    tiny: tuple[Stage, ...]
    small: tuple[Stage, ...]
    paper: tuple[str, ...]
    size: Mapping[str, str]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Callable[[Means], Mapping[str, str]] | None = None

    def stages(self, scale: Scale) -> tuple[Stage, ...]:
        """The stages of a scale that is run here."""
        return self.tiny if scale == "tiny" else self.small

    def needs_text(self, scale: Scale) -> bool:
        """Whether a stage reads the user's text."""
        for stage in self.stages(scale):
            if isinstance(stage, Continuing):
                return True
            if isinstance(stage, Training) and TEXT in stage.request.get("data", ()):
                return True
            if isinstance(stage, Asking) and TEXT in stage.options.get("data", ()):
                return True
        return False


def with_text(value: Any, text: Sequence[str]) -> Any:
    """The same files, with the user's in the place of TEXT."""
    return type(value)(path for item in value for path in (text if item == TEXT else [item]))
