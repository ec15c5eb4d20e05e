"""Companions for learning task after task: penalties, projections, replay, and the loop that uses them.

penalties, distillation    a term of the loss: EWC, MAS, SI; LwF
anchors                    what EWC, MAS and SI hold a network to
importance                 how firmly: gradients example by example
  recording, layerwise, unrolled     ... without a backward pass for each
projections                a corrected gradient: GEM, A-GEM
replay, balance            which examples a memory keeps
learner, stream            the loop, and what it is judged by
examples, outputs, modes   what they share
"""

from recollect.continual.distillation import LwF
from recollect.continual.learner import Learner
from recollect.continual.path import SI
from recollect.continual.penalties import EWC, MAS
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
