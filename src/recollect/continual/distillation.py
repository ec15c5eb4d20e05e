"""Learning without forgetting: the network as it was teaches the network as it becomes."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.continual.examples import Examples
from recollect.continual.modes import is_aside
from recollect.continual.outputs import Outputs, output_mask
from recollect.errors import SettingError, ShapeError, require, require_number


class LwF(nn.Module):
    """Learning without forgetting: ``strength * T^2 * KL(softmax(old / T) || softmax(new / T))``, a mean over examples.

    The teacher is the network as it was when the last task ended. The examples are those of the network's last call
    with gradients: in ``loss(net(x), y) + penalty()`` the new task's own.

    Source: Li & Hoiem, 2016 (arXiv 1606.09282), T = 2. *Differs from the paper*: ``T^2`` keeps the gradients' size at
    any temperature; divergence in place of cross entropy, which differ by what does not depend on the network.

    Args:
        network: Maps inputs to logits ``(b, c)``.
        strength: lambda. Choose it on validation data.
        temperature: T.

    Raises:
        SettingError: If a setting is out of range.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2)
        >>> penalty = LwF(net)
        >>> penalty.consolidate()
        >>> logits = net(torch.eye(3))
        >>> penalty().item()  # nothing has been learned since
        0.0
    """

    groups: Tensor

    def __init__(self, network: nn.Module, strength: float = 1.0, *, temperature: float = 2.0) -> None:
        super().__init__()
        require("network", network, nn.Module, "a torch.nn.Module")
        require_number("strength", strength, low=0.0)
        require_number("temperature", temperature, above=0.0)
        self.strength = strength
        self.temperature = temperature
        self.teacher: nn.Module | None = None
        self.register_buffer("groups", torch.zeros(0, 0, dtype=torch.bool))  # outputs that make one distribution
        self._network = (network,)  # in a tuple: a submodule would come into parameters() and state_dict()
        self._seen: tuple[Any, Tensor] | None = None
        self._watch()
        self.register_load_state_dict_pre_hook(_make_room)

    def _watch(self) -> None:
        self._handle = self._network[0].register_forward_hook(_Watch(self), with_kwargs=True)

    @property
    def network(self) -> nn.Module:
        """The network that is taught."""
        return self._network[0]

    def forward(self) -> Float[Tensor, ""]:
        """Returns the penalty for the network's last call with gradients; 0 before a task has ended.

        Raises:
            SettingError: If the network has not been called since this was called last.
            ShapeError: If the logits are not ``(b, c)`` or fewer than they were.
        """
        if self.teacher is None:
            return next(self._network[0].parameters()).new_zeros(())
        if self._seen is None:
            raise SettingError(
                "LwF needs the network's outputs: call network(inputs), with gradients, before the penalty."
            )
        ((args, kwargs), new), self._seen = self._seen, None
        with torch.no_grad():
            old = self.teacher.eval()(*args, **kwargs)
        if new.dim() != 2 or new.shape != old.shape:
            raise ShapeError(f"logits must be (b, c), as they were, {tuple(old.shape)}, got {tuple(new.shape)}.")
        total = new.new_zeros(())
        if self.groups.shape[1] > new.shape[1]:
            raise ShapeError(
                f"a task was said to have output {self.groups.shape[1] - 1}, but there are {new.shape[1]}."
            )
        for group in [g.nonzero().squeeze(1) for g in self.groups] or [slice(None)]:
            teacher = (old[:, group] / self.temperature).log_softmax(-1)
            student = (new[:, group] / self.temperature).log_softmax(-1)
            total = total + nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.strength * self.temperature**2 * total

    def consolidate(self, data: Examples | None = None, *, outputs: Outputs | None = None) -> None:
        """Makes the network, as it is, the teacher.

        Args:
            data: Not looked at; here so that all penalties are called alike.
            outputs: The outputs that the task has. Each task's make a distribution of their own; outputs that
                include an earlier task's take its place, so passing all classes seen so far makes a single one. None:
                all outputs.

        Raises:
            SettingError: If ``outputs`` are not numbers of outputs.
        """
        teacher = self._copy()
        if outputs is None:
            self.groups = self.groups.new_zeros(0, 0)
        else:
            new = output_mask(outputs)
            size = max(self.groups.shape[1], len(new))
            old, new = (nn.functional.pad(mask, (0, size - mask.shape[-1])) for mask in (self.groups, new))
            self.groups = torch.cat([old[(old & ~new.to(old)).any(1)], new.to(old).unsqueeze(0)])
        self.teacher = teacher
        self._seen = None

    @torch.inference_mode(mode=False)
    def _copy(self) -> nn.Module:
        self._handle.remove()
        try:
            return copy.deepcopy(self._network[0]).requires_grad_(requires_grad=False).eval()
        finally:
            self._watch()

    def __getstate__(self) -> dict[str, Any]:  # for copies: of this and the network together, and of this alone
        return {name: value for name, value in self.__dict__.items() if name not in {"_handle", "_seen"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = None
        self._watch()

    def extra_repr(self) -> str:
        return f"strength={self.strength}, temperature={self.temperature}"


class _Watch:
    """Notes the calls of a network for a penalty. Copies of the network keep one that does nothing."""

    def __init__(self, penalty: LwF | None = None) -> None:
        self._penalty = penalty

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        penalty = self._penalty
        if penalty is None or penalty.teacher is None:
            return
        if torch.is_grad_enabled() and not is_aside():
            penalty._seen = ((args, kwargs), output)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Watch":
        return _Watch()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Watch, ()


def _make_room(penalty: LwF, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    groups = state.get(f"{prefix}groups")
    if isinstance(groups, Tensor) and groups.dim() == 2:
        penalty.groups = penalty.groups.new_zeros(groups.shape)
    taught = any(name.startswith(f"{prefix}teacher.") for name in state)
    if taught and penalty.teacher is None:
        penalty.teacher = penalty._copy()
    elif not taught:
        penalty.teacher = None
