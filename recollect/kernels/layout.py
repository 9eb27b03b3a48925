"""Tensors as the compiled kernels want them, and the structs of attention.c that point at them.

Axis legend: B batch, T queries, S keys, H heads, K key dim, R rows, W padded width of a map.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.kernels.compile import POINTER, SIZE, attention, stencil
from recollect.ops.multi_token import Mixing, Settings, dropout_mask, key_padding

# Of the strips of maps that a task stands on: about the second-level cache. A strip is whole tiles of 3, 4 or 6 rows.
STRIP_BYTES, STRIP_ROWS, LONGEST_STRIP = 2**20, 24, 48
TILED_STRIP = (32, 32)  # the same for tiles
TILED_QUERIES, TILED_WIDTH = 32, 512  # fewer queries would fill no block of tiles; a wider head no stack
WIDEST = 16  # numbers of a vector, at most
MASK_BYTES = 2**25  # of the dropout mask of a call's rows
# Few heads are cut into segments of rows, so that there is work for several threads; not by their number, which must not change the
# result. Every segment has its own gradients of the keys and values that it sees.
TASKS, SEGMENTS, SEGMENT_ROWS = 16, 4, 256


class SideStruct(ctypes.Structure):
    """The C struct `Side`."""

    _fields_ = (
        *((name, SIZE) for name in ("halo", "left", "taps", "group")),
        *((name, POINTER) for name in ("kernel", "flipped", "matrix", "transposed", "kernel_grad", "matrix_grad")),
        *((name, POINTER) for name in ("forward", "mix_gradient", "mix_backward", "correlate", "convolution_backward")),
    )


class Call(ctypes.Structure):
    """The C struct of the same name."""

    _fields_ = (
        *((name, SIZE) for name in ("batch", "heads", "group", "queries", "keys", "width", "value_width")),
        *(("segments", SIZE), ("bounds", POINTER)),
        *((name, SIZE) for name in ("strip", "ld", "pad", "start_stride")),
        *((name, POINTER) for name in ("start", "q", "packed", "woven_k", "woven_v", "turned_q", "turned_grad", "mask")),
        ("mask_rows", SIZE),
        *((name, POINTER) for name in ("carried_raw", "carried_weights", "lse", "out", "last_raw", "last_weights")),
        *((name, POINTER) for name in ("grad_out", "grad_raw", "grad_weights")),
        *((name, SIZE) for name in ("n_raw", "n_weights")),
        *((name, POINTER) for name in ("grad_q", "grad_k", "grad_v", "scratch")),
        ("scratch_size", SIZE),
        ("threads", ctypes.c_int),
        ("team", ctypes.c_int),
        ("pre", SideStruct),
        ("post", SideStruct),
    )


class Side(NamedTuple):
    """Convolution and head mixing on one side of the softmax, with its compiled kernel. None where a part is missing."""

    kernel: Tensor | None
    matrix: Tensor | None
    code: ctypes.CDLL
    reach: tuple[int, int]  # keys to the left and right of the current one

    @property
    def halo(self) -> int:
        """Rows above that the convolution reads."""
        return 0 if self.kernel is None else self.kernel.shape[1] - 1

    @property
    def group(self) -> int:
        """Heads mixed together, c_h."""
        return 1 if self.matrix is None else self.matrix.shape[1]

    def struct(self, kept: list[Tensor]) -> SideStruct:
        """What attention.c reads; tensors that it points at go to `kept`."""
        given = SideStruct(halo=self.halo, left=self.reach[0], group=self.group)
        names = ["forward", "convolution_backward"]
        if self.kernel is not None:
            flipped = self.kernel.flip(1, 2).contiguous()
            kept.append(flipped)
            given.taps, given.kernel, given.flipped = self.kernel[0].numel(), self.kernel.data_ptr(), flipped.data_ptr()
            names.append("correlate")
        if self.matrix is not None:
            transposed = self.matrix.mT.contiguous()
            kept.append(transposed)
            given.matrix, given.transposed = self.matrix.data_ptr(), transposed.data_ptr()
            names += ["mix_gradient", "mix_backward"]
        for name in names:
            setattr(given, name, ctypes.cast(self.code[name], POINTER))
        return given


def side(kernel: Tensor | None, matrix: Tensor | None, pad_key: str, dtype: torch.dtype) -> Side:
    """One side in the kernels' precision; `can_run` has shown that it compiles."""
    code = compiled(kernel, matrix, dtype == torch.float64)
    assert code is not None
    kernel = None if kernel is None else kernel.detach().to(dtype).contiguous()
    matrix = None if matrix is None else matrix.detach().to(dtype).contiguous()
    return Side(kernel, matrix, code, (0, 0) if kernel is None else key_padding(pad_key, kernel.shape[2]))


def compiled(kernel: Tensor | None, matrix: Tensor | None, double: bool) -> ctypes.CDLL | None:
    """The kernel for the shapes of one side; None where it cannot be built."""
    c_q, c_k = (0, 0) if kernel is None else kernel.shape[1:]
    return stencil(c_q, c_k, 1 if matrix is None else matrix.shape[1], double)


def products(q: Tensor, k: Tensor, v: Tensor) -> tuple[ctypes.CDLL, torch.dtype, bool]:
    """The code for a call's products, the dtype of what they multiply, and whether on tiles: bfloat16 if q, k and v are in it."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if all(x.dtype == torch.bfloat16 for x in (q, k, v)):
        many = q.shape[1] >= TILED_QUERIES and max(q.shape[3], v.shape[3]) <= TILED_WIDTH
        if many and (code := attention(torch.bfloat16, tiles=True)) is not None:
            return code, torch.bfloat16, True
        if (code := attention(torch.bfloat16)) is not None:
            return code, torch.bfloat16, False
    code = attention(dtype)
    assert code is not None
    return code, dtype, False


def padding(pre: Side, post: Side) -> int:
    """Zeros on either side of a map's rows: what the convolutions reach, in whole vectors of the widest kind."""
    return -(-max(*pre.reach, *post.reach) // WIDEST) * WIDEST


def starts(start: Tensor, batch: int, n_queries: int, n_keys: int) -> Tensor:
    """int64 [B, T + 32], checked because the kernels write where it says; the rows past the end are for looking ahead.

    Raises:
        ValueError: unless it broadcasts to [B, T], decreases nowhere and lies in 0 .. the query's position.
    """
    shape = (batch, n_queries)
    if start.dim() != 2 or any(got not in (1, full) for got, full in zip(start.shape, shape, strict=True)):
        raise ValueError(f"start or document_ids must be [B, T] with B={batch}, T={n_queries} here; got {tuple(start.shape)}")
    start = start.expand(shape).to(torch.int64)
    position = torch.arange(n_keys - n_queries, n_keys)
    if ((start < 0) | (start > position)).any() or (start.diff(dim=1) < 0).any():
        raise ValueError("start must not decrease and must lie in 0 .. the query's position; it does not")
    return torch.cat((start, start[:, -1:].expand(-1, 32)), 1)


class Plan:
    """One call: inputs in kernel layout, both sides, and the struct that describes them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None) -> None:
        self.batch, self.n_queries, self.n_heads, _ = q.shape
        self.n_keys = k.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)  # of maps and results, whatever the dtypes of k and v
        self.pre = side(mixing.kq_pre, mixing.head_pre, settings.pad_key, self.dtype)
        self.post = side(mixing.kq_post, mixing.head_post, settings.pad_key, self.dtype)
        self.settings = settings
        self.n_maps = self.batch * self.n_heads
        self.halo = self.pre.halo + self.post.halo
        self.code, self.product, self.tiles = products(q, k, v)
        self.lanes = self.code.lanes()
        self.q, self.k, self.v = self.heads(q.to(self.dtype) * settings.scale), self.heads(k), self.heads(v)
        self.start = None if start is None else starts(start, self.batch, self.n_queries, self.n_keys)
        self.kept: list[Tensor] = []
        self.call = self._describe()

    def _describe(self) -> Call:
        group, threads = math.lcm(self.pre.group, self.post.group), torch.get_num_threads()
        pad = padding(self.pre, self.post)
        ld = -(-self.n_keys // self.lanes) * self.lanes + 2 * pad
        shortest, longest = TILED_STRIP if self.tiles else (STRIP_ROWS, LONGEST_STRIP)
        strip = STRIP_BYTES // (8 * group * ld * self.dtype.itemsize) // shortest * shortest
        tasks = self.n_maps // group
        self.bounds = self.cut(1 if self.settings.dropout_p else min(SEGMENTS, TASKS // tasks))
        segments = len(self.bounds) - 1
        team = 1 if tasks * segments >= threads else threads
        if team > 1:  # all heads of a batch element at once, so that there are enough for the threads
            group = self.n_heads
        call = Call(
            batch=self.batch,
            heads=self.n_heads,
            group=group,
            queries=self.n_queries,
            keys=self.n_keys,
            width=self.q.shape[-1],
            value_width=self.v.shape[-1],
            segments=segments,
            bounds=self.bounds.data_ptr(),
            strip=min(max(strip, shortest), longest),
            ld=ld,
            pad=pad,
            threads=threads,
            team=team,
            pre=self.pre.struct(self.kept),
            post=self.post.struct(self.kept),
            q=self.q.data_ptr(),
        )
        if self.start is not None:
            call.start, call.start_stride = self.start.data_ptr(), self.start.shape[1]
        return call

    def new(self, *shape: int) -> Tensor:
        """Room for maps or results."""
        return self.q.new_empty(*shape, dtype=self.dtype)

    def cut(self, n: int) -> Tensor:
        """Bounds int64 of up to n segments of the queries with equally many visible keys, none of them short."""
        n = max(1, min(n, self.n_queries // SEGMENT_ROWS))
        earlier = self.n_keys - self.n_queries
        share = torch.arange(n + 1, dtype=torch.float64) / n * (self.n_keys**2 - earlier**2)
        return ((share + earlier**2).sqrt() - earlier).round().long()

    @property
    def seen_by(self) -> list[int]:
        """Keys that each segment's queries see."""
        earlier = self.n_keys - self.n_queries
        return [earlier + end for end in self.bounds[1:-1].tolist()] + [self.n_keys]

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, Hx, K] -> [BH, L, K'] for products, key-value heads repeated to H, K' = K padded with zeros to whole vectors."""
        batch, length, n_heads, size = x.shape
        width = -(-size // self.lanes) * self.lanes
        out = x.new_empty(batch, n_heads, self.n_heads // n_heads, length, width, dtype=self.product, device="cpu")
        out[..., size:] = 0
        out[..., :size] = x.transpose(1, 2)[:, :, None]
        return out.view(self.n_maps, length, -1)

    def woven(self, x: Tensor) -> Tensor:
        """Rows [BH, L, K'] as they are summed along a map: bfloat16 with neighbours beside each other, [BH, ceil(L / 2), K', 2].

        For tiles L is padded with zeros to a multiple of 32.
        """
        if self.product != torch.bfloat16:
            return x
        n, length, width = x.shape
        pairs = x.new_empty(n, -(-length // self.lanes) * self.lanes // 2 if self.tiles else -(-length // 2), width, 2)
        pairs[:, : -(-length // 2), :, 0] = x[:, ::2]
        pairs[:, : length // 2, :, 1] = x[:, 1::2]
        pairs[:, length // 2 : -(-length // 2), :, 1] = 0
        pairs[:, -(-length // 2) :] = 0
        return pairs

    def turned(self, x: Tensor) -> Tensor:
        """Rows [BH, L, K'] as they are summed down a map: woven; or for tiles [BH, K', L'], padded with zeros."""
        if not self.tiles:
            return self.woven(x)
        n, length, width = x.shape
        out = x.new_empty(n, width, self.code.turned_length(length))
        out[..., :length], out[..., length:] = x.mT, 0
        return out

    def gradients(self, width: int) -> tuple[list[Tensor], list[Tensor]]:
        """Zeros for the gradients of keys or values, K' wide, that each segment sees: as attention.c adds to them, and the same
        numbers as [BH, seen, K']."""
        if not self.tiles:
            given = [self.new(self.n_maps, seen, width).zero_() for seen in self.seen_by]
            return given, given
        given = [self.new(self.n_maps, width, self.code.gradient_length(seen)).zero_() for seen in self.seen_by]
        return given, [x[..., :seen].mT for x, seen in zip(given, self.seen_by, strict=True)]

    def pack(self, *several: Tensor) -> Tensor:
        """Keys, and values, [BH, S, K'] one after the other as panels, as attention.c wants them."""
        panel = self.code.panel_width()
        length = -(-self.n_keys // panel) * panel
        out = self.q.new_empty(sum(self.n_maps * length * x.shape[2] for x in several))
        at = 0
        for x in several:
            self.code.pack_all(x.data_ptr(), *x.shape, out[at:].data_ptr(), self.call.threads)
            at += self.n_maps * length * x.shape[2]
        return out

    def carried(self, rows: Tensor | None, halo: int) -> Tensor | None:
        """Carried rows [B, H, n, S'] as the last of `halo` rows [BH, halo, W] above the first query, zeros around them."""
        if rows is None or not halo or not rows.shape[2] or self.n_keys == self.n_queries:
            return None
        out = self.q.new_zeros(self.n_maps, halo, self.call.ld, dtype=self.dtype)
        kept = rows.flatten(0, 1)[:, -halo:, : self.n_keys]
        out[:, halo - kept.shape[1] :, self.call.pad : self.call.pad + kept.shape[2]] = kept
        return out

    def run(self, *, backward: bool) -> None:
        """Do the call, range by range of the queries where dropout is on: a mask has an entry for every pair of tokens."""
        call, size = self.call, self.code.scratch_size(ctypes.byref(self.call), int(backward))
        scratch = self.new(size * (call.threads if call.team == 1 else 1))
        call.scratch, call.scratch_size = scratch.data_ptr(), size
        if not self.settings.dropout_p:
            self.code.run(ctypes.byref(call), int(backward))
            return
        rows = max(2 * self.halo + 1, MASK_BYTES // (self.n_maps * self.n_keys * self.dtype.itemsize))
        for low in range(0, self.n_queries, rows):
            high = min(low + rows, self.n_queries)
            mask = self.mask(low, min(high + self.halo, self.n_queries))
            self.bounds[:] = torch.tensor([low, high])
            call.mask, call.mask_rows = mask.data_ptr(), mask.shape[1]
            self.code.run(ctypes.byref(call), int(backward))

    def mask(self, low: int, high: int) -> Tensor:
        """The dropout mask [BH, high - low, S] of these queries."""
        like = self.new(self.batch, self.n_heads, high - low, self.n_keys)
        return dropout_mask(like, self.settings, self.n_keys - self.n_queries + low).flatten(0, 1)
