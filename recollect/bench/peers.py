"""The packages of others that `recollect bench` compares with when they are importable; none is required.

`python -m recollect.bench.peers` prints how to install each.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple


class Peer(NamedTuple):
    """name: of the project; module: what must be importable; beside: the contenders that it is; install: a pip line that leaves torch
    as it is; about: what it needs."""

    name: str
    module: str
    beside: tuple[str, ...]
    install: str
    about: str

    @property
    def here(self) -> bool:
        """Whether it is importable. Nothing is imported."""
        return importlib.util.find_spec(self.module) is not None


_TITANS = (
    "titans-pytorch==0.5.5 assoc-scan einops einx tensordict hyper-connections rotary-embedding-torch axial-positional-embedding "
    "x-transformers torch-einops-utils pyvers cloudpickle frozendict loguru"
)

# --no-deps wherever a package names torch among its needs, so that pip replaces neither torch nor triton.
PEERS = (
    Peer(
        "FlashAttention",
        "flash_attn",
        ("mta/flash_attention",),
        "pip install --no-deps --no-build-isolation flash-attn einops",
        "a CUDA GPU, bfloat16 or float16; built from source unless there is a wheel for this torch",
    ),
    Peer("Liger-Kernel", "liger_kernel", ("mta/liger",), "pip install --no-deps liger-kernel", "a CUDA GPU, triton"),
    Peer(
        "flash-linear-attention",
        "fla",
        ("miras/fla_gla", "miras/fla_delta_net", "miras/fla_gated_delta_net", "miras/fla_ttt_linear"),
        "pip install --no-deps flash-linear-attention fla-core einops",
        "a CUDA GPU, triton",
    ),
    Peer(
        "mamba-ssm",
        "mamba_ssm",
        ("miras/mamba_ssm",),
        "pip install --no-deps --no-build-isolation mamba-ssm causal-conv1d einops",
        "a CUDA GPU and nvcc: it is built from source",
    ),
    Peer(
        "titans-pytorch",
        "titans_pytorch",
        ("miras/titans_pytorch",),
        f"pip install --no-deps {_TITANS}",
        "runs on a CPU too; with --target FOLDER it stays out of this environment (then PYTHONPATH=FOLDER)",
    ),
    Peer(
        "FlexAttention",
        "triton",
        ("mta/flex_attention",),
        "pip install --no-deps triton",
        "a CUDA GPU; torch for CUDA brings it along",
    ),
)


def install(module: str) -> str:
    """The pip line of the peer that a module belongs to.

    Raises:
        KeyError: no peer has it.
    """
    return {peer.module: peer.install for peer in PEERS}[module]


def main() -> None:
    """Print every peer: what it is beside, whether it is importable here, the pip line that leaves torch as it is."""
    for peer in PEERS:
        print(f"{peer.name}: {'importable here' if peer.here else 'not here'}")
        print(f"  beside   {', '.join(peer.beside)}")
        print(f"  needs    {peer.about}")
        print(f"  install  {peer.install}\n")
    print("scaled_dot_product_attention comes with torch and is always there (mta/sdpa).")


if __name__ == "__main__":
    main()
