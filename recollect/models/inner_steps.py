"""The inner step sizes of a model's memories, all at once."""

from __future__ import annotations

from torch import nn

from recollect.mixers.miras import Miras


def set_inner_steps(model: nn.Module, share: float) -> None:
    """Multiply the inner step size of every Miras memory by `share`, in [0, 1], until the next call.

    A warm-up of training runs it from 0 to 1: the maps into a memory are random at first, and what they write only disturbs.

    Raises:
        ValueError: share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is in [0, 1]; got {share}")
    for module in model.modules():
        if isinstance(module, Miras):
            module.step_share = share
