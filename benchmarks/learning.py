"""What one would write instead of ``recollect.continual``: penalties term by term, importances example by example."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

Importances = dict[str, Tensor]


class Term(NamedTuple):
    """What EWC knows of one earlier task: how much each parameter mattered, and where it was."""

    importance: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor]


def epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    *,
    order: Sequence[Tensor],
    terms: Sequence[Term],
    strength: float,
) -> None:
    """Trains for one epoch, with the sum over all terms left to autograd."""
    parameters = dict(network.named_parameters())
    for rows in order:
        penalty = torch.zeros(())
        for term in terms:
            for name, p in parameters.items():
                penalty = penalty + (term.importance[name] * (p - term.anchor[name]).square()).sum()
        loss = cross_entropy(network(data[0][rows]), data[1][rows]) + 0.5 * strength * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fisher(network: nn.Module, inputs: Tensor, labels: Tensor | None = None) -> Importances:
    """Returns the mean Fisher information, one example after the other.

    Args:
        network: Maps inputs to logits.
        inputs: The examples.
        labels: Theirs, for the empirical one; None takes the expectation over all labels.
    """
    parameters, totals = _start(network)
    for row in range(len(inputs)):
        logs = network(inputs[row : row + 1]).log_softmax(1)[0]
        if labels is None:
            chances = logs.detach().exp().tolist()
            for label, chance in enumerate(chances):
                made = torch.autograd.grad(logs[label], parameters, retain_graph=label + 1 < len(chances))
                for total, part in zip(totals.values(), made, strict=True):
                    total.addcmul_(part, part, value=chance)
        else:
            for total, part in zip(totals.values(), torch.autograd.grad(logs[labels[row]], parameters), strict=True):
                total.addcmul_(part, part)
    return {name: total / len(inputs) for name, total in totals.items()}


def output_norm(network: nn.Module, inputs: Tensor) -> Importances:
    """Returns the mean of ``|d ||f(x)||^2 / d theta|``, MAS's importances, one example after the other."""
    parameters, totals = _start(network)
    for row in range(len(inputs)):
        made = torch.autograd.grad(network(inputs[row : row + 1]).square().sum(), parameters)
        for total, part in zip(totals.values(), made, strict=True):
            total.add_(part.abs_())
    return {name: total / len(inputs) for name, total in totals.items()}


def _start(network: nn.Module) -> tuple[list[nn.Parameter], Importances]:
    return list(network.parameters()), {name: torch.zeros_like(p.data) for name, p in network.named_parameters()}


def fisher_side_by_side(network: nn.Module, inputs: Tensor, labels: Tensor | None = None, *, chunk: int) -> Importances:
    """Returns what ``fisher`` does, from the gradients of ``chunk`` examples at a time under ``torch.func.vmap``."""

    def logs(params: Importances, row: Tensor) -> Tensor:
        return functional_call(network, params, (row.unsqueeze(0),)).log_softmax(1)[0]

    def exact(params: Importances, row: Tensor, _: Tensor) -> Importances:
        chances = logs(params, row).exp()
        jacobian = jacrev(logs)(params, row)
        return {name: torch.tensordot(chances, part.square(), 1) for name, part in jacobian.items()}

    def empirical(params: Importances, row: Tensor, label: Tensor) -> Importances:
        made = grad(lambda theta: logs(theta, row).gather(0, label.unsqueeze(0))[0])(params)
        return {name: part.square() for name, part in made.items()}

    given = torch.zeros(len(inputs), dtype=torch.long) if labels is None else labels
    return _summed(network, exact if labels is None else empirical, inputs, given, chunk=chunk)


def output_norm_side_by_side(network: nn.Module, inputs: Tensor, *, chunk: int) -> Importances:
    """Returns what ``output_norm`` does, likewise."""

    def one(params: Importances, row: Tensor) -> Importances:
        made = grad(lambda theta: functional_call(network, theta, (row.unsqueeze(0),)).square().sum())(params)
        return {name: part.abs() for name, part in made.items()}

    return _summed(network, one, inputs, chunk=chunk)


def _summed(network: nn.Module, one: Callable[..., Importances], *rows: Tensor, chunk: int) -> Importances:
    params = {name: p.detach() for name, p in network.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in params.items()}
    together = vmap(one, in_dims=(None, *(0 for _ in rows)))
    for parts in zip(*(tensor.split(chunk) for tensor in rows), strict=True):
        for name, part in together(params, *parts).items():
            totals[name].add_(part.sum(0))
    return {name: total / len(rows[0]) for name, total in totals.items()}


class ListReservoir:
    """A uniform sample of a stream in a plain list, example by example."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self.kept: list[tuple[Tensor, int]] = []
        self._random = random.Random(0)

    def __len__(self) -> int:
        return len(self.kept)

    def write(self, inputs: Tensor, labels: Tensor) -> None:
        """Stores a batch, or what of it is drawn."""
        for row, label in zip(inputs, labels.tolist(), strict=True):
            self.seen += 1
            if len(self.kept) < self.capacity:
                self.kept.append((row.clone(), label))  # a view would keep the whole batch
                continue
            place = self._random.randrange(self.seen)
            if place < self.capacity:
                self.kept[place] = (row.clone(), label)


class ListBalanced:
    """Class-balancing reservoir sampling (Chrysakis & Moens, 2020) in a list for each class, example by example."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen: dict[int, int] = {}
        self.kept: dict[int, list[Tensor]] = {}
        self._full: set[int] = set()
        self._random = random.Random(0)

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def write(self, inputs: Tensor, labels: Tensor) -> None:
        """Stores a batch, or what of it is drawn."""
        for row, label in zip(inputs, labels.tolist(), strict=True):
            own = self.kept.setdefault(label, [])
            self.seen[label] = self.seen.get(label, 0) + 1
            if len(self) < self.capacity:
                own.append(row.clone())
                continue
            most = max(map(len, self.kept.values()))
            largest = [c for c, rows in self.kept.items() if len(rows) == most]
            self._full.update(largest)
            if label not in self._full:
                losing = self.kept[self._random.choice(largest)]
                losing.pop(self._random.randrange(most))
                own.append(row.clone())
                continue
            place = self._random.randrange(self.seen[label])
            if place < len(own):
                own[place] = row.clone()
