"""What the experiments of both papers are made of: language modelling on the user's text, the commands of variants, curves."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recollect.comparison.options import split_outside
from recollect.reproduction.experiment import TEXT, Asking, Published

TINY_TEXT: Mapping[str, Any] = {"task": "text", "data": [TEXT], "budget": "150steps", "n_eval": 128}
SMALL_TEXT: Mapping[str, Any] = {
    "task": "text",
    "data": [TEXT],
    "budget": "2000steps",
    "parameters": 3_000_000,
    "width": 192,
    "layers": 6,
}
# Who learns a task in text from nothing: the Transformer, the strongest of the others, the models of both papers. They read words (a
# vocabulary of the task's own) and have no SwiGLUs, which make such tasks slower to learn.
TAUGHT: Mapping[str, str] = {
    "attention": "Transformer",
    "gated_delta_net": "Gated DeltaNet",
    "mta": "MTA",
    "moneta": "Moneta",
    "yaad": "Yaad",
    "memora": "Memora",
}
TEACHING: Mapping[str, Any] = {"mixers": list(TAUGHT), "mlp": False, "batch_size": 64}
WORDS: Mapping[str, Any] = {"vocab_size": 512}


# Asked where the user has the files.
LAST_WORD = Asking(of="bits/byte", suite="lambada", file="lambada", by="file", metrics=("perplexity", "accuracy"))
LAST_WORD_FILES: Mapping[str, str] = {
    "lambada": "LAMBADA's passages: a .jsonl file, or a folder with the standard and the OpenAI ones"
}
COMMONSENSE = Asking(of="bits/byte", suite="commonsense", file="commonsense")
COMMONSENSE_FILES: Mapping[str, str] = {
    "commonsense": "common-sense questions: .jsonl files whose names begin with the data set's, or a folder of them"
}


def text_size(paper: str, *, toy: str = "", tiny: bool = True) -> dict[str, str]:
    """The `size` of an experiment that trains with TINY_TEXT and SMALL_TEXT.

    Args:
        paper: what the paper trained, a sentence's end.
        toy: what else is trained at both scales.
        tiny: is text trained at the tiny scale, too?
    """
    texts = {
        "tiny": "1 M parameters, bytes of your own text, 0.3 MB seen" if tiny else "",
        "small": "3 M parameters, bytes of your own text, 4 MB seen",
    }
    return {scale: f"{'; '.join(filter(None, (toy, text)))}; the paper: {paper}." for scale, text in texts.items()}


def train_variants(name: str, mixers: Iterable[str], run: Callable[[str], list[str]]) -> tuple[str, ...]:
    """Commands that train variants at the published size, into runs/NAME-0 and so on, and ask them texts.

    Args:
        name: of the experiment.
        mixers: as typed: a mixer, then its options, ":" between them.
        run: mixer without options -> the recipe to train, and settings.
    """
    variants = [split_outside(mixer, ":") for mixer in mixers]
    trained = tuple(
        shlex.join(
            ["recollect", "train", *run(mixer), *(f"model.options.{option}" for option in options), f"out=runs/{name}-{i}"]
        )
        for i, (mixer, *options) in enumerate(variants)
    )
    return trained + tuple(ask_texts(f"{name}-{i}") for i in range(len(variants)))


def ask_texts(run: str, *options: str, context: int | None = None) -> str:
    """The command that asks runs/RUN the perplexity of the validation texts, by domain."""
    more = "".join(f" -o {option}" for option in options) + (f" --context {context}" if context else "")
    return f"recollect evaluate runs/{run} perplexity --data validation{more} --device cuda --dtype bfloat16 --out texts/{run}"


def curve(title: str, said: str, *, model: str = "paper") -> Published:
    """A figure without numbers: what it shows, in words."""
    return Published(title=title, columns=("values",), rows={model: (said,)}, note="The paper prints curves and no numbers.")
