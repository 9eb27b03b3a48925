"""The suites, each of which registers what it times."""

from recollect.bench.contenders import CONTENDERS, SUITES
from recollect.bench.suites import (
    attention,
    attention_peers,
    decoding,
    memories,
    memory_kernels,
    memory_peers,
    models,
    training,
)

__all__ = [
    "CONTENDERS",
    "SUITES",
    "attention",
    "attention_peers",
    "decoding",
    "memories",
    "memory_kernels",
    "memory_peers",
    "models",
    "training",
]
