"""Pictures of what a model does with a text: attention maps stage by stage, kernels, memories token by token."""

from recollect.inspection.page import html
from recollect.inspection.view import Inspection, inspect_text

__all__ = ["Inspection", "html", "inspect_text"]
