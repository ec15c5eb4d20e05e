"""How sure a mean over many tasks is."""

from jaxtyping import Float
from torch import Tensor


def half_width(samples: Float[Tensor, "*t n"]) -> Float[Tensor, "*t"]:
    """Returns half of the 95 % interval of the mean of independent samples: 1.96 standard errors.

    Example:
        >>> half_width(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([1.2652])
    """
    return 1.96 * samples.std(-1) / samples.shape[-1] ** 0.5
