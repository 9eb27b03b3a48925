"""Faster equals of `recollect.ops`, each naming its oracle and its error bound. Importing this package offers them to the ops."""

from recollect.kernels import multi_token
from recollect.kernels.compile import compiler, products
from recollect.ops.multi_token import BACKENDS, PREFERRED

BACKENDS["native"] = multi_token.native
PREFERRED.append(("native", multi_token.can_run))


def describe() -> str:
    """Which form of Multi-Token Attention runs on this machine's CPU, and why, in one line."""
    found = compiler()
    if found is None:
        return "plain PyTorch blocks (no C compiler on the PATH: cc, gcc or clang would make it several times faster)"
    code = products(False)
    if code is None:
        return f"plain PyTorch blocks ({found} could not build the kernels)"
    return f"compiled kernels ({found}, {32 * code.lanes()}-bit vectors)"
