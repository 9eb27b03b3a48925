"""Faster equals of `recollect.ops`, each naming its oracle and its error bound. Importing this package offers them to the ops."""

from recollect.kernels import miras, multi_token, triton
from recollect.kernels.compile import compiler, products
from recollect.ops.miras.scan import BACKENDS as SCANS
from recollect.ops.miras.scan import PREFERRED as PREFERRED_SCANS
from recollect.ops.multi_token import ABLE
from recollect.ops.multi_token import BACKENDS as ATTENTIONS
from recollect.ops.multi_token import PREFERRED as PREFERRED_ATTENTIONS

ATTENTIONS["native"] = multi_token.native
ABLE["native"] = multi_token.can_run
PREFERRED_ATTENTIONS.append(("native", multi_token.can_run))
ATTENTIONS["triton"] = triton.attend
ABLE["triton"] = triton.can_attend
PREFERRED_ATTENTIONS.append(("triton", triton.should_attend))
SCANS["native"] = miras.native
PREFERRED_SCANS.append(("native", miras.can_scan))


def describe() -> str:
    """Which form of Multi-Token Attention runs on this machine's CPU, and why, in one line."""
    found = compiler()
    if found is None:
        return "plain PyTorch blocks (no C compiler on the PATH: cc, gcc or clang would make it several times faster)"
    code = products(False)
    if code is None:
        return f"plain PyTorch blocks ({found} could not build the kernels)"
    return f"compiled kernels ({found}, {32 * code.lanes()}-bit vectors)"
