"""What a retrofit adds to a stock attention module: Multi-Token kernels inside it, a memory beside it.

The stock module keeps its class's forward: projections, norms of q and k, rotary embedding and cache are Hugging Face's own. Where it
calls an attention function, it finds `multi_token_interface`.

Axis legend: B batch, T new tokens, S keys, D model dim, H heads, Hkv key-value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from recollect.mixers import Mixer
from recollect.mixers.multi_token import MultiTokenAttention, MultiTokenConfig, init_kernel
from recollect.models.layers import RMSNorm
from recollect.models.retrofitting.cache import AddedLayer, added_layer
from recollect.models.retrofitting.seen import Seen, read_mask
from recollect.ops.multi_token import Mixing, Rows, multi_token_rows
from recollect.state import State

INTERFACE = "recollect_multi_token"
IMPLEMENTATIONS = ("sdpa", "eager")  # their masks can be read
_CACHES = ("cache", "past_key_values", "layer_past")  # since transformers 5.24; before; of GPT-NeoX
_OTHER_ATTENTION = ("softcap", "sliding_window", "s_aux", "position_bias", "head_mask")


class Kernels(nn.Module):
    """The parameters of Multi-Token Attention beside a model's own projections, identities at the start.

    Args:
        config: of the mixer; `norm` is "none" and the kernels start as the identity.
    """

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            shapes = {name: part.shape for name, part in MultiTokenAttention(config).named_parameters(recurse=False)}
        self.kq_pre, self.head_pre, self.kq_post, self.head_post = (
            nn.Parameter(torch.empty(shapes[name])) if name in shapes else None for name in Mixing._fields
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identities."""
        for kernel in (self.kq_pre, self.kq_post):
            if kernel is not None:
                init_kernel(kernel, "identity", self.config.pad_key)
        for matrix in (self.head_pre, self.head_post):
            if matrix is not None:
                matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype).expand_as(matrix))

    @property
    def mixing(self) -> Mixing:
        """The kernels and matrices as the op takes them."""
        return Mixing(self.kq_pre, self.head_pre, self.kq_post, self.head_post)


class AddedMemory(nn.Module):
    """gate * mixer(norm(x)) with a gate [D] of zeros at the start.

    Args:
        mixer: any recurrent mixer.
        dim: D.
        norm_eps: of an RMSNorm of its own, where the attention reads a stream that is not normalised; None: x is normalised.
    """

    def __init__(self, mixer: Mixer, dim: int, *, norm_eps: float | None) -> None:
        super().__init__()
        self.norm = None if norm_eps is None else RMSNorm(dim, eps=norm_eps)
        self.mixer = mixer
        self.gate = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Fresh weights and a closed gate."""
        if self.norm is not None:
            self.norm.reset_parameters()
        self.mixer.reset_parameters()
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, state: State | None, seen: Seen) -> tuple[Tensor, State]:
        """x [B, T, D], what the last piece left -> [B, T, D], what this piece leaves. A document's id is the index of its first key."""
        x = x if self.norm is None else self.norm(x)
        y, state = self.mixer(x, state, mask=seen.real, document_ids=seen.start)
        return self.gate * y, state


class Retrofitted:
    """Goes before a stock attention class: `class RetrofittedLlamaAttention(Retrofitted, LlamaAttention)`.

    Attributes:
        multi_token, memory: what is added, or None.
        model_config: the model's config; the stock forward reads its attention function from `config`.
    """

    multi_token: Kernels | None
    memory: AddedMemory | None
    model_config: PreTrainedConfig
    layer_idx: int

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The stock forward with what is added; arguments as there, by name.

        Raises:
            ValueError: a mask, a cache or an attention implementation that the added parts cannot follow.
        """
        check_implementation(self.model_config)
        cache = next((kwargs[name] for name in _CACHES if name in kwargs), None)
        layer = None if cache is None else added_layer(cache, self.layer_idx)
        own = {} if self.multi_token is None else {"carried": layer}
        out, weights = super().forward(  # type: ignore[misc]  # of the stock class, which stands behind this one
            hidden_states=hidden_states, attention_mask=attention_mask, **kwargs, **own
        )
        if self.memory is not None:
            batch_size, n_tokens = hidden_states.shape[:2]
            n_keys = n_tokens if layer is None else layer.get_seq_length()
            seen = read_mask(attention_mask, batch_size, n_tokens, n_keys)
            read, state = self.memory(hidden_states, None if layer is None else layer.memory, seen)
            out = out + read
            if layer is not None:
                layer.memory = state
        return out, weights


def check_implementation(config: PreTrainedConfig) -> None:
    """Raise ValueError unless the model's masks are of a kind that can be read."""
    implementation = config._attn_implementation
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation={implementation!r} gives masks that a retrofitted layer cannot read; "
            f"call model.set_attn_implementation with one of: {', '.join(IMPLEMENTATIONS)}"
        )


def multi_token_interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    carried: AddedLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Multi-Token Attention as a Hugging Face attention function.

    Args:
        module: the attention module, whose `multi_token` holds the kernels.
        query: [B, H, T, K] after rotation; key, value: [B, Hkv, S, K], the cached ones included.
        attention_mask: see `read_mask`.
        scaling: of the logits.
        dropout: of the final weights.
        carried: the layer's cache, whose rows are read and replaced; None: the sequence starts and ends here.
        kwargs: what the model passes besides; kinds of attention that would change the result are refused.
    Returns:
        [B, T, H, K], and no weights.
    Raises:
        ValueError: a feature of attention that Multi-Token Attention does not have, or a mask that it cannot follow.
    """
    refused = [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]
    refused += ["is_causal=False"] * (kwargs.get("is_causal") is False)
    refused += ["output_attentions"] * bool(kwargs.get("output_attentions"))
    if refused:
        raise ValueError(f"a layer retrofitted with Multi-Token Attention has no {', '.join(refused)}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    start = read_mask(attention_mask, q.shape[0], q.shape[1], k.shape[1]).start
    kernels = module.multi_token
    heads, rows = multi_token_rows(
        q,
        k,
        v,
        kernels.mixing,
        Rows() if carried is None else carried.rows,
        scale=scaling,
        start=start,
        pad_key=kernels.config.pad_key,
        dropout_p=dropout,
        backend=kernels.config.backend,
    )
    if carried is not None:
        carried.rows = rows
    return heads, None


AttentionInterface.register(INTERFACE, multi_token_interface)
