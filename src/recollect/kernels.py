"""Kernels: how much a retrieved memory counts for a query.

A kernel returns *unnormalized log-weights*; the memory normalizes them to sum to one over the neighbors. The
logarithm keeps a Gaussian of far-away neighbors from underflowing to 0/0.

Paper: Section 2, ``kern(h, q) = 1 / (epsilon + ||h - q||^2)``.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from recollect.errors import require_number


@runtime_checkable
class Kernel(Protocol):
    """Anything with this method is a kernel; the three below are the ones the literature uses."""

    def log_weights(
        self, queries: Float[Tensor, "b d"], keys: Float[Tensor, "*b k d"], distances: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b k"]:
        """Returns unnormalized log-weights.

        Args:
            queries: The queries, ``(b, d)``.
            keys: The retrieved keys, ``(b, k, d)``, or ``(k, d)`` when all queries read the same entries.
            distances: Squared Euclidean distances, ``(b, k)``.
        """
        ...


@dataclass(frozen=True)
class inverse_distance:  # reads as a function where it is used
    """Weight ``1 / (epsilon + ||h - q||^2)``, the kernel of MbPA and of Neural Episodic Control.

    Paper: Section 2 (after Pritzel et al., 2017). ``epsilon = 1e-3`` is the value of Neural Episodic Control; the
    MbPA paper states none.

    Args:
        epsilon: Keeps an exact match from taking an infinite weight; in units of squared distance.

    Raises:
        SettingError: If ``epsilon`` is not a finite number above 0.

    Example:
        >>> import torch
        >>> inverse_distance(epsilon=1.0).log_weights(None, None, torch.tensor([[0.0, 3.0]])).exp()
        tensor([[1.0000, 0.2500]])
    """

    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, above=0.0)

    def log_weights(
        self,
        queries: Float[Tensor, "b d"] | None,
        keys: Float[Tensor, "*b k d"] | None,
        distances: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b k"]:
        return -(distances + self.epsilon).log()


@dataclass(frozen=True)
class gaussian:
    """Weight ``exp(-||h - q||^2 / (2 bandwidth^2))``.

    Args:
        bandwidth: The standard deviation, in units of distance (not squared).

    Raises:
        SettingError: If ``bandwidth`` is not a finite number above 0.

    Example:
        >>> import torch
        >>> gaussian(bandwidth=1.0).log_weights(None, None, torch.tensor([[0.0, 2.0]]))
        tensor([[-0., -1.]])
    """

    bandwidth: float

    def __post_init__(self) -> None:
        require_number("bandwidth", self.bandwidth, above=0.0)

    def log_weights(
        self,
        queries: Float[Tensor, "b d"] | None,
        keys: Float[Tensor, "*b k d"] | None,
        distances: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b k"]:
        return distances / (-2.0 * self.bandwidth**2)


@dataclass(frozen=True)
class dot_product:
    """Weight ``exp(flatness * q.h)``, the kernel of attention and of the neural cache (Grave et al., 2016).

    It changes the weights only: which neighbors are retrieved is always a matter of Euclidean distance.

    Args:
        flatness: The inverse temperature (theta in Grave et al.); 0 weighs all neighbors alike.

    Raises:
        SettingError: If ``flatness`` is not a finite number.

    Example:
        >>> import torch
        >>> dot_product(flatness=0.5).log_weights(torch.ones(1, 2), torch.ones(1, 3, 2), torch.zeros(1, 3))
        tensor([[1., 1., 1.]])
    """

    flatness: float = 1.0

    def __post_init__(self) -> None:
        require_number("flatness", self.flatness)

    def log_weights(
        self, queries: Float[Tensor, "b d"], keys: Float[Tensor, "*b k d"], distances: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b k"]:
        shared = keys.dim() == 2
        products = queries @ keys.mT if shared else (keys @ queries.unsqueeze(-1)).squeeze(-1)
        return self.flatness * products
