"""Learned memories: knowledge that is kept in a memory, a start, an update rule, or in weights that make weights."""

from recollect.meta.access import LRUAccess, NTMAccess
from recollect.meta.labels import Labels, by_instance, instances, offset
from recollect.meta.maml import MAML, MetaSGD
from recollect.meta.mann import MANN, LSTMBaseline

__all__ = [
    "MAML",
    "MANN",
    "LRUAccess",
    "LSTMBaseline",
    "Labels",
    "MetaSGD",
    "NTMAccess",
    "by_instance",
    "instances",
    "offset",
]
