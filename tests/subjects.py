"""What the laws run over: every registered mixer, and variants of its options that take another path through the code."""

from __future__ import annotations

from typing import Any

from recollect.mixers import available
from tests.laws import Maker, maker

SMALL: dict[str, dict[str, Any]] = {
    # Presets whose own size is beyond the laws' short sequences.
    "sliding_window": {"window": 5},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention, grouped heads": ("attention", {"n_kv_heads": 2, "head_dim": 6, "rope_theta": 5e5}),
    "attention, window of one": ("attention", {"window": 1}),
    "attention, window, grouped heads": ("attention", {"window": 4, "n_kv_heads": 1}),
    "diff, grouped heads": ("diff", {"n_kv_heads": 2, "layer": 3}),
    "diff_v2, grouped heads": ("diff_v2", {"n_kv_heads": 1}),
    "mta, materialized": ("mta", {"backend": "materialized"}),
    "mta, blocked": ("mta", {"backend": "blocked"}),
    "mta, grouped heads": ("mta", {"n_kv_heads": 2, "c_q": 3, "c_k": 3, "c_h": 2}),
    "mta, keys to the left": ("mta", {"pad_key": "left", "c_q": 3, "c_k": 4, "norm": "rms", "backend": "blocked"}),
    "mta, keys to the right": ("mta", {"pad_key": "right", "c_q": 3, "c_k": 3, "norm": "vector_gate"}),
    "mta, merged": ("mta", {"merged": True, "c_h": 2, "c_q": 3, "c_k": 3}),
    "mta, merged, before only": ("mta", {"merged": True, "kq_post": False, "c_q": 3, "c_k": 3, "norm": "none"}),
    "mta, after only": ("mta", {"kq_pre": False, "head_pre": False, "c_q": 3, "c_k": 3}),
    "mta, one query": ("mta", {"c_q": 1, "c_k": 5, "backend": "blocked"}),
    "mta, one key": ("mta", {"c_q": 4, "c_k": 1, "norm": "depth", "layer": 2, "backend": "blocked"}),
    "mta, no convolution": ("mta", {"kq": False}),
}


def subjects() -> dict[str, Maker]:
    """Maker by name, for every registered mixer (present and future) and every variant."""
    named = {name: maker(name, **SMALL.get(name, {})) for name in available()}
    return named | {label: maker(name, **options) for label, (name, options) in VARIANTS.items()}
