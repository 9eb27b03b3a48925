"""From what the user asks to a plan: everything that changes a number, written down before the first step."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recollect.comparison.defaults import Defaults, defaults_of
from recollect.comparison.model import make_model, n_parameters
from recollect.comparison.options import check_types, parse_budget, parse_mixer
from recollect.comparison.workload import make_workload
from recollect.data.tokenizer import tokenizer_file
from recollect.mixers import entry, layer_options
from recollect.mixers.base import option_names
from recollect.mixers.patterns import with_options
from recollect.training.config import TrainingConfig
from recollect.training.folder import changes
from recollect.training.world import find_device
from recollect.user_modules import import_user_modules

VERSION = 3
PRECISIONS = ("fp32", "bf16")
EQUAL = ("data", "time")
MIN_EVAL_EVERY = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a user may say; None means the task's default (comparison/defaults.py).

    Attributes:
        task: "text" or a registered task.
        mixers: as typed, `name` or `name:option=value:option=value`.
        seeds: number of seeds; the seeds are 0 .. seeds - 1.
        budget: "1500steps" for every run, or wall time of the whole comparison ("90s", "5m", "1h").
        equal: "data" (every mixer the same steps) or "time" (every mixer the same time; needs a time budget).
        task_options: fields of the task, by name.
        data, eval_data: files, folders or globs (task "text").
        tokenizer: "bytes", or a tokenizer.json or a folder that holds one (task "text").
        imports: modules or files that register mixers or tasks.
        layers, width, heads, intermediate, dropout: the model.
        parameters: trainable numbers of every model, by the width of its SwiGLUs; instead of `intermediate`.
        mlp: whether the model has SwiGLUs beside its mixers.
        batch_size, seq_len, lr, schedule, warmup, end_lr, weight_decay, clip: the recipe.
        eval_every: steps between evaluations.
        n_eval, n_eval_curve: held-out examples of the last and of the earlier evaluations.
        precision: "fp32", or "bf16": products of training in bf16, weights, optimiser and evaluation in fp32.
        threads: threads of one run (it changes the order of sums, so it is part of the plan).
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """

    task: str
    mixers: Sequence[str] | None = None
    seeds: int = 1
    budget: str | None = None
    equal: str = "data"
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Sequence[str] = ()
    eval_data: Sequence[str] = ()
    tokenizer: str = "bytes"
    imports: Sequence[str] = ()
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    parameters: int | None = None
    mlp: bool | None = None
    dropout: float | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    lr: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    end_lr: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    eval_every: int | None = None
    n_eval: int | None = None
    n_eval_curve: int | None = None
    precision: str = "fp32"
    threads: int = 1
    device: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison, as stored in comparison.json.

    `steps` is None until a time budget has been turned into steps; all fields but those of `NOT_HASHED` enter `config_hash`.
    """

    version: int
    task: str
    task_options: dict[str, Any]
    data: dict[str, Any]
    imports: list[dict[str, str]]
    metric: str
    chance: float | None
    mixers: list[dict[str, Any]]
    seeds: list[int]
    budget: str
    equal: str
    steps: int | dict[str, int] | None
    model: dict[str, Any]
    training: dict[str, Any]
    eval_every: int | None
    n_evaluations: int
    n_eval: int
    n_eval_curve: int
    precision: str
    threads: int
    device: str
    config_hash: str = ""
    command: str = ""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    created: str = ""

    def runs(self) -> list[tuple[str, int]]:
        """(label, seed) of every run: seed by seed, so that an interrupted comparison has whole seeds to show.

        Within a seed the model with the most parameters, likely the slowest, starts first: the last to start ends the command.
        """
        ordered = sorted(self.mixers, key=lambda mixer: -mixer["parameters"])
        return [(mixer["label"], seed) for seed in self.seeds for mixer in ordered]

    def mixer(self, label: str) -> dict[str, Any]:
        return next(mixer for mixer in self.mixers if mixer["label"] == label)

    def model_of(self, label: str) -> dict[str, Any]:
        """Sizes of one mixer's model: `RecollectConfig` without its layers."""
        return {**self.model, "intermediate_size": self.mixer(label)["intermediate_size"]}

    def steps_of(self, label: str) -> int:
        if self.steps is None:
            raise ValueError("the time budget has not been turned into steps yet")
        return self.steps[label] if isinstance(self.steps, dict) else self.steps

    def eval_every_of(self, label: str) -> int:
        return self.eval_interval(self.steps_of(label))

    def eval_interval(self, steps: int) -> int:
        """Steps between evaluations of a run of `steps` steps."""
        return self.eval_every or max(MIN_EVAL_EVERY, steps // self.n_evaluations)

    def training_of(self, label: str, *, steps: int | None = None) -> TrainingConfig:
        recipe = {name: value for name, value in self.training.items() if name != "length"}
        return TrainingConfig(steps=steps or self.steps_of(label), **recipe)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises ValueError if the text is no plan of this version."""
        values = json.loads(text)
        names = {field.name for field in dataclasses.fields(Plan)}
        if not isinstance(values, dict) or values.get("version") != VERSION or set(values) != names:
            raise ValueError(f"it is not a comparison of this version of recollect (format {VERSION})")
        return Plan(**values)


NOT_HASHED = ("steps", "config_hash", "command", "machine", "created")


def make_plan(request: Request, *, command: str = "") -> Plan:
    """Check a request as a whole and write it out in full. Nothing is written to disk.

    Raises:
        ValueError, TypeError, OSError: what the user got wrong, as one sentence.
    """
    imports = import_user_modules(request.imports)
    _check_counts(request)
    budget = request.budget or defaults_of(request.task).budget
    steps, _ = parse_budget(budget)
    if request.equal == "time" and steps is not None:
        raise ValueError(f"--equal time needs a time budget such as 5m; got the budget {budget!r}")
    if request.precision not in PRECISIONS:
        raise ValueError(f"--precision is {' or '.join(PRECISIONS)}; got {request.precision!r}")
    if request.task != "text" and (request.data or request.eval_data):
        raise ValueError(f"--data belongs to the task 'text'; {request.task!r} makes its own data")
    if request.task == "text" and not request.data:
        raise ValueError("the task 'text' needs data: --data FILE, folder or glob (repeatable)")
    if request.task != "text" and request.tokenizer != "bytes":
        raise ValueError(f"--tokenizer belongs to the task 'text'; {request.task!r} has symbols of its own")
    defaults = defaults_of(request.task)
    task_options = _task_options(request, defaults)
    data: dict[str, Any] = {}
    if request.task == "text":
        paths, evaluation_paths = ([os.path.abspath(path) for path in given] for given in (request.data, request.eval_data))
        tokenizer = tokenizer_file(request.tokenizer)
        data = {
            "paths": paths,
            "evaluation_paths": evaluation_paths,
            "tokenizer": str(tokenizer.absolute()) if tokenizer else request.tokenizer,
        }
    workload = make_workload(request.task, task_options, data)
    if workload.fingerprint:
        data["fingerprint"] = workload.fingerprint
    model = {
        "vocab_size": workload.vocab_size,
        "hidden_size": _or(request.width, defaults.width),
        "num_hidden_layers": _or(request.layers, defaults.layers),
        "num_attention_heads": _or(request.heads, defaults.heads),
        "mlp": _or(request.mlp, defaults.mlp),
    }
    if not model["mlp"] and (request.intermediate or request.parameters):
        raise ValueError("--intermediate and --parameters are about SwiGLUs, which this model has not; add --mlp")
    plan = Plan(
        version=VERSION,
        task=request.task,
        task_options=task_options,
        data=data,
        imports=imports,
        metric=workload.metric,
        chance=workload.chance,
        mixers=_mixers(request, defaults, task_options, model),
        seeds=list(range(request.seeds)),
        budget=budget,
        equal=request.equal,
        steps=steps,
        model=model,
        training=_training(request, defaults, workload.length),
        eval_every=request.eval_every,
        n_evaluations=defaults.n_evaluations,
        n_eval=_or(request.n_eval, defaults.n_eval),
        n_eval_curve=min(_or(request.n_eval_curve, defaults.n_eval_curve), _or(request.n_eval, defaults.n_eval)),
        precision=request.precision,
        threads=request.threads,
        device=find_device(request.device),
        command=command,
        machine=machine(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    plan.training_of(plan.mixers[0]["label"], steps=steps or 1)  # refuses a bad recipe now
    return dataclasses.replace(plan, config_hash=config_hash(plan))


def config_hash(plan: Plan) -> str:
    """16 hex digits over everything that changes a number; data count by their content, not by their path."""
    return hashlib.sha256(json.dumps(identity(plan), sort_keys=True).encode()).hexdigest()[:16]


def identity(plan: Plan) -> dict[str, Any]:
    """The hashed part of a plan."""
    values = {name: value for name, value in dataclasses.asdict(plan).items() if name not in NOT_HASHED}
    values["data"] = values["data"].get("fingerprint", "")
    values["imports"] = sorted(module["sha256"] for module in values["imports"])
    values["device"] = values["device"].split(":")[0]
    return values


def differences(old: Plan, new: Plan) -> list[str]:
    """What differs between two plans, as `name: old -> new`, outermost names first."""
    return [_difference(*change) for change in changes(identity(old), identity(new))]


def moved(stored: Plan, new: Plan) -> Plan:
    """The stored plan with the new one's places: the same data and modules may lie elsewhere now, and the GPU be another one."""
    return dataclasses.replace(stored, data=new.data, imports=new.imports, device=new.device)


def _difference(name: str, old: Any, new: Any) -> str:
    if name == "mixers":
        old, new = ([mixer["label"] for mixer in mixers] for mixers in (old, new))
        if old == new:
            return "options or sizes of the mixers"
    if name in ("data", "imports"):  # hashes say nothing to a person
        return "other data" if name == "data" else "other --import modules"
    return f"{name}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    import recollect
    from recollect.kernels import describe

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "recollect": recollect.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "gpu": gpu,
        "multi_token_attention": describe(),
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_counts(request: Request) -> None:
    if request.equal not in EQUAL:
        raise ValueError(f"--equal is one of {', '.join(EQUAL)}; got {request.equal!r}")
    for name in (
        "seeds",
        "threads",
        "layers",
        "width",
        "heads",
        "intermediate",
        "parameters",
        "seq_len",
        "eval_every",
        "n_eval",
        "n_eval_curve",
    ):
        value = vars(request)[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if request.parameters is not None and request.intermediate is not None:
        raise ValueError("--parameters sets the hidden size of the SwiGLUs: leave --intermediate out")
    if request.dropout is not None and not 0 <= request.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {request.dropout}")


def _task_options(request: Request, defaults: Defaults) -> dict[str, Any]:
    options = {**defaults.task_options, **request.task_options}
    if request.seq_len is not None:
        if request.task != "text":
            raise ValueError(
                f"--seq-len belongs to the task 'text'; the length of {request.task!r} follows from its --task-option"
            )
        options["seq_len"] = request.seq_len
    return options


def _training(request: Request, defaults: Defaults, length: int) -> dict[str, Any]:
    names = ("batch_size", "lr", "schedule", "warmup", "end_lr", "weight_decay")
    recipe = {name: _or(vars(request)[name], vars(defaults)[name]) for name in names}
    base = TrainingConfig(steps=1, batch_size=1)
    recipe.update(beta1=base.beta1, beta2=base.beta2, eps=base.eps, decay=base.decay, clip=_or(request.clip, base.clip))
    return {**recipe, "length": length}


def _mixers(
    request: Request, defaults: Defaults, task_options: Mapping[str, Any], model: Mapping[str, Any]
) -> list[dict[str, Any]]:
    labels = list(request.mixers) if request.mixers is not None else list(defaults.mixers)
    labels = [label.strip() for label in labels if label.strip()]
    if not labels:
        raise ValueError("no mixer to compare; name at least one with --mixers")
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"mixer {label!r} is listed twice")
        if "/" in label or "\0" in label or len(label.encode()) > 200:
            raise ValueError(f"mixer {label!r} cannot name a folder: it holds a slash or is longer than 200 bytes")
    dropout = _or(request.dropout, defaults.dropout)
    widths = {"intermediate": _or(request.intermediate, defaults.intermediate), "parameters": request.parameters}
    return [_mixer(label, defaults.mixer_options(task_options), model, dropout, **widths) for label in labels]


def _mixer(
    label: str,
    task_defaults: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    dropout: float,
    *,
    intermediate: int | None,
    parameters: int | None,
) -> dict[str, Any]:
    name, typed = parse_mixer(label)
    for option, flag in (("dim", "--width"), ("n_heads", "--heads"), ("layer", "")):
        if option in typed:
            raise ValueError(f"mixer {label!r}: {option} is the model's{f'; set it with {flag}' if flag else ''}")
    layers = layer_options(name, model["num_hidden_layers"])
    given: dict[str, dict[str, Any]] = {}  # what no one typed, for each mixer of the model
    for mixer in {layer["mixer"]: None for layer in layers}:
        check_types(entry(mixer).config, typed, of=f"mixer {label!r}")
        common = {"dropout": dropout} if dropout and "dropout" in option_names(mixer) else {}
        given[mixer] = {**common, **task_defaults.get(mixer, {})}
    layers = with_options([{**layer, **given[layer["mixer"]]} for layer in layers], typed)
    if parameters is not None:
        intermediate = _fitting(label, model, layers, parameters)
    built = make_model({**model, "intermediate_size": intermediate}, layers, seed=0)
    return {
        "label": label,
        "mixer": name,
        "options": {**given.get(name, {}), **typed},
        "layers": layers,
        "intermediate_size": built.config.intermediate_size,
        "parameters": n_parameters(built),
    }


def _fitting(label: str, model: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], parameters: int) -> int:
    """Hidden size of the SwiGLUs with which a model comes closest to a number of parameters (linear in it).

    Raises:
        ValueError: the model is larger even with SwiGLUs of size 1.
    """
    one, two = (n_parameters(make_model({**model, "intermediate_size": size}, layers, seed=0)) for size in (1, 2))
    size = 1 + round((parameters - one) / (two - one))
    if size < 1:
        raise ValueError(f"--parameters {parameters}: mixer {label!r} at this width and depth needs at least {one}")
    return size
