"""Pure functions on tensors: any dtype, any device, fp64-capable on CPU. Each has an oracle and a fast exact form."""

from recollect.ops.attention import differential_attention, rotary, softmax_attention
from recollect.ops.multi_token import Mixing, Rows, multi_token_attention, multi_token_rows

__all__ = [
    "Mixing",
    "Rows",
    "differential_attention",
    "multi_token_attention",
    "multi_token_rows",
    "rotary",
    "softmax_attention",
]
