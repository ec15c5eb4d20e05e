"""recollect: an episodic memory for PyTorch networks."""

from recollect import continual, language, meta
from recollect.adaptation import LocalAdaptation, rules
from recollect.heads import grow
from recollect.kernels import dot_product, gaussian, inverse_distance
from recollect.likelihoods import Categorical, Gaussian
from recollect.mbpa import Explanation, MbPA
from recollect.memory import ApproximateIndex, Context, DurableMemory, EpisodicMemory, ExactIndex, NeuralDictionary
from recollect.persistence import load, save
from recollect.predictors import Mixture, NonParametric, Parametric, neural_cache

__version__ = "0.1.0"

__all__ = [
    "ApproximateIndex",
    "Categorical",
    "Context",
    "DurableMemory",
    "EpisodicMemory",
    "ExactIndex",
    "Explanation",
    "Gaussian",
    "LocalAdaptation",
    "MbPA",
    "Mixture",
    "NeuralDictionary",
    "NonParametric",
    "Parametric",
    "continual",
    "dot_product",
    "gaussian",
    "grow",
    "inverse_distance",
    "language",
    "load",
    "meta",
    "neural_cache",
    "rules",
    "save",
]
