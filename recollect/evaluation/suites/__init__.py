"""Suites of questions for a language model. Importing this package registers all of them."""

from recollect.evaluation.suites.base import SUITES, Item, Metric, Result, Suite, build_suite, register_suite
from recollect.evaluation.suites.choices import Commonsense, Lambada
from recollect.evaluation.suites.perplexity import Perplexity
from recollect.evaluation.suites.questions import BabiLongSuite, ClutrrSuite, NeedlesSuite, Questions, RulerSuite

__all__ = [
    "SUITES",
    "BabiLongSuite",
    "ClutrrSuite",
    "Commonsense",
    "Item",
    "Lambada",
    "Metric",
    "NeedlesSuite",
    "Perplexity",
    "Questions",
    "Result",
    "RulerSuite",
    "Suite",
    "build_suite",
    "register_suite",
]
