"""Where parameters were at the end of tasks, and how much each of them mattered there."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.errors import SettingError, ShapeError, require


class Anchors(nn.Module):
    """The sum ``sum_t sum_i importance_ti (theta_i - anchor_ti)^2 + rest`` over the parameters of a network.

    The terms are buffers ``(terms, *shape)`` for each parameter that was trainable when this was made.

    Args:
        network: Whose parameters are held; it is no part of the state.

    Raises:
        SettingError: If it has no trainable parameter.
    """

    rest: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        require("network", network, nn.Module, "a torch.nn.Module")
        self._network = (network,)  # in a tuple: a submodule would come into parameters() and state_dict()
        self.names = tuple(name for name, p in network.named_parameters() if p.requires_grad)
        if not self.names:
            raise SettingError("the network has no parameter that requires a gradient, so nothing can be held.")
        if any(nn.parameter.is_lazy(network.get_parameter(name)) for name in self.names):
            raise SettingError("the network has a layer without a shape yet. Run the network once before this.")
        first = network.get_parameter(self.names[0])
        self.register_buffer("rest", first.new_zeros((), dtype=_at_least_single(first)))
        for name in self.names:
            p = network.get_parameter(name).detach()
            for kind, dtype in (("importance", _at_least_single(p)), ("anchor", p.dtype)):
                self.register_buffer(buffer_name(kind, name), p.new_zeros(0, *p.shape, dtype=dtype))
        self.register_load_state_dict_pre_hook(_make_room)

    @property
    def terms(self) -> int:
        """The number of terms of the sum over tasks."""
        return len(self.importance(self.names[0]))

    def importance(self, name: str) -> Float[Tensor, "t ..."]:
        """Returns a parameter's importances, one for each term."""
        return getattr(self, buffer_name("importance", name))

    def anchor(self, name: str) -> Float[Tensor, "t ..."]:
        """Returns a parameter's anchors, one for each term."""
        return getattr(self, buffer_name("anchor", name))

    @property
    def network(self) -> nn.Module:
        """The network whose parameters are held."""
        return self._network[0]

    def live(self) -> dict[str, nn.Parameter]:
        """Returns the network's parameters.

        Raises:
            ShapeError: If one is not as large as it was.
        """
        found = {name: self.network.get_parameter(name) for name in self.names}
        for name, p in found.items():
            if p.shape != self.anchor(name).shape[1:]:
                raise ShapeError(
                    f"{name} has shape {tuple(p.shape)}, and had {tuple(self.anchor(name).shape[1:])} when this "
                    "penalty was made. Make a new penalty for the new layer."
                )
        return found

    def forward(self, parameters: Mapping[str, Tensor] | None = None) -> Float[Tensor, ""]:
        """Returns the sum, at the network's parameters or at these; 0 before there is a term."""
        if not self.terms:
            return self.rest
        held = self.live() if parameters is None else parameters
        kept = [(self.importance(name), self.anchor(name)) for name in held]
        return self.rest + _WeightedSquares.apply(*held.values(), *(part for pair in kept for part in pair))

    def add_gradient(self, factor: float) -> None:
        """Adds ``factor`` times the gradient of the sum to the parameters' ``.grad``."""
        if not self.terms:
            return
        with torch.no_grad():
            for name, p in self.live().items():
                if not p.requires_grad:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                elif p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
                for importance, anchor in zip(self.importance(name), self.anchor(name), strict=True):
                    if importance.dtype == p.grad.dtype:
                        p.grad.addcmul_(importance, p - anchor, value=2 * factor)
                    else:  # small importances would be nothing in half precision
                        p.grad.add_((importance * (p - anchor) * (2 * factor)).to(p.grad.dtype))

    def replace(self, importances: Mapping[str, Tensor]) -> None:
        """Puts one term in place of all: these importances, anchored where the parameters are."""
        for name, p in self.live().items():
            self._set(name, importances[name].unsqueeze(0), p.detach().clone().unsqueeze(0))
        self.rest.zero_()

    def append(self, importances: Mapping[str, Tensor]) -> None:
        """Adds a term of its own."""
        for name, p in self.live().items():
            self._set(
                name,
                torch.cat([self.importance(name), importances[name].unsqueeze(0)]),
                torch.cat([self.anchor(name), p.detach().unsqueeze(0)]),
            )

    def merge(self, importances: Mapping[str, Tensor]) -> None:
        """Adds a term to the one there is: a sum of squares is one square about the weighted mean of the anchors.

        ``A (x - a)^2 + F (x - b)^2 = (A + F) (x - c)^2 + A F / (A + F) (a - b)^2``, ``c = a + F / (A + F) (b - a)``.
        Unlike the expanded form ``(A + F) x^2 - 2 (A a + F b) x + ...`` nothing cancels.
        """
        if not self.terms:
            self.replace(importances)
            return
        for name, p in self.live().items():
            old, center, new = self.importance(name)[0], self.anchor(name)[0], importances[name]
            both = old + new
            share = torch.where(both > 0, new / both, torch.ones_like(both))  # of no importance at all: the last one
            apart = p.detach() - center
            self.rest += (old * share * apart * apart).sum()
            moved = torch.where(share == 1, p.detach(), (center + share * apart).to(p.dtype))
            self._set(name, both.unsqueeze(0), moved.unsqueeze(0))

    def _set(self, name: str, importance: Tensor, anchor: Tensor) -> None:
        setattr(self, buffer_name("importance", name), importance)
        setattr(self, buffer_name("anchor", name), anchor)


class _WeightedSquares(torch.autograd.Function):
    """``sum importance (p - anchor)^2`` for n parameters and their n pairs ``(importance, anchor)``.

    One function for all, whose gradient is made on the way: half of what autograd takes for the same sum.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        count = len(tensors) // 3
        total, pulls = tensors[count].new_zeros(()), []
        for p, importance, anchor in zip(tensors[:count], tensors[count::2], tensors[count + 1 :: 2], strict=True):
            away = p - anchor
            pulls.append(importance * away)
            total = total + torch.dot(pulls[-1].flatten(), away.to(pulls[-1].dtype).flatten())
        ctx.save_for_backward(*tensors, *pulls)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 4
        parameters, pulls = ctx.saved_tensors[:count], ctx.saved_tensors[3 * count :]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            importances, anchors = (
                ctx.saved_tensors[count : 3 * count : 2],
                ctx.saved_tensors[count + 1 : 3 * count : 2],
            )
            pulls = [f * (p - a) for p, f, a in zip(parameters, importances, anchors, strict=True)]
        double = 2 * grads[0]
        sums = (pull[0] if len(pull) == 1 else pull.sum(0) for pull in pulls)
        made = ((double * pull).to(p.dtype) for p, pull in zip(parameters, sums, strict=True))
        return (*made, *(None for _ in range(2 * count)))


def _at_least_single(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def buffer_name(kind: str, name: str) -> str:
    """Returns what the buffer of a parameter is called."""
    return f"{kind}:{name.replace('.', '/')}"  # a buffer's name must not have dots


def _make_room(anchors: Anchors, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    for name, buffer in list(anchors.named_buffers()):
        saved = state.get(prefix + name)
        if isinstance(saved, Tensor) and saved.dim() == buffer.dim() and saved.shape[1:] == buffer.shape[1:]:
            setattr(anchors, name, buffer.new_zeros(saved.shape))
