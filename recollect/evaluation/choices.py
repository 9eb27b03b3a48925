"""Multiple choice: rows of the usual data sets as texts to score, and which option a model picks.

Every option of a question is a (context, continuation) pair; the option with the likeliest continuation is the answer. How the
pair is worded is a convention. "harness", the default, is lm-evaluation-harness's; "oe_eval" is that of OLMo's evaluations. They
agree on ARC, HellaSwag and WinoGrande (where the options stand in the contexts, and only what follows the blank is scored), and
on few-shot examples. Elsewhere:

    data set      harness                              oe_eval
    boolq         options no, yes                      options yes, no (the same pairs in another order)
    openbookqa    {question}                           Question: {question}\\nAnswer:
    piqa          Question: {goal}\\nAnswer:            Goal: {goal}\\nAnswer:
    social_iqa    Q: {context} {question}\\nA:          Question: {context} {question}\\nAnswer:

"oe_eval_letters" is OLMo's other form: the options are listed under the question as " A. ...", and their letters are scored.
MMLU has the harness's form alone, which is such a one, after a sentence that names the subject.

A row is either as its data set was published (on the Hugging Face hub or by its authors), or has the fields query, choices and
gold (WinoGrande: sentence, choices, gold), its query worded as by oe_eval. Such a HellaSwag query breaks off in a sentence that
begins in lower case, where the harness writes a capital: it is restored.

Source: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/tasks; allenai/OLMo, the requests of oe-eval for ARC, BoolQ, PIQA (with
letters), Social IQa and WinoGrande. Of the rest we have the prepared queries alone.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Choice(NamedTuple):
    """A question with its options.

    contexts: what is read before each option; usually the same text.
    continuations: what is scored, one per option, each with the blank that it begins with.
    gold: index of the right one.
    tags: what is known of the question: its data set, the convention, the row's own id if it has one, "heading": what stands before
        solved examples.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    tags: dict[str, Any]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(context, continuation) of every option: what a model is asked."""
        return tuple(zip(self.contexts, self.continuations, strict=True))


class Wording(NamedTuple):
    """How a question is put, of data sets that ask one: context = before + question + after.

    letters: None: the options' texts are scored. A text: the options are listed after the question, each as that text, its letter,
        ". " and itself; their letters are scored.
    """

    before: str = ""
    after: str = ""
    letters: str | None = None


_ASKED = Wording("Question: ", "\nAnswer:")
_OE_EVAL = {
    "arc_challenge": _ASKED,
    "arc_easy": _ASKED,
    "boolq": Wording("", "\nAnswer:"),
    "hellaswag": Wording(),
    "openbookqa": _ASKED,
    "piqa": Wording("Goal: ", "\nAnswer:"),
    "social_iqa": _ASKED,
}
_HARNESS = {"openbookqa": Wording(), "piqa": _ASKED, "social_iqa": Wording("Q: ", "\nA:")}
_WITH_LETTERS = ("arc_challenge", "arc_easy", "openbookqa", "piqa", "social_iqa")

WORDINGS: dict[str, dict[str, Wording]] = {
    "harness": _OE_EVAL | _HARNESS,
    "oe_eval": _OE_EVAL,
    "oe_eval_letters": {name: _OE_EVAL[name]._replace(letters="\n ") for name in _WITH_LETTERS},
}
DATASETS = (*sorted(_OE_EVAL), "mmlu", "winogrande")


def to_choice(
    row: Row, dataset: str, *, convention: str = "harness", wording: Wording | None = None, shots: str = ""
) -> Choice:
    """The question of one row.

    Args:
        row: see the top of this module.
        dataset: one of DATASETS, named as in the harness.
        convention: one of WORDINGS.
        wording: another way to put the question, instead of the convention's; not for winogrande, which puts none, and mmlu.
        shots: text before every context, such as `few_shot` makes; it ends with what separates it from the question.
    Raises:
        ValueError: an unknown data set or convention, one that the other does not have, or a row that is not of that data set,
            has no gold answer or an empty option.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}{_hint(dataset, DATASETS)} Known: {', '.join(DATASETS)}")
    if convention not in WORDINGS:
        raise ValueError(f"unknown convention {convention!r}{_hint(convention, WORDINGS)} Known: {', '.join(WORDINGS)}")
    tags = {"dataset": dataset, "convention": convention if wording is None else "own"}
    tags |= {key: row[key] for key in ("id", "idx", "ind", "index") if key in row}
    if dataset == "winogrande":
        if wording is not None or convention == "oe_eval_letters":
            raise ValueError("winogrande fills a blank, it puts no question: it has neither a wording nor letters")
        return _fill_blank(row, shots, tags)
    if dataset == "mmlu":
        if wording is not None or convention != "harness":
            raise ValueError(
                "mmlu has one form, that of the harness: options with letters under the question, after its subject"
            )
        return _of_subject(row, shots, tags)
    if wording is None and dataset not in WORDINGS[convention]:
        raise ValueError(f"{convention} has no form of {dataset}; it has {', '.join(WORDINGS[convention])}")
    question, options, gold = _read(row, dataset)
    if dataset == "boolq" and options == ("yes", "no") and convention == "harness":
        options, gold = ("no", "yes"), 1 - gold
    return _worded(
        _Question(question, options, gold), WORDINGS[convention][dataset] if wording is None else wording, shots, tags
    )


def to_choices(rows: Iterable[Row], dataset: str, **options: Any) -> list[Choice]:
    """`to_choice` of every row, with the same options; an error says which row it was.

    Raises:
        ValueError: see `to_choice`.
    """
    choices = []
    for number, row in enumerate(rows, 1):
        try:
            choices.append(to_choice(row, dataset, **options))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    return choices


def few_shot(examples: Iterable[Choice]) -> str:
    """Solved examples (which have no shots themselves) as the text before a question: both conventions separate them alike."""
    solved = (
        each.contexts[each.gold].removeprefix(each.tags.get("heading", "")) + each.continuations[each.gold] for each in examples
    )
    return "".join(f"{each}\n\n" for each in solved)


class Picked(NamedTuple):
    """Whether the right option was the likeliest, 1 or 0 (of several questions: the mean).

    acc: by the continuation's log-probability; acc_norm: by that per character of the option; acc_bytes: per UTF-8 byte. The
    blank that a continuation begins with is not counted.
    """

    acc: float
    acc_norm: float
    acc_bytes: float


def pick(choice: Choice, log_probs: Sequence[float]) -> Picked:
    """Score one question; of equally likely options the first is picked.

    Args:
        choice: the question.
        log_probs: of each continuation after its context, in nats; -inf is allowed.
    Raises:
        ValueError: another number of log-probabilities than options, or one that is not a number.
    """
    if len(log_probs) != len(choice.continuations):
        raise ValueError(f"need a log-probability for each of {len(choice.continuations)} options; got {len(log_probs)}")
    if any(math.isnan(value) for value in log_probs):
        raise ValueError(f"the model gave a log-probability that is not a number: {list(log_probs)}")

    def right(lengths: Sequence[int]) -> float:
        scores = [value / length for value, length in zip(log_probs, lengths, strict=True)]
        return float(scores.index(max(scores)) == choice.gold)

    options = [continuation[1:] for continuation in choice.continuations]
    n_bytes = [len(option.encode()) for option in options]
    return Picked(right([1] * len(options)), right([len(option) for option in options]), right(n_bytes))


class _Question(NamedTuple):
    """A row, read: the question without its wording."""

    text: str
    options: tuple[str, ...]
    gold: int


def _worded(question: _Question, wording: Wording, shots: str, tags: dict[str, Any]) -> Choice:
    text, options, gold = question
    before, after, letters = wording
    if letters is not None:
        text += "".join(f"{letters}{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
        options = tuple(ascii_uppercase[: len(options)])
    context = shots + before + text + after
    return Choice((context,) * len(options), tuple(f" {option}" for option in options), gold, tags)


def _read(row: Row, dataset: str) -> _Question:
    """A row in either form."""
    mark, read = _PUBLISHED[dataset]
    if any(name in row for name in mark):
        question = read(row)
    elif "query" in row:
        question = _prepared(row, dataset)
    else:
        raise ValueError(
            f"this is no row of {dataset}: it has neither {' nor '.join(mark)} nor query; its fields: {', '.join(row) or 'none'}"
        )
    if not all(question.options):
        raise ValueError(f"an option is empty: {list(question.options)}")
    return question


def _prepared(row: Row, dataset: str) -> _Question:
    """query, choices, gold; the query is worded as by oe_eval."""
    query, (before, after, _) = _text(row, "query"), _OE_EVAL[dataset]
    if not (query.startswith(before) and query.endswith(after) and len(query) >= len(before) + len(after)):
        raise ValueError(f"query of {dataset} begins with {before!r} and ends with {after!r}; got {query!r}")
    question = query[len(before) : len(query) - len(after)]
    options = _texts(row.get("choices"), "choices")
    return _Question(_capital(question) if dataset == "hellaswag" else question, options, _gold(row, "gold", len(options)))


def _capital(query: str) -> str:
    """The sentence in which a query breaks off, capitalized (the rest of it in lower case, as the harness does it)."""
    pieces = re.split(r"(?<=[.!?]) ", query)
    if len(pieces) == 1 or query.rstrip().endswith((".", "!", "?")):
        return query
    return " ".join([*pieces[:-1], pieces[-1].capitalize()])


def _arc(row: Row) -> _Question:
    """ARC and OpenBookQA, of the hub or of their authors (who nest the options in the question)."""
    nested = row["question"] if isinstance(row.get("question"), Mapping) else None
    if nested is not None:
        question, listed = _text(nested, "stem"), nested.get("choices")
        if not isinstance(listed, Sequence) or not all(isinstance(option, Mapping) for option in listed):
            raise ValueError(f"choices of a nested question are a list of objects; got {listed!r}")
        options, labels = [option.get("text") for option in listed], [option.get("label") for option in listed]
    else:
        question, choices = _text(row, "question_stem" if "question_stem" in row else "question"), row.get("choices")
        if not isinstance(choices, Mapping):
            raise ValueError(f"choices have the lists text and label; got {choices!r}")
        options, labels = choices.get("text"), choices.get("label")  # type: ignore[assignment]
    texts, names = _texts(options, "text"), _texts(labels, "label")
    answer = row.get("answerKey")
    if len(names) != len(texts) or not isinstance(answer, str) or answer.strip() not in names:
        raise ValueError(f"answerKey is one of the options' labels {list(names)}; got {answer!r}")
    return _Question(question, texts, names.index(answer.strip()))


def _boolq(row: Row) -> _Question:
    """SuperGLUE's rows, and the original ones, whose passage lacks its title."""
    passage = f"{row['title']} -- {_text(row, 'passage')}" if "title" in row else _text(row, "passage")
    gold = int(row["answer"]) if isinstance(row.get("answer"), bool) else _gold(row, "label", 2)
    return _Question(f"{passage}\nQuestion: {_text(row, 'question')}?", ("no", "yes"), gold)


def _hellaswag(row: Row) -> _Question:
    def clean(text: str) -> str:
        """Without WikiHow's marks, as the harness does it."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    query = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    endings = tuple(map(clean, _texts(row.get("endings"), "endings")))
    return _Question(clean(query), endings, _gold(row, "label", len(endings)))


def _piqa(row: Row) -> _Question:
    return _Question(_text(row, "goal"), (_text(row, "sol1"), _text(row, "sol2")), _gold(row, "label", 2))


def _social_iqa(row: Row) -> _Question:
    options = tuple(_text(row, f"answer{letter}") for letter in "ABC")
    return _Question(f"{_text(row, 'context')} {_text(row, 'question')}", options, _gold(row, "label", 3, first=1))


# The fields that tell a published row, and how it is read.
_PUBLISHED: dict[str, tuple[tuple[str, ...], Callable[[Row], _Question]]] = {
    "arc_challenge": (("question",), _arc),
    "arc_easy": (("question",), _arc),
    "boolq": (("passage",), _boolq),
    "hellaswag": (("ctx_a",), _hellaswag),
    "openbookqa": (("question_stem", "question"), _arc),
    "piqa": (("goal",), _piqa),
    "social_iqa": (("answerA",), _social_iqa),
}


def _fill_blank(row: Row, shots: str, tags: dict[str, Any]) -> Choice:
    """WinoGrande: the sentence up to and including each option; what follows the blank is scored."""
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank or not after.strip():
        raise ValueError(f"sentence has a blank, _, with text after it; got {row['sentence']!r}")
    if "option1" in row:
        options: tuple[str, ...] = (_text(row, "option1"), _text(row, "option2"))
        gold = _gold(row, "answer", 2, first=1)
    else:
        options = _texts(row.get("choices"), "choices")
        gold = _gold(row, "gold", len(options))
    contexts = tuple(shots + before + option for option in options)
    return Choice(contexts, (f" {after.strip()}",) * len(options), gold, tags)


def _of_subject(row: Row, shots: str, tags: dict[str, Any]) -> Choice:
    """MMLU: one sentence on the subject, the examples, the question with its four options, of which the letter is scored."""
    options, answer = _texts(row.get("choices"), "choices"), row.get("answer")
    if isinstance(answer, str) and answer.strip() in ascii_uppercase[: len(options)]:
        row = {**row, "answer": ascii_uppercase.index(answer.strip())}
    question = _Question(_text(row, "question").strip(), options, _gold(row, "answer", len(options)))
    subject = _text(row, "subject").replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    tags |= {"subject": subject, "heading": heading}
    return _worded(question, Wording("", "\nAnswer:", "\n"), heading + shots, tags)


def _text(row: Row, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"field {name} must be a text; got {row.get(name)!r}")
    return str(row[name])


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name} must be a list of texts; got {values!r}")
    return tuple(values)


def _gold(row: Row, name: str, n: int, *, first: int = 0) -> int:
    """Index of the right option; in the row they are counted from `first`, as a number or as digits."""
    value = row.get(name)
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if not isinstance(number, int) or not first <= number < first + n:
        raise ValueError(f"field {name} must be the right option, {first} to {first + n - 1}; got {value!r} (of a test set?)")
    return number - first


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
