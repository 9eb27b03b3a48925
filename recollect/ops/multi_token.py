"""Multi-Token Attention: convolutions over queries, keys and heads of the attention map, before and after the softmax.

    S = mask_0(scale Q K^T)                 raw logits, zero where a query does not see a key
    L = mask_-inf(mix_pre(conv_pre(S)))     one weight depends on c_q queries, c_k keys and c_h heads
    P = softmax(L)
    A = mix_post(mask_0(conv_post(P)))
    O = dropout(A) V

Every form of the op computes exactly this: `materialized` (the oracle: T x T tensors, automatic differentiation), `blocked`
(blocks of query rows over the causal part, recomputed in the backward pass: memory linear in T) and `native` (the same blocks with
a compiled kernel and a backward written by hand, `recollect.kernels`). Decoding is the same call with few queries and the carried
`Rows`.

Axis legend: B batch, T queries, S keys (the queries are the last T of the S positions), H query heads, Hkv key-value heads,
G groups of c_h heads, K key dim, V value dim.
Source: Golovneva et al. 2025, arXiv 2504.00927, Eq. 3-7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops import forms, plugins
from recollect.ops.attention import check_shapes, visible
from recollect.ops.operators import Inputs, Mixing, Rows, Settings, operator

DECODE_QUERIES = 8  # at most so many new queries count as decoding
BLOCK_ENTRIES = 2**21  # numbers of one map of a block of `blocked`, about
DROPOUT_TILE = 32  # rows that share one draw of the dropout mask, so that every block size sees the same mask

Backend = Callable[[Tensor, Tensor, Tensor, Mixing, Settings, "Tensor | None", Rows], "tuple[Tensor, Rows]"]
BACKENDS: dict[str, Backend] = {}
# Of a faster equal, by its name: why it cannot run a call, "" where it can; and whether it is meant for it (`forms.choose`).
LACKS: dict[str, Callable[[Tensor, Mixing], str]] = {}
PREFERRED: list[tuple[str, Callable[[Tensor, Mixing], bool]]] = []
DECODERS: list[tuple[str, Callable[[Tensor, Mixing], bool]]] = []  # the same for one new token


def multi_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kq_pre: Tensor | None = None,
    head_pre: Tensor | None = None,
    kq_post: Tensor | None = None,
    head_post: Tensor | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    start: Tensor | None = None,
    pad_key: str = "both",
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal Multi-Token Attention with double masking.

    Args:
        q: [B, T, H, K], the last T of the S positions.
        k: [B, S, Hkv, K], v: [B, S, Hkv, V]; Hkv divides H.
        kq_pre, kq_post: key-query kernels [H, c_q, c_k] on raw logits and on softmax weights, in conv2d's orientation: row c_q - 1 is
            the current query, earlier rows earlier queries; with pad_key "both", column c_k // 2 is the same key. [H, c_h, c_q, c_k] is
            the merged 3-D convolution: head o of a group sums over the group's heads p with kernel [o, p].
        head_pre, head_post: [G, c_h, c_h], H = G c_h; row = output head inside the group.
        scale: factor on the logits; default K^(-1/2).
        document_ids: int [B, S], equal within a contiguous document: attention and convolutions stay inside it. None: one document.
        start: int [B, T], first visible key of each query, instead of document_ids (non-decreasing, at most the query's position);
            of a sliding window over w keys, max(0, position - w + 1).
        pad_key: keys reached: "both" j - c_k // 2 .. j + c_k // 2 (c_k odd), "left" j - c_k + 1 .. j, "right" j .. j + c_k - 1.
        dropout_p: dropout of the final weights, in [0, 1).
        seed: of the dropout; None draws one from torch's global generator.
        backend: "materialized" | "blocked" | "native" (on a CPU) | "triton" (on a GPU) | None (the fastest that can run here).
    Returns:
        [B, T, H, V] in q's dtype; where q, k and v differ in dtype, computed in the one that they promote to.
    Raises:
        ValueError: shapes that do not fit, an unknown backend or pad_key.
        RuntimeError: the named backend cannot run on these inputs.
    Source: arXiv 2504.00927, Eq. 5-7; the 3-D form: section 3.3.
    """
    if document_ids is not None:
        if start is not None:
            raise ValueError("give document_ids or start, not both: start is what document_ids is turned into")
        start = document_starts(document_ids)[:, k.shape[1] - q.shape[1] :]
    mixing = Mixing(kq_pre, head_pre, kq_post, head_post)
    out, _ = multi_token_rows(
        q, k, v, mixing, Rows(), scale=scale, start=start, pad_key=pad_key, dropout_p=dropout_p, seed=seed, backend=backend
    )
    return out


def multi_token_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Mixing,
    rows: Rows,
    *,
    scale: float | None = None,
    start: Tensor | None = None,
    pad_key: str = "both",
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Rows]:
    """`multi_token_attention` that continues from carried rows and returns the rows to carry on with.

    Args:
        rows: what the call on the previous T' positions returned (S - T keys wide); `Rows()` at the start of the sequence.
    Returns:
        [B, T, H, V] in q's dtype, and the rows of the last c_q - 1 positions, S wide.
    """
    check_shapes(q, k, v)
    check_mixing(mixing, q.shape[2], pad_key)
    asked = q.dtype
    common = torch.promote_types(asked, torch.promote_types(k.dtype, v.dtype))
    q, k, v = (x.to(common) for x in (q, k, v))
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p lies in [0, 1); got {dropout_p}")
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if dropout_p else 0
    settings = Settings(q.shape[-1] ** -0.5 if scale is None else scale, pad_key, dropout_p, seed)
    rows = _fit(rows, mixing, q, k.shape[1])
    out, rows = choose(q, k, mixing, backend)(q, k, v, mixing, settings, start, rows)
    return out.to(asked), rows


def choose(q: Tensor, k: Tensor, mixing: Mixing, backend: str | None = None) -> Backend:
    """The form that will run: `backend` if named (RuntimeError when it cannot), else as `forms.choose` has it.

    Decoding, few queries against many keys, has nothing to save by blocks: a form made for it, or the plain one on these rows.
    """
    known, n_tokens = backends(), q.shape[0] * q.shape[1]
    if backend is None:
        preferred, plain = PREFERRED, "blocked"
        if q.shape[1] <= DECODE_QUERIES and q.shape[1] < k.shape[1]:
            preferred, plain, n_tokens = DECODERS if q.shape[1] == 1 else [], "materialized", 1  # few: not warned about
        backend = forms.choose("multi_token_attention", (q, mixing), preferred, LACKS, plain=plain, n_tokens=n_tokens)
    elif backend not in known:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(sorted(known))}")
    elif backend in LACKS and (why := LACKS[backend](q, mixing)):
        raise forms.refuse("multi_token_attention", backend, why, "blocked")
    return known[backend]


def backends() -> dict[str, Backend]:
    """Every form of the op by name, the plugins' included."""
    plugins.load()
    return BACKENDS


def materialized(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None, rows: Rows
) -> tuple[Tensor, Rows]:
    """The oracle: the equations of this file's head on whole [B, H, T, S] tensors. Memory O(T S)."""
    n_queries, n_keys, dtype = q.shape[1], k.shape[1], torch.promote_types(q.dtype, torch.float32)
    seen = visible(n_queries, n_keys, start=start, device=q.device)
    raw = scores(q, k, settings.scale).to(dtype).masked_fill(~seen, 0)
    logits, rows_raw = raw, rows.raw
    if mixing.kq_pre is not None:
        logits, rows_raw = convolve(raw, mixing.kq_pre.to(dtype), rows.raw, start, settings.pad_key)
    if mixing.head_pre is not None:
        logits = mix_heads(logits, mixing.head_pre.to(dtype))
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    out, rows_weights = weights, rows.weights
    if mixing.kq_post is not None:
        out, rows_weights = convolve(weights, mixing.kq_post.to(dtype), rows.weights, start, settings.pad_key)
        out = out.masked_fill(~seen, 0)
    if mixing.head_post is not None:
        out = mix_heads(out, mixing.head_post.to(dtype))
    if settings.dropout_p:
        out = out * dropout_mask(out, settings, n_keys - n_queries)
    return read(out.to(q.dtype), v), Rows(rows_raw, rows_weights)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q.k for every query and key: [B, T, H, K], [B, S, Hkv, K] -> [B, H, T, S]."""
    batch, n_queries, n_heads, size = q.shape
    groups = k.shape[2]
    grouped = q.transpose(1, 2).reshape(batch, groups, n_heads // groups * n_queries, size)
    return (grouped * scale @ k.permute(0, 2, 3, 1)).view(batch, n_heads, n_queries, k.shape[1])


def read(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, H, T, S], v [B, S, Hkv, V] -> [B, T, H, V]."""
    batch, n_heads, n_queries, n_keys = weights.shape
    grouped = weights.reshape(batch, v.shape[2], -1, n_keys) @ v.transpose(1, 2)
    return grouped.view(batch, n_heads, n_queries, v.shape[-1]).transpose(1, 2)


def convolve(x: Tensor, kernel: Tensor, before: Tensor | None, start: Tensor | None, pad_key: str) -> tuple[Tensor, Tensor]:
    """Key-query convolution of attention maps: past queries, keys around the current one, zeros outside.

    Args:
        x: [B, H, T, S]; kernel: [H, c_q, c_k] or [H, c_h, c_q, c_k]; before: [B, H, c_q - 1, S], the rows above x.
        start: int [B, T]; a query at position i reads only rows from start_i on (document cuts). None: all.
    Returns:
        [B, H, T, S], and the last c_q - 1 rows of (before, x).
    """
    kernel = kernel if kernel.dim() == 4 else kernel[:, None]
    n_heads, group, c_q, c_k = kernel.shape
    n_queries, n_keys = x.shape[-2:]
    tall = x if c_q == 1 or before is None else torch.cat((before.to(x.dtype), x), dim=2)
    carried, (left, right) = tall[:, :, n_queries:], key_padding(pad_key, c_k)
    if start is None and left == right:  # without a copy, which would take as long again where one token is decoded
        return F.conv2d(tall, kernel, padding=(0, left), groups=n_heads // group), carried
    wide = F.pad(tall, (left, right))
    if start is None:
        return F.conv2d(wide, kernel, groups=n_heads // group), carried
    position = torch.arange(n_keys - n_queries, n_keys, device=x.device)
    out = x.new_zeros(())
    for a in range(c_q):  # a = how far back; the row is read only if it belongs to the query's document
        shifted = wide[:, :, c_q - 1 - a : c_q - 1 - a + n_queries]
        reached = (position - a >= start)[:, None, :, None]
        out = out + F.conv2d(shifted * reached, kernel[:, :, c_q - 1 - a : c_q - a], groups=n_heads // group)
    return out, carried


def mix_heads(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, H, T, S], matrix [G, c_h, c_h] (row = output head) -> [B, H, T, S]."""
    groups, size, _ = matrix.shape
    grouped = x.reshape(x.shape[0], groups, size, -1)
    return (matrix @ grouped).view_as(x)


def key_padding(pad_key: str, c_k: int) -> tuple[int, int]:
    """Keys reached to the (left, right) of the current one."""
    return {"both": (c_k // 2, c_k // 2), "left": (c_k - 1, 0), "right": (0, c_k - 1)}[pad_key]


def dropout_mask(like: Tensor, settings: Settings, first: int) -> Tensor:
    """Scaled keep mask [B, H, T, S] for rows at positions first .. first + T: a function of seed and position only."""
    batch, n_heads, n_queries, n_keys = like.shape
    mask = like.new_zeros(like.shape)
    generator = torch.Generator(device=like.device)
    for tile in range(first // DROPOUT_TILE, (first + n_queries - 1) // DROPOUT_TILE + 1):
        top = tile * DROPOUT_TILE
        generator.manual_seed(settings.seed + tile)
        drawn = torch.rand(batch, n_heads, DROPOUT_TILE, top + DROPOUT_TILE, generator=generator, device=like.device)
        low, high, width = max(top, first), min(top + DROPOUT_TILE, first + n_queries), min(top + DROPOUT_TILE, n_keys)
        keep = drawn[:, :, low - top : high - top, :width] >= settings.dropout_p
        mask[:, :, low - first : high - first, :width] = keep / (1 - settings.dropout_p)
    return mask


def document_starts(document_ids: Tensor) -> Tensor:
    """First position of each token's document: int [B, S] -> int64 [B, S]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    fresh = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return torch.where(fresh, index, 0).cummax(dim=1).values


def halo(mixing: Mixing) -> int:
    """How many earlier queries an output row depends on: c_q - 1 for each convolution used."""
    return sum(kernel.shape[-2] - 1 for kernel in (mixing.kq_pre, mixing.kq_post) if kernel is not None)


def _blocks(call: Inputs) -> tuple[Tensor, Tensor, Rows]:
    """Blocks of query rows, each the oracle on a slice with a halo of rows above it."""
    q, k, v, mixing, start, rows, settings, block, _ = call
    n_queries, earlier = q.shape[1], k.shape[1] - q.shape[1]
    out, last = q.new_empty(*q.shape[:3], v.shape[-1]), rows
    for low, top, bottom in spans(n_queries, block, halo(mixing)):
        piece = _slice(q, k, v, start, rows, low, bottom, earlier)
        values, last = materialized(piece[0], piece[1], piece[2], mixing, settings, piece[3], piece[4])
        out[:, top:bottom] = values[:, top - low :]
    return out, q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32)), last


def _blocks_backward(call: Inputs, _: Tensor, grad_out: Tensor, grad_rows: Rows) -> list[Tensor]:
    """The same blocks again, one by one, each differentiated."""
    totals = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in call.differentiable]
    for span in spans(call.q.shape[1], call.block, halo(call.mixing)):
        for total, grad in zip(totals, _block_gradients(call, *span, grad_out, grad_rows), strict=True):
            total += grad
    return totals


def _block_gradients(call: Inputs, low: int, top: int, bottom: int, grad_out: Tensor, grad_rows: Rows) -> tuple[Tensor, ...]:
    """What one block gives to the gradients of all that is given. By `torch.func`: inside an operator autograd records nothing."""
    n_queries, earlier = call.q.shape[1], call.k.shape[1] - call.q.shape[1]
    returned = [grad for grad in grad_rows if grad is not None] if bottom == n_queries else []

    def outputs(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        q, k, v = (next(rest) for _ in "qkv")
        others = [None if x is None else next(rest) for x in (*call.mixing, *call.rows)]
        piece = _slice(q, k, v, call.start, Rows(*others[4:]), low, bottom, earlier)
        values, last = materialized(piece[0], piece[1], piece[2], Mixing(*others[:4]), call.settings, piece[3], piece[4])
        rows = [x for x, grad in zip(last, grad_rows, strict=True) if x is not None and grad is not None]
        return [values[:, top - low :], *(rows if returned else ())]

    pull = torch.func.vjp(outputs, *call.differentiable)[1]
    return pull([grad_out[:, top:bottom], *returned])


_by_blocks = operator("multi_token_blocks", _blocks, _blocks_backward, keeps=False, of_rows=True)


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Mixing,
    settings: Settings,
    start: Tensor | None,
    rows: Rows,
    *,
    block: int | None = None,
) -> tuple[Tensor, Rows]:
    """Blocks of `block` query rows over all heads, only the causal part, recomputed in the backward pass. Memory O(block S + T)."""
    if block is None:
        block = max(16, min(q.shape[1], BLOCK_ENTRIES // max(1, q.shape[0] * q.shape[2] * k.shape[1])))
    return _by_blocks(Inputs(q, k, v, mixing, start, rows, settings, block))


def spans(n_queries: int, block: int, reach: int) -> list[tuple[int, int, int]]:
    """(low, top, bottom) of every block: it yields rows top .. bottom and reads rows from low = top - reach on."""
    return [(max(0, top - reach), top, min(top + block, n_queries)) for top in range(0, n_queries, block)]


def _slice(q, k, v, start, rows, low, bottom, earlier):
    """The inputs of query rows low .. bottom: keys up to the last of them; carried rows only where the slice begins at row 0."""
    n_keys = earlier + bottom
    start = None if start is None else start[:, low:bottom]

    def above(row: Tensor | None) -> Tensor | None:
        if row is None:
            return None
        # Rows above a later slice: it drops its first `halo` rows, the only ones that would read them.
        return row[..., :n_keys] if low == 0 else torch.zeros_like(row[..., :n_keys])

    return q[:, low:bottom], k[:, :n_keys], v[:, :n_keys], start, Rows(above(rows.raw), above(rows.weights))


def _fit(rows: Rows, mixing: Mixing, q: Tensor, n_keys: int) -> Rows:
    """Carried rows widened with zeros to S keys; zeros where nothing is carried; None where no convolution reads them."""
    dtype = torch.promote_types(q.dtype, torch.float32)

    def fit(kernel: Tensor | None, row: Tensor | None) -> Tensor | None:
        if kernel is None:
            return None
        if row is None:
            return q.new_zeros(q.shape[0], q.shape[2], kernel.shape[-2] - 1, n_keys, dtype=dtype)
        if row.shape[2] != kernel.shape[-2] - 1 or row.shape[3] > n_keys:
            raise ValueError(f"carried rows {tuple(row.shape)} do not fit c_q={kernel.shape[-2]} and {n_keys} keys")
        return F.pad(row, (0, n_keys - row.shape[3]))

    return Rows(fit(mixing.kq_pre, rows.raw), fit(mixing.kq_post, rows.weights))


def check_mixing(mixing: Mixing, n_heads: int, pad_key: str) -> None:
    """Raise ValueError, naming the sizes, unless the kernels and matrices fit H heads."""
    if pad_key not in ("both", "left", "right"):
        raise ValueError(f"pad_key is 'both', 'left' or 'right'; got {pad_key!r}")
    for name, kernel in (("kq_pre", mixing.kq_pre), ("kq_post", mixing.kq_post)):
        if kernel is None:
            continue
        if kernel.dim() not in (3, 4) or kernel.shape[0] != n_heads:
            raise ValueError(f"{name} is [H, c_q, c_k] or [H, c_h, c_q, c_k] with H={n_heads}; got {tuple(kernel.shape)}")
        if kernel.dim() == 4 and n_heads % kernel.shape[1]:
            raise ValueError(f"{name}: groups of c_h={kernel.shape[1]} heads do not divide H={n_heads}")
        if pad_key == "both" and kernel.shape[-1] % 2 == 0:
            raise ValueError(f"{name}: pad_key 'both' centres the kernel, so c_k must be odd; got {kernel.shape[-1]}")
    for name, matrix in (("head_pre", mixing.head_pre), ("head_post", mixing.head_post)):
        if matrix is not None and (
            matrix.dim() != 3 or matrix.shape[1] != matrix.shape[2] or matrix.shape[0] * matrix.shape[1] != n_heads
        ):
            raise ValueError(f"{name} is [G, c_h, c_h] with G c_h = H = {n_heads}; got {tuple(matrix.shape)}")


BACKENDS.update(materialized=materialized, blocked=blocked)
