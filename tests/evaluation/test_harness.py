"""The adapter, with the harness itself as the oracle: a bigram of bytes answers, and our own scoring must agree with its results."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from recollect.cli import app
from recollect.data.tokenizer import START as START_TEXT
from recollect.data.tokenizer import load_tokenizer, train_tokenizer
from recollect.evaluation import harness
from recollect.evaluation.choices import few_shot, to_choices
from recollect.evaluation.harness import HarnessModel, LocalData, run_harness, tokenizer_of
from recollect.evaluation.lambada import last_word
from recollect.evaluation.language_model import Likelihood
from recollect.evaluation.loading import HuggingFaceCoder, OwnCoder
from recollect.evaluation.report import harness as report
from recollect.evaluation.report.summary import lines
from recollect.evaluation.suites import build_suite
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.tasks.haystack import grammar_sentences
from recollect.tasks.needle_words import ADJECTIVES, NOUNS
from tests.evaluation.test_choices import mean_pick
from tests.evaluation.test_floors import Player
from tests.test_package import modules_after

THEIRS = Path(lm_eval.__file__).parent / "tasks"
START = 256


class Bigram:
    """A fixed table of log-probabilities of the next byte; it writes "ANSWER, end" or "ANSWER\\nend" to any prompt."""

    max_length = None
    tokenizer_name = "bytes"

    def __init__(self, ending: str = "\nend") -> None:
        logits = 3 * np.random.default_rng(5).standard_normal((257, 256))
        self.table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        self.ending = ending
        self.asked: list[Any] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _of(self, context: str, text: str) -> Likelihood:
        before, after = [START, *self.encode(context)], self.encode(text)
        rows = self.table[[before[-1], *after[:-1]]]
        greedy = bool((rows.argmax(axis=1) == after).all())
        return Likelihood(float(rows[range(len(after)), after].sum()), greedy, len(after), len(after))

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        self.asked += pairs
        return [self._of(context, continuation) for context, continuation in pairs]

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        self.asked += texts
        return [self._of("", text) for text in texts]

    def generate(self, prompts: Sequence[str], max_new_tokens: int, until: Sequence[str]) -> list[str]:
        self.asked.append((list(prompts), max_new_tokens, list(until)))
        return [(prompt.split()[-1][::-1] + self.ending)[:max_new_tokens] for prompt in prompts]


class Tasks:
    """Writes YAML tasks and their rows into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, name: str, rows: Sequence[dict[str, Any]], *, train: Sequence[dict[str, Any]] = (), **config: Any
    ) -> str:
        """The path of a task over rows; all three splits that a task may name are there, `train` being the rows if not given."""
        files = {}
        for split, content in (("train", train or rows), ("validation", rows), ("test", rows)):
            file = self.folder / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
            files[split] = str(file)
        path = self.folder / f"{name}.yaml"
        settings = {
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(self.folder / "cache")},
            **({} if "include" in config else {"test_split": "test"}),
            **config,
        }
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return str(path)


@pytest.fixture
def task(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path)


def arc(question: str, *options: str, gold: int) -> dict[str, Any]:
    labels = list("ABCD")[: len(options)]
    return {"question": question, "choices": {"text": list(options), "label": labels}, "answerKey": labels[gold]}


def winogrande(sentence: str, first: str, second: str, answer: str) -> dict[str, Any]:
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def mmlu(question: str, *options: str, answer: int) -> dict[str, Any]:
    return {"question": question, "subject": "high_school_us_history", "choices": list(options), "answer": answer}


def siqa(context: str, question: str, a: str, b: str, c: str, label: str) -> dict[str, Any]:
    return {"context": context, "question": question, "answerA": a, "answerB": b, "answerC": c, "label": label}


def hellaswag(activity: str, ctx_a: str, ctx_b: str, *endings: str, label: str) -> dict[str, Any]:
    return {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": list(endings), "label": label}


ARC = [
    arc("Which is wet?", "sand", "rain", "a stone", gold=1),
    arc("What do bees make from nectar? ", "honey", "cheese", gold=0),
    arc("Which {{metal}} is liquid?", "iron", "mercury, at 20 °C", "tin", "lead", gold=1),
    arc("Who eats grass?", "a cow", "a cat", gold=0),
]
# Rows of our own in each data set's published form: four to answer, and the same turned round as examples.
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "arc_easy": ("arc/arc_easy.yaml", ARC),
    "arc_challenge": ("arc/arc_challenge.yaml", ARC),
    "boolq": (
        "super_glue/boolq/default.yaml",
        [
            {"passage": "Soap -- Soap foams in water.", "question": "does soap foam", "label": 1},
            {"passage": "Ice -- Ice is frozen.  It is cold.", "question": "is ice hot", "label": 0},
            {"passage": "Zoë -- Zoë runs.", "question": "does zoë run", "label": 1},
            {"passage": "Rust -- Iron rusts.", "question": "does glass rust", "label": 0},
        ],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            hellaswag("Rowing", "A man sits in a boat.", "the man in Red", "rows away.", "sings.", "is a tree.", label="0"),
            hellaswag(
                "Home", "[header] How to mop [title] Fill it. [step] Use soap.", "", "[substeps] Rinse.", "Run!", label="1"
            ),
            hellaswag("Chess", "Two play  chess.", "one", "moves.", "flies [header] off.", label="0"),
            hellaswag("Tea", "She boils water.", "then she", "pours it over the leaves.", "sleeps.", label="0"),
        ],
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        [
            {"question_stem": row["question"], **{key: row[key] for key in ("choices", "answerKey")}}
            for row in (*ARC[:2], *ARC[3:], arc("The sun is", "hot", "cold", gold=0))
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        [
            {"goal": "Open a jar", "sol1": "Twist the lid", "sol2": "Eat the lid", "label": 0},
            {"goal": "how do you dry hair?", "sol1": "Wet it. ", "sol2": "Towel it.", "label": 1},
            {"goal": "Light a lamp", "sol1": "Sing", "sol2": "Press the switch", "label": 1},
            {"goal": "Cut bread,", "sol1": "with a knife", "sol2": "with a spoon", "label": 0},
        ],
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        [
            siqa("Ann fell on the ice.", "How does Ann feel?", "sore", "rich", "tall", "1"),
            siqa("Bea lent Cem a book.", "What will Cem do?", "burn it", "read it", "sell it", "2"),
            siqa("Dan sang all night.", "Why?", "to sleep", "he was ill", "for joy", "3"),
            siqa("Eve won.", "What next?", "a party", "a loss", "a nap", "1"),
        ],
    ),
    "mmlu": (
        "mmlu/default/mmlu_high_school_us_history.yaml",
        [
            mmlu("Who was first?\n", "Adams", "Washington", "Polk", "Grant", answer=1),
            mmlu("Which came last", "1812", "1776", "1861", "1790", answer=2),
            mmlu("Tea was thrown into the harbor of", "Boston", "Salem", "Lynn", "Gloucester", answer=0),
            mmlu("{{Gold}} was found in", "Ohio", "Maine", "Iowa", "California", answer=3),
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        [
            winogrande("Ann paid Bea because _ owed her money.", "Ann", "Bea", "1"),
            winogrande("The box did not fit the bag as the _ was too small.", "box", "bag", "2"),
            winogrande("_ thanked Dan, since Cem had been helped.", "Dan", "Cem", "2"),
            winogrande("Eve sold Flo the car; _'s driving days were over.", "Eve", "Flo", "1"),
        ],
    ),
}


@pytest.mark.parametrize("n_shots", [0, 2])
@pytest.mark.parametrize("dataset", sorted(ROWS))
def test_our_pairs_and_scores_equal_the_harnesss(task: Tasks, dataset: str, n_shots: int) -> None:
    """The local path and the harness must be one convention: same characters asked, same accuracies computed."""
    file, rows = ROWS[dataset]
    train = rows[::-1]
    split = {"fewshot_split": "train"} if dataset == "mmlu" else {}  # its own is called dev
    path = task(f"{dataset}_local", rows, train=train, include=str(THEIRS / file), **split)
    model = Bigram()
    results = run_harness(model, [path], n_shots=n_shots)

    choices = to_choices(rows, dataset)
    samples = sorted(results["samples"][f"{dataset}_local"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(rows)
    solved = [few_shot([each]) for each in to_choices(train, dataset)]
    examples = ["".join(pair) for pair in itertools.permutations(solved, 2)]
    for row, choice, sample in zip(rows, choices, samples, strict=True):
        arguments = [tuple(pair) for pair in sample["arguments"]]
        heading = choice.tags.get("heading", "")
        shots = arguments[0][0].removeprefix(heading).removesuffix(choice.contexts[0].removeprefix(heading))
        assert arguments == list(to_choices([row], dataset, shots=shots)[0].pairs)
        assert shots in (examples if n_shots else [""])

    ours = mean_pick(choices, [[each.log_prob for each in Bigram().log_likelihoods(choice.pairs)] for choice in choices])
    theirs = results["results"][f"{dataset}_local"]
    if n_shots == 0:  # a bigram sees no examples, but the last byte before an answer is the same: equal in both cases
        assert len(model.asked) == sum(len(choice.pairs) for choice in choices)
    assert theirs["acc,none"] == ours.acc
    assert theirs.get("acc_norm,none", ours.acc_norm) == ours.acc_norm
    assert ("acc_norm,none" in theirs) == (dataset not in ("boolq", "mmlu", "social_iqa", "winogrande"))


def test_bytes_are_scored_as_the_harness_does(task: Tasks) -> None:
    """Over many questions of which characters and bytes differ, all three metrics agree and are not all alike."""
    generator = np.random.default_rng(3)
    words = ["a", "zoë", "日本語", "a long answer", "ß", "no", "Ægir, ægir"]
    rows = [
        {"query": f"Goal: {i}\nAnswer:", "choices": generator.choice(words, 3, replace=False).tolist(), "gold": int(i % 3)}
        for i in range(60)
    ]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")]
    path = task(
        "words",
        rows,
        output_type="multiple_choice",
        doc_to_text="query",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=metrics,
    )
    results = run_harness(Bigram(), [path])["results"]["words"]
    choices = to_choices(rows, "piqa", convention="oe_eval")
    ours = mean_pick(choices, [[each.log_prob for each in Bigram().log_likelihoods(choice.pairs)] for choice in choices])
    assert [results[f"{name},none"] for name in ("acc", "acc_norm", "acc_bytes")] == pytest.approx(list(ours), abs=1e-12)
    assert len(set(ours)) == 3
    assert results["acc_stderr,none"] > 0


@pytest.mark.parametrize("variant", ["openai", "standard"])
def test_lambada_equals_the_harnesss(task: Tasks, variant: str, tmp_path: Path) -> None:
    """Same cut, same accuracy, same perplexity of the word."""
    model = Bigram()
    for before, byte in itertools.pairwise(b"e sun"):
        model.table[before, byte] = 0.0
    texts = ["she sang to the sun", "`` no , '' said ann", 'He was "Bob', "it is one sun"]
    rows = [{"text": text} for text in texts]
    path = task(f"lambada_{variant}_local", rows, include=str(THEIRS / f"lambada/lambada_{variant}.yaml"))
    results = run_harness(model, [path], bootstrap_iters=0)
    assert sorted(model.asked) == sorted(map(last_word, rows))

    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    suite = build_suite("lambada", data=(str(tmp_path / "rows.jsonl"),))
    answers: Any = suite.answer(model, suite.items(model))  # type: ignore[arg-type]
    (line,) = lines(suite, [result for some in answers for result in some])
    theirs = results["results"][f"lambada_{variant}_local"]
    assert theirs["acc,none"] == line.cells[0].value == 0.5
    assert theirs["perplexity,none"] == pytest.approx(line.cells[1].value, rel=1e-12)


def test_rolling_gives_word_and_byte_perplexity(task: Tasks) -> None:
    """WikiText's metrics: the whole text counts, its first byte too, and each document is read by itself."""
    texts = ["One two three.\nFour é five.", "Six", "Seven eight nine ten eleven."]
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    path = task(
        "pages",
        [{"page": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="page",
        metric_list=metrics,
    )
    results = run_harness(Bigram(), [path], bootstrap_iters=0)["results"]["pages"]
    table = Bigram().table
    nats = -sum(
        table[before][byte] for text in texts for before, byte in zip([START, *text.encode()], text.encode(), strict=False)
    )
    n_bytes = sum(len(text.encode()) for text in texts)
    n_words = sum(len(text.split()) for text in texts)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(nats / n_words), rel=1e-12)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-12)
    assert results["bits_per_byte,none"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-12)


def test_wikitext_of_the_harness_runs(task: Tasks) -> None:
    """Its text is detokenised, its words are counted before that: what the model is asked shows it."""
    model = Bigram()
    path = task("wikitext_local", [{"page": "One @-@ two , three ."}], include=str(THEIRS / "wikitext/wikitext.yaml"))
    results = run_harness(model, [path], bootstrap_iters=0)["results"]["wikitext_local"]
    assert model.asked == ["One-two, three ."]
    nats = -Bigram().rolling(model.asked)[0].log_prob
    assert results["word_perplexity,none"] == pytest.approx(math.exp(nats / 6), rel=1e-12)


GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "say",
    "doc_to_target": "want",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def test_generation_stops_where_the_task_says(task: Tasks) -> None:
    """Text after the stop would make every exact match fail; another task's limit must not be used."""
    rows = [{"say": "turn abc", "want": "cba"}, {"say": "turn xy", "want": "yx"}, {"say": "turn pq", "want": "wrong"}]
    line = task("line", rows, **GENERATE, generation_kwargs={"until": ["\n", ""], "max_gen_toks": 9, "do_sample": False})
    comma = task("comma", rows, **GENERATE, generation_kwargs={"until": ",", "max_tokens": 7, "temperature": 0.0})
    free = task("free", rows, **GENERATE, generation_kwargs={"until": [], "do_sample": False})
    model = Bigram()
    results = run_harness(model, [line, comma, free])
    assert results["results"]["line"]["exact_match,none"] == pytest.approx(2 / 3)
    assert results["results"]["comma"]["exact_match,none"] == 0
    assert [sample["filtered_resps"] for sample in results["samples"]["line"]] == [["cba"], ["yx"], ["qp"]]
    assert [sample["filtered_resps"][0] for sample in results["samples"]["comma"]] == ["cba\nend", "yx\nend", "qp\nend"]
    prompts = [row["say"] for row in rows]
    assert sorted(model.asked, key=lambda each: each[1]) == [(prompts, 7, [","]), (prompts, 9, ["\n"]), (prompts, 256, [])]


def test_who_knows_scores_everything_and_who_guesses_chance(task: Tasks) -> None:
    """Prevents an adapter that answers another question, or favours an option: the harness itself scores both."""
    golds = [Random(i).randrange(4) for i in range(200)]
    rows = [arc(f"Which is {i}?", *(f"{letter}{i}" for letter in "pqrs"), gold=gold) for i, gold in enumerate(golds)]
    right = {f"Question: Which is {i}?\nAnswer: {'pqrs'[gold]}{i}" for i, gold in enumerate(golds)}
    path = task("arc_local", rows, include=str(THEIRS / "arc/arc_easy.yaml"))
    oracle = Player(finds=lambda context, text: 0.0 if context + text in right else -99.0)
    guesser = Player(finds=lambda context, text: -Random(context + text).random())
    known, guessed = (run_harness(each, [path], bootstrap_iters=0)["results"]["arc_local"] for each in (oracle, guesser))
    assert known["acc,none"] == known["acc_norm,none"] == 1
    assert abs(guessed["acc,none"] - 1 / 4) <= 4 * math.sqrt(1 / 4 * 3 / 4 / 200)


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 0.7}, {"do_sample": False, "num_beams": 4}])
def test_sampling_is_refused(task: Tasks, options: dict[str, Any]) -> None:
    """A greedy answer passed off as a sampled one is another benchmark."""
    path = task("dice", [{"say": "a", "want": "b"}], **GENERATE, generation_kwargs={"until": ["\n"], **options})
    with pytest.raises(ValueError, match=r"task 'dice' asks for sampling.*do_sample: false"):
        run_harness(Bigram(), [path])


def piqa_task(task: Tasks, name: str = "piqa_local") -> str:
    return task(name, ROWS["piqa"][1], include=str(THEIRS / "piqa/piqa.yaml"))


def test_tasks_are_found_by_name_in_include_path(task: Tasks) -> None:
    """A name is shorter than a path, and several run at once."""
    piqa_task(task)
    piqa_task(task, "piqa_too")
    results = run_harness(Bigram(), ["piqa_local", "piqa_too"], include_path=task.folder, limit=2)
    assert results["n-samples"]["piqa_too"]["effective"] == 2
    assert results["results"]["piqa_local"]["acc,none"] == results["results"]["piqa_too"]["acc,none"]
    assert results["config"]["tokenizer"] == "bytes"


def test_a_group_is_averaged(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups (mmlu) have a result of their own; one given by its path, which the harness does not know, is told how."""
    monkeypatch.setattr(harness, "TaskManager", without_defaults)
    piqa_task(task, "one")
    piqa_task(task, "two")
    group = {
        "group": "both",
        "task": ["one", "two"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    path = task.folder / "both.yaml"
    path.write_text(yaml.safe_dump(group), encoding="utf-8")
    results = run_harness(Bigram(), ["both"], include_path=[task.folder])
    assert results["groups"]["both"]["acc,none"] == results["results"]["one"]["acc,none"]
    with pytest.raises(ValueError, match="holds a group; give the group's name, and the file's folder as include_path"):
        run_harness(Bigram(), [str(path)])


def without_defaults(**options: Any) -> TaskManager:
    """The harness's own thousands of files take seconds to index."""
    return TaskManager(**{"include_defaults": False, **options})


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "at least one task"),
        (["piqa_locl"], {}, "no task, group or tag 'piqa_locl'; did you mean 'piqa_local'"),
        (["no/such/file.yaml"], {}, "no task, group or tag 'no/such/file.yaml'"),
        (["piqa_local"], {"limit": 0}, "limit is at least 1"),
        (["piqa_local"], {"n_shots": -1}, "n_shots"),
        (["piqa_local"], {"include_path": Path("no/such/folder")}, "folder of YAML files"),
    ],
)
def test_a_wrong_call_is_refused(
    task: Tasks, monkeypatch: pytest.MonkeyPatch, names: list[str], options: dict[str, Any], message: str
) -> None:
    """Before a model is asked anything; a slip of the finger gets the name that was meant."""
    monkeypatch.setattr(harness, "TaskManager", without_defaults)
    piqa_task(task)
    with pytest.raises(ValueError, match=message):
        run_harness(Bigram(), names, **{"include_path": task.folder, **options})


def test_a_data_set_that_cannot_be_downloaded(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence: which task, why, and what to do, instead of six screens of traceback."""

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"task '.*piqa\.yaml' cannot get its data: Couldn't reach .*HF_HOME.*dataset_path: json"
    ):
        run_harness(Bigram(), [str(THEIRS / "piqa/piqa.yaml")])


def test_a_missing_or_broken_local_file(task: Tasks) -> None:
    """The file is named; rows that lack a field are told from rows that cannot be had."""
    path = piqa_task(task)
    (task.folder / "piqa_local-validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"cannot get its data.*piqa_local-validation\.jsonl"):
        run_harness(Bigram(), [path])
    path = task("other", [{"text": "no piqa"}], include=str(THEIRS / "piqa/piqa.yaml"))
    with pytest.raises(ValueError, match=r"task '.*other\.yaml' cannot be loaded: .*goal"):
        run_harness(Bigram(), [path])


def test_a_model_that_gives_nan_is_refused(task: Tasks) -> None:
    """The harness would take the first option, and report an accuracy."""
    model = Bigram()
    model.table[:] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        run_harness(model, [piqa_task(task)])
    pages = task(
        "pages",
        [{"page": "a"}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="page",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    with pytest.raises(ValueError, match="not a number"):
        run_harness(model, [pages])


def test_a_cache_continues_an_interrupted_run(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before an interruption is not asked again, and the results are those of one run."""
    monkeypatch.setattr(harness, "AT_ONCE", 3)
    path = piqa_task(task)
    expected = run_harness(Bigram(), [path])["results"]["piqa_local"]
    seen: list[tuple[int, int]] = []

    class Interrupted(Bigram):
        def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
            if len(self.asked) >= 6:
                raise KeyboardInterrupt
            return super().log_likelihoods(pairs)

    first, second = Interrupted(), Bigram()
    with pytest.raises(KeyboardInterrupt):
        run_harness(first, [path], cache=task.folder / "answers", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8)]
    results = run_harness(second, [path], cache=task.folder / "answers")["results"]["piqa_local"]
    assert len(second.asked) == 2
    assert set(second.asked).isdisjoint(first.asked)
    assert results == expected


def test_answers_are_of_the_model_that_is_asked(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a second model from getting the first one's answers out of the harness's cache, which knows requests only."""
    monkeypatch.chdir(task.folder)
    path = piqa_task(task)
    config = RecollectConfig(hidden_size=16, num_attention_heads=2, layers=["gated_delta_net"], mlp=False)
    for name in ("one", "other"):
        RecollectForCausalLM(config).save_pretrained(task.folder / name)

    def ask(name: str, *more: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["evaluate", name, "harness", "-o", f"tasks={path}", *more])
        return done.exit_code, done.output

    assert [ask("one")[0], ask("other")[0], ask("one")[0]] == [0, 0, 0]
    folders = sorted((task.folder / "evaluations").iterdir())
    answers = [[json.loads(line)["resps"] for line in (each / "samples.jsonl").read_text().splitlines()] for each in folders]
    assert len(folders) == 2
    assert answers[0] != answers[1]
    models = {json.loads((each / "results.json").read_text())["model"]["path"] for each in folders}
    assert models == {"one", "other"}
    assert ask("one", "--out", "here")[0] == 0
    status, said = ask("other", "--out", "here")
    assert status == 2
    assert "holds another evaluation" in said


def test_a_run_writes_its_report(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents results that nobody can look at, and a page that a task's or a model's text breaks."""
    monkeypatch.chdir(task.folder)
    config = RecollectConfig(hidden_size=16, num_attention_heads=2, layers=["gated_delta_net"], mlp=False)
    RecollectForCausalLM(config).save_pretrained(task.folder / "model")
    rows = [{"goal": "<b>Open</b> a jar", "sol1": "Twist", "sol2": "Eat </pre>", "label": 0}]
    path = task("piqa_local", rows, include=str(THEIRS / "piqa/piqa.yaml"))
    words = ["evaluate", "model", "harness", "-o", f"tasks={path}", "--out", "out"]
    monkeypatch.setattr("sys.argv", ["recollect", *words])
    for _ in range(2):  # the second finds every answer in the cache
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        files = ("results.json", "samples.jsonl", "table.txt", "table.md", "figure.png", "figure.svg", "report.html")
        assert all((task.folder / "out" / name).stat().st_size for name in files)
    page = (task.folder / "out" / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not any(word in page for word in ("<script", "http://", "https://", "<b>", "Eat </pre>"))
    assert "Question: &lt;b&gt;Open&lt;/b&gt; a jar" in page
    assert all(f"<span>{word}</span>" in page for word in words)
    assert "<h1>piqa_local acc: " in page


def test_scores_are_the_harnesss(task: Tasks, tmp_path: Path) -> None:
    """Every metric with its error and number of examples; RULER's -1 for "not asked" is no score, its lengths are all of interest."""
    path = piqa_task(task)
    found = report.scores(run_harness(Bigram(), [path], limit=3))
    theirs = run_harness(Bigram(), [path], limit=3)["results"]["piqa_local"]
    assert [(score.metric, score.value, score.error, score.n, score.higher_is_better, score.is_main) for score in found] == [
        (name, theirs[f"{name},none"], theirs[f"{name}_stderr,none"], 3, True, name == "acc") for name in ("acc", "acc_norm")
    ]
    ruler = {"alias": "r", "4096,none": -1, "4096_stderr,none": "N/A", "1024,none": 0.5, "2048,strict": 0.25}
    found = report.scores({"results": {"r": ruler}})
    assert [(*score.cells, score.is_main) for score in found] == [
        ("r", "length 1024", "0.5", "-", "-", True),
        ("r", "length 2048 (strict)", "0.25", "-", "-", True),
    ]
    nowhere = [found[0]._replace(value=value, error=value) for value in (math.nan, math.inf)]
    for some in ([], nowhere):
        report.draw(some, "a picture").savefig(tmp_path / "picture.png")


def test_samples_are_shown_as_question_said_and_right(task: Tasks) -> None:
    """Prevents a page that shows another option than the model took, for each of the harness's kinds of requests."""

    def shown(path: str, model: Bigram | None = None) -> list[dict[str, str]]:
        (rows,) = run_harness(model or Bigram(), [path], bootstrap_iters=0)["samples"].values()
        return [report.shown(row) for row in sorted(rows, key=lambda row: row["doc_id"])]

    for dataset, texts_of in (
        ("piqa", lambda choice: choice.continuations),
        ("winogrande", lambda choice: map("".join, choice.pairs)),
    ):
        file, rows = ROWS[dataset]
        for row, choice in zip(
            shown(task(f"{dataset}_here", rows, include=str(THEIRS / file))), to_choices(rows, dataset), strict=True
        ):
            found, texts = [each.log_prob for each in Bigram().log_likelihoods(choice.pairs)], list(texts_of(choice))
            assert row.pop("said") == texts[found.index(max(found))]
            asked = {"question": choice.contexts[0], "right": texts[choice.gold]}
            assert row == (asked if dataset == "piqa" else {"options": "\n".join(texts)})

    line = task("line", [{"say": "turn abc", "want": "cba"}], **GENERATE, generation_kwargs={"until": ["\n"]})
    assert shown(line) == [{"question": "turn abc", "said": "cba", "right": "cba"}]
    model = Bigram()
    for before, byte in itertools.pairwise(b"e sun"):
        model.table[before, byte] = 0.0
    texts = [{"text": "she sang to the sun"}, {"text": "he ran to the sea"}]
    word = task("word", texts, include=str(THEIRS / "lambada/lambada_openai.yaml"))
    assert shown(word, model) == [
        {"question": "she sang to the", "said": " sun", "right": " sun"},
        {"question": "he ran to the", "said": "(something else)", "right": " sea"},
    ]
    page = task("wikitext_here", [{"page": "One two."}], include=str(THEIRS / "wikitext/wikitext.yaml"))
    assert shown(page) == [{"text": "One two."}]


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of RULER's niah_single_2, of three samples: with words of ours for the package wonderwords, and NLTK's Punkt without
    its model."""
    nltk = pytest.importorskip(
        "nltk", minversion="3.9.1", reason="the harness's RULER needs NLTK >= 3.9.1, which lm-eval brings"
    )
    words = types.ModuleType("wonderwords")
    lists = {"nouns": NOUNS, "adjectives": ADJECTIVES, "verbs": ()}
    words.RandomWord = type("RandomWord", (), {"_categories": lists})  # type: ignore[attr-defined]
    for name in ("prepare_niah", "niah_utils"):  # are imported anew, with these words, and forgotten after the test
        monkeypatch.setitem(sys.modules, f"lm_eval.tasks.ruler.{name}", words)
        del sys.modules[f"lm_eval.tasks.ruler.{name}"]
    monkeypatch.setitem(sys.modules, "wonderwords", words)
    monkeypatch.setattr(nltk, "sent_tokenize", nltk.PunktSentenceTokenizer().tokenize)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # else Punkt's model would be fetched
    niah = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    monkeypatch.setattr(
        niah, "generate_samples", lambda *of, how=niah.generate_samples, **more: how(*of, **more | {"num_samples": 3})
    )
    return str(THEIRS / "ruler/niah_single_2.yaml")


def test_ruler_hides_its_needles_in_local_essays(ruler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a haystack that only the hub has, lengths in another tokenizer's tokens, and questions that change from run to run."""
    monkeypatch.chdir(tmp_path)
    config = RecollectConfig(hidden_size=16, num_attention_heads=2, layers=["gated_delta_net"], mlp=False)
    RecollectForCausalLM(config).save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("one.txt", "other.txt")):
        (tmp_path / name).write_text("\n".join(grammar_sentences(700, seed=seed)))

    def documents(essays: str) -> list[dict[str, Any]]:
        options = ("-o", f"tasks={ruler}", "-o", "metadata={max_seq_lengths: [4096]}", "-o", f"essays={essays}")
        done = CliRunner().invoke(app, ["evaluate", "model", "harness", *options, "--limit", "2", "--out", f"of {essays}"])
        assert done.exit_code == 0, done.output
        lines = (tmp_path / f"of {essays}" / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["doc"] for line in lines]

    one = documents("one.txt")
    for doc in one:
        words = doc["input"].split("\n")[1].split(f"One of the special magic numbers for {doc['gen_prefix'].split()[5]} is")[0]
        assert words.strip() in (tmp_path / "one.txt").read_text().replace("\n", " ")
        assert doc["length"] == len(doc["input"].encode()) + 1 + 128 <= 4096
    assert documents("one.txt") == one
    assert {doc["input"] for doc in documents("other.txt")}.isdisjoint(doc["input"] for doc in one)


def test_a_missing_sentence_splitter_is_told(ruler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's own words on it fill a screen."""

    def missing(text: str) -> list[str]:
        raise LookupError("***\n  Resource 'punkt_tab' not found.\n  >>> nltk.download('punkt_tab')\n***")

    monkeypatch.setattr(sys.modules["lm_eval.tasks.ruler.prepare_niah"], "sent_tokenize", missing)
    (tmp_path / "essay.txt").write_text("One day. " * 400)
    options: dict[str, Any] = {"local": LocalData(essays=str(tmp_path / "essay.txt"))}
    options["metadata"] = {"tokenizer": tokenizer_of(Bigram(), tmp_path / "tokenizer"), "max_seq_lengths": [4096]}
    with pytest.raises(ValueError, match=r"be loaded: NLTK's rules .* are missing: python -m nltk\.downloader punkt_tab$"):
        run_harness(Bigram(), [ruler], **options)


def test_the_copy_of_a_tokenizer_counts_alike_and_names_no_code(tmp_path: Path) -> None:
    """Prevents code beside a downloaded model from being run by RULER, which trusts it, and other lengths than the model's."""
    text = "One of the special magic numbers for loud-mouth is 8493. "
    (tmp_path / "text.txt").write_text("\n".join(grammar_sentences(200, seed=0)) + text)
    file = train_tokenizer(tmp_path / "text.txt", vocab_size=400, out=tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=START_TEXT)
    theirs.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    own = OwnCoder(load_tokenizer(str(file)))
    for i, coder in enumerate((HuggingFaceCoder(theirs, where="here"), own, Bigram())):
        folder = tmp_path / str(i)
        assert tokenizer_of(coder, folder) == str(folder)
        assert "evil" not in "".join(path.read_text() for path in folder.iterdir())
        copy = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert len(copy(text, add_special_tokens=False).input_ids) == len(coder.encode(text))


@pytest.fixture
def babi(tmp_path: Path) -> LocalData:
    """12 stories of two to thirteen facts, and a book."""
    rooms = ["garden", "kitchen", "office"]
    rows = []
    for n in range(2, 14):
        facts = [f"Mary went to the {rooms[(n + i) % 3]}." for i in range(n)]
        rows.append({"facts": facts, "question": "Where is Mary?", "answer": rooms[(n + n - 1) % 3], "support": [n - 1]})
    (tmp_path / "qa1_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "book.txt").write_text(" ".join(grammar_sentences(400, seed=2)))
    return LocalData(facts=str(tmp_path), books=str(tmp_path / "book.txt"))


BABILONG = str(THEIRS / "babilong/babilong_qa1.yaml")


@pytest.mark.parametrize(("length", "room"), [("0k", 0), ("2k", 1700)])
def test_babilong_mixes_local_facts_and_books(babi: LocalData, length: str, room: int) -> None:
    """Prevents rows that lack a fact, say the question twice, have another length, or depend on how many are asked."""

    def docs(limit: int) -> list[dict[str, Any]]:
        results = run_harness(Bigram(), [BABILONG], local=babi, metadata={"max_seq_lengths": length}, limit=limit)
        samples = sorted(results["samples"]["babilong_qa1"], key=lambda sample: sample["doc_id"])
        for sample in samples:
            assert sample["arguments"][0][0].endswith("\n\n{input}\n{question}".format(**sample["doc"]))
        return [sample["doc"] for sample in samples]

    found = docs(12)
    assert found[:3] == docs(3)
    rows = [json.loads(line) for line in Path(str(babi.facts), "qa1_train.jsonl").read_text().splitlines()]
    told = {tuple(row["facts"]): (row["question"], row["answer"]) for row in rows}
    book, fact = Path(str(babi.books)).read_text(), re.compile(r"Mary went to the \w+\.")
    for doc in found:
        assert (doc["question"], doc["target"]) == told.pop(tuple(fact.findall(doc["input"])))
        background = fact.sub("\n", doc["input"]).strip()
        assert bool(background) == bool(room)
        assert all(sentence.strip() in book for sentence in re.findall(r"[^.?!\n]+[.?!]?", background))
        assert not room or room - 2 <= len(doc["input"].encode()) <= room


@pytest.mark.parametrize(
    ("name", "given", "length", "message"),
    [
        ("piqa", {"essays"}, "0k", "no task reads essays: essays are for RULER's"),
        ("babilong_qa1", {"books"}, "0k", "give their folder, too: facts=FOLDER"),
        ("babilong_qa1", {"facts"}, "4k", "with books=... one such as 4k; got '4k' and no books"),
        ("babilong_qa1", {"facts", "books"}, "4096", "0k, the facts alone, or with books=... one such as 4k; got '4096'"),
        (
            "babilong_qa2",
            {"facts"},
            "0k",
            r"task '.*qa2\.yaml' cannot be loaded: cannot read the facts file '.*qa2_train\.jsonl'",
        ),
        ("babilong_qa6", {"facts"}, "0k", "babilong_qa1 to babilong_qa5 can be made"),
        ("babilong_qa11", {"facts"}, "0k", "babilong_qa1 to babilong_qa5 can be made"),
    ],
)
def test_local_files_that_cannot_be_used(babi: LocalData, name: str, given: set[str], length: str, message: str) -> None:
    """Prevents files that are taken for read, and other rows than were asked for."""
    paths = babi._replace(essays=babi.books)._asdict()
    local = LocalData(**{key: path for key, path in paths.items() if key in given})
    path = piqa_task(Tasks(Path(str(babi.facts)))) if name == "piqa" else str(THEIRS / f"babilong/{name}.yaml")
    with pytest.raises(ValueError, match=message):
        run_harness(Bigram(), [path], local=local, metadata={"max_seq_lengths": length})


def test_progress_counts_generation_over_all_groups(task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that starts again for every kind of stop tells nothing."""
    monkeypatch.setattr(harness, "AT_ONCE", 2)
    rows = [{"say": f"turn {i}", "want": "x"} for i in range(3)]
    paths = [task(name, rows, **GENERATE, generation_kwargs={"until": [name]}) for name in ("one", "two")]
    seen: list[tuple[int, int]] = []
    run_harness(Bigram(), paths, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]


def test_no_chat_template_is_pretended() -> None:
    """A base model has none; the harness then says so instead of sending an empty one."""
    with pytest.raises(NotImplementedError):
        HarnessModel(Bigram()).apply_chat_template([])


def test_everything_else_runs_without_the_harness() -> None:
    """It is optional, and takes seconds to import; where it is missing, "No module named lm_eval" does not say what to install."""
    code = """
import sys
sys.modules["lm_eval"] = None  # as if it were not installed
import recollect.evaluation.choices, recollect.evaluation.lambada, recollect.evaluation.suites
try:
    import recollect.evaluation.harness
except ImportError as error:
    assert 'pip install "recollect[eval]"' in str(error), error
else:
    raise AssertionError
"""
    assert "recollect" in modules_after(code)
