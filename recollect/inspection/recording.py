"""What a layer really gives to its recurrence, caught on the way in.

A mixer's queries, keys, values and gates are made inside its `mix` and leave it only through the op that it calls. To take them from
there needs no second copy of any layer's arithmetic, and holds for a user's mixer too. The price: for the moment of one call the op's
name in the mixer's module means a wrapper, so nothing else may run that module meanwhile.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from recollect.mixers import Mixer
from recollect.ops.linear_scan import least_squares_scan
from recollect.ops.miras import scan
from recollect.ops.selective_scan import selective_scan

OPS: dict[str, Callable[..., Any]] = {
    "scan": scan,
    "least_squares_scan": least_squares_scan,
    "selective_scan": selective_scan,
}


class Call(NamedTuple):
    """op: a key of OPS; arguments: what it was called with, by parameter, those left out left out."""

    op: str
    arguments: dict[str, Any]


@contextmanager
def recorded(mixer: Mixer) -> Iterator[list[Call]]:
    """While it is open, every call of an op by the modules of the mixer's class and its bases is appended to the list."""
    calls: list[Call] = []

    def wrapper(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call(name, dict(signature.bind(*args, **kwargs).arguments)))
            return op(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module in {cls.__module__ for cls in type(mixer).__mro__}:
            space = vars(sys.modules[module])
            found = {key: wrapper(name, op) for key, value in space.items() for name, op in OPS.items() if value is op}
            stack.enter_context(patch.dict(space, found))
        yield calls
