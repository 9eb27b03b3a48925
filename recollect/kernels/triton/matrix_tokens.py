"""What the matrix memory computes for its tokens without its matrix: all pieces at once, before and after the walk over them.

One program has one piece of one head. What lies between these kernels and the walk is [B, H, T, K] or [B, H, T, 16], tokens in order.
NOT YET MEASURED ON A GPU.

Axis legend: B batch, T time, H heads, K key dim, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import (
    SIMPLEX,
    attended,
    attended_back,
    channels,
    line,
    own_piece,
    put,
    put_line,
    put_square,
    scores,
    square,
    tokens_of,
)
from recollect.kernels.triton.perceptron_simplex import evened


@triton.jit
def _to(logs):
    """The decay from the piece's start to each token. Of a sum, whose error is that of one rounding, not of 16 factors."""
    return tl.exp(tl.cumsum(logs, axis=0))


@triton.jit
def _on(logs_after):
    """The decay from each token to the piece's end."""
    return tl.exp(tl.cumsum(logs_after, axis=0, reverse=True))


@triton.jit
def prepare(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
    decayed,
    in_end,
    s,
    total,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    LINK: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries decayed from the piece's start, eta k decayed to its end, their scores, and [B, H, P, K] the decay over the piece."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        query = channels(q, row, real, KEY, KW, True)
        f = channels(eta, row, real, KEY, KW, ETA_WIDE) * channels(k, row, real, KEY, KW, True)
        logs = channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE)
        after = channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE)
        put(decayed + tile, at, real, query * _to(logs), KEY, KW, True)
        put(in_end + tile, at, real, f * _on(after), KEY, KW, True)
        put_line(total + (program * n_rows + n) * KEY, tl.exp(tl.sum(logs, axis=0))[None, :], KEY, KW)
        if LINK == SIMPLEX:
            f = evened(f, KEY, KW)
        weights = scores(query, f, tl.exp(logs), tl.exp(after), KW, PRECISION)
        put_square(s + program * n_tokens * 16, at, real, weights)


@triton.jit
def finish_back(
    order,
    entries,
    ends,
    q,
    k,
    eta,
    log_alpha,
    of_query,
    of_key,
    end_in,
    d_s,
    along,
    d_q,
    d_k,
    d_eta,
    d_log_alpha,
    n_tokens,
    n_heads,
    n_rows,
    KEY: tl.constexpr,
    KW: tl.constexpr,
    LINK: tl.constexpr,
    ETA_WIDE: tl.constexpr,
    ALPHA_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries, keys and gates from what the walk has left, summed over its blocks of rows: one program for each piece."""
    program, n = own_piece(n_rows)
    batch, head = program // n_heads, program % n_heads
    if n < tl.load(ends + batch * 2):
        entry, tile = entries + (batch * n_rows + n) * 6, program * n_tokens * KEY
        at, row, real = tokens_of(order, entry, batch, head, n_tokens, n_heads, 0)
        _, next_row, behind = tokens_of(order, entry, batch, head, n_tokens, n_heads, 1)
        query, keys = channels(q, row, real, KEY, KW, True), channels(k, row, real, KEY, KW, True)
        step = channels(eta, row, real, KEY, KW, ETA_WIDE)
        logs = channels(log_alpha, row, real, KEY, KW, ALPHA_WIDE)
        logs_after = channels(log_alpha, next_row, behind, KEY, KW, ALPHA_WIDE)
        alpha, after = tl.exp(logs), tl.exp(logs_after)
        w, f = square(d_s + program * n_tokens * 16, at, real), step * keys
        to_f, seen = attended_back(w, query, alpha, after, KW, PRECISION), f
        if LINK == SIMPLEX:
            to_f, seen = evened(to_f, KEY, KW), evened(f, KEY, KW)
        to_f -= channels(end_in + tile, at, real, KEY, KW, True) * _on(logs_after)
        to_query = attended(w, seen, alpha, after, KW, PRECISION)
        to_query += channels(of_query + tile, at, real, KEY, KW, True) * _to(logs)
        put(d_q, row, real, to_query, KEY, KW, True)
        put(d_k, row, real, to_f * step + channels(of_key + tile, at, real, KEY, KW, True), KEY, KW, True)
        put(d_eta, row, real, to_f * keys, KEY, KW, ETA_WIDE)
        gained = line(along + (program * n_rows + n) * KEY, KEY, KW)
        gained += tl.cumsum(to_query * query - to_f * f, axis=0, reverse=True)
        put(d_log_alpha, row, real, gained, KEY, KW, ALPHA_WIDE)
