"""The suite is tested too: every deliberate bug must be caught, and every law must have caught one."""

from __future__ import annotations

import pytest
from torch.autograd.gradcheck import GradcheckError

from tests.laws import LAWS
from tests.mutants import MUTANTS, Mutant, apply


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a law or oracle that passes whatever the code does: it holds before the bug and breaks with it."""
    mutant.check()
    for edit in mutant.edits:
        apply(edit, monkeypatch)
    with pytest.raises((AssertionError, GradcheckError)):
        mutant.check()


def test_every_law_has_caught_a_mutant() -> None:
    """Prevents a law that is added without a bug that it is known to see."""
    assert set(LAWS) - {mutant.catcher for mutant in MUTANTS} == set()


def test_mutants_are_gone_afterwards() -> None:
    """Prevents a mutant that outlives its test and spoils the others: the functions are the package's own again."""
    import recollect.ops.multi_token as module

    assert module.BACKENDS["materialized"] is module.materialized
    assert "mutant" not in module.materialized.__code__.co_filename
