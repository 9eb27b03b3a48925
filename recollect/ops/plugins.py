"""Faster equals of the ops: packages that, when imported, add themselves to the registries of the ops' forms.

They are loaded by name on first use, so that the ops depend on no kernel.
"""

from __future__ import annotations

import importlib

PLUGINS = ("recollect.kernels",)


def load() -> None:
    """Import them, on the first call."""
    for name in PLUGINS:
        importlib.import_module(name)


# torch.compiler.assume_constant_result, which would import the compiler with this file: torch.compile runs it and does not look inside.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]
