"""Our Triton kernels for memories in the suite "miras": forms of our presets by name, where `memories` has the plain ones.

Axis legend: B batch, T time, H heads, K key and value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from recollect.bench.contenders import UNMEASURED, Contender, Step, only_cuda, register
from recollect.bench.setting import Setting
from recollect.bench.suites import memories, memory_peers
from recollect.bench.suites.memories import PERCEPTRONS, PRESETS
from recollect.kernels.triton import INSTALLED
from recollect.ops.delta_scan import delta_rule_scan
from recollect.ops.linear_scan import gated_linear_scan


def linear(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor | None = None) -> Tensor:
    """Linear attention token by token, with or without a decay."""
    return gated_linear_scan(q, k, v, log_alpha, backend="triton")[0]


def mamba2(q: Tensor, k: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """Step size and decay of one gate, with A = -1."""
    return gated_linear_scan(q, k * dt[..., None], v, -dt, backend="triton")[0]


def delta(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, log_alpha: Tensor | None = None) -> Tensor:
    """The delta rule token by token, with or without forgetting."""
    return delta_rule_scan(q, k, v, eta, log_alpha, backend="triton")[0]


RECURRENCES: dict[str, Callable[..., Tensor]] = {
    "delta_net": delta,
    "gated_delta_net": delta,
    "linear_attention": linear,
    "gla": linear,
    "mamba2": mamba2,
}


def lacks(setting: Setting) -> str:
    """Interpreted Triton is no contender."""
    return only_cuda(setting) or ("" if INSTALLED else "triton is not installed; pip install 'recollect[kernels]'")


def lacks_size(setting: Setting) -> str:
    """The perceptrons' kernels take some head dims."""
    fits = setting.head_dim % 16 == 0 and setting.head_dim <= 128
    return lacks(setting) or ("" if fits else "takes heads of 16, 32, ..., 128 channels only")


def note(setting: Setting, *, name: str) -> str:
    """What it is the form of, its chunk size, and what nobody has measured, wherever this runs."""
    size = PRESETS[name].at(setting).chunk
    default = f"the default form of {name} on a GPU" if name in PERCEPTRONS else f"the function of {name}"
    return "; ".join(filter(None, [default, f"chunks of {size}" * (size > 1), UNMEASURED]))


def contender(name: str, about: str, make: Callable[..., Step]) -> Contender:
    """The Triton form of a preset."""
    preset = PRESETS[name]
    return Contender(
        name=f"{name}_triton",
        suite="miras",
        about=f"{preset.about}; {about}",
        prepare=make,
        check=partial(memories.check, make=make, preset=preset),
        work=partial(memories.work, preset=preset),
        lacks=lacks_size if name in PERCEPTRONS else lacks,
        note=partial(note, name=name),
    )


register(
    *(
        contender(name, "Triton kernels", partial(memories.prepare, preset=PRESETS[name], backend="triton"))
        for name in PERCEPTRONS
    ),
    *(
        contender(
            name,
            "Triton kernel, token by token",
            partial(memory_peers.prepare, run=run, leaves=PRESETS[name].leaves),
        )
        for name, run in RECURRENCES.items()
    ),
)
