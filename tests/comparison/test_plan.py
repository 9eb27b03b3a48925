"""A plan holds everything that changes a number, and refuses nonsense before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from recollect.comparison.defaults import DEFAULTS
from recollect.comparison.model import make_model, n_parameters
from recollect.comparison.plan import Plan, differences, make_plan
from tests.comparison.small import small


def test_a_plan_survives_its_file() -> None:
    plan = make_plan(small())
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"version": 0}', "{"])
def test_a_file_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-5},
        {"seeds": 2},
        {"budget": "25steps"},
        {"width": 32},
        {"task_options": {"n_blocks": 4, "n_letters": 2, "n_question": 1}},
        {"mixers": ["attention"]},
        {"mixers": ["attention", "mta:c_q=3"]},
        {"threads": 2},
        {"precision": "bf16"},
        {"dropout": 0.0},
        {"eval_every": 4},
        {"n_eval": 20},
        {"clip": 0.5},
        {"intermediate": 32},
        {"intermediate": None, "parameters": 4000},
        {"intermediate": None, "mlp": False},
    ],
    ids=str,
)
def test_whatever_changes_a_number_changes_the_hash(change: dict[str, Any]) -> None:
    """Or a resumed comparison would mix two recipes in one table."""
    old, new = make_plan(small()), make_plan(small(**change))
    assert old.config_hash != new.config_hash
    assert differences(old, new)


def test_the_same_request_has_the_same_hash() -> None:
    """Time, command and machine do not enter it."""
    one, two = make_plan(small(), command="a"), make_plan(small(), command="b")
    assert one.config_hash == two.config_hash
    assert differences(one, two) == []


def test_changed_text_changes_the_hash_and_a_moved_file_does_not(tmp_path: Path) -> None:
    """Data count by content."""
    hashes = []
    for name, text in (("a.txt", "abcdefgh" * 100), ("b.txt", "abcdefgh" * 100), ("c.txt", "abcdefgx" * 100)):
        (tmp_path / name).write_text(text)
        request = small(task="text", task_options={}, data=[str(tmp_path / name)], seq_len=16)
        hashes.append(make_plan(request).config_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_options_typed_win_over_the_tasks_defaults() -> None:
    """find-block gives mta kernels as wide as its blocks of two, mta_toy the paper's; what the user writes counts more, everywhere."""
    plan = make_plan(small(mixers=["mta", "mta_toy", "mta:c_k=3"], layers=2))
    assert {"kq": True, "c_k": 5}.items() <= plan.mixer("mta")["options"].items()
    assert {"c_q": 1, "c_k": 3}.items() <= plan.mixer("mta_toy")["options"].items()
    assert [layer["c_k"] for layer in plan.mixer("mta:c_k=3")["layers"]] == [3, 3]
    assert plan.mixer("mta:c_k=3")["options"]["kq"] is True


def test_parameters_are_equal_where_asked() -> None:
    """SwiGLUs of another width make up for mixers of another size, to half a unit of the width."""
    plan = make_plan(small(mixers=["attention", "mta", "yaad", "gla"], layers=2, intermediate=None, parameters=20_000))
    unit = 2 * 3 * 16
    assert all(abs(mixer["parameters"] - 20_000) <= unit / 2 for mixer in plan.mixers)
    assert len({mixer["intermediate_size"] for mixer in plan.mixers}) > 2
    for mixer in plan.mixers:
        assert n_parameters(make_model(plan.model_of(mixer["label"]), mixer["layers"], seed=1)) == mixer["parameters"]


@pytest.mark.parametrize("task", sorted(DEFAULTS))
def test_every_tasks_defaults_make_a_plan(task: str, tmp_path: Path) -> None:
    """`recollect compare TASK` needs no flags (text: none but its data)."""
    (tmp_path / "a.txt").write_text("abcdefgh" * 1000)
    from recollect.comparison import Request

    plan = make_plan(Request(task=task, data=[str(tmp_path)] if task == "text" else [], device="cpu"))
    assert [mixer["mixer"] for mixer in plan.mixers] == list(DEFAULTS[task].mixers)
    assert plan.seeds == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "find-blok"}, "did you mean 'find-block'"),
        ({"mixers": ["atention"]}, "did you mean 'attention'"),
        ({"mixers": ["mta:c_qq=2"]}, "did you mean 'c_q'"),
        ({"mixers": ["mta:c_q=two"]}, "c_q must be an integer"),
        ({"mixers": ["mta:dim=8"]}, "--width"),
        ({"mixers": ["mta", "mta"]}, "listed twice"),
        ({"mixers": [" "]}, "no mixer"),
        ({"mixers": ["mta:norm=a/b"]}, "slash"),
        ({"task_options": {"n_leters": 2}}, "did you mean 'n_letters'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be positive and finite"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"dropout": 1.0}, "dropout"),
        ({"equal": "luck"}, "--equal"),
        ({"equal": "time"}, "needs a time budget"),
        ({"data": ["x"]}, "belongs to the task 'text'"),
        ({"task": "text", "task_options": {}}, "--data"),
        ({"task": "text", "task_options": {"seqlen": 2}, "data": ["x"]}, "did you mean 'seq_len'"),
        ({"seq_len": 20}, "--seq-len"),
        ({"width": 15}, "."),
        ({"parameters": 9000}, "leave --intermediate out"),
        ({"mlp": False}, "add --mlp"),
        ({"intermediate": None, "parameters": 10}, "mixer 'attention' at this width and depth needs at least"),
        ({"device": "gpu9"}, "device 'gpu9'"),
        ({"imports": ["no_such_module_of_mine"]}, "--import no_such_module_of_mine failed"),
        ({"imports": ["no_such_file.py"]}, "no such file"),
    ],
    ids=str,
)
def test_nonsense_is_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(small(**change))
    assert "\n" not in str(caught.value)


def test_a_users_own_mixer_is_compared(tmp_path: Path) -> None:
    """`--import file.py` registers it; its source is part of the hash."""
    source = (
        "from recollect.mixers import register\n"
        "from recollect.mixers.attention import Attention, AttentionConfig\n"
        "@register('my_own', config=AttentionConfig, summary='s', source='s', state='s')\n"
        "class MyOwn(Attention):\n    pass\n"
    )
    (tmp_path / "my_own_mixer.py").write_text(source)
    plan = make_plan(small(mixers=["my_own"], imports=[str(tmp_path / "my_own_mixer.py")]))
    assert plan.mixers[0]["mixer"] == "my_own"
    changed = dataclasses.replace(plan, imports=[{**plan.imports[0], "sha256": "0"}])
    assert differences(plan, changed)
