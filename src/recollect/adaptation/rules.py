"""Update rules as pairs of pure functions: ``init(params) -> state``, ``update(...) -> (delta, state)``.

Parameters, gradients and states are dictionaries of tensors. A rule knows nothing of networks or batches, so the same
rule drives one head, a thousand heads side by side, or a meta-learner. The elementwise ones below are held to
``torch.optim`` by the tests.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from recollect.errors import SettingError, require_number

Params = dict[str, Tensor]


@runtime_checkable
class Rule(Protocol):
    """A pair of pure functions that turns gradients into changes of the parameters.

    ``MbPA`` adapts many heads at once: each tensor then has one more dimension in front, one row for each head, and
    ``loss`` has shape ``(b,)``. A rule must not mix the rows; elementwise rules need no care.
    """

    def init(self, params: Params) -> Any:
        """Returns the state before the first step."""
        ...

    def update(self, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        """Returns what to add to the parameters, and the next state.

        Args:
            grads: The gradient of the loss, a tensor for each parameter.
            state: What ``init`` or the last ``update`` returned.
            params: The parameters at which the gradient was taken.
            loss: The loss there; elementwise rules ignore it, learned rules read it.
        """
        ...


def _check(**settings: float) -> None:
    for name, value in settings.items():
        require_number(name, value, low=0.0)
        if name == "epsilon" and value == 0:
            raise SettingError("epsilon must be above 0: without it a parameter whose gradient is 0 becomes NaN.")
        if name not in {"rate", "epsilon"} and value >= 1:
            raise SettingError(f"{name} must be below 1, got {value}.")


def _wide(tensor: Tensor) -> Tensor:
    """Returns half precision as float32: there the squares of gradients and epsilon would be 0."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def _ratio(factor: float, tensor: Tensor, squares: Tensor, epsilon: float) -> Tensor:
    """Returns ``factor * tensor / (sqrt(squares) + epsilon)`` in as few passes as it takes."""
    if squares.requires_grad:  # at 0 the derivative of a root is infinite, and a meta-gradient through it NaN
        squares = squares.clamp_min(torch.finfo(squares.dtype).tiny)
    # pow keeps its input for a derivative; sqrt keeps its output, which then could not be changed in place.
    root = squares.pow(0.5).add_(epsilon)
    return torch.addcdiv(root.new_zeros(()), tensor, root, value=factor)


@dataclass(frozen=True)
class sgd:  # reads as a function where it is used
    """Gradient descent: ``m <- momentum * m + g``, ``delta = -rate * m``.

    Paper: Eq. (4) with ``rate`` = alpha_M.

    Args:
        rate: The step size.
        momentum: How much of the last change is kept (0 is plain gradient descent).

    Raises:
        SettingError: If ``rate`` is negative or ``momentum`` is not in [0, 1).

    Example:
        >>> import torch
        >>> rule = sgd(rate=0.1)
        >>> w = {"w": torch.tensor([1.0])}
        >>> rule.update({"w": torch.tensor([2.0])}, rule.init(w), w, torch.tensor(0.0))[0]["w"]
        tensor([-0.2000])
    """

    rate: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check(rate=self.rate, momentum=self.momentum)

    def init(self, params: Params) -> Params:
        return {name: torch.zeros_like(p) for name, p in params.items()} if self.momentum else {}

    def update(self, grads: Params, state: Params, params: Params, loss: Tensor) -> tuple[Params, Params]:
        if not self.momentum:
            return {name: -self.rate * g for name, g in grads.items()}, state
        state = {name: self.momentum * state[name] + g for name, g in grads.items()}
        return {name: -self.rate * m for name, m in state.items()}, state


@dataclass(frozen=True)
class rmsprop:
    """RMSprop: ``s <- decay * s + (1 - decay) g^2``, ``delta = -rate * g / (sqrt(s) + epsilon)``.

    Paper: Section 4.2 (the rule of the ImageNet experiments; its settings are not stated).

    Args:
        rate: The step size. The first step moves every parameter by about ``rate / sqrt(1 - decay)``.
        decay: The memory of the squared gradients (0.99 is ``torch.optim``'s default).
        epsilon: Keeps the division finite (1e-8 is ``torch.optim``'s default).

    Raises:
        SettingError: If ``rate`` is negative, ``epsilon`` not above 0, or ``decay`` not in [0, 1).

    Example:
        >>> import torch
        >>> rule = rmsprop(rate=0.1, decay=0.75)
        >>> w = {"w": torch.tensor([1.0, 1.0])}
        >>> rule.update({"w": torch.tensor([3.0, -0.01])}, rule.init(w), w, torch.tensor(0.0))[0]["w"]
        tensor([-0.2000,  0.2000])
    """

    rate: float
    decay: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check(rate=self.rate, decay=self.decay, epsilon=self.epsilon)

    def init(self, params: Params) -> Params:
        return {name: torch.zeros_like(_wide(p)) for name, p in params.items()}

    def update(self, grads: Params, state: Params, params: Params, loss: Tensor) -> tuple[Params, Params]:
        grads = {name: _wide(g) for name, g in grads.items()}
        state = {name: g.square().lerp_(state[name], self.decay) for name, g in grads.items()}
        delta = {name: _ratio(-self.rate, g, state[name], self.epsilon) for name, g in grads.items()}
        return {name: d.to(params[name].dtype) for name, d in delta.items()}, state


@dataclass(frozen=True)
class adam:
    """Adam (Kingma and Ba, 2014) with bias correction.

    Args:
        rate: The step size. The first step moves every parameter by about ``rate``.
        beta1: The memory of the gradients (0.9 is the paper's default).
        beta2: The memory of the squared gradients (0.999 is the paper's default).
        epsilon: Keeps the division finite (1e-8 is the paper's default).

    Raises:
        SettingError: If ``rate`` is negative, ``epsilon`` not above 0, or a beta not in [0, 1).

    Example:
        >>> import torch
        >>> rule = adam(rate=0.1)
        >>> w = {"w": torch.tensor([1.0, 1.0])}
        >>> rule.update({"w": torch.tensor([3.0, -0.01])}, rule.init(w), w, torch.tensor(0.0))[0]["w"]
        tensor([-0.1000,  0.1000])
    """

    rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _check(rate=self.rate, beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon)

    def init(self, params: Params) -> tuple[int, Params, Params]:
        zeros = {name: torch.zeros_like(_wide(p)) for name, p in params.items()}
        return 0, zeros, zeros

    def update(
        self, grads: Params, state: tuple[int, Params, Params], params: Params, loss: Tensor
    ) -> tuple[Params, tuple[int, Params, Params]]:
        step, first, second = state[0] + 1, state[1], state[2]
        grads = {name: _wide(g) for name, g in grads.items()}
        first = {name: torch.lerp(g, first[name], self.beta1) for name, g in grads.items()}
        second = {name: g.square().lerp_(second[name], self.beta2) for name, g in grads.items()}
        # The paper divides m by 1 - beta1^t, s by 1 - beta2^t: numbers, which leave the tensors for the outer factor.
        scale = math.sqrt(1 - self.beta2**step)
        size = self.rate * scale / (1 - self.beta1**step)
        delta = {name: _ratio(-size, m, second[name], self.epsilon * scale) for name, m in first.items()}
        return {name: d.to(params[name].dtype) for name, d in delta.items()}, (step, first, second)
