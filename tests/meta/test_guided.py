"""Guided policy search: its linear-Gaussian parts against dense algebra, and a policy that it trains."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from recollect.errors import NonFiniteError, SettingError
from recollect.meta import GuidedPolicySearch, Policy, Problem, logistic_regression, quadratics, train, unrolled
from recollect.meta import guided
from recollect.meta.linear_gaussian import LinearGaussian, Quadratic, divergence, lqr, regression, surprise

Untouched = Callable[[], AbstractContextManager[None]]
T, D = 4, 2
G = torch.Generator()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    G.manual_seed(0)


def positive(*rows: int, size: int = D) -> Tensor:
    root = draw(*rows, size, size)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def controller(*rows: int, steps: int = T) -> LinearGaussian:
    return LinearGaussian(0.3 * draw(steps, *rows, D, D), draw(steps, *rows, D), positive(steps, *rows))


def quadratic(*rows: int) -> tuple[Quadratic, Tensor, Tensor]:
    """A positive definite cost of each step, and that of where it leads."""
    whole = positive(T, *rows, size=2 * D)
    parts = whole[..., :D, :D], whole[..., :D, D:], whole[..., D:, D:], draw(T, *rows, D), draw(T, *rows, D)
    return Quadratic(*parts), positive(T, *rows), draw(T, *rows, D)


def total(cost: tuple[Quadratic, Tensor, Tensor], start: Tensor, steps: Tensor) -> Tensor:
    """What all steps from a start cost, written out."""
    answer, x = torch.zeros((), dtype=torch.float64), start
    for t in range(T):
        uu, ux, xx, r, s = (part[t] for part in cost[0])
        u, y = steps[t], x + steps[t]
        answer = answer + u @ uu @ u / 2 + u @ ux @ x + x @ xx @ x / 2 + u @ r + x @ s
        answer = answer + y @ cost[1][t] @ y / 2 + y @ cost[2][t]
        x = y
    return answer


def whole_way(steps: LinearGaussian, start: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all steps side by side: they are a linear function of the noise."""

    def taken(noise: Tensor) -> Tensor:
        x, found = start, []
        for t in range(T):
            u = steps.gain[t] @ x + steps.offset[t] + torch.linalg.cholesky(steps.covariance[t]) @ noise[t]
            found.append(u)
            x = x + u
        return torch.cat(found)

    zero = torch.zeros(T, D, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(taken, zero).reshape(T * D, T * D)
    return taken(zero), jacobian @ jacobian.T


# Linear-Gaussian steps


def test_lqr_is_the_gaussian_of_the_dense_problem() -> None:
    """With ``exp(-cost)`` as density of all steps at once: its mode by one dense solve, its precision the Hessian."""
    cost, start = quadratic(), draw(D)
    mean, covariance = whole_way(lqr(*cost), start)
    zero = torch.zeros(T, D, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda u: total(cost, start, u), zero).reshape(T * D, T * D)
    slope = torch.autograd.functional.jacobian(lambda u: total(cost, start, u), zero).reshape(T * D)
    torch.testing.assert_close(mean, -torch.linalg.solve(hessian, slope), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(covariance, torch.linalg.inv(hessian), rtol=1e-9, atol=1e-10)


def test_lqr_of_many_problems_is_that_of_each() -> None:
    cost = quadratic(3)
    together = lqr(*cost)
    for row in range(3):
        alone = lqr(Quadratic(*(part[:, row] for part in cost[0])), cost[1][:, row], cost[2][:, row])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[:, row], b, rtol=1e-10, atol=1e-12)


def test_surprise_is_the_log_density() -> None:
    steps = controller()
    cost = surprise(steps)
    for t in range(T):

        def cost_of(u: Tensor, x: Tensor, t: int = t) -> Tensor:
            uu, ux, xx, r, s = (part[t] for part in cost)
            return u @ uu @ u / 2 + u @ ux @ x + x @ xx @ x / 2 + u @ r + x @ s

        def density(u: Tensor, x: Tensor, t: int = t) -> Tensor:
            mean = steps.gain[t] @ x + steps.offset[t]
            return MultivariateNormal(mean, steps.covariance[t]).log_prob(u)

        points = [(draw(D), draw(D)) for _ in range(5)]
        constants = [cost_of(*point) + density(*point) for point in points]
        torch.testing.assert_close(torch.stack(constants), constants[0].expand(5), rtol=1e-9, atol=1e-9)


def test_lqr_gives_back_the_steps_whose_surprise_it_reads() -> None:
    steps, zero = controller(3), torch.zeros(T, 3, D, D, dtype=torch.float64)
    for a, b in zip(lqr(surprise(steps), zero, zero[..., 0]), steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_divergence_by_sampling_free_algebra() -> None:
    """KL of the whole ways by torch.distributions: the densities of the steps multiply, so their divergences add."""
    new, old, start = controller(), controller(), draw(D)
    ways = [MultivariateNormal(*whole_way(steps, start)) for steps in (new, old)]
    torch.testing.assert_close(divergence(new, old, start).sum(), kl_divergence(*ways), rtol=1e-9, atol=1e-9)
    first = [MultivariateNormal(k[0] + K[0] @ start, G[0]) for K, k, G in (new, old)]
    torch.testing.assert_close(divergence(new, old, start)[0], kl_divergence(*first), rtol=1e-9, atol=1e-9)
    assert divergence(new, new, start).abs().max() < 1e-12


def test_divergence_of_many_problems_is_that_of_each() -> None:
    new, old, start = controller(3), controller(3), draw(3, D)
    together = divergence(new, old, start)
    for row in range(3):
        one, two = (LinearGaussian(*(part[:, row] for part in steps)) for steps in (new, old))
        torch.testing.assert_close(together[:, row], divergence(one, two, start[row]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_regression_is_least_squares(ridge: float) -> None:
    """With a ridge: rows more, which ask for a gain of zero."""
    samples, x, u = 9, draw(T, 9, 3, D), draw(T, 9, 3, D)
    found = regression(x, u, ridge=ridge)
    more = (ridge * samples) ** 0.5 * torch.eye(D, D + 1, dtype=torch.float64)
    for t in range(T):
        for row in range(3):
            at = torch.cat([torch.cat([x[t, :, row], torch.ones(samples, 1, dtype=torch.float64)], 1), more])
            to = torch.cat([u[t, :, row], torch.zeros(D, D, dtype=torch.float64)])
            answer = torch.linalg.lstsq(at, to).solution
            torch.testing.assert_close(found.gain[t, row], answer[:D].T, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(found.offset[t, row], answer[D], rtol=1e-9, atol=1e-10)
            rest = (to - at @ answer)[:samples]
            torch.testing.assert_close(found.covariance[t, row], rest.T @ rest / samples, rtol=1e-9, atol=1e-10)


def test_regression_where_all_samples_are_at_one_place() -> None:
    u = draw(T, 5, 3, D)
    found = regression(draw(T, 1, 3, D).expand_as(u), u, ridge=1e-3)
    assert found.gain.abs().max() < 1e-12
    torch.testing.assert_close(found.offset, u.mean(1))
