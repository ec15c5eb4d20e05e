"""How much each parameter matters: powers of its gradient, example by example, summed.

A gradient is squared (EWC) or made positive (MAS) for each example by itself. Squaring the gradient of a batch's mean
instead is the common defect: near an optimum it gives the same divided by the size of the batch.

No gradient of a single example is needed for a linear layer with inputs ``a`` and gradients ``g`` at its outputs, row
by row: ``sum_n (g_n a_n^T)^2 = (g^2)^T (a^2)``. Other layers get theirs side by side. Where a network does something
that this cannot see, every example has a backward pass of its own.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from recollect.continual.examples import Batch, Examples, batches
from recollect.continual.layerwise import Part, parts_of, powered, zeros_for
from recollect.continual.modes import aside, evaluation
from recollect.continual.recording import Layout, UnfitError, layouts, record, require_fit, units
from recollect.errors import NonFiniteError

_ROWS = 256  # examples in one backward pass: enough to keep a matrix product busy
_PROBES = 4  # examples that decide whether a faster way is right

Directions = Callable[[Tensor, Tensor | None], Iterator[Tensor]]


def importances(
    network: nn.Module, data: Examples, directions: Directions, *, power: int, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], int]:
    """Returns ``sum_n sum_v |J_n^T v|^power`` for each parameter, and the number of examples.

    ``J_n`` is the Jacobian of the network's output for example n, and ``v`` goes through that example's rows of what
    ``directions(outputs, labels)`` yields. The network runs in evaluation mode; its parameters, its statistics, its
    modes, its gradients and the global random state stay as they are.

    Args:
        network: Maps inputs ``(b, ...)`` to outputs ``(b, ...)``, each row by itself.
        data: The examples.
        directions: Yields directions of the shape of the outputs.
        power: 1 or 2.
        names: The parameters to look at.

    Raises:
        NonFiniteError: If a sum is not finite.
    """
    chosen = dict(network.named_parameters())
    parameters = {name: chosen[name] for name in names}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    devices = {p.device.index for p in parameters.values() if p.is_cuda}
    with (
        evaluation(network),
        aside(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=devices),
        torch.autocast(next(iter(parameters.values())).device.type, enabled=False),
    ):
        try:
            for p in frozen:
                p.requires_grad_()
            return _sums(network, data, directions, power, parameters)
        finally:
            for p in frozen:
                p.requires_grad_(False)


def _sums(
    network: nn.Module, data: Examples, directions: Directions, power: int, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], int]:
    totals = {name: zeros_for(p) for name, p in parameters.items()}
    ways: dict[tuple[torch.Size, int], Way] = {}  # for inputs of each shape, and as many probes as there were
    slow = OneByOne(network, parameters)
    count = 0
    for given in batches(data, _ROWS):
        inputs, labels = given
        batch = Batch(_usable(inputs), None if labels is None else _usable(labels))
        probes = min(len(batch.inputs), _PROBES)
        kind = (batch.inputs.shape[1:], probes)
        if kind not in ways:
            spread = torch.linspace(0, len(batch.inputs) - 1, probes).long()
            ways[kind] = slow if probes == 1 else _find_way(network, batch.inputs[spread], parameters, power)
        try:
            sums = ways[kind](batch, directions, power)
        except UnfitError:  # what a layer does depends on more than shapes
            sums = slow(batch, directions, power)
        for name, total in totals.items():
            total.add_(sums[name])
        count += len(batch.inputs)
    for name, total in totals.items():
        if not bool(total.isfinite().all() and parameters[name].isfinite().all()):
            raise NonFiniteError(
                f"{name} or its gradients are not finite, so it cannot be held. Check the network and the data."
            )
    return totals, count


def _usable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


class OneByOne:
    """A backward pass for each example and direction: always right, and slow."""

    def __init__(self, network: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self._network = network
        self._parameters = parameters

    def __call__(self, batch: Batch, directions: Directions, power: int) -> dict[str, Tensor]:
        """Returns the sums over a batch."""
        totals = {name: zeros_for(p) for name, p in self._parameters.items()}
        for row in range(len(batch.inputs)):
            output = self._network(batch.inputs[row : row + 1])
            label = None if batch.labels is None else batch.labels[row : row + 1]
            for direction in directions(output.detach(), label):
                grads = torch.autograd.grad(
                    output, list(self._parameters.values()), direction, retain_graph=True, materialize_grads=True
                )
                for total, grad in zip(totals.values(), grads, strict=True):
                    total.add_(powered(grad, power))
        return totals


class Layerwise:
    """One backward pass for a batch, up to each layer's output; the layers do the rest, each for its parameters."""

    def __init__(
        self, network: nn.Module, modules: list[nn.Module], layouts: list[list[Layout]], parts: list[Part]
    ) -> None:
        self._network = network
        self._modules = modules
        self._layouts = layouts
        self._parts = parts

    def __call__(self, batch: Batch, directions: Directions, power: int) -> dict[str, Tensor]:
        """Returns the sums over a batch."""
        output, calls = record(self._network, self._modules, batch.inputs)
        require_fit(calls, self._layouts, len(batch.inputs))
        made = [tensor for own in calls for call in own for tensor in call.outputs]
        for part in self._parts:
            part.start([calls[number] for number in part.modules], len(batch.inputs), power)
        for direction in directions(output.detach(), batch.labels):
            grads = iter(torch.autograd.grad(output, made, direction, retain_graph=True, materialize_grads=True))
            grads_of = [[[next(grads) for _ in call.outputs] for call in own] for own in calls]
            for part in self._parts:
                part.add([grads_of[number] for number in part.modules])
        return {name: total for part in self._parts for name, total in part.finish().items()}


Way = OneByOne | Layerwise


def _find_way(network: nn.Module, inputs: Tensor, parameters: dict[str, nn.Parameter], power: int) -> Way:
    """Returns the fastest way that gives what single backward passes give, tried on these inputs."""
    slow = OneByOne(network, parameters)
    probe = torch.Generator().manual_seed(0)

    def directions(outputs: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        assert labels is not None
        yield probes[labels].to(outputs) + outputs  # an output that depends on other examples shows

    shape = network(inputs[:1]).shape[1:]
    probes = torch.randn(len(inputs), *shape, generator=probe)
    order = torch.arange(len(inputs))
    batch = Batch(inputs, order)
    turned = Batch(inputs.flip(0), order.flip(0))  # a network may sort its examples on the way
    wanted = slow(batch, directions, power)
    precision = max(torch.finfo(p.dtype).eps for p in parameters.values())
    for modules in (units(network), [network]):
        try:
            way = _layerwise(network, modules, inputs, parameters)
            if all(_agree(way(tried, directions, power), wanted, precision) for tried in (batch, turned)):
                return way
        except Exception:  # whatever a layer does that stands in the way: the next way does without
            continue
    return slow


def _layerwise(
    network: nn.Module, modules: list[nn.Module], inputs: Tensor, parameters: dict[str, nn.Parameter]
) -> Layerwise:
    _, alone = record(network, modules, inputs[:1])
    _, together = record(network, modules, inputs)
    found: list[list[Layout]] = [list(layouts(*pair, len(inputs))) for pair in zip(alone, together, strict=True)]
    return Layerwise(network, modules, found, parts_of(modules, found, parameters))


def _agree(sums: dict[str, Tensor], wanted: dict[str, Tensor], precision: float) -> bool:
    """Whether two sums are the same but for rounding, which is far below what a mistake would make of them."""
    if sums.keys() != wanted.keys():
        return False
    for name, right in wanted.items():
        tolerance = precision**0.5 * right.abs().max()
        if not bool(((sums[name] - right).abs() <= tolerance).all()):
            return False
    return True
