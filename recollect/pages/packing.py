"""Many numbers in little text, for `numbers` of assets/page.js."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def packed(values: np.ndarray, offset: float = 0.0) -> dict[str, Any]:
    """Numbers with about three digits, in 8 bytes of text per 3 of them.

    Args:
        values: any shape, of real numbers; what is not finite becomes nan.
        offset: keeps the digits of what is near it: a retention of 0.9996 is told by its distance from 1.
    Returns:
        {"offset", "scale", "data"}: data is float16 in base64, little endian, in the order of the array; the values are
        offset + scale * data. The one farthest from the offset has data 1 or -1.
    """
    numbers = values.astype(np.float64) - offset
    finite = np.abs(numbers[np.isfinite(numbers)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    half = np.where(np.isfinite(numbers), numbers / scale, np.nan).astype("<f2")
    return {"scale": scale, "offset": offset, "data": base64.b64encode(half.tobytes()).decode("ascii")}
