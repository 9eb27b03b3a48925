"""A kernel that calls what the perceptron memory's walk does with a bias, and nothing else: every bias compiles in seconds."""

from __future__ import annotations

import triton
import triton.language as tl

from recollect.kernels.triton.perceptron_parts import SIZE, channels, descent_back, line, put, put_line


@triton.jit
def probe(x, out, KEY: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr, SHARPNESS: tl.constexpr):
    """`descent_back` of rows that are all the same."""
    row = tl.arange(0, SIZE)
    real = row < SIZE
    rows = channels(x, row, real, KEY, KW, True)
    gain = line(x, KEY, KW)
    d_u, d_r, d_delta, d_gain = descent_back(rows, rows, rows, rows, rows, gain, gain, KEY, KW, BIAS, SHARPNESS)
    put(out, row, real, d_u + d_r + d_delta, KEY, KW, True)
    put_line(out, d_gain, KEY, KW)
