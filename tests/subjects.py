"""What the laws run over: every registered mixer, and variants of its options that take another path through the code."""

from __future__ import annotations

from typing import Any

from recollect.mixers import available
from tests.laws import Maker, maker

# Heads of eight channels for memories with a LayerNorm: over the four of 16 / 4 it divides by almost nothing now and then.
PERCEPTRONS = ("atlas", "memora", "miras", "moneta", "omega", "titans", "ttt_linear", "ttt_mlp", "yaad")

SMALL: dict[str, dict[str, Any]] = {
    # Presets whose own size is beyond the laws' short sequences.
    "sliding_window": {"window": 5},
    **{name: {"window": 5, "memory_options": {"chunk_size": 4}} for name in ("memory_as_gate", "memory_as_layer")},
    **{name: {"chunk_size": 4, "n_heads": 2} for name in PERCEPTRONS},
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
    "miras, matrix memory, stale gradients": ("miras", {"memory": "matrix", "chunk_size": 4}),
    "miras, matrix memory, decayed gradients": ("miras", {"memory": "matrix", "chunk_size": 1, "gradient_at": "decayed"}),
    "miras, vector memory": (
        "miras",
        {"memory": "vector", "bias": "pseudo_huber", "retention": "towards_initial", "chunk_size": 4},
    ),
    "miras, gated memory": ("miras", {"memory": "gated_mlp", "bias": "value_shift", "chunk_size": 3}),
    "miras, three layers, bare": (
        "miras",
        {
            "memory": {"name": "mlp", "depth": 3, "expansion": 2, "activation": "silu", "residual": False},
            "conv_width": None,
            "rope_theta": None,
            "channel_gates": False,
            "chunk_size": 5,
        },
    ),
    "miras, one token a chunk": ("miras", {"bias": "l1", "chunk_size": 1}),
    "miras, coupled": ("miras", {"retention": "l2_coupled", "bias": "l_infinity", "chunk_size": 4}),
    "miras, local elastic net": ("miras", {"retention": "elastic_net", "chunk_size": 4}),
    "miras, elastic net": ("miras", {"retention": "elastic_net_ftrl", "read": "exact", "chunk_size": 4}),
    "miras, f-divergence": ("miras", {"retention": "f_divergence", "read": "exact", "chunk_size": 4, "n_heads": 2}),
    "miras, logit": ("miras", {"retention": "logit", "memory": "matrix", "chunk_size": 4}),
    "miras, implicit": ("miras", {"memory": "matrix", "rule": "implicit", "chunk_size": 1}),
    "miras, least squares": ("miras", {"memory": "matrix", "rule": "least_squares", "chunk_size": 1}),
    "miras, muon": ("miras", {"memory": {"name": "mlp", "depth": 1}, "rule": "muon", "chunk_size": 3}),
    "moneta, the paper's map": ("moneta", {"retention": {"name": "lq", "q": 4, "mode": "paper"}, "chunk_size": 4}),
    "moneta, exact read": ("moneta", {"read": "exact", "chunk_size": 4, "head_dim": 6}),
    "yaad, the paper's switch": ("yaad", {"bias": {"name": "huber", "kind": "switch_rms"}, "chunk_size": 4}),
    "memora, exact read": ("memora", {"read": "exact", "chunk_size": 4, "n_heads": 2}),
}


def subjects() -> dict[str, Maker]:
    """Maker by name, for every registered mixer (present and future) and every variant."""
    named = {name: maker(name, **SMALL.get(name, {})) for name in available()}
    wide = {name: {"n_heads": 2} for name in PERCEPTRONS}
    return named | {label: maker(name, **{**wide.get(name, {}), **options}) for label, (name, options) in VARIANTS.items()}
