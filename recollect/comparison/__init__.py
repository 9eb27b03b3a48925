"""Training mixers side by side under one budget: what `recollect compare` does, as a function.

from recollect.comparison import Request, compare
outcome = compare(Request(task="find-block", mixers=["attention", "mta"], budget="200steps"), out="demo")
"""

from recollect.comparison.plan import Plan, Request
from recollect.comparison.run import Outcome, compare

__all__ = ["Outcome", "Plan", "Request", "compare"]
