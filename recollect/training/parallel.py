"""A model and its loss as one module, spread over the processes: DDP, FSDP2 with tensor parallelism, or as it is.

Axis legend: n rows, T time, m labelled positions, C vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from recollect.models import RecollectCache
from recollect.models.layers import Block, SwiGLU
from recollect.models.modeling import RecollectModel, RecollectPreTrainedModel
from recollect.training.loss import labelled
from recollect.training.sequence import Relay
from recollect.training.world import World

STRATEGIES = ("auto", "none", "ddp", "fsdp")
SLAB = 1 << 26  # logits computed at once: 256 MiB in fp32


class Scored(nn.Module):
    """The summed cross entropy of a causal LM: the one thing that training and evaluation ask of it.

    Args:
        model: the LM.
        precision: "fp32" (the weights' own dtype) or "bf16" (products in bf16, weights as they are).
    """

    def __init__(self, model: PreTrainedModel, *, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.low = precision == "bf16"

    def forward(
        self, inputs: Tensor, labels: Tensor, document_ids: Tensor | None = None, cache: RecollectCache | None = None
    ) -> Tensor:
        """inputs, labels int64 [n, T] -> sum over labelled positions of -log p(label) in nats, a scalar in fp32.

        `document_ids` [n, T] keep documents apart; `cache` is continued, and afterwards holds the states after the rows.
        """
        device = inputs.device.type
        with torch.autocast(device, torch.bfloat16) if self.low else contextlib.nullcontext():
            extra: dict[str, Any] = {} if document_ids is None else self._apart(document_ids)
            if cache is not None:
                extra["cache"] = cache
            hidden = self.model.base_model(input_ids=inputs, use_cache=cache is not None, **extra).last_hidden_state
            hidden, targets = labelled(hidden, labels)
            head = self.model.get_output_embeddings()
            size = max(1, SLAB // head.weight.shape[0])
            if len(targets) <= size or not torch.is_grad_enabled():
                return sum(
                    (_sum(head, h, t) for h, t in _slabs(hidden, targets, size)), hidden.new_zeros((), dtype=torch.float32)
                )
            parts = (checkpoint(_sum, head, h, t, use_reentrant=False) for h, t in _slabs(hidden, targets, size))
            return torch.stack(list(parts)).sum()

    def _apart(self, document_ids: Tensor) -> dict[str, Tensor]:
        """How the model is told of documents: ours by their ids, others of Hugging Face's by positions that begin anew."""
        if isinstance(self.model, RecollectPreTrainedModel):
            return {"document_ids": document_ids}
        steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return {"position_ids": steps - torch.where(begins, steps, 0).cummax(dim=1).values}


def distribute(
    model: PreTrainedModel,
    world: World,
    *,
    strategy: str = "auto",
    precision: str = "fp32",
    tensor_parallel: int = 1,
    sequence_parallel: int = 1,
    checkpoint_activations: bool = False,
    compile_blocks: bool = False,
) -> nn.Module:
    """Move a model to its device and spread it over the processes.

    Args:
        model: the same on every process, on the CPU. Its parameters become DTensors under FSDP.
        strategy: "none", "ddp", "fsdp"; "auto": none alone, ddp on several CPU processes, fsdp on several GPUs.
        tensor_parallel: neighbouring processes that share the matrices of the SwiGLUs and read the same rows; FSDP goes over the rest.
        sequence_parallel: neighbouring processes that each read a piece of the same rows (see `sequence`).
        checkpoint_activations: recompute blocks in the backward pass.
        compile_blocks: torch.compile each block.
    Returns:
        a module with the call of `Scored`.
    Raises:
        ValueError: a strategy that this number of processes or this model does not allow.
    """
    strategy = _choose(strategy, world, tensor_parallel, sequence_parallel)
    if sequence_parallel > 1:
        base = model.base_model
        if not isinstance(base, RecollectModel):
            raise ValueError("sequence_parallel is for models of this package: others hand no states on")
        base.relay = Relay(world.rank, piece=world.rank % sequence_parallel, n_pieces=sequence_parallel)
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    nn.Module.to(model, world.device)
    mesh = None
    if strategy == "fsdp":
        sizes = (world.size // tensor_parallel, tensor_parallel)
        mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("data", "tensor"))
        if tensor_parallel > 1:
            _share_matrices(blocks, mesh["tensor"])
    if compile_blocks:
        for block in blocks:
            block.compile()
    scored = Scored(model, precision=precision)
    if mesh is None:
        # A later piece of a row starts from a state that was handed on, so that what is learned of the first one is not used.
        return scored if strategy == "none" else DistributedDataParallel(scored, find_unused_parameters=sequence_parallel > 1)
    # FSDP casts what it gathers, so half as many bytes travel; gradients are summed in fp32.
    low = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    # A block also returns its state, some of it views; nobody changes those in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh["data"], mp_policy=low)
    fully_shard(scored, mesh=mesh["data"], mp_policy=low)
    return scored


def inner(module: nn.Module) -> PreTrainedModel:
    """The language model in what `distribute` returned."""
    scored = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(scored, Scored)
    return scored.model


@contextlib.contextmanager
def accumulating(module: nn.Module, more: bool) -> Iterator[None]:
    """Inside, gradients stay in their process if `more` micro-batches follow, and are averaged over the processes if not."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not more)
        yield
    elif isinstance(module, DistributedDataParallel) and more:
        with module.no_sync():
            yield
    else:
        yield


def _choose(strategy: str, world: World, tensor_parallel: int, sequence_parallel: int) -> str:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if tensor_parallel < 1 or world.size % tensor_parallel:
        raise ValueError(f"tensor_parallel={tensor_parallel} must divide the number of processes, {world.size}")
    if strategy == "auto":
        several = "fsdp" if world.device.type == "cuda" or tensor_parallel > 1 else "ddp"
        strategy = "none" if world.size == 1 else several
    if strategy == "none" and world.size > 1:
        raise ValueError(f"strategy 'none' would train {world.size} separate copies; use ddp or fsdp, or start one process")
    if strategy != "none" and world.size == 1:
        raise ValueError(f"strategy {strategy!r} needs several processes: start with torchrun --nproc-per-node N")
    if world.size % sequence_parallel or (sequence_parallel > 1 and strategy != "ddp"):
        raise ValueError(
            f"sequence_parallel={sequence_parallel} needs strategy ddp and a multiple of as many processes; got {strategy!r} and "
            f"{world.size}"
        )
    if tensor_parallel > 1 and strategy != "fsdp":
        raise ValueError(f"tensor_parallel={tensor_parallel} needs strategy fsdp; got {strategy!r}")
    return strategy


def _share_matrices(blocks: list[nn.Module], mesh: Any) -> None:
    """SwiGLUs column-wise then row-wise over the processes of the mesh: one sum per SwiGLU travels."""
    for block in blocks:
        if isinstance(block, Block) and isinstance(block.mlp, SwiGLU):
            plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block.mlp, mesh, plan)


def _slabs(hidden: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(size), targets.split(size), strict=True)


def _sum(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [m, D], targets [m] -> summed cross entropy in fp32 (fp64 for fp64)."""
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
