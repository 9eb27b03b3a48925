"""Deliberate bugs, each a small edit of the package's source, and the law or oracle test that must catch it.

A mutant is compiled from the source of the function that it changes and takes its place wherever the package holds that one.
If the source has moved on and an edit no longer applies, the mutant's test fails and says so: update the edit.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import pytest

from recollect.ops.multi_token import BACKENDS
from tests.laws import LAWS, maker
from tests.ops import test_attention, test_multi_token, test_multi_token_forms
from tests.ops.test_multi_token import Case

ATTENTION, MULTI_TOKEN = "recollect.ops.attention", "recollect.ops.multi_token"
STREAM, BLOCKS, SLOTS = "recollect.mixers.stream", "recollect.mixers.blocks", "recollect.ops.miras.slots"
MIRAS, CHUNKED, TILES = "recollect.mixers.miras", "recollect.ops.miras.chunked", "recollect.ops.tiles"
MIXER, PLACE, MTA = "recollect.mixers.attention", "recollect.mixers.place", "recollect.mixers.multi_token"


class Edit(NamedTuple):
    """Replace `old` (once) by `new` in the source of `module`'s `function` (a dotted name for a method)."""

    module: str
    function: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A bug and who must see it: a law's name with the subject it runs on, or an oracle test's name with its call."""

    name: str
    edits: tuple[Edit, ...]
    catcher: str
    check: Callable[[], None]


def by_law(name: str, edit: Edit | tuple[Edit, ...], law: str, mixer: str = "mta", **options: Any) -> Mutant:
    """A mutant that `law` must catch on a mixer; Multi-Token Attention runs in the form whose source is edited."""
    if mixer in ("mta", "mta_v1", "talking_heads"):
        options = {"backend": "blocked", **options}
    edits = edit if isinstance(edit, tuple) and isinstance(edit[0], Edit) else (edit,)
    return Mutant(name, edits, law, functools.partial(LAWS[law], maker(mixer, **options)))  # type: ignore[arg-type]


def by_test(name: str, edit: Edit, test: Callable[..., None], *args: Any) -> Mutant:
    """A mutant that keeps every law but is another op: an oracle test must catch it."""
    return Mutant(name, (edit,), test.__name__, functools.partial(test, *args))


def apply(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the edited function in the place of the original: in its module or class, and wherever the package imported it."""
    module = importlib.import_module(edit.module)
    *path, last = edit.function.split(".")
    owner = functools.reduce(getattr, path, module)
    original = inspect.getattr_static(owner, last)
    source = textwrap.dedent(inspect.getsource(original.fget if isinstance(original, property) else original))
    if source.count(edit.old) != 1:
        raise LookupError(
            f"the mutant's edit of {edit.module}.{edit.function} applies {source.count(edit.old)} times: update it"
        )
    namespace: dict[str, Any] = {}
    exec(compile(source.replace(edit.old, edit.new), f"<mutant of {edit.function}>", "exec"), vars(module), namespace)
    monkeypatch.setattr(owner, last, namespace[last])
    if not isinstance(original, FunctionType) or path:
        return
    for name, holder in list(sys.modules.items()):
        if name.startswith(("recollect", "tests")) and holder is not module:
            for attribute, value in list(vars(holder).items()):
                if value is original:
                    monkeypatch.setattr(holder, attribute, namespace[last])
    for name, value in list(BACKENDS.items()):
        if value is original:
            monkeypatch.setitem(BACKENDS, name, namespace[last])


LOOPS = test_multi_token.test_multi_token_attention_equals_the_loops
PAIRS = test_attention.test_differential_attention_equals_the_loops
PLAIN_KQ = Case("heads", "heads", None, None)

MUTANTS = [
    # masks
    by_law(
        "causal mask off by one",
        Edit(ATTENTION, "visible", "column <= row", "column <= row + 1"),
        "law_causality",
    ),
    by_law(
        "first mask missing: future logits enter the convolution",
        Edit(MULTI_TOKEN, "materialized", ".to(dtype).masked_fill(~seen, 0)", ".to(dtype)"),
        "law_causality",
    ),
    by_law(
        "second mask missing: the convolved weights reach future keys",
        Edit(MULTI_TOKEN, "materialized", "out = out.masked_fill(~seen, 0)", "out = out"),
        "law_causality",
    ),
    by_test(
        "softmax over hidden keys too",
        Edit(MULTI_TOKEN, "materialized", 'float("-inf")', "0.0"),
        LOOPS,
        PLAIN_KQ,
    ),
    by_test(
        "causal mask aligned to the first key with fewer queries than keys",
        Edit(ATTENTION, "softmax_attention", "plain and n_queries == n_keys and n_queries > 1", "plain and n_queries > 1"),
        test_attention.test_softmax_attention_equals_the_loops,
        {},
        3,
        4,
    ),
    by_law(
        "every token sees itself alone",
        Edit(ATTENTION, "visible", "column <= row", "column == row"),
        "law_reads_the_past",
        "talking_heads",
    ),
    by_law(
        "window one key too wide",
        Edit(ATTENTION, "visible", "column > row - window", "column >= row - window"),
        "law_split",
        "sliding_window",
        window=5,
    ),
    # the op's definition
    by_test(
        "kernel flipped in keys",
        Edit(MULTI_TOKEN, "convolve", "else kernel[:, None]", "else kernel[:, None].flip(-1)"),
        LOOPS,
        PLAIN_KQ,
    ),
    by_test(
        "kernel flipped in queries",
        Edit(MULTI_TOKEN, "convolve", "else kernel[:, None]", "else kernel[:, None].flip(-2)"),
        LOOPS,
        PLAIN_KQ,
    ),
    by_test(
        "head matrix transposed",
        Edit(MULTI_TOKEN, "mix_heads", "matrix @ grouped", "matrix.mT @ grouped"),
        LOOPS,
        Case(None, None, 2, 4),
    ),
    by_test(
        "head groups strided instead of consecutive",
        Edit(
            MULTI_TOKEN, "mix_heads", "x.reshape(x.shape[0], groups, size, -1)", "x.unflatten(1, (size, groups)).mT.flatten(3)"
        ),
        test_multi_token.test_the_3d_form_contains_the_separable_one,
        "materialized",
    ),
    by_test(
        "grouped heads tiled instead of repeated",
        Edit(
            MULTI_TOKEN,
            "scores",
            "q.transpose(1, 2).reshape(",
            "q.transpose(1, 2).unflatten(1, (n_heads // groups, groups)).transpose(1, 2).reshape(",
        ),
        LOOPS,
        Case("heads", None, None, None, "both", 2),
    ),
    by_test(
        "softmax scale wrong",
        Edit(MULTI_TOKEN, "multi_token_rows", "q.shape[-1] ** -0.5", "q.shape[-1] ** -1"),
        LOOPS,
        PLAIN_KQ,
    ),
    by_law(
        "softmax scale from the length instead of the head dim",
        Edit(MULTI_TOKEN, "multi_token_rows", "q.shape[-1] ** -0.5", "k.shape[1] ** -0.5"),
        "law_prefix",
    ),
    by_test(
        "differential maps added",
        Edit(ATTENTION, "differential_attention", "- lam[..., None]", "+ lam[..., None]"),
        PAIRS,
        2,
        4,
        6,
    ),
    by_test(
        "differential heads paired across halves",
        Edit(
            ATTENTION,
            "differential_attention",
            "q.unflatten(2, (n_pairs, 2)).unbind(3)",
            "q.unflatten(2, (2, n_pairs)).unbind(2)",
        ),
        PAIRS,
        2,
        4,
        6,
    ),
    by_test(
        "rotary turned the wrong way",
        Edit(ATTENTION, "rotary", "even * cos - odd * sin", "even * cos + odd * sin"),
        test_attention.test_rotary_products_depend_on_the_distance_alone,
    ),
    by_test(
        "dropout not rescaled",
        Edit(MULTI_TOKEN, "dropout_mask", "keep / (1 - settings.dropout_p)", "keep"),
        test_multi_token_forms.test_dropout_keeps_the_mean,
        "materialized",
    ),
    by_test(
        "halo of one convolution only",
        Edit(MULTI_TOKEN, "halo", "return sum(", "return max("),
        test_multi_token_forms.test_blocks_of_any_size_equal_the_oracle,
        5,
        False,
    ),
    # state
    by_law(
        "rotary positions restart after a split",
        Edit(PLACE, "locate", "positions = place.position[:, None] + ", "positions = "),
        "law_split",
        "attention",
    ),
    by_law(
        "earlier rows forgotten by the convolution",
        Edit(
            MULTI_TOKEN, "convolve", "torch.cat((before.to(x.dtype), x)", "torch.cat((torch.zeros_like(before).to(x.dtype), x)"
        ),
        "law_split",
    ),
    by_law(
        "state saved without a part of it",
        Edit("recollect.state", "filled", "lambda _: next(given)", "lambda _: torch.zeros_like(next(given))"),
        "law_state_round_trip",
        "attention",
    ),
    by_law(
        "beam search keeps the order of the rows",
        Edit("recollect.state", "select", "t.index_select(0, index.to(t.device))", "t[:1].expand(len(index), *t.shape[1:])"),
        "law_select",
        "attention",
    ),
    by_law(
        "position advanced in place",
        Edit(PLACE, "locate", "Place(place.position + count[:, -1]", "Place(place.position.add_(count[:, -1])"),
        "law_state_is_a_value",
        "attention",
    ),
    by_law(
        "a second continuation written over the first",
        Edit("recollect.ops.growing", "Room.takes", "self.written == first", "self.written >= first"),
        "law_state_may_be_continued_twice",
        "attention",
    ),
    by_law(
        "state without a row per sequence",
        Edit(PLACE, "origin", "torch.zeros(batch_size,", "torch.zeros(1,"),
        "law_state_shape",
        "attention",
    ),
    by_law(
        "every row of the map carried on",
        Edit(MULTI_TOKEN, "convolve", "carried, (left, right) = tall[:, :, n_queries:]", "carried, (left, right) = tall"),
        "law_state_growth",
    ),
    by_law(
        "window forgets a key too many",
        Edit(MIXER, "forget_outside", "state.k.shape[1] - (window - 1)", "state.k.shape[1] - (window - 2)"),
        "law_split",
        "sliding_window",
        window=5,
    ),
    by_law(
        "document start not moved when keys are forgotten",
        Edit(MIXER, "forget_outside", "(state.place.start - surplus).clamp(min=0)", "state.place.start"),
        "law_documents",
        "sliding_window",
        window=5,
    ),
    # padding and documents
    by_law(
        "padding attended",
        Edit(PLACE, "locate", "torch.where(real, current, PADDING)", "current"),
        "law_left_padding",
        "attention",
    ),
    by_law(
        "gradient flows into the padding",
        Edit(PLACE, "locate", "torch.where(real, current, PADDING)", "current"),
        "law_padding_gradients",
    ),
    by_law(
        "unmasked tokens of a decoding step taken for padding",
        Edit(PLACE, "locate", "torch.ones(batch_size, n_tokens", "torch.zeros(batch_size, n_tokens"),
        "law_mask_while_decoding",
        "attention",
    ),
    by_law(
        "norm over time: padding on the right changes the real rows",
        Edit("recollect.mixers.differential", "rms_norm", "mean(-1, keepdim=True)", "mean((1, -1), keepdim=True)"),
        "law_right_padding",
    ),
    by_law(
        "document cut missing in the convolution",
        Edit(MULTI_TOKEN, "convolve", "position - a >= start", "position >= start"),
        "law_documents",
    ),
    by_law(
        "documents see each other through the convolution's rows",
        Edit(MULTI_TOKEN, "convolve", "position - a >= start", "position >= start"),
        "law_documents_isolate",
    ),
    by_law(
        "document start counted inside the piece",
        Edit(PLACE, "locate", "steps + n_cached", "steps"),
        "law_documents",
        "attention",
    ),
    by_law(
        "padding joins the first document",
        Edit(PLACE, "locate", "torch.where(real, current, PADDING)", "current"),
        "law_padded_documents",
        "attention",
    ),
    # batch, gradients, precision, construction
    by_law(
        "norm over the batch",
        Edit("recollect.mixers.differential", "rms_norm", "mean(-1, keepdim=True)", "mean((0, -1), keepdim=True)"),
        "law_batch_independence",
    ),
    by_law(
        "gate detached from the graph",
        Edit(MTA, "MultiTokenAttention.normalise", "self.gate(heads)", "self.gate(heads.detach())"),
        "law_gradients",
    ),
    by_law(
        "gradient of the carried rows lost",
        Edit(MULTI_TOKEN, "_block_gradients", "if bottom == n_queries", "if bottom < 0"),
        "law_gradient_through_split",
    ),
    by_law(
        "gate forgotten",
        Edit(MTA, "MultiTokenAttention.normalise", "heads * self.gate(heads).sigmoid()", "heads"),
        "law_every_parameter_matters",
    ),
    by_law(
        "output in single precision",
        Edit(MIXER, "Projections.out", "self.o(heads.flatten(2))", "self.o(heads.flatten(2)).float()"),
        "law_shapes",
        "attention",
    ),
    by_law(
        "output of a bf16 mixer in single precision",
        Edit(MIXER, "Projections.out", "self.o(heads.flatten(2))", "self.o(heads.flatten(2)).float()"),
        "law_low_precision",
        "attention",
    ),
    by_law(
        "dropout while evaluating",
        Edit(MIXER, "Attention.forward", "self.config.dropout if self.training else 0.0", "self.config.dropout"),
        "law_determinism",
        "attention",
        dropout=0.3,
    ),
    by_law(
        "a number drawn at the start that no checkpoint holds",
        (
            Edit(MIXER, "Projections.reset_parameters", "std = ", "self.tilt = nn.Linear(1, 1).weight.item()\n    std = "),
            Edit(MIXER, "Projections.out", "self.o(heads.flatten(2))", "self.o(heads.flatten(2)) * self.tilt"),
        ),
        "law_state_dict_is_complete",
        "attention",
    ),
    by_law(
        "a weight that is not initialised",
        Edit(MIXER, "Projections.reset_parameters", "(self.q, self.k, self.v, self.o)", "(self.q, self.k, self.v)"),
        "law_reset_parameters",
        "attention",
    ),
    by_law(
        "picture of the future",
        Edit(MIXER, "Attention.maps", '.masked_fill(~seen, float("-inf"))', ""),
        "law_maps",
        "attention",
    ),
    # recurrent mixers: conv caches, streams, chunks
    by_law(
        "the short convolution reads the document before",
        Edit(
            BLOCKS,
            "ShortConvolution.forward",
            "if segment is not None:\n            past",
            "if False:\n            past",
        ),
        "law_documents",
        "delta_net",
    ),
    by_law(
        "the convolution's cache keeps another document's inputs",
        Edit(BLOCKS, "ShortConvolution.forward", "if segment is not None:\n        kept", "if False:\n        kept"),
        "law_documents",
        "delta_net",
    ),
    by_law(
        "the short convolution looks ahead",
        Edit(
            BLOCKS,
            "ShortConvolution.forward",
            "wide[:, width - 1 :] * weight[:, -1]",
            "wide[:, width - 1 :].roll(-1, 1) * weight[:, -1]",
        ),
        "law_causality",
        "delta_net",
    ),
    by_law(
        "padding enters the convolution",
        Edit(BLOCKS, "ShortConvolution.forward", "if valid is not None:", "if False:"),
        "law_left_padding",
        "gated_delta_net",
    ),
    by_law(
        "positions go on through documents",
        Edit(STREAM, "follow", "-base, stream.position[:, None])", "stream.position[:, None], stream.position[:, None])"),
        "law_documents",
        "yaad",
        chunk_size=4,
    ),
    by_law(
        "padding counts as tokens",
        Edit(STREAM, "follow", "count = real.cumsum(dim=1)", "count = torch.ones_like(real).cumsum(dim=1)"),
        "law_left_padding",
        "yaad",
        chunk_size=4,
    ),
    by_law(
        "a new document does not reset the memory",
        Edit(STREAM, "follow", "(ids != recent[:, :-1])", "(ids < 0)"),
        "law_documents",
        "retnet",
    ),
    by_law(
        "an open chunk is taken for a new one",
        Edit(SLOTS, "lay_out", "seen + phase[:, None]) % chunk_size", "seen) % chunk_size"),
        "law_split",
        "moneta",
        chunk_size=4,
    ),
    by_law(
        "the gradient point never moves",
        Edit(
            CHUNKED,
            "_settle",
            "return choose(complete, settled, dual), choose(complete, settled, anchor)",
            "return choose(complete, settled, dual), anchor",
        ),
        "law_split",
        "moneta",
        chunk_size=4,
    ),
    by_law(
        "the learned memory is not used",
        Edit(MIRAS, "Miras.memory_parameters", "tuple(self.fast)", "tuple(part.detach() for part in self.fast)"),
        "law_every_parameter_matters",
        "moneta",
        chunk_size=4,
    ),
]
