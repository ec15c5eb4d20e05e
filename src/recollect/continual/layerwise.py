"""What a layer makes of its inputs and the gradients at its outputs: powers of each example's own gradient, summed."""

import warnings
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from recollect.continual.recording import Axis, Call, Layout, UnfitError, examples_first, fill_in, tensors_in
from recollect.continual.unrolled import unrolled

_BUDGET = 64 * 2**20  # bytes of single examples' gradients at once

_LARGE = 40_000  # weights of a convolution from which on examples one by one are faster than side by side (measured)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Grads = list[list[Tensor]]  # of one module: for each call, for each output


@runtime_checkable
class Part(Protocol):
    """Modules that share no parameter with others. ``start``, then ``add`` for each direction, then ``finish``."""

    modules: list[int]

    def start(self, calls: list[list[Call]], count: int, power: int) -> None: ...

    def add(self, grads: list[Grads]) -> None: ...

    def finish(self) -> dict[str, Tensor]: ...


def parts_of(
    modules: Sequence[nn.Module], found: Sequence[Sequence[Layout]], parameters: dict[str, nn.Parameter]
) -> list[Part]:
    """Returns the parts for modules and the layouts of their calls.

    Args:
        modules: The modules.
        found: For each of them, the layout of each of its calls.
        parameters: Those looked at, by their names in the network.

    Raises:
        UnfitError: If a parameter is in no module.
    """
    names = {id(p): name for name, p in parameters.items()}
    owned = [{names[id(p)] for p in module.parameters() if id(p) in names} for module in modules]
    if set().union(*owned) != set(parameters):
        raise UnfitError("a parameter is outside of all layers")
    groups: list[list[int]] = []  # modules that are bound together by a parameter that they share
    for number, own in enumerate(owned):
        tied = [group for group in groups if any(own & owned[other] for other in group)]
        groups = [group for group in groups if group not in tied] + [[number, *(n for group in tied for n in group)]]
    parts: list[Part] = []
    for group in groups:
        members = sorted(group)
        first = modules[members[0]]
        layout = found[members[0]]
        if not any(owned[number] for number in members):
            continue
        if len(members) == 1 and len(layout) == 1 and type(first) is nn.Linear and _row_by_row(layout[0]):
            parts.append(Rows(members[0], first, names))
        elif len(members) == 1 and type(first) is nn.Embedding and _plain(first):
            parts.append(Lookup(members[0], layout, names[id(first.weight)], first))
        else:
            parts.append(SideBySide(members, [modules[n] for n in members], [found[n] for n in members], names))
    return parts


def _row_by_row(layout: Layout) -> bool:
    """Whether each example is one row of a matrix."""
    axes = (*layout.inputs, *layout.outputs)
    return all(isinstance(axis, Axis) and axis.row_by_row for axis in axes)


def _plain(module: nn.Embedding) -> bool:
    return not (module.scale_grad_by_freq or module.sparse or module.max_norm is not None)


def zeros_for(tensor: Tensor) -> Tensor:
    """Returns where sums of as many numbers begin; in half precision sums would stop growing."""
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)


class Rows:
    """A linear layer, called once for all examples, each a vector: no gradient of a single example is made."""

    def __init__(self, number: int, module: nn.Linear, names: dict[int, str]) -> None:
        self.modules = [number]
        self._weight = names.get(id(module.weight))
        self._bias = names.get(id(module.bias))

    def start(self, calls: list[list[Call]], count: int, power: int) -> None:
        """Takes the calls of a batch."""
        (call,) = calls[0]
        self._power = power
        self._inputs = call.inputs[0].reshape(count, -1)
        self._grads = zeros_for(call.outputs[0]).reshape(count, -1)

    def add(self, grads: list[Grads]) -> None:
        """Takes the gradients of one direction. The inputs are the same for all of them, so that these add up."""
        grad = grads[0][0][0].reshape(self._grads.shape)
        self._grads.add_(powered(grad, self._power))

    def finish(self) -> dict[str, Tensor]:
        """Returns the sums over all examples and directions."""
        sums = {}
        if self._weight is not None:
            sums[self._weight] = self._grads.T @ powered(self._inputs, self._power)
        if self._bias is not None:
            sums[self._bias] = self._grads.sum(0)
        return sums


class Lookup:
    """An embedding: only the rows that an example has looked up, in any of its calls, have a gradient."""

    def __init__(self, number: int, layouts: Sequence[Layout], name: str, module: nn.Embedding) -> None:
        self.modules = [number]
        self._layouts = layouts
        self._name = name
        self._module = module

    def start(self, calls: list[list[Call]], count: int, power: int) -> None:
        """Takes the calls of a batch."""
        (self._calls,) = calls
        self._power = power
        self._count = count
        self._sums = zeros_for(self._module.weight)

    def add(self, grads: list[Grads]) -> None:
        """Takes the gradients of one direction."""
        size, width = self._sums.shape
        pairs, parts = [], []  # (example, row) as one number, and the gradient there
        for call, layout, made in zip(self._calls, self._layouts, grads[0], strict=True):
            (places,), (grad,) = examples_first(call, layout, made, self._count)
            if places is None:
                raise UnfitError("all examples look up the same rows")
            example = torch.arange(self._count, device=places.device).view(-1, *(1,) * (places.dim() - 1))
            pairs.append((example * size + places).flatten())
            parts.append(grad.reshape(-1, width).to(self._sums.dtype))
        looked_up, inverse = torch.cat(pairs).unique(return_inverse=True)
        own = self._sums.new_zeros(len(looked_up), width).index_add_(0, inverse, torch.cat(parts))
        if self._module.padding_idx is not None:
            own[looked_up % size == self._module.padding_idx] = 0
        self._sums.index_add_(0, looked_up % size, powered(own, self._power))

    def finish(self) -> dict[str, Tensor]:
        """Returns the sums over all examples and directions."""
        return {self._name: self._sums}


class SideBySide:
    """Any layers, called any number of times: each example's gradient is made, for as many as fit the budget."""

    def __init__(
        self, numbers: list[int], modules: list[nn.Module], found: list[Sequence[Layout]], names: dict[int, str]
    ) -> None:
        self.modules = numbers
        self._layers = modules
        self._found = found
        self._names = {id(p): names[id(p)] for m in modules for p in m.parameters() if id(p) in names}

    def start(self, calls: list[list[Call]], count: int, power: int) -> None:
        """Takes the calls of a batch."""
        self._calls = calls
        self._count = count
        self._power = power
        distinct = {id(p): p for m in self._layers for p in m.parameters() if id(p) in self._names}
        self._sums = {self._names[key]: zeros_for(p) for key, p in distinct.items()}
        gradients = sum(p.numel() * p.element_size() for p in distinct.values())
        entering = sum(_bytes(call) for own in calls for call in own)
        self._rows = max(1, _BUDGET // (gradients + entering // count))

    def add(self, grads: list[Grads]) -> None:
        """Takes the gradients of one direction."""
        for start in range(0, self._count, self._rows):
            rows = slice(start, min(start + self._rows, self._count))
            own: dict[str, Tensor] = {}
            for module, calls, layouts, made in zip(self._layers, self._calls, self._found, grads, strict=True):
                for call, layout, grad in zip(calls, layouts, made, strict=True):
                    inputs, outputs = examples_first(call, layout, grad, self._count)
                    shares = [t if t is None else t[rows] for t in inputs]
                    parts = _gradients(module, call, shares, [t[rows] for t in outputs])
                    for name, part in module.named_parameters():
                        known = self._names.get(id(part))
                        if known is not None:
                            own[known] = own[known] + parts[name] if known in own else parts[name]
            for name, part in own.items():
                self._sums[name].add_(powered(part, self._power).sum(0))

    def finish(self) -> dict[str, Tensor]:
        """Returns the sums over all examples and directions."""
        return self._sums


def _bytes(call: Call) -> int:
    return sum(t.numel() * t.element_size() for t in (*call.inputs, *call.outputs))


def powered(tensor: Tensor, power: int) -> Tensor:
    """Returns squares or absolute values, at least in single precision: squares leave the range of halves."""
    single = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return single.square() if power == 2 else single.abs()


def _gradients(module: nn.Module, call: Call, inputs: list[Tensor | None], grads: list[Tensor]) -> dict[str, Tensor]:
    """Returns each example's gradient for each parameter of a module, ``(b, *shape)``."""
    first = inputs[0] if len(inputs) == 1 else None
    if type(module) is nn.Linear and first is not None:
        return _linear(module, first, grads[0])
    if isinstance(module, Convolution) and first is not None and _is_plain(module):
        return _convolution(module, first, grads[0])
    return _any(module, call, inputs, grads)


def _is_plain(module: Convolution) -> bool:
    return type(module) in {nn.Conv1d, nn.Conv2d, nn.Conv3d} and module.padding_mode == "zeros"


def _linear(module: nn.Linear, inputs: Tensor, grads: Tensor) -> dict[str, Tensor]:
    rows, sides = inputs.flatten(1, -2), grads.flatten(1, -2)
    return {"weight": sides.mT @ rows, "bias": sides.sum(1)}


def _convolution(module: Convolution, inputs: Tensor, grads: Tensor) -> dict[str, Tensor]:
    inputs, grads = inputs.squeeze(1), grads.squeeze(1)  # (b, channels, *places)
    padding = module.padding
    if isinstance(padding, str):
        around = [d * (k - 1) * (padding == "same") for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        inputs = nn.functional.pad(inputs, [side for a in reversed(around) for side in (a // 2, a - a // 2)])
        padding = 0
    weight_gradient = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[len(module.kernel_size)]
    settings = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    count, shape = len(inputs), module.weight.shape
    if module.weight.numel() > _LARGE:
        pairs = zip(inputs.split(1), grads.split(1), strict=True)
        weights = [weight_gradient(x, shape, g, **settings, groups=module.groups) for x, g in pairs]
        weight = torch.stack(weights)
    else:  # examples as groups of channels of a single one
        x, g = inputs.flatten(0, 1).unsqueeze(0), grads.flatten(0, 1).unsqueeze(0)
        size = (count * shape[0], *shape[1:])
        weight = weight_gradient(x, size, g, **settings, groups=count * module.groups).unflatten(0, (count, -1))
    return {"weight": weight, "bias": grads.flatten(2).sum(2)}


def _any(module: nn.Module, call: Call, inputs: list[Tensor | None], grads: list[Tensor]) -> dict[str, Tensor]:
    """Runs the module once more with a copy of its parameters for each example, side by side under ``vmap``."""
    own = {name: p.detach() for name, p in module.named_parameters()}
    copies = {name: p.expand(len(grads[0]), *p.shape).requires_grad_() for name, p in own.items()}
    step_by_step = unrolled(module)
    mine = [number for number, tensor in enumerate(inputs) if tensor is not None]

    def run(params: dict[str, Tensor], *tensors: Tensor) -> list[Tensor]:
        full = list(call.inputs)
        for number, tensor in zip(mine, tensors, strict=True):
            full[number] = tensor
        args, kwargs = fill_in(call.arguments, full)
        if step_by_step is None:
            return tensors_in(functional_call(module, params, args, kwargs))
        return tensors_in(step_by_step(params, *args, **kwargs))

    shares = [tensor for tensor in inputs if tensor is not None]
    before = [(part, part.__dict__.copy()) for part in module.modules()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # no worse than one example at a time
        outputs = vmap(run)(copies, *shares)
    for part, attributes in before:  # what a module notes of its run would be useless outside of vmap
        part.__dict__.clear()
        part.__dict__.update(attributes)
    parts = torch.autograd.grad(outputs, list(copies.values()), grads, materialize_grads=True)
    return dict(zip(copies, parts, strict=True))
