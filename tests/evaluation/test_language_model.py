"""A language model as evaluations see it, against plain loops over one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from recollect.data.tokenizer import ByteTokenizer, train_tokenizer
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.loading import HuggingFaceCoder, OwnCoder, load_language_model
from recollect.models import RecollectConfig, RecollectForCausalLM

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 4


def own(*layers: str, context: int | None = None, batch_tokens: int = 8192, **options: Any) -> LanguageModel:
    """A tiny byte-level model in fp64."""
    config = RecollectConfig(hidden_size=16, num_attention_heads=2, layers=list(layers), mlp=False, **options)
    model = RecollectForCausalLM(config).double()
    return LanguageModel(model, OwnCoder(ByteTokenizer()), max_length=context, batch_tokens=batch_tokens)


def llama(tmp_path: Path, *, context: int = 64) -> str:
    """The folder of a tiny Llama with a tokenizer that puts nothing before a text."""
    (tmp_path / "text.txt").write_text(TEXT)
    file = train_tokenizer(tmp_path / "text.txt", vocab_size=270, out=tmp_path / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|document|>")
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def log_probs(lm: LanguageModel, ids: list[int]) -> Tensor:
    """Log-probabilities [T - 1] of the tokens of one sequence after its first, from the model's plain logits."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


PAIRS = [("It was a", " dark"), ("", "It was"), ("the rain fell ", "in torrents"), ("night;", " x")]


@pytest.mark.parametrize("layers", [("attention", "mta"), ("yaad", "sliding_window"), ("gated_delta_net",)])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_log_likelihoods_equal_those_of_one_text_at_a_time(layers: tuple[str, ...], batch_tokens: int) -> None:
    """Prevents padding, sorting into batches or an off-by-one from changing what is scored."""
    lm = own(*layers, batch_tokens=batch_tokens)
    for (context, continuation), found in zip(PAIRS, lm.log_likelihoods(PAIRS), strict=True):
        ids = [256, *(context + continuation).encode()]
        n = len(continuation.encode()) + (len(context) - len(context.rstrip()))
        expected = log_probs(lm, ids)[-n:]
        assert found.log_prob == pytest.approx(float(expected.sum()), rel=1e-10)
        assert found.n_tokens == n
        assert found.n_bytes == len(continuation.encode())


def test_greedy_means_that_the_model_would_have_written_it() -> None:
    """Prevents a greedy flag of another row, or one that looks at the first token only."""
    lm = own("attention")
    said = lm.generate(["It was"], 6)[0]
    ids = list(b"It was")
    wrong = said[:-1] + ("a" if said[-1:] != "a" else "b")
    if said.encode().decode("utf-8", "ignore") == said and "\ufffd" not in said:
        right, other = lm.log_likelihoods([("It was", said), ("It was", wrong)])
        assert right.greedy
        assert not other.greedy
    with torch.no_grad():
        best = lm.model(input_ids=torch.tensor([[256, *ids]])).logits[0, -1].argmax()
    probe = chr(int(best)) if int(best) < 128 else None
    if probe is not None and not probe.isspace():
        assert lm.log_likelihoods([("It was", probe)])[0].greedy


@pytest.mark.parametrize("layers", [("attention",), ("yaad", "sliding_window"), ("mta", "mamba2")])
@pytest.mark.parametrize("piece", [1, 7, 1024])
def test_a_carried_state_gives_the_likelihood_of_the_whole_text(layers: tuple[str, ...], piece: int) -> None:
    """Prevents tokens at the seams of pieces from being lost, scored twice or predicted from too little."""
    lm = own(*layers)
    lm.max_length = None
    ids = np.frombuffer(TEXT.encode()[:90], np.uint8)
    parts = [ids[:1], ids[1:40], ids[40:40], ids[40:]]
    found = np.concatenate([values for values, _ in lm.stream(parts, piece=piece)])
    np.testing.assert_allclose(found, log_probs(lm, [256, *ids.tolist()]).numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("overlap", [0, 5, 31])
def test_windows_are_those_of_a_plain_loop(overlap: int) -> None:
    """Prevents a limited context from seeing more than its length, less than its overlap, or a token twice."""
    lm = own("attention", context=32)
    ids = list(TEXT.encode()[:100])
    found = np.concatenate([values for values, _ in lm.stream([np.array(ids)], overlap=overlap)])
    row, expected, at = [256, *ids], [], 1
    while at < len(row):
        size = min(32 - overlap, len(row) - at)
        begin = max(0, at - overlap - 1 if size == 32 - overlap else at + size - 1 - 32)
        expected += log_probs(lm, row[begin : at + size])[-size:].tolist()
        at += size
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_rolling_sums_the_stream() -> None:
    """Prevents a rolling likelihood of other tokens, or bits per byte of another length."""
    lm = own("gated_delta_net")
    (found,) = lm.rolling([TEXT])
    expected = float(log_probs(lm, [256, *TEXT.encode()]).sum())
    assert found.log_prob == pytest.approx(expected, rel=1e-9)
    assert (found.n_tokens, found.n_bytes) == (len(TEXT), len(TEXT))


@pytest.mark.parametrize("layers", [("attention", "mta"), ("yaad",), ("mamba2", "sliding_window")])
def test_generation_in_a_batch_is_that_of_each_prompt(layers: tuple[str, ...]) -> None:
    """Prevents left padding, or rows that have ended, from changing what is written."""
    lm = own(*layers)
    prompts = ["It", "It was a dark and stormy", "the rain", ""]
    assert lm.generate(prompts, 12) == [lm.generate([prompt], 12)[0] for prompt in prompts]


def test_generation_ends_where_it_is_told() -> None:
    """Prevents an answer from containing what ends it, or from going on after its document's end."""
    lm = own("attention")
    said = lm.generate(["It was a dark"], 20)[0]
    stop = said[5:7]
    assert lm.generate(["It was a dark"], 20, [stop])[0] == said[: said.index(stop)]
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()  # tied: every logit is 0, and the first token of all wins
    assert lm.generate(["It"], 3)[0] == "\x00" * 3


def test_a_hugging_face_model_is_scored_alike(tmp_path: Path) -> None:
    """Prevents models and tokenizers that are not ours from being scored by other rules."""
    lm = load_language_model(llama(tmp_path))
    lm.model.double()
    assert lm.max_length == 64
    assert lm.coder.prefix == []
    context, continuation = "It was a dark", " and stormy"
    (found,) = lm.log_likelihoods([(context, continuation)])
    ids = lm.encode(context + continuation)
    n = len(ids) - len(lm.encode(context))
    assert found.log_prob == pytest.approx(float(log_probs(lm, ids)[-n:].sum()), rel=1e-9)
    (alone,) = lm.log_likelihoods([("", continuation)])
    expected = log_probs(lm, [lm.coder.start, *lm.encode(continuation)])
    assert alone.log_prob == pytest.approx(float(expected.sum()), rel=1e-9)
    assert len(lm.generate(["It was"], 4)) == 1


def test_a_saved_model_is_found_with_its_tokenizer(tmp_path: Path) -> None:
    """Prevents a run's folder from being taken for a stranger's model."""
    RecollectForCausalLM(RecollectConfig(hidden_size=16, num_attention_heads=2, layers=["yaad"])).save_pretrained(
        tmp_path / "model"
    )
    lm = load_language_model(str(tmp_path))
    assert lm.max_length is None
    assert lm.coder.prefix == [256]
    assert load_language_model(str(tmp_path), max_length=99).max_length == 99


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    """Prevents scores of nothing, of a cut continuation, or of a model that has diverged."""
    lm = own("attention", context=16)
    with pytest.raises(ValueError, match="no token to score"):
        lm.log_likelihoods([("a", "")])
    with pytest.raises(ValueError, match="the model's context is 16"):
        lm.log_likelihoods([("a", "b" * 40)])
    with pytest.raises(ValueError, match="overlap is 0 to 15"):
        list(lm.stream([np.array([1])], overlap=16))
    with pytest.raises(ValueError, match="below the context of 16"):
        lm.generate(["a"], 16)
    with pytest.raises(ValueError, match="an empty text"):
        lm.rolling([""])
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        lm.log_likelihoods([("a", "b")])
    with pytest.raises(ValueError, match="logits are not finite"):
        lm.generate(["a"], 2)
    with pytest.raises(ValueError, match="nothing holds no model"):
        load_language_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        own("attention", context=1)


def test_a_state_that_cannot_be_carried_is_told(tmp_path: Path) -> None:
    """Prevents a traceback, or likelihoods of a state that has been lost, where another library's model keeps it in its own way."""
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2)
    lm = LanguageModel(MambaForCausalLM(config), OwnCoder(ByteTokenizer()))
    with pytest.raises(ValueError, match="state of MambaForCausalLM cannot be carried on; give --context"):
        lm.rolling(["some text"])
    windows = LanguageModel(lm.model, OwnCoder(ByteTokenizer()), max_length=8)
    assert windows.rolling(["some text"])[0].n_tokens == 9


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    """Prevents generation that cannot end and texts that cannot begin."""
    path = llama(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        HuggingFaceCoder(tokenizer, where=path)
