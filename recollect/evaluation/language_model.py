"""Any causal language model as evaluations see it: how likely is a text, and what does the model write after one?

Axis legend: B batch, T time, m scored tokens, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from recollect.evaluation.probes import Carry, check_carried, generates_batches, plain_head
from recollect.evaluation.rolling import Row, blocks, packed, windows
from recollect.models import RecollectCache, RecollectForCausalLM
from recollect.models.cache import cache_of
from recollect.models.memory import growing_mixers
from recollect.tasks.base import IGNORE
from recollect.training.loss import labelled

BATCH_TOKENS = 8192
LOGITS_AT_ONCE = 1 << 26  # numbers

Scored: TypeAlias = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Log-probabilities of tokens in nats, and whether each was the likeliest one: both [n]."""


class TextCoder(Protocol):
    """What a language model needs of a tokenizer.

    Attributes:
        name: what identifies it.
        prefix: tokens that every text begins with.
        start: the token that separates documents: read before a text that has no prefix, and the end of a generated one.
    """

    @property
    def name(self) -> str: ...
    @property
    def prefix(self) -> list[int]: ...
    @property
    def start(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without prefix."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special ones vanish."""


class Likelihood(NamedTuple):
    """How likely a model finds a text after what it has read.

    log_prob: nats, summed over its tokens; greedy: the model would have written it itself; n_tokens: tokens; n_bytes: UTF-8 bytes.
    """

    log_prob: float
    greedy: bool
    n_tokens: int
    n_bytes: int


class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode.

    Attributes:
        model: a recollect model, or any causal LM of Hugging Face.
        coder: its tokenizer.
        max_length: tokens that the model may see at a time; None: any number.
        tokenizer_name: what identifies the tokenizer.
    """

    def __init__(
        self, model: PreTrainedModel, coder: TextCoder, *, max_length: int | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        """
        Args:
            model: on its device.
            coder: see `TextCoder`.
            max_length: None: any length for a recollect model of constant state, else the config's `max_position_embeddings`.
            batch_tokens: tokens that a batch of several texts may have, padding included.
        Raises:
            ValueError: max_length below 2 or beyond the model's table of positions, batch_tokens below 1.
        """
        if max_length is not None and max_length < 2:
            raise ValueError(f"the context is at least 2 tokens; got {max_length}")
        if batch_tokens < 1:
            raise ValueError(f"a batch has at least 1 token; got {batch_tokens}")
        self.model: Any = model.eval()
        self.coder = coder
        self.is_recollect = isinstance(model, RecollectForCausalLM)
        endless = self.is_recollect and not growing_mixers(model)  # type: ignore[arg-type]  # is_recollect says what it is
        own = None if endless else getattr(model.config, "max_position_embeddings", None)
        self.max_length = max_length if max_length is not None else own
        if max_length is not None and not self.is_recollect:
            check_positions(model, max_length)
        self.batch_tokens = batch_tokens
        self.tokenizer_name = coder.name
        self.device = next(model.parameters()).device
        self._is_carried = self.is_recollect

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without prefix."""
        return self.coder.encode(text)

    def n_tokens(self, text: str) -> int:
        """Tokens of a prompt, prefix included: the measure of tasks that ask for a length."""
        return len(self.coder.prefix) + len(self.encode(text))

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation after its context. White space at a context's end counts as the continuation's: tokenizers join
        it with what follows.

        Too long a pair loses the beginning of its context. A continuation that is longer than the model's context is read in
        windows, each of which sees half a context of what came before it.

        Args:
            pairs: (context, continuation); a continuation has at least one token.
        Raises:
            ValueError: an empty continuation, or logits that are not finite.
        """
        rows: list[Row] = []
        of: list[int] = []  # the pair that a row belongs to
        for index, (context, continuation) in enumerate(pairs):
            before, after = self._split(context, continuation)
            if not after:
                raise ValueError(f"the continuation {continuation!r} has no token to score")
            length = self.max_length
            if length is None or len(after) <= length:
                tokens = before + after
                rows.append(Row(tokens if length is None else tokens[-(length + 1) :], len(after)))
            else:
                rows += windows(before, [np.asarray(after)], length, length // 2)
            of += [index] * (len(rows) - len(of))
        scored: dict[int, Scored] = {}
        for chosen in self._batches([len(row.tokens) for row in rows], self._scored_at_once):
            scored |= zip(chosen, self._score([rows[i] for i in chosen]), strict=True)
        found: list[list[Scored]] = [[] for _ in pairs]
        for i, index in enumerate(of):
            found[index].append(scored[i])
        return [_summed(_joined(each), continuation) for each, (_, continuation) in zip(found, pairs, strict=True)]

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        """Of whole texts, every token scored once. A model with a limited context reads disjoint windows, as is usual.

        Raises:
            ValueError: an empty text, or logits that are not finite.
        """
        tokens = [self.encode(text) for text in texts]
        if not all(tokens):
            raise ValueError("an empty text has no likelihood")
        found = self.log_probs([np.asarray(each, np.int64) for each in tokens])
        return [_summed(each, text) for each, text in zip(found, texts, strict=True)]

    def log_probs(self, texts: Sequence[NDArray[Any]], *, piece: int = 1024, overlap: int = 0) -> list[Scored]:
        """Of several texts what `stream` gives of each: those of alike lengths are read together.

        Args:
            texts: tokens of each.
            piece, overlap: as in `stream`.
        Raises:
            ValueError: as `stream`.
        """
        found: list[list[Scored]] = [[] for _ in texts]
        for chosen in self._batches([len(self._lead) + len(text) for text in texts], self._scored_at_once):
            for i, scored in self._read([[texts[i]] for i in chosen], piece, overlap):
                found[chosen[i]].append(scored)
        return [_joined(each) for each in found]

    def stream(self, parts: Iterable[NDArray[Any]], *, piece: int = 1024, overlap: int = 0) -> Iterator[Scored]:
        """Log-probabilities of one text's tokens, however long, in order.

        Without a limit on the context the model's state is carried from piece to piece, so every token is predicted from all
        before it; memory is constant where the states are. With a limit the text is read in windows of `max_length` tokens, each of
        which sees `overlap` tokens of the one before; a batch of them is held at a time.

        Args:
            parts: tokens of the text in stretches of any lengths; after the prefix, or `start` where there is none.
            piece: tokens that one call of the model takes.
            overlap: tokens read again, unscored, in a window; below the context's length.
        Yields:
            log-probabilities in nats, and whether the token was the likeliest one: both [n] of the next n tokens.
        Raises:
            ValueError: an overlap as long as the context, or logits that are not finite.
        """
        for _, scored in self._read([parts], piece, overlap):
            yield scored

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, until: Sequence[str] = (), *, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model writes after each prompt: to the first of `until` (which is cut off), the end of its document, or
        max_new_tokens.

        Args:
            prompts: of different lengths; padded on the left. Too long a one loses its beginning.
            max_new_tokens: at least 1, and below the context's length.
            until: texts that end an answer.
            temperature: 0: always the likeliest token; else sampled, with `seed`.
            seed: of the sampling.
        Raises:
            ValueError: max_new_tokens out of range, or logits that are not finite.
        """
        if max_new_tokens < 1 or (self.max_length is not None and max_new_tokens >= self.max_length):
            raise ValueError(f"max_new_tokens is at least 1 and below the context of {self.max_length}; got {max_new_tokens}")
        room = None if self.max_length is None else self.max_length - max_new_tokens
        rows = []
        for prompt in prompts:
            text = self.encode(prompt)
            row = (self.coder.prefix or ([] if text else [self.coder.start])) + text
            rows.append(row if room is None else row[-room:])
        said = [""] * len(rows)
        options: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        )
        for chosen in self._batches([len(row) + max_new_tokens for row in rows], self.batch_tokens if self._is_batched else 1):
            longest = max(len(rows[i]) for i in chosen)
            ids = torch.full((len(chosen), longest), self.coder.start)
            mask = torch.zeros_like(ids)
            for b, i in enumerate(chosen):
                ids[b, longest - len(rows[i]) :] = torch.tensor(rows[i])
                mask[b, longest - len(rows[i]) :] = 1
            with torch.random.fork_rng(enabled=temperature > 0):
                if temperature:
                    torch.manual_seed(seed)
                out = self.model.generate(
                    ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=self.coder.start,
                    pad_token_id=self.coder.start,
                    logits_processor=LogitsProcessorList([_Finite()]),
                    stopping_criteria=StoppingCriteriaList([_Said(self.coder, longest, until)]),
                    **options,
                )
            for b, i in enumerate(chosen):
                said[i] = cut(self.coder.decode(_document(out[b, longest:].tolist(), self.coder.start)), until)
        return said

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context (prefix included; never none) and continuation, encoded as the one text that they are."""
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        before = self.encode(context) if context else []
        after = self.encode(context + continuation)[len(before) :]
        return (self.coder.prefix or ([] if before else [self.coder.start])) + before, after

    @cached_property
    def _head(self) -> nn.Module | None:
        """What makes logits of hidden states, where it can be applied to some of them at a time."""
        return self.model.lm_head if self.is_recollect else plain_head(self.model)

    @cached_property
    def _is_batched(self) -> bool:
        """Whether several prompts may be continued together."""
        return self.is_recollect or generates_batches(self.model, self.coder.start)

    @property
    def _lead(self) -> list[int]:
        """What is read before a text's first token."""
        return self.coder.prefix or [self.coder.start]

    @property
    def _scored_at_once(self) -> int:
        """Tokens of a batch that is scored: some models give the logits of all its positions together."""
        return self.batch_tokens if self._head is not None else min(self.batch_tokens, self._logits_at_once)

    @property
    def _logits_at_once(self) -> int:
        """Positions whose logits are in memory together."""
        return LOGITS_AT_ONCE // int(self.model.config.vocab_size)

    def _batches(self, lengths: Sequence[int], at_most: int) -> Iterator[list[int]]:
        """Indices in batches of alike lengths, the longest first: what does not fit fails at once."""
        return packed(sorted(range(len(lengths)), key=lambda i: -lengths[i]), lambda i: lengths[i], at_most)

    def _read(self, texts: Sequence[Iterable[NDArray[Any]]], piece: int, overlap: int) -> Iterator[tuple[int, Scored]]:
        """(which text, its next tokens), of texts that are given in parts and read together."""
        if self.max_length is None:
            yield from self._carried(texts, piece)
            return
        if not 0 <= overlap < self.max_length:
            raise ValueError(f"overlap is 0 to {self.max_length - 1}, less than the context; got {overlap}")
        length = self.max_length
        rows = ((i, row) for i, parts in enumerate(texts) for row in windows(self._lead, parts, length, overlap))
        for batch in packed(rows, lambda each: len(each[1].tokens), self._scored_at_once):
            yield from zip((i for i, _ in batch), self._score([row for _, row in batch]), strict=True)

    def _carried(self, texts: Sequence[Iterable[NDArray[Any]]], piece: int) -> Iterator[tuple[int, Scored]]:
        """All texts in step. One that has ended goes on with padding: its state is spoilt when no more is asked of it."""
        carry = self._start()
        before = [self._lead] * len(texts)
        for together in zip_longest(*(blocks(parts, piece) for parts in texts), fillvalue=[]):
            rows = [Row(held + block, len(block)) for held, block in zip(before, together, strict=True)]
            yield from enumerate(self._score(rows, carry))
            before = [row.tokens[-1:] for row in rows]

    def _start(self) -> Carry:
        """The state before a text."""
        if not self._is_carried:
            check_carried(self.model)
            self._is_carried = True
        return Carry(RecollectCache([None] * self.model.config.num_hidden_layers) if self.is_recollect else None)

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], carry: Carry | None = None) -> list[Scored]:
        """Of the scored tokens of each row. The last token of a row is not read: it is only predicted."""
        longest = max(len(row.tokens) for row in rows) - 1
        inputs = torch.full((len(rows), longest), self.coder.start)
        labels = torch.full((len(rows), longest), IGNORE)
        for b, (tokens, n) in enumerate(rows):
            end = len(tokens) - 1
            inputs[b, :end] = torch.tensor(tokens[:-1])  # padding on the right: nothing before it sees it
            labels[b, end - n : end] = torch.tensor(tokens[end + 1 - n :])
        values, greedy = self._gather(inputs, labels, carry)
        cuts = np.cumsum([row.n_scored for row in rows])[:-1]
        return list(zip(np.split(values, cuts), np.split(greedy, cuts), strict=True))

    def _gather(self, inputs: Tensor, labels: Tensor, carry: Carry | None) -> Scored:
        """Both [m], in row-major order of the labelled positions."""
        head = self._head
        ask = self.model if head is None else self.model.base_model
        out = ask(input_ids=inputs.to(self.device), **({"use_cache": False} if carry is None else carry.options))
        if carry is not None:
            carry.cache = cache_of(out)
        hidden, targets = labelled(out.logits if head is None else out.last_hidden_state, labels)
        if head is None:
            return _compare(hidden, targets)
        some = zip(hidden.split(self._logits_at_once), targets.split(self._logits_at_once), strict=True)
        return _joined([_compare(head(hidden), targets) for hidden, targets in some])


def check_positions(model: PreTrainedModel, n_tokens: int) -> None:
    """Refuse more tokens than a model of transformers has learned positions for (GPT-2, OPT): it would look beyond its table.

    Raises:
        ValueError: see above.
    """
    own, n_symbols = (getattr(model.config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)} - {n_symbols}
    learned = own is not None and bool(sizes & {own, own + 1, own + 2})  # OPT has two more
    if learned and own is not None and n_tokens > own:
        raise ValueError(f"{type(model).__name__} has learned positions for {own} tokens and cannot read {n_tokens} at a time")


def _joined(scored: Sequence[Scored]) -> Scored:
    values, greedy = ([each[i] for each in scored] for i in range(2))
    return np.concatenate([np.empty(0), *values]), np.concatenate([np.empty(0, np.bool_), *greedy])


def _summed(scored: Scored, text: str) -> Likelihood:
    values, greedy = scored
    return Likelihood(float(values.sum()), bool(greedy.all()), len(values), len(text.encode()))


def _compare(logits: Tensor, targets: Tensor) -> Scored:
    """Log-probabilities of targets [m] under logits [m, C], and whether each was the likeliest."""
    values = target_log_probs(logits, targets)
    return values.double().cpu().numpy(), (logits.argmax(dim=1) == targets).cpu().numpy()


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [m] in nats of targets [m] under logits [m, C], in fp32 or finer.

    Raises:
        ValueError: logits that are not finite.
    """
    check_finite(torch.isfinite(logits))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def check_finite(are: Tensor) -> None:
    """Refuse to score what is no number: `are` says of each logit whether it is one.

    Raises:
        ValueError: some are not.
    """
    if not are.all():
        raise ValueError("the model's logits are not finite: it has diverged, or its precision is too low for it")


class _Finite(LogitsProcessor):
    """Refuses to choose among numbers that are none."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_finite(~scores.isnan())  # -inf is what other processors forbid
        return scores


class _Said(StoppingCriteria):
    """Rows that have written one of `until`."""

    def __init__(self, coder: TextCoder, n_prompt: int, until: Sequence[str]) -> None:
        self.coder, self.n_prompt, self.until = coder, n_prompt, [text for text in until if text]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        if self.until:
            for b, row in enumerate(input_ids[:, self.n_prompt :].tolist()):
                said = self.coder.decode(row)
                done[b] = any(text in said for text in self.until)
        return done.to(input_ids.device)


def _document(ids: list[int], start: int) -> list[int]:
    """Tokens up to the end of the document."""
    return ids[: ids.index(start)] if start in ids else ids


def cut(said: str, until: Sequence[str]) -> str:
    """A text up to the first of `until`."""
    ends = [said.index(text) for text in until if text and text in said]
    return said[: min(ends)] if ends else said
