"""How sure a mean over many tasks is."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

_OF_95 = 1.96  # standard errors


def half_width(samples: Float[Tensor, "*t n"]) -> Float[Tensor, "*t"]:
    """Returns half of the 95 % interval of the mean of independent samples: 1.96 standard errors.

    Example:
        >>> import torch
        >>> half_width(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([1.2652])
    """
    return _OF_95 * samples.std(-1) / samples.shape[-1] ** 0.5


def standard_errors(half_widths: Sequence[float]) -> list[float]:
    """Returns the standard errors, of which figures have their bands, to what ``half_width`` has returned.

    Example:
        >>> standard_errors([1.96, 0.0])
        [1.0, 0.0]
    """
    return [half / _OF_95 for half in half_widths]
