"""Optimizers made by hand: gradient descent and its kin with tuned settings, and two that search along a line."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from recollect.adaptation import rules
from recollect.adaptation.rules import Rule
from recollect.errors import MissingExtraError
from recollect.experiments.runner import Progress
from recollect.meta import Problem, unrolled
from recollect.meta.coordinates import flatten, unflatten

if TYPE_CHECKING:
    import numpy as np
    from scipy.optimize import OptimizeResult

HandMade = rules.sgd | rules.rmsprop | rules.adam
LINE_SEARCHES = {"conjugate gradient": "CG", "L-BFGS": "L-BFGS-B"}
"""What each is called by scipy."""
_RATES = (2.0**-10, 2.0**3)  # the least and the largest
_MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.98)
_DECAYS = (0.9, 0.99)


class Search(NamedTuple):
    """What an optimizer with a line search did."""

    losses: Float[Tensor, "t b"]
    """At the start and after each iteration; where a problem ended early, its last one from there on."""
    gradients: float
    """How many an iteration took, on average."""


def candidates(spacing: float) -> dict[str, list[HandMade]]:
    """Returns each rule with all settings that are tried.

    Args:
        spacing: The ratio of two neighboring rates.
    """
    rates = [_RATES[0]]
    while rates[-1] * spacing <= _RATES[1] * (1 + 1e-9):
        rates.append(rates[-1] * spacing)
    return {
        "SGD": [rules.sgd(rate) for rate in rates],
        "momentum": [rules.sgd(rate, momentum=kept) for kept in _MOMENTA for rate in rates],
        "RMSprop": [rules.rmsprop(rate, decay=decay) for decay in _DECAYS for rate in rates],
        "Adam": [rules.adam(rate) for rate in rates],
    }


def tuned(
    problem: Problem, *, steps: int, spacing: float, judge: Callable[[Float[Tensor, "t b"]], float]
) -> dict[str, HandMade]:
    """Returns each rule with the settings that do best on some problems.

    Args:
        problem: Problems side by side, which no test has.
        steps: Of a rule on each.
        spacing: See ``candidates``.
        judge: Makes one number of the losses along the steps; the least is the best.
    """
    tried, best = candidates(spacing), dict[str, HandMade]()
    with Progress(sum(map(len, tried.values())), "tuning") as progress:
        for name, some in tried.items():
            found = list[float]()
            for rule in some:
                found.append(judge(trajectories(rule, problem, steps)))
                progress.advance(1)
            best[name] = some[found.index(min(found))]
    return best


@torch.no_grad()
def trajectories(rule: Rule, problem: Problem, steps: int) -> Float[Tensor, "t b"]:
    """Returns the loss of each problem at the start and after each step."""
    return unrolled(rule, problem, steps=steps).losses


def line_search(problem: Problem, *, steps: int, method: str) -> Search:
    """Minimizes problems one by one, by an optimizer that searches along a line in each iteration.

    Args:
        problem: Problems side by side, in float64: a line search fails on rounded numbers.
        steps: The most iterations.
        method: One of ``LINE_SEARCHES``.

    Raises:
        MissingExtraError: If scipy is not installed.
    """
    start = flatten(problem.start, problem.objective(problem.start), like=problem.start)
    paths, gradients, iterations = list[Tensor](), 0, 0
    for row in range(len(start)):
        path, calls = _one(problem, start, row, steps, LINE_SEARCHES[method])
        gradients, iterations = gradients + calls, iterations + len(path) - 1
        paths.append(start.new_tensor(path + path[-1:] * (steps + 1 - len(path))))
    return Search(torch.stack(paths, 1), gradients / max(iterations, 1))


def _one(problem: Problem, start: Float[Tensor, "b n"], row: int, steps: int, method: str) -> tuple[list[float], int]:
    """Returns the losses of a problem at the start and after each iteration, and how many gradients it took."""
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingExtraError("this experiment needs scipy: pip install 'recollect[experiments]'.") from error

    def value(x: "np.ndarray") -> "tuple[float, np.ndarray]":
        flat = start.clone()  # the others do not matter
        flat[row] = torch.from_numpy(x)
        flat.requires_grad_()
        loss = problem.objective(unflatten(flat, problem.start))[row]
        return loss.item(), torch.autograd.grad(loss, flat)[0][row].numpy()

    path = [value(start[row].numpy())[0]]

    def note(intermediate_result: "OptimizeResult") -> None:
        path.append(float(intermediate_result.fun))

    end = minimize(value, start[row].numpy(), jac=True, method=method, callback=note, options={"maxiter": steps})
    return path, int(end.nfev)
