"""Penalties that hold a network's parameters near what they were: EWC, MAS and SI.

Each is a module that is called for its scalar, ``loss + penalty()``, and told when a task ends, ``penalty.consolidate(
data)``. None of them needs to know which task an example belongs to.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.continual.anchors import Anchors, buffer_name
from recollect.continual.examples import Examples
from recollect.continual.importance import importances
from recollect.continual.outputs import Outputs, checked_labels, require_matrix, restricted
from recollect.errors import SettingError, require, require_choice, require_number
from recollect.likelihoods import Categorical, Gaussian, Likelihood


class EWC(nn.Module):
    """Elastic weight consolidation: ``strength / 2 * sum_t sum_i F_ti (theta_i - theta*_ti)^2``.

    ``F_t`` is the diagonal of the Fisher information at the end of task t, the mean over examples of squared gradients
    of the log-likelihood, each example's squared by itself. With losses that are means over examples, ``strength=1`` is
    the Laplace approximation for tasks of equal size.

    Source: Kirkpatrick et al., 2017 (arXiv 1612.00796); which Fisher: van de Ven, 2025 (arXiv 2502.11756); online:
    Schwarz et al., 2018 (arXiv 1805.06370).

    Args:
        network: Maps inputs to outputs, each row by itself. Parameters that require no gradient now are left alone.
        strength: lambda. Choose it on validation data, over orders of magnitude.
        fisher: ``"exact"`` takes the expectation over all labels under the network's own prediction, one backward pass
            for each output; ``"sampled"`` draws one label for each example; ``"empirical"`` takes the data's.
        tasks: ``"merged"`` is the same sum over tasks in two tensors for each parameter, however many tasks there are;
            ``"separate"`` keeps two for each task; ``"online"`` is another penalty: importances decay and add up, and
            the anchor is where the last task ended.
        decay: What is left of the importances when another task is added; online only.
        likelihood: ``Categorical()`` for logits, ``Gaussian()`` for regression.
        generator: Draws the labels of ``"sampled"``; one of its own, seeded with 0, where None is given.

    Raises:
        SettingError: If a setting is out of range, or the network has no trainable parameter.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2)
        >>> penalty = EWC(net, strength=10.0)
        >>> penalty.consolidate((torch.eye(3), torch.tensor([0, 1, 1])))
        >>> penalty().item()  # where the task ended
        0.0
        >>> _ = torch.nn.init.zeros_(net.bias)
        >>> penalty().item() > 0
        True
    """

    def __init__(
        self,
        network: nn.Module,
        strength: float = 1.0,
        *,
        fisher: Literal["exact", "sampled", "empirical"] = "exact",
        tasks: Literal["merged", "separate", "online"] = "merged",
        decay: float = 1.0,
        likelihood: Likelihood = Categorical(),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_number("strength", strength, low=0.0)
        require_choice("fisher", fisher, ("exact", "sampled", "empirical"))
        require_choice("tasks", tasks, ("merged", "separate", "online"))
        require("likelihood", likelihood, Likelihood, "a likelihood, such as Categorical()")
        require_number("decay", decay, low=0.0)
        if decay > 1 or (decay != 1 and tasks != "online"):
            raise SettingError(f"decay must be from 0 to 1, and only tasks='online' decays, got {decay} for {tasks!r}.")
        if fisher != "empirical" and not isinstance(likelihood, Categorical | Gaussian):
            raise SettingError(
                f"the {fisher} Fisher information is known for Categorical and Gaussian, got {likelihood!r}. "
                "Use fisher='empirical'."
            )
        self.strength = strength
        self.fisher = fisher
        self.tasks = tasks
        self.decay = decay
        self.likelihood = likelihood
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.anchors = Anchors(network)

    def forward(self) -> Float[Tensor, ""]:
        """Returns the penalty at the network's present parameters."""
        return 0.5 * self.strength * self.anchors()

    def add_gradient(self) -> None:
        """Adds the penalty's gradient to ``.grad``: after ``loss.backward()``, what adding it to the loss would do.

        It takes half the time, and leaves no value to be seen.
        """
        self.anchors.add_gradient(0.5 * self.strength)

    @torch.inference_mode(mode=False)
    def consolidate(self, data: Examples, *, outputs: Outputs | None = None) -> None:
        """Measures the Fisher information on a task that has been learned, and holds the network to where it is.

        Args:
            data: The task's examples: a pair ``(inputs, labels)`` of tensors or an iterable of such pairs, such as a
                ``DataLoader``. Inputs are enough unless ``fisher="empirical"``.
            outputs: The outputs that the task has, where the network has more; labels are numbers of outputs still.

        Raises:
            SettingError, ShapeError, DtypeError, LabelError: If the data do not fit. The penalty stays as it was.
        """
        task = restricted(self._directions, outputs)
        drawn = self._generator.get_state()
        try:
            totals, count = importances(self._network, data, task, power=2, names=self.anchors.names)
        except BaseException:
            self._generator.set_state(drawn)
            raise
        means = {name: total / count for name, total in totals.items()}
        if self.tasks == "merged":
            self.anchors.merge(means)
        elif self.tasks == "separate":
            self.anchors.append(means)
        else:
            if self.anchors.terms:
                means = {name: mean + self.decay * self.anchors.importance(name)[0] for name, mean in means.items()}
            self.anchors.replace(means)

    @property
    def _network(self) -> nn.Module:
        return self.anchors.network

    def _directions(self, outputs: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        """Yields vectors v such that the Fisher information is the sum of ``(J^T v)^2``."""
        if self.fisher == "empirical":
            yield self.likelihood.gradient(outputs, checked_labels(outputs, labels, self.likelihood))
        elif isinstance(self.likelihood, Gaussian):
            yield from self._gaussian(outputs, self.likelihood.variance**-0.5)
        elif self.fisher == "sampled":
            chances = outputs.softmax(-1).cpu()
            drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=self._generator)
            yield self.likelihood.gradient(outputs, drawn.view(outputs.shape[:-1]).to(outputs.device))
        else:
            require_matrix(outputs)
            roots = (0.5 * outputs.log_softmax(-1)).exp()
            for label in range(outputs.shape[1]):
                labels = torch.full((len(outputs),), label, device=outputs.device)
                yield roots[:, label : label + 1] * self.likelihood.gradient(outputs, labels)

    def _gaussian(self, outputs: Tensor, scale: float) -> Iterator[Tensor]:
        if self.fisher == "sampled":
            drawn = torch.randn(outputs.shape, generator=self._generator)
            yield scale * drawn.to(outputs)
        else:
            require_matrix(outputs)
            for place in range(outputs.shape[1]):
                direction = torch.zeros_like(outputs)
                direction[:, place] = scale
                yield direction

    def get_extra_state(self) -> Tensor:
        """The state of the generator, for ``state_dict``."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes up the state of the generator."""
        self._generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        return f"strength={self.strength}, fisher={self.fisher!r}, tasks={self.tasks!r}"


class MAS(nn.Module):
    """Memory aware synapses: ``strength * sum_i Omega_i (theta_i - theta*_i)^2``, importances without labels.

    ``Omega`` is the mean over examples of ``|d ||f(x)||^2 / d theta|``, the absolute value taken for each example by
    itself. The anchor is where the last task ended.

    Source: Aljundi et al., 2018 (arXiv 1711.09601). The loss there is a sum over examples: beside a mean loss the same
    strength weighs as many times more as a batch has examples.

    Args:
        network: Maps inputs to outputs, each row by itself; what the outputs mean does not matter.
        strength: lambda. Choose it on validation data, over orders of magnitude.
        accumulate: What becomes of earlier importances: ``"sum"`` adds up (the official code), ``"average"`` takes the
            mean over all tasks so far, ``"last"`` forgets them.

    Raises:
        SettingError: If a setting is out of range, or the network has no trainable parameter.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2)
        >>> penalty = MAS(net, strength=1.0)
        >>> penalty.consolidate(torch.eye(3))  # no labels
        >>> penalty().item()
        0.0
    """

    count: Tensor

    def __init__(
        self, network: nn.Module, strength: float = 1.0, *, accumulate: Literal["sum", "average", "last"] = "sum"
    ) -> None:
        super().__init__()
        require_number("strength", strength, low=0.0)
        require_choice("accumulate", accumulate, ("sum", "average", "last"))
        self.strength = strength
        self.accumulate = accumulate
        self.anchors = Anchors(network)
        self.register_buffer("count", torch.tensor(0))

    def forward(self) -> Float[Tensor, ""]:
        """Returns the penalty at the network's present parameters."""
        return self.strength * self.anchors()

    def add_gradient(self) -> None:
        """Adds the penalty's gradient to ``.grad``, as ``EWC.add_gradient`` does."""
        self.anchors.add_gradient(self.strength)

    @torch.inference_mode(mode=False)
    def consolidate(self, data: Examples, *, outputs: Outputs | None = None) -> None:
        """Measures the importances on a task that has been learned, and holds the network to where it is.

        Args:
            data: The task's inputs, or anything that has them: see ``EWC.consolidate``. Labels are not looked at.
            outputs: The outputs that the task has, where the network has more.

        Raises:
            SettingError, ShapeError, DtypeError: If the data do not fit. The penalty stays as it was.
        """

        task = restricted(lambda outputs, _: iter([2 * outputs]), outputs)
        totals, examples = importances(
            self.anchors.network, data, lambda full, _: task(full, None), power=1, names=self.anchors.names
        )
        self.count += 1
        new = {name: total / examples for name, total in totals.items()}
        if self.anchors.terms and self.accumulate != "last":
            share = 1.0 / float(self.count) if self.accumulate == "average" else 1.0
            kept = 1.0 - share if self.accumulate == "average" else 1.0
            new = {name: kept * self.anchors.importance(name)[0] + share * part for name, part in new.items()}
        self.anchors.replace(new)

    def extra_repr(self) -> str:
        return f"strength={self.strength}, accumulate={self.accumulate!r}"


class SI(nn.Module):
    """Synaptic intelligence: ``strength * sum_i omega_i (theta_i - theta*_i)^2``, importances along the way.

    Each step of the optimizer adds ``-g * (change of theta)`` to a parameter's path integral, ``g`` the gradient of the
    loss *without* the penalty. At a task's end ``omega <- max(0, omega + path / ((theta - theta*)^2 + damping))``.

    Source: Zenke et al., 2017 (arXiv 1703.04200), and the authors' code, which has 0.1 for strength and damping on
    permuted MNIST.

    Args:
        network: Whose parameters are held.
        optimizer: Trains them. Its steps are watched from now on; a new one is watched after ``watch(optimizer)``.
        strength: c. Choose it on validation data, over orders of magnitude.
        damping: xi.

    The gradient is what backward passes have added to ``.grad`` since it was zeroed, less the penalty's part, before
    any clipping. A loss that is scaled (``GradScaler``) scales the importances with it.

    Raises:
        SettingError: If a setting is out of range, or the network has no trainable parameter.

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
        self._before: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}  # the penalty's part of what is about to be added to .grad,
        self._own: dict[str, Tensor] = {}  # of what is in .grad,
        self._loss: dict[str, Tensor] = {}  # and the rest of it
        self._handles: list[Any] = []
        self.watch(optimizer)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follows the steps of this optimizer instead of the one before."""
        require("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        for handle in self._handles:
            handle.remove()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ]
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

    def _begin(self) -> None:
        self._before = {name: p.detach().clone() for name, p in self.anchors.live().items()}

    def _end(self) -> None:
        for name, p in self.anchors.live().items():
            if p.grad is not None and name in self._loss:
                moved = p.detach() - self._before[name]
                self.get_buffer(buffer_name("path", name)).sub_(self._loss[name] * moved)
        self._before, self._own, self._loss = {}, {}, {}

    @torch.inference_mode(mode=False)
    def consolidate(self, data: Examples | None = None, *, outputs: Outputs | None = None) -> None:
        """Turns the path into importances, and holds the network to where it is.

        Args:
            data: Not looked at; here so that all penalties are called alike.
            outputs: Not looked at.
        """
        omega: dict[str, Tensor] = {}
        for name, p in self.anchors.live().items():
            path, start = self.get_buffer(buffer_name("path", name)), self.get_buffer(buffer_name("start", name))
            gained = path / ((p.detach() - start).square() + self.damping)
            omega[name] = (gained + self.anchors.importance(name).sum(0)).clamp_(min=0)
            path.zero_()
            start.copy_(p.detach())
        self.anchors.replace(omega)

    def extra_repr(self) -> str:
        return f"strength={self.strength}, damping={self.damping}"
