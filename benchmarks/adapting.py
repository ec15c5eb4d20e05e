"""What one would write instead of recollect's adaptation: a loop over copies of the head, or vmap over parameters."""

import copy
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from recollect import Context

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State, int], tuple[Tensor, State]]


def optimizer(rule: str, rate: float) -> Optimizer:
    """Returns torch's own optimizer of this name."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adam": functools.partial(torch.optim.Adam, fused=True),  # faster here; for SGD it made no difference
    }
    return lambda parameters: kinds[rule](parameters, lr=rate)


def loop(head: nn.Module, queries: Tensor, context: Context, *, optimizer: Optimizer, steps: int) -> Tensor:
    """Adapts a copy of the head to one query after the other: Algorithm 1, with the neighbors as a batch."""
    outputs = []
    for query, keys, values, weights in zip(queries, context.keys, context.values, context.weights, strict=True):
        adapted = copy.deepcopy(head)
        stepper = optimizer(adapted.parameters())
        for _ in range(steps):
            stepper.zero_grad()
            losses = cross_entropy(adapted(keys), values, reduction="none")
            (weights * losses).sum().backward()
            stepper.step()
        with torch.no_grad():
            outputs.append(adapted(query.unsqueeze(0)))
    return torch.cat(outputs)


def side_by_side(
    head: nn.Module, queries: Tensor, context: Context, *, rule: str, rate: float, steps: int, chunk: int
) -> Tensor:
    """Adapts parameters of its own for each query, ``chunk`` queries at a time, under ``torch.func.vmap``."""
    theta = {name: parameter.detach() for name, parameter in head.named_parameters()}
    move, start = _STEPS[rule]

    def loss(params: dict[str, Tensor], keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        losses = cross_entropy(functional_call(head, params, (keys,)), values, reduction="none")
        return (weights * losses).sum()

    def adapt(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        params, states = theta, {name: start(parameter) for name, parameter in theta.items()}
        for step in range(1, steps + 1):
            gradients = grad(loss)(params, keys, values, weights)
            moved = {name: move(gradients[name], rate, states[name], step) for name in params}
            params = {name: params[name] - moved[name][0] for name in params}
            states = {name: state for name, (_, state) in moved.items()}
        return functional_call(head, params, (query.unsqueeze(0),)).squeeze(0)

    return vmap(adapt, chunk_size=chunk)(queries, context.keys, context.values, context.weights)


def _sgd(gradient: Tensor, rate: float, state: State, step: int) -> tuple[Tensor, State]:
    return rate * gradient, state


def _rmsprop(gradient: Tensor, rate: float, state: State, step: int) -> tuple[Tensor, State]:
    squares = 0.99 * state[0] + 0.01 * gradient * gradient
    return rate * gradient / (squares.sqrt() + 1e-8), (squares,)


def _adam(gradient: Tensor, rate: float, state: State, step: int) -> tuple[Tensor, State]:
    mean = 0.9 * state[0] + 0.1 * gradient
    squares = 0.999 * state[1] + 0.001 * gradient * gradient
    scale = (squares / (1 - 0.999**step)).sqrt() + 1e-8
    return rate / (1 - 0.9**step) * mean / scale, (mean, squares)


def _zeros(count: int) -> Callable[[Tensor], State]:
    return lambda parameter: (torch.zeros_like(parameter),) * count


_STEPS = {"sgd": (_sgd, _zeros(0)), "rmsprop": (_rmsprop, _zeros(1)), "adam": (_adam, _zeros(2))}
