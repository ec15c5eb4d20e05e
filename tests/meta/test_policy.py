"""Li and Malik's policy against its definition, and the three families of problems against their formulas."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Parametric
from recollect.errors import DtypeError, SettingError, ShapeError
from recollect.meta.objectives import (
    Problem,
    logistic_regression,
    margin_of_victory,
    quadratics,
    relu_network,
    robust_regression,
)
from recollect.meta.policy import Policy

Untouched = Callable[[], AbstractContextManager[None]]
SHAPES = {"weight": (2,), "bias": ()}
FAMILIES = [quadratics, logistic_regression, robust_regression, relu_network]


def made(parameters: int = 3, *, history: int = 3, current: bool = False) -> Policy:
    """A policy that does not stand still."""
    g = torch.Generator().manual_seed(0)
    policy = Policy(parameters, history=history, hidden=4, current=current, generator=g).double()
    for parameter in policy.output.parameters():
        parameter.data.normal_(generator=g)
    return policy


def draw(rows: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    return {name: torch.randn((*rows, *shape), dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("family", "inputs", "count"),
    [(logistic_regression, 125, 6504), (robust_regression, 125, 6504), (relu_network, 325, 16912)],
)
def test_sizes_of_the_paper(family: Callable[[int], Problem], inputs: int, count: int) -> None:
    policy = Policy(sum(p[0].numel() for p in family(1).start.values()))
    assert policy.hidden.in_features == inputs
    assert sum(parameter.numel() for parameter in policy.parameters()) == count


def literal(policy: Policy, values: list[float], gradients: list[list[float]]) -> torch.Tensor:
    """The step after these values and gradients, the last ones those of the current location."""
    changes, slopes = [], []
    for i in range(2, policy.history + 2):  # the i-th most recent location
        there = len(values) - i
        changes.append(values[-1] - values[there] if there >= 0 else 0.0)
        there += 1 if policy.current else 0
        slopes += gradients[there] if there >= 0 else [0.0] * len(gradients[0])
    inputs = [*changes, *slopes]
    hidden = [
        math.log1p(math.exp(b + sum(w * x for w, x in zip(row, inputs, strict=True))))
        for row, b in zip(policy.hidden.weight.tolist(), policy.hidden.bias.tolist(), strict=True)
    ]
    rows = zip(policy.output.weight.tolist(), policy.output.bias.tolist(), strict=True)
    steps = [b + sum(w * h for w, h in zip(row, hidden, strict=True)) for row, b in rows]
    return torch.tensor(steps, dtype=torch.float64)


@pytest.mark.parametrize("current", [False, True])
def test_it_is_the_network_on_the_features(current: bool) -> None:
    policy, params = made(current=current), draw()
    state, values, gradients = policy.init(params), [], []
    for _ in range(6):  # longer than the history
        grad, loss = draw(), torch.randn((), dtype=torch.float64)
        values.append(loss.item())
        gradients.append([*grad["weight"].tolist(), grad["bias"].item()])
        step, state = policy.update(grad, state, params, loss)
        answer = torch.cat([step["weight"], step["bias"].reshape(1)])
        torch.testing.assert_close(answer, literal(policy, values, gradients), rtol=1e-12, atol=1e-12)


def test_the_location_is_no_input() -> None:
    policy, grad, loss = made(current=True), draw(), torch.ones((), dtype=torch.float64)
    one, two = (policy.update(grad, policy.init(params), params, loss)[0] for params in (draw(), draw()))
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


def test_many_rows_are_the_rows_one_by_one() -> None:
    policy, params, losses = made(), draw((4,)), torch.randn(3, 4, dtype=torch.float64)
    grads = [draw((4,)) for _ in range(3)]
    state = policy.init(params)
    for grad, loss in zip(grads, losses, strict=True):
        together, state = policy.update(grad, state, params, loss)
    for row in range(4):
        alone = {name: p[row] for name, p in params.items()}
        state = policy.init(alone)
        for grad, loss in zip(grads, losses, strict=True):
            step, state = policy.update({name: g[row] for name, g in grad.items()}, state, alone, loss[row])
        for name in SHAPES:
            torch.testing.assert_close(together[name][row], step[name], rtol=1e-12, atol=1e-13)


def test_an_untrained_policy_stands_still() -> None:
    policy = Policy(3)
    step, _ = policy.update(draw(), policy.init(draw()), draw(), torch.ones((), dtype=torch.float64))
    for name, shape in SHAPES.items():
        assert torch.equal(step[name], torch.zeros(shape, dtype=torch.float64))


def test_it_drives_mbpa() -> None:
    head, memory = nn.Linear(2, 3).double(), EpisodicMemory(capacity=9, key_size=2, key_dtype=torch.float64)
    mbpa = MbPA(head, memory, neighbors=4, adaptation=LocalAdaptation(made(9), steps=3))
    queries = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(mbpa(queries), Parametric(head)(queries)), "an empty memory"
    memory.write(torch.randn(9, 2, dtype=torch.float64), torch.arange(9) % 3)
    outputs = mbpa(queries)
    assert not outputs.requires_grad
    assert (outputs - Parametric(head)(queries)).abs().max() > 1e-3
    rows = torch.cat([mbpa(query.unsqueeze(0)) for query in queries])
    torch.testing.assert_close(outputs, rows, rtol=1e-12, atol=1e-12)


def test_weights_come_from_the_generator(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, two = (Policy(4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# Families of problems


def drawn(family: Callable[..., Problem], count: int = 3) -> Problem:
    return family(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_do_not_mix(family: Callable[..., Problem]) -> None:
    """One problem's loss depends on its own parameters alone, and has the derivative of finite differences."""
    problem = drawn(family)
    leaves = {name: p.clone().requires_grad_() for name, p in problem.start.items()}
    losses = problem.objective(leaves)
    assert losses.shape == (3,)
    grads = torch.autograd.grad(losses[1], list(leaves.values()))
    for (name, start), grad in zip(problem.start.items(), grads, strict=True):
        assert (grad[[0, 2]] == 0).all()
        place = (1,) + (0,) * (start.dim() - 1)
        sides = []
        for side in (1e-6, -1e-6):
            moved = start.clone()
            moved[place] += side
            sides.append(problem.objective({**problem.start, name: moved})[1].item())
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(grad[place].item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_come_from_the_generator(family: Callable[..., Problem], rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, two = (family(5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one.objective(one.start), two.objective(one.start))
    assert all(torch.equal(p, two.start[name]) for name, p in one.start.items())
    assert {p.dtype for p in one.start.values()} == {torch.float32}
    assert one.objective(one.start).unique().numel() == 5, "all problems differ"


def data(problem: Problem) -> dict[str, torch.Tensor]:
    assert isinstance(problem.objective, partial)
    return problem.objective.keywords


def slopes(problem: Problem) -> dict[str, torch.Tensor]:
    leaves = {name: p.clone().requires_grad_() for name, p in problem.start.items()}
    return dict(zip(leaves, torch.autograd.grad(problem.objective(leaves).sum(), list(leaves.values())), strict=True))


def close(answer: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(answer, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_quadratics_by_formula() -> None:
    problem = drawn(quadratics)
    matrix, target = data(problem).values()
    theta, losses, grads = problem.start["theta"], problem.objective(problem.start), slopes(problem)
    assert (matrix.shape, target.shape, theta.shape) == ((3, 10, 10), (3, 10), (3, 10))
    assert theta.abs().max() < 0.05
    for row in range(3):
        rest = matrix[row] @ theta[row] - target[row]
        close(losses[row], rest @ rest)
        close(grads["theta"][row], 2 * matrix[row].T @ rest)


def test_logistic_regression_by_formula() -> None:
    problem = drawn(logistic_regression)
    points, labels = data(problem).values()
    assert (points.shape, labels.sum(1).tolist()) == ((3, 100, 3), [50.0] * 3)
    losses, grads = problem.objective(problem.start), slopes(problem)
    for row in range(3):
        w, b = problem.start["weight"][row], problem.start["bias"][row]
        p = [1 / (1 + math.exp(-float(x @ w + b))) for x in points[row]]
        loss = [-math.log(q if y else 1 - q) for q, y in zip(p, labels[row].tolist(), strict=True)]
        close(losses[row], sum(loss) / 100 + 5e-4 / 2 * float(w @ w))
        rest = torch.tensor(p, dtype=torch.float64) - labels[row]
        close(grads["weight"][row], rest @ points[row] / 100 + 5e-4 * w)
        close(grads["bias"][row], rest.mean())


def test_robust_regression_by_formula() -> None:
    problem = drawn(robust_regression)
    points, targets = data(problem).values()
    assert points.shape == (3, 100, 3)
    losses, grads = problem.objective(problem.start), slopes(problem)
    for row in range(3):
        w, b = problem.start["weight"][row], problem.start["bias"][row]
        rest = [float(y - x @ w - b) for x, y in zip(points[row], targets[row], strict=True)]
        close(losses[row], sum(r * r / (1 + r * r) for r in rest) / 100)
        pull = torch.tensor([-2 * r / (1 + r * r) ** 2 for r in rest], dtype=torch.float64)
        close(grads["weight"][row], pull @ points[row] / 100)
        close(grads["bias"][row], pull.mean())


def test_robust_targets_are_four_linear_functions() -> None:
    points, targets = data(drawn(robust_regression)).values()
    for row in range(3):
        for begin in range(0, 100, 25):
            x = torch.cat([points[row, begin : begin + 25], torch.ones(25, 1, dtype=torch.float64)], 1)
            y = targets[row, begin : begin + 25]
            rest = y - x @ torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
            assert 0.05 < rest.std() < 0.15
            assert y.std() > 0.2


def test_relu_network_by_formula() -> None:
    problem = drawn(relu_network)
    points, labels = data(problem).values()
    assert (points.shape, labels.sum(1).tolist()) == ((3, 100, 2), [50] * 3)
    losses, grads = problem.objective(problem.start), slopes(problem)
    for row in range(3):
        w, b, v, c = (problem.start[name][row] for name in ("hidden", "hidden_bias", "output", "output_bias"))
        hidden = (points[row] @ w.T + b).clamp(min=0)
        logits = hidden @ v.T + c
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = -p[torch.arange(100), labels[row]].log().mean()
        close(losses[row], loss + 5e-4 / 2 * (w.square().sum() + v.square().sum()))
        rest = (p - nn.functional.one_hot(labels[row], 2)) / 100
        close(grads["output"][row], rest.T @ hidden + 5e-4 * v)
        close(grads["output_bias"][row], rest.sum(0))
        back = rest @ v * (hidden > 0)
        close(grads["hidden"][row], back.T @ points[row] + 5e-4 * w)
        close(grads["hidden_bias"][row], back.sum(0))


def test_margin_of_victory() -> None:
    losses = {name: torch.rand(4, 5, dtype=torch.float64) for name in ("a", "b", "c")}
    margins = margin_of_victory(losses)
    for name in losses:
        for step in range(4):
            wins = [
                min(float(losses[rival][step, k]) for rival in losses if rival != name) - float(losses[name][step, k])
                for k in range(5)
            ]
            close(margins[name][step], sum(wins) / 5)


def test_who_diverges_loses() -> None:
    nan, inf = math.nan, math.inf
    losses = {"a": [[1.0, 1.0], [1.0, nan]], "b": [[2.0, nan], [nan, inf]], "c": [[4.0, 3.0], [5.0, nan]]}
    margins = margin_of_victory({name: torch.tensor(rows).double() for name, rows in losses.items()})
    close(margins["a"], torch.tensor([(1 + 2) / 2, 4 / 2]))  # in the last problem all diverge: a margin of 0
    close(margins["b"], torch.tensor([-inf, -inf]))
    close(margins["c"], torch.tensor([(-3 - 2) / 2, -4 / 2]))
    ahead = margin_of_victory({"a": torch.ones(1, 2), "b": torch.full((1, 2), nan)})
    assert ahead["a"].tolist() == [inf]


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy(0), "parameters"),
        (lambda: Policy(4, history=0), "history"),
        (lambda: Policy(4, hidden=-1), "hidden"),
        (lambda: Policy(4, **{"current": "no"}), "current must be True or False, got 'no'"),
        (lambda: quadratics(0), "count"),
        (lambda: quadratics(3, dimension=0), "dimension"),
        (lambda: logistic_regression(-1), "count"),
        (lambda: robust_regression(3, dimension=0), "dimension"),
        (lambda: relu_network(3, size=0), "size"),
        (lambda: margin_of_victory({"only": torch.ones(2, 3)}), r"at least two optimizers, got \['only'\]"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str, untyped: None) -> None:
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize("shape", [(4, 5), (3, 6), (3,), (3, 5, 1)])
def test_margins_need_as_many_losses(shape: tuple[int, ...], untyped: None) -> None:
    with pytest.raises(ShapeError, match=r"same shape \(steps, problems\), got {'a': \(3, 5\), 'b': "):
        margin_of_victory({"a": torch.ones(3, 5), "b": torch.ones(shape)})


def test_margins_need_tensors_of_two_dimensions(untyped: None) -> None:
    with pytest.raises(ShapeError, match=r"same shape \(steps, problems\)"):
        margin_of_victory({"a": torch.ones(3), "b": torch.ones(3)})
    with pytest.raises(DtypeError, match="the losses of 'b' must be a tensor, got list"):
        margin_of_victory({"a": torch.ones(3, 5), "b": [1.0]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.long, torch.complex64, "float"])
def test_problems_are_of_floating_point_numbers(family: Callable[..., Problem], dtype: object, untyped: None) -> None:
    with pytest.raises(DtypeError, match=r"such as dtype=torch\.float64, got dtype="):
        family(3, dtype=dtype)


def test_a_history_of_another_batch_is_refused(untyped: None) -> None:
    policy, params = made(), draw((5,))
    _, state = policy.update(params, policy.init(params), params, torch.ones(5, dtype=torch.float64))
    for rows, loss in (((4,), torch.ones(4).double()), ((), torch.ones(()).double())):
        with pytest.raises(ShapeError, match=r"got that of \(5,\)\. Is it that of another batch"):
            policy.update(draw(rows), state, draw(rows), loss)


def test_another_number_of_parameters_is_refused() -> None:
    policy, params = made(4), draw()
    with pytest.raises(ShapeError, match=r"moves 4 numbers, but the parameters \['weight', 'bias'\] are 3.*joint=True"):
        policy.update(params, policy.init(params), params, torch.ones((), dtype=torch.float64))
