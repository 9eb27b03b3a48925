"""What a model does with a text, as one HTML file that needs no network."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from torch import Tensor

from recollect import pages
from recollect.inspection.kernels import Kernel
from recollect.inspection.maps import LOGITS, N_TOP, TITLES, Attended
from recollect.inspection.memory import Reads
from recollect.inspection.strips import Strip
from recollect.inspection.view import Inspection, LayerView

SCRIPTS = ("state.js", "text.js", "maps.js", "kernels.js", "bar.js")
PATTERNS = {
    "zero": "no entry differs from zero",
    "identity": "the score of the same query and key, little else",
    "identity, negative": "the score of the same query and key with its sign turned, little else",
    "diagonal": "earlier queries with equally earlier keys: a run of queries that matches a run of keys",
    "priming": "the same key for earlier queries: strengthens what they attended",
    "suppression": "the same key for earlier queries, against the sign of the centre: weakens what they attended",
    "edge": "neighbouring keys against the sign of the own one: the first or last of a run of attended keys",
    "blur": "neighbouring keys with the sign of the own one: keys around an attended one",
    "mixed": "none of the named patterns holds half of what is beside the identity",
    "contrast": "mostly subtracts other heads",
    "mixing": "adds other heads",
}


TEXT = """Colours show the chosen quantity. Point at a token, or focus the text and use the arrow keys, to read all numbers of
the chosen layer and head; click or press Enter to follow where that token reads from."""
MAPS = """Each row is a query, each column a key that it may look at. <span id="pooling"></span> Click a row to follow where that
query reads from; the text above is then coloured by it."""
KERNELS = """A key-query kernel mixes the scores of neighbouring queries (rows) and keys (columns) into one; a fresh model has a
single 1 at query 0, key 0. A head-mixing matrix mixes the maps of several heads (columns) into each head (rows). A pattern is
named if it holds at least half of the energy (sum of squares) beside the centre, identity if nine tenths of all energy are there."""


def html(inspection: Inspection, *, model: str, text: str, command: str = "") -> str:
    """The whole page; every text that came from a file is escaped, numbers travel as JSON and base64.

    Args:
        inspection: from `inspect_text`.
        model, text: what the page calls them.
        command: how to make it again; shown on the page.
    """
    known = inspection.bits[~inspection.bits.isnan()]
    mean = f", {float(known.mean()):.2f} bits per token" if len(known) else ""
    return pages.page(
        title=f"{model} reads {text}",
        eyebrow="recollect inspect",
        headline=f"{model} reads {len(inspection.tokens):,} tokens of {text}{mean}",
        header=pages.command(command) + pages.notes(inspection.notes),
        main=[
            "<noscript><p class='warn'>This page draws with scripts, and they are off.</p></noscript>",
            "<div class='bar controls' id='bar'></div>",
            pages.section("text", "The text, token by token", pages.asset(__package__, "text.html"), lead=TEXT),
            pages.section(
                "maps",
                "Attention maps, stage by stage",
                "<div class='controls' id='map-controls'></div><div class='panels' id='map-panels'></div>",
                lead=MAPS,
                hidden=True,
            ),
            pages.section("kernels", "Kernels and head mixing", "<div id='kernel-grid'></div>", lead=KERNELS, hidden=True),
        ],
        css=pages.asset(__package__, "inspect.css"),
        data=data(inspection),
        scripts=[pages.asset(__package__, name) for name in SCRIPTS],
    )


def data(inspection: Inspection) -> dict[str, Any]:
    """What the scripts draw. Numbers travel with about three digits; see `pages.packed`."""
    bits = "-log2 of the probability that the model gave to this token before it read it: how much the token told it."
    whole = {
        "label": "whole model",
        "heads": 1,
        "strips": [{"key": "bits", "title": "Bits", "what": bits, "measured": None, **_packed(inspection.bits[None])}],
        "reads": None,
        "maps": [],
        "kernels": [],
        "missing": [],
    }
    return {
        "tokens": inspection.tokens,
        "pool": inspection.pool,
        "patterns": PATTERNS,
        "layers": [whole, *(_layer(view) for view in inspection.layers)],
    }


def _packed(values: Tensor, offset: float = 0.0) -> dict[str, Any]:
    return pages.packed(values.detach().double().numpy(), offset)


def _layer(view: LayerView) -> dict[str, Any]:
    return {
        "label": f"layer {view.label}",
        "heads": view.n_heads,
        "strips": [_strip(one) for one in view.strips],
        "reads": _reads(view),
        "maps": [] if view.attended is None else _maps(view.attended),
        "kernels": [_kernel(one) for one in view.kernels],
        "missing": view.missing,
    }


def _strip(one: Strip) -> dict[str, Any]:
    offset = 1.0 if one.key == "alpha" else 0.0
    return {"key": one.key, "title": one.title, "what": one.what, "measured": one.measured, **_packed(one.values, offset)}


def _reads(view: LayerView) -> dict[str, Any] | None:
    """Where a token's read comes from: "map" (a row of the last map, which is whole), "top" (its largest weights) or "some" (chosen
    tokens, every source)."""
    if view.attended is not None:
        last = view.attended.maps[-1]
        what = f"The weights that values are read with ({TITLES.get(last.stage, last.stage).lower()})"
        if last.block == 1:
            return {"kind": "map", "what": f"{what}."}
        keys = view.attended.keys.numpy().astype("<i4")
        return {
            "kind": "top",
            "what": f"{what}: the {N_TOP} farthest from zero; the others are not on this page.",
            "top": N_TOP,
            "keys": base64.b64encode(keys.tobytes()).decode("ascii"),
            **_packed(view.attended.weights),
        }
    reads: Reads | None = None if view.remembered is None else view.remembered.reads
    if reads is None:
        return None
    return {"kind": "some", "what": reads.what, "queries": reads.queries, **_packed(reads.values)}


def _maps(attended: Attended) -> list[dict[str, Any]]:
    """Lower triangles, row by row: entries after the query do not travel."""
    found = []
    for one in attended.maps:
        n = one.values.shape[-1]
        rows, columns = np.tril_indices(n)
        found.append(
            {
                "stage": one.stage,
                "title": TITLES.get(one.stage, one.stage),
                "logits": one.stage in LOGITS,
                "side": n,
                "block": one.block,
                **_packed(one.values[:, rows, columns]),
            }
        )
    return found


def _kernel(one: Kernel) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "title": one.title,
        "rows": one.values.shape[0],
        "cols": one.values.shape[1],
        "origin": one.origin,
        "first": one.first,
        "pattern": one.pattern.name,
        "share": _share(one),
        "heads": list(one.heads),
        "values": [float(f"{value:.4g}") if math.isfinite(value) else None for value in one.values.flatten().tolist()],
    }


def _share(one: Kernel) -> str:
    """What the pattern's number means, in words."""
    name, percent = one.pattern.name, f"{100 * one.pattern.share:.0f} %"
    place = "diagonal" if one.kind.startswith("head") else "centre"
    if name == "zero":
        return ""
    if name.startswith("identity"):
        return f"{percent} of the energy"
    return f"{percent} beside the {place}" if name in ("mixed", "mixing") else f"{percent} of what is beside the {place}"
