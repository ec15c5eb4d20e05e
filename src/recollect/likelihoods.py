"""Likelihoods: what a head's output says about a value, ``p(v | g(h))``.

A likelihood knows three things: ``log p(v | output)``, its gradient at the output in closed form (what makes the
factored adaptation possible), and the constant that fits a weighted neighborhood best (attention, Appendix E).
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from recollect.errors import DtypeError, EmptyMemoryError, LabelError, SettingError, ShapeError, require_number


@runtime_checkable
class Likelihood(Protocol):
    """The three things above, and the checks that turn a wrong value into a clear error."""

    def log_prob(self, outputs: Tensor, values: Tensor) -> Tensor: ...

    def gradient(self, outputs: Tensor, values: Tensor) -> Tensor: ...

    def predict(self, outputs: Tensor) -> Tensor: ...

    def fit_constant(self, values: Tensor, weights: Tensor, size: int | None) -> Tensor: ...

    def check_values(self, values: Tensor, size: int) -> None: ...


@dataclass(frozen=True)
class Categorical:
    """Labels under a softmax. A prediction is a vector of log-probabilities.

    Paper: Section 2 ("the last layer of g is a softmax layer").

    Example:
        >>> import torch
        >>> Categorical().gradient(torch.zeros(1, 2), torch.tensor([1]))
        tensor([[-0.5000,  0.5000]])
    """

    def log_prob(self, outputs: Float[Tensor, "*b c"], values: Integer[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns ``log softmax(outputs)[values]``."""
        return outputs.log_softmax(-1).gather(-1, values.long().unsqueeze(-1)).squeeze(-1)

    def gradient(self, outputs: Float[Tensor, "*b c"], values: Integer[Tensor, "*b"]) -> Float[Tensor, "*b c"]:
        """Returns the gradient of ``log_prob`` at the outputs: ``onehot(values) - softmax(outputs)``."""
        chances = outputs.softmax(-1)
        residual = -chances if chances.requires_grad else chances.neg_()  # in place is four times faster
        one = torch.ones((), dtype=residual.dtype, device=residual.device).expand(*values.shape, 1)
        return residual.scatter_add_(-1, values.long().unsqueeze(-1), one)

    def predict(self, outputs: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Returns log-probabilities; in float32 for float16 and bfloat16, in which they would not sum to one."""
        return outputs.log_softmax(-1, dtype=torch.float32 if outputs.element_size() < 4 else None)

    def fit_constant(
        self, values: Integer[Tensor, "b k"], weights: Float[Tensor, "b k"], size: int | None
    ) -> Float[Tensor, "b c"]:
        """Returns the log-probabilities that fit the neighborhood best: the weighted vote.

        Paper: Eq. (9) and (10). A query without neighbors gets the uniform distribution. A class that no neighbor
        has gets ``-inf``.

        Raises:
            SettingError: If ``size``, the number of classes, is not given.
        """
        if size is None:
            raise SettingError("A vote over labels needs to know how many there are: pass classes=.")
        votes = weights.new_zeros(*weights.shape[:-1], size).scatter_add_(-1, values.long(), weights)
        empty = weights.sum(-1, keepdim=True) == 0
        votes.masked_fill_(empty, 1.0 / size)
        none = votes == 0  # of these a logarithm takes ten times as long
        return votes.masked_fill_(none, 1.0).log_().masked_fill_(none, -math.inf)

    def check_values(self, values: Tensor, size: int) -> None:
        """Refuses values ``(b, k)`` that are no labels of ``size`` classes.

        Raises:
            DtypeError: If the values are not whole numbers.
            ShapeError: If a value is not a single number.
            LabelError: If a label is negative or not below ``size``.
        """
        if values.is_floating_point() or values.is_complex():
            raise DtypeError(
                f"Categorical needs labels that are whole numbers, but the memory's values are {values.dtype}. "
                "Use EpisodicMemory(..., value_dtype=torch.long), or likelihood=Gaussian() for regression."
            )
        if values.dim() != 2:
            raise ShapeError(
                f"a label is one number, but the memory's values have shape {tuple(values.shape[2:])}. "
                "Use EpisodicMemory(..., value_shape=())."
            )
        if values.numel() and not (0 <= int(values.min()) and int(values.max()) < size):
            raise LabelError(
                f"the memory holds labels from {int(values.min())} to {int(values.max())}, but there are {size} "
                f"classes (0 to {size - 1}). Give the head one output per label, or forget those entries."
            )


@dataclass(frozen=True)
class Gaussian:
    """Real-valued targets with independent normal noise. A prediction is the mean.

    Paper: Appendix E ("simply by changing the loss function to be Mean Squared Error").

    Args:
        variance: The noise variance; the gradient of the log-likelihood is ``(value - output) / variance``.

    Raises:
        SettingError: If ``variance`` is not a finite number above 0.

    Example:
        >>> import torch
        >>> Gaussian().gradient(torch.zeros(1, 1), torch.tensor([[2.0]]))
        tensor([[2.]])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        require_number("variance", self.variance, above=0.0)

    def log_prob(self, outputs: Float[Tensor, "*b c"], values: Float[Tensor, "*b c"]) -> Float[Tensor, "*b"]:
        """Returns the log-density, summed over the outputs."""
        size = outputs.shape[-1]
        squares = (values - outputs).square().sum(-1)
        return -0.5 * (squares / self.variance + size * math.log(2 * math.pi * self.variance))

    def gradient(self, outputs: Float[Tensor, "*b c"], values: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Returns the gradient of ``log_prob`` at the outputs: ``(values - outputs) / variance``."""
        return (values - outputs) / self.variance

    def predict(self, outputs: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Returns the mean, which is a copy of the output."""
        return outputs.clone()

    def fit_constant(
        self, values: Float[Tensor, "b k c"], weights: Float[Tensor, "b k"], size: int | None
    ) -> Float[Tensor, "b c"]:
        """Returns the weighted mean of the neighbors' values (Paper: Appendix E).

        Raises:
            ShapeError: If a value is not a vector.
            EmptyMemoryError: If a query has no neighbor to average over.
        """
        if values.dim() != weights.dim() + 1:
            raise ShapeError(
                f"a value must be a vector, but the memory's values have shape {tuple(values.shape[2:])}. "
                "Use EpisodicMemory(..., value_shape=(outputs,))."
            )
        if weights.shape[-1] == 0 or bool((weights.sum(-1) == 0).any()):
            raise EmptyMemoryError(
                "the mean of no neighbors is not defined: a query sees no memory entry. Write to the memory first."
            )
        return (weights.unsqueeze(-1) * values).sum(-2)

    def check_values(self, values: Tensor, size: int) -> None:
        """Refuses values ``(b, k, *)`` that are not vectors of ``size`` real numbers.

        Raises:
            DtypeError: If the values are not floating-point numbers.
            ShapeError: If a value does not have ``size`` components.
        """
        if not values.is_floating_point():
            raise DtypeError(
                f"Gaussian needs floating-point values, but the memory's are {values.dtype}. "
                f"Use EpisodicMemory(..., value_shape=({size},), value_dtype=torch.float32)."
            )
        if tuple(values.shape[2:]) != (size,):
            raise ShapeError(
                f"the memory's values have shape {tuple(values.shape[2:])}, but the head has {size} outputs. "
                f"Use EpisodicMemory(..., value_shape=({size},))."
            )
