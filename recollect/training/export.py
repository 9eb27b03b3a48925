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


def save_model(model: PreTrainedModel, folder: Path, world: World | None = None, *, tokenizer: Path | None = None) -> None:
    """`save_pretrained` of the whole model, whole or not at all. All processes call it, the first one writes.

    Args:
        tokenizer: its file, which is copied into the folder as tokenizer.json, with a tokenizer_config.json that lies beside it.
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
            if tokenizer is not None:
                shutil.copyfile(tokenizer, temporary / "tokenizer.json")
                if (config := tokenizer.with_name("tokenizer_config.json")).is_file():
                    shutil.copyfile(config, temporary / config.name)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    wait(world)
