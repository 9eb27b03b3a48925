"""The families of stock models that can be retrofitted, and their classes with room for what is added.

A retrofitted Llama is a `RetrofittedLlamaForCausalLM` with a `RetrofittedLlamaConfig`, model type "recollect_llama": a checkpoint with
added parameters is never taken for a stock one, and the Auto classes load it once this file is imported.

Axis legend: D model dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from recollect.mixers import build
from recollect.models.modeling import keep_loaded
from recollect.models.retrofitting.attention import INTERFACE, AddedMemory, Kernels, Retrofitted
from recollect.models.retrofitting.options import kernel_config, kind_of, memory_config

PREFIX = "recollect_"


class Family(NamedTuple):
    """One family: its stock causal model and attention, the retrofitted classes, and where a layer keeps its attention.

    pre_norm: whether a norm stands before the attention (OLMo2 has it behind).
    """

    stock: type[PreTrainedModel]
    stock_attention: type[nn.Module]
    config: type[PreTrainedConfig]
    base: type[PreTrainedModel]
    causal: type[PreTrainedModel]
    attention: type[Retrofitted]
    attention_name: str
    pre_norm: bool


class RetrofittedModel:
    """Goes before a stock model class: builds the stock model, then what its config says is added."""

    config: Any
    _is_stateful = True  # what is added cannot forget its last tokens, so assisted decoding is refused

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the stock class stands behind this one
        attach(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Added parts know their own rule; the rest is Hugging Face's."""
        if not isinstance(module, Kernels | AddedMemory):
            super()._init_weights(module)  # type: ignore[misc]
            return
        with keep_loaded(module) as incomplete:
            if incomplete:
                module.reset_parameters()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As Hugging Face does for its own models: "custom code" would skip modules that own no tensor directly."""
        super()._initialize_weights(module, False)  # type: ignore[misc]


def attach(model: Any) -> None:
    """Add to a model, in place, what its config's `retrofit` says and its layers do not have yet.

    Raises:
        ValueError: a record that does not fit the model, or a layer with attention that the added parts cannot follow.
    """
    config, family = model.config, FAMILIES[model.config.model_type.removeprefix(PREFIX)]
    model.base_model.__class__ = family.base  # Hugging Face asks the inner model how its modules start
    for record in config.retrofit or []:
        kind = kind_of(record["mixer"])
        for layer in record["layers"]:
            attention = checked_attention(model, family, layer)
            if not isinstance(attention, Retrofitted):
                attention.__class__ = family.attention
                attention.multi_token = attention.memory = None
                attention.model_config = config
            like = next(attention.parameters())
            if kind == "kernels" and attention.multi_token is None:
                added: nn.Module = Kernels(kernel_config(record["mixer"], record["options"], config))
                attention.multi_token = added.to(device=like.device, dtype=model.dtype).train(attention.training)
                attention.config = copy.copy(config)
                attention.config._attn_implementation_internal = INTERFACE
            elif kind == "memory" and attention.memory is None:
                options = memory_config(record["mixer"], record["options"], config, layer)
                mixer = build(record["mixer"], **{name: getattr(options, name) for name in options.__dataclass_fields__})
                added = AddedMemory(mixer, config.hidden_size, norm_eps=None if family.pre_norm else config.rms_norm_eps)
                attention.memory = added.to(device=like.device, dtype=model.dtype).train(attention.training)


def checked_attention(model: Any, family: Family, layer: int) -> Any:
    """The attention module of a layer.

    Raises:
        ValueError: it is not the family's own, or sees a sliding window.
    """
    attention = getattr(model.base_model.layers[layer], family.attention_name)
    if type(attention) not in (family.stock_attention, family.attention):
        raise ValueError(
            f"layer {layer} has attention of class {type(attention).__name__}; a retrofit of {family.stock.__name__} needs "
            f"{family.stock_attention.__name__}"
        )
    found = _window(model.config, layer)
    if found is not None:
        raise ValueError(
            f"layer {layer} attends to a sliding window ({found}), which a retrofit does not support: choose layers of full attention; "
            "if no context is longer than the window, load the model with sliding_window=None"
        )
    return attention


def _window(config: PreTrainedConfig, layer: int) -> int | str | None:
    """The sliding window of a layer's attention, or the kind of its attention if it is not full; None: full attention."""
    about = config.to_dict()
    kinds = about.get("layer_types")
    if kinds is None or kinds[layer] == "sliding_attention":
        return about.get("sliding_window")
    return None if kinds[layer] == "full_attention" else str(kinds[layer])


def _family(
    stock: type, config: type, base: type, attention: type, *, name: str = "self_attn", pre_norm: bool = True
) -> Family:
    """The retrofitted classes of one family."""

    def subclass(parent: type, mixins: tuple[type, ...], **fields: Any) -> Any:
        title = f"Retrofitted{parent.__name__}"
        doc = f"{parent.__name__} with layers retrofitted by recollect."
        return type(title, (*mixins, parent), {"__module__": __name__, "__qualname__": title, "__doc__": doc, **fields})

    kind = config.model_type  # type: ignore[attr-defined]
    added = {"__annotations__": {"retrofit": Any}, "retrofit": None, "model_type": f"{PREFIX}{kind}"}
    own_config = subclass(config, (), **added)
    own_base, own_stock = (subclass(parent, (RetrofittedModel,), config_class=own_config) for parent in (base, stock))
    return Family(stock, attention, own_config, own_base, own_stock, subclass(attention, (Retrofitted,)), name, pre_norm)


FAMILIES = {
    "gpt_neox": _family(GPTNeoXForCausalLM, GPTNeoXConfig, GPTNeoXModel, GPTNeoXAttention, name="attention"),
    "llama": _family(LlamaForCausalLM, LlamaConfig, LlamaModel, LlamaAttention),
    "mistral": _family(MistralForCausalLM, MistralConfig, MistralModel, MistralAttention),
    "olmo2": _family(Olmo2ForCausalLM, Olmo2Config, Olmo2Model, Olmo2Attention, pre_norm=False),
    "qwen2": _family(Qwen2ForCausalLM, Qwen2Config, Qwen2Model, Qwen2Attention),
    "qwen3": _family(Qwen3ForCausalLM, Qwen3Config, Qwen3Model, Qwen3Attention),
}


def _classes() -> Iterator[type]:
    for family in FAMILIES.values():
        yield from (family.config, family.base, family.causal, family.attention)


def __getattr__(name: str) -> type:
    """The retrofitted classes by name, which pickle asks for."""
    for cls in _classes():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _kind, _entry in FAMILIES.items():
    AutoConfig.register(f"{PREFIX}{_kind}", _entry.config)
    AutoModel.register(_entry.config, _entry.base)
    AutoModelForCausalLM.register(_entry.config, _entry.causal)
