"""Every sequence mixer is an associative memory: memory structure x attentional bias x retention x learning rule.

    spec = MirasSpec(memory=mlp(), bias=lp(3), retention=lq(4), rule=gd(), chunk_size=16)
    y, state = scan(spec, q, k, v, {"eta": eta, "alpha": alpha}, parameters=spec.memory.init(n_heads, key_dim, value_dim))

Source: Behrouz et al. 2025, arXiv 2504.13173.
"""

from recollect.ops.miras.biases import BIASES, AttentionalBias
from recollect.ops.miras.memories import MEMORIES, Memory, Parameters
from recollect.ops.miras.retentions import RETENTIONS, Divergence, Frame, Retention
from recollect.ops.miras.rules import RULES, LearningRule
from recollect.ops.miras.scan import BACKENDS, initial_state, scan
from recollect.ops.miras.spec import MirasSpec, MirasState

__all__ = [
    "BACKENDS",
    "BIASES",
    "MEMORIES",
    "RETENTIONS",
    "RULES",
    "AttentionalBias",
    "Divergence",
    "Frame",
    "LearningRule",
    "Memory",
    "MirasSpec",
    "MirasState",
    "Parameters",
    "Retention",
    "initial_state",
    "scan",
]
