"""Learned memories: what tasks share is kept in a memory, a start, an update rule, or weights that make weights.

MANN keeps it in an external memory and how to use it, MAML in a start for the parameters, the Meta-LSTM and the learned
optimizers in a rule (each of which also drives ``LocalAdaptation``), hypernetworks in weights that make weights.
"""

from recollect.meta.access import LRUAccess, NTMAccess
from recollect.meta.context_hypernetwork import ContextHypernetwork
from recollect.meta.guided import GuidedPolicySearch
from recollect.meta.hyper_lstm import HyperLSTM, HyperLSTMCell
from recollect.meta.hypernetwork import Hypernetwork
from recollect.meta.labels import Labels, by_instance, instances, offset
from recollect.meta.learned_optimizer import LSTMOptimizer
from recollect.meta.maml import MAML, MetaSGD
from recollect.meta.mann import MANN, LSTMBaseline
from recollect.meta.meta_lstm import MetaLSTM
from recollect.meta.objectives import (
    Problem,
    logistic_regression,
    margin_of_victory,
    quadratics,
    relu_network,
    robust_regression,
)
from recollect.meta.policy import Policy
from recollect.meta.rule_optimizer import RuleOptimizer
from recollect.meta.training import Backpropagation, EvolutionStrategy, train, unrolled

__all__ = [
    "MAML",
    "MANN",
    "Backpropagation",
    "ContextHypernetwork",
    "EvolutionStrategy",
    "GuidedPolicySearch",
    "HyperLSTM",
    "HyperLSTMCell",
    "Hypernetwork",
    "LRUAccess",
    "LSTMBaseline",
    "LSTMOptimizer",
    "Labels",
    "MetaLSTM",
    "MetaSGD",
    "NTMAccess",
    "Policy",
    "Problem",
    "RuleOptimizer",
    "by_instance",
    "instances",
    "logistic_regression",
    "margin_of_victory",
    "offset",
    "quadratics",
    "relu_network",
    "robust_regression",
    "train",
    "unrolled",
]
