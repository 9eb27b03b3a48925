"""Scans on a matrix state: the token loops against the recurrences as printed, the tiles against the token loops, and the laws."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recollect import state as states
from recollect.ops import tiles
from recollect.ops.linear_scan import delta_rule_scan, delta_scan, gated_linear_scan, least_squares_scan, slot_scan
from tests.laws import assert_bitwise, assert_near, assert_same_state

EXACT = 1e-12
B, H, K, V, M = 2, 2, 4, 3, 5
TILES = [1, 3, 16, 64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """A scan, its tokens by name, and the shape of its state without the batch axis (a tuple of shapes for several)."""

    scan: Callable[..., Any]
    tokens: Callable[[int], dict[str, Tensor]]
    state: Callable[[], Any]
    floor: float | None = None

    def run(self, tokens: dict[str, Tensor], state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        return self.scan(**tokens, state=state, **options)


def qkv(length: int) -> dict[str, Tensor]:
    q, k = random(B, length, H, K, seed=1), random(B, length, H, K, seed=2)
    return {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": random(B, length, H, V, seed=3)}


def with_decay(length: int, *channels: int) -> dict[str, Tensor]:
    return {**qkv(length), "log_decay": -0.4 * uniform(B, length, H, *channels, seed=4)}


def delta(length: int, decay: tuple[int, ...] | None, strength: tuple[int, ...] | None) -> dict[str, Tensor]:
    tokens = qkv(length) if decay is None else with_decay(length, *decay)
    a = tokens["k"] + 0.1 * random(B, length, H, K, seed=5)
    tokens = {**tokens, "a": a, "b": -a * uniform(B, length, H, K, seed=6)}
    if strength is not None:
        tokens["strength"] = 0.5 + uniform(B, length, H, *strength, seed=7)
    return tokens


def rule(length: int, decay: tuple[int, ...] | None) -> dict[str, Tensor]:
    tokens = qkv(length) if decay is None else with_decay(length, *decay)
    return {**tokens, "beta": uniform(B, length, H, seed=7)}


def least_squares(length: int, *, full: bool) -> dict[str, Tensor]:
    if not full:
        return qkv(length)
    eta, ridge = uniform(B, length, H, seed=8), 0.5 + uniform(H, K, seed=9)
    return {**with_decay(length), "eta": eta, "ridge": ridge}


def matrix_state() -> Tensor:
    return random(B, H, V, K, seed=10)


def square_state() -> tuple[Tensor, Tensor]:
    root = random(B, H, K, K, seed=11)
    return matrix_state(), root @ root.mT


def slot_state() -> tuple[Tensor, Tensor]:
    return random(B, H, M, K, seed=12), random(B, H, M, V, seed=13)


on_values = functools.partial(gated_linear_scan, decay_axis="value")
CASES = {
    "gated, no decay": Case(gated_linear_scan, qkv, matrix_state),
    "gated, per head": Case(gated_linear_scan, with_decay, matrix_state),
    "gated, per key": Case(gated_linear_scan, lambda length: with_decay(length, K), matrix_state),
    "gated, per key, floor": Case(functools.partial(gated_linear_scan, floor=-0.4), lambda n: with_decay(n, K), matrix_state),
    "gated, per value": Case(on_values, lambda length: with_decay(length, V), matrix_state),
    "gated, per value, floor": Case(functools.partial(on_values, floor=-200.0), lambda n: with_decay(n, V), matrix_state),
    "gated, per head, value axis": Case(on_values, with_decay, matrix_state),
    "slots": Case(slot_scan, lambda length: with_decay(length, M), slot_state),
    "least squares": Case(least_squares_scan, functools.partial(least_squares, full=False), square_state),
    "least squares, all gates": Case(least_squares_scan, functools.partial(least_squares, full=True), square_state),
}
for _decay_name, _decay in (("no decay", None), ("per head", ()), ("per key", (K,))):
    CASES[f"rule, {_decay_name}"] = Case(delta_rule_scan, functools.partial(rule, decay=_decay), matrix_state)
    for _strength_name, _strength in (("", None), (", strength per head", ()), (", strength per row", (V,))):
        CASES[f"delta, {_decay_name}{_strength_name}"] = Case(
            delta_scan, functools.partial(delta, decay=_decay, strength=_strength), matrix_state
        )
CASES["delta, per key, floor"] = Case(
    functools.partial(delta_scan, floor=-0.4), functools.partial(delta, decay=(K,), strength=None), matrix_state
)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def pieces(tokens: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x if name == "ridge" else x[:, start:stop] for name, x in tokens.items()}


def changed(tokens: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """Other content at the tokens `where` (bool [B, T]); decays stay <= 0."""
    out = {}
    for name, x in tokens.items():
        new = x if name == "ridge" else x * 0.3 if name in ("log_decay", "eta") else x + random(*x.shape, seed=20)
        out[name] = x if name == "ridge" else torch.where(where.reshape(*where.shape, *(1,) * (x.dim() - 2)), new, x)
    return out


def masks(length: int) -> tuple[Tensor, Tensor]:
    """Resets at the start, next to each other and in the middle; padding at the left, in the middle and on a reset."""
    reset, valid = torch.zeros(B, length, dtype=torch.bool), torch.ones(B, length, dtype=torch.bool)
    reset[0, [0, 4, 5]] = True
    reset[1, [7, length - 1]] = True
    valid[1, :3], valid[0, 8], valid[1, 7], valid[0, length - 2 :] = False, False, False, False
    return reset, valid


# --- the recurrences as printed -------------------------------------------------------------------------------------------


def by_definition(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, strength: Tensor, S: Tensor):
    """S <- S * decay + (strength * S a) b^T + v k^T for one row and head; log_decay [T, V, K], strength [T, V]."""
    outputs = []
    for t in range(len(q)):
        read = strength[t] * torch.mv(S, a[t])
        S = S * torch.exp(log_decay[t]) + torch.outer(read, b[t]) + torch.outer(v[t], k[t])
        outputs.append(torch.mv(S, q[t]))
    return torch.stack(outputs), S


DECAYS = {"none": ((), ()), "head": ((), (1, 1)), "key": ((K,), (1, K)), "value": ((V,), (V, 1))}


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("strength", [None, "none", "head", "row"])
def test_token_loops_follow_the_recurrence(kind: str, strength: str | None) -> None:
    """Both scans on a matrix state, every decay and strength, against a loop over rows, heads and tokens."""
    if kind == "value" and strength is not None:
        kind = "key"
    length, (channels, view) = 6, DECAYS[kind]
    tokens, start = with_decay(length, *channels), matrix_state()
    per_entry = tokens["log_decay"].reshape(B, length, H, *view).expand(B, length, H, V, K) if view else None
    if kind == "none":
        del tokens["log_decay"]
        per_entry = torch.zeros(B, length, H, V, K, dtype=torch.float64)
    assert per_entry is not None
    a, b = random(B, length, H, K, seed=5), random(B, length, H, K, seed=6)
    gain = torch.zeros(B, length, H, V, dtype=torch.float64)
    if strength is None:
        axis = "value" if kind == "value" else "key"
        y, end = gated_linear_scan(**tokens, state=start, decay_axis=axis, backend="sequential")
    else:
        gates = {"none": None, "head": uniform(B, length, H, seed=7), "row": uniform(B, length, H, V, seed=7)}
        given = gates[strength]
        gain = gain + (1.0 if given is None else given[..., None] if strength == "head" else given)
        y, end = delta_scan(**tokens, a=a, b=b, state=start, strength=given, backend="sequential")
    for row in range(B):
        for m in range(H):
            of_head = (x[row, :, m] for x in (tokens["q"], tokens["k"], tokens["v"], per_entry, a, b, gain))
            expected_y, expected_end = by_definition(*of_head, start[row, m])
            assert_near(y[row, :, m], expected_y, EXACT, "y")
            assert_near(end[row, m], expected_end, EXACT, "state")


@pytest.mark.parametrize("channels", [None, (), (K,)])
def test_the_exact_delta_rule_follows_its_recurrence(channels: tuple[int, ...] | None) -> None:
    """A decay, then a step towards the value under the key: in a loop over rows, heads and tokens."""
    tokens, start = rule(6, channels), matrix_state()
    y, end = delta_rule_scan(**tokens, state=start, backend="sequential")
    for row in range(B):
        for m in range(H):
            S, of_head = start[row, m], {name: x[row, :, m] for name, x in tokens.items()}
            for t in range(6):
                key = of_head["k"][t]
                S = S if channels is None else S * of_head["log_decay"][t].exp()
                S = S - of_head["beta"][t] * torch.outer(S @ key - of_head["v"][t], key)
                assert_near(y[row, t, m], S @ of_head["q"][t], EXACT, "y")
            assert_near(end[row, m], S, EXACT, "state")


def test_least_squares_fits_the_weighted_pairs() -> None:
    """y_t = M q_t with M the minimiser of the decayed, weighted squared errors plus the ridge: solved as an augmented lstsq problem."""
    length = 7
    tokens = least_squares(length, full=True)
    y, _ = least_squares_scan(**tokens, backend="sequential")
    for row in range(B):
        for m in range(H):
            q, k, v, log_decay, eta = (tokens[name][row, :, m] for name in ("q", "k", "v", "log_decay", "eta"))
            for t in range(length):
                weight = torch.stack([eta[i] * torch.exp(log_decay[i + 1 : t + 1].sum()) for i in range(t + 1)]).sqrt()[:, None]
                inputs = torch.cat([weight * k[: t + 1], torch.diag(tokens["ridge"][m].sqrt())])
                targets = torch.cat([weight * v[: t + 1], torch.zeros(K, V, dtype=torch.float64)])
                memory = torch.linalg.lstsq(inputs, targets).solution
                assert_near(y[row, t, m], memory.mT @ q[t], 1e-11, f"token {t}")


def test_slots_follow_the_recurrence() -> None:
    """Gated slot attention: softmax over slots that average keys and values at the same rates."""
    length = 6
    tokens, (slot_keys, slot_values) = with_decay(length, M), slot_state()
    y, (end_keys, end_values) = slot_scan(**tokens, state=(slot_keys, slot_values), backend="sequential")
    for row in range(B):
        for m in range(H):
            keys, values = slot_keys[row, m], slot_values[row, m]
            for t in range(length):
                keep = torch.diag(torch.exp(tokens["log_decay"][row, t, m]))
                write = (1 - torch.diagonal(keep))[:, None]
                keys = keep @ keys + write * tokens["k"][row, t, m]
                values = keep @ values + write * tokens["v"][row, t, m]
                weights = torch.softmax(keys @ tokens["q"][row, t, m], 0)
                assert_near(y[row, t, m], values.mT @ weights, EXACT, f"token {t}")
            assert_near(end_keys[row, m], keys, EXACT, "slot keys")
            assert_near(end_values[row, m], values, EXACT, "slot values")


# --- tiles equal token loops ----------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("tile", TILES)
def test_tiles_equal_the_token_loop(case: Case, tile: int) -> None:
    """With and without a carried state, resets and padding: one algorithm, two orders of summation."""
    length = 19
    tokens = case.tokens(length)
    reset, valid = masks(length)
    for state in (None, case.state()):
        for options in ({}, {"reset": reset}, {"valid": valid}, {"reset": reset, "valid": valid}):
            y, end = case.run(tokens, state, tile=tile, backend="chunked", **options)
            expected, expected_end = case.run(tokens, state, backend="sequential", **options)
            what = f"state {state is not None}, {list(options)}"
            assert_near(y, expected, EXACT, f"y, {what}")
            assert_same_state(end, expected_end, EXACT, what)


@every_case
def test_gradients_equal_those_of_the_token_loop(case: Case) -> None:
    """Every input and the carried state, through y and the final state, across tiles, resets and padding."""
    length = 11
    reset, valid = masks(length)
    gradients = []
    for options in ({"backend": "chunked", "tile": 4}, {"backend": "sequential"}):
        tokens = {name: x.clone().requires_grad_() for name, x in case.tokens(length).items()}
        state = states.map_state(lambda x: x.clone().requires_grad_(), case.state())
        y, end = case.run(tokens, state, reset=reset, valid=valid, **options)
        loss = (y * random(*y.shape, seed=14)).sum()
        for n, (_, leaf) in enumerate(states.leaves(end)):
            loss = loss + (leaf * random(*leaf.shape, seed=15 + n)).sum()
        inputs = {**tokens, **{f"state {name}": leaf for name, leaf in states.leaves(state)}}
        gradients.append(dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True)))
    for name, expected in gradients[1].items():
        assert_near(gradients[0][name], expected, 1e-11, f"gradient of {name}")
        if name in ("q", "k", "v", "a", "b", "log_decay"):
            assert not gradients[0][name][~valid].any(), f"padding has a gradient in {name}"


@pytest.mark.parametrize("name", ["gated, per key", "gated, per value", "delta, per key, strength per row", "delta, per head"])
def test_gradients_by_finite_differences(name: str) -> None:
    """The tiles against numbers, so that both forms cannot share a wrong gradient."""
    case = CASES[name]
    tokens = {key: x[:1, :, :1].clone().requires_grad_() for key, x in case.tokens(4).items()}

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(dict(zip(tokens, leaves, strict=True)), tile=3, backend="chunked")

    assert torch.autograd.gradcheck(run, list(tokens.values()))


# --- laws -------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("cuts", [[1], [7], [16], [3, 4, 11], list(range(1, 19))])
def test_split_law(case: Case, cuts: list[int]) -> None:
    """Pieces with carried state, inside tiles and token by token, equal one call."""
    length = 19
    tokens = case.tokens(length)
    reset, valid = masks(length)
    y, end = case.run(tokens, reset=reset, valid=valid, tile=5)
    state, outputs = None, []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        part, state = case.run(
            pieces(tokens, start, stop), state, reset=reset[:, start:stop], valid=valid[:, start:stop], tile=5
        )
        outputs.append(part)
    assert_near(torch.cat(outputs, 1), y, EXACT, "y")
    assert_same_state(state, end, EXACT, "state")


@every_case
def test_the_future_changes_no_bit(case: Case) -> None:
    """Causality, atol = 0: at tile borders, inside tiles, with resets."""
    length = 13
    tokens, position = case.tokens(length), torch.arange(length).expand(B, length)
    reset, _ = masks(length)
    for tile in (4, 64):
        y, _ = case.run(tokens, case.state(), tile=tile, reset=reset)
        for t in (0, 1, 3, 4, 6, 12):
            other, _ = case.run(changed(tokens, position >= t), case.state(), tile=tile, reset=reset)
            assert_bitwise(other[:, :t], y[:, :t], f"rows before {t}")
            assert (other[:, t] - y[:, t]).abs().max() > 1e-6, f"row {t} does not depend on token {t}"


@every_case
def test_other_rows_change_no_bit(case: Case) -> None:
    """Batch independence, atol = 0."""
    tokens, row = case.tokens(11), torch.tensor([[False], [True]]).expand(B, 11)
    y, end = case.run(tokens, tile=4)
    other, other_end = case.run(changed(tokens, row), tile=4)
    assert_bitwise(other[0], y[0], "row 0")
    for (name, a), (_, b) in zip(states.leaves(other_end), states.leaves(end), strict=True):
        assert_bitwise(a[0], b[0], f"state {name} of row 0")


@every_case
@pytest.mark.parametrize("backend", ["chunked", "sequential"])
def test_padding_is_the_identity(case: Case, backend: str) -> None:
    """Its content, NaN included, changes no bit; its output is 0; the rest equals the row without it."""
    length = 12
    tokens, (_, valid) = case.tokens(length), masks(length)
    y, end = case.run(tokens, case.state(), valid=valid, tile=5, backend=backend)
    poisoned = {n: x if n == "ridge" else x.masked_fill(~valid.view(B, length, *(1,) * (x.dim() - 2)), torch.nan)
                for n, x in tokens.items()}  # fmt: skip
    other, other_end = case.run(poisoned, case.state(), valid=valid, tile=5, backend=backend)
    assert_bitwise(other, y, "y with NaN at padding")
    for (name, a), (_, b) in zip(states.leaves(other_end), states.leaves(end), strict=True):
        assert_bitwise(a, b, f"state {name}")
    assert not y[~valid].any(), "output at padding"
    for row in range(B):
        real = {n: x if n == "ridge" else x[row : row + 1, valid[row]] for n, x in tokens.items()}
        state = states.map_state(lambda x, row=row: x[row : row + 1], case.state())
        alone, alone_end = case.run(real, state, tile=5, backend=backend)
        assert_near(y[row, valid[row]], alone[0], EXACT, f"row {row} without padding")
        assert_same_state(states.map_state(lambda x, row=row: x[row : row + 1], end), alone_end, EXACT, f"row {row}")


@every_case
@pytest.mark.parametrize("backend", ["chunked", "sequential"])
def test_resets_isolate_documents(case: Case, backend: str) -> None:
    """After a reset inside a tile everything equals a call that starts there, and no bit depends on what was before."""
    length, start = 13, 6
    tokens = case.tokens(length)
    reset = torch.zeros(B, length, dtype=torch.bool)
    reset[:, start] = True
    y, end = case.run(tokens, case.state(), reset=reset, tile=5, backend=backend)
    alone, alone_end = case.run(pieces(tokens, start, length), tile=5, backend=backend)
    assert_near(y[:, start:], alone, EXACT, "the second document")
    assert_same_state(end, alone_end, EXACT, "state")
    before = changed(tokens, torch.arange(length).expand(B, length) < start)
    other, _ = case.run(before, reset=reset, tile=5, backend=backend)
    assert_bitwise(other[:, start:], y[:, start:], "after another first document and state")


@every_case
def test_dtypes_and_state_shapes(case: Case) -> None:
    """Half precision in and out, states in fp32; the state has the shape it came with."""
    tokens = case.tokens(5)
    _, end = case.run(tokens, case.state())
    for (name, a), (_, b) in zip(states.leaves(end), states.leaves(case.state()), strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == torch.float64
    for backend in ("chunked", "sequential"):
        half = {name: x.to(torch.bfloat16) for name, x in tokens.items()}
        y, end = case.run(half, backend=backend)
        assert y.shape == tokens["v"].shape
        assert y.dtype == torch.bfloat16
        assert all(leaf.dtype == torch.float32 for _, leaf in states.leaves(end))


# --- strong decays and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "log_decay" in case.tokens(1) and "floor" not in name]
)
def test_strong_decays_stay_finite_and_right_in_fp32(name: str) -> None:
    """A token that forgets everything (log decay -1e4) next to tokens that forget nothing: finite forward and backward."""
    case, length = CASES[name], 40
    exact = case.tokens(length)
    exact["log_decay"][:, ::7] = 0.0
    exact["log_decay"][0, 5], exact["log_decay"][1, 20:23], exact["log_decay"][1, 30, 0] = -1e4, -1e4, -90.0
    tokens = {key: x.float().requires_grad_() for key, x in exact.items()}
    y, end = case.run(tokens, tile=64, backend="chunked")
    expected, _ = case.run(exact, backend="sequential")
    assert_near(y.detach().double(), expected, 1e-4, "y")
    (y.square().sum() + sum(leaf.square().sum() for _, leaf in states.leaves(end))).backward()
    for key, leaf in tokens.items():
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all(), f"gradient of {key}"


def test_errors_say_what_to_do() -> None:
    """Wrong shapes and names stop at the border, with the value and what is accepted."""
    tokens = with_decay(4, K)
    with pytest.raises(ValueError, match=r"log_decay must have shape \(2, 4, 2\) or \(2, 4, 2, 3\); got \(2, 4, 2, 4\)"):
        gated_linear_scan(**tokens, decay_axis="value")
    with pytest.raises(ValueError, match=r"unknown decay_axis 'row'"):
        gated_linear_scan(**tokens, decay_axis="row")
    with pytest.raises(ValueError, match=r"unknown backend 'fast'; known backends: chunked, sequential"):
        gated_linear_scan(**tokens, backend="fast")
    with pytest.raises(ValueError, match=r"state must have shape \(2, 2, 3, 4\); got \(2, 2, 4, 3\)"):
        gated_linear_scan(**tokens, state=matrix_state().mT)
    with pytest.raises(ValueError, match=r"reset must be bool \[B, T\]; got torch.float64"):
        gated_linear_scan(**tokens, reset=torch.zeros(B, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"tile is a number of tokens, at least 1; got 0"):
        delta_scan(**delta(4, None, None), tile=0)
    with pytest.raises(ValueError, match=r"strength must have shape"):
        delta_scan(**delta(4, None, (K,)))
    with pytest.raises(ValueError, match=r"ridge must be positive"):
        least_squares_scan(**qkv(4), ridge=0.0)
    with pytest.raises(ValueError, match=r"log_decay must be \[B, T, H, M\]"):
        slot_scan(**with_decay(4))
    with pytest.raises(ValueError, match=r"v must be \[B, T, H, V\] with the B, T, H of q"):
        gated_linear_scan(tokens["q"], tokens["k"], tokens["v"][:, :3])


@pytest.mark.parametrize("strength", [None, "row"])
def test_slabs_change_nothing(strength: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents long calls, which are cut, from giving other numbers or gradients than short ones."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, a, b = (torch.randn(2, 23, 2, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(5))
    decay = -torch.rand(2, 23, 2, 3, generator=generator, dtype=torch.float64)
    reset = torch.rand(2, 23, generator=generator) < 0.2
    valid = torch.arange(23)[None] >= torch.tensor([[0], [4]])
    force = None if strength is None else torch.rand(2, 23, 2, 3, generator=generator, dtype=torch.float64)
    results = []
    for slab in (4096, 5):
        monkeypatch.setattr(tiles, "SLAB", slab)
        linear, s = gated_linear_scan(q, k, v, decay, reset=reset, valid=valid, tile=4)
        delta, m = delta_scan(q, k, v, a, -0.3 * b, decay, strength=force, reset=reset, valid=valid, tile=4)
        total = (linear.square().sum() + delta.square().sum()) / 100
        results.append([linear, s, delta, m, *torch.autograd.grad(total, [q, k, v, a, b])])
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-12, rtol=1e-12)
