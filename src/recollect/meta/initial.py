"""How the layers of this room begin."""

from typing import TypeVar

import torch
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


@torch.no_grad()
def drawn(layer: Layer, inputs: int, generator: torch.Generator | None) -> Layer:
    """Returns a layer made on the device "meta" with weights on the CPU, uniform in ``+-1/sqrt(inputs)`` as torch's.

    Example:
        >>> drawn(nn.Linear(20, 1, device="meta"), 20, torch.Generator().manual_seed(0))
        Linear(in_features=20, out_features=1, bias=True)
    """
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer
