"""AdamW and which parameters it decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recollect.training.config import TrainingConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: the weight matrices of linear layers (decayed) and everything else (not).

    Norms, biases, gates, convolution kernels, head-mixing matrices and embeddings have a meaning at their initial value (an
    identity kernel, a unit gain) that decay would pull them away from. A matrix tied to an embedding counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.weight.ndim == 2} - embeddings
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


def make_optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused (one kernel per step instead of a dozen per parameter)."""
    groups = [group for group in parameter_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
