"""What a machine lacks for compiled kernels, as a sentence."""

from recollect.kernels.compile import compiler


def unbuilt() -> str:
    """Why a kernel that is known could not be built."""
    if compiler() is None:
        return "there is no C compiler on the PATH (install cc, gcc or clang)"
    return "the C compiler could not build it"


unbuilt._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it and does not look inside, see ops/plugins.py
