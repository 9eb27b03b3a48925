"""Linear recurrences on a matrix state: decayed writes here, the delta rule and least squares in files of their own.

Every scan takes tokens and a carried state and returns the outputs and the next state; any split of a sequence with carried state
equals one call, and T = 1 is decoding. `backend="sequential"` loops over tokens and is the definition; the default computes tiles of
tokens as matrix products (exactly the same sums in another order).

Axis legend: B batch, T time, H heads, K key dim, V value dim, M slots, N tiles, C tokens of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.ops import tiles
from recollect.ops.decay import decayed_scores, decayed_sum
from recollect.ops.delta_scan import delta_rule_scan, delta_scan
from recollect.ops.least_squares_scan import least_squares_scan

__all__ = ["delta_rule_scan", "delta_scan", "gated_linear_scan", "least_squares_scan", "slot_scan"]


def gated_linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    decay_axis: str = "key",
    floor: float | None = None,
    tile: int = 64,
    products: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay: S_t = S_{t-1} * exp(log_decay_t) + v_t k_t^T, y_t = S_t q_t.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        log_decay: <= 0, any size: None (no decay), [B, T, H], or one per channel of `decay_axis`, [B, T, H, K] or [B, T, H, V].
        state: S before the first token, [B, H, V, K]; None: zeros.
        reset: bool [B, T], true at the first token of a document: the state before it is forgotten.
        valid: bool [B, T], false at padding: it leaves the state as it is, its y is 0, its content has no effect.
        decay_axis: "key" or "value", the axis that a decay per channel belongs to.
        floor: the most negative log decay one token can have, if known; None: any. Saves time for decays per channel.
        tile: tokens that are computed at once, >= 1; no effect on the result.
        products: the dtype that matrix products may be taken in where another than fp32 is faster; None: that of the most precise of
            q, k and v, or autocast's. Only "fla" takes them in bf16 or fp16.
        backend: None (the best that can run here), "chunked", "sequential", "triton" (the token loop on a GPU) or "fla" (the kernels
            of flash-linear-attention, if installed).
    Returns:
        y [B, T, H, V] in q's dtype, and S after the last token, [B, H, V, K], in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: shapes that do not fit, an unknown axis or backend.
        RuntimeError: the named backend cannot run on these inputs.
    Source: Katharopoulos et al. 2020, arXiv 2006.16236 (no decay); Sun et al. 2023, arXiv 2307.08621 (per head); Yang et al. 2023,
    arXiv 2312.06635 (per key channel).
    """
    tiles.check_tokens(q, k, v, reset, valid)
    products = products or tiles.products_dtype(q, k, v)
    if q.shape[1] > tiles.SLAB:

        def slab(carried: Tensor | None, *parts: Tensor | None) -> tuple[Tensor, Tensor]:
            q, k, v, log_decay, reset, valid = parts
            assert q is not None
            assert k is not None
            assert v is not None
            return gated_linear_scan(
                q,
                k,
                v,
                log_decay,
                carried,
                reset=reset,
                valid=valid,
                decay_axis=decay_axis,
                floor=floor,
                tile=tile,
                products=products,
                backend=backend,
            )

        return tiles.by_slabs(slab, state, q, k, v, log_decay, reset, valid)
    if decay_axis not in ("key", "value"):
        raise ValueError(f"unknown decay_axis {decay_axis!r}; known: key, value")
    channels = q.shape[-1] if decay_axis == "key" else v.shape[-1]
    tiles.check_shape("log_decay", log_decay, q.shape[:3], (*q.shape[:3], channels))
    n_rows, n_tokens, n_heads, key_dim = q.shape
    state = tiles.first_state(state, (n_rows, n_heads, v.shape[-1], key_dim), q)
    reset = tiles.real_resets(reset, valid)
    decays, log_decay = log_decay is not None, tiles.real_log_decay(log_decay, q, valid, reset)
    dtype, (q, k, v) = q.dtype, (tiles.real_part(x, valid) for x in (q, k, v))
    on_values = log_decay.dim() == 4 and decay_axis == "value"
    call = tiles.Recurrence(q, k, v, None, None, log_decay, None, state, reset, on_values, decays, products, floor)
    if (found := tiles.by_faster_form(backend, call)) is not None:
        y, state = found
    elif tiles.runs_sequentially(backend, n_tokens, tile):
        y, state = _by_tokens(q, k, v, log_decay, state, reset, on_values)
    elif on_values:
        y, state = _by_tiles_value_decay(q, k, v, log_decay, state, reset, floor, min(tile, n_tokens))
    else:
        y, state = _by_tiles(q, k, v, log_decay, state, reset, floor, min(tile, n_tokens))
    return y.to(dtype), state


def slot_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    floor: float | None = None,
    tile: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gated slot attention: attention over M slots, each an exponential average of keys and of values.

    Kt_t = Diag(a_t) Kt_{t-1} + (1 - a_t) k_t^T and Vt_t alike with v_t, a_t = exp(log_decay_t); y_t = Vt_t^T softmax(Kt_t q_t).

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V]. The logits are not scaled: scale q.
        log_decay: [B, T, H, M], <= 0, one per slot.
        state: (Kt [B, H, M, K], Vt [B, H, M, V]) before the first token; None: zeros.
        reset, valid, floor, tile, backend: as in `gated_linear_scan`.
    Returns:
        y [B, T, H, V] in q's dtype, and (Kt, Vt) after the last token, in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: shapes that do not fit, an unknown backend.
    Source: Zhang et al. 2024, arXiv 2409.07146.
    """
    tiles.check_tokens(q, k, v, reset, valid)
    if log_decay.dim() != 4 or log_decay.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"log_decay must be [B, T, H, M] with the B, T, H of q; got {tuple(log_decay.shape)}, q {tuple(q.shape)}"
        )
    dtype = tiles.computing_dtype(q)
    log_decay = tiles.real_part(log_decay.to(dtype), valid)
    slot_keys, slot_values = (None, None) if state is None else (state[0], state[1].mT)
    write = -torch.expm1(log_decay)
    logits, slot_keys = gated_linear_scan(
        q.to(dtype),
        k,
        write,
        log_decay,
        slot_keys,
        reset=reset,
        valid=valid,
        decay_axis="value",
        floor=floor,
        tile=tile,
        backend=backend,
    )
    y, slot_values = gated_linear_scan(
        logits.softmax(-1),
        write,
        v,
        log_decay,
        slot_values,
        reset=reset,
        valid=valid,
        floor=floor,
        tile=tile,
        backend=backend,
    )
    return y.to(q.dtype), (slot_keys, slot_values.mT)


def _by_tokens(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, reset: Tensor | None, on_values: bool
) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp()
    decay = decay[..., None, None] if decay.dim() == 3 else decay[..., None] if on_values else decay[..., None, :]
    outputs = []
    for t, (q_t, k_t, v_t, decay_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, decay)), strict=True)):
        if reset is not None:
            state = tiles.blank(state, reset[:, t, None, None, None])
        state = state * decay_t + v_t[..., :, None] * k_t[..., None, :]
        outputs.append((state @ q_t[..., None]).squeeze(-1))
    return torch.stack(outputs, 1), state


def _by_tiles(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, reset: Tensor | None, floor: float | None, size: int
) -> tuple[Tensor, Tensor]:
    n_tokens, breaks = q.shape[1], tiles.find_breaks(reset, size)
    c = tiles.decay_from_start(log_decay, size, breaks)
    q, k, v = (tiles.to_tiles(x, size) for x in (q, k, v))
    scores = tiles.blank(decayed_scores(q, k, c.squeeze(-1), floor=floor), breaks.between)
    written = v.mT @ tiles.blank(k * tiles.decay_to_end(c), breaks.after)
    starts, state = tiles.carry(state, tiles.blank(c[..., -1:, :].exp(), breaks.within), written)
    y = scores @ v + tiles.blank(q * c.exp(), breaks.before) @ starts.mT
    return tiles.from_tiles(y, n_tokens), state


def _by_tiles_value_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, reset: Tensor | None, floor: float | None, size: int
) -> tuple[Tensor, Tensor]:
    n_tokens, breaks = q.shape[1], tiles.find_breaks(reset, size)
    c = tiles.decay_from_start(log_decay, size, breaks)
    q, k, v = (tiles.to_tiles(x, size) for x in (q, k, v))
    scores = tiles.blank((q @ k.mT).tril(), breaks.between)
    written = tiles.blank(v * tiles.decay_to_end(c), breaks.after).mT @ k
    starts, state = tiles.carry(state, tiles.blank(c[..., -1:, :].exp(), breaks.within).mT, written)
    y = decayed_sum(scores, v, c.squeeze(-1), floor=floor) + tiles.blank(c.exp(), breaks.before) * (q @ starts.mT)
    return tiles.from_tiles(y, n_tokens), state
