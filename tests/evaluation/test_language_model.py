"""A language model as evaluations see it, against plain loops over one text at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from recollect.data.tokenizer import ByteTokenizer, train_tokenizer
from recollect.evaluation import language_model
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.loading import HuggingFaceCoder, OwnCoder, load_language_model
from recollect.evaluation.probes import generates_batches
from recollect.inspection import inspect_text
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.models.cache import CACHE

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


def windowed(lm: LanguageModel, ids: list[int], length: int, overlap: int, *, start: int = 1) -> list[float]:
    """`log_probs` of the tokens from `start` on in windows of `length` tokens, each read by itself in a plain loop."""
    expected: list[float] = []
    at = start
    while at < len(ids):
        size = min(length - overlap, len(ids) - at)
        begin = max(0, at - overlap - 1 if size == length - overlap else at + size - 1 - length)
        expected += log_probs(lm, ids[begin : at + size])[-size:].tolist()
        at += size
    return expected


@contextmanager
def calls(lm: LanguageModel) -> Iterator[list[tuple[int, ...]]]:
    """Shapes [B, T] that the model is called with."""
    shapes: list[tuple[int, ...]] = []
    hook = lm.model.base_model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


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


def test_a_continuation_longer_than_the_context_is_read_in_windows() -> None:
    """Prevents a long choice from stopping an evaluation, from losing its beginning, or from taking its neighbours' numbers."""
    lm = own("attention", context=16)
    pairs = [("It was a", " dark"), ("The night was", TEXT[8:61]), ("", TEXT[:17]), ("the rain", TEXT[:16])]
    for (context, continuation), found in zip(pairs, lm.log_likelihoods(pairs), strict=True):
        ids = [256, *(context + continuation).encode()]
        start = 1 + len(context)
        fits = len(continuation) <= 16
        expected = log_probs(lm, ids[-17:])[-len(continuation) :].tolist() if fits else windowed(lm, ids, 16, 8, start=start)
        assert len(expected) == found.n_tokens == len(continuation)
        assert found.log_prob == pytest.approx(sum(expected), rel=1e-10)


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
    np.testing.assert_allclose(found, windowed(lm, [256, *ids], 32, overlap), rtol=1e-9)


LENGTHS = (3, 150, 1, 40, 0, 41, 90, 7)  # of texts that are asked together


def check_together(lm: LanguageModel, expected: list[Any], **options: int) -> None:
    """The model's log-probabilities of texts of `LENGTHS` tokens are those expected, in fewer calls than there are texts."""
    texts = [np.arange(n) * 37 % 250 for n in LENGTHS]
    with calls(lm) as shapes:
        found = lm.log_probs(texts, **options)
    assert [len(greedy) for _, greedy in found] == list(LENGTHS)
    np.testing.assert_allclose(np.concatenate([values for values, _ in found]), np.concatenate(expected), rtol=1e-9, atol=1e-11)
    alone = [[np.concatenate(each) for each in zip(*lm.stream([text], **options), strict=True)] for text in texts if len(text)]
    np.testing.assert_array_equal(np.concatenate([greedy for _, greedy in found]), np.concatenate([g for _, g in alone]))
    assert len(shapes) < len(LENGTHS)
    assert max(b * t for b, t in shapes) <= lm.batch_tokens


@pytest.mark.parametrize("layers", [("yaad",), ("gated_delta_net", "sliding_window"), ("titans", "mamba2"), ("mta",)])
@pytest.mark.parametrize("piece", [50, 1024])
def test_texts_whose_state_is_carried_may_be_read_together(layers: tuple[str, ...], piece: int) -> None:
    """Prevents padding from reaching a convolution, a chunk or a state that goes on, and rows from being mixed up."""
    lm = own(*layers, batch_tokens=512)
    lm.max_length = None
    rows = [[256, *(np.arange(n) * 37 % 250).tolist()] for n in LENGTHS]
    check_together(lm, [log_probs(lm, row) for row in rows], piece=piece)


@pytest.mark.parametrize("overlap", [0, 5])
def test_windows_of_several_texts_are_read_together(overlap: int) -> None:
    """Prevents a window from being scored as another text's, and one call of the model per window."""
    lm = own("attention", context=32, batch_tokens=512)
    rows = [[256, *(np.arange(n) * 37 % 250).tolist()] for n in LENGTHS]
    check_together(lm, [windowed(lm, row, 32, overlap) for row in rows], overlap=overlap)


@pytest.mark.parametrize("context", [None, 32])
def test_a_model_of_others_reads_texts_together(context: int | None, tmp_path: Path) -> None:
    """Prevents another library's positions or cache from being shifted by padding."""
    lm = load_language_model(llama(tmp_path), batch_tokens=512)
    lm.model.double()
    lm.max_length = context
    rows = [[lm.coder.start, *(np.arange(n) * 37 % 250).tolist()] for n in LENGTHS]
    check_together(lm, [windowed(lm, row, context or 1000, 0) for row in rows])


def test_a_long_text_is_held_a_batch_at_a_time() -> None:
    """Prevents a book from being read whole before its first window is scored, and window by window."""
    lm = own("attention", context=8, batch_tokens=64)
    n_taken = 0

    def parts() -> Iterator[Any]:
        nonlocal n_taken
        for n_taken in range(1, 4097):
            yield np.array([n_taken % 250])

    with calls(lm) as shapes:
        stream = lm.stream(parts())
        next(stream)
        assert n_taken <= 64 + 8
        assert sum(len(values) for values, _ in stream) == 4096 - 8
    assert len(shapes) <= 4096 / 56 + 1


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
        lm.rolling(["a", "a longer text"])
    with pytest.raises(ValueError, match="logits are not finite"):
        lm.generate(["a"], 2)
    with pytest.raises(ValueError, match="nothing holds no model"):
        load_language_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        own("attention", context=1)


class Stateless(MambaForCausalLM):
    """Returns no state."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, use_cache=False)


@pytest.mark.parametrize("kind", [MambaForCausalLM, Stateless])
def test_a_state_that_cannot_be_carried_is_told(kind: type[MambaForCausalLM]) -> None:
    """Prevents a traceback, or likelihoods of a state that has been lost: transformers' Mamba gives none (until release 5.23), or
    one whose recurrence starts anew with every piece of a text.
    """
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    lm = LanguageModel(kind(MambaConfig(**sizes, initializer_range=0.5)), OwnCoder(ByteTokenizer()))
    with pytest.raises(ValueError, match=f"state of {kind.__name__} cannot be carried on .*; give --context"):
        lm.rolling(["some text"])
    windows = LanguageModel(lm.model, OwnCoder(ByteTokenizer()), max_length=8)
    assert windows.rolling(["some text"])[0].n_tokens == 9


@pytest.mark.parametrize("kind", ["llama", *(["mamba2"] if CACHE == "cache" else [])])
def test_a_state_of_another_library_is_carried(kind: str) -> None:
    """Prevents a check that refuses what works: in pieces as in one call. Mamba-2's logits are fp32 whatever its weights: some
    roundings of numbers of about 10.
    """
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5}
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, num_attention_heads=2))
    else:
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=4, head_dim=8, num_heads=4, n_groups=1))
    lm = LanguageModel(model.double(), OwnCoder(ByteTokenizer()))
    lm.max_length = None
    text = np.asarray(lm.encode("one text, read in pieces of seven tokens and in one"), np.int64)
    (whole, _), (pieces, _) = (lm.log_probs([text], piece=piece)[0] for piece in (1000, 7))
    np.testing.assert_allclose(pieces, whole, atol=1e-9 if kind == "llama" else 1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_logits_of_another_library_are_made_where_they_are_needed(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the logits of a whole window in memory, 34 GB for 64 thousand tokens of 128 thousand symbols; and a head that is
    applied by itself where the model does more than that (here: scales its logits).
    """
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=1 / scale, max_position_embeddings=64)).double()
    lm = LanguageModel(model, OwnCoder(ByteTokenizer()))
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 257 * 10)
    text = lm.encode(TEXT)[:50]
    expected = model(torch.tensor([[lm.coder.start, *text]])).logits[0, :-1].double().log_softmax(-1)
    expected = expected.gather(1, torch.tensor(text)[:, None]).squeeze(1)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, given, out: rows.append(out.shape[:-1].numel()))
    (values, _), *_ = lm.log_probs([np.asarray(text)])
    np.testing.assert_allclose(values, expected.detach(), atol=1e-10, rtol=0)
    assert (max(rows[-3:]) <= 10) == (scale == 1)


def test_prompts_that_disturb_each_other_are_continued_one_by_one() -> None:
    """Prevents answers that no prompt alone would get: RWKV of transformers knows no padding."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, context_length=64))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    lm = LanguageModel(model, OwnCoder(ByteTokenizer()))
    prompts = ["one", "a longer prompt", "two"]
    assert lm.generate(prompts, 6) == [lm.generate([prompt], 6)[0] for prompt in prompts]
    assert not generates_batches(model, lm.coder.start)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=32, num_attention_heads=2))
    assert generates_batches(llama.eval(), lm.coder.start)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_end_where_they_end(kind: str) -> None:
    """Prevents an IndexError from deep inside a model whose table of positions is shorter than the context that was asked for."""
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    else:
        sizes = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8}
        model = OPTForCausalLM(OPTConfig(vocab_size=257, max_position_embeddings=16, **sizes))
    coder = OwnCoder(ByteTokenizer())
    assert LanguageModel(model, coder, max_length=16).rolling([TEXT])[0].n_tokens == len(TEXT)
    with pytest.raises(ValueError, match="learned positions for 16 tokens and cannot read 17 at a time"):
        LanguageModel(model, coder, max_length=17)
    with pytest.raises(ValueError, match="learned positions for 16 tokens"):
        inspect_text(model, coder, TEXT, n_tokens=17)
    rotary = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=8, num_attention_heads=2, max_position_embeddings=16))
    assert LanguageModel(rotary, coder, max_length=17).max_length == 17


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """Prevents scores of empty texts: transformers makes up a tokenizer that knows no tokens."""
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer|is no causal language model with a tokenizer"):
        load_language_model(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    """Prevents generation that cannot end and texts that cannot begin."""
    path = llama(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        HuggingFaceCoder(tokenizer, where=path)
