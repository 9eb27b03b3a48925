"""The stage that looks at learned kernels: which share of them shows which pattern, and a picture of each model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from recollect.inference.text_model import load_saved
from recollect.inspection.kernels import Kernel, kernels
from recollect.models.layers import Block

KINDS = {
    "kq_pre": "kernels before",
    "kq_post": "kernels after",
    "head_pre": "head mixing before",
    "head_post": "head mixing after",
}
ACROSS = 8  # kernels in a row of the picture


class Learned(NamedTuple):
    """A kernel or matrix of a model; layer: 0-based."""

    layer: int
    kernel: Kernel


def learned(folder: Path) -> list[Learned]:
    """Every kernel and head-mixing matrix of a saved model, layer by layer.

    Raises:
        ValueError: no model there, or a damaged one.
    """
    blocks = [module for module in load_saved(folder)[1].modules() if isinstance(module, Block)]
    return [Learned(depth, one) for depth, block in enumerate(blocks) for one in kernels(block.mixer)]


def shares(models: Sequence[Sequence[Learned]]) -> dict[str, dict[str, list[float | None]]]:
    """kind -> pattern -> share of that kind's kernels per model, patterns that occur in any model first by how often; None for a
    model without kernels of the kind."""
    found = {}
    for kind in KINDS:
        counts = [Counter(one.kernel.pattern.name for one in model if one.kernel.kind == kind) for model in models]
        names = [name for name, _ in sum(counts, Counter()).most_common()]
        if names:
            found[kind] = {name: [count[name] / count.total() if count else None for count in counts] for name in names}
    return found


def draw(model: Sequence[Learned], title: str) -> Figure:
    """Every key-query kernel of a model, one scale each: columns are key offsets, rows queries, the current one at the bottom.

    Args:
        model: with at least one such kernel.
        title: of the picture.
    """
    shown = [one for one in model if one.kernel.kind.startswith("kq")]
    n_rows = -(-len(shown) // ACROSS)
    figure = Figure(figsize=(1.6 * min(len(shown), ACROSS) + 0.4, 1.3 * n_rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels: Any = figure.subplots(n_rows, min(len(shown), ACROSS), squeeze=False).flatten()
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel, (layer, kernel) in zip(panels, shown, strict=False):
        most = float(kernel.values.abs().max()) or 1.0
        n_queries, n_keys = kernel.values.shape
        panel.imshow(kernel.values.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        panel.set_xticks(
            [0, kernel.origin, n_keys - 1], [str(-kernel.origin), "0", f"+{n_keys - 1 - kernel.origin}"], fontsize=6
        )
        panel.set_yticks([0, n_queries - 1], [str(1 - n_queries), "0"], fontsize=6)
        side = KINDS[kernel.kind].removeprefix("kernels ")
        panel.set_title(f"layer {layer} {kernel.title}, {side}\n{kernel.pattern.name}", fontsize=6)
    return figure
