"""Turn a trained Hugging Face model into one with Multi-Token Attention or memories, without changing what it computes yet.

Axis legend: D model dim, L layers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from recollect.models.retrofitting.attention import AddedMemory, Kernels, check_implementation
from recollect.models.retrofitting.families import FAMILIES, PREFIX, Family, attach, checked_attention
from recollect.models.retrofitting.options import chosen_layers, kind_of, make_record


def retrofit(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    *,
    mixer: str = "mta",
    layers: str | Sequence[int] = "every-4th",
    **options: Any,
) -> PreTrainedModel:
    """Add Multi-Token Attention or a memory to chosen layers of a trained causal language model.

    The model's outputs stay what they were (up to rounding) until the new parameters are trained: kernels and head mixing start as
    identities, a memory's output gate at zero. No parameter is removed, renamed or changed. Generation with a cache, beams and left
    padding, `save_pretrained` and the Auto classes work as before.

    Args:
        model_or_path: a causal model of a family in `FAMILIES`, changed in place (its class too, as `fully_shard` does it), or the
            folder or hub name of one. A retrofitted model can be retrofitted again with the other kind, or in other layers.
        mixer: "mta" or a relative of it ("mta_v1", "talking_heads", ...; without norm and gate, which would change the outputs), put
            into the attention; or a recurrent mixer ("yaad", "titans", ...) beside it: attn(x) + gate * mixer(x), where x is the
            layer's normalised input (OLMo2 has no such norm: the memory gets one, and its output passes the norm behind attention).
        layers: "all", "every-4th" (0-based layers 2, 6, 10, ... as in the paper; any number), "2,6" or [2, 6].
        options: of the kernels, `options.KERNEL_OPTIONS`; of a memory, the mixer's own, as in `recollect.build`.
    Returns:
        the model; `new_parameters` names what was added.
    Raises:
        ValueError: an unsupported family, layer (sliding windows), mixer or option; nothing has been changed then.
    Source: Golovneva et al. 2025, arXiv 2504.00927, Appendix I.
    """
    kind_of(mixer)
    if not isinstance(model_or_path, nn.Module):
        model_or_path = AutoModelForCausalLM.from_pretrained(model_or_path)
    model = model_or_path
    family = family_of(model)
    record = make_record(mixer, chosen_layers(layers, model.config.num_hidden_layers), options, model.config)
    present = list(model.config.retrofit or []) if isinstance(model, family.causal) else []
    check_implementation(model.config)
    _check_free(record, present)
    for layer in record["layers"]:
        checked_attention(model, family, layer)

    shared, config = model.config, copy.deepcopy(model.config)
    config.__class__ = family.config
    config.retrofit = [*present, record]
    for module in model.modules():
        for name in ("config", "model_config"):
            if module.__dict__.get(name) is shared:
                setattr(module, name, config)
    model.__class__ = family.causal
    attach(model)
    return model


def new_parameters(model: nn.Module) -> list[str]:
    """Names, as in `named_parameters`, of the parameters that `retrofit` has added.

    To train them alone: `for name, p in model.named_parameters(): p.requires_grad_(name in added)` with `added` the set of them.

    Raises:
        ValueError: the model is not retrofitted.
    """
    names = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Kernels | AddedMemory)
        for name, _ in module.named_parameters()
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} is not retrofitted: it has no new parameters")
    return names


def load_retrofitted(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a retrofitted checkpoint, and refuse one that does not hold exactly the model's parameters.

    `AutoModelForCausalLM.from_pretrained(path)` gives the same model, but starts missing parameters afresh with no more than a warning.

    Args:
        path: a folder written by `save_pretrained`, or a hub name.
        dtype: of the weights; None: as saved.
    Raises:
        ValueError: the checkpoint is of a model that is not retrofitted, or parameters are missing, left over or of other shapes.
    """
    config = AutoConfig.from_pretrained(path)
    if not config.model_type.startswith(PREFIX) or not config.retrofit:
        raise ValueError(
            f"{path} holds a {config.model_type!r} model that is not retrofitted; load it with AutoModelForCausalLM"
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto" if dtype is None else dtype)
    model, found = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            raise ValueError(
                f"{path} is not a whole retrofitted checkpoint: {what.replace('_', ' ')}: {sorted(found[what])[:8]}"
            )
    return model


def family_of(model: nn.Module) -> Family:
    """The family of a causal model, stock or retrofitted.

    Raises:
        ValueError: another class.
    """
    for family in FAMILIES.values():
        if type(model) in (family.stock, family.causal):
            return family
    known = ", ".join(family.stock.__name__ for family in FAMILIES.values())
    raise ValueError(f"cannot retrofit a {type(model).__name__}; supported: {known}")


def _check_free(record: dict[str, Any], present: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if a chosen layer already has a part of this kind."""
    kind = kind_of(record["mixer"])
    taken = {layer: old["mixer"] for old in present if kind_of(old["mixer"]) == kind for layer in old["layers"]}
    for layer in record["layers"]:
        if layer in taken:
            raise ValueError(f"layer {layer} is already retrofitted with {taken[layer]!r}; choose other layers")
