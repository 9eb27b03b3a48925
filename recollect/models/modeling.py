"""One causal language model for every mixer, as Hugging Face expects it: forward, loss, generation, saving and loading.

Axis legend: B batch, T new tokens, P tokens already in the cache, D model dim, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from recollect.mixers import Mixer
from recollect.models.cache import CACHE, RecollectCache, cache_of
from recollect.models.configuration import RecollectConfig
from recollect.models.layers import Block, RMSNorm, SwiGLU, draw
from recollect.models.padding import read_attention_mask
from recollect.state import State

IGNORE = -100


class RecollectPreTrainedModel(PreTrainedModel):
    """What the two model classes share: how weights start, and what Hugging Face may do with them."""

    config: RecollectConfig
    config_class = RecollectConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (Hugging Face's own declaration)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be cut back, so assisted decoding is refused

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights for one module: mixers, norms and SwiGLUs know their own rule; the embedding's is D^(-1/2)."""
        if isinstance(module, Mixer | RMSNorm | SwiGLU):
            with keep_loaded(module) as incomplete:
                if incomplete:
                    module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            draw(module.weight, self.config.hidden_size**-0.5)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As Hugging Face does for its own models.

        In "custom code" it skips every module that owns no tensor directly, so it would never reach a mixer made of submodules.
        """
        super()._initialize_weights(module, False)


class Relay(Protocol):
    """Runs a block for one piece of every row, with the states of the pieces before it from elsewhere."""

    def __call__(self, block: Block, x: Tensor, mask: Tensor | None, document_ids: Tensor | None) -> Tensor: ...


class RecollectModel(RecollectPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: RecollectConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.relay: Relay | None = None  # training sets it where the tokens of a row are spread over processes
        self.post_init()

    def init_states(self, batch_size: int) -> tuple[State, ...]:
        """Every layer's state before the first token. `RecollectCache(model.init_states(B))` is a cache to start from."""
        return tuple(block.mixer.init_state(batch_size) for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Run the blocks; the arguments are those of `RecollectForCausalLM.forward`.

        Returns:
            last_hidden_state [B, T, D] after the final norm; the cache if asked; hidden_states, the embedding and the
            output of every block (the last one after the final norm), if asked.
        """
        x = self._embed(input_ids, inputs_embeds)
        given = one_cache(cache, past_key_values)
        cache = self._cache(given, x.shape[0])
        padding = read_attention_mask(attention_mask, x.shape[0], x.shape[1], cache.n_seen)
        if document_ids is not None and document_ids.shape != x.shape[:2]:
            raise ValueError(f"document_ids must be [batch, new tokens] = {list(x.shape[:2])}; got {list(document_ids.shape)}")

        states, hidden = [], [x]
        for block, state in zip(self._blocks(), cache.states, strict=True):
            if self.relay is not None:
                x = self.relay(block, x, padding.mask, document_ids)
            else:
                x, state = block(x, state, padding.mask, document_ids)
                states.append(state)
            hidden.append(x)
        hidden[-1] = x = self.norm(x)

        if use_cache is None:
            use_cache = given is not None or (self.config.use_cache and not self.training)
        if use_cache:
            cache.advance(states, x.shape[1], ends_in_padding=padding.ends_in_padding)
        keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=tuple(hidden) if keep_hidden else None, **kept)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The first residual stream [B, T, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give input_ids [batch, tokens] or inputs_embeds [batch, tokens, dim]; got {given}")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(f"the input must be [batch, tokens] with at least one token; got {list(x.shape[:-1])}")
        return x

    def _cache(self, given: Cache | None, batch_size: int) -> RecollectCache:
        """The caller's cache, checked, or a new one at the start of the sequence."""
        if given is None:
            return RecollectCache([None] * len(self.layers))
        if not isinstance(given, RecollectCache):
            raise ValueError(
                f"the cache must be a RecollectCache; got {type(given).__name__}. Leave it out to start a sequence"
            )
        if len(given.layers) != len(self.layers):
            raise ValueError(f"the cache has states of {len(given.layers)} layers; this model has {len(self.layers)}")
        if given.batch_size not in (-1, batch_size):
            raise ValueError(f"the cache has {given.batch_size} rows; the input has {batch_size}")
        if given.ends_in_padding:
            raise ValueError(
                "the cache ends in padding on the right, so it cannot be continued; pad the earlier tokens on the left"
            )
        return given


class RecollectForCausalLM(RecollectPreTrainedModel, GenerationMixin):
    """A language model: `RecollectModel` and an output projection.

    `generate` works as for any Hugging Face model (greedy, sampling, beams, several sequences, batches padded on the left).
    Assisted decoding, and caches other than `RecollectCache`, are refused.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (Hugging Face's own declaration)
    accepts_loss_kwargs = True  # forward takes num_items_in_batch, so a Trainer need not rescale accumulated losses

    def __init__(self, config: RecollectConfig) -> None:
        super().__init__(config)
        self.model = RecollectModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head and isinstance(module, nn.Linear):
            draw(module.weight, self.config.hidden_size**-0.5)

    def init_states(self, batch_size: int) -> tuple[State, ...]:
        """Every layer's state before the first token; see `RecollectModel.init_states`."""
        return self.model.init_states(batch_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token after every token.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds: [B, T, D] in their place.
            attention_mask: [B, P + T], 0 at padding, past tokens included. Padding stands at the left, or at the right if
                nothing follows.
            document_ids: int [B, T], equal for tokens of one contiguous document; tokens see their own document only.
            cache: the `RecollectCache` of an earlier call, which this call continues (and updates, unless use_cache=False).
            past_key_values: the same under the name that transformers gave it until 5.23.
            labels: int64 [B, T], usually the inputs: shifted in here, so that position t is scored on labels[:, t + 1]; -100 is
                ignored.
            use_cache: return the states. None: if a cache was given, or if the config says so and the model is not training.
            output_hidden_states: return the residual stream before and after each block.
            logits_to_keep: compute the logits of the last n positions only (0: of all), or of the positions given as int [n].
            num_items_in_batch: divide the summed loss by this instead of by the number of labels scored.
        Returns:
            loss (0-dim, fp32 or fp64) with labels; logits [B, T or n, C]; cache (`past_key_values` until transformers 5.23);
            hidden_states.
        Raises:
            ValueError: shapes that do not fit, padding between tokens, a cache that cannot be continued, an empty input.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels score every position: leave logits_to_keep out when labels are given")
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            cache=one_cache(cache, past_key_values),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        logits = self.lm_head(x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep])
        kept: dict[str, Any] = {CACHE: cache_of(outputs)}
        return CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, n_items=num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **kept,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Hand `generate` an empty `RecollectCache` where it would make a cache of keys and values.

        A private hook of Hugging Face's, hence the open signature; there is no public one.
        """
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} holds keys and values; "
                "Recollect models keep their own states: leave it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = RecollectCache([None] * self.config.num_hidden_layers)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under whichever of its two names it was given.

    Raises:
        ValueError: under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def next_token_loss(logits: Tensor, labels: Tensor, *, n_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy in nats of logits [B, T, C] against the labels [B, T] one position later; -100 is ignored.

    Computed in fp32 (fp64 for fp64). Divided by `n_items` if given, else by the number of labels scored; without any, the loss
    is 0.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must be [batch, tokens] = {list(logits.shape[:2])}; got {list(labels.shape)}")
    targets = labels[:, 1:].reshape(-1)
    scored = logits[:, :-1].reshape(-1, logits.shape[-1])
    exact = scored.to(torch.promote_types(scored.dtype, torch.float32))
    total = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="sum")
    return total / ((targets != IGNORE).sum().clamp(min=1) if n_items is None else n_items)


@contextmanager
def keep_loaded(module: nn.Module) -> Iterator[bool]:
    """Protect the tensors of `module` that a checkpoint has filled (Hugging Face marks them) while the others are initialised.

    Yields:
        whether any tensor, buffers included, is still to be initialised.
    """
    tensors = [*module.parameters(), *module.buffers()]
    loaded = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
    incomplete = len(loaded) < len(tensors)
    kept = [tensor.clone() for tensor in loaded] if incomplete else []
    yield incomplete
    for tensor, value in zip(loaded, kept, strict=False):
        tensor.copy_(value)


AutoConfig.register(RecollectConfig.model_type, RecollectConfig)
AutoModel.register(RecollectConfig, RecollectModel)
AutoModelForCausalLM.register(RecollectConfig, RecollectForCausalLM)
