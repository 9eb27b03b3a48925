"""Every suite from both ends: who knows all answers scores everything, and who guesses scores what the report calls chance.

The suites under test are all that are registered: one without a pair of players in `PLAYERS` fails.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from recollect.data.tokenizer import ByteTokenizer
from recollect.evaluation.language_model import LanguageModel, Likelihood
from recollect.evaluation.loading import OwnCoder
from recollect.evaluation.report import figure, table
from recollect.evaluation.report.summary import Line, lines
from recollect.evaluation.runner import evaluate
from recollect.evaluation.suites import SUITES, Result, Suite, build_suite
from recollect.tasks.babi import LABELS
from recollect.tasks.family import RELATIONS
from recollect.tasks.needle import RULER

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START = 256  # of ByteTokenizer
SEPARATOR, MARK, END = 26, 27, 29  # of find-block


class Player(LanguageModel):
    """Writes what `says` says to a prompt, and finds a continuation after its context as likely as `finds` says."""

    def __init__(
        self, says: Callable[[str], str] = lambda prompt: "", finds: Callable[[str, str], float] = lambda context, text: 0.0
    ) -> None:
        super().__init__(Predictor(257, lambda row: row), OwnCoder(ByteTokenizer()))
        self.says, self.finds = says, finds

    def generate(self, prompts: Sequence[str], max_new_tokens: int, until: Sequence[str] = (), **_: Any) -> list[str]:
        return [self.says(prompt) for prompt in prompts]

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        found = [self.finds(context, text) for context, text in pairs]
        return [Likelihood(nats, nats == 0, 1, len(text)) for nats, (_, text) in zip(found, pairs, strict=True)]


class Predictor(PreTrainedModel):
    """Is sure, at every position of a row, of the token that `says` has there; of none of them where it says None."""

    config_class = PretrainedConfig

    def __init__(self, n_symbols: int, says: Callable[[list[int]], list[int] | None]) -> None:
        super().__init__(PretrainedConfig(vocab_size=n_symbols))
        self.says, self.anchor = says, nn.Parameter(torch.zeros(1))  # something that is on a device

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, of_row in zip(input_ids.tolist(), logits, strict=True):
            said = self.says(row)
            if said is not None:
                of_row -= 1e4
                of_row[range(len(row)), said] = 0.0
        return SimpleNamespace(logits=logits, last_hidden_state=logits)

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()


class Players(NamedTuple):
    """A suite, who knows, and who guesses."""

    suite: Suite
    oracle: LanguageModel
    guesser: LanguageModel


def written(name: str, guess: Callable[[str, Random], str], **options: Any) -> Players:
    """Of a suite of prompts: the task's solver, which reads the prompt alone, and a guess drawn by the prompt."""
    suite, guesser = build_suite(name, **options), Player(lambda prompt: guess(prompt, Random(prompt)))
    tasks = {item.ask[2].prompt: item.ask[1] for item in suite.items(guesser)}
    return Players(suite, Player(lambda prompt: tasks[prompt].solve(prompt)), guesser)


def ruler(folder: Path) -> Players:
    def guess(prompt: str, draw: Random) -> str:
        told = re.findall(r"reads: (\S+)\.\s", prompt)
        is_choice = len(told) > 1 and " is kept under" in prompt.splitlines()[-1]
        return draw.choice(told) if is_choice else str(draw.randrange(10**6, 10**7))

    return written("ruler", guess, lengths=(1200,), n=80)


def needles(folder: Path) -> Players:
    def guess(prompt: str, draw: Random) -> str:
        told = re.findall(r"lucky number of \w+ is (\d)\.", prompt)
        return draw.choice(told if len(told) > 1 else "0123456789")

    return written("needles", guess, needles=(1, 2, 5), lengths=(600,), depths=(0, 100), n=100)


def babilong(folder: Path) -> Players:
    def guess(prompt: str, draw: Random) -> str:
        question = re.findall(r"Question: (.*\?)", prompt)[-1]
        things, people = LABELS[5][4:], LABELS[5][:4]
        sort = LABELS[1] if "hand" not in question else things if question.startswith("What") else people
        return draw.choice([label for label in sort if label not in question])

    return written("babilong", guess, lengths=(0,), n=150)


def clutrr(folder: Path) -> Players:
    return written("clutrr", lambda prompt, draw: draw.choice(RELATIONS), k=(2, 3), n=200)


def commonsense(folder: Path) -> Players:
    """Of data sets of unlike sizes, with 3 to 5 options and with 2."""
    draw, right = Random(1), set()
    arc, winogrande = [], []
    for i in range(900):
        options = [f"{LETTERS[k]}{i}" for k in range(3 + i % 3)]
        gold = draw.randrange(len(options))
        arc.append({"query": f"Question: {i}?\nAnswer:", "choices": options, "gold": gold})
        right.add(f"Question: {i}?\nAnswer: {options[gold]}")
    for i in range(300):
        gold = draw.randrange(2)
        winogrande.append({"sentence": f"{i}: _ sings.", "option1": "Ann", "option2": "Ben", "answer": str(gold + 1)})
        right.add(f"{i}: {('Ann', 'Ben')[gold]} sings.")
    files = [write(folder / "arc_easy.jsonl", arc), write(folder / "winogrande.jsonl", winogrande)]
    return Players(
        build_suite("commonsense", data=files),
        Player(finds=lambda context, text: 0.0 if context + text in right else -99.0),
        Player(finds=lambda context, text: -Random(context + text).random()),
    )


def lambada(folder: Path) -> Players:
    """The last word is among those before it in two passages of three; a guess is one of them."""
    draw = Random(2)
    texts = [[*draw.choices(LETTERS[:8], k=9), draw.choice(LETTERS[: 4 * (1 + i % 3)])] for i in range(900)]
    known = {" ".join(text[:-1]): f" {text[-1]}" for text in texts}
    return Players(
        build_suite(
            "lambada", data=write(folder / "rows.jsonl", [{"text": f"{i} {' '.join(text)}"} for i, text in enumerate(texts)])
        ),
        Player(finds=lambda context, text: 0.0 if known[context.partition(" ")[2]] == text else -99.0),
        Player(
            finds=lambda context, text: 0.0 if " " + Random(context).choice(sorted(set(context.split()))) == text else -99.0
        ),
    )


def perplexity(folder: Path) -> Players:
    """Of the alphabet, again and again: a letter tells the next."""
    data = write(folder / "rows.jsonl", [{"text": LETTERS * 9}, {"text": LETTERS[:7]}])

    def recite(row: list[int]) -> list[int]:
        return [ord("a") if token in (START, ord("z")) else token + 1 for token in row]

    players = [
        LanguageModel(Predictor(257, says), OwnCoder(ByteTokenizer()), max_length=64) for says in (recite, lambda row: None)
    ]
    return Players(build_suite("perplexity", data=data, positions=(16, 100)), *players)


def in_symbols(suite: Suite, n_symbols: int, *says: Callable[[list[int]], list[int]]) -> Players:
    return Players(suite, *(LanguageModel(Predictor(n_symbols, each), OwnCoder(ByteTokenizer())) for each in says))


def recall(folder: Path) -> Players:
    def look_up(row: list[int]) -> list[int]:
        """What stood behind this token when it first came."""
        return [[*row[1:], 0][row.index(token)] for token in row]

    def guess(row: list[int]) -> list[int]:
        return Random(str(row)).choices([token for token in row if token >= 64], k=len(row))

    return in_symbols(build_suite("recall", slices=("16x2", "32x4", "64x8"), n=300), 128, look_up, guess)


def find_block(folder: Path, *, say: str = "all") -> Players:
    cut = {"all": slice(None), "first": slice(1), "last": slice(4, None)}[say]

    def write(row: list[int], pick: Callable[[list[list[int]], set[int]], list[int]]) -> list[int]:
        mark = row.index(MARK)
        blocks = [row[begin : begin + 5] for begin in range(1, mark, 6)]
        assert [row[begin] for begin in range(6, mark, 6)] == [SEPARATOR] * (len(blocks) - 1)
        return [0] * (mark + 2) + pick(blocks, set(row[mark + 1 : mark + 3]))[cut] + [END]

    return in_symbols(
        build_suite("find-block", blocks=(2, 5), say=say, n=300),
        32,
        lambda row: write(row, lambda blocks, asked: next(block for block in blocks if asked <= set(block))),
        lambda row: write(row, lambda blocks, asked: Random(str(row)).choice(blocks)),
    )


PLAYERS: dict[str, Callable[[Path], Players]] = {
    "babilong": babilong,
    "clutrr": clutrr,
    "commonsense": commonsense,
    "find-block": find_block,
    "find-block first": functools.partial(find_block, say="first"),
    "find-block last": functools.partial(find_block, say="last"),
    "lambada": lambada,
    "needles": needles,
    "perplexity": perplexity,
    "recall": recall,
    "ruler": ruler,
}
BEST = {"bits/byte": 0.0, "nats/token": 0.0, "perplexity": 1.0}  # of shares: 1


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Played(NamedTuple):
    """A suite, and its lines for who knows and for who guesses."""

    suite: Suite
    known: list[Line]
    guessed: list[Line]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Played]:
    """The players' results by the name of the suite, which is asked once."""

    @functools.cache
    def played(name: str) -> Played:
        folder = tmp_path_factory.mktemp(name)
        suite, *players = PLAYERS[name](folder)
        done = [evaluate(player, suite, folder / str(i), about={}).results for i, player in enumerate(players)]
        return Played(suite, *(lines(suite, results) for results in done))

    return played


@pytest.mark.parametrize("name", sorted({*SUITES, *PLAYERS}))
def test_who_knows_scores_everything(name: str, play: Callable[[str], Played]) -> None:
    """Prevents answers that are marked against another question, and metrics that no model can satisfy."""
    suite, known, _ = play(name)
    for line in known:
        assert [cell.value for cell in line.cells] == [BEST.get(metric.name, 1.0) for metric in suite.metrics]


@pytest.mark.parametrize("name", sorted({*SUITES, *PLAYERS}))
def test_who_guesses_scores_chance(name: str, play: Callable[[str], Played]) -> None:
    """Prevents a floor in the report that is not that of a guess, of any group; and metrics that favour the first, last or shortest
    answer. Within 4 binomial standard errors of a few hundred questions."""
    suite, _, guessed = play(name)
    for line in guessed:
        assert line.chance is not None
        error = math.sqrt(line.chance * (1 - line.chance) / line.n) if suite.metrics[0].unit == "%" else 1e-6
        assert abs(line.cells[0].value - line.chance) <= 4 * error, line


def test_a_uniform_model_has_the_bits_of_its_vocabulary(play: Callable[[str], Played]) -> None:
    """Prevents a perplexity per something else than a token: it is the number of symbols, log2 of it the bits."""
    for line in play("perplexity").guessed:
        bits, perplexity_, nats = (cell.value for cell in line.cells)
        assert (bits, line.chance) == pytest.approx((math.log2(257), math.log2(257)))
        assert perplexity_ == pytest.approx(257, rel=1e-5)
        assert nats == pytest.approx(math.log(257))


def test_every_group_has_its_own_floor(play: Callable[[str], Played]) -> None:
    """Prevents one floor for groups that are unlike: of 3 to 5 options, or of 2; of 2, 4 or 8 pairs; of one needle, or many."""
    floors = {name: [line.chance for line in play(name).guessed] for name in ("commonsense", "recall", "ruler")}
    of_arc = (1 / 3 + 1 / 4 + 1 / 5) / 3
    assert floors["commonsense"] == pytest.approx([of_arc, 1 / 2, (of_arc + 1 / 2) / 2])
    assert floors["recall"] == pytest.approx([1 / 2, 1 / 4, 1 / 8, 7 / 24])
    of_ruler = dict(zip(RULER, floors["ruler"], strict=False))  # the last floor is of all
    assert of_ruler.pop("niah_multikey_1") == 1 / 4
    assert 0.05 < of_ruler.pop("niah_multikey_2") < of_ruler.pop("niah_multikey_3") < 0.3  # uuids are longer: fewer fit
    assert set(of_ruler.values()) == {0.0}


def results_of(*sizes: tuple[str, int, int, int]) -> list[Result]:
    """Of data sets, each (name, right, asked, options)."""
    return [
        Result({"dataset": name}, {"acc": float(i < right), "acc_norm": 0.0}, {}, {"acc": 1 / options})
        for name, right, n, options in sizes
        for i in range(n)
    ]


def test_commonsense_is_averaged_over_data_sets() -> None:
    """Prevents an average in which HellaSwag counts 20 times as much as OpenBookQA, which is not the papers', or goes by their name."""
    suite = build_suite("commonsense", data="x")
    found = lines(suite, results_of(("boolq", 9, 10, 2), ("arc_easy", 30, 100, 4)))
    assert [line.cells[0].value for line in found] == pytest.approx([0.9, 0.3, 0.6])
    interval = found[-1].cells[0].interval
    assert interval is not None
    error = math.sqrt(0.9 * 0.1 / 10 + 0.3 * 0.7 / 100) / 2
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert table.cells(suite, found, found[-1])[:3] == ["mean of datasets", "110", table.cells(suite, found, found[-1])[2]]
    (panel,) = figure.draw(suite, results_of(("boolq", 9, 10, 2), ("arc_easy", 30, 100, 4)), "x").axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["boolq", "arc_easy", "mean of datasets"]


def test_the_floor_is_shown_beside_every_group() -> None:
    """Prevents a table or picture in which 52 % of BoolQ look better than 40 % of ARC; and a floor made up for rows without one."""
    suite = build_suite("commonsense", data="x")
    results = results_of(("boolq", 9, 10, 2), ("arc_easy", 30, 100, 4))
    found = lines(suite, results)
    assert table.titles(suite, found)[-1] == "chance %"
    assert [table.cells(suite, found, line)[-1] for line in found] == ["50.0", "25.0", "37.5"]
    (panel,) = figure.draw(suite, results, "x").axes
    (floors,) = (each for each in panel.collections if each.get_label() == "chance")
    assert [path.vertices[0, 1] for path in floors.get_paths()] == [50.0, 25.0, 37.5]

    older = [*results[:-1], results[-1]._replace(guess=None)]  # a row of an evaluation from before there were floors
    assert [line.chance for line in lines(suite, older)] == [0.5, None, None]
    assert [table.cells(suite, lines(suite, older), line)[-1] for line in lines(suite, older)] == ["50.0", "-", "-"]

    suite = build_suite("needles")
    results = [
        Result({"needles": 2, "length": n, "depth": depth}, {"score": 1.0}, {}, {"score": 1 / n})
        for n in (2, 8)
        for depth in (0, 50)
    ]
    panel = figure.draw(suite, results, "x").axes[0]
    assert [text.get_text().strip() for text in panel.texts] == ["100", "50.0", "100", "12.5"] * 2
