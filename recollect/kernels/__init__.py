"""Faster equals of `recollect.ops`, each naming its oracle and its error bound. Importing this package offers them to the ops."""

import torch

from recollect.kernels import fla, miras, multi_token, triton
from recollect.kernels.compile import attention, compiler
from recollect.ops import tiles
from recollect.ops.miras.scan import ABLE as ABLE_TO_SCAN
from recollect.ops.miras.scan import BACKENDS as SCANS
from recollect.ops.miras.scan import PREFERRED as PREFERRED_SCANS
from recollect.ops.multi_token import ABLE as ABLE_TO_ATTEND
from recollect.ops.multi_token import BACKENDS as ATTENTIONS
from recollect.ops.multi_token import PREFERRED as PREFERRED_ATTENTIONS

ATTENTIONS.update(native=multi_token.native, triton=triton.attend)
ABLE_TO_ATTEND.update(native=multi_token.can_run, triton=triton.can_attend)
PREFERRED_ATTENTIONS.extend([("native", multi_token.can_run), ("triton", triton.should_attend)])
SCANS.update(native=miras.native, triton=miras.triton)
ABLE_TO_SCAN.update(native=miras.can_scan, triton=miras.can_scan_on_gpu)
PREFERRED_SCANS.extend([("native", miras.can_scan), ("triton", miras.should_scan_on_gpu)])
tiles.RECURRENCES.update(triton=triton.recur, fla=fla.run)
tiles.LACKS.update(triton=triton.lacks, fla=fla.lacks)
tiles.PREFERRED.extend([("triton", triton.should_recur), ("fla", fla.should_run)])


def describe() -> str:
    """Which form of Multi-Token Attention and of perceptron memories runs on this machine's CPU, and why, in one line."""
    found = compiler()
    if found is None:
        return "plain PyTorch blocks (no C compiler on the PATH: cc, gcc or clang would make it several times faster)"
    code = attention(torch.float32)
    if code is None:
        return f"plain PyTorch blocks ({found} could not build the kernels)"
    paired = ", bfloat16 inputs multiplied as such" if attention(torch.bfloat16) else ""
    paired += " on matrix tiles" if attention(torch.bfloat16, tiles=True) else ""
    return f"compiled kernels ({found}, {32 * code.lanes()}-bit vectors{paired})"


def describe_gpu() -> str:
    """The same for a GPU, whether or not there is one."""
    if triton.INSTALLED:
        return "Triton kernels, which their authors have not measured on a GPU yet"
    return "plain PyTorch blocks (pip install 'recollect[kernels]' brings Triton kernels)"


def describe_recurrences() -> str:
    """Which form of the linear recurrences and delta rules runs on a GPU, and why."""
    few = "Triton kernels for up to 16 tokens without gradients, " if triton.INSTALLED else ""
    if why := fla.installed():
        return f"{few}plain PyTorch tiles{' for all else' if few else ''} ({why})"
    found = ".".join(str(n) for n in fla.FOUND)
    low = "in bfloat16 or float16 (autocast's too), THE KERNELS OF flash-linear-attention"
    return f"{low} {found}, not measured on a GPU here; {few}plain PyTorch tiles for all else"
