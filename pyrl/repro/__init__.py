"""Miniatures of published claims: each states the claim, measures it over seeds, and judges it."""

from pyrl.repro.claim import Arm, Claim, Result, Verdict
from pyrl.repro.registry import MINIATURES, Miniature

__all__ = ["MINIATURES", "Arm", "Claim", "Miniature", "Result", "Verdict"]
