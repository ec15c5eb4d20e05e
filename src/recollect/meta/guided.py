"""Guided policy search: a controller for each problem finds the way, and the policy learns to go it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from recollect.adaptation.rules import Params, Rule
from recollect.errors import NonFiniteError, SettingError, ShapeError, require_number, require_whole
from recollect.meta.coordinates import flatten, unflatten
from recollect.meta.linear_gaussian import LinearGaussian, Quadratic, divergence, lqr, regression, surprise, times
from recollect.meta.objectives import Problem
from recollect.meta.training import backward, require_optimizer, require_task, unrolled

_PENALTIES = tuple(10.0**power for power in range(-3, 4))
"""eta, relative to nu: which are tried."""


class _Memory(NamedTuple):
    """What guided policy search knows of its problems from one step to the next."""

    start: Float[Tensor, "b d"]
    """Tells whether they are the same problems."""
    controllers: LinearGaussian
    """psi_t of each problem."""
    dual: Float[Tensor, "t b d"]
    """lambda_t of each problem."""
    noise: Float[Tensor, "d d"]
    """Sigma, the covariance of the policy's steps."""


class _Sampled(NamedTuple):
    """What came of steps with noise: m samples of each problem."""

    losses: Float[Tensor, "t m b"]
    x: Float[Tensor, "t m b d"]
    """Locations: at the start and after each step, as the losses."""
    answers: Float[Tensor, "t m b d"]
    """The steps that the policy would have taken."""
    seen: list[tuple[Params, Params, Tensor]]
    """What it saw: gradients, parameters, losses."""


class _Guide:
    """A rule that takes the steps of controllers with their noise, and notes what a policy sees on the way and answers.

    Args:
        policy: The policy.
        controllers: None for the steps of the policy itself, with noise of covariance ``deviation^2 I``.
        deviation: See there.
        generator: Draws the noise.
    """

    def __init__(
        self,
        policy: Rule,
        controllers: LinearGaussian | None,
        deviation: float,
        generator: torch.Generator | None,
    ) -> None:
        self._policy = policy
        self._controllers = controllers
        self._roots = None if controllers is None else torch.linalg.cholesky(controllers.covariance)
        self._deviation = deviation
        self._generator = generator
        self.seen: list[tuple[Params, Params, Tensor]] = []
        self.answers: list[Float[Tensor, "m b d"]] = []

    def init(self, params: Params) -> tuple[int, Any]:
        return 0, self._policy.init(params)

    def update(
        self, grads: Params, state: tuple[int, Any], params: Params, loss: Float[Tensor, "m b"]
    ) -> tuple[Params, tuple[int, Any]]:
        time, inner = state
        found, inner = self._policy.update(grads, inner, params, loss)
        answer = flatten(found, loss, like=params).double()
        self.seen.append((grads, params, loss))
        self.answers.append(answer)
        noise = torch.empty_like(answer).normal_(generator=self._generator)
        if self._controllers is None or self._roots is None:
            step = answer + self._deviation * noise
        else:
            x = flatten(params, loss, like=params).double()
            step = times(self._controllers.gain[time], x) + self._controllers.offset[time]
            step = step + times(self._roots[time], noise)
        return unflatten(step, params), (time + 1, inner)


@dataclass
class GuidedPolicySearch:
    """Trains a policy by supervision: it learns to answer as controllers do, one for each problem, that know its way.

    For each training problem, controllers ``psi_t = N(K_t x + k_t, G_t)`` choose the steps ``u`` from the location x.
    They make the losses small and stay near the policy ``pi = N(mu(history), Sigma)``, which learns their steps; where
    the two differ on average, the multipliers lambda pull them together. One ``step``:

    1. Take the controllers' steps with their noise, some times from the start of each problem; note the policy's
       answers mu there. (Before there are controllers: the policy's own steps, with noise ``deviation^2 I``.)
    2. ``lambda_t <- lambda_t + alpha nu E[mu - (K_t x + k_t)]``.
    3. Fit ``mu ~ N(K^_t x + k^_t, G^_t)`` to the samples: as a controller the policy is
       ``pi^_t = N(K^_t x + k^_t, G^_t + Sigma)``.
    4. The new controllers make
       ``sum_t E[f(x_{t+1}) - lambda_t' u_t] + nu KL(psi_t | pi^_t) + eta KL(psi_t | old psi_t)`` least, f by its
       second-order expansion at the mean of the samples, negative curvature taken as positive: a step is never long for
       it. eta is the least of a row of numbers with which the mean ``KL(psi_t | old psi_t)`` is within ``bound``, or
       the largest if there is none.
    5. ``Sigma <- mean(G_t^-1)^-1``. The policy's parameters make
       ``E[lambda_t' mu + nu / 2 (mu - K_t x - k_t)' G_t^-1 (mu - K_t x - k_t)]`` smaller on the samples, by a step of
       the optimizer for each sample of all problems.

    Paper: Li and Malik (2017), Section 3.2, after Levine and Abbeel (2014) and Levine et al. (2015): Bregman ADMM.

    *Differs from the paper:*

    - The state of the controllers is the location alone; there it has the last values and gradients too. The loss
      depends on the location alone, and where it leads is known: ``x_{t+1} = x_t + u_t``. So the dynamics are exact
      here. There those of values and gradients are fitted to samples, with a mixture of Gaussians as a prior. What the
      history adds to the policy's answers is part of G^ here.
    - The first trajectories are the policy's own; there those of momentum. (The experiment ``learned-optimizer`` lets
      the policy imitate momentum first.)
    - eta is one of a row, not found by dual ascent. nu does not change.
    - The policy's parameters are fitted by one pass of the optimizer over the samples in each ``step`` (ours), not by a
      full minimization.

    It remembers the controllers from step to step: pass the same problems each time. Any rule serves that can be
    differentiated in its parameters.

    Args:
        steps: Of the rule on each problem (40 in the paper).
        samples: Trajectories of each problem (20 in the paper).
        deviation: Of the noise of the first steps (our choice).
        penalty: nu (our choice).
        bound: The largest mean divergence of a step's distribution from the last one's, in nats (our choice).
        rate: alpha, of the multipliers (our choice).
        ridge: See ``regression`` (our choice).

    Raises:
        SettingError: If a setting is outside its range.

    Example:
        >>> from recollect.meta.objectives import logistic_regression
        >>> from recollect.meta.policy import Policy
        >>> g = torch.Generator().manual_seed(0)
        >>> policy, problem = Policy(4, current=True, generator=g), logistic_regression(6, generator=g)
        >>> adam = torch.optim.Adam(policy.parameters(), lr=3e-3)
        >>> search = GuidedPolicySearch(steps=10, samples=8)
        >>> curves = [search.step(policy, problem, optimizer=adam, generator=g) for _ in range(3)]
        >>> bool(curves[2].sum() < curves[0].sum())
        True
    """

    steps: int = 40
    samples: int = 20
    deviation: float = 0.1
    penalty: float = 0.01
    bound: float = 1.0
    rate: float = 0.1
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        require_whole("samples", self.samples, low=2)
        for name in ("deviation", "penalty", "bound", "ridge"):
            require_number(name, vars(self)[name], above=0.0)
        require_number("rate", self.rate, low=0.0)
        self._memory: _Memory | None = None

    def step(
        self, rule: Rule, problem: Problem, *, optimizer: Optimizer, generator: torch.Generator | None = None
    ) -> Float[Tensor, " t"]:
        """Changes controllers, multipliers and parameters once; returns the mean losses of the steps that were sampled.

        Args:
            rule: The policy.
            problem: Many problems side by side, the same at each call.
            optimizer: Holds the policy's parameters.
            generator: Draws the noise, and the order of the samples; torch's global random state does when None.

        Raises:
            SettingError: If the problems are not those of the last call, an argument is something else, or the policy
                has nothing to learn.
            ShapeError: If there are no problems side by side, with one loss for each.
            NonFiniteError: If a loss, an answer of the policy or a derivative is not finite. The parameters stay as
                they were; the next call begins anew.
        """
        require_task(rule, problem)
        require_optimizer(optimizer)
        memory, start = self._memory, _start(problem)
        if memory is not None and not torch.equal(memory.start, start):
            raise SettingError(
                "guided policy search has a controller for each problem, but these are not the problems of its last "
                "step. Pass the same ones each time, or make a new GuidedPolicySearch."
            )
        self._memory = None
        sampled = self._sample(rule, problem, memory, generator)
        memory = self._updated(memory, sampled, start)
        slopes, curvatures = _expansion(problem, sampled.x[1:].mean(1))
        controllers = self._improved(memory, self._policy(memory, sampled), slopes, curvatures)
        precision = torch.linalg.inv(controllers.covariance)
        memory = memory._replace(controllers=controllers, noise=torch.linalg.inv(precision.mean((0, 1))))
        self._supervise(rule, sampled, memory, precision, optimizer=optimizer, generator=generator)
        self._memory = memory
        return sampled.losses.mean((1, 2))

    def state_dict(self) -> dict[str, Any]:
        """Returns what it remembers of its problems."""
        if self._memory is None:
            return {}
        start, controllers, dual, noise = self._memory
        return {"start": start, **controllers._asdict(), "dual": dual, "noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned.

        Raises:
            SettingError: If it is of another number of steps.
        """
        if not state_dict:
            self._memory = None
            return
        controllers = LinearGaussian(*(state_dict[name] for name in LinearGaussian._fields))
        if len(controllers.gain) != self.steps:
            raise SettingError(
                f"the controllers that were saved take {len(controllers.gain)} steps, these steps={self.steps}. Load "
                f"them into GuidedPolicySearch(steps={len(controllers.gain)})."
            )
        self._memory = _Memory(state_dict["start"], controllers, state_dict["dual"], state_dict["noise"])

    @torch.no_grad()
    def _sample(
        self, rule: Rule, problem: Problem, memory: _Memory | None, generator: torch.Generator | None
    ) -> _Sampled:
        guide = _Guide(rule, None if memory is None else memory.controllers, self.deviation, generator)
        end = unrolled(guide, _repeated(problem, self.samples), steps=self.steps)
        if not end.losses.isfinite().all():
            raise NonFiniteError(
                "the sampled steps lead to losses that are not finite. Take a smaller deviation, fewer steps, or a "
                "policy that first learned to follow small steps."
            )
        answers = torch.stack(guide.answers)
        if not answers.isfinite().all():
            raise NonFiniteError(
                "the policy's answers are not finite. Look at its parameters: the optimizer's rate may be too high; or "
                "at the gradients of the problems."
            )
        x = [_locations(params, loss) for _, params, loss in guide.seen]
        x.append(_locations(end.params, end.losses[-1]))
        return _Sampled(end.losses, torch.stack(x), answers, guide.seen)

    def _updated(self, memory: _Memory | None, sampled: _Sampled, start: Float[Tensor, "b d"]) -> _Memory:
        """Returns the memory with new multipliers; the first controllers are the policy itself, as well as they can."""
        x, answers = sampled.x[:-1], sampled.answers
        if memory is not None:
            away = (answers - memory.controllers.mean(x)).mean(1)
            return memory._replace(dual=memory.dual + self.rate * self.penalty * away)
        noise = self.deviation**2 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        controllers = regression(x, answers, ridge=self.ridge)
        controllers = controllers._replace(covariance=noise.expand_as(controllers.covariance).clone())
        return _Memory(start, controllers, torch.zeros_like(controllers.offset), noise)

    def _policy(self, memory: _Memory, sampled: _Sampled) -> LinearGaussian:
        """Returns the policy as a controller."""
        policy = regression(sampled.x[:-1], sampled.answers, ridge=self.ridge)
        return policy._replace(covariance=policy.covariance + memory.noise)

    def _improved(
        self,
        memory: _Memory,
        policy: LinearGaussian,
        slopes: Float[Tensor, "t b d"],
        curvatures: Float[Tensor, "t b d d"],
    ) -> LinearGaussian:
        """Returns the new controllers: all penalties are tried side by side."""
        near, old = surprise(policy), surprise(memory.controllers)
        share = 1 / (1 + slopes.new_tensor(_PENALTIES))  # nu / (nu + eta)
        cost = Quadratic(*(torch.lerp(_many(b), _many(a), _like(share, a)) for a, b in zip(near, old, strict=True)))
        parts = [_many(part) * _like(share / self.penalty, part) for part in (memory.dual, curvatures, slopes)]
        tried = lqr(cost._replace(u=cost.u - parts[0]), parts[1], parts[2])
        before = LinearGaussian(*map(_many, memory.controllers))
        away = divergence(tried, before, memory.start.expand(len(share), *memory.start.shape)).mean(0)
        within = away <= self.bound
        within[-1] = True  # the largest penalty, if none is enough
        least, rows = within.byte().argmax(0), torch.arange(within.shape[1], device=within.device)
        return LinearGaussian(*(part[:, least, rows] for part in tried))

    def _supervise(
        self,
        rule: Rule,
        sampled: _Sampled,
        memory: _Memory,
        precision: Float[Tensor, "t b d d"],
        *,
        optimizer: Optimizer,
        generator: torch.Generator | None,
    ) -> None:
        """Brings the policy's answers to what it saw nearer to the steps of the controllers."""
        targets = memory.controllers.mean(sampled.x[:-1])
        order = torch.randperm(self.samples, generator=generator, device=targets.device)
        for sample in order.tolist():
            answers, state = list[Tensor](), None
            for grads, params, loss in sampled.seen:
                at, slope = ({name: part[sample] for name, part in parts.items()} for parts in (params, grads))
                state = rule.init(at) if state is None else state
                answer, state = rule.update(slope, state, at, loss[sample])
                answers.append(flatten(answer, loss[sample], like=at).double())
            answer = torch.stack(answers)
            away = answer - targets[:, sample]
            pulled = memory.dual * answer + self.penalty / 2 * away * times(precision, away)
            backward(pulled.sum(-1).mean(), optimizer)
            optimizer.step()


def _expansion(problem: Problem, x: Float[Tensor, "t b d"]) -> tuple[Float[Tensor, "t b d"], Float[Tensor, "t b d d"]]:
    """Returns c and C of ``f(y) = y'Cy / 2 + y'c + constant`` near x, negative curvature taken as positive."""
    many = _repeated(problem, len(x))
    with torch.enable_grad():
        at = x.detach().to(next(iter(problem.start.values())).dtype).requires_grad_()
        loss = many.objective(unflatten(at, many.start))
        slope = torch.autograd.grad(loss.sum(), at, create_graph=True)[0] + 0 * at  # a linear loss has no graph
        parts = [torch.autograd.grad(slope[..., i].sum(), at, retain_graph=True)[0] for i in range(x.shape[-1])]
    hessian = torch.stack(parts, -1).double()
    if not (slope.isfinite().all() and hessian.isfinite().all()):
        raise NonFiniteError("the losses have derivatives that are not finite where the samples lead. Smooth them.")
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    curvature = vectors * values.abs().unsqueeze(-2) @ vectors.mT
    return slope.detach().double() - times(curvature, x), curvature


@torch.no_grad()
def _start(problem: Problem) -> Float[Tensor, "b d"]:
    """Returns where the problems start, once it is known that there are some side by side."""
    losses = problem.objective(problem.start)
    if losses.dim() != 1:
        raise ShapeError(
            f"guided policy search needs problems side by side, with losses of shape (b,), got {tuple(losses.shape)}. "
            "Give a single problem's parameters a first dimension of 1."
        )
    return _locations(problem.start, losses)


def _repeated(problem: Problem, count: int) -> Problem:
    """Returns the same problems, many times side by side."""
    start = {name: p.expand(count, *p.shape) for name, p in problem.start.items()}
    return Problem(torch.func.vmap(problem.objective), start)


def _locations(params: Params, loss: Float[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
    return flatten(params, loss, like=params).double()


def _many(part: Float[Tensor, "t *_"]) -> Float[Tensor, "t 1 *_"]:
    return part.unsqueeze(1)


def _like(numbers: Float[Tensor, " j"], part: Float[Tensor, "t *_"]) -> Float[Tensor, "j *_"]:
    """Returns the numbers with as many dimensions as come after the time."""
    return numbers.reshape(-1, *[1] * (part.dim() - 1))
