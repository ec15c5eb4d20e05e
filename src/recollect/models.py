"""The small networks that the experiments use, built from ``torch.nn`` alone so that they can be saved and loaded."""

import itertools

import torch
from torch import nn

from recollect.errors import SettingError


def mlp(*sizes: int, generator: torch.Generator | None = None) -> nn.Sequential:
    """Returns linear layers of these sizes with ReLU between them.

    Args:
        sizes: Input size, hidden sizes, output size; at least two.
        generator: Draws the initial weights, uniform in ``+-1/sqrt(inputs)`` as ``nn.Linear`` does. With None they
            come from torch's global random state, as ``nn.Linear``'s do.

    Raises:
        SettingError: If there are fewer than two sizes, or one is below 1.

    Example:
        >>> mlp(784, 256, 10)
        Sequential(
          (0): Linear(in_features=784, out_features=256, bias=True)
          (1): ReLU()
          (2): Linear(in_features=256, out_features=10, bias=True)
        )
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise SettingError(f"an MLP needs an input size and an output size, both above 0, got {sizes}.")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
