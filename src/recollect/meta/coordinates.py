"""What the learned rules share: all parameters as one row of coordinates, their preprocessing, one step of an LSTM."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.adaptation.rules import Params
from recollect.errors import SettingError, ShapeError, require_number

State = tuple[Float[Tensor, "#n _"], Float[Tensor, "#n _"]]
_BLOCK = 4096  # coordinates whose gates stay in a processor's cache: twice as fast as all at once


def flatten(tensors: Params, loss: Float[Tensor, "*b"], *, like: Params) -> Float[Tensor, "*b n"]:
    """Returns all numbers of a dictionary of tensors side by side, a row for each loss.

    Args:
        tensors: Parameters or gradients. Where the loss has shape ``(b,)``, each has a row for each of these.
        loss: The loss, or one for each row.
        like: Says in which order they come, as for ``unflatten``.

    Raises:
        SettingError: If a tensor is missing.
        ShapeError: If a tensor does not have as many rows as there are losses.

    Example:
        >>> params = {"w": torch.zeros(5, 2, 3), "b": torch.zeros(5, 2)}
        >>> flatten(params, torch.zeros(5), like=params).shape
        torch.Size([5, 8])
    """
    if not like.keys() <= tensors.keys():
        raise SettingError(
            f"a rule needs a tensor for each of the parameters {list(like)}, got {list(tensors)}. Pass zeros where "
            "there is no gradient."
        )
    rows, ordered = loss.shape, {name: tensors[name] for name in like}
    for name, tensor in ordered.items():
        if tensor.shape[: len(rows)] != rows:
            raise ShapeError(
                f"a loss of shape {tuple(rows)} needs as many rows in each parameter, but {name!r} has shape "
                f"{tuple(tensor.shape)}. Pass the loss of each row, not of each example."
            )
    return torch.cat([tensor.reshape(*rows, -1) for tensor in ordered.values()], -1)


def unflatten(flat: Float[Tensor, "*b n"], like: Params) -> Params:
    """Returns the numbers in the shapes and dtypes of ``like``: the inverse of ``flatten``.

    Example:
        >>> unflatten(torch.arange(3.0), {"w": torch.zeros(1, 2), "b": torch.zeros(())})
        {'w': tensor([[0., 1.]]), 'b': tensor(2.)}
    """
    rows = math.prod(flat.shape[:-1])
    parts = flat.split([tensor.numel() // rows for tensor in like.values()], -1)
    return {name: part.reshape(p.shape).to(p.dtype) for (name, p), part in zip(like.items(), parts, strict=True)}


def log_and_sign(values: Float[Tensor, "*n"], p: float = 10.0) -> Float[Tensor, "*n 2"]:
    """Returns each number as two of like size: ``(log|x| / p, sign x)``, where ``|x| <= e^-p`` ``(-1, e^p x)``.

    Paper: Andrychowicz et al. (2016), Appendix A; used by Ravi and Larochelle (2017) too.

    Args:
        values: Gradients, losses.
        p: Which numbers count as small: those up to ``e^-p`` (10 in both papers, 5 in the code of the first).

    Raises:
        SettingError: If ``p`` is not above 0, or ``e^p`` beyond the numbers of this dtype.

    Example:
        >>> log_and_sign(torch.tensor([-1.0, 0.0, math.exp(5)]))
        tensor([[ 0.0000, -1.0000],
                [-1.0000,  0.0000],
                [ 0.5000,  1.0000]])
    """
    require_p(p, values.dtype)
    size = values.abs().clamp(min=math.exp(-p)).log() / p
    return torch.stack([size, (values * math.exp(p)).clamp(-1.0, 1.0)], -1)


def require_p(p: float, dtype: torch.dtype) -> None:
    """Refuses a ``p`` of ``log_and_sign`` that is not above 0, or whose ``e^p`` is infinite in this dtype.

    Raises:
        SettingError: If it is.
    """
    require_number("p", p, above=0.0)
    largest = math.log(torch.finfo(dtype).max)
    if p > largest:
        raise SettingError(f"p must be at most {largest:.1f}, as e^p is infinite in {dtype} else, got {p}. Use p=10.")


class LSTMStep(nn.Module):
    """One step of an LSTM on many coordinates at once, its four gates from one product.

    The same as ``nn.LSTMCell`` with one bias in place of two; made of plain functions, so it runs under ``torch.func``.

    Args:
        inputs: Numbers for each coordinate.
        hidden: Units.
        bound: Weights and biases are drawn uniformly from ``+-bound``.
        generator: Draws them; torch's global random state does when None.

    Example:
        >>> step = LSTMStep(2, 20, bound=0.1)
        >>> hidden, cell = step(torch.zeros(7, 2), (torch.zeros(1, 20), torch.zeros(1, 20)))
        >>> hidden.shape, cell.shape
        (torch.Size([7, 20]), torch.Size([7, 20]))
    """

    def __init__(self, inputs: int, hidden: int, *, bound: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(4 * hidden, inputs + hidden).uniform_(-bound, bound, generator=generator)
        )
        self.bias = nn.Parameter(torch.empty(4 * hidden).uniform_(-bound, bound, generator=generator))

    def forward(self, inputs: Float[Tensor, "n i"], state: State) -> State:
        """Returns the next hidden and cell state; a state of one row serves any number of coordinates.

        Raises:
            ShapeError: If the state is that of another number of coordinates.
        """
        count = len(inputs)
        if len(state[0]) not in (1, count):
            raise ShapeError(
                f"the state of {count} coordinates must have as many rows, or one for all, got {len(state[0])}. Is it "
                "that of another batch? Begin with rule.init(params)."
            )
        parts = (inputs, *(part.expand(count, -1) for part in state))
        if count <= _BLOCK:
            return self._block(*parts)
        blocks = [self._block(*block) for block in zip(*(part.split(_BLOCK) for part in parts), strict=True)]
        hidden, cell = (torch.cat(part) for part in zip(*blocks, strict=True))
        return hidden, cell

    def _block(self, inputs: Float[Tensor, "n i"], hidden: Float[Tensor, "n h"], cell: Float[Tensor, "n h"]) -> State:
        gates = torch.addmm(self.bias, torch.cat([inputs, hidden], 1), self.weight.mT)
        enter, forget, new, leave = gates.chunk(4, 1)  # in torch's order
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(cell), cell


def mapped(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Returns a rule's state, of tuples, lists, dictionaries, tensors and numbers, with ``function`` of each tensor.

    Example:
        >>> mapped(lambda tensor: tensor + 1, (3, {"w": torch.zeros(2)}))
        (3, {'w': tensor([1., 1.])})
    """
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: mapped(function, part) for name, part in state.items()}
    if isinstance(state, list | tuple):
        parts = [mapped(function, part) for part in state]
        return type(state)(*parts) if isinstance(state, tuple) and type(state) is not tuple else type(state)(parts)
    return state
