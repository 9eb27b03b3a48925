"""recollect: sequence models that attend to many tokens at once and that memorise at test time.

    import recollect
    mixer = recollect.build("mta", dim=256, n_heads=4)      # any of recollect.available()
    y, state = mixer(x)                                      # x [B, T, D]; the state is a value
    y_next, state = mixer(x_next, state)                     # decoding is the same call

Everything is imported when it is first used: the command line sets up the process before torch is loaded, and mixers need torch only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect import mixers, models, ops, presets, state, tasks
    from recollect.mixers import Mixer, available, build

__version__ = "0.1.0"
__all__ = ["Mixer", "__version__", "available", "build", "mixers", "models", "ops", "presets", "state", "tasks"]


def __getattr__(name: str) -> Any:
    if name in ("Mixer", "available", "build"):
        return getattr(importlib.import_module("recollect.mixers"), name)
    if name in __all__:
        return importlib.import_module(f"recollect.{name}")
    raise AttributeError(f"module 'recollect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
