"""AdamW and Muon, and which parameters they decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recollect.training.config import TrainingConfig

# What mixers call the layers whose output opens, forgets or sets a step.
GATES = frozenset({"gate", "alpha", "beta", "gamma", "eta", "own", "rule_gates", "dt"})


class Optimisers:
    """One or several torch optimisers that share a schedule; each group's `scale` multiplies its learning rate."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        """Whatever is trained."""
        return [p for part in self.parts for group in part.param_groups for p in group["params"]]

    def states(self) -> dict[Tensor, Mapping[str, Tensor]]:
        """Moments and step counts of every parameter that has any."""
        return {p: state for part in self.parts for p, state in part.state.items()}

    def restore(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Put in states; those of other devices are moved (a count of steps stays where the optimiser wants it)."""
        for part in self.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    if states.get(p):
                        part.state[p] = {
                            key: t.to(p.device) if t.ndim or group.get("fused") else t for key, t in states[p].items()
                        }


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_all: bool = False) -> list[dict[str, Any]]:
    """Two AdamW groups: the weight matrices of linear layers (decayed) and everything else (not, unless `decay_all`).

    Norms, biases, gates, convolution kernels, head-mixing matrices and embeddings have a meaning at their initial value (an
    identity kernel, a unit gain) that decay would pull them away from. A matrix tied to an embedding counts as an embedding.
    """
    matrices = _matrices(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {
            "params": [p for p in parameters if id(p) not in matrices],
            "weight_decay": weight_decay if decay_all else 0.0,
        },
    ]


def make_optimisers(model: nn.Module, config: TrainingConfig) -> Optimisers:
    """AdamW over `parameter_groups`, fused (one kernel per step instead of a dozen per parameter); or Muon for the matrices.

    Muon takes what `parameter_groups` decays, with momentum 0.95, Nesterov and five Newton-Schulz steps; its update is scaled to the
    root mean square of AdamW's, so that one learning rate serves both. Matrices that FSDP or tensor parallelism has cut stay cut: torch
    divides the products of Newton-Schulz among the processes, which gather a factor before each.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982.
    """
    matrices, others = parameter_groups(model, config.weight_decay, decay_all=config.decay_all)
    adamw: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.optimiser == "adamw" or not matrices["params"]:
        groups = [group for group in (matrices, others) if group["params"]]
        return Optimisers([torch.optim.AdamW(groups, **adamw)])
    scale = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    muon = torch.optim.Muon([{**matrices, "scale": scale}], lr=config.lr, adjust_lr_fn="match_rms_adamw")
    return Optimisers([muon, *([torch.optim.AdamW([others], **adamw)] if others["params"] else [])])


def _matrices(model: nn.Module) -> set[int]:
    """The weights of linear layers that are no embedding's and make no gates."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = set()
    for name, module in model.named_modules():
        _, is_mixer, inside = name.rpartition("mixer.")
        makes_gates = is_mixer and not GATES.isdisjoint(inside.split("."))
        if isinstance(module, nn.Linear) and module.weight.ndim == 2 and not makes_gates:
            found.add(id(module.weight))
    return found - embeddings
