"""How long texts are cut and short ones put together, against what was promised of every token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from recollect.evaluation.rolling import blocks, depths, packed, windows

LEADS = ([0], [0, 0, 0])


def stretches(n: int, *sizes: int) -> list[np.ndarray]:
    """Tokens 1 to n in stretches of these sizes, which are taken in turn."""
    text, cut = np.arange(1, n + 1), itertools.accumulate(itertools.cycle(sizes))
    return np.split(text, list(itertools.takewhile(lambda end: end < n, cut)))


@pytest.mark.parametrize("sizes", [(1,), (3, 0, 5), (100,)])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 24])
def test_blocks_are_the_text_in_equal_parts(n: int, sizes: tuple[int, ...]) -> None:
    """Prevents tokens that are lost or doubled where stretches of a file end, and short blocks before the last."""
    found = list(blocks(stretches(n, *sizes), 8))
    assert list(itertools.chain(*found)) == list(range(1, n + 1))
    assert [len(block) for block in found] == [min(8, n - i) for i in range(0, n, 8)]


@pytest.mark.parametrize("lead", LEADS, ids=len)
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 41])
def test_windows_score_every_token_once_after_what_came_before_it(n: int, overlap: int, lead: list[int]) -> None:
    """Prevents a window that reads more than the model does, less than its overlap, or tokens that do not follow each other."""
    length = 8
    whole = [*lead, *range(1, n + 1)]
    end = len(lead)
    for tokens, n_scored in windows(lead, stretches(n, 5), length, overlap):
        end += n_scored
        assert (
            tokens == whole[end - len(tokens) : end]
        )  # the targets are the last ones, and right before them is what they follow
        assert n_scored < len(tokens) <= length + 1  # the last token is only predicted
        before = len(tokens) - n_scored
        assert before == end - n_scored or before >= overlap + 1 or len(tokens) == length + 1
    assert end == len(whole)


@pytest.mark.parametrize("n", [3, 11, 20])
def test_a_short_last_window_is_filled_up_with_what_came_before(n: int) -> None:
    """Prevents the last tokens of a text from being predicted from less than the others."""
    *_, (tokens, _) = windows([0], stretches(n, 4), 8, 0)
    assert len(tokens) == min(9, n + 1)


@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 41])
def test_depths_are_places_in_windows(n: int, overlap: int) -> None:
    """Prevents a curve over positions that no window has: tokens that a window reads before each that is scored, less one."""
    expected = []
    for tokens, n_scored in windows([0], stretches(n, 5), 8, overlap):
        expected += range(len(tokens) - n_scored - 1, len(tokens) - 1)
    assert depths(n, 8, overlap).tolist() == expected
    assert depths(n, None, overlap).tolist() == list(range(n))


def test_batches_hold_what_fits_with_padding() -> None:
    """Prevents a batch whose padding is not counted, rows out of order, and a long row that stops everything."""
    lengths = [3, 3, 2, 9, 1, 1, 25, 4]
    found = list(packed(range(len(lengths)), lambda i: lengths[i], 10))
    assert list(itertools.chain(*found)) == list(range(len(lengths)))
    assert found == [[0, 1, 2], [3], [4, 5], [6], [7]]
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10


def test_batches_are_as_large_as_they_can_be() -> None:
    """Prevents one row at a time."""
    assert [len(batch) for batch in packed([1] * 25, lambda each: each, 10)] == [10, 10, 5]
