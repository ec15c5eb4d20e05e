"""What learns new classes from a few images, and what is tried for each."""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from recollect import Parametric, grow
from recollect.data import Dataset
from recollect.experiments.incremental.models import Adapted, Vote
from recollect.likelihoods import Categorical, Likelihood
from recollect.predictors import Before, Predictor


@dataclass(frozen=True)
class Retrained:
    """The last layer, trained on all that the memory holds by Adam."""

    rate: float
    epochs: int

    def predictor(self, head: nn.Linear, held: Dataset) -> Predictor:
        """Returns a copy of the head after training."""
        copy = grow(head, head.out_features)
        optimizer = torch.optim.Adam(copy.parameters(), lr=self.rate)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.epochs):
            for batch in held.batches(128, generator=generator):
                optimizer.zero_grad()
                cross_entropy(copy(batch.inputs), batch.labels).backward()
                optimizer.step()
        return Parametric(copy)


@dataclass(frozen=True)
class NearestMean:
    """The class whose mean key is nearest, by distance or by angle."""

    angle: bool

    def predictor(self, head: nn.Linear, held: Dataset) -> Predictor:
        """Returns the rule with the means of what the memory holds."""
        keys = normalize(held.inputs) if self.angle else held.inputs
        sums = keys.new_zeros(head.out_features, keys.shape[1]).index_add_(0, held.labels, keys)
        counts = held.labels.bincount(minlength=head.out_features).unsqueeze(1)
        return _Means(sums / counts, angle=self.angle)


class _Means(nn.Module):
    """Predicts by the squared distance to the means of the classes that have one."""

    def __init__(self, means: Float[Tensor, "c d"], *, angle: bool) -> None:
        super().__init__()
        self.likelihood: Likelihood = Categorical()
        self._means = normalize(means) if angle else means
        self._angle = angle

    def forward(self, keys: Float[Tensor, "b d"], *, before: Before = None) -> Float[Tensor, "b c"]:
        """Returns log-probabilities; those of classes without a mean are -inf."""
        distances = torch.cdist(normalize(keys) if self._angle else keys, self._means).square()
        return (-distances).nan_to_num(nan=-torch.inf).log_softmax(1)


Learner = Adapted | Vote | Retrained | NearestMean


@dataclass(frozen=True)
class Shots:
    """How many images, and what is tried for each learner."""

    images: tuple[int, ...]
    """Of each new class."""
    kept: int
    """Images of each old class in the memory."""
    grids: dict[str, tuple[Learner, ...]]


def shots(
    images: tuple[int, ...],
    mbpa: tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]],
    retrained: tuple[tuple[float, ...], tuple[int, ...]],
    votes: tuple[tuple[int, ...], tuple[float | None, ...]],
) -> Shots:
    """Returns all combinations of the given numbers: neighbors, rates, steps; rates, epochs; neighbors, bandwidths."""
    grids: dict[str, tuple[Learner, ...]] = {
        "mbpa-sgd": tuple(Adapted("sgd", *point) for point in itertools.product(*mbpa)),
        "fine-tuning": tuple(Retrained(*point) for point in itertools.product(*retrained)),
        "nearest-mean": (NearestMean(angle=False), NearestMean(angle=True)),
        "vote": tuple(Vote(*point) for point in itertools.product(*votes)),
    }
    return Shots(images, 20, grids)
