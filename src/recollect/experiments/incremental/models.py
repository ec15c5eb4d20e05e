"""The models of Section 4.2, each made of the same head and the same memory, and what is tried for each."""

from dataclasses import dataclass

import torch
from torch import nn

from recollect import (
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    Mixture,
    NonParametric,
    Parametric,
    gaussian,
    inverse_distance,
    rules,
)
from recollect.kernels import Kernel
from recollect.predictors import Predictor


@dataclass(frozen=True)
class FineTuning:
    """How the last layer learns: ``sgd`` with a momentum of 0.9, or ``adam``."""

    optimizer: str
    rate: float

    def optimize(self, head: nn.Linear) -> torch.optim.Optimizer:
        """Returns an optimizer of all the head's parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(head.parameters(), lr=self.rate, momentum=0.9)
        return torch.optim.Adam(head.parameters(), lr=self.rate)

    def predictor(self, head: nn.Linear, memory: EpisodicMemory) -> Predictor:
        """Returns the parametric model: the head alone."""
        return Parametric(head)


@dataclass(frozen=True)
class Vote:
    """The non-parametric model."""

    neighbors: int
    bandwidth: float | None
    """Of a Gaussian kernel; None: the paper's inverse distance."""

    def predictor(self, head: nn.Linear, memory: EpisodicMemory) -> Predictor:
        """Returns the vote among the memory's neighbors."""
        kernel = _kernel(self.bandwidth)
        return NonParametric(memory, classes=head.out_features, neighbors=self.neighbors, kernel=kernel)


@dataclass(frozen=True)
class Mixed:
    """The mixture of the parametric and the non-parametric model."""

    neighbors: int
    bandwidth: float | None
    parametric: float
    """The parametric model's weight."""

    def predictor(self, head: nn.Linear, memory: EpisodicMemory) -> Predictor:
        """Returns the mixture."""
        vote = NonParametric(
            memory, classes=head.out_features, neighbors=self.neighbors, kernel=_kernel(self.bandwidth)
        )
        return Mixture(Parametric(head), vote, weights=(self.parametric, 1 - self.parametric))


@dataclass(frozen=True)
class Adapted:
    """MbPA."""

    rule: str
    neighbors: int
    rate: float
    steps: int
    bandwidth: float | None = None

    def predictor(self, head: nn.Linear, memory: EpisodicMemory) -> MbPA:
        """Returns MbPA around the head."""
        rule = rules.rmsprop(self.rate) if self.rule == "rmsprop" else rules.sgd(self.rate)
        adaptation = LocalAdaptation(rule, steps=self.steps)
        kernel = _kernel(self.bandwidth)
        return MbPA(head, memory, neighbors=self.neighbors, adaptation=adaptation, kernel=kernel)


Setting = FineTuning | Vote | Mixed | Adapted


def _kernel(bandwidth: float | None) -> Kernel:
    return inverse_distance(epsilon=1e-3) if bandwidth is None else gaussian(bandwidth)
