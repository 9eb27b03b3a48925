"""Faster equals of `recollect.ops`, each naming its oracle and its error bound. Importing this package offers them to the ops."""

import torch

from recollect.kernels import dispatch, fla, triton
from recollect.kernels.compile import attention, compiler

dispatch.offer()


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
