"""Synthetic tasks, in tokens and in text: data from a seed, an exact solver, a score. Importing this package registers every one."""

from recollect.tasks.babilong import BabiLong
from recollect.tasks.base import IGNORE, TASKS, Batch, Task, build_task, register_task, stream_seed
from recollect.tasks.find_block import FindBlock
from recollect.tasks.kinship import Kinship
from recollect.tasks.needle import Needles, Ruler
from recollect.tasks.recall import Recall
from recollect.tasks.text import TEXT_TASKS, Question, TextTask, register_text_task

__all__ = [
    "IGNORE",
    "TASKS",
    "TEXT_TASKS",
    "BabiLong",
    "Batch",
    "FindBlock",
    "Kinship",
    "Needles",
    "Question",
    "Recall",
    "Ruler",
    "Task",
    "TextTask",
    "build_task",
    "register_task",
    "register_text_task",
    "stream_seed",
]
