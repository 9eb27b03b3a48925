"""A training run as data: the dataclasses that RUN.yaml fills.

`load.py` reads files and overrides into them, and `recollect train --help` prints their docstrings. Those of the text are in
`recollect.data.settings`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from recollect.data.settings import STRICT, DataSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model.

    Attributes:
        size: a published shape, mta-300m to miras-1.3b; fields given below win over it.
        layers: a mixer, a pattern of layers ("moneta-h", "mta+moneta"), or a list with one item per layer.
        options: options of the mixers, set in every layer that has them, such as {rope_theta: 500000}.
        hidden_size: model dim.
        n_layers: number of layers.
        n_heads: heads.
        intermediate_size: hidden size of the SwiGLUs; null: about 8/3 of the model dim.
        mlp: false leaves the SwiGLUs out.
        tie_embeddings: input and output embedding are one matrix.
        start_from: folder of a saved model (a retrofitted one, too), or of a run, whose weights training starts from; size and shape
            are then its own.
        train_only: names of parameters, as globs (["*.mixer.kq_*"]), or [new] for what a retrofit has added; all others stay as they
            are. Null: all are trained.
    """

    __pydantic_config__ = STRICT

    size: str | None = None
    layers: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    hidden_size: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    intermediate_size: int | None = None
    mlp: bool = True
    tie_embeddings: bool = True
    start_from: str | None = None
    train_only: list[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """How the weights move.

    Attributes:
        name: adamw, or muon (matrices inside the layers by Muon, everything else by AdamW).
        lr: peak learning rate.
        muon_lr: peak learning rate of the matrices under muon; null: `lr`, scaled to AdamW's update size.
        schedule: constant, linear, cosine or wsd (warm-up, stable, decay).
        warmup: linear warm-up; below 1 a share of the steps, else a number of steps.
        end_lr: learning rate at the last step as a share of the peak.
        decay: share of the steps in which wsd decays.
        weight_decay: decoupled weight decay.
        decay_all: weight decay of every parameter, as in the Multi-Token Attention paper; false: of weight matrices only,
            not of norms, gates, biases, convolution kernels and embeddings.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        clip: largest gradient norm; 0: off.
        inner_warmup: steps over which the inner step size of Miras memories rises from 0 to its full size; 0: off.
    """

    __pydantic_config__ = STRICT

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float | None = None
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: float = 0.02
    end_lr: float = 0.0
    decay: float = 0.2
    weight_decay: float = 0.1
    decay_all: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    inner_warmup: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """On what it runs.

    Attributes:
        device: auto, cpu, cuda.
        threads: threads of each process on the CPU; null: torch's own choice.
        precision: fp32, or bf16 (fp32 weights and optimiser, bf16 products).
        strategy: auto (fsdp on several GPUs, ddp on several CPU processes, none alone), none, ddp or fsdp. Start several processes
            with torchrun.
        tensor_parallel: processes that share one layer's matrices (needs fsdp).
        sequence_parallel: processes that share one row's tokens, for rows that are too long for one (needs ddp).
        micro_batch: rows that one process handles at once; the rest of its share of the batch follows by gradient accumulation.
            Null: all at once.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
        compile: torch.compile each block.
    """

    __pydantic_config__ = STRICT

    device: str = "auto"
    threads: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    tensor_parallel: int = 1
    sequence_parallel: int = 1
    micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavingSettings:
    """Checkpoints.

    Attributes:
        every_minutes: time between two checkpoints.
        every_steps: steps between two checkpoints, besides; 0: none.
        keep_last: number of newest checkpoints kept.
        keep_best: number of checkpoints with the lowest validation loss kept besides; they are written at evaluations.
    """

    __pydantic_config__ = STRICT

    every_minutes: float = 10.0
    every_steps: int = 0
    keep_last: int = 2
    keep_best: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """What is written while it runs, besides `progress.jsonl`.

    Attributes:
        every_seconds: time between two lines.
        tensorboard: event files in the run's folder.
        wandb: also log to Weights & Biases (needs its package; obeys WANDB_MODE=offline).
        trackio: also log to trackio (needs its package).
        project: project name for both.
    """

    __pydantic_config__ = STRICT

    every_seconds: float = 5.0
    tensorboard: bool = True
    wandb: bool = False
    trackio: bool = False
    project: str = "recollect"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A whole training run.

    Attributes:
        out: folder for everything; an unfinished run in it is continued.
        seed: of weights, order of the data and dropout.
        steps: optimiser steps; null: as many as `tokens` gives.
        tokens: tokens to train on, instead of steps.
        batch_tokens: tokens of one optimiser step over all processes: rounded to whole rows.
        eval_every: steps between evaluations; 0: at the end only.
        eval_rows: rows of each validation source that are evaluated.
        model: which model.
        data: which text.
        optimiser: how the weights move.
        engine: on what it runs.
        saving: checkpoints.
        logging: what is written.
    """

    __pydantic_config__ = STRICT

    out: str = "runs/unnamed"
    seed: int = 0
    steps: int | None = None
    tokens: float | None = None
    batch_tokens: int = 8192
    eval_every: int = 100
    eval_rows: int = 256
    model: ModelSettings = ModelSettings()
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    optimiser: OptimiserSettings = OptimiserSettings()
    engine: EngineSettings = EngineSettings()
    saving: SavingSettings = SavingSettings()
    logging: LoggingSettings = LoggingSettings()
