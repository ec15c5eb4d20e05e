"""Companions for learning task after task: penalties, projections, replay, and the loop that uses them."""

from recollect.continual.distillation import LwF
from recollect.continual.learner import Learner
from recollect.continual.penalties import EWC, MAS, SI
from recollect.continual.projections import AGEM, GEM
from recollect.continual.replay import ClassBalanced, Reservoir, Ring
from recollect.continual.stream import Accuracies, accuracy, run

__all__ = [
    "AGEM",
    "EWC",
    "GEM",
    "MAS",
    "SI",
    "Accuracies",
    "ClassBalanced",
    "Learner",
    "LwF",
    "Reservoir",
    "Ring",
    "accuracy",
    "run",
]
