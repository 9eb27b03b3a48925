"""The laws of `scan` are themselves tested: deliberate bugs that they must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.ops.miras import MirasState, scan
from recollect.state import detach
from tests.ops.miras import product_space
from tests.ops.miras import test_scan_laws as laws
from tests.ops.miras.product_space import Choice

Outcome = tuple[Tensor, MirasState]

MOMENTUM = Choice("mlp2", "l2", "l2", "momentum", 4, "linear", "previous", "scalar")
WINDOW = Choice("mlp2", "l2", "l2", "omega", 4, "linear", "previous", "scalar")
MEMORA = Choice("mlp2", "l2", "kl", "gd", 4, "linear", "previous", "channels")
PLAIN = Choice("mlp2", "l2", "l2", "gd", 1, "linear", "previous", "channels")


def deaf_to_padding(*args: Any, valid: Tensor | None = None, **options: Any) -> Outcome:
    y, state = scan(*args, **options)
    return (y if valid is None else y.masked_fill(~valid[:, :, None, None], 0.0)), state


def reads_padding(spec: Any, q: Tensor, k: Tensor, *args: Any, **options: Any) -> Outcome:
    y, state = scan(spec, q, k, *args, **options)
    return y + 1e-14 * k.sum() * (y != 0), state


def deaf_to_documents(*args: Any, reset: Tensor | None = None, **options: Any) -> Outcome:
    return scan(*args, **options)


def _forgets(change: Callable[[MirasState], MirasState]) -> Callable[..., Outcome]:
    def mutant(*args: Any, **options: Any) -> Outcome:
        y, state = scan(*args, **options)
        return y, change(state)

    return mutant


def _without_anchor(state: MirasState) -> MirasState:
    return state._replace(anchor=state.dual)


def _without_kept(state: MirasState) -> MirasState:
    return state._replace(kept=None if state.kept is None else tuple(torch.zeros_like(k) for k in state.kept))


def _without_momentum(state: MirasState) -> MirasState:
    return state._replace(momentum=None if state.momentum is None else tuple(torch.zeros_like(s) for s in state.momentum))


def _without_tail(state: MirasState) -> MirasState:
    return state._replace(tail=None if state.tail is None else state.tail._replace(gamma=torch.zeros_like(state.tail.gamma)))


def leaks_the_future(*args: Any, **options: Any) -> Outcome:
    y, state = scan(*args, **options)
    return torch.cat((y[:, :-1] + 1e-15 * y[:, 1:], y[:, -1:]), dim=1), state


def mixes_rows(*args: Any, **options: Any) -> Outcome:
    y, state = scan(*args, **options)
    return y + 1e-15 * y.flip(0), state


def detaches_keys(spec: Any, q: Tensor, k: Tensor, *args: Any, backend: str | None = None, **options: Any) -> Outcome:
    return scan(
        spec, q, k if backend == "sequential" else k.detach() + 0.5 * (k - k.detach()), *args, backend=backend, **options
    )


def decays_the_step(spec: Any, q: Tensor, k: Tensor, v: Tensor, gates: Any, *args: Any, **options: Any) -> Outcome:
    return scan(spec, q, k, v, {**gates, "eta": gates["eta"] * gates["log_alpha"].exp()}, *args, **options)


def reads_before_writing(*args: Any, **options: Any) -> Outcome:
    y, state = scan(*args, **options)
    return torch.cat((torch.zeros_like(y[:, :1]), y[:, :-1]), dim=1), state


def _padding(choice: Choice) -> None:
    laws.test_padding_is_the_identity(choice, "chunked")


def _documents(choice: Choice) -> None:
    laws.test_documents_equal_each_alone(choice, "chunked")


def _causality(choice: Choice) -> None:
    laws.test_causality_bit_for_bit(choice, "chunked")


def _plain(choice: Choice) -> None:
    laws.test_chunk_size_one_is_the_plain_recurrence(choice, "chunked")


MUTANTS: dict[str, tuple[Callable[..., Outcome], Callable[[Choice], None], Choice]] = {
    "deaf to padding": (deaf_to_padding, _padding, MOMENTUM),
    "reads padding": (reads_padding, _padding, MOMENTUM),
    "deaf to documents": (deaf_to_documents, _documents, MOMENTUM),
    "forgets the anchor": (_forgets(_without_anchor), laws.test_split_equals_one_call, MOMENTUM),
    "forgets the decay since the anchor": (_forgets(_without_kept), laws.test_split_equals_one_call, MEMORA),
    "forgets the momentum": (_forgets(_without_momentum), laws.test_split_equals_one_call, MOMENTUM),
    "forgets the window": (_forgets(_without_tail), laws.test_split_equals_one_call, WINDOW),
    "leaks the future": (leaks_the_future, _causality, MOMENTUM),
    "mixes rows": (mixes_rows, laws.test_rows_are_independent, MOMENTUM),
    "detaches keys": (detaches_keys, laws.test_gradients_are_finite_and_equal_between_backends, MOMENTUM),
    "cuts the graph": (_forgets(detach), laws.test_gradient_through_split, MOMENTUM),
    "decays the step": (decays_the_step, _plain, PLAIN),
    "reads before writing": (reads_before_writing, _plain, PLAIN),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_law_catches_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a law that holds whatever the code does; the law itself holds without the bug."""
    mutant, law, choice = MUTANTS[name]
    law(choice)
    monkeypatch.setattr(product_space, "scan", mutant)
    with pytest.raises(AssertionError):
        law(choice)
