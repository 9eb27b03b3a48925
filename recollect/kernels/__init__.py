"""Faster equals of `recollect.ops`, each naming its oracle and its error bound. Importing this package offers them to the ops."""

from recollect.kernels import miras, multi_token, triton
from recollect.kernels.compile import compiler, products
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
tiles.RECURRENCES["triton"] = triton.recur
tiles.ABLE["triton"] = triton.can_run
tiles.PREFERRED.append(("triton", triton.should_recur))


def describe() -> str:
    """Which form of Multi-Token Attention runs on this machine's CPU, and why, in one line."""
    found = compiler()
    if found is None:
        return "plain PyTorch blocks (no C compiler on the PATH: cc, gcc or clang would make it several times faster)"
    code = products(False)
    if code is None:
        return f"plain PyTorch blocks ({found} could not build the kernels)"
    return f"compiled kernels ({found}, {32 * code.lanes()}-bit vectors)"


def describe_gpu() -> str:
    """The same for a GPU, whether or not there is one."""
    if triton.INSTALLED:
        return "Triton kernels, which their authors have not measured on a GPU yet"
    return "plain PyTorch blocks (pip install 'recollect[kernels]' brings Triton kernels)"
