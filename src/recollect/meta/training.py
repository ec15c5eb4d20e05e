"""How a rule is learned: unroll its steps on a family of problems, and make the losses along the way smaller.

Two trainers with one interface: ``Backpropagation`` goes back through the steps, ``EvolutionStrategy`` needs no
derivative of them. A third, ``guided.GuidedPolicySearch``, keeps to fixed problems.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from recollect.adaptation.rules import Params, Rule
from recollect.errors import NonFiniteError, SettingError, require, require_number, require_whole
from recollect.meta.coordinates import mapped
from recollect.meta.objectives import Problem

_OPTIMIZER = "a torch.optim.Optimizer of the rule's parameters, such as torch.optim.Adam(rule.parameters())"


class Trajectory(NamedTuple):
    """What came of some steps of a rule."""

    losses: Float[Tensor, "t *b"]
    """At the start and after each step."""
    params: Params
    """Where the steps ended."""
    state: Any
    """The rule's state there."""


def unrolled(rule: Rule, problem: Problem, *, steps: int, state: Any = None, first_order: bool = True) -> Trajectory:
    """Takes some steps of a rule; the losses along the way are differentiable in the rule's parameters.

    ``theta_{t+1} = theta_t + rule(gradient, loss at theta_t)``. Under ``torch.no_grad()`` nothing is kept for a
    derivative: so a rule is evaluated.

    Args:
        rule: Any rule; one that is to be learned has parameters that require a gradient.
        problem: One problem, or many side by side. If its start requires a gradient, the losses are differentiable in
            it too.
        steps: How many.
        state: The rule's state, to go on where a trajectory ended; that before the first step when None.
        first_order: Whether the gradients and losses that the rule reads are taken as numbers (Andrychowicz et al.
            2016, Ravi and Larochelle 2017), so that no second derivatives of the problem are needed.

    Raises:
        SettingError: If ``steps`` is no whole number of at least 0, or ``rule`` or ``problem`` something else.

    Example:
        >>> from recollect import rules
        >>> from recollect.meta.objectives import quadratics
        >>> with torch.no_grad():
        ...     losses = unrolled(rules.sgd(0.01), quadratics(8), steps=20).losses
        >>> losses.shape, bool((losses[-1] < losses[0]).all())
        (torch.Size([21, 8]), True)
    """
    require_whole("steps", steps, low=0)
    require_task(rule, problem)
    objective, params = problem
    state = rule.init(params) if state is None else state
    tracked, losses = torch.is_grad_enabled(), list[Tensor]()
    exact = tracked and not first_order
    for _ in range(steps):
        with torch.enable_grad():
            at = {name: p if tracked and p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
            loss = objective(at)
            # No problem's loss depends on another problem's parameters: the gradient of the sum is that of each.
            parts = torch.autograd.grad(
                loss.sum(), tuple(at.values()), retain_graph=tracked, create_graph=exact, materialize_grads=True
            )
        losses.append(loss if tracked else loss.detach())
        grads = dict(zip(at, parts, strict=True))
        delta, state = rule.update(grads, state, params, loss if exact else loss.detach())
        params = {name: p + delta[name] for name, p in params.items()}
    return Trajectory(torch.stack([*losses, objective(params)]), params, state)


@runtime_checkable
class Trainer(Protocol):
    """How a rule's parameters are changed by one batch of problems."""

    def step(
        self, rule: Rule, problem: Problem, *, optimizer: Optimizer, generator: torch.Generator | None = None
    ) -> Float[Tensor, " t"]:
        """Changes the parameters that ``optimizer`` holds, and returns the mean losses along the steps."""
        ...


@dataclass(frozen=True)
class Backpropagation:
    """Trains a rule by gradients that go back through its own steps.

    The meta-loss is ``sum_t w_t f(theta_t)``, the final point included, as a mean over the problems.

    Paper: Andrychowicz et al. (2016), Section 2. In their code 100 steps in parts of 20, one step of Adam (rate 1e-3)
    after each part.

    Args:
        steps: Of the rule on each problem (100 in the code).
        truncation: After how many steps the parameters are changed and derivatives cut off (20 in the code); only at
            the end when None.
        first_order: See ``unrolled``. False for derivatives of all that a step depends on.
        weights: w_t of the start and of the point after each step; all 1 when None, as in the paper's experiments.
        clip: The largest norm of the meta-gradient; none when None.

    Raises:
        SettingError: If a setting is outside its range, or the weights are not ``steps + 1`` numbers.

    Example:
        >>> from recollect.meta.learned_optimizer import LSTMOptimizer
        >>> from recollect.meta.objectives import quadratics
        >>> rule = LSTMOptimizer(p=None, scale=1.0)
        >>> adam = torch.optim.Adam(rule.parameters(), lr=1e-3)
        >>> Backpropagation(steps=10, truncation=5).step(rule, quadratics(16), optimizer=adam).shape
        torch.Size([11])
    """

    steps: int = 100
    truncation: int | None = 20
    first_order: bool = True
    weights: tuple[float, ...] | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        if self.truncation is not None:
            require_whole("truncation", self.truncation)
        if self.clip is not None:
            require_number("clip", self.clip, above=0.0)
        _check_weights(self.weights, self.steps)

    def step(
        self, rule: Rule, problem: Problem, *, optimizer: Optimizer, generator: torch.Generator | None = None
    ) -> Float[Tensor, " t"]:
        """Changes the parameters after each part of the steps, and returns the mean losses at all points.

        Args:
            rule: The rule.
            problem: Many problems side by side.
            optimizer: Holds the rule's parameters.
            generator: Not needed: nothing is random here.

        Raises:
            SettingError: If an argument is something else, or the rule has nothing to learn.
            NonFiniteError: If the meta-loss is not finite. The parameters stay as they were before that part.
        """
        require_task(rule, problem)
        require_optimizer(optimizer)
        state, means = rule.init(problem.start), list[Tensor]()
        length = self.truncation or self.steps
        for begin in range(0, self.steps, length):
            steps = min(length, self.steps - begin)
            part = unrolled(rule, problem, steps=steps, state=state, first_order=self.first_order)
            curve = _mean(part.losses)
            backward(_meta_loss(curve, self.weights, begin), optimizer)
            if self.clip is not None:
                nn.utils.clip_grad_norm_(_held(optimizer), self.clip)
            optimizer.step()
            problem = problem._replace(start=mapped(Tensor.detach, part.params))
            state = mapped(Tensor.detach, part.state)
            means.append(curve.detach()[0 if begin == 0 else 1 :])
        return torch.cat(means)


@dataclass(frozen=True)
class EvolutionStrategy:
    """Trains a rule without derivatives of its steps: it tries random changes of its parameters, and their opposites.

    The gradient of the meta-loss F is estimated as the mean over pairs of ``e (F(phi + s e) - F(phi - s e)) / (2 s)``,
    e standard normal. Both rules of a pair take their steps on the same problems.

    Source: Salimans et al. (2017), "Evolution strategies as a scalable alternative to reinforcement learning".

    Args:
        steps: Of the rule on each problem (40 in Li and Malik 2017).
        pairs: How many pairs are tried for one change of the parameters (our choice).
        deviation: s (our choice).
        weights: As in ``Backpropagation``.

    Raises:
        SettingError: If a setting is outside its range, or the weights are not ``steps + 1`` numbers.

    Example:
        >>> from recollect.meta.objectives import logistic_regression
        >>> from recollect.meta.policy import Policy
        >>> policy, g = Policy(4), torch.Generator().manual_seed(0)
        >>> adam = torch.optim.Adam(policy.parameters(), lr=1e-3)
        >>> EvolutionStrategy(pairs=2).step(policy, logistic_regression(9), optimizer=adam, generator=g).shape
        torch.Size([41])
    """

    steps: int = 40
    pairs: int = 16
    deviation: float = 0.003
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        require_whole("pairs", self.pairs)
        require_number("deviation", self.deviation, above=0.0)
        _check_weights(self.weights, self.steps)

    @torch.no_grad()
    def step(
        self, rule: Rule, problem: Problem, *, optimizer: Optimizer, generator: torch.Generator | None = None
    ) -> Float[Tensor, " t"]:
        """Changes the parameters once, and returns the mean losses of all rules that were tried.

        Args:
            rule: The rule.
            problem: Many problems side by side.
            optimizer: Holds the rule's parameters.
            generator: Draws the changes; torch's global random state does when None.

        Raises:
            SettingError: If an argument is something else, or the rule has nothing to learn.
            NonFiniteError: If a meta-loss is not finite. The parameters stay as they were.
        """
        require_task(rule, problem)
        require_optimizer(optimizer)
        params, curves = _held(optimizer), list[Tensor]()
        kept = [p.clone() for p in params]
        gradients = [torch.zeros_like(p) for p in params]
        try:
            for _ in range(self.pairs):
                noise = [torch.empty_like(p).normal_(generator=generator) for p in params]
                for sign in (1, -1):
                    for p, center, part in zip(params, kept, noise, strict=True):
                        p.copy_(center + sign * self.deviation * part)
                    curves.append(_mean(unrolled(rule, problem, steps=self.steps).losses))
                    slope = _meta_loss(curves[-1], self.weights, 0) * sign / (2 * self.deviation * self.pairs)
                    for gradient, part in zip(gradients, noise, strict=True):
                        gradient.add_(slope * part)
        finally:
            for p, center in zip(params, kept, strict=True):
                p.copy_(center)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        return torch.stack(curves).mean(0)


def train(
    rule: Rule,
    family: Callable[[torch.Generator | None], Problem],
    *,
    optimizer: Optimizer,
    trainer: Trainer,
    iterations: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "i t"]:
    """Trains a rule on ever new problems, and returns the mean losses along the steps of each iteration.

    Args:
        rule: The rule.
        family: Draws new problems by a generator.
        optimizer: Holds the rule's parameters. (Adam with a rate of 1e-3 in the code of Andrychowicz et al. 2016.)
        trainer: ``Backpropagation``, ``EvolutionStrategy``, or ``GuidedPolicySearch`` if the problems stay the same.
        iterations: How many times problems are drawn.
        generator: Draws problems, and what the trainer needs; torch's global random state does when None.

    Raises:
        SettingError: If ``iterations`` is no whole number above 0, or another argument something else.
        NonFiniteError: If a meta-loss is not finite.

    Example:
        >>> from recollect.meta.learned_optimizer import LSTMOptimizer
        >>> from recollect.meta.objectives import quadratics
        >>> g = torch.Generator().manual_seed(0)
        >>> rule = LSTMOptimizer(p=None, scale=1.0, generator=g)
        >>> adam = torch.optim.Adam(rule.parameters(), lr=1e-2)
        >>> trainer = Backpropagation(steps=20)
        >>> family = lambda g: quadratics(16, generator=g)
        >>> curves = train(rule, family, optimizer=adam, trainer=trainer, iterations=20, generator=g)
        >>> bool(curves[-1].sum() < curves[0].sum())
        True
    """
    require_whole("iterations", iterations)
    if not callable(family):
        raise SettingError(
            "family must be a function that draws a Problem by a generator, such as "
            f"lambda g: quadratics(16, generator=g), got {family!r}."
        )
    require("trainer", trainer, Trainer, "Backpropagation(...) or EvolutionStrategy(...)")
    curves = [
        trainer.step(rule, family(generator), optimizer=optimizer, generator=generator) for _ in range(iterations)
    ]
    return torch.stack(curves)


def require_task(rule: Rule, problem: Problem) -> None:
    """Refuses what is no rule, or no problem.

    Raises:
        SettingError: If it is not.
    """
    require("rule", rule, Rule, "a rule with init and update, such as LSTMOptimizer()")
    require("problem", problem, Problem, "a Problem(objective, start), such as quadratics(8)")


def require_optimizer(optimizer: Optimizer) -> None:
    """Refuses what is no optimizer, or holds nothing to change.

    Raises:
        SettingError: If it does not.
    """
    require("optimizer", optimizer, Optimizer, _OPTIMIZER)
    if not _held(optimizer):
        raise SettingError(
            "the optimizer must hold parameters that require a gradient, got none: nothing could be learned. Call "
            "rule.requires_grad_() first."
        )


def backward(loss: Float[Tensor, ""], optimizer: Optimizer) -> None:
    """Computes the gradients of a loss, in place of those that the optimizer's parameters have.

    Raises:
        SettingError: If it depends on none of them.
    """
    optimizer.zero_grad()
    if loss.requires_grad:
        loss.backward()
    if all(p.grad is None for p in _held(optimizer)):
        raise SettingError(
            "the rule's steps must depend on parameters that the optimizer holds and that require a gradient, got "
            "steps that depend on none. Pass the optimizer of this rule, and leave torch.no_grad()."
        )


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _mean(losses: Float[Tensor, "t *b"]) -> Float[Tensor, " t"]:
    return losses.reshape(len(losses), -1).mean(1)


def _meta_loss(curve: Float[Tensor, " t"], weights: tuple[float, ...] | None, begin: int) -> Float[Tensor, ""]:
    total = curve.sum() if weights is None else curve @ curve.new_tensor(weights[begin : begin + len(curve)])
    if not total.isfinite():
        raise NonFiniteError(
            f"the losses of steps {begin} to {begin + len(curve) - 1} sum to {total.item()}: the rule's steps diverge. "
            "Take smaller ones (scale, fewer steps), a lower rate of its optimizer, or clip=."
        )
    return total


def _check_weights(weights: tuple[float, ...] | None, steps: int) -> None:
    if weights is not None and len(weights) != steps + 1:
        raise SettingError(
            f"weights must be {steps + 1} numbers, for the start and for each of {steps} steps, got {len(weights)}."
        )
    for weight in weights or ():
        require_number("each of weights", weight)
