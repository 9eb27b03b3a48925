"""Suites of questions for a language model. Importing this package registers all of them."""

from recollect.evaluation.suites.base import SUITES, Item, Metric, Result, Suite, build_suite, register_suite
from recollect.evaluation.suites.choices import Commonsense, Lambada, Local
from recollect.evaluation.suites.perplexity import Perplexity
from recollect.evaluation.suites.questions import BabiLongSuite, ClutrrSuite, NeedlesSuite, Questions, RulerSuite
from recollect.evaluation.suites.symbols import FindBlockSuite, RecallSuite, Symbols

__all__ = [
    "SUITES",
    "BabiLongSuite",
    "ClutrrSuite",
    "Commonsense",
    "FindBlockSuite",
    "Item",
    "Lambada",
    "Local",
    "Metric",
    "NeedlesSuite",
    "Perplexity",
    "Questions",
    "RecallSuite",
    "Result",
    "RulerSuite",
    "Suite",
    "Symbols",
    "build_suite",
    "register_suite",
]
