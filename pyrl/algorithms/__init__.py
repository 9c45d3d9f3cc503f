"""What a step samples and what it learns from: budgets, groups of scored completions, reward terms,
what tokens are worth, minibatches, and when a reference is reset."""

from pyrl.algorithms.advantages import assign_advantages
from pyrl.algorithms.allocate import allocate_budget
from pyrl.algorithms.budget import GVM, Budget, PilotResult, Uniform
from pyrl.algorithms.credit import Credit, GroupCredit
from pyrl.algorithms.critic import Critic, CriticCredit
from pyrl.algorithms.draws import Draw, Place, accepted_weights
from pyrl.algorithms.experience import Attempt, Group, Minibatch, minibatches
from pyrl.algorithms.online import Online
from pyrl.algorithms.pairs import PairCredit
from pyrl.algorithms.reference import ResetRule
from pyrl.algorithms.shaping import RewardTerms

__all__ = [
    "GVM",
    "Attempt",
    "Budget",
    "Credit",
    "Critic",
    "CriticCredit",
    "Draw",
    "Group",
    "GroupCredit",
    "Minibatch",
    "Online",
    "PairCredit",
    "PilotResult",
    "Place",
    "ResetRule",
    "RewardTerms",
    "Uniform",
    "accepted_weights",
    "allocate_budget",
    "assign_advantages",
    "minibatches",
]
