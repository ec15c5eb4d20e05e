"""How good a classifier's probabilities are: accuracy, likelihood, calibration."""

import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recollect.predictors import Predictor


class Measured(NamedTuple):
    """What predictions of some images are worth."""

    top1: float
    """The percentage whose most probable class is the right one."""
    nll: float
    """The mean negative log-likelihood in nats; a probability below 1e-6 counts as 1e-6."""
    ece: float
    """The expected calibration error, in percent."""


def predict(predictor: Predictor, keys: Float[Tensor, "n d"], *, rows: int = 1000) -> Float[Tensor, "n c"]:
    """Returns the log-probabilities for all keys, some at a time."""
    return torch.cat([predictor(part) for part in keys.split(rows)])


def measure(log_probs: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Measured:
    """Returns what predictions are worth."""
    right = log_probs.argmax(1) == labels
    chosen = log_probs.gather(1, labels.unsqueeze(1)).double().clamp(min=-13.8155)
    error = calibration_error(log_probs.exp().amax(1), right)
    return Measured(100 * float(right.double().mean()), float(-chosen.mean()), 100 * error)


def calibration_error(confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], *, bins: int = 15) -> float:
    """Returns the expected calibration error, from 0 to 1.

    Predictions are sorted into bins of equal width by their confidence; the error is the mean distance between a bin's
    accuracy and its mean confidence, weighted by how many predictions it has.

    Source: Guo et al. (2017), "On calibration of modern neural networks", Eq. (3), 15 bins.

    Args:
        confidence: The probability of the predicted class.
        right: Whether it is the right one.
        bins: How many bins.
    """
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].index_add_(0, place, confidence.double())
    sums[1].index_add_(0, place, right.double())
    return float((sums[1] - sums[0]).abs().sum() / len(right))


def milliseconds(predictors: dict[str, Predictor], keys: Float[Tensor, "n d"], *, rounds: int = 5) -> dict[str, float]:
    """Returns the median time of one query of each predictor, measured in turns, in batches of all keys."""
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(rounds + 1):  # the first round warms up
        for name, predictor in predictors.items():
            start = time.perf_counter()
            predictor(keys)
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * sorted(found[1:])[rounds // 2] / len(keys) for name, found in times.items()}
