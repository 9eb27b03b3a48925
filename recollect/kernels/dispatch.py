"""Offers the kernels to the ops: for each form what it is meant for (device, length) and what a call lacks for it.

`recollect.ops.forms` chooses by these, for every op alike: the first form that is meant for a call and lacks nothing, else the plain
one, with a `SlowerFormWarning`, once for each reason, where the call is long enough to matter. `recorded` tells what was taken.
"""

from __future__ import annotations

from recollect.kernels import fla, miras, multi_token, triton
from recollect.ops import multi_token as attention
from recollect.ops import tiles
from recollect.ops.forms import SlowerFormWarning, recorded
from recollect.ops.miras.scan import BACKENDS as SCANS
from recollect.ops.miras.scan import LACKS as SCANS_LACK
from recollect.ops.miras.scan import PREFERRED as PREFERRED_SCANS

__all__ = ["SlowerFormWarning", "offer", "recorded"]


def offer() -> None:
    """Add every kernel to its op's forms."""
    attention.BACKENDS.update(native=multi_token.native, triton=triton.attend)
    attention.LACKS.update(native=multi_token.lacks, triton=triton.lacks_attention)
    attention.PREFERRED.extend([("native", multi_token.meant), ("triton", triton.meant_attention)])
    attention.DECODERS.extend([("native", multi_token.meant_to_decode), ("triton", triton.meant_attention)])
    SCANS.update(native=miras.native, triton=miras.triton)
    SCANS_LACK.update(native=miras.lacks, triton=miras.lacks_on_gpu)
    PREFERRED_SCANS.extend([("native", miras.meant), ("triton", miras.meant_on_gpu)])
    tiles.RECURRENCES.update(triton=triton.recur, fla=fla.run)
    tiles.LACKS.update(triton=triton.lacks, fla=fla.lacks)
    tiles.PREFERRED.extend([("triton", triton.should_recur), ("fla", fla.meant)])
