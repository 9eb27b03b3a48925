"""Sequence mixers: thin modules over `recollect.ops`, found by name in a registry."""

import recollect.mixers.attention
import recollect.mixers.delta
import recollect.mixers.differential
import recollect.mixers.gated
import recollect.mixers.hybrids
import recollect.mixers.linear
import recollect.mixers.mamba
import recollect.mixers.miras
import recollect.mixers.multi_token
import recollect.mixers.rwkv7  # noqa: F401 (each import registers its mixers)
from recollect.mixers.base import MIXERS, Mixer, MixerConfig, available, build, configure, entry, register
from recollect.mixers.patterns import PATTERNS, layer_options, register_pattern

__all__ = [
    "MIXERS",
    "PATTERNS",
    "Mixer",
    "MixerConfig",
    "available",
    "build",
    "configure",
    "entry",
    "layer_options",
    "register",
    "register_pattern",
]
