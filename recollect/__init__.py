"""recollect: sequence models that attend to many tokens at once and that memorise at test time.

    import recollect
    mixer = recollect.build("mta", dim=256, n_heads=4)      # any of recollect.available()
    y, state = mixer(x)                                      # x [B, T, D]; the state is a value
    y_next, state = mixer(x_next, state)                     # decoding is the same call

Importing this needs torch only; models, tasks and the command line are imported when they are used.
"""

from recollect import kernels as _kernels  # noqa: F401 (offers the compiled kernels to the ops)
from recollect import mixers, ops, state
from recollect.mixers import Mixer, available, build

__version__ = "0.1.0"
__all__ = ["Mixer", "__version__", "available", "build", "mixers", "ops", "state"]
