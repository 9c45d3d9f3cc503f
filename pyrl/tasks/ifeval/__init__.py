"""Verifiable instructions in the manner of IFEval: drawn, worded and checked by code."""

from pyrl.tasks.ifeval.kinds import CLASHES, KINDS
from pyrl.tasks.ifeval.task import IFEval

__all__ = ["CLASHES", "KINDS", "IFEval"]
