"""RULER's samples made by others and by us: the same parts, places, lengths and scores from the same text, words and tokens.

They come from lm-evaluation-harness's own generators. Only their sources are stood in for, so that nothing is fetched: words (ours,
for the package wonderwords), essay (sentences of our grammar), tokenizer (trained here), sentence splitter (NLTK's Punkt without its
model of English). Ours are told to use the harness's wording, so one reader takes both apart.

Where ours differ on purpose (`Ruler` says why, docs/evaluation.md sums up) the tests say by how much they may.
"""

from __future__ import annotations

import inspect
import json
import random
import re
import sys
import types
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest

from recollect.tasks.needle import RULER, Ruler, string_match_all
from recollect.tasks.needle_words import ADJECTIVES, NOUNS
from recollect.tasks.text import Question
from tests.evaluation.samples import LEVEL, SEED, Material, make_material, nltk, same_law, sentences_of

pytest.importorskip("lm_eval", reason="these tests ask lm-evaluation-harness: pip install 'recollect[eval]'")

N = 150  # samples of each task
LENGTHS = {"essay": 1800, "noise": 2000, "needle": 2000}
STEPS = {"essay": 500, "noise": 5, "needle": 5}  # units that the harness adds, and gives up, at lengths below 4096
ANSWER = 128  # tokens
NAMES = [name for name in RULER if name != "niah_single_words"]  # which the harness has not
ESSAYS = [name for name in NAMES if RULER[name]["haystack"] == "essay"]
LINES = [name for name in NAMES if name not in ESSAYS]
KINDS = {"numbers": r"[1-9]\d{6}", "words": r"[a-z]+-[a-z]+", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def harness(material: Material) -> Iterator[types.SimpleNamespace]:
    """The harness's RULER: `niah` (the generator), `tasks` (a function for each task, of N samples), `scores`."""
    words = types.ModuleType("wonderwords")
    lists = {"nouns": NOUNS, "adjectives": ADJECTIVES, "verbs": ()}
    words.RandomWord = type("RandomWord", (), {"_categories": lists})  # type: ignore[attr-defined]
    essays = [" ".join(material.sentences[:700]) + "\n\t", " ".join(material.sentences[700:])]
    state = random.getstate()
    # Ours in place of modules that hold the package's words, for as long as these tests run.
    before = {name: sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None) for name in ("prepare_niah", "niah_utils")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", words)
        patch.setenv("LOCAL_RANK", "1")  # rank 0 would fetch Punkt's model
        from lm_eval.tasks.ruler import common_utils, niah_utils, prepare_niah

        generate = prepare_niah.generate_samples
        patch.setattr(prepare_niah, "sent_tokenize", nltk.PunktSentenceTokenizer().tokenize)
        patch.setattr(prepare_niah.datasets, "load_dataset", lambda *_, **__: {"text": essays})
        patch.setattr(niah_utils, "generate_samples", lambda *of, **how: generate(*of, **{**how, "num_samples": N}))
        yield types.SimpleNamespace(niah=prepare_niah, tasks=niah_utils, scores=common_utils)
    for name, module in before.items():
        del sys.modules[f"lm_eval.tasks.ruler.{name}"]
        if module is not None:
            sys.modules[f"lm_eval.tasks.ruler.{name}"] = module
    random.setstate(state)


class Sample(NamedTuple):
    """A prompt taken apart.

    told: (kind, key, value) of each needle that is no hay, in the text's order. gaps: pieces of hay before each. hay: sentences or
    lines. units: words of an essay, else lines. size: tokens, as the writer says.
    """

    told: list[tuple[str, ...]]
    gaps: list[int]
    hay: list[str]
    units: int
    question: str
    asked: list[str]
    answers: list[str]
    size: int


class Reader(NamedTuple):
    """Takes prompts apart that are in the harness's wording, whoever wrote them."""

    needle: re.Pattern[str]

    def read(self, haystack: str, prompt: str, answers: Sequence[str], size: int) -> Sample:
        """
        Raises:
            AssertionError: a needle stands within a sentence.
        """
        _, *lines, question = prompt.split("\n")
        asked = re.split(", (?:and )?", re.findall(r" for (.*?) mentioned", question)[-1])
        told, gaps, hay = self.of_essay(lines[0]) if haystack == "essay" else self.of_lines(lines, asked, answers)
        units = len(" ".join(hay).split()) if haystack == "essay" else len(hay)
        return Sample(told, gaps, hay, units, question, asked, list(answers), size)

    def of_essay(self, context: str) -> tuple[list[tuple[str, ...]], list[int], list[str]]:
        """The harness writes an empty piece, and so a second blank, where there is no hay before or behind a needle."""
        told, gaps, before, end = [], [], "", 0
        for match in self.needle.finditer(context):
            before, end = before + context[end : match.start()], match.end()
            told.append(match.groups())
            gaps.append(len(sentences_of(before)))
            assert before.strip()[-1:] in {"", *".?!"} or not context[end:].strip()
        return told, gaps, sentences_of(before + context[end:])

    def of_lines(
        self, lines: list[str], asked: Sequence[str], answers: Sequence[str]
    ) -> tuple[list[tuple[str, ...]], list[int], list[str]]:
        """Where all lines are needles, those are no hay that have a key that is asked for, and its value.

        In the harness's hay that key may come again, with another value.
        """
        found = [self.needle.fullmatch(line) for line in lines]
        own = [match is not None and match[2] in asked and match[3] in answers for match in found]
        told = [match.groups() for match, mine in zip(found, own, strict=True) if match and mine]
        gaps = [own[:at].count(False) for at, mine in enumerate(own) if mine]
        return told, gaps, [line for line, mine in zip(lines, own, strict=True) if not mine]


class Sides(NamedTuple):
    """Our task in the harness's wording, and N samples by either.

    Of theirs, those few are left out that draw a key twice, which ours never do: such questions have more answers.
    """

    task: Ruler
    theirs: list[Sample]
    ours: list[Sample]
    prompts: list[Question]  # all of theirs


@pytest.fixture(scope="module")
def reader(harness: types.SimpleNamespace) -> Reader:
    return Reader(re.compile(re.sub(r"\\\{\w+\\\}", r"(\\S+)", re.escape(harness.niah.NEEDLE))))


@pytest.fixture(scope="module")
def sides(harness: types.SimpleNamespace, material: Material, reader: Reader) -> Callable[[str], Sides]:
    @cache
    def of(name: str) -> Sides:
        haystack = RULER[name]["haystack"]
        random.seed(SEED)
        docs = getattr(harness.tasks, name)(tokenizer=str(material.folder / "tokenizer"), max_seq_lengths=[LENGTHS[haystack]])
        # As the harness joins them for a model.
        prompts = [Question(f"{doc['input']} {doc['gen_prefix']}", tuple(doc["outputs"]), doc) for doc in docs["test"]]
        task = Ruler(**RULER[name], **files(harness, material, name, prompts[0]), length=LENGTHS[haystack])
        theirs = [reader.read(haystack, *prompt[:2], prompt.tags["length"] - ANSWER) for prompt in prompts]
        ours = [
            reader.read(haystack, *some[:2], some.tags["size"]) for some in task.sample(N, seed=SEED, measure=material.size)
        ]
        theirs = [sample for sample in theirs if len({key for _, key, _ in sample.told}) == task.n_keys]
        assert len(theirs) > N - 5
        return Sides(task, theirs, ours, prompts)

    return of


def files(harness: types.SimpleNamespace, material: Material, name: str, like: Question) -> dict[str, str]:
    """Options of `Ruler`: the essay, and the wording of a prompt by the harness."""
    head, *_, question = like.prompt.split("\n")
    query = re.findall(r" for (.*?) mentioned", question)[-1]
    prompt = f"{head}\n{{context}}\n{question.replace(query, '{query}')}"
    needle = harness.niah.NEEDLE.replace("{type_needle_v}", "{kinds}")
    wording = {"needle": needle, "noise": harness.niah.get_haystack("repeat"), "one": prompt, "many": prompt}
    path = material.folder / f"{name}.json"
    path.write_text(json.dumps(wording))
    return {"templates": str(path), **({"text": material.essay} if name in ESSAYS else {})}


def mask(text: str) -> str:
    """Every number, word and UUID that is a key or a value by the name of its kind."""
    for kind in ("uuids", "numbers", "words"):  # parts of a UUID may look like words
        text = re.sub(rf"\b{KINDS[kind]}\b", kind.upper(), text)
    return text


@pytest.mark.parametrize("name", NAMES)
def test_ruler_samples_have_the_same_parts(name: str, sides: Callable[[str], Sides], material: Material) -> None:
    """Another number of needles, keys, values or questions, or another sort of them, is another task under the same name."""
    task, *both, _ = sides(name)
    words = " ".join(material.sentences).split()
    assert len(both[1]) == N
    shapes = []
    for samples in both:
        assert len(samples) == N
        for sample in samples:
            values: dict[str, list[str]] = {}
            for _, key, value in sample.told:
                values.setdefault(key, []).append(value)
            # The answers to one key: theirs are in the order in which they were drawn, ours in the text's; no metric can tell.
            groups = [set(sample.answers[i : i + task.n_values]) for i in range(0, len(sample.answers), task.n_values)]
            assert groups == [set(values[key]) for key in sample.asked]
            assert name in LINES or " ".join(sample.hay).split() == words[: sample.units]
        shapes.append(
            {
                (
                    *sorted(mask(" ".join(needle)) for needle in sample.told),
                    *sorted(Counter(key for _, key, _ in sample.told).values()),
                    mask(sample.question),
                    len(sample.answers),
                    *({mask(line) for line in sample.hay} if name in LINES else ()),
                )
                for sample in samples
            }
        )
    assert len(shapes[0]) == 1
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("n", [10, 40, 99, 150, 300, 700])
def test_ruler_depths_are_the_same_gaps(n: int, harness: types.SimpleNamespace, reader: Reader, tmp_path: Path) -> None:
    """Forty needles take all forty depths: off-by-one errors and fractions rounded otherwise, whole texts and cut sentences."""
    (tmp_path / "needle.json").write_text(json.dumps({"needle": harness.niah.NEEDLE.replace("{type_needle_v}", "{kinds}")}))
    (tmp_path / "text.txt").write_text("It rained here again. " * n + "Stop there. ")
    words = (tmp_path / "text.txt").read_text().split()

    def n_words(text: str) -> int:
        return len(text.split())

    def ours(length: int) -> Question:
        paths = {"text": str(tmp_path / "text.txt"), "templates": str(tmp_path / "needle.json")}
        return Ruler(haystack="essay", n_keys=40, length=length, **paths).sample(1, seed=SEED, measure=n_words)[0]

    some = ours(1000)
    for units in (4 * n, 4 * n + 1):
        kinds = {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers"}
        counts = {"num_needle_k": 40, "num_needle_v": 1}
        theirs, *_ = harness.niah.generate_input_output(units, words, template="{context}", **kinds, **counts)
        question = ours(1000 + units - some.tags["n_haystack"])
        assert question.tags["n_haystack"] == units
        told, gaps, hay = reader.of_essay(question.prompt.split("\n")[1])
        assert len(told) == 40
        assert (gaps, hay) == reader.of_essay(theirs)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_ruler_needles_stand_by_the_same_law(name: str, sides: Callable[[str], Sides]) -> None:
    """Needles that stand early, or never at an end, or next to one another make a model look better or worse than it is."""
    laws = []
    depths = np.round(np.linspace(0, 100, 40)).astype(int).tolist()
    rng = np.random.default_rng(SEED)
    for samples in sides(name)[1:3]:
        places: list[Any] = []
        for sample in samples:
            assert len(set(sample.gaps)) == len(sample.gaps)
            if name in ESSAYS:
                depth_at = {int(len(sample.hay) * (depth / 100)): depth for depth in depths}
                assert len(depth_at) == 40
                places += [depth_at[gap] for gap in sample.gaps]
            else:
                assert max(sample.gaps) < sample.units
                # Theirs have some lines less; a uniform place within the line makes shares of both comparable.
                places += [(gap + rng.random()) / sample.units for gap in sample.gaps]
        # Every depth, and every line, where there are draws enough for each.
        if len(samples[0].gaps) >= 4:
            assert set(places) == set(depths)
        elif samples[0].units < 20:
            assert {gap for sample in samples for gap in sample.gaps} == set(range(samples[0].units))
        laws.append(places)
    assert same_law(*laws) > LEVEL


@pytest.mark.parametrize("name", ["niah_multikey_1", "niah_multiquery"])
def test_ruler_questions_ask_by_the_same_law(name: str, sides: Callable[[str], Sides]) -> None:
    """Were the first needle asked for most often, or were questions in the text's order, a model could guess."""
    laws = []
    for samples in sides(name)[1:3]:
        orders = [[key for _, key, _ in sample.told] for sample in samples]
        laws.append([tuple(order.index(key) for key in sample.asked) for order, sample in zip(orders, samples, strict=True)])
    assert same_law(*laws) > LEVEL


def test_ruler_keys_and_values_follow_the_same_laws(sides: Callable[[str], Sides]) -> None:
    """Numbers of fewer digits, words from half of a list or UUIDs of another version are easier or harder to find."""
    laws: list[dict[str, list[Any]]] = []
    for side in (1, 2):
        found: dict[str, list[Any]] = {"number": [], "uuid": [], "adjective": [], "noun": []}
        for name in ("niah_multiquery", "niah_multikey_3"):  # others begin with the same draws
            for sample in sides(name)[side]:
                for kind, _, value in sample.told:
                    if kind == "numbers":
                        found["number"].append(float(value))
                    else:
                        assert uuid.UUID(value).version == 4
                        assert uuid.UUID(value).variant == uuid.RFC_4122
                        found["uuid"].append(float(uuid.UUID(value).int))
                for key in {key for _, key, _ in sample.told if name != "niah_multikey_3"}:
                    adjective, noun = key.split("-")
                    found["adjective"].append(adjective)
                    found["noun"].append(noun)
        laws.append(found)
    for what, law in laws[0].items():
        assert same_law(law, laws[1][what]) > LEVEL, what


@pytest.mark.parametrize("name", NAMES)
def test_ruler_lengths_end_within_one_step(name: str, sides: Callable[[str], Sides], material: Material) -> None:
    """A text too long does not fit the model; one much too short is easier than its name says.

    The harness adds whole steps of hay, so it ends up to one short of the length; ours adds to the last unit, as NVIDIA's does,
    and counts the beginning of the answer, too.
    """
    task, theirs, ours, _ = sides(name)
    step, room = STEPS[task.haystack], task.length - ANSWER
    most = max(sample.units for sample in theirs)
    most_of_ours = max(sample.units for sample in ours)
    assert max(sample.size for sample in theirs + ours) <= room
    assert {sample.units for sample in theirs} <= {most, most - step}
    assert most % step == 0
    assert most <= most_of_ours < most + step
    # Where a step is more than a quarter of the text (500 words of 1200), ours gives up less.
    assert {sample.units for sample in ours} <= {most_of_ours, most_of_ours - min(step, most_of_ours // 4)}
    unit = 5 if name in ESSAYS else max(material.size(line + "\n") for line in ours[0].hay)
    assert room - max(sample.size for sample in ours) <= unit


def uneven(text: str) -> types.SimpleNamespace:
    """A tokenizer by whose count texts of the same number of words differ by up to 40, so that about half overflow."""
    return types.SimpleNamespace(input_ids=range(len(text.split()) + crc32(text.encode()) % 40))


@pytest.mark.parametrize(("haystack", "units", "step"), [("essay", 3000, 500), ("needle", 50, 5), ("needle", 500, 25)])
def test_ruler_gives_up_the_same_steps(
    haystack: str, units: int, step: int, harness: types.SimpleNamespace, material: Material
) -> None:
    """A sample that overflows is written again, shorter: in other steps the lengths of a set would be others."""
    options = {"type_haystack": haystack, "type_needle_k": "words", "type_needle_v": "numbers", "template": "{context}"}
    text = harness.niah.get_haystack(haystack)
    needle = len(harness.niah.NEEDLE.split())
    words_of_unit = 1 if haystack == "essay" else needle
    length = units * words_of_unit + needle + 20 + ANSWER
    random.seed(SEED)
    made = harness.niah.generate_samples(text, uneven, max_seq_length=length, num_samples=40, **options)
    theirs = {(len(doc["input"].split()) - needle) // words_of_unit for doc in made}
    task = Ruler(haystack=haystack, length=length, text=material.essay if haystack == "essay" else None)
    ours = {q.tags["n_haystack"] for q in task.sample(40, seed=SEED, measure=lambda prompt: len(uneven(prompt).input_ids))}
    assert theirs == {units, units - step}
    assert set(np.diff(sorted(ours)).tolist()) == {step}


@pytest.mark.parametrize("name", NAMES)
def test_ruler_solver_reads_the_harness(name: str, sides: Callable[[str], Sides], harness: types.SimpleNamespace) -> None:
    """A prompt that our solver cannot read is built otherwise; its answers must be full marks on both scales."""
    task, *_, prompts = sides(name)
    for question in prompts[:40]:
        said = task.solve(question.prompt)
        assert task.score(said, question) == 1
        assert harness.scores.process_results(question.tags, [said])[str(task.length)] == 1


def test_ruler_scores_are_the_same(harness: types.SimpleNamespace) -> None:
    """Case, order, parts of values, several mentions, and control characters, which the harness replaces before it looks."""
    random.seed(SEED)
    pieces = [
        " ",
        "",
        ", ",
        ".",
        "\n",
        "\t",
        "\x00",
        "Calm-Harp",
        "calm-harp",
        "CALM-HARP",
        "calm-",
        "harp",
        "alm-har",
        "1234567",
    ]
    pieces += ["123456", "234567", "12345678", "1234567.0", "7654321", "ABCDEF01-aaaa", "abcdef01-AAAA", "İ", "ß", "SS"]
    scales = [inspect.signature(harness.niah.generate_samples).parameters["tokens_to_generate"].default]
    assert scales == [ANSWER] == [Ruler().answer_tokens]
    seen = Counter()
    for answers in (
        ["calm-harp"],
        ["1234567", "7654321"],
        ["calm-harp", "abcdef01-aaaa", "1234567", "7654321"],
        ["7654321"] * 2,
    ):
        for _ in range(400):
            said = "".join(random.choice(pieces) for _ in range(random.randrange(9)))
            doc = {"max_length": 4096, "outputs": answers}
            theirs = harness.scores.process_results(doc, [said])["4096"]
            assert string_match_all(said, tuple(answers)) == theirs
            # RULER's other metric, best of all samples, is for its questions about articles; of one sample it is the same.
            assert harness.scores.process_results_part(doc, [said])["4096"] == theirs
            seen[theirs] += 1
    assert set(seen) == {0, 0.25, 0.5, 0.75, 1}
