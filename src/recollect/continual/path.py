"""Synaptic intelligence: importances that come along the way, from the optimizer's own steps."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.continual.anchors import Anchors, buffer_name
from recollect.continual.examples import Examples
from recollect.continual.outputs import Outputs
from recollect.errors import NonFiniteError, SettingError, require, require_number


class SI(nn.Module):
    """Synaptic intelligence: ``strength * sum_i omega_i (theta_i - theta*_i)^2``, importances along the way.

    Each step of the optimizer adds ``-g * (change of theta)`` to a parameter's path integral, ``g`` the gradient of the
    loss *without* the penalty. At a task's end ``omega <- max(0, omega + path / ((theta - theta*)^2 + damping))``.

    Source: Zenke et al., 2017 (arXiv 1703.04200), and the authors' code, which has 0.1 for strength and damping on
    permuted MNIST.

    Args:
        network: Whose parameters are held.
        optimizer: Trains them. Its steps are watched from now on. Where there are several, or new ones:
            ``watch(*optimizers)``. Copies of this, the network and the optimizer need it too.
        strength: c. Choose it on validation data, over orders of magnitude.
        damping: xi.

    The gradient is what backward passes have added to ``.grad`` since it was zeroed, less the penalty's part, before
    any clipping. A loss that is scaled (``GradScaler``) scales the importances with it.

    Raises:
        SettingError: If a setting is out of range, the network has no trainable parameter, or the optimizer is LBFGS,
            whose steps follow more than one gradient.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> penalty = SI(net, optimizer)
        >>> loss = net(torch.eye(3)).square().sum() + penalty()
        >>> loss.backward()
        >>> optimizer.step()
        >>> penalty.consolidate()
        >>> bool((penalty.anchors.importance("weight") > 0).all())
        True
    """

    steps: Tensor

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, strength: float = 0.1, *, damping: float = 0.1
    ) -> None:
        super().__init__()
        require_number("strength", strength, low=0.0)
        require_number("damping", damping, above=0.0)
        self.strength = strength
        self.damping = damping
        self.anchors = Anchors(network)
        for name, p in self.anchors.live().items():
            for kind in ("path", "start"):  # the integral of this task, and where it began
                made = torch.zeros_like(p, requires_grad=False) if kind == "path" else p.detach().clone()
                self.register_buffer(buffer_name(kind, name), made)
        self.register_buffer("steps", torch.tensor(0))  # seen in this task
        self._stepped: set[str] = set()  # the parameters of those steps
        self._before: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}  # the penalty's part of what is about to be added to .grad,
        self._own: dict[str, Tensor] = {}  # of what is in .grad,
        self._loss: dict[str, Tensor] = {}  # and the rest of it
        self._handles: list[Any] = []
        self.watch(optimizer)

    @property
    def network(self) -> nn.Module:
        """The network that is held."""
        return self.anchors.network

    def watch(self, *optimizers: torch.optim.Optimizer) -> None:
        """Follows the steps of these optimizers instead of those before.

        Raises:
            SettingError: If one is LBFGS or no optimizer.
        """
        for optimizer in optimizers:
            require("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
            if isinstance(optimizer, torch.optim.LBFGS):
                raise SettingError("a step of LBFGS follows more than one gradient, which SI cannot tell apart.")
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(lambda steps, *_: self._begin(steps)))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._end()))
        for name, p in self.anchors.live().items():
            accumulated = partial(self._accumulated, name)
            self._handles.append(p.register_post_accumulate_grad_hook(accumulated))

    def forward(self) -> Float[Tensor, ""]:
        """Returns the penalty at the network's present parameters."""
        aliases: dict[str, Tensor] = {}
        self._pending = {}
        for name, p in self.anchors.live().items():
            aliases[name] = p.view_as(p)
            if aliases[name].requires_grad and self.anchors.terms:
                aliases[name].register_hook(lambda grad, name=name: self._note(name, grad))
        return self.strength * self.anchors(aliases)

    def _note(self, name: str, grad: Tensor) -> None:
        p = self.anchors.network.get_parameter(name)
        if p.grad is None or not bool(p.grad.any()):  # it has been zeroed, whether or not a step was taken
            self._own.pop(name, None)
        self._pending[name] = self._pending[name] + grad if name in self._pending else grad.clone()

    def _accumulated(self, name: str, p: Tensor) -> None:
        if name in self._pending:
            own = self._pending.pop(name)
            self._own[name] = self._own[name] + own if name in self._own else own
        if p.grad is not None:  # a copy: some optimizers change .grad in place
            self._loss[name] = p.grad - self._own[name] if name in self._own else p.grad.clone()

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._before = {name: p.detach().clone() for name, p in self.anchors.live().items() if id(p) in own}

    def _end(self) -> None:
        live = self.anchors.live()
        for name, before in self._before.items():
            loss = self._loss.pop(name, None)
            self._own.pop(name, None)
            self._stepped.add(name)
            if live[name].grad is not None and loss is not None:
                self.get_buffer(buffer_name("path", name)).sub_(loss * (live[name].detach() - before))
        self.steps += 1 if self._before else 0
        self._before = {}

    @torch.inference_mode(mode=False)
    def consolidate(self, data: Examples | None = None, *, outputs: Outputs | None = None) -> None:
        """Turns the path into importances, and holds the network to where it is.

        Args:
            data: Not looked at; here so that all penalties are called alike.
            outputs: Not looked at.

        Raises:
            SettingError: If no step of an optimizer has been seen since the last task, or a parameter has changed
                by others.
            NonFiniteError: If a parameter or its path is not finite. The penalty stays as it was.
        """
        if not int(self.steps):
            raise SettingError(
                "no step has been seen in this task, so nothing is known of what mattered. Call watch(*optimizers) "
                "with the optimizers that train this network, copies and new ones included."
            )
        omega: dict[str, Tensor] = {}
        for name, p in self.anchors.live().items():
            path, start = self.get_buffer(buffer_name("path", name)), self.get_buffer(buffer_name("start", name))
            if name not in self._stepped and not bool(path.any()) and not torch.equal(p.detach(), start):
                raise SettingError(
                    f"{name} has changed by steps that were not seen. Call watch(*optimizers) with all that train it."
                )
            gained = path / ((p.detach() - start).square() + self.damping)
            omega[name] = (gained + self.anchors.importance(name).sum(0)).clamp_(min=0)
            if not bool(omega[name].isfinite().all()):
                raise NonFiniteError(
                    f"{name} or its path is not finite. Go back to a network that is, or lower the rate."
                )
        for name, p in self.anchors.live().items():
            self.get_buffer(buffer_name("path", name)).zero_()
            self.get_buffer(buffer_name("start", name)).copy_(p.detach())
        self.steps.zero_()
        self._stepped = set()
        self.anchors.replace(omega)

    def extra_repr(self) -> str:
        return f"strength={self.strength}, damping={self.damping}"
