"""What a network's layers saw and said in one forward pass, and where the examples are in it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class UnfitError(Exception):
    """The calls of a layer cannot be told apart by example; a slower way is taken."""


class Call(NamedTuple):
    """One call of a layer: its arguments, with ``_Place`` where a tensor was, the tensors, and the tensors it made."""

    arguments: tuple[Any, dict[str, Any]]
    inputs: list[Tensor]
    outputs: list[Tensor]


class Axis(NamedTuple):
    """Where the examples are in a tensor: ``size`` entries of dimension ``dim`` for each of them, side by side."""

    dim: int
    size: int
    dims: int  # of the tensor

    @property
    def row_by_row(self) -> bool:
        """Whether the tensor is a matrix with a row for each example."""
        return (self.dim, self.size, self.dims) == (0, 1, 2)

    def first(self, tensor: Tensor, count: int) -> Tensor:
        """Returns the tensor with the examples in front; what follows is what one example alone would give."""
        return tensor.unflatten(self.dim, (count, self.size)).movedim(self.dim, 0)


class Layout(NamedTuple):
    """Where the examples are in each tensor of a call; the shape of an input that all of them share."""

    inputs: list[Axis | torch.Size]
    outputs: list[Axis]


class _Place(NamedTuple):
    """Stands for the tensor of this number."""

    number: int


def record(network: nn.Module, modules: Sequence[nn.Module], inputs: Tensor) -> tuple[Tensor, list[list[Call]]]:
    """Runs the network and returns its output and, for each module, its calls.

    Raises:
        UnfitError: If the network makes no tensor, or a module something else than tensors.
    """
    calls: list[list[Call]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(_recorder(own), with_kwargs=True)
        for module, own in zip(modules, calls, strict=True)
    ]
    try:
        output = network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UnfitError(f"the network returns a {type(output).__name__}")
    return output, calls


def _recorder(calls: list[Call]):
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        inputs: list[Tensor] = []
        arguments = _take_out((args, kwargs), inputs)
        outputs: list[Tensor] = []
        structure = _take_out(output, outputs)
        if not all(made.requires_grad for made in outputs):
            raise UnfitError(f"{type(module).__name__} makes tensors that do not depend on its parameters")
        if len(outputs) > 1:  # an LSTM's h is made from its c: what is asked for is c's gradient from outside alone
            outputs = [made.clone() for made in outputs]
        calls.append(Call(arguments, [tensor.detach() for tensor in inputs], outputs))
        # A function in place would change what the gradient is taken at, so the network goes on with copies.
        return fill_in(structure, [made.clone() for made in outputs])

    return hook


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """Returns ``value`` with places instead of tensors, and appends the tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if type(value) in {tuple, list}:
        return type(value)(_take_out(part, tensors) for part in value)
    if type(value) is dict:
        return {key: _take_out(part, tensors) for key, part in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnfitError(f"a layer takes or returns a {type(value).__name__}")


def fill_in(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Returns ``value`` with the tensors in their places."""
    if isinstance(value, _Place):
        return tensors[value.number]
    if type(value) in {tuple, list}:
        return type(value)(fill_in(part, tensors) for part in value)
    if type(value) is dict:
        return {key: fill_in(part, tensors) for key, part in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors in what a layer made, in the order of ``Call.outputs``."""
    found: list[Tensor] = []
    _take_out(value, found)
    return found


def layouts(alone: Sequence[Call], together: Sequence[Call], count: int) -> Iterator[Layout]:
    """Yields where the examples are in each call, from calls with one example and with ``count`` of them.

    Raises:
        UnfitError: If a shape does not follow the number of examples.
    """
    if len(alone) != len(together):
        raise UnfitError("a layer is called more often for more examples")
    for one, many in zip(alone, together, strict=True):
        made = [_axis(a, b, count) for a, b in zip(one.outputs, many.outputs, strict=True)]
        axes = [axis for axis in made if isinstance(axis, Axis)]
        if len(axes) < len(made):
            raise UnfitError("a layer makes a tensor that does not grow with the number of examples")
        yield Layout([_axis(a, b, count) for a, b in zip(one.inputs, many.inputs, strict=True)], axes)


def require_fit(calls: Sequence[Sequence[Call]], found: Sequence[Sequence[Layout]], count: int) -> None:
    """Refuses calls that are not laid out like those that were tried.

    Raises:
        UnfitError: If a layer is called more or less often, or a shape does not follow the number of examples.
    """
    for own, known in zip(calls, found, strict=True):
        if len(own) != len(known):
            raise UnfitError("a layer is called more or less often for other examples")
        for call, layout in zip(own, known, strict=True):
            tensors, axes = [*call.inputs, *call.outputs], [*layout.inputs, *layout.outputs]
            if len(tensors) != len(axes) or not all(map(_fits, tensors, axes, [count] * len(axes))):
                raise UnfitError("a layer takes or makes other shapes for other examples")


def _fits(tensor: Tensor, axis: Axis | torch.Size, count: int) -> bool:
    if not isinstance(axis, Axis):
        return tensor.shape == axis
    return tensor.dim() == axis.dims and tensor.shape[axis.dim] == count * axis.size


def _axis(alone: Tensor, together: Tensor, count: int) -> Axis | torch.Size:
    if alone.shape == together.shape:
        return alone.shape
    pairs = zip(alone.shape, together.shape, strict=False)
    grown = [dim for dim, (one, many) in enumerate(pairs) if one != many]
    if alone.dim() != together.dim() or len(grown) != 1 or together.shape[grown[0]] != count * alone.shape[grown[0]]:
        raise UnfitError(f"a shape goes from {tuple(alone.shape)} to {tuple(together.shape)} for {count} examples")
    return Axis(grown[0], alone.shape[grown[0]], alone.dim())


def examples_first(
    call: Call, layout: Layout, grads: Sequence[Tensor], count: int
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Returns a call's inputs (None: shared by all examples) and output gradients with the examples in front."""
    inputs = [
        axis.first(tensor, count) if isinstance(axis, Axis) else None
        for tensor, axis in zip(call.inputs, layout.inputs, strict=True)
    ]
    return inputs, [axis.first(grad, count) for grad, axis in zip(grads, layout.outputs, strict=True)]


def units(network: nn.Module) -> list[nn.Module]:
    """Returns the outermost modules that have trainable parameters of their own, which may use them as they like."""
    if any(p.requires_grad for p in network.parameters(recurse=False)):
        return [network]
    found: list[nn.Module] = []
    for child in network.children():
        found += [unit for unit in units(child) if not any(unit is other for other in found)]
    return found
