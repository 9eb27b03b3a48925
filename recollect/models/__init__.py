"""One causal language model for every mixer. Importing it registers the model with Hugging Face's Auto classes."""

from recollect.models.cache import RecollectCache
from recollect.models.configuration import RecollectConfig
from recollect.models.inner_steps import set_inner_steps
from recollect.models.memory import load_memory, remember, save_memory
from recollect.models.modeling import RecollectForCausalLM, RecollectModel
from recollect.models.retrofitting import load_retrofitted, new_parameters, retrofit
from recollect.models.sizes import SIZES, n_parameters, size

__all__ = [
    "SIZES",
    "RecollectCache",
    "RecollectConfig",
    "RecollectForCausalLM",
    "RecollectModel",
    "load_memory",
    "load_retrofitted",
    "n_parameters",
    "new_parameters",
    "remember",
    "retrofit",
    "save_memory",
    "set_inner_steps",
    "size",
]
