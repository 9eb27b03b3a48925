"""Any causal language model as evaluations see it: how likely is a text, and what does the model write after one?

Axis legend: B batch, T time, m scored tokens, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from recollect.models import RecollectCache, RecollectForCausalLM
from recollect.models.memory import growing_mixers
from recollect.tasks.base import IGNORE
from recollect.training.loss import labelled_logits

BATCH_TOKENS = 8192
LOGITS_AT_ONCE = 1 << 26  # numbers of one batch's logits


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
            ValueError: max_length below 2, batch_tokens below 1.
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
        self.batch_tokens = batch_tokens
        self.tokenizer_name = coder.name
        self.device = next(model.parameters()).device

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without prefix."""
        return self.coder.encode(text)

    def n_tokens(self, text: str) -> int:
        """Tokens of a prompt, prefix included: the measure of tasks that ask for a length."""
        return len(self.coder.prefix) + len(self.encode(text))

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation after its context. White space at a context's end counts as the continuation's: tokenizers join
        it with what follows.

        Too long a pair loses the beginning of its context.

        Args:
            pairs: (context, continuation); a continuation has at least one token.
        Raises:
            ValueError: an empty continuation, one longer than the model's context, or logits that are not finite.
        """
        rows: list[list[int]] = []
        scored: list[int] = []
        for context, continuation in pairs:
            before, after = self._split(context, continuation)
            if not after:
                raise ValueError(f"the continuation {continuation!r} has no token to score")
            if self.max_length is not None and len(after) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(after)} tokens; the model's context is {self.max_length}: score it in a rolling way"
                )
            row = before + after
            rows.append(row if self.max_length is None else row[-(self.max_length + 1) :])
            scored.append(len(after))
        results: list[Likelihood | None] = [None] * len(rows)
        for chosen in self._batches([len(row) for row in rows]):
            for index, (values, greedy) in zip(
                chosen, self._score([rows[i] for i in chosen], [scored[i] for i in chosen]), strict=True
            ):
                text = len(pairs[index][1].encode())
                results[index] = Likelihood(float(values.sum()), bool(greedy.all()), len(values), text)
        return [result for result in results if result is not None]

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        """Of whole texts, every token scored once. A model with a limited context reads disjoint windows, as is usual.

        Raises:
            ValueError: an empty text, or logits that are not finite.
        """
        results = []
        for text in texts:
            total, n_tokens, is_greedy = 0.0, 0, True
            for values, greedy in self.stream([np.asarray(self.encode(text), np.int64)]):
                total += float(values.sum())
                n_tokens += len(values)
                is_greedy = is_greedy and bool(greedy.all())
            if not n_tokens:
                raise ValueError("an empty text has no likelihood")
            results.append(Likelihood(total, is_greedy, n_tokens, len(text.encode())))
        return results

    @torch.no_grad()
    def stream(
        self, parts: Iterable[NDArray[Any]], *, piece: int = 1024, overlap: int = 0
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """Log-probabilities of one text's tokens, however long, in order.

        Without a limit on the context the model's state is carried from piece to piece, so every token is predicted from all
        before it; memory is constant where the states are. With a limit the text is read in windows of `max_length` tokens, each of
        which sees `overlap` tokens of the one before.

        Args:
            parts: tokens of the text in stretches of any lengths; after the prefix, or `start` where there is none.
            piece: tokens that one call of the model takes.
            overlap: tokens read again, unscored, in a window; below the context's length.
        Yields:
            log-probabilities in nats, and whether the token was the likeliest one: both [n] of the next n tokens.
        Raises:
            ValueError: an overlap as long as the context, or logits that are not finite.
        """
        if self.max_length is not None and not 0 <= overlap < self.max_length:
            raise ValueError(f"overlap is 0 to {self.max_length - 1}, less than the context; got {overlap}")
        lead = self.coder.prefix or [self.coder.start]
        if self.max_length is None:
            yield from self._carried(lead, parts, piece)
        else:
            yield from self._windows(lead, parts, self.max_length, overlap)

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
        for chosen in self._batches([len(row) + max_new_tokens for row in rows]):
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

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in batches of alike lengths, the longest first: what does not fit fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batch: list[int] = []
        for index in order:
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, rows: list[list[int]], scored: list[int]) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """Log-probability and greediness of the last `scored` tokens of each row, which are at least one fewer than the row."""
        longest = max(len(row) for row in rows)
        inputs = torch.full((len(rows), longest - 1), self.coder.start)
        labels = torch.full((len(rows), longest - 1), IGNORE)
        for b, (row, n) in enumerate(zip(rows, scored, strict=True)):
            inputs[b, : len(row) - 1] = torch.tensor(row[:-1])  # padding on the right: nothing before it sees it
            labels[b, len(row) - 1 - n : len(row) - 1] = torch.tensor(row[-n:])
        values, greedy = self._gather(inputs, labels)
        cuts = np.cumsum(scored)[:-1]
        return list(zip(np.split(values, cuts), np.split(greedy, cuts), strict=True))

    def _gather(self, inputs: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Both [m], in row-major order of the labelled positions."""
        if self.is_recollect:
            return _compare(*labelled_logits(self.model, inputs, labels))
        asked = labels != IGNORE
        values, greedy = [], []
        rows = max(1, LOGITS_AT_ONCE // max(1, inputs.shape[1] * self.model.config.vocab_size))
        for some, wanted, where in zip(inputs.split(rows), labels.split(rows), asked.split(rows), strict=True):
            logits = self.model(input_ids=some.to(self.device), use_cache=False).logits
            v, g = _compare(logits[where.to(logits.device)], wanted[where].to(logits.device))
            values.append(v)
            greedy.append(g)
        return np.concatenate(values), np.concatenate(greedy)

    def _carried(
        self, lead: list[int], parts: Iterable[NDArray[Any]], piece: int
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        cache: Any = RecollectCache([None] * self.model.config.num_hidden_layers) if self.is_recollect else None
        last: Tensor | None = None  # logits [1, C] after everything read so far
        pending = list(lead)
        n_lead = len(lead)
        for block in _blocks(parts, piece):
            tokens = np.concatenate([np.asarray(pending, np.int64), block])
            pending = []
            out = self.model(input_ids=torch.from_numpy(tokens)[None].to(self.device), past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                raise ValueError(
                    f"the state of {type(self.model).__name__} cannot be carried on; give --context N to read windows of N tokens"
                )
            logits = out.logits[0, n_lead - 1 : -1] if last is None else torch.cat([last, out.logits[0, :-1]])
            last = out.logits[0, -1:].clone()
            yield _compare(logits, torch.from_numpy(block).to(logits.device))

    def _windows(
        self, lead: list[int], parts: Iterable[NDArray[Any]], length: int, overlap: int
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        # As in lm-evaluation-harness: a window's first target is predicted from the one token before it, which was the last target of
        # the window before (`overlap` adds more than that); the last window, if it is short, is filled up with what came before.
        context = list(lead)
        for block in _blocks(parts, length - overlap):
            room = length + 1 - len(block)
            row = context[-(overlap + 1 if len(block) == length - overlap else room) :] + block.tolist()
            yield self._score([row], [len(block)])[0]
            context = (context + block.tolist())[-length:]


def _blocks(parts: Iterable[NDArray[Any]], size: int) -> Iterator[NDArray[np.int64]]:
    """Tokens in blocks of `size`, the last one shorter."""
    held = np.empty(0, np.int64)
    for part in parts:
        held = np.concatenate([held, np.asarray(part, np.int64)])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


def _compare(logits: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probabilities of targets [m] under logits [m, C], and whether each was the likeliest."""
    _check_finite(torch.isfinite(logits))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    values = chosen - logits.logsumexp(dim=1)
    return values.double().cpu().numpy(), (logits.argmax(dim=1) == targets).cpu().numpy()


def _check_finite(are: Tensor) -> None:
    if not are.all():
        raise ValueError("the model's logits are not finite: it has diverged, or its precision is too low for it")


class _Finite(LogitsProcessor):
    """Refuses to choose among numbers that are none."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _check_finite(~scores.isnan())  # -inf is what other processors forbid
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
