"""Samples of any length to flat `[T]` rows: no pad token is ever computed."""

from pyrl.packing.batch import PackedBatch
from pyrl.packing.pack import Sample, pack
from pyrl.packing.planner import best_fit

__all__ = ["PackedBatch", "Sample", "best_fit", "pack"]
