"""Evaluations from end to end: what is asked, kept, summed and shown. What a model scores that knows or guesses is in `test_floors`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.data.tokenizer import ByteTokenizer
from recollect.evaluation import report
from recollect.evaluation.language_model import LanguageModel
from recollect.evaluation.loading import OwnCoder, load_language_model
from recollect.evaluation.report import figure, table
from recollect.evaluation.report.summary import lines, with_margins
from recollect.evaluation.runner import evaluate
from recollect.evaluation.suites import SUITES, Item, Result, Suite, build_suite
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.training.folder import locked

ROWS = {
    "lambada": [{"text": f"the quick brown fox {i} jumps over the lazy dog"} for i in range(6)],
    "commonsense": [
        {"query": f"Question: what is {i}?\nAnswer:", "choices": ["a thing", "a number", "nothing"], "gold": i % 3}
        for i in range(9)
    ],
    "perplexity": [{"text": "It was a dark and stormy night. " * 9}, {"text": "Call me. " * 40}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ruler": {"only": ("niah_single_1", "niah_multikey_1"), "lengths": (1024, 1500), "n": 3},
    "needles": {"needles": (1, 3), "lengths": (1024,), "depths": (0, 100), "n": 2},
    "babilong": {"qa": (1, 5), "lengths": (0,), "n": 3},
    "clutrr": {"k": (2, 4), "n": 3},
    "recall": {"slices": ("16x2", "32x4"), "n": 3},
    "find-block": {"blocks": (2, 3), "n": 3},
}


def suite_of(name: str, folder: Path) -> Suite:
    """Each suite at a size of seconds."""
    options = dict(OPTIONS.get(name, {}))
    if name in ROWS:
        file = folder / f"{'arc_easy' if name == 'commonsense' else name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        options["data"] = (str(file),)
    return build_suite(name, **options)


@pytest.mark.parametrize("name", sorted({*SUITES} - {*ROWS}))
def test_a_suite_asks_a_model_of_bytes_by_its_defaults(name: str) -> None:
    """Prevents a command that refuses to run as the documentation has it."""
    suite = build_suite(name)
    assert dataclasses.replace(suite, n=1).items(tiny(symbols=SYMBOLS.get(name, 257)))


SYMBOLS = {"recall": 128, "find-block": 32}  # suites of models that read no text: their vocabularies


def tiny(*, context: int | None = None, symbols: int = 257) -> LanguageModel:
    config = RecollectConfig(vocab_size=symbols, hidden_size=16, num_attention_heads=2, layers=["gated_delta_net"], mlp=False)
    return LanguageModel(RecollectForCausalLM(config), OwnCoder(ByteTokenizer()), max_length=context)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_suite_runs_and_reports(name: str, tmp_path: Path) -> None:
    """Prevents a suite that no model can be asked, or whose results cannot be shown."""
    suite = suite_of(name, tmp_path)
    model = tiny(symbols=SYMBOLS.get(name, 257))
    done = evaluate(model, suite, tmp_path / "out", about={"path": "tiny"})
    report.write(tmp_path / "out", suite, done.results, command="recollect evaluate tiny <b>")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<span>evaluate</span> <span>tiny</span> <span>&lt;b&gt;</span>" in page
    assert "<script" not in page
    assert (tmp_path / "out" / "figure.png").stat().st_size > 1000
    assert suite.metrics[0].name in (tmp_path / "out" / "table.txt").read_text()
    assert (tmp_path / "out" / "table.md").read_text().startswith("| ")
    assert done.n_asked == len(suite.items(model))


@pytest.mark.parametrize("name", SYMBOLS)
def test_symbols_are_scored_as_their_task_does(name: str, tmp_path: Path) -> None:
    """Prevents labels of another example, a shifted prediction, and a model of other symbols from being asked."""
    suite, model = suite_of(name, tmp_path), tiny(symbols=SYMBOLS[name])
    done = evaluate(model, suite, tmp_path / "out", about={})
    expected = []
    for item in suite.items(model):
        _, task, inputs, labels = item.ask
        with torch.no_grad():
            said = model.model(input_ids=inputs[None]).logits.argmax(-1)
        expected.append(float(task.correct(said, labels[None])[0]))
    assert [result.values["score"] for result in done.results] == expected
    model.batch_tokens = 40  # one or two rows
    assert evaluate(model, suite, tmp_path / "smaller", about={}).results == done.results
    assert all(result.group["state_bytes"] > 0 for result in done.results)
    if name == "find-block":  # recall takes the model's own vocabulary
        with pytest.raises(ValueError, match="the model has 257 symbols"):
            suite.items(tiny())


def test_a_model_of_symbols_is_told_from_one_of_text(tmp_path: Path) -> None:
    """Prevents text from being asked of a model that was trained on recall, and that model from being refused altogether."""
    tiny(symbols=128).model.save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path))
    assert evaluate(model, suite_of("recall", tmp_path), tmp_path / "out", about={}).n_asked == 6
    with pytest.raises(ValueError, match="has 128 symbols and no tokenizer beside it"):
        suite_of("babilong", tmp_path).answer(model, [Item("x", ({}, *_a_question()))])


def _a_question() -> tuple[Any, Any]:
    (item,) = build_suite("babilong", qa="1", lengths="0", n=1).items(tiny())
    return item.ask[1], item.ask[2]


@pytest.mark.parametrize("context", [None, 64])
def test_perplexity_is_that_of_a_plain_loop(context: int | None, tmp_path: Path) -> None:
    """Prevents stretches of positions that overlap, leave tokens out, or count bytes twice."""
    suite = build_suite("perplexity", data=str(_write(tmp_path, ROWS["perplexity"])), positions="16,100")
    model = tiny(context=context)
    done = evaluate(model, suite, tmp_path / "out", about={})
    texts = [row["text"] for row in ROWS["perplexity"]]
    expected = [model.rolling([text])[0] for text in texts]
    all_of = lines(suite, done.results)[-1]
    n_bytes = sum(len(text) for text in texts)
    nats = -sum(each.log_prob for each in expected)
    assert all_of.cells[0].value == pytest.approx(nats / n_bytes / math.log(2))
    assert all_of.cells[1].value == pytest.approx(math.exp(nats / n_bytes))
    positions = ["0-16", "16-100", *(["100-"] if context is None else [])]  # a window of 64 tokens has no others
    assert [line.group["position"] for line in lines(suite, done.results, by=["position"])[:-1]] == positions


def test_every_dimension_is_summed_by_itself_and_drawn(tmp_path: Path) -> None:
    """Prevents a table of pairs only, where the papers give one number per needle count; and panels that are left out of a picture."""
    suite = build_suite("needles", needles="1,2,3,4,5,6,7", lengths="1024,1100", depths="0,100", n=1)
    results = [
        Result({"needles": n, "length": size, "depth": depth}, {"score": float(n > 3)}, {})
        for n in range(1, 8)
        for size in (1024, 1100)
        for depth in (0, 100)
    ]
    found = with_margins(suite, results)
    assert [line.group for line in found[28:-1]] == [
        *({"needles": n} for n in range(1, 8)),
        *({"length": size} for size in (1024, 1100)),
        *({"depth": depth} for depth in (0, 100)),
    ]
    assert [line.cells[0].value for line in found[28:35]] == [0, 0, 0, 1, 1, 1, 1]
    assert table.cells(suite, found, found[28])[:4] == ["1", "all", "all", "4"]
    assert table.cells(suite, found, found[-1])[:4] == ["all", "", "", "28"]
    assert sum(bool(panel.images) for panel in figure.draw(suite, results, "x").axes) == 7


def test_positions_are_drawn_as_curves() -> None:
    """Prevents a bar for every pair of domain and position: a line per domain, and one of all."""
    suite = build_suite("perplexity", data="x")
    results = [
        Result({"domain": domain, "position": position}, {"log_prob": -1.0 - i, "n_tokens": 1, "n_bytes": 1}, {})
        for domain in ("book", "web")
        for i, position in enumerate(("0-256", "256-1,024"))
    ]
    (panel,) = figure.draw(suite, results, "x").axes
    assert [line.get_label() for line in panel.lines] == ["book", "web", "all"]
    assert list(panel.lines[2].get_ydata()) == pytest.approx([1 / math.log(2), 2 / math.log(2)])


def test_the_end_of_a_book_is_read_alone(tmp_path: Path) -> None:
    """Prevents a model from being asked about the text that it was trained on, where its end was held out."""
    text = "It was a dark and stormy night. " * 9
    (tmp_path / "whole.txt").write_text(text)
    (tmp_path / "end.txt").write_text(text[-50:])
    model, found = tiny(), []
    for name, options in (("whole", {"tokens": 50, "ends": True}), ("end", {})):
        suite = build_suite("perplexity", data=str(tmp_path / f"{name}.txt"), **options)
        (line,) = lines(suite, evaluate(model, suite, tmp_path / name, about={}).results)
        found.append(line.cells[0].value)
    assert found[0] == pytest.approx(found[1])
    with pytest.raises(ValueError, match="say how many"):
        build_suite("perplexity", data="x", ends=True)


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Breaking(LanguageModel):
    """Fails at its third batch."""

    n_batches = 0

    def generate(self, prompts: Sequence[str], max_new_tokens: int, until: Sequence[str] = (), **options: Any) -> list[str]:
        self.n_batches += 1
        if self.n_batches == 3:
            raise KeyboardInterrupt
        return super().generate(prompts, max_new_tokens, until, **options)


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    """Prevents finished rows from being lost, asked again, or duplicated; also where a crash has cut the last line off."""
    suite = build_suite("babilong", qa="1", lengths="0", n=10)
    whole = evaluate(tiny(), suite, tmp_path / "whole", about={}, at_once=2)
    broken = tiny()
    broken.model.load_state_dict(tiny_weights())
    model = tiny()
    model.model.load_state_dict(broken.model.state_dict())
    breaking = tiny()
    breaking.model.load_state_dict(broken.model.state_dict())
    breaking.__class__ = Breaking
    with pytest.raises(KeyboardInterrupt):
        evaluate(breaking, suite, tmp_path / "out", about={}, at_once=2)
    with open(tmp_path / "out" / "rows.jsonl", "a") as file:
        file.write('{"id": "qa=1,le')
    done = evaluate(model, suite, tmp_path / "out", about={}, at_once=3)
    assert (done.n_kept, done.n_asked) == (4, 6)
    rows = [json.loads(line)["id"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 10
    assert [result.shown["prompt"] for result in done.results] == [result.shown["prompt"] for result in whole.results]


def tiny_weights() -> dict[str, Any]:
    return dict(tiny().model.state_dict())


@pytest.mark.parametrize("name", SYMBOLS)
def test_symbols_of_a_diverged_model_are_refused(name: str, tmp_path: Path) -> None:
    """Prevents an accuracy of 0 % that is none: the likeliest of NaNs is the first symbol."""
    suite, model = suite_of(name, tmp_path), tiny(symbols=SYMBOLS[name])
    torch.nn.init.constant_(model.model.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, suite, tmp_path / "out", about={})


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    """Prevents a corrected command from being told that the folder holds another evaluation."""
    wrong = build_suite("babilong", qa="1", lengths="0,512", n=2)
    with pytest.raises(ValueError, match="longer than the 300 tokens"):
        evaluate(tiny(context=300), wrong, tmp_path / "out", about={})
    assert not (tmp_path / "out").exists()
    suite = build_suite("babilong", qa="1", lengths="0", n=2)
    broken = tiny()
    torch.nn.init.constant_(broken.model.lm_head.weight, math.nan)  # is found when it answers
    with pytest.raises(ValueError, match="not finite"):
        evaluate(broken, suite, tmp_path / "out", about={})
    assert not (tmp_path / "out").exists()
    assert evaluate(tiny(), suite, tmp_path / "out", about={}).n_asked == 2
    with pytest.raises(ValueError, match="holds another evaluation"):
        evaluate(broken, suite, tmp_path / "out", about={})
    assert (tmp_path / "out" / "rows.jsonl").exists()


def test_a_token_before_every_text_does_not_shorten_stories(tmp_path: Path) -> None:
    """Prevents texts that fall short of their length by a token per sentence, each of which is measured by itself."""
    (item,) = build_suite("babilong", qa="1", lengths="3000", n=1, examples=False).items(tiny())
    prompt = item.ask[2].prompt
    assert 2700 - 120 < len(prompt.encode()) <= 3000
    without = item.ask[1].sample(1, seed=0, measure=lambda text: len(text.encode()))[0]
    assert without.prompt == prompt


def test_every_long_document_is_kept_as_soon_as_it_is_read(tmp_path: Path) -> None:
    """Prevents hours of reading books from being lost with the one that was interrupted."""

    class Stopped(LanguageModel):
        n_read = 0

        def log_probs(self, *given: Any, **options: Any) -> Any:
            self.n_read += 1
            if self.n_read == 3:
                raise KeyboardInterrupt
            return super().log_probs(*given, **options)

    suite = build_suite("perplexity", data=str(_write(tmp_path, [{"text": f"Call me {i}. " * 4} for i in range(5)])))
    model = tiny()
    model.__class__ = Stopped
    model.batch_tokens = 16
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, suite, tmp_path / "out", about={})
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("context", [None, 32])
def test_documents_that_are_read_together_give_the_rows_of_each(context: int | None, tmp_path: Path) -> None:
    """Prevents documents of one batch from being mixed up, rows in another order, and documents left out when a run goes on."""
    words = "It was a dark and stormy night; the rain fell in torrents. " * 9
    data = _write(tmp_path, [{"text": words[i : i + n]} for i, n in enumerate((9, 400, 3, 80, 80, 200, 1, 33))])
    suite = build_suite("perplexity", data=str(data), positions="16,100", overlap=5 if context else 0)
    model = tiny(context=context)
    model.model.double()
    alone = evaluate(model, suite, tmp_path / "alone", about={}, at_once=1)
    n_done: list[int] = []
    evaluate(model, suite, tmp_path / "together", about={}, limit=2)
    together = evaluate(model, suite, tmp_path / "together", about={}, progress=lambda done, total: n_done.append(done))
    assert n_done == [2, 8]
    for one, other in zip(alone.results, together.results, strict=True):
        assert one._replace(values={}, guess=None) == other._replace(values={}, guess=None)
        assert one.values == pytest.approx(other.values, rel=1e-12)
    ids = [[json.loads(line)["id"] for line in (run.out / "rows.jsonl").open()] for run in (alone, together)]
    assert ids[0] == ids[1] == [item.id for item in suite.items(model)]
    model.batch_tokens = 60  # 240 bytes: documents end at 9, 409, 412, 492, 572, 772, 773 and 806
    assert [len(batch) for batch in suite.batches(model, suite.items(model))] == [1, 2, 2, 3]


def test_a_folder_that_has_changed_is_another_evaluation(tmp_path: Path) -> None:
    """Prevents rows over two versions of the background from being one result."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("It was a dark night. " * 99)
    suite = build_suite("babilong", background=str(tmp_path / "books"))
    before = suite.fingerprint()
    assert suite.fingerprint() == before
    (tmp_path / "books" / "one.txt").write_text("It was a bright day. " * 99)
    assert suite.fingerprint() != before


@pytest.mark.parametrize(("symbols", "pairs"), [(128, [4, 8, 16, 32]), (256, [4, 8, 16, 32, 64])])
def test_recall_asks_what_the_model_has_symbols_for(symbols: int, pairs: list[int]) -> None:
    """Prevents a default that fails on the default model of `recollect compare recall`."""
    found = build_suite("recall", n=1).items(tiny(symbols=symbols))
    assert [item.ask[0]["pairs"] for item in found] == pairs


def test_bytes_of_state_are_shown_even_where_all_are_alike(tmp_path: Path) -> None:
    """Prevents a table of recall without what the pairs had to fit into: a memory's state does not grow."""
    suite, model = build_suite("recall", slices="16x2,32x2", n=1), tiny(symbols=128)
    found = lines(suite, evaluate(model, suite, tmp_path / "out", about={}).results)
    assert [line.group["state_bytes"] > 0 for line in found[:2]] == [True, True]


def test_a_folder_of_questions_is_read(tmp_path: Path) -> None:
    """Prevents "--data FOLDER", which the command promises, from ending in "Is a directory"."""
    for name in ("lambada", "commonsense"):
        (tmp_path / name).mkdir()
        suite_of(name, tmp_path / name)
        whole = build_suite(name, data=str(tmp_path / name))
        assert len(whole.items(tiny())) == len(ROWS[name])
        assert whole.fingerprint()["data"][0][0].endswith(".jsonl")


def test_a_limit_can_be_raised_later(tmp_path: Path) -> None:
    """Prevents a first look at ten questions from having to be thrown away."""
    suite, model = build_suite("babilong", qa="1", lengths="0", n=6), tiny()
    assert evaluate(model, suite, tmp_path, about={}, limit=2).n_asked == 2
    done = evaluate(model, suite, tmp_path, about={})
    assert (done.n_kept, done.n_asked, len(done.results)) == (2, 4, 6)


def test_a_folder_is_of_one_evaluation(tmp_path: Path) -> None:
    """Prevents answers of another model, suite or option from being taken for this one's."""
    suite, model = build_suite("babilong", qa="1", lengths="0", n=2), tiny()
    evaluate(model, suite, tmp_path / "out", about={})
    with pytest.raises(ValueError, match="holds another evaluation"):
        evaluate(model, build_suite("babilong", qa="1", lengths="0", n=3), tmp_path / "out", about={})
    other = tiny()
    with pytest.raises(ValueError, match=r"model\.weights"):
        evaluate(other, suite, tmp_path / "out", about={})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        evaluate(model, suite, tmp_path / "mine", about={})
    with locked(tmp_path / "out"), pytest.raises(Exception, match="in use by another"):
        evaluate(model, suite, tmp_path / "out", about={})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rulr", {}, "unknown suite 'rulr'; did you mean 'ruler'"),
        ("ruler", {"lenghts": "5"}, "no option 'lenghts'; did you mean 'lengths'"),
        ("ruler", {"lengths": "a,b"}, "lengths is a list, each a whole number.*'a,b'"),
        ("ruler", {"n": "abc"}, "n is a whole number; got 'abc'"),
        ("ruler", {"n": True}, "n is a whole number; got True"),
        ("babilong", {"examples": 3}, "examples is true or false; got 3"),
        ("perplexity", {"data": "x", "positions": None}, "positions is a list"),
        ("ruler", {"only": "niah"}, "RULER has no needle task 'niah'"),
        ("ruler", {"n": 0}, "n is at least 1"),
        ("perplexity", {}, "needs data: give --option data="),
        ("perplexity", {"data": "x", "positions": "5,3"}, "ascending"),
        ("commonsense", {"data": "x", "shots": -1}, "shots is 0 or more"),
    ],
)
def test_a_wrong_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    """Prevents a misspelt option from being ignored and a wrong value from failing after the model is loaded."""
    with pytest.raises(ValueError, match=message):
        build_suite(name, **options)


def test_files_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    """Prevents a traceback from a missing file, a line that is no JSON, or a row of another data set."""
    model = tiny()
    (tmp_path / "piqa_bad.jsonl").write_text('{"goal": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a b"}\n{oops\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, file, message in (
        ("lambada", "missing.jsonl", "no such file"),
        ("lambada", "broken.jsonl", "line 2 is no JSON"),
        ("lambada", "empty.jsonl", "is empty"),
        ("commonsense", "piqa_bad.jsonl", "row 1"),
        ("commonsense", "broken.jsonl", "which data set is"),
    ):
        with pytest.raises(ValueError, match=message):
            build_suite(name, data=(str(tmp_path / file),)).items(model)
    rows = [{"question": "?", "subject": f"s{i}", "choices": ["a", "b", "c", "d"], "answer": 0} for i in range(3)]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(build_suite("commonsense", data=(str(tmp_path / "mmlu.jsonl"),)).items(model)) == 3
    with pytest.raises(ValueError, match="here are s1, s2: give a file for each"):
        build_suite("commonsense", data=(str(tmp_path / "mmlu.jsonl"),), shots=1).items(model)
    with pytest.raises(ValueError, match="longer than the 100 tokens that the model may see"):
        build_suite("ruler", only="niah_single_1", lengths="512").items(tiny(context=100))
    for name, options in (("babilong", {"qa": "2", "lengths": "0"}), ("clutrr", {"k": "10"})):  # texts of no given length
        with pytest.raises(ValueError, match=r"question 0 of .*with room for its answer, is longer than the 100 tokens"):
            build_suite(name, n=1, **options).items(tiny(context=100))


def test_groups_are_told_apart_and_summed() -> None:
    """Prevents a line that mixes groups, or a total that weighs groups instead of examples."""

    class Given(Suite):
        name = "given"
        metrics = SUITES["ruler"].metrics
        dimensions = ("a", "b")

        def items(self, model: LanguageModel) -> list[Item]:
            raise NotImplementedError

        def answer(self, model: LanguageModel, items: Sequence[Item]) -> list[list[Result]]:
            raise NotImplementedError

    results = [Result({"a": a, "b": 1}, {"score": score}, {}) for a, score in (("x", 1.0), ("x", 0.0), ("x", 0.0), ("y", 1.0))]
    found = lines(Given(), results)
    assert [(line.group, line.n, line.cells[0].value) for line in found] == [
        ({"a": "x"}, 3, pytest.approx(1 / 3)),
        ({"a": "y"}, 1, 1.0),
        ({}, 4, 0.5),
    ]


def test_a_word_of_no_probability_makes_the_perplexity_infinite() -> None:
    """Prevents an OverflowError at the end of a long evaluation."""
    metric = SUITES["lambada"].metrics[1]
    assert metric.compute([{"log_prob": -1e6, "n_tokens": 1.0}]) == math.inf
    assert metric.compute([{"log_prob": math.log(0.5), "n_tokens": 1.0}, {"log_prob": math.log(0.125), "n_tokens": 1.0}]) == (
        pytest.approx(4.0)
    )
