"""Penalties that hold a network's parameters near what they were: EWC and MAS.

Each is a module that is called for its scalar, ``loss + penalty()``, and told when a task ends, ``penalty.consolidate(
data)``. None of them needs to know which task an example belongs to.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.continual.anchors import Anchors
from recollect.continual.examples import Examples
from recollect.continual.importance import importances
from recollect.continual.outputs import Outputs, checked_labels, require_matrix, restricted
from recollect.errors import FormatError, SettingError, require, require_choice, require_number
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
        self.register_load_state_dict_pre_hook(_refuse_terms)

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
            SettingError, ShapeError, DtypeError, LabelError: If the data do not fit.
            NonFiniteError: If a parameter or an importance is not finite. The penalty stays as it was, as always.
        """
        task = restricted(self._directions, outputs)
        drawn = self._generator.get_state()
        try:
            totals, count = importances(self.network, data, task, power=2, names=self.anchors.names)
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
    def network(self) -> nn.Module:
        """The network that is held."""
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
        decay = f", decay={self.decay}" if self.tasks == "online" else ""
        return f"strength={self.strength}, fisher={self.fisher!r}, tasks={self.tasks!r}{decay}, {self.likelihood}"


def _refuse_terms(penalty: EWC, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    saved = (tensor for name, tensor in state.items() if name.startswith(f"{prefix}anchors.importance:"))
    if penalty.tasks != "separate" and any(len(tensor) > 1 for tensor in saved):
        raise FormatError(
            f"this is the state of a penalty with tasks='separate', and this one has tasks={penalty.tasks!r}. Make it "
            "with tasks='separate'."
        )


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

    @property
    def network(self) -> nn.Module:
        """The network that is held."""
        return self.anchors.network

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
            SettingError, ShapeError, DtypeError: If the data do not fit.
            NonFiniteError: If a parameter or an importance is not finite. The penalty stays as it was, as always.
        """
        task = restricted(lambda outputs, _: iter([2 * outputs]), outputs)
        totals, examples = importances(
            self.anchors.network, data, lambda full, _: task(full, None), power=1, names=self.anchors.names
        )
        self.count += 1
        new = {name: total / examples for name, total in totals.items()}
        if self.anchors.terms and self.accumulate != "last":
            old = {name: self.anchors.importance(name)[0] for name in new}
            if self.accumulate == "sum":
                new = {name: old[name] + part for name, part in new.items()}
            else:
                new = {name: old[name] + (part - old[name]) / self.count for name, part in new.items()}
        self.anchors.replace(new)

    def extra_repr(self) -> str:
        return f"strength={self.strength}, accumulate={self.accumulate!r}"
