"""The oracle: Algorithm 1, MbPA-Test, written out literally for one query at a time.

A copy of the head, an optimizer of ``torch.optim`` and a search that sorts all distances; nothing of recollect. The
only liberty is the sign of Eq. (4), which as printed climbs away from the neighbors.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


def categorical(outputs: Tensor, value: Tensor) -> Tensor:
    """Returns ``-log p(v | h)`` for one output vector and one label."""
    return -torch.log_softmax(outputs, dim=0)[int(value)]


def gaussian(outputs: Tensor, value: Tensor) -> Tensor:
    """Returns ``-log p(v | h)`` for unit variance, up to a constant."""
    return 0.5 * ((value - outputs) ** 2).sum()


def nearest(keys: Tensor, query: Tensor, neighbors: int) -> list[int]:
    """Returns the rows of the nearest keys; of equally near ones the first comes first."""
    distances = ((keys - query) ** 2).sum(1).tolist()
    return sorted(range(len(keys)), key=lambda row: (distances[row], row))[:neighbors]


def mbpa_test(
    head: nn.Module,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    *,
    neighbors: int,
    optimizer: Optimizer,
    steps: int,
    prior: float = 0.0,
    epsilon: float = 1e-3,
    adapts: Callable[[str], bool] = lambda name: True,
    loss: Loss = categorical,
) -> Tensor:
    """Returns the outputs of the head adapted to one query.

    Args:
        head: The output network g.
        keys: The whole memory, oldest entry first.
        values: Its labels or targets.
        query: The embedded input q.
        neighbors: K.
        optimizer: Makes the optimizer from the parameters that adapt.
        steps: T.
        prior: beta.
        epsilon: The kernel's constant.
        adapts: Says by its name whether a parameter adapts.
        loss: The negative log-likelihood of one value.
    """
    rows = nearest(keys, query, neighbors)
    weights = [1 / (epsilon + float(((keys[row] - query) ** 2).sum())) for row in rows]
    total = sum(weights)

    adapted = copy.deepcopy(head).eval()
    theta = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    moving = {name: p for name, p in adapted.named_parameters() if adapts(name)}
    stepper = optimizer(moving.values())
    for _ in range(steps):
        stepper.zero_grad()
        objective = torch.zeros((), dtype=query.dtype)
        for row, weight in zip(rows, weights, strict=True):
            outputs = adapted(keys[row].clone().unsqueeze(0)).squeeze(0)
            objective = objective + weight / total * loss(outputs, values[row])
        objective.backward()
        before = {name: p.detach().clone() for name, p in moving.items()}
        stepper.step()
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.sub_(prior * (before[name] - theta[name]))
    with torch.no_grad():
        return adapted(query.clone().unsqueeze(0)).squeeze(0)
