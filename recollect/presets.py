"""The models of the Miras paper as specs for `recollect.ops.miras.scan`: `recollect.presets.moneta(p=3, q=4)`."""

from recollect.ops.miras.presets import *  # noqa: F403 (the names are listed there)
from recollect.ops.miras.presets import __all__ as __all__
