"""Kinship: the rules on CLUTRR's own rows, families by definition, own stories and their noise, the metric, files, bad input."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from recollect.tasks.clutrr import read_rows
from recollect.tasks.family import KIND_OF, RELATIONS, RULES, Family, compose, derive, find_chain, grow_family, inverse
from recollect.tasks.kinship import Kinship, first_relation
from recollect.tasks.kinship_stories import invent

NOISES = ("clean", "supporting", "irrelevant", "disconnected")
# Rows of each test file of CLUTRR's data set 089907f8, by k.
N_ROWS = {2: 38, 3: 105, 4: 190, 5: 174, 6: 107, 7: 144, 8: 150, 9: 119, 10: 119}


def story_of(prompt: str) -> str:
    return prompt.split("Story: ")[1].split("\nQuestion: ")[0]


def groups_of(story: str) -> list[set[str]]:
    """The people of a story, in groups connected by its sentences."""
    groups: list[set[str]] = []
    for sentence in re.split(r"(?<=\.) ", story):
        pair = set(re.findall(r"\[(\w+)\]", sentence))
        assert len(pair) == 2
        touched = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
    return groups


def test_rules_give_every_target_of_the_real_rows(real_data: Callable[[str], Path]) -> None:
    """Prevents a wrong rule: all 11,240 rows compose to their target, 11,112 of them to nothing else.

    The others hold a spouse's child's grandparent, a parent or a parent-in-law; the files use both answers for one chain.
    """
    rows = [row for file in sorted(real_data("clutrr").glob("*.jsonl")) for row in read_rows(str(file))]
    found = [compose(row.chain) for row in rows]
    assert len(rows) == 11240
    assert all(row.target in words for row, words in zip(rows, found, strict=True))
    assert sum(len(words) == 1 for words in found) == 11112
    assert {frozenset(words) for words in found if len(words) > 1} == {
        frozenset({"mother", "mother-in-law"}),
        frozenset({"father", "father-in-law"}),
    }
    assert {row.target for row in rows if row.chain == ("wife", "son", "grandmother")} == {"mother", "mother-in-law"}


@pytest.mark.parametrize("k", N_ROWS)
def test_real_files_are_read(k: int, real_data: Callable[[str], Path]) -> None:
    """Prevents rows lost or put under another k, and a query read the wrong way round."""
    path = real_data(f"clutrr/089907f8_1.{k}_test.jsonl")
    asked = Kinship(files=str(path)).sample(N_ROWS[k], seed=0)
    assert len({question.prompt for question in asked}) > 0.98 * N_ROWS[k]
    raw = {(row["story"], row["query"], row["target"]) for row in map(json.loads, path.read_text().splitlines())}
    assert {(story_of(q.prompt), str((q.tags["a"], q.tags["b"])), *q.answers) for q in asked} == raw
    for question in asked:
        assert question.tags["k"] == len(question.tags["chain"]) == k
        assert f"[{question.tags['b']}] is [{question.tags['a']}]'s" == question.prompt.splitlines()[-1].removeprefix(
            "Answer: "
        )


@pytest.mark.parametrize(
    ("chain", "results"),
    [
        ("daughter brother", "son"),
        ("son wife", "daughter-in-law"),
        ("daughter husband", "son-in-law"),
        ("daughter uncle", "brother"),
        ("son grandmother", "mother"),
        ("father sister", "aunt"),
        ("mother father", "grandfather"),
        ("wife mother", "mother-in-law"),
        ("husband father", "father-in-law"),
        ("wife granddaughter", "granddaughter"),
        ("brother son", "nephew"),
        ("sister daughter", "niece"),
        ("sister grandfather", "grandfather"),
        ("grandson sister", "granddaughter"),
        ("mother son", "brother"),
        ("brother mother", "mother"),
        ("sister", "sister"),
        ("husband husband", ""),
        ("aunt son", ""),
        ("daughter brother mother-in-law", ""),
        ("husband son grandmother", "mother mother-in-law"),
        ("father sister brother", "uncle"),
        ("wife son daughter brother", "grandson"),
    ],
)
def test_composition_by_hand(chain: str, results: str) -> None:
    """Prevents a wrong gender or rule, read off the words."""
    assert compose(chain.split()) == set(results.split())


def test_composition_refuses_unknown_words() -> None:
    """Prevents a KeyError for a relation that nobody knows."""
    with pytest.raises(ValueError, match="unknown relation 'cousin'"):
        compose(["father", "cousin"])
    with pytest.raises(ValueError, match="at least one"):
        compose([])
    with pytest.raises(ValueError, match="no fact names a relation of 'C'"):
        derive([("A", "son", "B")], "A", "C")


def test_every_way_through_the_facts_counts() -> None:
    """Prevents an answer that a second way contradicts, and facts read in one direction only."""
    assert derive([("A", "son", "B"), ("B", "sister", "C")], "A", "C") == {"daughter"}
    assert derive([("B", "father", "A"), ("B", "sister", "C")], "A", "C") == {"daughter"}
    assert derive([("C", "mother", "A"), ("A", "daughter", "C")], "A", "C") == {"daughter"}
    assert derive([("A", "son", "B"), ("B", "son", "C"), ("A", "wife", "D"), ("D", "brother", "C")], "A", "C") == {"grandson"}
    both = [("A", "son", "B"), ("B", "grandmother", "C"), ("A", "husband", "D"), ("D", "mother", "C")]
    assert derive(both, "A", "C") == {"mother", "mother-in-law"}


def relations_by_definition(family: Family) -> dict[tuple[int, int], str]:
    """All kinds but parents and spouses, from parents and spouses, in loops over everybody."""
    people = range(len(family.female))
    parent = {(a, b) for (a, b), kind in family.kinds.items() if kind == "inv-child"}
    spouse = {(a, b) for (a, b), kind in family.kinds.items() if kind == "SO"}
    sibling = {(a, b) for a in people for b in people if a != b and any({(a, p), (b, p)} <= parent for p in people)}
    found = dict.fromkeys(sibling, "sibling") | dict.fromkeys(parent, "inv-child") | dict.fromkeys(spouse, "SO")
    steps = {"inv-grand": (parent, parent), "inv-un": (parent, sibling), "inv-in-law": (spouse, parent)}
    for kind, (first, second) in steps.items():
        for a, b in first:
            for c, d in second:
                if b == c:
                    assert found.get((a, d), kind) == kind, "a pair with two relations"
                    found[a, d] = kind
    backwards = {"inv-child": "child", "inv-grand": "grand", "inv-un": "un", "inv-in-law": "in-law"}
    return found | {(b, a): backwards[kind] for (a, b), kind in found.items() if kind in backwards}


def test_families_are_what_the_words_mean() -> None:
    """Prevents families in which an uncle is none: every pair by definition, two parents, one spouse of the other sex."""
    for seed in range(15):
        family = grow_family(np.random.default_rng(seed))
        assert family.kinds == relations_by_definition(family)
        for a in range(len(family.female)):
            parents = [family.word(a, b) for b in range(len(family.female)) if family.kinds.get((a, b)) == "inv-child"]
            assert sorted(parents) in ([], ["father", "mother"])
            spouses = [b for b in range(len(family.female)) if family.kinds.get((a, b)) == "SO"]
            assert len(spouses) <= 1
            assert all(family.female[a] != family.female[b] for b in spouses)
        for (a, b), kind in family.kinds.items():
            assert family.kinds[b, a] == inverse(kind)


@pytest.mark.parametrize("k", [2, 5, 10])
def test_chains_are_true_and_settle_one_answer(k: int) -> None:
    """Prevents chains that visit somebody twice, state what is not so, or can be read in two ways."""
    rng = np.random.default_rng(k)
    found = 0
    for word in RELATIONS * 3:
        family = grow_family(rng)
        chain = find_chain(rng, family, word, k)
        if chain is None:
            continue
        found += 1
        assert len(set(chain)) == k + 1
        assert compose([family.word(*pair) for pair in pairwise(chain)]) == {word}
        assert family.word(chain[0], chain[-1]) == word
    assert found >= (40 if k == 2 else 8)


@pytest.mark.parametrize("noise", NOISES)
def test_story_facts_say_the_right_sex(noise: str) -> None:
    """Prevents a sister who is elsewhere an uncle."""
    rng = np.random.default_rng(1)
    for word in RELATIONS:
        story = invent(rng, word, 4, noise=noise, n_noise=3)
        assert all(KIND_OF[relation][1] == (b in story.women) for _, relation, b in story.facts)
        assert story.facts[0][0] == story.a
        assert story.facts[3][2] == story.b


@pytest.mark.parametrize("n_noise", [None, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_what_its_name_says(noise: str, n_noise: int | None) -> None:
    """Prevents noise that is missing, that touches what it should not, or that settles another answer."""
    options = {} if noise == "clean" else {"n_noise": n_noise}
    task = Kinship(k_min=2, k_max=7, noise=noise, **options)
    for question in task.sample(60, seed=3):
        k, story = question.tags["k"], story_of(question.prompt)
        n = 0 if noise == "clean" else n_noise or k // 2
        named = Counter(re.findall(r"\[(\w+)\]", story))
        assert story.count(".") == {"clean": k, "supporting": k + 2 * n}.get(noise, k + n)
        assert len(named) == k + 1 + n + (noise == "disconnected")
        groups = groups_of(story)
        assert len(groups) == (2 if noise == "disconnected" else 1)
        a, b = question.tags["a"], question.tags["b"]
        assert any({a, b} <= group for group in groups)
        if noise == "irrelevant":
            assert sum(times == 1 for name, times in named.items() if name not in (a, b)) == n
        if noise == "supporting":
            assert sum(named[name] == 2 for name in named if name not in (a, b)) >= n
        assert compose(question.tags["chain"]) == set(question.answers)
        assert task.score(task.solve(question.prompt), question) == 1


def test_every_k_and_every_relation_come_equally_often() -> None:
    """Prevents averages over k that are averages over something else, and answers that a guesser could prefer."""
    asked = Kinship(k_min=2, k_max=4).sample(902, seed=0)
    by_k = Counter(question.tags["k"] for question in asked)
    assert sorted(by_k) == [2, 3, 4]
    assert max(by_k.values()) - min(by_k.values()) <= 1
    by_answer = Counter(question.answers[0] for question in asked)
    assert set(by_answer) == set(RELATIONS)
    assert all(abs(count - 902 / 18) < 5 * (902 / 18) ** 0.5 for count in by_answer.values())
    assert len({Kinship().sample(1, seed=seed)[0].tags["k"] for seed in range(60)}) == 9


def test_order_is_the_chain_or_random(tmp_path: Path) -> None:
    """Prevents stories that always tell the chain in order, or never can."""
    path = tmp_path / "plain.json"
    path.write_text(json.dumps({"sentences": "{a} and {his} {relation} {b} sang."}))
    orders = set()
    for shuffle in (False, True):
        task = Kinship(k_min=5, k_max=5, noise="irrelevant", n_noise=2, shuffle=shuffle, templates=str(path))
        for question in task.sample(20, seed=1):
            told = re.findall(r"\[(\w+)\] and (his|her) ([\w-]+) \[(\w+)\] sang\.", question.prompt)
            assert len(told) == 7
            women = {b for _, _, relation, b in told if KIND_OF[relation][1]}
            men = {b for _, _, _, b in told} - women
            assert all(his == "her" for a, his, _, _ in told if a in women)
            assert all(his == "his" for a, his, _, _ in told if a in men)
            in_order = tuple(relation for _, _, relation, _ in told)[:5] == question.tags["chain"]
            orders.add((shuffle, in_order))
            assert task.score(task.solve(question.prompt), question) == 1
    assert (False, False) not in orders
    assert {(False, True), (True, False)} <= orders


@pytest.mark.parametrize(
    ("said", "relation"),
    [
        (" mother.", "mother"),
        ("The Mother-in-Law of", "mother-in-law"),
        ("her mother in law", "mother-in-law"),
        ("grandmother", "grandmother"),
        ("great-grandmother or aunt", "aunt"),
        ("stepson", None),
        ("Sister, not brother", "sister"),
        ("his wife", None),
        ("wife and son-in-law", "son-in-law"),
        ("brothers", None),
        ("father's uncle", "father"),
        ("", None),
    ],
)
def test_metric_takes_the_first_whole_relation(said: str, relation: str | None) -> None:
    """Prevents "mother-in-law" counted as "mother", parts of words, and the last word instead of the first."""
    assert first_relation(said) == relation
    question = Kinship().sample(1, seed=0)[0]._replace(answers=("mother",))
    assert Kinship().score(said, question) == float(relation == "mother")


def test_rules_are_the_sixteen() -> None:
    """Prevents a rule lost or added: CLUTRR's list, transcribed."""
    listed = (
        "child.child=grand, child.SO=in-law, child.sibling=child, child.inv-un=sibling, child.inv-grand=inv-child, "
        "inv-child.child=sibling, inv-child.inv-child=inv-grand, inv-child.sibling=inv-un, SO.inv-child=inv-in-law, "
        "SO.grand=grand, SO.child=child, sibling.sibling=sibling, sibling.inv-grand=inv-grand, sibling.child=un, "
        "sibling.inv-child=inv-child, grand.sibling=grand"
    )
    assert {f"{a}.{b}={c}" for (a, b), c in RULES.items()} == set(listed.split(", "))
    assert len(RELATIONS) == 18


ROW = {
    "story": "Late: [Tom] is [Ida]'s father. [Ann] is [Tom]'s sister.",
    "clean_story": "Clean: [Ann] is [Tom]'s sister.",
    "query": "('Ida', 'Ann')",
    "target": "aunt",
    "f_comb": "father-sister",
    "task_name": "task_1.2",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four rows: clean k = 2 and 3, supporting k = 2, a mixture."""
    path = tmp_path / "rows.jsonl"
    made = [
        ROW,
        ROW | {"task_name": "task_1.3", "f_comb": "father-mother-daughter"},
        ROW | {"task_name": "task_2.2", "target": "mother-in-law", "f_comb": "wife-mother"},
        ROW | {"task_name": "task_6.2"},
    ]
    path.write_text("\n".join(map(json.dumps, made)) + "\n\n")
    return path


def test_files_are_filtered_by_k_and_noise(rows: Path) -> None:
    """Prevents rows of another k or noise under this name; every row comes once before one comes twice."""
    assert [q.tags["k"] for q in Kinship(files=str(rows), k_max=2).sample(3, seed=0)] == [2, 2, 2]
    assert sorted(q.tags["k"] for q in Kinship(files=str(rows)).sample(4, seed=0)) == [2, 2, 3, 3]
    question = Kinship(files=str(rows.parent), noise="supporting").sample(1, seed=0)[0]
    assert question.answers == ("mother-in-law",)
    assert question.tags["chain"] == ("wife", "mother")
    with pytest.raises(ValueError, match=r"has no irrelevant row with k=2 to 10; it has clean k=2, clean k=3, mixed k=2, supp"):
        Kinship(files=str(rows), noise="irrelevant")


def test_of_a_folder_the_rows_for_testing_are_asked(rows: Path) -> None:
    """Prevents CLUTRR's folder from being asked about the stories that models are trained on."""
    (rows.parent / "1.2_test.jsonl").write_text(json.dumps(ROW | {"target": "mother-in-law", "f_comb": "wife-mother"}) + "\n")
    asked = Kinship(files=str(rows.parent)).sample(4, seed=0)
    assert {question.answers for question in asked} == {("mother-in-law",)}


def test_files_give_their_story_in_either_order(rows: Path) -> None:
    """Prevents a switch that does nothing on files."""
    assert "Story: Late: " in Kinship(files=str(rows)).sample(1, seed=0)[0].prompt
    assert "Story: Clean: " in Kinship(files=str(rows), shuffle=False).sample(1, seed=0)[0].prompt


def test_solver_says_what_it_cannot_read(rows: Path, tmp_path: Path) -> None:
    """Prevents a KeyError, or a guess, on crowd-written stories, other questions and open answers."""
    path = tmp_path / "plain.json"
    path.write_text(json.dumps({"sentences": "{a} and {his} {relation} {b} sang."}))
    task = Kinship(files=str(rows), templates=str(path))
    with pytest.raises(ValueError, match="stories of files have no solver"):
        task.solve(task.sample(1, seed=0)[0].prompt)
    with pytest.raises(ValueError, match="does not ask"):
        Kinship().solve("[Tom] is [Ida]'s father.")
    asked = "\nQuestion: What is [Ann] to [Ida]?\nAnswer: [Ann] is [Ida]'s"
    assert Kinship().solve("Story: [Tom] is [Ida]'s father. [Ann] is [Tom]'s sister." + asked) == " aunt."
    with pytest.raises(ValueError, match="does not settle the answer: no relation"):
        Kinship().solve("Story: [Tom] is [Ida]'s uncle. [Ann] is [Tom]'s sister." + asked)


def test_templates_come_from_a_file(tmp_path: Path) -> None:
    """Prevents a file that is read but not used, and prompts that the solver then cannot read."""
    path = tmp_path / "mine.json"
    frame = "Who is {b}, seen from {a}? {story}\nIt is the "
    path.write_text(
        json.dumps({"frame": frame, "instruction": "", "sentences": "{b} ({relation} of {a}) sings.\n{a}: {relation} {b}."})
    )
    task = Kinship(templates=str(path), noise="supporting")
    for question in task.sample(20, seed=0):
        assert question.prompt.startswith(f"Who is [{question.tags['b']}], seen from [{question.tags['a']}]? ")
        assert task.target(question) == question.answers[0] + "."
        assert task.solve(question.prompt) == task.target(question)
    assert Kinship(instruction=False).sample(1, seed=0)[0].prompt.startswith("Story: ")


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("[]", "one JSON object of strings"),
        ('{"frame": "{story} {a}"}', "lacks the field {b}"),
        ('{"frame": "{a} {story} {b}"}', "on one side of it"),
        ('{"frame": "{story} {story} {a} {b}"}', "once"),
        ('{"sentences": "{a} {b} {relation}\\n{a} {b}"}', "sentence '{a} {b}' lacks the field {relation}"),
        ('{"sentences": "{a} {b} {relation} {her}"}', "unknown field {her}"),
        ('{"sentences": "{a} {b} {relation!r}"}', "a field is a name in braces"),
        ('{"sentence": "{a} {b} {relation}"}', "unknown name 'sentence'"),
    ],
)
def test_bad_templates_are_named(templates: str, message: str, tmp_path: Path) -> None:
    """Prevents templates that lose a fact or the question."""
    path = tmp_path / "mine.json"
    path.write_text(templates)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Kinship(templates=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "cousin"}, "the target 'cousin'"),
        ({"query": "('Ida',)"}, "ValueError"),
        ({"query": "Ida, Ann"}, "not a row of CLUTRR"),
        ({"f_comb": "father-friend"}, "unknown relation 'friend'"),
        ({"task_name": "task_1.3"}, "has 2 relations"),
        ({"task_name": "two"}, "not a row of CLUTRR"),
    ],
)
def test_bad_rows_are_named(change: dict, message: str, tmp_path: Path) -> None:
    """Prevents stack traces, and rows scored against something else, where a file is of another form."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Kinship(files=str(path))
    assert f"{path}, line 2" in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    """Prevents stack traces where a file is missing or empty."""
    with pytest.raises(ValueError, match="holds no rows of CLUTRR"):
        Kinship(files=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no rows of CLUTRR"):
        Kinship(files=str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        Kinship(files=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_min": 1}, "k_min <= k_max are 2 to 10"),
        ({"k_min": 5, "k_max": 4}, "k_min <= k_max are 2 to 10"),
        ({"k_max": 11}, "k_min <= k_max are 2 to 10"),
        ({"noise": "loud"}, "noise is one of clean"),
        ({"n_noise": 2}, "belongs to own stories with noise"),
        ({"noise": "supporting", "n_noise": 0}, "n_noise is 1 to 10"),
        ({"answer_tokens": 0}, "answer_tokens"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    """Prevents options that silently mean something else."""
    with pytest.raises(ValueError, match=message):
        Kinship(**options)


def test_impossible_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an endless search where no family has so many third people."""
    monkeypatch.setattr("recollect.tasks.kinship_stories.MAX_FAMILIES", 10)
    with pytest.raises(ValueError, match="lower n_noise"):
        Kinship(k_min=2, k_max=2, noise="supporting", n_noise=10).sample(5, seed=0)
    with pytest.raises(ValueError, match="n, the number of examples"):
        Kinship().sample(0, seed=0)
