"""Multiple choice against OLMo's literal requests, against numpy, and by hand. Against the harness itself: test_harness.py."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.evaluation.choices import (
    DATASETS,
    WORDINGS,
    Choice,
    Picked,
    Wording,
    few_shot,
    pick,
    to_choice,
    to_choices,
)

RealData = Callable[[str], Path]


def mean_pick(choices: Sequence[Choice], log_probs: Sequence[Sequence[float]]) -> Picked:
    """Mean of `pick` over questions."""
    picks = [pick(choice, values) for choice, values in zip(choices, log_probs, strict=True)]
    return Picked(*(statistics.fmean(column) for column in zip(*picks, strict=True)))


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reference(path: Path) -> list[tuple[dict[str, Any], list[tuple[str, str]], int]]:
    """(doc, its pairs in order, gold) of every question whose requests are all in the file."""
    requests = defaultdict(list)
    for request in load(path):
        assert request["idx"] == len(requests[request["doc_id"]])
        requests[request["doc_id"]].append(request)
    whole = max(map(len, requests.values()))
    return [
        (group[0]["doc"], [(each["request"]["context"], each["request"]["continuation"]) for each in group], group[0]["label"])
        for group in requests.values()
        if len(group) == whole
    ]


# File of requests, data set, conventions that must give them, local file that its few-shot examples are from.
REFERENCES = [
    ("arc_challenge_rc_0shot", "arc_challenge", ("harness", "oe_eval"), None),
    ("arc_easy_rc_0shot", "arc_easy", ("harness", "oe_eval"), None),
    ("boolq_rc_5shot", "boolq", ("oe_eval",), "boolq_train"),
    ("piqa_mc_5shot", "piqa", ("oe_eval_letters",), "piqa_train"),
    ("socialiqa_rc_0shot", "social_iqa", ("oe_eval",), None),
    ("winogrande_rc_5shot", "winogrande", ("harness", "oe_eval"), "winogrande_train"),
]


@pytest.mark.parametrize(
    ("file", "dataset", "convention", "pool"),
    [(file, dataset, each, pool) for file, dataset, conventions, pool in REFERENCES for each in conventions],
)
def test_pairs_equal_olmos_requests(real_data: RealData, file: str, dataset: str, convention: str, pool: str | None) -> None:
    """A character more or less (a blank, a line end, a question mark) moves accuracies by whole points."""
    questions = reference(real_data(f"mc/_reference_requests/{file}.jsonl"))
    assert len(questions) >= 3
    shots = ""
    if pool:
        bare = to_choice(questions[0][0], dataset, convention=convention).contexts[0]
        assert questions[0][1][0][0].endswith(bare)
        shots = questions[0][1][0][0].removesuffix(bare)
        assert shots.endswith("\n\n")
    for doc, pairs, gold in questions:
        choice = to_choice(doc, dataset, convention=convention, shots=shots)
        assert list(choice.pairs) == pairs
        assert choice.gold == gold


@pytest.mark.parametrize(("file", "dataset", "convention", "pool"), [(f, d, c[0], p) for f, d, c, p in REFERENCES if p])
def test_few_shot_equals_olmos_examples(real_data: RealData, file: str, dataset: str, convention: str, pool: str) -> None:
    """Examples joined by one line end instead of two, or without their answer, are another prompt."""
    doc, pairs, _ = reference(real_data(f"mc/_reference_requests/{file}.jsonl"))[0]
    shots = pairs[0][0].removesuffix(to_choice(doc, dataset, convention=convention).contexts[0])
    examples = to_choices(load(real_data(f"mc/{pool}.jsonl")), dataset, convention=convention)
    found = {shots.index(text): each for each in examples if (text := few_shot([each])) in shots}
    assert len(found) == 5
    assert few_shot(found[at] for at in sorted(found)) == shots


def test_the_harness_differs_from_olmo_where_the_table_says_so(real_data: RealData) -> None:
    """The differences that the module's table names are all there are on these requests."""
    doc, pairs, _ = reference(real_data("mc/_reference_requests/boolq_rc_5shot.jsonl"))[0]
    harness = to_choice(doc, "boolq")
    assert harness.continuations == (" no", " yes") == tuple(reversed([continuation for _, continuation in pairs]))
    assert harness.continuations[harness.gold] == " yes"
    assert pairs[0][0].endswith(harness.contexts[0])
    for file, dataset, before, after in [
        ("socialiqa_rc_0shot", "social_iqa", ("Question: ", "\nAnswer:"), ("Q: ", "\nA:")),
        ("piqa_mc_5shot", "piqa", ("Goal: ", "\nAnswer:"), ("Question: ", "\nAnswer:")),
    ]:
        doc, _, gold = reference(real_data(f"mc/_reference_requests/{file}.jsonl"))[0]
        theirs, ours = to_choice(doc, dataset, convention="oe_eval"), to_choice(doc, dataset)
        assert ours.continuations == theirs.continuations
        assert ours.gold == theirs.gold == gold
        text = theirs.contexts[0].removeprefix(before[0]).removesuffix(before[1])
        assert ours.contexts[0] == after[0] + text + after[1]


@pytest.mark.parametrize(
    ("file", "dataset", "n_options"),
    [
        ("arc_challenge_train", "arc_challenge", {3, 4, 5}),
        ("arc_easy_train", "arc_easy", {3, 4, 5}),
        ("boolq_train", "boolq", {2}),
        ("hellaswag_val_half", "hellaswag", {4}),
        ("openbookqa_train", "openbookqa", {4}),
        ("piqa_train", "piqa", {2}),
        ("siqa_dev_half", "social_iqa", {3}),
        ("winogrande_train", "winogrande", {2}),
    ],
)
@pytest.mark.parametrize("convention", ["harness", "oe_eval"])
def test_every_row_of_the_local_files_is_understood(
    real_data: RealData, file: str, dataset: str, n_options: set[int], convention: str
) -> None:
    """One odd row must not end an evaluation of forty thousand; a prompt must not lose its question."""
    rows = load(real_data(f"mc/{file}.jsonl"))
    choices = to_choices(rows, dataset, convention=convention)
    assert {len(choice.pairs) for choice in choices} <= n_options
    for row, choice in zip(rows, choices, strict=True):
        assert all(continuation.startswith(" ") for continuation in choice.continuations)
        if dataset == "winogrande":
            filled = row["sentence"].replace("_", row["choices"][row["gold"]])
            context, continuation = choice.pairs[choice.gold]
            assert (context + continuation).split() == filled.split() or "_ " not in row["sentence"]
        else:
            assert choice.continuations[choice.gold] == " " + row["choices"][row["gold"]]
            if convention == "oe_eval" and dataset != "hellaswag":
                assert choice.contexts[0] == row["query"]


def test_a_local_hellaswag_query_gets_the_harnesss_capital(real_data: RealData) -> None:
    """Without it a third of the local prompts differ from the harness's in one letter."""
    rows = load(real_data("mc/hellaswag_val_half.jsonl"))
    changed = 0
    for row, choice in zip(rows, to_choices(rows, "hellaswag"), strict=True):
        context = choice.contexts[0]
        if context != row["query"]:
            changed += 1
            assert context.lower() == row["query"].lower()
            assert not row["query"].endswith((".", "!", "?"))
            assert context[context.rindex(". ") + 2 if ". " in context else 0].isupper()
    assert 0.2 < changed / len(rows) < 0.5


LOCAL = {
    "arc_easy": {"query": "Question: Which is wet?\nAnswer:", "choices": ["sand", "rain"], "gold": 1},
    "boolq": {"query": "Soap -- Soap foams.\nQuestion: does soap foam?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
    "hellaswag": {"query": "Rowing: A man sits down. the man", "choices": ["rows.", "sings."], "gold": 0},
    "openbookqa": {"query": "Question: Ice is\nAnswer:", "choices": ["cold", "hot"], "gold": 0},
    "piqa": {"query": "Goal: Open a jar\nAnswer:", "choices": ["Twist it", "Eat it"], "gold": 0},
    "social_iqa": {"query": "Question: Ann fell. How is Ann?\nAnswer:", "choices": ["sore", "rich", "far"], "gold": 0},
    "winogrande": {"sentence": "Ann paid Bea because _ owed her.", "choices": ["Ann", "Bea"], "gold": 0},
}
PUBLISHED = {
    "arc_easy": {
        "id": "x1",
        "question": "Which is wet?",
        "choices": {"text": ["sand", "rain"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "boolq": {"passage": "Soap -- Soap foams.", "question": "does soap foam", "label": 1, "idx": 7},
    "hellaswag": {
        "activity_label": "Rowing",
        "ctx_a": "A man sits down.",
        "ctx_b": "the man",
        "endings": ["rows.", "sings."],
        "label": "0",
    },
    "openbookqa": {"question_stem": "Ice is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "A"},
    "piqa": {"goal": "Open a jar", "sol1": "Twist it", "sol2": "Eat it", "label": 0},
    "social_iqa": {
        "context": "Ann fell.",
        "question": "How is Ann?",
        "answerA": "sore",
        "answerB": "rich",
        "answerC": "far",
        "label": "1",
    },
    "winogrande": {"sentence": "Ann paid Bea because _ owed her.", "option1": "Ann", "option2": "Bea", "answer": "1"},
}


MMLU = {
    "question": " Which is wet?\n",
    "subject": "high_school_physics",
    "choices": ["sand", "rain", "a stone", "fire"],
    "answer": 1,
}


def test_mmlu_names_its_subject_once() -> None:
    """Prevents the subject from being said again before every solved example, and letters that are no answers."""
    choice = to_choice(MMLU, "mmlu")
    heading = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    question = "Which is wet?\nA. sand\nB. rain\nC. a stone\nD. fire\nAnswer:"
    assert choice.contexts == (heading + question,) * 4
    assert (choice.continuations, choice.gold) == ((" A", " B", " C", " D"), 1)
    assert to_choice(MMLU | {"answer": "B"}, "mmlu") == choice
    again = to_choice(MMLU, "mmlu", shots=few_shot([choice]))
    assert again.contexts[0] == f"{heading}{question} B\n\n{question}"


@pytest.mark.parametrize("dataset", sorted(LOCAL))
@pytest.mark.parametrize("convention", ["harness", "oe_eval"])
def test_both_forms_of_a_row_say_the_same(dataset: str, convention: str) -> None:
    """Local files and the hub's rows must not give two accuracies of one model."""
    local = to_choice(LOCAL[dataset], dataset, convention=convention)
    published = to_choice(PUBLISHED[dataset], dataset, convention=convention)
    assert set(local.pairs) == set(published.pairs)
    assert local.pairs[local.gold] == published.pairs[published.gold]
    if convention == "harness":
        assert local[:3] == published[:3]


def test_authors_files_are_read_too() -> None:
    """ARC and OpenBookQA nest the options, BoolQ keeps the title apart, in the files that their authors gave out."""
    nested = {
        "question": {"stem": "Which is wet?", "choices": [{"text": "sand", "label": "A"}, {"text": "rain", "label": "B"}]},
        "answerKey": "B",
    }
    assert to_choice(nested, "arc_easy")[:3] == to_choice(LOCAL["arc_easy"], "arc_easy")[:3]
    assert to_choice(nested, "openbookqa").contexts == ("Which is wet?",) * 2
    titled = {"title": "Soap", "passage": "Soap foams.", "question": "does soap foam", "answer": True}
    assert to_choice(titled, "boolq")[:3] == to_choice(PUBLISHED["boolq"], "boolq")[:3]


def test_winogrande_scores_what_follows_the_blank() -> None:
    """Scoring the option itself would measure how frequent a name is."""
    choice = to_choice(LOCAL["winogrande"], "winogrande")
    assert choice.pairs == (("Ann paid Bea because Ann", " owed her."), ("Ann paid Bea because Bea", " owed her."))


def test_hellaswag_loses_wikihows_marks() -> None:
    """Marks of the data set's making are no English."""
    row = {
        "activity_label": "Home",
        "ctx_a": "[header] How to mop [title] Fill a bucket. [step] Warm water is best.",
        "ctx_b": "",
        "endings": ["[substeps] Add soap.", "Pour it  out."],
        "label": "1",
    }
    choice = to_choice(row, "hellaswag")
    assert choice.contexts[0] == "Home: How to mop. Fill a bucket. Warm water is best."
    assert choice.continuations == ("  Add soap.", " Pour it out.")


@pytest.mark.parametrize(
    ("query", "context"),
    [
        ("Rowing: A man sits. the MAN", "Rowing: A man sits. The man"),
        ("Rowing: A man sits. The man rows.", "Rowing: A man sits. The man rows."),
        ("Rowing: a man", "Rowing: a man"),
    ],
)
def test_only_the_sentence_that_breaks_off_is_capitalized(query: str, context: str) -> None:
    """Python's capitalize, which the harness uses, puts the rest in lower case; it must not touch the whole query."""
    row = {"query": query, "choices": ["rows."], "gold": 0}
    assert to_choice(row, "hellaswag").contexts == (context,)


def test_letters_list_the_options_and_score_their_letters() -> None:
    """The form of OLMo's `:mc` tasks; pinned by the reference for PIQA alone."""
    choice = to_choice(LOCAL["social_iqa"], "social_iqa", convention="oe_eval_letters")
    assert choice.contexts[0] == "Question: Ann fell. How is Ann?\n A. sore\n B. rich\n C. far\nAnswer:"
    assert choice.continuations == (" A", " B", " C")


def test_a_wording_of_ones_own() -> None:
    """Prompts are data: another one needs no code. Braces in a text are text."""
    row = LOCAL["piqa"] | {"query": "Goal: {goal}\nAnswer:"}
    choice = to_choice(row, "piqa", wording=Wording("> ", "\n> ", letters="\n- "), shots="Hello. ")
    assert choice.contexts == ("Hello. > {goal}\n- A. Twist it\n- B. Eat it\n> ",) * 2
    assert choice.tags == {"dataset": "piqa", "convention": "own"}


def test_tags_name_data_set_convention_and_row() -> None:
    """A row of results that cannot be traced to its question is of no use."""
    assert to_choice(PUBLISHED["arc_easy"], "arc_easy").tags == {"dataset": "arc_easy", "convention": "harness", "id": "x1"}


@pytest.mark.parametrize(
    ("row", "dataset", "options", "message"),
    [
        (LOCAL["piqa"], "piqua", {}, "did you mean 'piqa'"),
        (LOCAL["piqa"], "piqa", {"convention": "oe-eval"}, "did you mean 'oe_eval'"),
        (LOCAL["boolq"], "boolq", {"convention": "oe_eval_letters"}, "no form of boolq"),
        (LOCAL["winogrande"], "winogrande", {"convention": "oe_eval_letters"}, "neither a wording nor letters"),
        (LOCAL["winogrande"], "winogrande", {"wording": Wording()}, "neither a wording nor letters"),
        (MMLU, "mmlu", {"convention": "oe_eval"}, "mmlu has one form"),
        (MMLU, "mmlu", {"wording": Wording()}, "mmlu has one form"),
        (MMLU | {"answer": "E"}, "mmlu", {}, "answer must be the right option, 0 to 3; got 'E'"),
        (MMLU | {"subject": None}, "mmlu", {}, "subject must be a text"),
        ({"text": "Hello"}, "piqa", {}, "neither goal nor query; its fields: text"),
        (LOCAL["arc_easy"], "piqa", {}, "begins with 'Goal: '"),
        (LOCAL["piqa"] | {"gold": 2}, "piqa", {}, "gold must be the right option, 0 to 1; got 2"),
        (LOCAL["piqa"] | {"gold": None}, "piqa", {}, "got None"),
        (PUBLISHED["piqa"] | {"label": -1}, "piqa", {}, "test set"),
        (PUBLISHED["winogrande"] | {"answer": ""}, "winogrande", {}, "answer must be the right option, 1 to 2; got ''"),
        (PUBLISHED["arc_easy"] | {"answerKey": "C"}, "arc_easy", {}, "answerKey is one of"),
        (PUBLISHED["arc_easy"] | {"choices": ["sand"]}, "arc_easy", {}, "lists text and label"),
        ({"question": {"stem": "Wet?", "choices": ["sand"]}, "answerKey": "A"}, "arc_easy", {}, "list of objects"),
        (PUBLISHED["piqa"] | {"sol2": ""}, "piqa", {}, "an option is empty"),
        (PUBLISHED["piqa"] | {"sol2": None}, "piqa", {}, "sol2 must be a text"),
        (LOCAL["piqa"] | {"choices": "ab"}, "piqa", {}, "choices must be a list of texts"),
        (LOCAL["winogrande"] | {"sentence": "No blank."}, "winogrande", {}, "has a blank"),
        (LOCAL["winogrande"] | {"sentence": "It was _"}, "winogrande", {}, "with text after it"),
    ],
)
def test_what_is_no_row_of_the_data_set_is_refused(
    row: dict[str, Any], dataset: str, options: dict[str, Any], message: str
) -> None:
    """A wrong file must not give a number; the sentence says what was wrong."""
    with pytest.raises(ValueError, match=message):
        to_choice(row, dataset, **options)


def test_an_error_says_which_row_it_was() -> None:
    """In a file of forty thousand rows nobody finds it otherwise."""
    with pytest.raises(ValueError, match="row 2: field gold"):
        to_choices([LOCAL["piqa"], LOCAL["piqa"] | {"gold": 5}], "piqa")


def test_every_data_set_has_every_convention_that_can_be() -> None:
    """A data set without a wording would be found out by a user."""
    for dataset in set(DATASETS) - {"mmlu", "winogrande"}:
        assert all(dataset in WORDINGS[convention] for convention in ("harness", "oe_eval"))


def choice_of(*options: str, gold: int = 0) -> Choice:
    return Choice(("Q:",) * len(options), tuple(f" {option}" for option in options), gold, {})


def test_pick_equals_numpys_argmax() -> None:
    """The harness's formula: argmax of the log-probabilities, over characters, over bytes; the blank is not counted."""
    generator = np.random.default_rng(0)
    words = ["a", "zoë", "日本", "a long answer", "ß", "no"]
    for options in itertools.permutations(words, 3):
        log_probs = -10 * generator.random(3)
        for gold in range(3):
            expected = [
                float(np.argmax(log_probs / lengths) == gold)
                for lengths in ([1, 1, 1], [len(o) for o in options], [len(o.encode("utf-8")) for o in options])
            ]
            assert list(pick(choice_of(*options, gold=gold), log_probs.tolist())) == expected


def test_characters_and_bytes_may_disagree() -> None:
    """`acc_norm` by bytes is another metric: three bytes a character make a text look likely."""
    choice = choice_of("日本語", "abcd", gold=0)
    assert pick(choice, [-4.0, -4.0]) == Picked(acc=1.0, acc_norm=0.0, acc_bytes=1.0)


def test_equally_likely_options_give_the_first() -> None:
    """A constant model scores the first option, as in the harness, not always the right one."""
    assert pick(choice_of("a", "b", gold=0), [-1.0, -1.0]).acc == 1
    assert pick(choice_of("a", "b", gold=1), [-1.0, -1.0]).acc == 0
    assert pick(choice_of("a", "b", gold=1), [-math.inf, -1.0]).acc == 1


@pytest.mark.parametrize("log_probs", [[-1.0], [-1.0, math.nan], []])
def test_log_probabilities_that_say_nothing_are_refused(log_probs: list[float]) -> None:
    """argmax of nan is an answer that no model gave."""
    with pytest.raises(ValueError, match="log-probability"):
        pick(choice_of("a", "b"), log_probs)


def test_guessing_scores_chance_and_knowing_scores_all(real_data: RealData) -> None:
    """A model that knows nothing must not score above the share of its options, nor one that knows all below 1."""
    choices = to_choices(load(real_data("mc/arc_easy_train.jsonl")), "arc_easy")
    generator = np.random.default_rng(1)
    guesses = mean_pick(choices, [(-generator.random(len(choice.pairs))).tolist() for choice in choices])
    chance = np.mean([1 / len(choice.pairs) for choice in choices])
    assert abs(guesses.acc - chance) < 4 * math.sqrt(chance * (1 - chance) / len(choices))
    knows = [
        [-0.01 * len(c) if i == choice.gold else -99.0 * len(c) for i, c in enumerate(choice.continuations)]
        for choice in choices
    ]
    assert mean_pick(choices, knows) == Picked(1.0, 1.0, 1.0)
