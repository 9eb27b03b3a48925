"""The papers' hybrids of memory and attention, as patterns of layers."""

from __future__ import annotations

import recollect.mixers.attention
import recollect.mixers.delta
import recollect.mixers.mamba
import recollect.mixers.miras
import recollect.mixers.multi_token
import recollect.mixers.wiring  # noqa: F401 (a pattern's mixers are registered before it)
from recollect.mixers.patterns import register_pattern

for memory in ("moneta", "yaad", "memora"):
    register_pattern(
        f"{memory}-h",
        [memory, "sliding_window"],
        summary=f"{memory} and sliding-window attention in turn, each before its SwiGLU (Samba's order)",
        source="arXiv 2504.13173",
    )

register_pattern(
    "samba",
    ["mamba", "sliding_window"],
    summary="Samba: Mamba and sliding-window attention in turn, each before its SwiGLU",
    source="arXiv 2406.07522",
)
register_pattern(
    "gated_delta_net-h2",
    ["mamba2", "gated_delta_net", "sliding_window"],
    summary="Gated DeltaNet-H2: Mamba-2, Gated DeltaNet and sliding-window attention in turn, each before its SwiGLU",
    source="arXiv 2412.06464",
)

for memory in ("titans", "moneta", "yaad", "memora"):
    register_pattern(
        f"{memory}-mag",
        [{"mixer": "memory_as_gate", "memory": memory}],
        summary=f"sliding-window attention gated by {memory}, in one layer",
        source="arXiv 2501.00663",
    )
    register_pattern(
        f"{memory}-mal",
        [{"mixer": "memory_as_layer", "memory": memory}],
        summary=f"{memory}, then sliding-window attention, without a SwiGLU between them",
        source="arXiv 2501.00663",
    )

register_pattern(
    "mta-h",
    ["mta", "moneta"],
    summary="Multi-Token Attention and moneta in turn",
    source="arXiv 2504.00927, arXiv 2504.13173",
)
