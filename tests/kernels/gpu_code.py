"""Compiling Triton kernels for a GPU that this machine need not have."""

from __future__ import annotations

import os
import subprocess
import sys

PRELUDE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, pointers, options=None, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=target, options=options).asm["ptx"]
"""


def assert_compiles(code: str, capability: int) -> None:
    """Run code in a process without the interpreter.

    Args:
        code: Python that calls `compiled(kernel, {name: type of a pointer}, **constants)`, which gives PTX; other arguments are int32.
            `options` are the compiler's, such as {"num_stages": 1}.
        capability: of the NVIDIA GPU, such as 90.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PRELUDE + code, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
