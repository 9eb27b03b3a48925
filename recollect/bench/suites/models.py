"""The language models of "train" and "decode": the setting's shape, and what stands in its layers.

Axis legend: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import recollect.mixers
from recollect.bench.contenders import ATTENTIONS
from recollect.bench.setting import Setting
from recollect.mixers import layer_options
from recollect.mixers.base import option_names

HYBRID = "mta_hybrid"
ABOUT = {HYBRID: "Multi-Token Attention where mta has its convolutions, in every fourth layer; plain attention in the others"}


def layers(name: str, n_layers: int) -> list[dict[str, Any]]:
    """What stands in each layer of a contender: one mixer with its depth-dependent options, or those of the hybrid."""
    if name != HYBRID:
        return layer_options(name, n_layers)
    return [layer if layer["kq"] else {"mixer": "attention"} for layer in layer_options("mta", n_layers)]


def about(name: str) -> str:
    """What it is, in a line."""
    return ABOUT[name] if name in ABOUT else recollect.mixers.entry(name).summary


def attends(name: str) -> bool:
    """Whether every layer is a form of attention."""
    return name == HYBRID or name in ATTENTIONS


def note(setting: Setting, name: str) -> str:
    """In how many layers Multi-Token Attention stands, and the chunk size if it was chosen."""
    said = ""
    if setting.layers and name in ("mta", HYBRID):
        n_convolved = sum(layer.get("kq", False) for layer in layers(name, setting.layers))
        others = "plain attention in the others" if name == HYBRID else "head mixing in all"
        said = f"convolutions in {n_convolved} of {setting.layers} layers, {others}"
    return "; ".join(filter(None, [said, f"chunks of {setting.chunk}" if chunk(setting, name) else ""]))


def chunk(setting: Setting, name: str) -> dict[str, int]:
    """The option of the chosen chunk size, for mixers that have one."""
    chunked = setting.chunk is not None and name != HYBRID and "chunk_size" in option_names(name)
    return {"chunk_size": setting.chunk} if chunked else {}  # type: ignore[dict-item]  # it is no None then


def build(setting: Setting, name: str) -> Any:
    """A RecollectForCausalLM of the setting's shape in fp32 on the setting's device, from a fixed seed."""
    from recollect.models import RecollectConfig, RecollectForCausalLM  # here: transformers, which other suites do without

    torch.manual_seed(0)
    config = RecollectConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.width,
        num_attention_heads=setting.heads,
        num_hidden_layers=setting.layers,
        intermediate_size=setting.intermediate,  # type: ignore[arg-type]  # None is the config's own rule
        layers=[{**layer, **chunk(setting, name)} for layer in layers(name, setting.layers)],
    )
    model: Any = RecollectForCausalLM(config)
    return model.to(setting.device)


def tokens(setting: Setting, length: int, *, seed: int = 0) -> Tensor:
    """Random tokens [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, setting.vocabulary - 1, (setting.batch, length), generator=generator).to(setting.device)
