"""recall against its definition: each example is read with plain loops written here; never through the solver."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from torch import Tensor

from recollect.tasks import IGNORE, Batch, Recall

CASES = [
    Recall(),
    Recall(vocab_size=8192, length=128, n_pairs=8, random_non_queries=True),
    Recall(vocab_size=12, length=16, n_pairs=2),
    Recall(vocab_size=12, length=10, n_pairs=2, random_non_queries=True),
    Recall(length=61, n_pairs=6, n_passes=2, random_non_queries=True),
    Recall(variant="forgetting", random_non_queries=True),
    Recall(variant="forgetting", n_pairs=6, n_reassigned=6, n_passes=2),
    Recall(variant="forgetting", n_pairs=1, vocab_size=4, length=6),
    Recall(variant="compositional", random_non_queries=True),
    Recall(variant="compositional", n_pairs=6, n_passes=2, length=71),
    Recall(variant="compositional", n_pairs=4, vocab_size=10, length=24, random_non_queries=True),
]


def read(task: Recall, inputs: list[int]) -> tuple[list[tuple[tuple[int, ...], int]], dict[int, tuple[int, ...]]]:
    """The writes (key, value) of one pass in order, and the key whose last token stands at each query position."""
    size = 3 if task.variant == "compositional" else 2
    n_writes, half = task.n_pairs, task.vocab_size // 2
    if task.variant == "forgetting":
        n_writes += max(1, task.n_pairs // 2) if task.n_reassigned is None else task.n_reassigned
    entries = [tuple(inputs[i : i + size]) for i in range(0, size * n_writes * task.n_passes, size)]
    for one_pass in range(task.n_passes):
        assert entries[one_pass * n_writes : (one_pass + 1) * n_writes] == entries[:n_writes]
    writes = [(entry[:-1], entry[-1]) for entry in entries[:n_writes]]
    assert all(0 < token < half for key, _ in writes for token in key)
    assert all(half <= value < task.vocab_size for _, value in writes)
    keys = {key for key, _ in writes}
    rest = size * n_writes * task.n_passes
    found = {
        slot + size - 2: tuple(inputs[slot : slot + size - 1])
        for slot in range(rest, task.length - size + 1, size)
        if tuple(inputs[slot : slot + size - 1]) in keys
    }
    return writes, found


def check_definition(task: Recall, inputs: Tensor, labels: Tensor) -> None:
    """One example obeys the definition, checked token by token.

    Raises:
        AssertionError: it does not.
    """
    assert inputs.shape == labels.shape == (task.length,)
    tokens = inputs.tolist()
    assert all(0 <= token < task.vocab_size for token in tokens)
    writes, queries = read(task, tokens)
    assert len({value for _, value in writes}) == len(writes)
    times = Counter(key for key, _ in writes)
    assert len(times) == task.n_pairs
    assert sorted(queries.values()) == sorted(times)
    n_twice = len(writes) - task.n_pairs
    assert sorted(times.values()) == [1] * (task.n_pairs - n_twice) + [2] * n_twice
    for t, label in enumerate(labels.tolist()):
        if t not in queries:
            assert label == IGNORE
            continue
        last = None
        for key, value in writes:
            if key == queries[t]:
                last = value
        assert label == last
    if task.variant == "compositional":
        check_neither_half_tells(writes)
    used = {token for key in times for token in key}
    rest = len(writes) * task.n_passes * (len(writes[0][0]) + 1)
    # No key token outside the queries: else nothing tells a query from filler.
    n_used = sum(token in used for token in tokens[rest:])
    assert n_used == task.n_pairs * len(writes[0][0])
    if not task.random_non_queries:
        assert sum(token != 0 for token in tokens[rest:]) == n_used


def check_neither_half_tells(writes: list[tuple[tuple[int, ...], int]]) -> None:
    """Every first token and every second token occurs with at least two values, and no token is both."""
    by_first, by_second = defaultdict(set), defaultdict(set)
    for (a, b), value in writes:
        by_first[a].add(value)
        by_second[b].add(value)
    assert min(map(len, by_first.values())) >= 2
    assert min(map(len, by_second.values())) >= 2
    assert not set(by_first) & set(by_second)


@pytest.mark.parametrize("task", CASES, ids=str)
def test_recall_matches_definition(task: Recall) -> None:
    """Prevents labels of the wrong key, a forgotten value that is asked, filler that looks like a query."""
    for inputs, labels, tag in zip(*task.sample(100, seed=3), strict=True):
        check_definition(task, inputs, labels)
        writes, queries = read(task, inputs.tolist())
        times = Counter(key for key, _ in writes)
        assert sorted(tag["queries"]) == sorted(queries)
        assert sorted(tag["reassigned"]) == [t for t in sorted(queries) if times[queries[t]] == 2]
        assert (tag["variant"], tag["n_pairs"]) == (task.variant, task.n_pairs)


def test_recall_matches_zoology_example() -> None:
    """Zoology's own example (V = 12, D = 2, T = 16): the label stands at the key, not after it."""
    task = Recall(vocab_size=12, length=16, n_pairs=2)
    inputs = torch.tensor([[2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]])
    labels = torch.full((1, 16), IGNORE)
    labels[0, 6], labels[0, 12] = 7, 8
    check_definition(task, inputs[0], labels[0])
    assert torch.equal(task.solve(inputs), labels)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_recall_query_distance_follows_the_power_law(power: float) -> None:
    """Slot of the first-drawn key: probability proportional to i^(power - 1); prevents uniform or reversed weights."""
    n, task = 6000, Recall(power=power, n_pairs=2, length=24)
    slots = Counter((tag["queries"][0] - 4) // 2 for tag in task.sample(n, seed=8).tags)
    weights = [i ** (power - 1) for i in range(1, 11)]
    for slot, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(slots[slot] - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_recall_score_is_share_of_queries() -> None:
    """Prevents all-or-nothing scoring, which is not zoology's metric."""
    task = Recall()
    labels = task.sample(3, seed=1).labels
    predictions = labels.clone()
    predictions[0] = 0
    at = (labels[1] != IGNORE).nonzero()[0, 0]
    predictions[1, at] = 0
    assert task.correct(predictions, labels).tolist() == [0.0, 0.75, 1.0]


def test_recall_text_names_keys_and_values() -> None:
    """Prevents a report in which keys and values look alike."""
    task = Recall(vocab_size=12, length=8, n_pairs=1)
    assert task.text(torch.tensor([2, 8, 0, 5, 6, IGNORE])) == "k2 v8 . k5 v6 _"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "hard"}, "plain, forgetting, compositional"),
        ({"n_pairs": 0}, "at least 1"),
        ({"n_passes": 0}, "at least 1"),
        ({"power": 0.0}, "power is above 0"),
        ({"n_pairs": 17}, "length=64 is too short: .* need 68"),
        ({"n_pairs": 8, "n_passes": 4}, "need 80"),
        ({"variant": "forgetting", "n_pairs": 14}, "need 70"),
        ({"vocab_size": 8, "n_pairs": 4}, "vocab_size=8 has 3 key and 4 value tokens"),
        ({"vocab_size": 1}, "has 0 key"),
        ({"variant": "compositional", "n_pairs": 5}, "product of two numbers"),
        ({"variant": "compositional", "n_pairs": 1}, "product of two numbers"),
        ({"variant": "compositional", "n_pairs": 4, "vocab_size": 8}, "too few"),
        ({"variant": "forgetting", "n_reassigned": 5}, "n_reassigned is 1 to n_pairs=4"),
        ({"n_reassigned": 1}, "belongs to variant='forgetting'"),
    ],
)
def test_recall_refuses_impossible_options(options: dict, says: str) -> None:
    """Prevents an index error deep in the generator, or a silently different task."""
    with pytest.raises(ValueError, match=says):
        Recall(**options)


def test_recall_solver_checks_length() -> None:
    """Prevents labels for a text of other options."""
    with pytest.raises(ValueError, match="inputs must be"):
        Recall().solve(torch.zeros(1, 65, dtype=torch.int64))


def _first_value_counts(task: Recall, batch: Batch) -> Batch:
    """Forgetting without forgetting: the first value of a key is the label."""
    labels = batch.labels.clone()
    for row, tokens in enumerate(batch.inputs.tolist()):
        writes, queries = read(task, tokens)
        for t, key in queries.items():
            labels[row, t] = next(value for other, value in writes if other == key)
    return batch._replace(labels=labels)


def _query_in_filler(task: Recall, batch: Batch) -> Batch:
    """Filler repeats a key that is not asked there."""
    inputs = batch.inputs.clone()
    for row, labels in enumerate(batch.labels):
        inputs[row, (labels == IGNORE).nonzero()[-1, 0]] = inputs[row, 0]
    return batch._replace(inputs=inputs)


def _late_labels(task: Recall, batch: Batch) -> Batch:
    """Labels stand one after the key."""
    return batch._replace(labels=batch.labels.roll(1, dims=1))


def _shared_value(task: Recall, batch: Batch) -> Batch:
    """Two entries write the same value."""
    inputs = batch.inputs.clone()
    inputs[:, 1] = inputs[:, 3]
    return batch._replace(inputs=inputs)


@pytest.mark.parametrize(
    "mutate", [_first_value_counts, _query_in_filler, _late_labels, _shared_value], ids=lambda f: f.__name__
)
def test_recall_definition_check_catches_mutants(mutate) -> None:
    """Prevents a check that lets a broken generator through."""
    task = Recall(variant="forgetting", n_reassigned=4)
    broken = mutate(task, task.sample(20, seed=9))
    for inputs, labels, _ in zip(*broken, strict=True):
        with pytest.raises(AssertionError):
            check_definition(task, inputs, labels)


def test_recall_compositional_check_catches_a_telling_half() -> None:
    """A grid in which the first token alone tells the value (each occurs once) must not pass for compositional."""
    with pytest.raises(AssertionError):
        check_neither_half_tells([((1, 5), 20), ((2, 5), 21), ((3, 6), 22), ((4, 6), 23)])
