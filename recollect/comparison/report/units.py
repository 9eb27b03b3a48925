"""Numbers as people read them. ASCII only, so that every terminal shows them."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """0.0413 -> "4.13", 0.656 -> "65.6": per cent without the sign, three digits at most."""
    value = 100 * share
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def score(value: float, metric: str) -> str:
    """A score in the metric's unit: per cent for "error", bits for "bits_per_byte"; "nan" where it is not finite."""
    if not math.isfinite(value):
        return str(value)
    return percent(value) if metric == "error" else f"{value:.3f}"


def small(value: float) -> str:
    """A loss: three decimals, or two digits below 0.01."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def count(value: float) -> str:
    """1234 -> "1,234"; 6144000 -> "6.14M"."""
    if not math.isfinite(value):
        return "-"
    if value < 100_000:
        return f"{value:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if value < 999.5 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """75 -> "1m 15s"; 7320 -> "2h 02m"; 3.14 -> "3.1s"."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def size(n_bytes: float) -> str:
    """Bytes in binary units: 98304 -> "96.0 KiB"."""
    if n_bytes < 1024:
        return f"{n_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n_bytes /= 1024
        if n_bytes < 1024:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} TiB"
