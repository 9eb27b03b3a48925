"""The trained model as Hugging Face saves it, from any number of processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recollect.training.checkpoint import model_tensors
from recollect.training.world import World, alone, wait


def save_model(model: PreTrainedModel, folder: Path, world: World | None = None, *, beside: Path | None = None) -> None:
    """`save_pretrained` of the whole model, whole or not at all. All processes call it, the first one writes.

    Args:
        beside: a file that is copied into the folder, such as the tokenizer's.
    """
    world = world or alone()
    whole: dict[str, Tensor] = {}
    for name, tensor in model_tensors(model).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all processes gather it
        if world.rank == 0:
            whole[name] = full.detach().cpu()
    if world.rank == 0:
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            model.save_pretrained(temporary, state_dict=whole)
            if beside is not None:
                shutil.copyfile(beside, temporary / beside.name)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    wait(world)
