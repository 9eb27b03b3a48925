"""Tensors as the compiled kernels want them: one side of the softmax, a block of query rows, the inputs and scratch of a call.

Axis legend: B batch, T queries, S keys, H heads, K key dim, R rows of a block, W padded width of a map.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.kernels.compile import Geometry, products, stencil
from recollect.ops.multi_token import Mixing, Settings, key_padding

BLOCK_BYTES = 2**23  # of one map of a block


class Side(NamedTuple):
    """Convolution and head mixing on one side of the softmax, with its compiled kernel. None where a part is missing."""

    kernel: Tensor | None
    matrix: Tensor | None
    code: ctypes.CDLL
    left: int

    @property
    def halo(self) -> int:
        """Rows above a block that the convolution reads."""
        return 0 if self.kernel is None else self.kernel.shape[1] - 1

    @property
    def group(self) -> int:
        """Heads mixed together, c_h."""
        return 1 if self.matrix is None else self.matrix.shape[1]


def side(kernel: Tensor | None, matrix: Tensor | None, pad_key: str, dtype: torch.dtype) -> Side:
    """One side in the kernels' precision; `can_run` has shown that it compiles."""
    code = compiled(kernel, matrix, dtype == torch.float64)
    assert code is not None
    kernel = None if kernel is None else kernel.detach().to(dtype).contiguous()
    matrix = None if matrix is None else matrix.detach().to(dtype).contiguous()
    return Side(kernel, matrix, code, 0 if kernel is None else key_padding(pad_key, kernel.shape[2])[0])


def compiled(kernel: Tensor | None, matrix: Tensor | None, double: bool) -> ctypes.CDLL | None:
    """The kernel for the shapes of one side; None where it cannot be built."""
    c_q, c_k = (0, 0) if kernel is None else kernel.shape[1:]
    return stencil(c_q, c_k, 1 if matrix is None else matrix.shape[1], double)


class Block:
    """Buffers and geometry of one block: rows i0 .. i1 of the queries, W = padded width of its maps.

    Maps are [BH, rows, W] views of flat buffers that all blocks share. Row 0 of `raw` is query i0 - halo_pre - halo_post, row 0 of
    `weights` is query i0 - halo_post; rows before the first query hold what was carried, or zeros.
    """

    def __init__(self, plan: Plan, top: int, bottom: int) -> None:
        self.plan, self.top, self.bottom = plan, top, bottom
        self.n_rows, self.n_keys = bottom - top, plan.earlier + bottom
        self.width = 2 * plan.pad + -(-self.n_keys // plan.panel) * plan.panel

    def map(self, name: str, rows: int) -> Tensor:
        """A map [BH, rows, W] in the buffer of that name."""
        size = self.plan.n_maps * rows * self.width
        buffer = self.plan.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.plan.buffers[name] = self.plan.q.new_empty(size)
        return buffer[:size].view(self.plan.n_maps, rows, self.width)

    def geometry(self, row: int, rows: int, *, group: int = 1, left: int = 0) -> Geometry:
        """Geometry of `rows` rows from query `row` on, a task being `group` heads, with `left` keys reached to the left."""
        plan = self.plan
        start = None if plan.start is None else plan.start.data_ptr() + row * plan.start.element_size()
        stride = 0 if plan.start is None else plan.start.shape[1]
        per_batch = plan.n_heads // group
        return Geometry(
            *(plan.batch * per_batch, per_batch, rows, plan.earlier + row, self.width, plan.pad, left),
            *(start, stride, plan.threads),
        )

    def address(self, x: Tensor, row: int = 0) -> int:
        """Address of column 0 of a row of a map."""
        return x.data_ptr() + (row * self.width + self.plan.pad) * x.element_size()

    def logits(self, x: Tensor, row: int, panels: Tensor, out: Tensor) -> None:
        """Masked products of rows x [BH, T, K'] from query `row` to the block's last with packed keys, into a map."""
        self.plan.code.logits(
            *(
                self.geometry(row, self.bottom - row),
                x.data_ptr() + row * x.stride(1) * x.element_size(),
                x.stride(0),
                x.stride(1),
            ),
            *(x.shape[2], panels.data_ptr(), panels.stride(0), self.address(out), out.stride(0)),
        )

    def read(self, x: Tensor, values: Tensor, out: Tensor) -> None:
        """Products of the block's rows of a map with values [BH, S, K'], into rows top .. bottom of out [BH, T, K']."""
        to = out.data_ptr() + self.top * out.stride(1) * out.element_size()
        self.plan.code.read_rows(
            *(self.geometry(self.top, self.n_rows), self.address(x), x.stride(0), values.data_ptr(), values.stride(0)),
            *(values.stride(1), values.shape[2], to, out.stride(0), out.stride(1)),
        )

    def accumulate(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add the transposed map times the block's rows of `rows` [BH, T, K'] to out [BH, S, K']."""
        source = rows.data_ptr() + self.top * rows.stride(1) * rows.element_size()
        self.plan.code.accumulate(
            *(self.geometry(self.top, self.n_rows), self.address(x), x.stride(0), source, rows.stride(0)),
            *(rows.stride(1), rows.shape[2], out.data_ptr(), out.stride(0), out.stride(1)),
        )

    def columns(self, x: Tensor) -> Tensor:
        """The map without its padding: [BH, rows, n_keys]."""
        return x[:, :, self.plan.pad : self.plan.pad + self.n_keys]


class Plan:
    """One call: inputs in kernel layout, both sides, scratch buffers."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, settings: Settings, start: Tensor | None) -> None:
        self.batch, self.n_queries, self.n_heads, _ = q.shape
        self.earlier = k.shape[1] - q.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)  # of every buffer, whatever the dtypes of k and v
        pre = side(mixing.kq_pre, mixing.head_pre, settings.pad_key, self.dtype)
        post = side(mixing.kq_post, mixing.head_post, settings.pad_key, self.dtype)
        self.pre, self.post, self.settings = pre, post, settings
        self.n_maps, self.threads = self.batch * self.n_heads, torch.get_num_threads()
        widest = max((part.kernel.shape[2] for part in (pre, post) if part.kernel is not None), default=1)
        self.pad = -(-widest // 16) * 16
        self.halo = pre.halo + post.halo
        code = products(self.dtype == torch.float64)
        assert code is not None
        self.code, self.panel, self.lanes = code, code.panel_width(), code.lanes()
        self.q, self.k, self.v = self.heads(q).mul_(settings.scale), self.heads(k), self.heads(v)
        self.start = None if start is None else self.starts(start)
        self.packed_k = self.panels(self.k)
        self.buffers: dict[str, Tensor] = {}

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, Hx, K] -> [BH, L, K'], key-value heads repeated to H, K' = K padded with zeros to whole vectors."""
        batch, length, n_heads, size = x.shape
        width = -(-size // self.lanes) * self.lanes
        out = x.new_empty(batch, n_heads, self.n_heads // n_heads, length, width, dtype=self.dtype, device="cpu")
        out[..., size:] = 0
        out[..., :size] = x.transpose(1, 2)[:, :, None]
        return out.view(self.n_maps, length, -1)

    def starts(self, start: Tensor) -> Tensor:
        """int64 [B, T + 32], checked because the kernels write where it says; the rows past the end are for looking ahead.

        Raises:
            ValueError: unless it broadcasts to [B, T], decreases nowhere and lies in 0 .. the query's position.
        """
        shape = (self.batch, self.n_queries)
        if start.dim() != 2 or any(got not in (1, full) for got, full in zip(start.shape, shape, strict=True)):
            raise ValueError(
                f"start or document_ids must be [B, T] with B={shape[0]}, T={shape[1]} here; got {tuple(start.shape)}"
            )
        start = start.expand(shape).to(torch.int64)
        position = torch.arange(self.earlier, self.earlier + self.n_queries)
        if ((start < 0) | (start > position)).any() or (start.diff(dim=1) < 0).any():
            raise ValueError("start must not decrease and must lie in 0 .. the query's position; it does not")
        return torch.cat((start, start[:, -1:].expand(-1, 32)), 1)

    def panels(self, x: Tensor) -> Tensor:
        """Keys or values [BH, S, K'] packed for `logits`: [BH, panels, K', panel width]."""
        out = x.new_empty(x.shape[0], -(-x.shape[1] // self.panel), x.shape[2], self.panel)
        self.code.pack(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), x.stride(1), x.shape[2], out.data_ptr(), self.threads)
        return out

    def blocks(self) -> list[Block]:
        """Blocks of rows, of about BLOCK_BYTES a map."""
        row_bytes = self.n_maps * (self.earlier + self.n_queries + 2 * self.pad) * self.q.element_size()
        # Kernels work on strips of six rows: with the rows above that the second convolution reads, a block is whole strips.
        rows = max(36, BLOCK_BYTES // row_bytes // 6 * 6) + -self.post.halo % 6
        return [Block(self, top, min(top + rows, self.n_queries)) for top in range(0, self.n_queries, rows)]

    def above(self, x: Tensor, rows: int, block: Block, carried: Tensor | None) -> None:
        """Fill the rows of map x that lie before the first query: carried rows [B, H, halo, S], zeros above them."""
        if not rows:
            return
        x[:, :rows].zero_()
        if carried is not None and carried.shape[2] and self.earlier:
            kept = carried.flatten(0, 1)[:, :, : block.n_keys]
            x[:, rows - kept.shape[1] : rows, self.pad : self.pad + kept.shape[2]] = kept


def pointer(x: Tensor | None) -> int | None:
    """Address of a contiguous tensor, None for None."""
    return None if x is None else x.data_ptr()
