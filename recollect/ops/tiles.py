"""Tiles of time: what every scan over a linear recurrence shares, whatever its recurrence.

Inside a tile the recurrence is matrix products, all tiles at once; between tiles a state is carried on. A padding token is an identity
(no decay, no write, output 0), a document start forgets the state; both are masks that fill exact zeros.

Axis legend: B batch, T time, H heads, K key dim, V value dim, N tiles, C tokens of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops import forms, plugins
from recollect.ops.decay import cumulative_log_decay

BACKENDS = ("chunked", "sequential")
SLAB = 4096  # tokens whose tiles are in memory at once; longer calls gain nothing but page faults


class Recurrence(NamedTuple):
    """One scan over a matrix state, checked, in its computing dtype, padding blanked:

        r_t = S_{t-1} a_t,  S_t = S_{t-1} D_t + (strength_t r_t) b_t^T + v_t k_t^T,  y_t = S_t q_t

    Attributes:
        q, k, a, b: [B, T, H, K]; v: [B, T, H, V]. a, b and strength: None without a delta rule.
        log_decay: of D, [B, T, H], or [B, T, H, K] or, with on_values, [B, T, H, V]; zeros unless `decays`.
        strength: [B, T, H, 1 or V].
        state: S before the first token, [B, H, V, K].
        reset: bool [B, T] or None.
        products: the dtype that matrix products may be taken in.
        floor: the most negative log decay of a token, if known.
        rule: (key, beta [B, T, H]) if this is the exact delta rule: k = beta key, a = D key, b = -beta key, strength 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor | None
    b: Tensor | None
    log_decay: Tensor
    strength: Tensor | None
    state: Tensor
    reset: Tensor | None
    on_values: bool
    decays: bool
    products: torch.dtype
    floor: float | None = None
    rule: tuple[Tensor, Tensor] | None = None

    @property
    def op(self) -> str:
        """What it is called where forms are told."""
        return "gated_linear_scan" if self.a is None else "delta_scan" if self.rule is None else "delta_rule_scan"

    @property
    def differentiated(self) -> bool:
        """Whether anything here will get a gradient."""
        tensors = (self.q, self.k, self.v, self.a, self.b, self.log_decay, self.strength, self.state)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# Faster equals of the token loop on a matrix state add themselves here, each returning y [B, T, H, V] and the last state.
RECURRENCES: dict[str, Callable[[Recurrence], tuple[Tensor, Tensor]]] = {}
LACKS: dict[str, Callable[[Recurrence], str]] = {}  # why it cannot run one; "" where it can
PREFERRED: list[tuple[str, Callable[[Recurrence], bool]]] = []  # whether it is meant for one (`forms.choose`)


class Breaks(NamedTuple):
    """Where document starts cut a tile; every mask is true where something is forgotten. All None without resets.

    Attributes:
        document: int [B, 1, N, C, 1], the number of document starts in the tile up to token t.
        between: bool [B, 1, N, C, C], tokens t (row) and i (column) belong to different documents.
        before: bool [B, 1, N, C, 1], a document starts at or before token t in its tile: the carried state is forgotten.
        after: bool [B, 1, N, C, 1], a document starts after token i in its tile: its write does not reach the tile's end.
        within: bool [B, 1, N, 1, 1], a document starts anywhere in the tile.
    """

    document: Tensor | None = None
    between: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    within: Tensor | None = None


def find_breaks(reset: Tensor | None, size: int) -> Breaks:
    """The breaks of reset (bool [B, T], true at a document's first token) in tiles of `size` tokens."""
    if reset is None:
        return Breaks()
    document = to_tiles(reset[:, :, None], size).to(torch.int32).cumsum(-1)[..., None]
    last = document[..., -1:, :]
    return Breaks(document, document != document.mT, document > 0, document < last, last > 0)


def decay_from_start(log_decay: Tensor, size: int, breaks: Breaks) -> Tensor:
    """Cumulative log decays of every tile and document, [B, H, N, C, 1 or channels], of log_decay [B, T, H] or [B, T, H, channels]."""
    per_channel = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    return cumulative_log_decay(to_tiles(per_channel, size), dim=3, document=breaks.document)


def decay_to_end(c: Tensor) -> Tensor:
    """The weight of each token at its tile's end, exp(c[C-1] - c[i]); of no meaning, but finite, where a document starts in between."""
    return (c[..., -1:, :] - c).clamp(max=0.0).exp()


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with exact zeros where `mask` is true (None: nowhere); what stood there, even a NaN, gets no gradient."""
    return x if mask is None else x.masked_fill(mask, 0.0)


def to_tiles(x: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...]; the last tile is filled up with zeros."""
    n_tokens = x.shape[1]
    missing = -n_tokens % size
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def from_tiles(y: Tensor, n_tokens: int) -> Tensor:
    """[B, H, N, C, V] -> [B, T, H, V], without what filled up the last tile."""
    return y.movedim(1, 3).flatten(1, 2)[:, :n_tokens]


def carry(state: Tensor, decay: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the start of every tile, and the one after the last: state <- state * decay[n] + added[n].

    Args:
        state: [B, H, V, K].
        decay: [B, H, N, V or 1, K or 1].
        added: [B, H, N, V, K].
    Returns:
        [B, H, N, V, K] and [B, H, V, K].
    """
    starts = []
    for kept, new in zip(decay.unbind(2), added.unbind(2), strict=True):
        starts.append(state)
        state = torch.addcmul(new, state, kept)
    return torch.stack(starts, 2), state


def computing_dtype(x: Tensor) -> torch.dtype:
    """fp32 for half precision, else x's own."""
    return torch.promote_types(x.dtype, torch.float32)


def real_part(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [B, T, ...] in its computing dtype, exactly 0 at padding."""
    x = x.to(computing_dtype(x))
    return x if valid is None else blank(x, ~valid.reshape(*valid.shape, *(1,) * (x.dim() - 2)))


def real_log_decay(log_decay: Tensor | None, q: Tensor, valid: Tensor | None, reset: Tensor | None) -> Tensor:
    """Log decays in q's computing dtype: zeros [B, T, H] for None, 0 at padding and, as the state is forgotten there, at resets."""
    if log_decay is None:
        return q.new_zeros(q.shape[:3], dtype=computing_dtype(q))
    log_decay = real_part(log_decay.to(computing_dtype(q)), valid)
    return log_decay if reset is None else real_part(log_decay, ~reset)


def real_resets(reset: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Document starts at real tokens: at padding nothing happens."""
    return reset if reset is None or valid is None else reset & valid


def first_state(state: Tensor | None, shape: Sequence[int], like: Tensor, name: str = "state") -> Tensor:
    """The carried state in like's computing dtype, or zeros.

    Raises:
        ValueError: its shape is not `shape`.
    """
    dtype = computing_dtype(like)
    if state is None:
        return like.new_zeros(tuple(shape), dtype=dtype)
    if tuple(state.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(state.shape)}")
    return state.to(dtype)


def check_shape(name: str, x: Tensor | None, *accepted: Sequence[int]) -> None:
    """Raise ValueError unless x is None or has one of the accepted shapes."""
    if x is not None and tuple(x.shape) not in [tuple(shape) for shape in accepted]:
        raise ValueError(f"{name} must have shape {' or '.join(str(tuple(shape)) for shape in accepted)}; got {tuple(x.shape)}")


def check_tokens(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, valid: Tensor | None) -> None:
    """Raise ValueError unless q and k are [B, T, H, K], v is [B, T, H, V], T >= 1, and the masks are bool [B, T]."""
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1; got {tuple(q.shape)}")
    check_shape("k", k, q.shape)
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with the B, T, H of q, {tuple(q.shape[:3])}; got {tuple(v.shape)}")
    check_masks(q.shape[:2], reset, valid)


def check_masks(shape: Sequence[int], reset: Tensor | None, valid: Tensor | None) -> None:
    """Raise ValueError unless the masks are None or bool of `shape`."""
    for name, mask in (("reset", reset), ("valid", valid)):
        check_shape(name, mask, shape)
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool [B, T]; got {mask.dtype}")


def runs_sequentially(backend: str | None, n_tokens: int, tile: int) -> bool:
    """Whether to loop over tokens: on request, and for a single token (decoding), where tiles only add work.

    Raises:
        ValueError: unknown backend, or a tile of no tokens.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known backends: {', '.join(BACKENDS)}, or None for the default")
    if tile < 1:
        raise ValueError(f"tile is a number of tokens, at least 1; got {tile}")
    return backend == "sequential" or (backend is None and n_tokens == 1)


def by_faster_form(backend: str | None, x: Recurrence) -> tuple[Tensor, Tensor] | None:
    """y and the last state by the faster equal of the token loop that is named or is the default here; None: there is none.

    Raises:
        RuntimeError: the named one cannot run this.
    """
    plugins.load()
    if backend is None:
        n_tokens = x.q.shape[0] * x.q.shape[1]
        backend = forms.choose(x.op, (x,), PREFERRED, LACKS, plain="chunked", n_tokens=n_tokens)
        return RECURRENCES[backend](x) if backend in RECURRENCES else None  # the plain one is its caller's
    if backend in RECURRENCES and (why := LACKS[backend](x)):
        raise forms.refuse(x.op, backend, why, "chunked")
    return RECURRENCES[backend](x) if backend in RECURRENCES else None


def products_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that matrix products of these may be taken in: that of the most precise one, or autocast's where it is on."""
    dtype, device = functools.reduce(torch.promote_types, (x.dtype for x in tensors)), tensors[0].device.type
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def by_slabs(scan: Callable[..., tuple[Tensor, Tensor]], state: Tensor | None, *tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """A scan over tokens [B, T, ...] in slabs of `SLAB`, the state carried on: the same numbers from a smaller working set.

    Args:
        scan: (state, *slab of each of `tokens`) -> (y [B, slab, ...], state).
    """
    n_slabs = max(-(-x.shape[1] // SLAB) for x in tokens if x is not None)
    pieces = [(None,) * n_slabs if x is None else x.split(SLAB, dim=1) for x in tokens]  # split: one gradient, not one per slab
    outputs: list[Tensor] = []
    carried = state
    for slab in zip(*pieces, strict=True):
        y, carried = scan(carried, *slab)
        outputs.append(y)
    assert carried is not None
    return torch.cat(outputs, dim=1), carried
