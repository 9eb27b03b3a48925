"""The laws of sequence mixers, each as a function of a maker, so that the mutants can ask whether a law catches a bug.

A maker returns a fresh mixer: the same numbers at every call, every parameter moved off its initial value (a kernel that starts
as the identity hides every bug in its own use), fp64, in evaluation mode. A law raises AssertionError where it is broken.

Exact algebra holds to 1e-12 in fp64; causality, padding and batch independence hold bit for bit.

Axis legend: B batch, T time, D model dim.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recollect import state as states
from recollect.mixers import Mixer, build
from recollect.state import State

Maker = Callable[[], Mixer]
Law = Callable[[Maker], None]

EXACT = 1e-12
DIM, N_HEADS = 16, 4


def maker(name: str, *, dim: int = DIM, n_heads: int = N_HEADS, seed: int = 1, **options: object) -> Maker:
    """A maker of the registered mixer `name` with its options."""

    def make() -> Mixer:
        torch.manual_seed(seed)
        return randomised(build(name, dim=dim, n_heads=n_heads, **options).double().eval(), seed)

    return make


def randomised(mixer: Mixer, seed: int) -> Mixer:
    """Add noise to every parameter, so that identities, zeros and ones at initialisation hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return mixer


def sequence(n_rows: int, length: int, *, seed: int = 0, dim: int = DIM) -> Tensor:
    """Standard normal x [B, T, D], fp64."""
    return torch.randn(n_rows, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_pieces(
    mixer: Mixer,
    x: Tensor,
    cuts: Sequence[int],
    *,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    between: Callable[[State], State] = lambda carried: carried,
) -> tuple[Tensor, State]:
    """y and the last state of x cut at `cuts`; each piece continues from the state before it, sent through `between`."""
    carried, outputs, edges = None, [], [0, *cuts, x.shape[1]]
    for start, stop in itertools.pairwise(edges):
        y, carried = mixer(
            x[:, start:stop],
            carried,
            mask=None if mask is None else mask[:, start:stop],
            document_ids=None if document_ids is None else document_ids[:, start:stop],
        )
        outputs.append(y)
        carried = between(carried)
    return torch.cat(outputs, dim=1), carried


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Every entry within `tolerance` (absolute, relative to the largest expected magnitude where that is above 1)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not actual.numel():
        return
    error = float(((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).detach())
    assert error <= tolerance, f"{what}: error {error:.2e} above {tolerance:.0e}"


def assert_bitwise(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same bits (atol = 0)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    different = (actual != expected).sum()
    assert not different, (
        f"{what}: {int(different)} of {actual.numel()} entries changed, by up to {(actual - expected).abs().max():.1e}"
    )


def assert_same_state(actual: State, expected: State, tolerance: float, what: str) -> None:
    """Equal leaves, by name."""
    for (name, a), (other, b) in zip(states.leaves(actual), states.leaves(expected), strict=True):
        assert name == other, f"{what}: leaf {name} against {other}"
        if a.is_floating_point():
            assert_near(a, b, tolerance, f"{what}: state {name}")
        else:
            assert torch.equal(a, b), f"{what}: state {name}"


# --- time and batch ---------------------------------------------------------------------------------------------------------


def law_causality(make: Maker) -> None:
    """Changing x_t.. changes no bit of the rows before t, and does change row t."""
    mixer, x = make(), sequence(2, 13)
    y, _ = mixer(x)
    for t in (0, 1, 4, 11, 12):
        changed = x.clone()
        changed[:, t:] += sequence(2, 13 - t, seed=9)
        perturbed, _ = mixer(changed)
        assert_bitwise(perturbed[:, :t], y[:, :t], f"rows before {t}")
        assert (perturbed[:, t] - y[:, t]).abs().max() > 1e-6, f"row {t} does not depend on x at {t}"


def law_reads_the_past(make: Maker) -> None:
    """Row 3 depends on x_0: a mixer that ignores its memory passes every other law."""
    mixer, x = make(), sequence(1, 4)
    changed = x.clone()
    changed[:, 0] += 1.0
    assert (mixer(changed)[0][:, 3] - mixer(x)[0][:, 3]).abs().max() > 1e-6


def law_batch_independence(make: Maker) -> None:
    """Changing the other rows of the batch changes no bit of this one; alone, a row gives the same numbers."""
    mixer, x = make(), sequence(3, 11)
    changed = sequence(3, 11, seed=5)
    changed[1] = x[1]
    y, carried = mixer(x)
    other, other_carried = mixer(changed)
    assert_bitwise(other[1], y[1], "row 1")
    more = sequence(3, 4, seed=6)
    assert_bitwise(mixer(more, other_carried)[0][1], mixer(more, carried)[0][1], "row 1, continued")
    assert_near(mixer(x[1:2])[0], y[1:2], EXACT, "row 1 alone")


def law_prefix(make: Maker) -> None:
    """A sequence of any length, odd or one token, gives the beginning of a longer one."""
    mixer, x = make(), sequence(2, 33)
    y, _ = mixer(x)
    for length in (1, 2, 3, 5, 8, 17, 31):
        assert_near(mixer(x[:, :length])[0], y[:, :length], EXACT, f"length {length}")


# --- state ------------------------------------------------------------------------------------------------------------------


def law_split(make: Maker) -> None:
    """Any split with carried state equals one call, token by token included."""
    mixer, x = make(), sequence(2, 14)
    y, end = mixer(x)
    following, _ = mixer(sequence(2, 3, seed=4), end)
    for cuts in ([1], [7], [13], [2, 3, 9], [5, 6, 7, 8], list(range(1, 14))):
        pieces, carried = in_pieces(mixer, x, cuts)
        assert_near(pieces, y, EXACT, f"cuts {cuts}")
        continued, _ = mixer(sequence(2, 3, seed=4), carried)
        assert_near(continued, following, EXACT, f"after cuts {cuts}")


def law_state_round_trip(make: Maker) -> None:
    """Detached, selected, saved and loaded between the pieces, a state still equals one call."""
    mixer, x = make(), sequence(2, 9)
    y, _ = mixer(x)
    flip = torch.tensor([1, 0])

    def twice_flipped(carried: State) -> State:
        return states.select(states.select(carried, flip), flip)

    def through_a_file(carried: State) -> State:
        with tempfile.TemporaryDirectory() as folder:
            states.save(carried, Path(folder) / "state", fingerprint="law")
            return states.load(Path(folder) / "state", mixer.init_state(1), fingerprint="law")

    for between in (states.detach, twice_flipped, through_a_file):
        assert_near(in_pieces(mixer, x, [1, 4, 5], between=between)[0], y, EXACT, between.__name__)


def law_select(make: Maker) -> None:
    """Rows selected from a state continue as the sequences they came from: beam search."""
    mixer, x, more = make(), sequence(3, 6), sequence(4, 5, seed=3)
    index = torch.tensor([2, 0, 0, 1])
    selected, _ = mixer(more, states.select(mixer(x)[1], index))
    whole, _ = mixer(torch.cat([x[index], more], dim=1))
    assert_near(selected, whole[:, 6:], EXACT, "selected rows")


def law_state_is_a_value(make: Maker) -> None:
    """A call changes neither its input nor the state that it was given: continuing twice gives the same result twice."""
    mixer, x = make().requires_grad_(False), sequence(2, 7)
    kept_x = x.clone()
    _, carried = mixer(x)
    kept = states.map_state(torch.clone, carried)
    first, second = sequence(2, 4, seed=1), sequence(2, 1, seed=2)
    y, _ = mixer(first, carried)
    for piece in (second, first):
        again, _ = mixer(piece, carried)
    assert_bitwise(again, y, "the second continuation")
    assert_bitwise(x, kept_x, "the input")
    assert_same_state(carried, kept, 0.0, "the state given")
    y_mutated, later = mixer(second, carried)
    y_mutated.add_(1.0)
    assert_bitwise(mixer(second, carried)[0] + 1.0, y_mutated, "after the output was overwritten")
    states.map_state(lambda leaf: leaf.zero_(), later)
    assert_same_state(carried, kept, 0.0, "the state given, after the next one was overwritten")


def law_state_may_be_continued_twice(make: Maker) -> None:
    """Also where no gradients are computed, and caches grow in place: a continuation changes neither the state it starts from nor the
    state that an earlier continuation ended with."""
    mixer = make().requires_grad_(False)
    with torch.no_grad():
        _, carried = mixer(sequence(2, 7))
        _, carried = mixer(sequence(2, 1, seed=1), carried)
        kept = states.map_state(torch.clone, carried)
        y, first = mixer(sequence(2, 3, seed=2), carried)
        kept_first = states.map_state(torch.clone, first)
        mixer(sequence(2, 3, seed=3), carried)
        assert_same_state(carried, kept, 0.0, "the state given")
        assert_same_state(first, kept_first, 0.0, "where the first continuation ended")
        assert_bitwise(mixer(sequence(2, 3, seed=2), carried)[0], y, "a third continuation")


def law_state_shape(make: Maker) -> None:
    """Every leaf is batch first; `init_state` has the structure of what a call returns and means the start of the sequence."""
    mixer, x = make(), sequence(3, 5)
    start = mixer.init_state(3)
    y, end = mixer(x)
    for what, carried in (("init_state", start), ("returned state", end)):
        for name, leaf in states.leaves(carried):
            assert leaf.shape[:1] == (3,), f"{what}: leaf {name} has shape {tuple(leaf.shape)}, not batch first"
    assert [name for name, _ in states.leaves(start)] == [name for name, _ in states.leaves(end)]
    assert [leaf.dtype for _, leaf in states.leaves(start)] == [leaf.dtype for _, leaf in states.leaves(end)]
    assert_near(mixer(x, start)[0], y, EXACT, "starting from init_state")


def law_state_growth(make: Maker) -> None:
    """State bytes grow at most linearly, by the same amount per token or not at all, however the sequence was cut."""
    mixer = make()
    sizes = [states.nbytes(mixer(sequence(1, length))[1]) for length in (40, 60, 80)]
    assert 0 <= sizes[2] - sizes[1] <= sizes[1] - sizes[0], f"bytes after 40, 60, 80 tokens: {sizes}"
    _, stepwise = in_pieces(mixer, sequence(1, 80), list(range(1, 80)))
    assert states.nbytes(stepwise) == sizes[2], f"{states.nbytes(stepwise)} bytes token by token, {sizes[2]} in one call"


# --- padding and documents --------------------------------------------------------------------------------------------------


def padded_case() -> tuple[Tensor, Tensor, list[int]]:
    """x [3, 12, D] whose rows start at 0, 3 and 7, its mask, and the starts."""
    starts = [0, 3, 7]
    mask = torch.arange(12)[None, :] >= torch.tensor(starts)[:, None]
    return sequence(3, 12), mask, starts


def law_left_padding(make: Maker) -> None:
    """A left-padded row equals the row alone, now, continued, and split anywhere; what stands at the pads changes no bit."""
    mixer, (x, mask, starts), more = make(), padded_case(), sequence(3, 4, seed=8)
    y, carried = mixer(x, mask=mask)
    assert torch.isfinite(y).all(), "outputs at padding are not finite"
    continued, _ = _continue(mixer, more, carried)
    for b, start in enumerate(starts):
        alone, alone_carried = mixer(x[b : b + 1, start:])
        assert_near(y[b : b + 1, start:], alone, EXACT, f"row {b} with {start} pads")
        alone_continued, _ = _continue(mixer, more[b : b + 1], alone_carried)
        assert_near(continued[b : b + 1], alone_continued, EXACT, f"row {b} with {start} pads, continued")

    other = torch.where(mask[..., None], x, 1e3 * sequence(3, 12, seed=7))
    other_y, other_carried = mixer(other, mask=mask)
    assert_bitwise(other_y[mask], y[mask], "after the pads' content changed")
    assert_bitwise(_continue(mixer, more, other_carried)[0], continued, "continued after the pads' content changed")

    for cuts in ([3], [5], [7], list(range(1, 12))):
        pieces, piecewise = in_pieces(mixer, x, cuts, mask=mask)
        assert_near(pieces[mask], y[mask], EXACT, f"padded, cuts {cuts}")
        assert_near(_continue(mixer, more, piecewise)[0], continued, EXACT, f"padded, after cuts {cuts}")


def _continue(mixer: Mixer, x: Tensor, carried: State) -> tuple[Tensor, State]:
    """Decode x from `carried` as generation does: one token, then the rest."""
    first, carried = mixer(x[:, :1], carried)
    rest, carried = mixer(x[:, 1:], carried)
    return torch.cat([first, rest], dim=1), carried


def law_mask_while_decoding(make: Maker) -> None:
    """A mask of ones given with each new token changes nothing."""
    mixer, (x, mask, _) = make(), padded_case()
    _, carried = mixer(x, mask=mask)
    token = sequence(3, 1, seed=2)
    assert_near(
        mixer(token, carried, mask=torch.ones(3, 1, dtype=torch.bool))[0], mixer(token, carried)[0], EXACT, "masked token"
    )
    full = torch.ones(3, 12, dtype=torch.bool)
    assert_near(mixer(x, mask=full)[0], mixer(x)[0], EXACT, "a mask of ones")


def law_right_padding(make: Maker) -> None:
    """Right padding changes no bit of the real rows, and its outputs are finite."""
    mixer, x = make(), sequence(3, 10)
    mask = torch.arange(10)[None, :] < torch.tensor([10, 6, 1])[:, None]
    y, _ = mixer(x, mask=mask)
    assert torch.isfinite(y).all(), "outputs at padding are not finite"
    other, _ = mixer(torch.where(mask[..., None], x, 1e3), mask=mask)
    assert_bitwise(other[mask], y[mask], "real rows")
    assert_near(y[1:2, :6], mixer(x[1:2, :6])[0], EXACT, "row 1 alone")


def law_padding_gradients(make: Maker) -> None:
    """Gradients through a padded batch are finite, zero at the pads, and equal to the rows' own."""
    mixer, (x, mask, starts) = make(), padded_case()
    weights = sequence(3, 12, seed=3)
    leaf = x.clone().requires_grad_()
    y, _ = mixer(leaf, mask=mask)
    ((y * weights) * mask[..., None]).sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all(), "gradients of a padded batch are not finite"
    assert_bitwise(leaf.grad[~mask], torch.zeros_like(leaf.grad[~mask]), "gradient at the pads")
    for b, start in enumerate(starts):
        alone = x[b : b + 1, start:].clone().requires_grad_()
        (mixer(alone)[0] * weights[b : b + 1, start:]).sum().backward()
        assert alone.grad is not None
        assert_near(leaf.grad[b : b + 1, start:], alone.grad, 1e-10, f"gradient of row {b}")


def packed_case() -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
    """x [2, 15, D], document ids, and the spans of the documents of each row."""
    spans = [[(0, 4), (4, 5), (5, 12), (12, 15)], [(0, 9), (9, 15)]]
    ids = torch.zeros(2, 15, dtype=torch.int64)
    for b, row in enumerate(spans):
        for n, (start, stop) in enumerate(row):
            ids[b, start:stop] = n + 1
    return sequence(2, 15), ids, spans


def law_documents(make: Maker) -> None:
    """Packed documents equal each document alone, in one call and split anywhere, also inside a document."""
    mixer, (x, ids, spans) = make(), packed_case()
    y, _ = mixer(x, document_ids=ids)
    for b, row in enumerate(spans):
        for start, stop in row:
            alone, _ = mixer(x[b : b + 1, start:stop])
            assert_near(y[b : b + 1, start:stop], alone, EXACT, f"row {b}, document {start}:{stop}")
    for cuts in ([5], [7], [2, 9, 13], list(range(1, 15))):
        assert_near(in_pieces(mixer, x, cuts, document_ids=ids)[0], y, EXACT, f"documents, cuts {cuts}")
    same = torch.full((2, 15), 7)
    assert_near(mixer(x, document_ids=same)[0], mixer(x)[0], EXACT, "one document id throughout")


def law_documents_isolate(make: Maker) -> None:
    """Changing one document changes no bit of the others, in one call and after a split."""
    mixer, (x, ids, _) = make(), packed_case()
    changed = x.clone()
    changed[0, :5] += 1.0
    for cuts in ([], [6], list(range(1, 15))):
        y, _ = in_pieces(mixer, x, cuts, document_ids=ids)
        other, _ = in_pieces(mixer, changed, cuts, document_ids=ids)
        assert_bitwise(other[0, 5:], y[0, 5:], f"other documents, cuts {cuts}")


def law_padded_documents(make: Maker) -> None:
    """Left padding and document ids together: each real document equals itself alone, also split."""
    mixer, (x, ids, spans) = make(), packed_case()
    pads, shift = sequence(2, 3, seed=11), 3
    x, ids = torch.cat([pads, x], dim=1), torch.cat([ids[:, :1].expand(2, 3), ids], dim=1)
    mask = torch.arange(18)[None, :].expand(2, 18) >= shift
    for cuts in ([], [2], [10]):
        y, _ = in_pieces(mixer, x, cuts, mask=mask, document_ids=ids)
        for b, row in enumerate(spans):
            for start, stop in row:
                here = slice(start + shift, stop + shift)
                assert_near(
                    y[b : b + 1, here], mixer(x[b : b + 1, here])[0], EXACT, f"row {b}, document {start}:{stop}, cuts {cuts}"
                )


# --- gradients, precision, construction -------------------------------------------------------------------------------------


def law_gradients(make: Maker) -> None:
    """Analytic gradients with respect to the input and every parameter equal finite differences."""
    mixer = make()
    names = [name for name, _ in mixer.named_parameters()]
    x = sequence(1, 5).requires_grad_()

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        y, _ = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(outputs, (x, *mixer.parameters()), fast_mode=True)


def law_gradient_through_split(make: Maker) -> None:
    """Back-propagation through carried states equals back-propagation through one call."""
    mixer, x, weights = make(), sequence(2, 10), sequence(2, 10, seed=2)

    def gradients(cuts: Sequence[int]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y, _ = in_pieces(mixer, leaf, cuts)
        return list(torch.autograd.grad((y * weights).sum(), [leaf, *mixer.parameters()]))

    whole = gradients([])
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    for cuts in ([4], [1, 2, 8], list(range(1, 10))):
        for name, actual, expected in zip(names, gradients(cuts), whole, strict=True):
            assert_near(actual, expected, 1e-10, f"gradient of {name}, cuts {cuts}")


def law_every_parameter_matters(make: Maker) -> None:
    """Every parameter has a gradient that is not zero: nothing is registered and forgotten."""
    mixer, x = make(), sequence(2, 9)
    (mixer(x)[0] * sequence(2, 9, seed=2)).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"parameter {name} is not used"
        assert parameter.grad.abs().max() > 0, f"the gradient of parameter {name} is zero"


def law_low_precision(make: Maker) -> None:
    """fp32 and bf16 give outputs of their dtype, finite, near fp64; so do states carried on."""
    mixer, x = make(), sequence(2, 24)
    y, _ = mixer(x)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        low = make().to(dtype)
        for cuts in ([], [9]):
            rounded, _ = in_pieces(low, x.to(dtype), cuts)
            assert rounded.dtype == dtype, f"{dtype} input gives {rounded.dtype} output"
            assert_near(rounded.double(), y, tolerance, f"{dtype}, cuts {cuts}")


def law_determinism(make: Maker) -> None:
    """In evaluation mode the same input gives the same bits, whatever the global generator holds."""
    mixer, x = make(), sequence(2, 8)
    torch.manual_seed(1)
    first, _ = mixer(x)
    torch.manual_seed(2)
    assert_bitwise(mixer(x)[0], first, "second call")


def law_state_dict_is_complete(make: Maker) -> None:
    """A state_dict carries everything that the outputs depend on."""
    mixer, x = make(), sequence(2, 8)
    fresh = make()
    torch.manual_seed(123)
    fresh.reset_parameters()
    fresh.load_state_dict(mixer.state_dict())
    assert_bitwise(fresh(x)[0], mixer(x)[0], "after load_state_dict")


def law_reset_parameters(make: Maker) -> None:
    """`reset_parameters` fills every parameter, as a function of torch's seed: how a model built on the meta device starts."""
    mixer = make()
    drawn = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.fill_(float("nan"))
        torch.manual_seed(3)
        mixer.reset_parameters()
        drawn.append({name: parameter.detach().clone() for name, parameter in mixer.named_parameters()})
    for name, parameter in drawn[0].items():
        assert torch.isfinite(parameter).all(), f"parameter {name} is left as it was"
        assert_bitwise(drawn[1][name], parameter, f"parameter {name} from the same seed")


def law_maps(make: Maker) -> None:
    """Maps for pictures are [B, heads, T, T], finite and causal; a map called attention has rows that sum to one."""
    mixer, x = make(), sequence(2, 9)
    for name, attention in mixer.maps(x).items():
        assert name in ("attention", "before", "after"), f"unknown map {name!r}"
        assert attention.dim() == 4, f"map {name} has shape {tuple(attention.shape)}"
        assert (attention.shape[0], *attention.shape[2:]) == (2, 9, 9), f"map {name} has shape {tuple(attention.shape)}"
        assert torch.isfinite(attention).all(), f"map {name} is not finite"
        assert not attention.triu(1).any(), f"map {name} shows the future"
        if name != "after":
            assert_near(attention.sum(-1), torch.ones_like(attention[..., 0]), EXACT, f"rows of map {name}")


def law_shapes(make: Maker) -> None:
    """y has the shape and dtype of x, and no gradient is recorded under no_grad."""
    mixer, x = make(), sequence(3, 7)
    with torch.no_grad():
        y, carried = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert not y.requires_grad
    assert not any(leaf.requires_grad for _, leaf in states.leaves(carried))
    assert isinstance(mixer, nn.Module)


LAWS: dict[str, Law] = {name: law for name, law in list(globals().items()) if name.startswith("law_")}
