"""What a step learns from: groups of scored completions, what their tokens are worth, minibatches;
terms that a recipe adds to rewards, and when a reference is reset."""

from pyrl.algorithms.advantages import assign_advantages
from pyrl.algorithms.credit import Credit, GroupCredit
from pyrl.algorithms.critic import Critic, CriticCredit
from pyrl.algorithms.experience import Attempt, Group, Minibatch, minibatches
from pyrl.algorithms.pairs import PairCredit
from pyrl.algorithms.reference import ResetRule
from pyrl.algorithms.shaping import RewardTerms

__all__ = [
    "Attempt",
    "Credit",
    "Critic",
    "CriticCredit",
    "Group",
    "GroupCredit",
    "Minibatch",
    "PairCredit",
    "ResetRule",
    "RewardTerms",
    "assign_advantages",
    "minibatches",
]
