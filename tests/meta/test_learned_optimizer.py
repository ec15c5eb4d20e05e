"""The LSTM optimizer against a loop over coordinates, its training against autograd and finite differences."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Parametric, rules
from recollect.adaptation.rules import Params
from recollect.errors import NonFiniteError, SettingError, ShapeError
from recollect.meta import coordinates
from recollect.meta.learned_optimizer import LSTMOptimizer
from recollect.meta.meta_lstm import MetaLSTM
from recollect.meta.objectives import Problem, logistic_regression, quadratics
from recollect.meta.policy import Policy
from recollect.meta.training import Backpropagation, EvolutionStrategy, train, unrolled

Untouched = Callable[[], AbstractContextManager[None]]
LOSS = torch.tensor(1.0, dtype=torch.float64)


def made(*, p: float | None = 10.0, scale: float = 0.1, sizes: tuple[int, ...] = (4, 3)) -> LSTMOptimizer:
    return LSTMOptimizer(sizes=sizes, p=p, scale=scale, generator=torch.Generator().manual_seed(0)).double()


def problem(count: int = 3, *, seed: int = 0) -> Problem:
    return quadratics(count, dimension=2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(at: Problem, theta: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda theta: at.objective({"theta": theta}).sum())(theta.detach())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_loop(rule: LSTMOptimizer, grads: list[float]) -> list[float]:
    """The steps of a single coordinate, number by number."""
    layers = [(layer.weight.tolist(), layer.bias.tolist()) for layer in rule.layers]  # input, forget, cell, output
    states = [([0.0] * size, [0.0] * size) for size in rule.sizes]
    steps = []
    for grad in grads:
        p = rule.p
        if p is None:
            values = [grad]
        elif abs(grad) > math.exp(-p):
            values = [math.log(abs(grad)) / p, math.copysign(1.0, grad)]
        else:
            values = [-1.0, math.exp(p) * grad]
        for number, (weight, bias) in enumerate(layers):
            hidden, cell = states[number]
            size, seen = len(hidden), [*values, *hidden]
            gates = [
                b + sum(w * x for w, x in zip(row, seen, strict=True)) for row, b in zip(weight, bias, strict=True)
            ]
            cell = [
                sigmoid(gates[size + u]) * cell[u] + sigmoid(gates[u]) * math.tanh(gates[2 * size + u])
                for u in range(size)
            ]
            values = [sigmoid(gates[3 * size + u]) * math.tanh(cell[u]) for u in range(size)]
            states[number] = values, cell
        steps.append(rule.scale * (rule.output(torch.tensor(values, dtype=torch.float64)).item()))
    return steps


@pytest.mark.parametrize(("p", "scale", "sizes"), [(10.0, 0.1, (4, 3)), (5.0, 0.01, (3,)), (None, 1.0, (4, 3))])
def test_it_is_an_lstm_on_each_coordinate(p: float | None, scale: float, sizes: tuple[int, ...]) -> None:
    rule = made(p=p, scale=scale, sizes=sizes)
    grads = [
        {"w": torch.randn(2, 2, dtype=torch.float64) * size, "b": torch.zeros((), dtype=torch.float64)}
        for size in (1, 1e-6, 9)
    ]
    state = rule.init(grads[0])
    for step, grad in enumerate(grads):
        delta, state = rule.update(grad, state, grads[0], LOSS)
        for name, shape in (("w", (2, 2)), ("b", ())):
            seen = torch.stack([g[name] for g in grads]).reshape(3, -1)
            expected = torch.tensor([by_loop(rule, column.tolist())[step] for column in seen.T], dtype=torch.float64)
            torch.testing.assert_close(delta[name], expected.reshape(shape), rtol=1e-11, atol=1e-14)


def test_sizes_of_the_paper() -> None:
    rule = LSTMOptimizer()
    assert sum(parameter.numel() for parameter in rule.parameters()) == 5141  # 5301 with a second bias in each layer
    raw = LSTMOptimizer(p=None)
    assert sum(parameter.numel() for parameter in raw.parameters()) == 5141 - 80


def test_many_rows_are_the_rows_one_by_one() -> None:
    rule = made()
    params = {"w": torch.randn(3, 2, 2, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    grads = [{name: torch.randn_like(p) for name, p in params.items()} for _ in range(2)]
    state = rule.init(params)
    for grad in grads:
        together, state = rule.update(grad, state, params, LOSS.expand(3))
    for row in range(3):
        alone = {name: p[row] for name, p in params.items()}
        state = rule.init(alone)
        for grad in grads:
            delta, state = rule.update({name: g[row] for name, g in grad.items()}, state, alone, LOSS)
        for name in params:
            torch.testing.assert_close(together[name][row], delta[name], rtol=1e-12, atol=1e-14)


def test_blocks_of_coordinates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    step = coordinates.LSTMStep(2, 3, bound=1.0, generator=g).double()
    inputs, state = torch.randn(7, 2, generator=g).double(), torch.randn(2, 7, 3, generator=g).double().unbind()
    for start in (state, tuple(part[:1] for part in state)):  # of each coordinate, and one for all
        whole = step(inputs, start)
        monkeypatch.setattr(coordinates, "_BLOCK", 3)
        torch.testing.assert_close(step(inputs, start), whole)
        monkeypatch.undo()


def test_weights_come_from_the_generator(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, two = (LSTMOptimizer(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(0 < parameter.abs().max() <= 20**-0.5 for parameter in one.parameters())


# As the rule of MbPA


def test_it_drives_mbpa(rng_untouched: Untouched) -> None:
    rule, head = made(), nn.Linear(4, 3).double()
    memory = EpisodicMemory(capacity=20, key_size=4, key_dtype=torch.float64)
    mbpa = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rule, steps=3))
    queries = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(mbpa(queries), Parametric(head)(queries)), "an empty memory"
    memory.write(torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3)
    still = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rule, steps=0))
    assert torch.equal(still(queries), Parametric(head)(queries)), "no steps"

    before = [parameter.clone() for parameter in (*rule.parameters(), *head.parameters())]
    with rng_untouched():
        outputs = mbpa(queries)
    assert not outputs.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (*rule.parameters(), *head.parameters()), strict=True))
    rows = torch.cat([mbpa(query.unsqueeze(0)) for query in queries])
    torch.testing.assert_close(outputs, rows, rtol=1e-12, atol=1e-12)

    context = memory.read(queries, 5, kernel=mbpa.kernel)
    for row, query in enumerate(queries):
        theta = torch.cat([head.weight.detach().flatten(), head.bias.detach()])
        grads = []
        for _ in range(3):
            leaf = theta.clone().requires_grad_()
            logits = context.keys[row] @ leaf[:12].reshape(3, 4).T + leaf[12:]
            losses = nn.functional.cross_entropy(logits, context.values[row], reduction="none")
            grads.append(torch.autograd.grad((context.weights[row] * losses).sum(), leaf)[0])
            last = [by_loop(rule, column.tolist())[-1] for column in torch.stack(grads).T]
            theta = theta + torch.tensor(last, dtype=torch.float64)
        expected = (theta[:12].reshape(3, 4) @ query + theta[12:]).log_softmax(0)
        torch.testing.assert_close(outputs[row], expected, rtol=1e-9, atol=1e-11)


# Unrolling


@pytest.mark.parametrize("rule", [rules.sgd(0.02, momentum=0.5), rules.adam(0.1), made()], ids=["sgd", "adam", "lstm"])
def test_unrolled_is_the_steps(rule: rules.Rule) -> None:
    at = problem()
    params, state = at.start, rule.init(at.start)
    losses = []
    for _ in range(4):
        losses.append(at.objective(params))
        with torch.no_grad():
            delta, state = rule.update({"theta": gradient(at, params["theta"])}, state, params, losses[-1])
            params = {"theta": params["theta"] + delta["theta"]}
    losses.append(at.objective(params))
    with torch.no_grad():
        run = unrolled(rule, at, steps=4)
    torch.testing.assert_close(run.losses, torch.stack(losses), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run.params["theta"], params["theta"], rtol=1e-10, atol=1e-12)
    assert not run.losses.requires_grad
    assert not run.params["theta"].requires_grad


def test_a_trajectory_goes_on_where_it_ended() -> None:
    rule, at = made(), problem()
    with torch.no_grad():
        whole = unrolled(rule, at, steps=5)
        first = unrolled(rule, at, steps=2)
        second = unrolled(rule, at._replace(start=first.params), steps=3, state=first.state)
    assert torch.equal(whole.losses, torch.cat([first.losses, second.losses[1:]]))


def test_no_steps() -> None:
    at = problem()
    assert torch.equal(unrolled(made(), at, steps=0).losses[0], at.objective(at.start))


def differences(total: Callable[[], float], parameter: torch.Tensor) -> dict[int, float]:
    """The derivative of ``total`` by some numbers of a parameter, by central differences."""
    flat, answer = parameter.data.view(-1), {}
    for place in range(0, len(flat), max(1, len(flat) // 5)):
        kept, sides = flat[place].item(), []
        for side in (1e-5, -1e-5):
            flat[place] = kept + side
            sides.append(total())
        flat[place] = kept
        answer[place] = (sides[0] - sides[1]) / 2e-5
    return answer


@pytest.mark.parametrize("p", [10.0, None])
def test_meta_gradient_takes_gradients_as_numbers(p: float | None) -> None:
    """Finite differences of a trajectory in which the gradients that the rule reads are frozen."""
    rule, at = made(p=p, scale=0.5), problem()
    unrolled(rule, at, steps=5).losses.sum().backward()
    grads: list[torch.Tensor] = []

    class Recorder:
        def init(self, params: Params) -> Any:
            return rule.init(params)

        def update(self, grad: Params, state: Any, params: Params, loss: torch.Tensor) -> Any:
            grads.append(grad["theta"].clone())
            return rule.update(grad, state, params, loss)

    with torch.no_grad():
        unrolled(Recorder(), at, steps=5)

    @torch.no_grad()
    def total() -> float:
        params, state, losses = at.start, rule.init(at.start), [at.objective(at.start).sum()]
        for grad in grads:
            delta, state = rule.update({"theta": grad}, state, params, LOSS.expand(3))
            params = {"theta": params["theta"] + delta["theta"]}
            losses.append(at.objective(params).sum())
        return sum(losses).item()

    for parameter in rule.parameters():
        assert parameter.grad is not None
        for place, slope in differences(total, parameter).items():
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("make", [lambda: made(p=None), lambda: Policy(2, history=3, hidden=4).double()])
def test_exact_meta_gradient(make: Callable[[], nn.Module]) -> None:
    """Finite differences of the very trajectory, with all that a step depends on."""
    rule, at = make(), problem()
    assert isinstance(rule, rules.Rule)
    for parameter in rule.parameters():  # a policy starts with zeros
        parameter.data.add_(torch.randn(parameter.shape, dtype=torch.float64), alpha=0.1)
    unrolled(rule, at, steps=4, first_order=False).losses.sum().backward()

    @torch.no_grad()
    def total() -> float:
        return unrolled(rule, at, steps=4).losses.sum().item()

    for parameter in rule.parameters():
        assert parameter.grad is not None
        for place, slope in differences(total, parameter).items():
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


# Training


def test_truncated_backpropagation_is_the_loop_written_out() -> None:
    ours, other = made(p=None), made(p=None)
    weights = tuple(0.5 + 0.1 * t for t in range(8))
    trainer = Backpropagation(steps=7, truncation=3, weights=weights, clip=0.7)
    adam = torch.optim.Adam(ours.parameters(), lr=0.01)
    curve = trainer.step(ours, problem(), optimizer=adam)

    adam, at = torch.optim.Adam(other.parameters(), lr=0.01), problem()
    theta, state, seen = at.start["theta"], other.init(at.start), []
    for points in ((0, 1, 2, 3), (3, 4, 5, 6), (6, 7)):
        total = torch.zeros((), dtype=torch.float64)
        for t in points:
            loss = at.objective({"theta": theta})
            total = total + weights[t] * loss.mean()
            seen += [loss.mean().item()] if t == 0 or t != points[0] else []
            if t != points[-1]:
                delta, state = other.update({"theta": gradient(at, theta)}, state, {"theta": theta}, loss.detach())
                theta = theta + delta["theta"]
        adam.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.7)
        adam.step()
        theta, state = theta.detach(), tuple((h.detach(), c.detach()) for h, c in state)
    torch.testing.assert_close(curve, torch.tensor(seen, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "make",
    [lambda g: LSTMOptimizer(p=None, scale=1.0, generator=g), lambda g: MetaLSTM(generator=g)],
    ids=["LSTMOptimizer", "MetaLSTM"],
)
@pytest.mark.parametrize(
    "trainer", [Backpropagation(steps=5, truncation=3), EvolutionStrategy(steps=5, pairs=6, deviation=0.02)]
)
def test_rules_learn(make: Callable[[torch.Generator], nn.Module], trainer: Any, rng_untouched: Untouched) -> None:
    with rng_untouched():
        g = torch.Generator().manual_seed(0)
        rule = make(g)
        assert isinstance(rule, rules.Rule)
        adam = torch.optim.Adam(rule.parameters(), lr=0.02)
        settings = {"optimizer": adam, "trainer": trainer, "iterations": 12, "generator": g}
        curves = train(rule, lambda g: quadratics(16, generator=g), **settings)
    assert curves.shape == (12, 6)
    assert curves[-3:].sum() < 0.97 * curves[:3].sum()


def test_a_policy_learns() -> None:
    g = torch.Generator().manual_seed(0)
    policy = Policy(4, current=True, generator=g)
    adam = torch.optim.Adam(policy.parameters(), lr=0.003)
    trainer = Backpropagation(steps=20, truncation=None, first_order=False, clip=1.0)
    settings = {"optimizer": adam, "trainer": trainer, "iterations": 25, "generator": g}
    curves = train(policy, lambda g: logistic_regression(32, generator=g), **settings)
    gains = curves[:, -1] / curves[:, 0]  # of the last point on the start
    assert gains[0] == 1
    assert gains[-5:].mean() < 0.95


def test_evolution_estimates_the_gradient() -> None:
    """With many pairs of small changes, it points where the exact meta-gradient does."""
    policy, at = Policy(2, history=2, hidden=3, generator=torch.Generator().manual_seed(0)).double(), problem()
    parameters = list(policy.parameters())
    for parameter in parameters:
        parameter.data.normal_(std=0.1)
    kept = [parameter.clone() for parameter in parameters]
    unrolled(policy, at, steps=3, first_order=False).losses.mean(1).sum().backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    still = torch.optim.SGD(parameters, lr=0.0)
    trainer = EvolutionStrategy(steps=3, pairs=300, deviation=1e-3)
    trainer.step(policy, at, optimizer=still, generator=torch.Generator().manual_seed(0))
    estimate = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    assert torch.cosine_similarity(estimate, exact, 0) > 0.93
    assert estimate.norm() / exact.norm() == pytest.approx(1, abs=0.2)
    assert all(torch.equal(a, b) for a, b in zip(kept, parameters, strict=True)), "the parameters are put back"


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTMOptimizer(sizes=()), r"sizes must be the units of at least one layer.*got \(\)"),
        (lambda: LSTMOptimizer(**{"sizes": 20}), r"sizes must be the units.*such as \(20, 20\), got 20"),
        (lambda: LSTMOptimizer(sizes=(20, 0)), "each of sizes"),
        (lambda: LSTMOptimizer(p=0.0), "p must be"),
        (
            lambda: LSTMOptimizer(p=100.0),
            r"p must be at most 88.7, as e\^p is infinite in torch.float32 else, got 100.0",
        ),
        (lambda: LSTMOptimizer(scale=-1.0), "scale"),
        (lambda: Backpropagation(steps=0), "steps"),
        (lambda: Backpropagation(truncation=0), "truncation"),
        (lambda: Backpropagation(clip=0.0), "clip"),
        (lambda: Backpropagation(steps=3, weights=(1.0, 1.0, 1.0)), "weights must be 4 numbers.*got 3"),
        (lambda: Backpropagation(steps=2, weights=(1.0, math.nan, 1.0)), "each of weights must be a finite number"),
        (lambda: EvolutionStrategy(pairs=0), "pairs"),
        (lambda: EvolutionStrategy(deviation=0.0), "deviation"),
        (lambda: EvolutionStrategy(weights=()), "weights must be 41 numbers.*got 0"),
        (lambda: unrolled(made(), problem(), steps=-1), "steps"),
        (
            lambda: train(
                made(),
                lambda g: problem(),
                optimizer=torch.optim.Adam(made().parameters()),
                trainer=Backpropagation(),
                iterations=0,
            ),
            "iterations",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str, untyped: None) -> None:
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize("wrong", [3, (3, 4), quadratics])
def test_steps_need_a_problem(wrong: Any, untyped: None) -> None:
    with pytest.raises(SettingError, match=r"problem must be a Problem\(objective, start\)"):
        unrolled(made(), wrong, steps=2)
    with pytest.raises(SettingError, match="rule must be a rule with init and update"):
        unrolled(wrong, problem(), steps=2)


@pytest.mark.parametrize("trainer", [Backpropagation(steps=4), EvolutionStrategy(steps=4, pairs=1)])
def test_trainers_say_what_they_need(trainer: Any, untyped: None) -> None:
    rule = made()
    adam = torch.optim.Adam(rule.parameters())
    with pytest.raises(SettingError, match=r"rule must be a rule with init and update.*got 'x'"):
        trainer.step("x", problem(), optimizer=adam)
    with pytest.raises(SettingError, match="problem must be"):
        trainer.step(rule, 3, optimizer=adam)
    with pytest.raises(SettingError, match=r"optimizer must be a torch\.optim\.Optimizer of the rule's parameters"):
        trainer.step(rule, problem(), optimizer="adam")
    with pytest.raises(SettingError, match="trainer must be Backpropagation"):
        train(rule, lambda g: problem(), optimizer=adam, trainer=type(trainer), iterations=1)


def frozen() -> LSTMOptimizer:
    return made().requires_grad_(False)


@pytest.mark.parametrize("trainer", [Backpropagation(steps=4), EvolutionStrategy(steps=4, pairs=1)])
def test_a_rule_that_cannot_learn_is_refused(trainer: Any) -> None:
    rule = frozen()
    with pytest.raises(SettingError, match=r"hold parameters that require a gradient, got none.*requires_grad_\(\)"):
        trainer.step(rule, problem(), optimizer=torch.optim.Adam(rule.parameters()))


@pytest.mark.parametrize("rule", [rules.sgd(0.1), frozen()])
def test_the_optimizer_of_another_rule_is_refused(rule: rules.Rule) -> None:
    adam = torch.optim.Adam(made().parameters())
    with pytest.raises(SettingError, match="steps must depend on parameters that the optimizer holds"):
        Backpropagation(steps=4).step(rule, problem(), optimizer=adam)
    with torch.no_grad(), pytest.raises(SettingError, match=r"leave torch\.no_grad\(\)"):
        Backpropagation(steps=4).step(made(), problem(), optimizer=adam)


@pytest.mark.parametrize("family", [problem(), None])
def test_a_family_is_a_function(family: Any, untyped: None) -> None:
    adam = torch.optim.Adam(made().parameters())
    with pytest.raises(SettingError, match=r"family must be a function that draws a Problem.*got "):
        train(made(), family, optimizer=adam, trainer=Backpropagation(steps=4), iterations=1)


@pytest.mark.parametrize("rule", [made(), MetaLSTM().double(), Policy(4).double()])
def test_a_missing_gradient_is_told(rule: rules.Rule) -> None:
    params = {"w": torch.ones(3).double(), "b": torch.ones(()).double()}
    with pytest.raises(SettingError, match=r"each of the parameters \['w', 'b'\], got \['w'\]\. Pass zeros"):
        rule.update({"w": params["w"]}, rule.init(params), params, LOSS)


@pytest.mark.parametrize("rule", [made(), MetaLSTM().double()])
def test_the_state_of_another_batch_is_told(rule: rules.Rule, untyped: None) -> None:
    params = {"w": torch.ones(3).double()}
    _, state = rule.update(params, rule.init(params), params, LOSS)
    params = {"w": torch.ones(5).double()}
    with pytest.raises(ShapeError, match="state of 5 coordinates must have as many rows, or one for all, got 3"):
        rule.update(params, state, params, LOSS)


@pytest.mark.parametrize("trainer", [Backpropagation(steps=4), EvolutionStrategy(steps=4, pairs=1)])
def test_divergence_is_told_and_changes_nothing(trainer: Any) -> None:
    rule = made(p=None)
    kept = [parameter.clone() for parameter in rule.parameters()]
    endless = Problem(lambda params: params["theta"].square().sum(-1) * math.inf, {"theta": torch.ones(2, 3).double()})
    with pytest.raises(NonFiniteError, match=r"steps 0 to 4 sum to (inf|nan): the rule's steps diverge"):
        trainer.step(rule, endless, optimizer=torch.optim.Adam(rule.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, rule.parameters(), strict=True))
