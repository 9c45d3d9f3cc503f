"""Samples of any length to flat rows: no pad token is computed, shared prefixes only once."""

from pyrl.packing.batch import PackedBatch
from pyrl.packing.pack import Sample, pack
from pyrl.packing.planner import best_fit
from pyrl.packing.prefix_tree import TreeLayout, plan_tree

__all__ = ["PackedBatch", "Sample", "TreeLayout", "best_fit", "pack", "plan_tree"]
