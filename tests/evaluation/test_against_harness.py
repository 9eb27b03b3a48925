"""The same GPT-2 asked by lm-evaluation-harness's own wrapper and by ours: likelihoods, rolling likelihoods and answers are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recollect.data.tokenizer import train_tokenizer
from recollect.evaluation.harness import HarnessModel
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.loading import HuggingFaceCoder

WORDS = Path(__file__).read_text(encoding="utf-8").split()
CONTEXT = 64


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HarnessModel]:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "text.txt").write_text(" ".join(WORDS))
    file = train_tokenizer(folder / "text.txt", vocab_size=400, out=folder)
    end = "<|document|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=end, bos_token=end, pad_token=end)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # so that likelihoods differ and answers are no single token
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)
    return theirs, HarnessModel(LanguageModel(model, HuggingFaceCoder(tokenizer, where="here")))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("t", 0, 1)) for each in arguments]


def text(first: int, n: int) -> str:
    return " ".join(WORDS[first : first + n])


def test_likelihoods_of_continuations_are_equal(both: tuple[Any, HarnessModel]) -> None:
    """Empty contexts, contexts that end in blanks and ones that are too long: tokens must be cut and cropped alike."""
    pairs = [(text(i, n), " " + WORDS[i + n]) for i, n in ((0, 5), (30, 10), (60, 1), (50, 150))]
    asked = requests(
        "loglikelihood",
        *pairs,
        ("", " hello there"),
        ("abc  ", "def"),
        ("the  ", "mat"),
        ("a:\n", "é"),
        ("Question: x\nAnswer:", " yes"),
    )
    theirs, ours = both
    for one, other in zip(theirs.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1] == other[1]


def test_rolling_likelihoods_are_equal(both: tuple[Any, HarnessModel]) -> None:
    """The windows of texts longer than the context, the last of which is filled up with what came before."""
    asked = requests("loglikelihood_rolling", *((text(i, n),) for i, n in ((0, 5), (30, 12), (60, 60), (20, 200))))
    theirs, ours = both
    assert theirs.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(ours.loglikelihood_rolling(asked), rel=1e-5)


def test_answers_are_equal(both: tuple[Any, HarnessModel]) -> None:
    """A token too many before the prompt, or an answer that is cut elsewhere, would be another answer."""
    until = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", *((text(i, n), until) for i, n in ((0, 5), (30, 12), (60, 3), (20, 200))))
    theirs, ours = both
    assert theirs.generate_until(asked, disable_tqdm=True) == ours.generate_until(asked)
