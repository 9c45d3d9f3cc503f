"""What a step learns from: groups of scored completions, their advantages, their minibatches; and
how many completions each prompt gets.
"""

from pyrl.algorithms.advantages import assign_advantages
from pyrl.algorithms.allocate import allocate_budget
from pyrl.algorithms.budget import GVM, Budget, PilotResult, Uniform
from pyrl.algorithms.draws import Draw, Place, accepted_weights
from pyrl.algorithms.experience import Attempt, Group, Minibatch, minibatches
from pyrl.algorithms.online import Online

__all__ = [
    "GVM",
    "Attempt",
    "Budget",
    "Draw",
    "Group",
    "Minibatch",
    "Online",
    "PilotResult",
    "Place",
    "Uniform",
    "accepted_weights",
    "allocate_budget",
    "assign_advantages",
    "minibatches",
]
