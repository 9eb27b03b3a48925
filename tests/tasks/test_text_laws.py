"""Laws of every task in text: seeded, answerable from the prompt alone, no longer than asked, and hard to guess."""

from __future__ import annotations

import random

import pytest

from recollect.tasks.babilong import BabiLong
from recollect.tasks.kinship import Kinship
from recollect.tasks.needle import RULER, Needles, Ruler
from recollect.tasks.text import TEXT_TASKS, TextTask

TASKS: dict[str, TextTask] = {
    **{f"ruler {name}": Ruler(**options, length=2048) for name, options in RULER.items()},
    "needles": Needles(n_needles=4, length=2048),
    "needles spread": Needles(n_needles=6, length=2048, placing="spread", n_digits=3),
    **{f"babilong qa{qa}": BabiLong(qa=qa) for qa in range(1, 6)},
    "babilong long": BabiLong(qa=2, length=6000),
    **{f"kinship {noise}": Kinship(noise=noise) for noise in ("clean", "supporting", "irrelevant", "disconnected")},
}


def words(text: str) -> int:
    """A measure that is no count of bytes."""
    return len(text.split())


@pytest.fixture(params=TASKS, ids=str)
def task(request: pytest.FixtureRequest) -> TextTask:
    return TASKS[request.param]


def test_every_registered_task_is_here() -> None:
    """Prevents a task that no law looks at."""
    assert {type(task) for task in TASKS.values()} == set(TEXT_TASKS.values())


def test_a_seed_decides_everything(task: TextTask) -> None:
    """Prevents hidden state, and a seed that is ignored."""
    assert task.sample(3, seed=5) == task.sample(3, seed=5)
    assert task.sample(3, seed=5) != task.sample(3, seed=6)


def test_the_solver_reads_nothing_but_the_prompt_and_is_right(task: TextTask) -> None:
    """Prevents questions that nobody can answer, and a metric that refuses the right answer."""
    for question in task.sample(20, seed=0):
        assert task.score(task.solve(question.prompt), question) == 1.0


def test_the_target_is_right_and_ends(task: TextTask) -> None:
    """Prevents training on answers that the metric does not accept, or that run into what follows."""
    for question in task.sample(20, seed=1):
        target = task.target(question)
        assert task.score(target, question) == 1.0
        assert target.endswith(".")
        assert (question.prompt + target).replace("\n", " ").count("  ") <= (question.prompt).replace("\n", " ").count("  ")


def test_silence_scores_nothing(task: TextTask) -> None:
    """Prevents a metric that an empty answer satisfies."""
    assert all(task.score("", question) == 0.0 for question in task.sample(10, seed=2))


def test_another_questions_answer_scores_about_chance(task: TextTask) -> None:
    """Prevents a metric that accepts anything of the right kind."""
    questions = task.sample(60, seed=3)
    order = list(range(60))
    random.Random(0).shuffle(order)
    mean = sum(task.score(task.target(questions[j]), questions[i]) for i, j in enumerate(order)) / 60
    assert mean < max(task.chance, 1 / 4) + 0.2


@pytest.mark.parametrize("measure", [len, words])
def test_a_prompt_is_no_longer_than_asked(task: TextTask, measure: object) -> None:
    """Prevents prompts that a model of that context would cut, whatever the tokens are."""
    length = getattr(task, "length", 0)
    if not length:
        return
    for question in task.sample(5, seed=4, measure=measure):  # type: ignore[arg-type]
        assert measure(question.prompt) <= length  # type: ignore[operator]


def test_a_longer_text_is_nearly_filled(task: TextTask) -> None:
    """Prevents a search that stops far below the length: the test would be easier than it says."""
    length = getattr(task, "length", 0)
    if not length:
        return
    assert all(len(question.prompt) > 0.75 * length for question in task.sample(5, seed=4))
