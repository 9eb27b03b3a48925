"""Attention maps of a text, stage by stage and head by head, pooled while they are made: no [T, T] tensor is ever whole.

A mixer makes its queries and keys from its input; those of a Hugging Face model's attention were caught (`stock.Caught`). Rows come in
blocks, each the ops' own materialised steps (`scores`, `convolve`, softmax, `mix_heads`) on some query rows and the keys up to them,
with the rows that a convolution reads above carried along as a decoder carries them.

Axis legend: T time, R query rows of a block, S keys up to the block's last row, H heads, n cells of a pooled map's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import singledispatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.inspection.stock import Caught
from recollect.mixers import Mixer
from recollect.mixers.attention import Attention, Projections, extend_cache
from recollect.mixers.differential import Differential, DifferentialV2
from recollect.mixers.multi_token import MultiTokenAttention
from recollect.ops.attention import visible
from recollect.ops.multi_token import Mixing, Rows, convolve, mix_heads, scores

POOLS = ("max", "mean")
WHOLE_MAP_TOKENS = 2048  # of a mixer that gives its maps as a whole only
NUMBERS_AT_ONCE = 1 << 24
N_TOP = 8
TITLES = {
    "logits": "Raw logits",
    "convolved": "Logits after the convolution",
    "mixed": "Logits after head mixing",
    "softmax": "After the softmax",
    "post_convolved": "Weights after the convolution",
    "post_mixed": "Weights after head mixing",
    "first": "First softmax map",
    "second": "Second softmax map",
    "difference": "Difference of the two maps",
}
LOGITS = ("logits", "convolved", "mixed")


class RowBlock(NamedTuple):
    """Query rows top .. top + R of every stage in the order of computation, each [H, R, S]; seen [R, S]: what a query may look at."""

    top: int
    stages: dict[str, Tensor]
    seen: Tensor


class StageMap(NamedTuple):
    """One stage of a layer. values [H, n, n], nan where nothing is visible; `block` tokens are a cell's side."""

    stage: str
    block: int
    values: Tensor


class Attended(NamedTuple):
    """What a layer's attention does over a text.

    maps: every stage; keys, weights [H, T, N_TOP]: the keys with the largest weight that values are read with, -1 and 0 where there
    are fewer; entropy [H, T]: of the softmax, in bits; first [H, T]: its weight on the first token. The last two are None where
    no stage is a softmax.
    """

    maps: list[StageMap]
    keys: Tensor
    weights: Tensor
    entropy: Tensor | None
    first: Tensor | None


def attend(mixer: Mixer | Caught, x: Tensor, *, side: int, pool: str = "max") -> Attended | None:
    """The maps of one layer.

    Args:
        mixer: any; None comes back if it has no maps.
        x: its input, [1, T, D]; of something caught, its queries.
        side: cells that a map may be wide; longer texts are pooled in square cells of ceil(T / side) tokens.
        pool: what a cell shows of the visible entries in it. "max": the largest logit, or the weight farthest from zero;
            "mean": their mean.
    Raises:
        ValueError: an unknown pool, a mixer whose maps exist only as a whole and a text too long for them.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is one of {', '.join(POOLS)}; got {pool!r}")
    length = x.shape[1]
    block = math.ceil(length / side)
    maps: dict[str, list[Tensor]] = {}
    keys, weights, entropy, first = [], [], [], []
    with torch.no_grad():
        for rows in row_blocks(mixer, x, block):
            for stage, values in rows.stages.items():
                maps.setdefault(stage, []).append(_pooled(values, rows.seen, block, length, pool, stage in LOGITS))
            final = list(rows.stages.values())[-1]
            top = _top(final, rows.seen)
            keys.append(top[0])
            weights.append(top[1])
            if "softmax" in rows.stages:
                p = rows.stages["softmax"]
                entropy.append(torch.special.entr(p).sum(-1) / math.log(2))
                first.append(p[..., 0])
    if not maps:
        return None
    return Attended(
        [StageMap(stage, block, torch.cat(parts, dim=1)) for stage, parts in maps.items()],
        torch.cat(keys, dim=1),
        torch.cat(weights, dim=1),
        torch.cat(entropy, dim=1) if entropy else None,
        torch.cat(first, dim=1) if first else None,
    )


@singledispatch
def row_blocks(mixer: Mixer | Caught, x: Tensor, block: int) -> Iterator[RowBlock]:
    """The stages of a mixer's maps in blocks of rows, each a multiple of `block` rows but the last; nothing if it has no maps.

    This is the form for mixers that are not known here: their own `maps`, as a whole.
    """
    length = x.shape[1]
    if not isinstance(mixer, Mixer) or type(mixer).maps is Mixer.maps:
        return
    if length > WHOLE_MAP_TOKENS:
        raise ValueError(f"maps of this mixer exist only as a whole: at most {WHOLE_MAP_TOKENS:,} tokens, here {length:,}")
    whole = mixer.maps(x)
    if whole:
        yield RowBlock(0, {name: values[0] for name, values in whole.items()}, visible(length, length, device=x.device))


@row_blocks.register
def _(mixer: Attention, x: Tensor, block: int) -> Iterator[RowBlock]:
    q, k = _rotated(mixer.project, x, mixer.config.rope_theta)
    yield from _plain(q, k, q.shape[-1] ** -0.5, mixer.config.window, block)


@row_blocks.register
def _(mixer: MultiTokenAttention, x: Tensor, block: int) -> Iterator[RowBlock]:
    q, k = _rotated(mixer.project, x, mixer.config.rope_theta)
    yield from _multi_token(q, k, q.shape[-1] ** -0.5, mixer.mixing, mixer.config.pad_key, block)


@row_blocks.register
def _(mixer: Caught, x: Tensor, block: int) -> Iterator[RowBlock]:
    if mixer.refused:
        return
    q, k = mixer.q[:, : x.shape[1]], mixer.k[:, : x.shape[1]]
    if mixer.mixing is None:
        yield from _plain(q, k, mixer.scale, mixer.window, block)
    else:
        yield from _multi_token(q, k, mixer.scale, mixer.mixing, mixer.pad_key, block)


def _plain(q: Tensor, k: Tensor, scale: float, window: int | None, block: int) -> Iterator[RowBlock]:
    """Softmax attention. q [1, T, H, K] and k [1, T, Hkv, K] after rotation."""
    for top, last in _spans(q.shape[1], q.shape[2], block):
        seen = visible(last - top, last, window=window, device=q.device)
        logits = scores(q[:, top:last], k[:, :last], scale)
        yield RowBlock(top, {"logits": logits[0], "softmax": _softmax(logits, seen)[0]}, seen)


def _multi_token(q: Tensor, k: Tensor, scale: float, mixing: Mixing, pad_key: str, block: int) -> Iterator[RowBlock]:
    """Multi-Token Attention. q [1, T, H, K] and k [1, T, Hkv, K] after rotation."""
    exact = torch.promote_types(q.dtype, torch.float32)
    rows = Rows()
    for top, last in _spans(q.shape[1], q.shape[2], block):
        seen = visible(last - top, last, device=q.device)
        values = scores(q[:, top:last], k[:, :last], scale).to(exact).masked_fill(~seen, 0)
        stages, raw, after = {"logits": values}, None, None
        if mixing.kq_pre is not None:
            above = _above(rows.raw, values, mixing.kq_pre)
            values, raw = convolve(values, mixing.kq_pre.to(exact), above, None, pad_key)
            stages["convolved"] = values
        if mixing.head_pre is not None:
            values = stages["mixed"] = mix_heads(values, mixing.head_pre.to(exact))
        values = stages["softmax"] = _softmax(values, seen)
        if mixing.kq_post is not None:
            above = _above(rows.weights, values, mixing.kq_post)
            values, after = convolve(values, mixing.kq_post.to(exact), above, None, pad_key)
            values = stages["post_convolved"] = values.masked_fill(~seen, 0)
        if mixing.head_post is not None:
            stages["post_mixed"] = mix_heads(values, mixing.head_post.to(exact))
        rows = Rows(raw, after)
        yield RowBlock(top, {stage: part[0] for stage, part in stages.items()}, seen)


@row_blocks.register
def _(mixer: Differential, x: Tensor, block: int) -> Iterator[RowBlock]:
    lam = mixer.lam().expand(x.shape[1], mixer.config.n_heads // 2)
    yield from _difference(mixer.project, x, mixer.config.rope_theta, lam, block)


@row_blocks.register
def _(mixer: DifferentialV2, x: Tensor, block: int) -> Iterator[RowBlock]:
    yield from _difference(mixer.project, x, mixer.config.rope_theta, mixer.gate(x).sigmoid()[0], block)


def _difference(project: Projections, x: Tensor, theta: float, lam: Tensor, block: int) -> Iterator[RowBlock]:
    """Both maps of every pair of heads and first - lam second; lam [T, pairs]. Pairs and keys as in `differential_attention`."""
    q, k = _rotated(project, x, theta)
    first, second = q.unflatten(2, (-1, 2)).unbind(3)
    keys = k.unflatten(2, (-1, 2)).unbind(3) if project.n_value_heads * 2 == k.shape[2] else (k, k)
    for top, last in _spans(x.shape[1], q.shape[2], block):
        seen = visible(last - top, last, device=x.device)
        one, two = (
            _softmax(scores(part[:, top:last], key[:, :last], q.shape[-1] ** -0.5), seen)[0]
            for part, key in zip((first, second), keys, strict=True)
        )
        yield RowBlock(
            top, {"first": one, "second": two, "difference": one - lam[top:last].T[..., None].to(one.dtype) * two}, seen
        )


def _rotated(project: Projections, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotated q [1, T, H, K] and k [1, T, Hkv, K]."""
    q, k, v = project(x)
    q, cache, _ = extend_cache(q, k, v, None, theta, None, None)
    return q, cache.k


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(exact).masked_fill(~seen, float("-inf")).softmax(-1)


def _above(row: Tensor | None, like: Tensor, kernel: Tensor) -> Tensor:
    """The rows above a block, as wide as the block: they do not see the keys that have come since."""
    if row is None:
        return like.new_zeros(*like.shape[:2], kernel.shape[-2] - 1, like.shape[-1])
    return F.pad(row, (0, like.shape[-1] - row.shape[-1]))


def _spans(length: int, n_heads: int, block: int) -> Iterator[tuple[int, int]]:
    """First and end of the row blocks: whole cells, about NUMBERS_AT_ONCE numbers a stage."""
    rows = max(1, NUMBERS_AT_ONCE // (length * n_heads * block)) * block
    for top in range(0, length, rows):
        yield top, min(top + rows, length)


def _pooled(values: Tensor, seen: Tensor, block: int, length: int, pool: str, is_logit: bool) -> Tensor:
    """Rows [H, R, S] of a map of `length` tokens -> [H, ceil(R / block), n]."""
    n_rows, n_cells = math.ceil(values.shape[1] / block), math.ceil(length / block)
    values = values.to(torch.promote_types(values.dtype, torch.float32))

    def cells(part: Tensor, fill: float) -> Tensor:
        padding = (0, n_cells * block - part.shape[-1], 0, n_rows * block - part.shape[-2])
        return F.pad(part, padding, value=fill).unflatten(-2, (n_rows, block)).unflatten(-1, (n_cells, block))

    count = cells(seen.to(values.dtype), 0.0).sum((-3, -1))
    if pool == "mean":
        found = cells(values.masked_fill(~seen, 0.0), 0.0).sum((-3, -1)) / count
    else:
        found = cells(values.masked_fill(~seen, -math.inf), -math.inf).amax((-3, -1))
        if not is_logit:
            least = cells(values.masked_fill(~seen, math.inf), math.inf).amin((-3, -1))
            found = torch.where(found >= -least, found, least)
    return found.masked_fill(count == 0, math.nan).cpu()


def _top(values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and weights [H, R, N_TOP] of the entries farthest from zero, in falling order."""
    size = values.abs().masked_fill(~seen, -1.0)
    best, keys = size.topk(min(N_TOP, size.shape[-1]), dim=-1)
    weights = values.gather(-1, keys).masked_fill(best < 0, 0.0)
    keys = keys.masked_fill(best < 0, -1)
    room = (0, N_TOP - keys.shape[-1])
    return F.pad(keys, room, value=-1).cpu(), F.pad(weights.float(), room).cpu()
