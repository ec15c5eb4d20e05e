"""``RuleOptimizer``: any rule as a ``torch.optim.Optimizer``."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from recollect.adaptation.rules import Params, Rule
from recollect.errors import NonFiniteError, SettingError, ShapeError, require, require_tensor
from recollect.meta.coordinates import mapped


class RuleOptimizer(Optimizer):
    """Trains a network by a rule, learned or not, in place of ``torch.optim.SGD`` or ``Adam``.

    ``step(closure)`` needs the loss, which learned rules read: a closure that computes it, as ``torch.optim.LBFGS``
    does, or ``step(lambda: loss)`` after ``loss.backward()``. As in ``torch.optim``, a parameter without a gradient
    stays as it is, and so does its state. ``state_dict`` holds the rule's state in full; the parameters of a learned
    rule are not its state, but in the rule's own ``state_dict``.

    Args:
        params: Parameters, or groups of them. One rule serves all groups, so they have no settings of their own.
        rule: Turns gradients into steps: ``rules.adam(1e-3)``, ``MetaLSTM``, ``LSTMOptimizer``, ``Policy``.
        joint: Whether the rule sees all parameters at once, as ``Policy`` must, in place of one after the other, which
            is the same for a rule that works on each coordinate by itself. All need a gradient at each step then.

    Raises:
        SettingError: If ``rule`` is none, or a group has settings.

    Example:
        >>> from recollect import rules
        >>> net = torch.nn.Linear(3, 1)
        >>> optimizer = RuleOptimizer(net.parameters(), rules.adam(0.1))
        >>> losses = []
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     loss = (net(torch.eye(3)) - 1).square().mean()
        ...     loss.backward()
        ...     losses.append(optimizer.step(lambda: loss).item())
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], rule: Rule, *, joint: bool = False) -> None:
        require("rule", rule, Rule, "a rule with init and update, such as rules.sgd(0.1)")
        require("joint", joint, bool, "True or False")
        self.rule = rule
        self.joint = joint
        super().__init__(params, {})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "joint": self.joint}  # copies would lack them otherwise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; their state begins with their first gradient.

        Raises:
            SettingError: If the group has settings.
        """
        settings = param_group.keys() - {"params", "param_names"}
        if settings:
            raise SettingError(
                f"one rule serves all groups, but a group has its own {sorted(settings)}. Use an optimizer for each."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Changes the parameters that have a gradient, and returns the loss. On an error nothing changes.

        Args:
            closure: Computes the loss and its gradients, or returns the loss that was computed: ``lambda: loss``.

        Raises:
            SettingError: If there is no closure, or with ``joint`` a parameter has no gradient.
            ShapeError: If the loss is not one number.
            NonFiniteError: If the loss, a gradient or a step of the rule is NaN or infinite.
        """
        if closure is None:
            raise SettingError("a rule may read the loss: call step(closure), or step(lambda: loss) after backward.")
        with torch.enable_grad():
            loss = closure()
        require_tensor("the loss that the closure returns", loss)
        if loss.numel() != 1:
            raise ShapeError(f"the closure must return one loss, got shape {tuple(loss.shape)}. Take the mean.")
        units = self._units()
        _check_finite(loss, [p for params in units for p in params])
        taken = list[tuple[list[Tensor], Params, Any]]()
        for params in units:
            named = {str(place): p.detach() for place, p in enumerate(params)}
            grads = {name: p.grad for name, p in zip(named, params, strict=True) if p.grad is not None}
            state = self.state[params[0]]["rule"] if params[0] in self.state else self.rule.init(named)
            delta, state = self.rule.update(grads, state, named, loss.detach().reshape(()))
            taken.append((params, delta, state))
        _check_steps([part for _, delta, _ in taken for part in delta.values()])
        for params, delta, state in taken:
            self.state[params[0]] = {"rule": state}
            for place, p in enumerate(params):
                p.add_(delta[str(place)])
        return loss

    def _units(self) -> list[list[Tensor]]:
        """Returns what the rule sees together."""
        params = [p for group in self.param_groups for p in group["params"]]
        active = [p for p in params if p.grad is not None]
        if not self.joint:
            return [[p] for p in active]
        if active and len(active) < len(params):
            raise SettingError(
                f"with joint=True all parameters take a step together, but {len(params) - len(active)} of "
                f"{len(params)} have no gradient. Pass only those that are trained."
            )
        return [active] if active else []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of a run, so that it goes on bit for bit.

        Args:
            state_dict: As returned by ``state_dict``. Its tensors go to the devices of the parameters.

        Raises:
            SettingError: If it is that of another kind of optimizer. Nothing has changed then.
        """
        if any(state.keys() != {"rule"} for state in state_dict["state"].values()):
            raise SettingError("the state is not that of a RuleOptimizer. Load it into an optimizer of its own kind.")
        super().load_state_dict(state_dict)
        # torch has put the state into the dtypes of the parameters; that of a rule has its own.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]["rule"]
                self.state[p]["rule"] = mapped(lambda tensor, p=p: tensor.to(p.device, copy=True), saved)


def _check_steps(steps: list[Tensor]) -> None:
    """Refuses steps that are NaN or infinite, by one norm of all."""
    if not bool(_largest(steps).isfinite()):
        raise NonFiniteError(
            "the rule answers with steps that are NaN or infinite, which would go into the parameters. Lower its rate, "
            "or look at what it has learned."
        )


def _check_finite(loss: Tensor, params: list[Tensor]) -> None:
    """Refuses a loss or gradients that are NaN or infinite, by one norm of all."""
    grads = [_dense(p.grad) for p in params if p.grad is not None]
    if bool(loss.isfinite().all() & _largest(grads).isfinite()):
        return
    bad = [tuple(p.shape) for p, grad in zip(params, grads, strict=True) if not grad.isfinite().all()]
    what = f"{len(bad)} of {len(params)} gradients, the first of shape {bad[0]}, are" if bad else "the loss is"
    raise NonFiniteError(
        f"{what} NaN or infinite, and a step would carry that into the parameters. Look for the cause in data and "
        "loss; skip this step, or take smaller ones."
    )


def _largest(tensors: list[Tensor]) -> Tensor:
    """Returns the largest absolute value of all; NaN and infinity come through."""
    return get_total_norm([part for part in map(_dense, tensors) if part.numel()], math.inf)


def _dense(tensor: Tensor) -> Tensor:
    """Returns the numbers of a tensor that may be sparse."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor
