"""Learned optimizers beside those made by hand: how those are tuned, what is judged, and a run that is stopped."""

import json
import math
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from stopping import rows_of_a_stopped_run

from recollect import rules
from recollect.errors import NonFiniteError
from recollect.experiments import plots
from recollect.experiments.meta import learned_optimizer, training
from recollect.experiments.meta.hand_made import LINE_SEARCHES, candidates, line_search, trajectories, tuned
from recollect.experiments.meta.learned_optimizer import (
    EVOLVED,
    FAMILIES,
    GUIDED,
    LSTM,
    POLICY,
    PRINTED,
    SCALES,
    Best,
    Course,
    LearnedOptimizer,
    Scale,
    final_loss,
    loss_on_the_way,
    margins,
    run,
)
from recollect.experiments.runner import Run
from recollect.meta import Backpropagation, Policy, Problem, quadratics, robust_regression

MADE = ("SGD", "momentum", "RMSprop", "Adam")
TINY = Scale(
    Course(4, 6, 1e-2, 1, 5),
    Course(6, 4, 3e-3, 2, 4),
    imitation=2,
    batch=3,
    pairs=4,
    guided=2,
    samples=2,
    spacing=16.0,
    valid=3,
)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_optimizer, "SCALES", {"smoke": TINY})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def some_quadratics(count: int, seed: int) -> Problem:
    return quadratics(count, dimension=3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Made by hand


def test_the_grids() -> None:
    tried = candidates(2.0)
    rates = [2.0**power for power in range(-10, 4)]
    assert [rule.rate for rule in tried["SGD"]] == rates
    assert [rule.rate for rule in tried["Adam"]] == rates
    pairs = [(rule.rate, rule.momentum) for rule in tried["momentum"] if isinstance(rule, rules.sgd)]
    assert sorted(pairs) == sorted((rate, kept) for rate in rates for kept in (0.5, 0.8, 0.9, 0.95, 0.98))
    assert len(candidates(2**0.25)["SGD"]) == 4 * 13 + 1, "rounding does not lose the last"


@pytest.mark.parametrize("judge", [final_loss, loss_on_the_way])
def test_tuning_takes_the_best_on_these_problems(judge: Any) -> None:
    problem = some_quadratics(6, 0)
    found = tuned(problem, steps=8, spacing=2.0, judge=judge)
    assert tuple(found) == MADE
    for rate in (2.0**power for power in range(-10, 4)):
        theta = problem.start["theta"].clone().requires_grad_()
        optimizer, losses = torch.optim.SGD([theta], lr=rate), []
        for _ in range(8):
            loss = problem.objective({"theta": theta})
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(problem.objective({"theta": theta}).mean().item())
        value = losses[-1] if judge is final_loss else sum(losses) / 8
        best = judge(trajectories(found["SGD"], problem, 8))
        assert best <= value * (1 + 1e-9)
        if rate == found["SGD"].rate:
            assert best == pytest.approx(value, rel=1e-9)


def test_what_diverges_is_never_the_best() -> None:
    losses = torch.tensor([[1.0, 1.0], [2.0, 4.0], [3.0, 6.0]])
    assert final_loss(losses) == 4.5
    assert loss_on_the_way(losses) == 3.75, "the start does not count"
    losses[2, 0] = math.nan
    assert final_loss(losses) == loss_on_the_way(losses) == math.inf


@pytest.mark.parametrize("method", LINE_SEARCHES)
def test_a_line_search_is_that_of_scipy_on_each_problem(method: str) -> None:
    problem, steps, gradients, iterations = robust(3), 12, 0, 0
    found = line_search(problem, steps=steps, method=method)
    assert found.losses.shape == (steps + 1, 3)
    for row in range(3):
        points, targets = (part[row].numpy() for part in data(problem))

        def value(x: np.ndarray, points: np.ndarray = points, targets: np.ndarray = targets) -> Any:
            rest = targets - points @ x[:3] - x[3]
            pull = -2 * rest / (1 + rest**2) ** 2 / len(rest)
            return np.mean(rest**2 / (1 + rest**2)), np.append(pull @ points, pull.sum())

        x = np.append(problem.start["weight"][row].numpy(), problem.start["bias"][row].item())
        path = [value(x)[0]]
        options = {"maxiter": steps}
        end = minimize(
            value,
            x,
            jac=True,
            method=LINE_SEARCHES[method],
            callback=lambda x, path=path, value=value: path.append(value(x)[0]),
            options=options,
        )
        gradients, iterations = gradients + end.nfev, iterations + len(path) - 1
        expected = torch.tensor(path + path[-1:] * (steps + 1 - len(path)), dtype=torch.float64)
        torch.testing.assert_close(found.losses[:, row], expected, rtol=1e-6, atol=1e-9)
    assert found.gradients == pytest.approx(gradients / iterations)


def robust(count: int) -> Problem:
    return robust_regression(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def data(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The points and targets of a robust regression."""
    assert isinstance(problem.objective, partial)
    return problem.objective.keywords["points"], problem.objective.keywords["targets"]


def test_a_problem_that_ends_early_stays_where_it_is() -> None:
    found = line_search(some_quadratics(2, 1), steps=60, method="conjugate gradient").losses
    assert torch.equal(found[-1], found[-2])
    assert bool((found[-1] < 1e-6).all())


# What is judged


def test_margins() -> None:
    g = torch.Generator().manual_seed(0)
    losses = {name: torch.rand(5, 3, generator=g, dtype=torch.float64) for name in ("a", "b", "x", "y")}
    found = margins(losses, ("a", "b"))
    rivals = {"a": "xy", "b": "xy", "x": "ay", "y": "ax"}
    assert found.keys() == losses.keys()
    for name, others in rivals.items():
        for row in range(3):
            each = [min(float(losses[o][t, row]) for o in others) - float(losses[name][t, row]) for t in range(1, 5)]
            assert float(found[name][row]) == pytest.approx(sum(each) / 4)


def bias_of(best: Best) -> float:
    assert isinstance(best.rule, Policy)
    return best.rule.output.bias[0].item()


def test_the_best_rule_is_kept() -> None:
    policy = Policy(2, history=2, hidden=3, generator=torch.Generator().manual_seed(0))
    best, biases = Best(policy), []
    for loss in (3.0, 1.0, 2.0, math.inf):
        with torch.no_grad():
            policy.output.bias.add_(1.0)
        best.offer(policy, loss)
        biases.append(bias_of(best))
    assert biases == [1.0, 2.0, 2.0, 2.0]
    again = Best(policy)
    again.load_state_dict(best.state_dict())
    again.offer(policy, 1.5)
    assert bias_of(again) == 2.0, "the loss is part of the state"


@pytest.mark.parametrize("name", [POLICY, EVOLVED, GUIDED, LSTM])
def test_a_trained_rule_is_the_best_on_validation_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    offered = []
    real = Best.offer

    def offer(self: Best, rule: Any, loss: float) -> None:
        offered.append(loss)
        real(self, rule, loss)

    monkeypatch.setattr(Best, "offer", offer)
    family = "quadratic functions" if name == LSTM else "logistic regression"
    study = learned_optimizer._Study(Run(tmp_path, {}), TINY, family)
    rule = study._learned(name, rules.sgd(0.1))
    valid = FAMILIES[family].draw(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    judge = final_loss if name == LSTM else loss_on_the_way
    assert len(offered) == {LSTM: 4, POLICY: 4, EVOLVED: 3, GUIDED: 5}[name]
    assert judge(trajectories(rule, valid, 6 if name == LSTM else 4)) == min(offered)


def test_imitation() -> None:
    """The policy is asked at each point of the teacher's way; it learns to answer as the teacher does."""
    problem, teacher = robust(3), rules.sgd(0.5, momentum=0.5)
    policy = Policy(4, history=3, hidden=6, current=True, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        policy.output.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    found = learned_optimizer.imitation_error(policy, teacher, problem, 3)
    params, errors = problem.start, []
    states = [teacher.init(params), policy.init(params)]
    for _ in range(3):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = problem.objective(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(loss.sum(), tuple(leaves.values())), strict=True))
        step, states[0] = teacher.update(grads, states[0], params, loss.detach())
        own, states[1] = policy.update(grads, states[1], params, loss.detach())
        errors.append(sum(float((own[name] - step[name]).detach().square().sum()) for name in params) / 3)
        params = {name: params[name] + step[name] for name in params}
    assert found.item() == pytest.approx(sum(errors) / 3)
    adam, error = torch.optim.Adam(policy.parameters(), lr=0.01), found
    for _ in range(30):
        error = learned_optimizer.imitation_error(policy, teacher, problem, 3)
        adam.zero_grad()
        error.backward()
        adam.step()
    assert error.item() < 0.3 * found.item()


def test_a_training_that_diverges_goes_back_to_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], Backpropagation.step

    def step(self: Backpropagation, rule: Any, problem: Problem, **how: Any) -> torch.Tensor:
        seen.append(rule.output.bias.tolist())
        if len(seen) == 4:
            raise NonFiniteError("too far")
        return real(self, rule, problem, **how)

    monkeypatch.setattr(Backpropagation, "step", step)
    study = learned_optimizer._Study(Run(tmp_path, {}), TINY, "logistic regression")
    losses = iter((2.0, 1.0, 3.0, 4.0))  # after two imitations, and after each two iterations
    monkeypatch.setattr(study, "_judge", lambda losses_seen: next(losses))
    rule = study._learned(POLICY, rules.sgd(0.1))
    assert isinstance(rule, Policy)
    assert len(seen) == 6
    assert seen[4] == seen[2] == rule.output.bias.tolist(), "the second look was the best"


@pytest.mark.parametrize(
    ("place", "name", "rule"),
    [(learned_optimizer, "imitation_error", EVOLVED), (Best, "offer", EVOLVED), (Best, "offer", GUIDED)],
)
def test_training_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str, rule: str
) -> None:
    """It is stopped in its second imitation, or at a look at validation problems, after a step of guided search."""
    monkeypatch.setattr(training, "_SECONDS", -1.0)  # every step is saved
    made = {folder: learned_optimizer._Study(Run(tmp_path / folder, {}), TINY, "robust regression") for folder in "ab"}
    # Where the first look is the best, it must still be there after a stop; where the last is, all must go on.
    looks = count(99, -1) if rule == GUIDED else count(1)
    for study in made.values():
        monkeypatch.setattr(study, "_judge", lambda losses: float(next(looks)))
    whole = made["a"]._learned(rule, rules.sgd(0.1))
    real, calls = getattr(place, name), []

    def stop(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == (4 if rule == GUIDED else 2):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(place, name, stop)
    with pytest.raises(KeyboardInterrupt):
        made["b"]._learned(rule, rules.sgd(0.1))
    again = made["b"]._learned(rule, rules.sgd(0.1))
    assert len(calls) == {"imitation_error": 3, EVOLVED: 4, GUIDED: 6}[rule if name == "offer" else name]
    assert isinstance(whole, Policy)
    assert isinstance(again, Policy)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


# A run


def check_a_row(rows: list[dict[str, Any]], table: str) -> None:
    """What is reported is measured on test problems."""
    (row,) = (row for row in rows if (row["family"], row["optimizer"]) == ("robust regression", "Adam"))
    test = robust_regression(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = trajectories(rules.adam(row["settings"]["rate"]), test, 4)
    assert row["loss"] == pytest.approx(losses.mean(1).tolist(), abs=1e-5)
    assert row["interval"] == pytest.approx((1.96 * losses.std(1) / 2).tolist(), abs=1e-5)
    shown = f"| Adam | rate {row['settings']['rate']:.3g} | 1 | {row['loss'][-1]:.3f} +- {row['interval'][-1]:.3f} |"
    assert shown in table


def test_which_policy_sees_the_current_gradient(tmp_path: Path) -> None:
    study = learned_optimizer._Study(Run(tmp_path, {}), TINY, "logistic regression")
    sees = {name: study._rule(name, torch.Generator()) for name in FAMILIES["logistic regression"].learned}
    assert {name for name, rule in sees.items() if isinstance(rule, Policy) and not rule.current} == {PRINTED}
    assert len(sees) == 4


@pytest.mark.usefixtures("_tiny")
def test_a_run(tmp_path: Path) -> None:
    table = run(LearnedOptimizer(out=tmp_path))
    assert table == (tmp_path / "table.md").read_text()
    rows = rows_of(tmp_path)
    all_of_them = (POLICY, EVOLVED, GUIDED, PRINTED, *MADE, "conjugate gradient", "L-BFGS")
    expected = {("quadratic functions", name) for name in (LSTM, *MADE)}
    expected |= {(family, name) for family in list(FAMILIES)[1:] for name in all_of_them}
    assert {(row["family"], row["optimizer"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert len(row["loss"]) == len(row["interval"]) == (7 if row["family"] == "quadratic functions" else 5)
        same = [other["loss"][0] for other in rows if other["family"] == row["family"]]
        assert len(set(same)) == 1, "all begin at the same point"
    check_a_row(rows, table)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(LearnedOptimizer(out=tmp_path)) == table
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.usefixtures("_tiny")
def test_a_stopped_run_gives_the_same_rows(tmp_path: Path) -> None:
    whole, stopped = rows_of_a_stopped_run(run, LearnedOptimizer, tmp_path)
    assert stopped == whole


def test_the_settings_of_the_papers() -> None:
    assert [family.objectives for family in FAMILIES.values()] == [None, 90, 120, 80]
    for scale in (SCALES["small"], SCALES["paper"]):
        assert (scale.lstm.steps, scale.truncation, scale.policy.steps, scale.policy.test) == (100, 20, 40, 100)
        assert scale.samples == 20
    assert (SCALES["paper"].lstm.iterations, SCALES["paper"].lstm.rate, SCALES["paper"].batch) == (10_000, 1e-3, 128)


def test_logarithmic_axes_of_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda canvas, path: found.extend(canvas.axes))
    lines = [plots.Curve("a", range(3), [9.0, 1.0, 0.125], [0.0, 0.0, 0.2], "red")]
    plots.panels([("one", lines)], tmp_path / "x.png", xlabel="x", ylabel="y", log_y=True, digits=3)
    plots.panels([("one", lines)], tmp_path / "x.png", xlabel="x", ylabel="y")
    logarithmic, plain = found
    assert (logarithmic.get_yscale(), plain.get_yscale()) == ("log", "linear")
    assert [panel.get_legend().get_texts()[0].get_text() for panel in found] == ["a  0.125", "a  0.1"]
    logarithmic.figure.canvas.draw()
    assert {"0.1", "0.2", "0.5", "1", "2", "5"} <= {text.get_text() for text in logarithmic.get_yticklabels()}
