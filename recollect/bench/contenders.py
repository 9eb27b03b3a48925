"""What is timed: a registry of contenders by suite. Each says how to build its step, what it must equal, and what it needs to run.

A name is "SUITE/NAME" in the registry and NAME where the suite is known.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.bench.floor import Work
from recollect.bench.setting import Setting

ATTENTIONS = frozenset({"attention", "mta", "talking_heads", "diff"})  # mixers whose state grows with the context
CHECK_LENGTH = 96  # tokens of the comparison with the oracle: several tiles and chunks, and a rest

UNMEASURED = "not yet measured on a GPU by its authors"

Step = Callable[[], "list[Tensor]"]


class Check(NamedTuple):
    """What the comparison with the oracle said. error: largest relative error of outputs and gradients; allowed: the largest that
    passes; both None where there is nothing to compare with."""

    error: float | None
    allowed: float | None

    @property
    def passed(self) -> bool:
        return self.error is None or (self.allowed is not None and self.error <= self.allowed)  # NaN fails


class Contender(NamedTuple):
    """One line of a table.

    name, suite: what users type; about: one line, what it is.
    prepare: (setting, inputs of the suite) -> the step to time.
    check: setting -> the comparison with the oracle; None: it is not the same function as any of ours.
    work: (setting, length, step) -> operations and traffic of the step; None: unknown.
    needs: modules that must be importable.
    lacks: setting -> why it cannot run here, "" if it can.
    note: what a reader must know of its numbers, from the setting; "" for nothing.
    state_bytes: step -> size of a decoder's state; None: there is none.
    """

    name: str
    suite: str
    about: str
    prepare: Callable[[Setting, Any], Step]
    check: Callable[[Setting], Check] | None = None
    work: Callable[[Setting, int, Any], Work] | None = None
    needs: tuple[str, ...] = ()
    lacks: Callable[[Setting], str] = lambda setting: ""
    note: Callable[[Setting], str] = lambda setting: ""
    state_bytes: Callable[[Any], int] | None = None


class Suite(NamedTuple):
    """name; about: one line; inputs: (setting, length) -> what every contender gets, the same tensors for all."""

    name: str
    about: str
    inputs: Callable[[Setting, int], Any]


SUITES: dict[str, Suite] = {}
CONTENDERS: dict[str, Contender] = {}


def register(*contenders: Contender) -> None:
    """Add contenders under "SUITE/NAME"; a name that is there already is replaced."""
    CONTENDERS.update({f"{contender.suite}/{contender.name}": contender for contender in contenders})


def chosen(suite: str, names: Iterable[str] | None) -> list[Contender]:
    """The contenders of a suite, all or those named, in the order of the registry."""
    return [c for c in CONTENDERS.values() if c.suite == suite and (names is None or c.name in names)]


def check_names(suites: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, unless each is a contender of one of the suites."""
    known = list(dict.fromkeys(contender.name for suite in suites for contender in chosen(suite, None)))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"no contender {name!r}{hint} Contenders of {', '.join(suites)}: {', '.join(known)}")


def missing(contender: Contender, setting: Setting) -> str:
    """Why a contender cannot run here, "" if it can."""
    absent = [module for module in contender.needs if importlib.util.find_spec(module) is None]
    if absent:
        return f"{absent[0]} is not installed; python -m recollect.bench.peers says how"
    return contender.lacks(setting)


def only_cuda(setting: Setting) -> str:
    """For kernels that exist on a GPU only."""
    return "" if setting.kind == "cuda" else "runs on a GPU only"


def unmeasured(setting: Setting) -> str:
    """The note of everything of ours on a GPU, until its authors have timed it on one."""
    return UNMEASURED if setting.kind == "cuda" else ""


def relative_error(got: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest of |got - exact| / |exact| over pairs of tensors, in fp64; infinity for one that is not finite."""
    worst = 0.0
    for a, b in zip(got, exact, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def against(setting: Setting, got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> Check:
    """At most twice the error of plain PyTorch in the same precision, and a few roundings; in any case half of the digits are right.

    Args:
        got: of the contender; plain: of the plain form in the contender's precision; exact: of the plain form in fp64.
    """
    roundings = 8 * torch.finfo(setting.precision).eps
    allowed = min(2 * relative_error(plain, exact) + roundings, _half_of_the_digits(setting))
    return Check(relative_error(got, exact), allowed)


def over_a_chunk(setting: Setting) -> int:
    """Tokens that are a chunk of the chosen size and a half; 0 where none is chosen."""
    return 3 * (setting.chunk or 0) // 2


def worst(checks: Iterable[Check]) -> Check:
    """Of comparisons with an oracle the one that comes nearest to what is allowed, or exceeds it most."""
    return max(checks, key=lambda check: (check.error or 0.0) / (check.allowed or 1.0))


def loosely(setting: Setting, got: list[Tensor], exact: list[Tensor]) -> Check:
    """Half of the digits, for whole layers and models."""
    return Check(relative_error(got, exact), _half_of_the_digits(setting))


def _half_of_the_digits(setting: Setting) -> float:
    return float(torch.finfo(setting.precision).eps ** 0.5)
