"""Guided policy search: its linear-Gaussian parts against dense algebra, and a policy that it trains."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from recollect.errors import NonFiniteError, SettingError, ShapeError
from recollect.meta import GuidedPolicySearch, Policy, Problem, guided, logistic_regression, quadratics, train, unrolled
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
    jacobian = torch.func.jacrev(taken)(zero).reshape(T * D, T * D)
    return taken(zero), jacobian @ jacobian.T


# Linear-Gaussian steps


def test_lqr_is_the_gaussian_of_the_dense_problem() -> None:
    """With ``exp(-cost)`` as density of all steps at once: its mode by one dense solve, its precision the Hessian."""
    cost, start = quadratic(), draw(D)
    mean, covariance = whole_way(lqr(*cost), start)
    zero = torch.zeros(T, D, dtype=torch.float64)
    hessian = torch.func.jacrev(torch.func.grad(lambda u: total(cost, start, u)))(zero).reshape(T * D, T * D)
    slope = torch.func.grad(lambda u: total(cost, start, u))(zero).reshape(T * D)
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


def test_divergence_is_that_of_the_whole_ways() -> None:
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


# The trainer


def family(count: int = 6, *, dtype: torch.dtype = torch.float64) -> Problem:
    return logistic_regression(count, generator=torch.Generator().manual_seed(1), dtype=dtype)


def made(problem: Problem) -> Policy:
    count = sum(p[0].numel() for p in problem.start.values())
    return Policy(count, history=4, hidden=8, current=True, generator=torch.Generator().manual_seed(0)).double()


def search_of(**changes: Any) -> GuidedPolicySearch:
    return GuidedPolicySearch(**{"steps": 6, "samples": 8, **changes})


def test_a_policy_learns(rng_untouched: Untouched) -> None:
    problem = family()
    policy = made(problem)
    with torch.no_grad():
        before = unrolled(policy, problem, steps=6).losses[1:].mean()
    adam = torch.optim.Adam(policy.parameters(), lr=0.01)
    with rng_untouched():
        g = torch.Generator().manual_seed(0)
        settings = {"optimizer": adam, "trainer": search_of(), "iterations": 12, "generator": g}
        curves = train(policy, lambda g: problem, **settings)
    assert curves.shape == (12, 7)
    assert (curves[:, 0] - curves[0, 0]).abs().max() < 1e-12, "all begin at the start"
    assert curves[-1, 1:].mean() < 0.8 * curves[0, 1:].mean(), "the controllers find the way"
    with torch.no_grad():
        after = unrolled(policy, problem, steps=6).losses[1:].mean()
    assert after < 0.9 * before, "and the policy goes it"


def test_without_bonds_controllers_solve_a_quadratic_problem() -> None:
    """The second-order expansion is exact there: almost free, they lead to where the gradient is zero."""
    problem = quadratics(3, dimension=2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    policy = made(problem)
    search = search_of(penalty=1e-7, bound=1e9, samples=4)
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    curves = [search.step(policy, problem, optimizer=still, generator=G) for _ in range(2)]
    assert curves[0][-1] > 0.1
    assert curves[1][1:].max() < 1e-4


def test_the_expansion_is_that_of_autograd() -> None:
    problem = quadratics(3, dimension=2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = draw(T, 3, D)
    slope, curvature = guided._expansion(problem, x)
    assert isinstance(problem.objective, partial)
    for row in range(3):
        matrix, target = (part[row] for part in problem.objective.keywords.values())
        torch.testing.assert_close(curvature[:, row], (2 * matrix.T @ matrix).expand(T, D, D))
        torch.testing.assert_close(slope[:, row], (-2 * matrix.T @ target).expand(T, D))


def test_negative_curvature_is_taken_as_positive() -> None:
    def objective(params: dict[str, Tensor]) -> Tensor:
        return params["theta"][..., 0].square() - params["theta"][..., 1].square()

    x = draw(T, 3, D)
    slope, curvature = guided._expansion(Problem(objective, {"theta": x[0]}), x)
    torch.testing.assert_close(curvature, 2 * torch.eye(D, dtype=torch.float64).expand(T, 3, D, D))
    torch.testing.assert_close(slope, torch.stack([torch.zeros_like(x[..., 0]), -4 * x[..., 1]], -1))


@pytest.mark.parametrize("bound", [1e-3, 0.1])
def test_the_bound_holds(bound: float) -> None:
    problem = family()
    policy, search = made(problem), search_of(bound=bound)
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    search.step(policy, problem, optimizer=still, generator=G)
    old = LinearGaussian(*(search.state_dict()[name] for name in LinearGaussian._fields))
    search.step(policy, problem, optimizer=still, generator=G)
    new = LinearGaussian(*(search.state_dict()[name] for name in LinearGaussian._fields))
    away = divergence(new, old, search.state_dict()["start"]).mean(0)
    assert away.max() <= bound
    assert away.max() > bound / 100, "and lets them move"


@pytest.mark.parametrize(("bound", "eta"), [(1e9, 1e-3), (1e-12, 1e3)])
def test_the_controllers_make_the_least_of_what_they_should(bound: float, eta: float) -> None:
    """All derivatives of the written-out objective are zero there: of gains, offsets and covariances, by autograd."""
    problem = family(2)
    policy, search = made(problem), search_of(steps=3, bound=bound, penalty=0.2, rate=2.0)
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    with torch.no_grad():  # it answers something that is not linear in the location, also through its history
        policy.output.weight.normal_(0.0, 3.0, generator=G)
    for _ in range(2):
        search.step(policy, problem, optimizer=still, generator=G)
    old = search._memory
    assert old is not None
    state = G.get_state()
    sampled = search._sample(policy, problem, old, G)
    G.set_state(state)
    search.step(policy, problem, optimizer=still, generator=G)
    new = search._memory
    assert new is not None
    assert new.dual.abs().min() > 0
    gain, offset, covariance = regression(sampled.x[:-1], sampled.answers, ridge=search.ridge)
    near = LinearGaussian(gain, offset, covariance + old.noise)
    assert covariance[1:].abs().amax((-2, -1)).min() > 1e-3 * old.noise.abs().max(), "it matters"
    slope, curvature = guided._expansion(problem, torch.stack([sampled.x[t + 1].mean(0) for t in range(3)]))
    found = LinearGaussian(*(part.clone().requires_grad_() for part in new.controllers))
    cost = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        mean, spread = old.start[row], torch.zeros(4, 4, dtype=torch.float64)
        for t in range(3):
            step, go = found.gain[t, row] @ mean + found.offset[t, row], torch.eye(4).double() + found.gain[t, row]
            mean, spread = mean + step, go @ spread @ go.T + found.covariance[t, row]
            second = spread + mean.outer(mean)
            cost = cost + (curvature[t, row] * second).sum() / 2 + slope[t, row] @ mean - new.dual[t, row] @ step
    cost = cost + 0.2 * divergence(found, near, old.start).sum()
    cost = cost + 0.2 * eta * divergence(found, old.controllers, old.start).sum()
    scale = 0.2 * (1 + eta) * torch.linalg.inv(new.controllers.covariance).abs().max()
    for part in torch.autograd.grad(cost, found):
        assert part.abs().max() < 1e-9 * scale


def test_multipliers_follow_the_difference() -> None:
    problem = family()
    policy, search = made(problem), search_of(rate=0.5, penalty=0.2)
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    search.step(policy, problem, optimizer=still, generator=G)
    memory = search._memory
    assert memory is not None
    assert memory.dual.abs().max() == 0
    state = G.get_state()
    sampled = search._sample(policy, problem, memory, G)
    G.set_state(state)
    search.step(policy, problem, optimizer=still, generator=G)
    for t in range(6):
        for row in range(6):
            away = torch.zeros(4, dtype=torch.float64)
            for sample in range(8):
                x = sampled.x[t, sample, row]
                u = memory.controllers.gain[t, row] @ x + memory.controllers.offset[t, row]
                away += (sampled.answers[t, sample, row] - u) / 8
            torch.testing.assert_close(search.state_dict()["dual"][t, row], 0.5 * 0.2 * away)


def test_the_covariance_of_the_policy() -> None:
    problem = family()
    policy, search = made(problem), search_of()
    search.step(policy, problem, optimizer=torch.optim.SGD(policy.parameters(), lr=0.0), generator=G)
    state = search.state_dict()
    precisions = [torch.linalg.inv(c) for c in state["covariance"].flatten(0, 1)]
    torch.testing.assert_close(state["noise"], torch.linalg.inv(sum(precisions, torch.zeros(4, 4).double()) / 36))


def test_the_policy_is_supervised_by_the_controllers() -> None:
    """One pass of plain gradient descent over the samples, with the loss written out."""
    problem, rate = family(), 1e-3
    policy, other, search = made(problem), made(problem), search_of(samples=2)
    for steps in (1, 2):
        state = G.get_state()
        sampled = search._sample(policy, problem, search._memory, G)
        order = torch.randperm(2, generator=G).tolist()
        G.set_state(state)
        search.step(policy, problem, optimizer=torch.optim.SGD(policy.parameters(), lr=rate), generator=G)
        memory = search._memory
        assert memory is not None
        for sample in order:
            total, hidden = torch.zeros((), dtype=torch.float64), other.init(problem.start)
            for t, (grads, params, loss) in enumerate(sampled.seen):
                g, p = ({name: part[sample] for name, part in parts.items()} for parts in (grads, params))
                step, hidden = other.update(g, hidden, p, loss[sample])
                for row in range(6):
                    mu = torch.cat([step["weight"][row], step["bias"][row : row + 1]])
                    x = sampled.x[t, sample, row]
                    away = mu - memory.controllers.gain[t, row] @ x - memory.controllers.offset[t, row]
                    near = away @ torch.linalg.inv(memory.controllers.covariance[t, row]) @ away
                    total = total + memory.dual[t, row] @ mu + search.penalty / 2 * near
            other.zero_grad()
            (total / 36).backward()
            with torch.no_grad():
                for parameter in other.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(rate * parameter.grad)
        for a, b in zip(policy.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=f"after {steps}")


def test_a_search_goes_on_where_it_was_saved(rng_untouched: Untouched) -> None:
    problem = family()
    answers = []
    for stops in (False, True):
        g, policy, search = torch.Generator().manual_seed(5), made(problem), search_of()
        adam = torch.optim.Adam(policy.parameters(), lr=0.01)
        with rng_untouched():
            for _ in range(3):
                if stops:
                    saved, search = search.state_dict(), search_of()
                    search.load_state_dict(saved)
                search.step(policy, problem, optimizer=adam, generator=g)
        answers.append([parameter.detach() for parameter in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"samples": 1}, "samples must be a whole number of at least 2"),
        ({"deviation": 0.0}, "deviation"),
        ({"penalty": -1.0}, "penalty"),
        ({"bound": 0.0}, "bound"),
        ({"ridge": 0.0}, "ridge"),
        ({"rate": -0.1}, "rate"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GuidedPolicySearch(**changes)


def test_other_problems_are_refused() -> None:
    problem = family()
    policy, search = made(problem), search_of()
    adam = torch.optim.Adam(policy.parameters())
    search.step(policy, problem, optimizer=adam, generator=G)
    kept = search.state_dict()
    for other in (logistic_regression(6, generator=G, dtype=torch.float64), family(5)):
        with pytest.raises(SettingError, match="not the problems of its last step"):
            search.step(policy, other, optimizer=adam, generator=G)
    assert all(torch.equal(kept[name], part) for name, part in search.state_dict().items())


def test_arguments_are_checked(untyped: None) -> None:
    problem = family()
    policy, search = made(problem), search_of()
    adam: Any = torch.optim.Adam(policy.parameters())
    search.step(policy, problem, optimizer=adam, generator=G)

    def wrong(match: str, rule: Any = policy, task: Any = problem, optimizer: Any = adam) -> None:
        with pytest.raises((SettingError, ShapeError), match=match):
            search.step(rule, task, optimizer=optimizer, generator=G)

    wrong("rule must be", rule=Policy)
    wrong("problem must be", task=problem.start)
    wrong("optimizer must be", optimizer=None)
    one = {name: p[0] for name, p in problem.start.items()}
    wrong(r"losses of shape \(b,\), got \(\)", task=Problem(lambda params: params["weight"].sum(), one))
    with pytest.raises(SettingError, match=r"take 6 steps, these steps=5. Load .*\(steps=6\)"):
        search_of(steps=5).load_state_dict(search.state_dict())
    assert search.state_dict(), "nothing is forgotten"


def test_a_policy_that_cannot_learn_is_refused() -> None:
    problem = family()
    policy, search = made(problem), search_of()
    adam = torch.optim.Adam(policy.parameters())
    search.step(policy, problem, optimizer=adam, generator=G)
    policy.requires_grad_(False)
    with pytest.raises(SettingError, match="hold parameters that require a gradient, got none"):
        search.step(policy, problem, optimizer=adam, generator=G)
    assert search.state_dict(), "nothing is forgotten"
    other = torch.optim.Adam(made(problem).parameters())
    with pytest.raises(SettingError, match="steps must depend on parameters that the optimizer holds"):
        search.step(policy, problem, optimizer=other, generator=G)


def test_nothing_is_kept_of_the_graph_of_a_start() -> None:
    problem = family()
    problem = problem._replace(start={name: p.requires_grad_() for name, p in problem.start.items()})
    policy, search = made(problem), search_of()
    search.step(policy, problem, optimizer=torch.optim.Adam(policy.parameters()), generator=G)
    assert not any(part.requires_grad for part in search.state_dict().values())


def test_answers_and_derivatives_that_are_not_finite_are_told() -> None:
    problem = family()
    policy, search = made(problem), search_of()
    adam = torch.optim.Adam(policy.parameters())
    search.step(policy, problem, optimizer=adam, generator=G)
    kept = [parameter.clone() for parameter in policy.parameters()]
    with torch.no_grad():
        policy.output.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="the policy's answers are not finite"):
        search.step(policy, problem, optimizer=adam, generator=G)
    with torch.no_grad():
        policy.output.bias.copy_(kept[-1])

    def steep(params: dict[str, Tensor]) -> Tensor:
        """The second derivative of the last part is infinite, times zero."""
        return params["weight"].square().sum(-1) + params["bias"] + (0 * params["bias"]).abs() ** 1.5

    with pytest.raises(NonFiniteError, match="derivatives that are not finite"):
        search.step(policy, problem._replace(objective=steep), optimizer=adam, generator=G)
    assert all(torch.equal(a, b) for a, b in zip(kept, policy.parameters(), strict=True))


def test_divergence_is_told_and_begins_anew() -> None:
    problem = family()
    policy, search = made(problem), search_of()
    adam = torch.optim.Adam(policy.parameters())
    search.step(policy, problem, optimizer=adam, generator=G)
    kept = [parameter.clone() for parameter in policy.parameters()]
    endless = problem._replace(objective=lambda params: problem.objective(params) * torch.inf)
    with pytest.raises(NonFiniteError, match="losses that are not finite"):
        search.step(policy, endless, optimizer=adam, generator=G)
    assert all(torch.equal(a, b) for a, b in zip(kept, policy.parameters(), strict=True))
    assert search.state_dict() == {}
