"""What a step learns from: groups of scored completions, their advantages, their minibatches."""

from pyrl.algorithms.advantages import assign_advantages
from pyrl.algorithms.experience import Attempt, Group, Minibatch, minibatches

__all__ = ["Attempt", "Group", "Minibatch", "assign_advantages", "minibatches"]
