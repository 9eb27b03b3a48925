"""Sequence mixers: thin modules over `recollect.ops`, found by name in a registry."""

import recollect.mixers.attention
import recollect.mixers.differential
import recollect.mixers.multi_token  # noqa: F401 (each import registers its mixers)
from recollect.mixers.base import MIXERS, Mixer, MixerConfig, available, build, configure, entry, layer_options, register

__all__ = ["MIXERS", "Mixer", "MixerConfig", "available", "build", "configure", "entry", "layer_options", "register"]
