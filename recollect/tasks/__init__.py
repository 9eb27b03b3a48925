"""Synthetic tasks: data from a seed, an exact solver, a score. Importing this package registers every task."""

from recollect.tasks.base import IGNORE, TASKS, Batch, Task, build_task, register_task, stream_seed
from recollect.tasks.find_block import FindBlock
from recollect.tasks.recall import Recall

__all__ = ["IGNORE", "TASKS", "Batch", "FindBlock", "Recall", "Task", "build_task", "register_task", "stream_seed"]
