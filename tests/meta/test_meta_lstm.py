"""The Meta-LSTM against its equations, coordinate by coordinate, and as the rule of MbPA."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Parametric, rules
from recollect.errors import SettingError, ShapeError
from recollect.meta.coordinates import flatten, log_and_sign, mapped, unflatten
from recollect.meta.meta_lstm import MetaLSTM
from recollect.meta.objectives import quadratics
from recollect.meta.training import Backpropagation, unrolled

Untouched = Callable[[], AbstractContextManager[None]]
SHAPES = {"weight": (2, 3), "bias": (2,), "scale": ()}


def draw(seed: int = 0, *, rows: tuple[int, ...] = (), size: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn((*rows, *shape), dtype=torch.float64, generator=g) for n, shape in SHAPES.items()}


def made(**settings: Any) -> MetaLSTM:
    """A Meta-LSTM whose weights are large enough to matter."""
    g = torch.Generator().manual_seed(1)
    rule = MetaLSTM(hidden=5, generator=g, **settings).double()
    for parameter in rule.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64), alpha=0.4)
    return rule


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair(x: float, p: float) -> list[float]:
    return [math.log(abs(x)) / p, math.copysign(1.0, x)] if abs(x) > math.exp(-p) else [-1.0, math.exp(p) * x]


def lstm_by_loop(weight: list[list[float]], bias: list[float], x: list[float], h: list[float], c: list[float]) -> Any:
    """One step of an LSTM for one coordinate; gates in the order input, forget, cell, output."""
    size = len(h)
    gates = [bias[r] + sum(w * v for w, v in zip(weight[r], x + h, strict=True)) for r in range(4 * size)]
    for u in range(size):
        enter, forget, new, leave = (gates[k * size + u] for k in range(4))
        c = [*c[:u], sigmoid(forget) * c[u] + sigmoid(enter) * math.tanh(new), *c[u + 1 :]]
        h = h if u else list(h)
        h[u] = sigmoid(leave) * math.tanh(c[u])
    return h, c


def by_loop(rule: MetaLSTM, theta: list[float], grads: list[list[float]], losses: list[float]) -> list[list[float]]:
    """The equations for each coordinate by itself; its parameter moves by what comes out."""
    weight, bias = rule.lstm.weight.tolist(), rule.lstm.bias.tolist()
    (*of_f, back_f), (*of_i, back_i) = rule.weight.tolist()
    b_f, b_i = rule.bias.tolist()
    deltas = []
    for place, start in enumerate(theta):
        h, c, f, i, value = [0.0] * 5, [0.0] * 5, 0.0, 0.0, start
        deltas.append([])
        for grad, loss in zip(grads, losses, strict=True):
            h, c = lstm_by_loop(weight, bias, pair(loss, rule.p) + pair(grad[place], rule.p), h, c)
            seen = [*h, value]
            f = sum(w * x for w, x in zip(of_f, seen, strict=True)) + back_f * f + b_f
            i = sum(w * x for w, x in zip(of_i, seen, strict=True)) + back_i * i + b_i
            deltas[-1].append(sigmoid(f) * value - sigmoid(i) * grad[place] - value)
            value += deltas[-1][-1]
    return deltas


@pytest.mark.parametrize("p", [10.0, 3.0])
def test_it_is_the_equations_coordinate_by_coordinate(p: float) -> None:
    rule, params, losses = made(p=p), draw(2), [1.7, 0.3, 1e-6]
    grads = [draw(3), draw(4, size=1e-5), draw(5, size=100.0)]
    flat = [flatten(g, torch.tensor(0.0), like=params).tolist() for g in grads]
    expected = by_loop(rule, flatten(params, torch.tensor(0.0), like=params).tolist(), flat, losses)
    state = rule.init(params)
    for step, (grad, loss) in enumerate(zip(grads, losses, strict=True)):
        delta, state = rule.update(grad, state, params, torch.tensor(loss, dtype=torch.float64))
        answer = torch.tensor([row[step] for row in expected], dtype=torch.float64)
        torch.testing.assert_close(flatten(delta, torch.tensor(0.0), like=params), answer, rtol=1e-11, atol=1e-13)
        params = {name: p + delta[name] for name, p in params.items()}


@pytest.mark.parametrize("p", [10.0, 5.0])
def test_preprocessing(p: float) -> None:
    edge = math.exp(-p)
    values = [0.0, 1.0, -1.0, 1e30, -1e-30, edge, 1.01 * edge, -0.99 * edge, 0.3, -17.0]
    answer = log_and_sign(torch.tensor(values, dtype=torch.float64), p)
    torch.testing.assert_close(answer, torch.tensor([pair(x, p) for x in values], dtype=torch.float64))


def test_sizes_and_start() -> None:
    rule = MetaLSTM(generator=torch.Generator().manual_seed(0))
    assert rule.lstm.weight.numel() + rule.lstm.bias.numel() == 2000
    assert rule.weight.numel() + rule.bias.numel() == 46
    assert all(p.abs().max() <= 0.01 for p in (rule.lstm.weight, rule.lstm.bias, rule.weight))
    assert 4 <= rule.bias[0] <= 5
    assert -5 <= rule.bias[1] <= -4


def test_many_rows_are_the_rows_one_by_one() -> None:
    rule, losses = made(), torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
    params, grads = draw(1, rows=(3,)), [draw(2, rows=(3,)), draw(3, rows=(3,))]
    state = rule.init(params)
    for grad in grads:
        together, state = rule.update(grad, state, params, losses)
    for row in range(3):
        alone = {name: p[row] for name, p in params.items()}
        state = rule.init(alone)
        for grad in grads:
            delta, state = rule.update({name: g[row] for name, g in grad.items()}, state, alone, losses[row])
        for name in SHAPES:
            torch.testing.assert_close(together[name][row], delta[name], rtol=1e-12, atol=1e-14)


def test_the_order_of_gradients_does_not_matter() -> None:
    rule, params, grads, loss = made(), draw(1), draw(2), torch.tensor(1.0, dtype=torch.float64)
    first, _ = rule.update(grads, rule.init(params), params, loss)
    again, _ = rule.update(dict(reversed(grads.items())), rule.init(params), params, loss)
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)


def test_the_delta_has_the_dtype_of_the_parameters() -> None:
    rule, params, loss = MetaLSTM(), draw(1), torch.tensor(1.0, dtype=torch.float64)
    delta, state = rule.update(draw(2), rule.init(params), params, loss)
    assert {d.dtype for d in delta.values()} == {torch.float64}
    assert state[1].dtype == torch.float32
    rule.update(draw(2), state, params, loss)


def test_weights_come_from_the_generator(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, two = (MetaLSTM(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# As the rule of MbPA


def model(rule: rules.Rule, *, steps: int = 3, empty: bool = False, **settings: Any) -> tuple[MbPA, nn.Linear]:
    head, memory = nn.Linear(4, 3).double(), EpisodicMemory(capacity=20, key_size=4, key_dtype=torch.float64)
    if not empty:
        memory.write(torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3)
    adaptation = LocalAdaptation(rule, steps=steps, **settings)
    return MbPA(head, memory, neighbors=5, adaptation=adaptation), head


def test_it_drives_mbpa() -> None:
    """Against a loop over queries, parameters copied, gradients by autograd, gates by the equations."""
    rule = made()
    mbpa, head = model(rule)
    queries = torch.randn(4, 4, dtype=torch.float64)
    context = mbpa.memory.read(queries, 5, kernel=mbpa.kernel)
    for row, query in enumerate(queries):
        weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
        grads, losses, start = [], [], torch.cat([weight.flatten(), bias])
        theta = start
        for _ in range(3):
            leaf = theta.clone().requires_grad_()
            logits = context.keys[row] @ leaf[:12].reshape(3, 4).T + leaf[12:]
            loss = (
                context.weights[row] * nn.functional.cross_entropy(logits, context.values[row], reduction="none")
            ).sum()
            (grad,) = torch.autograd.grad(loss, leaf)
            grads.append(grad.tolist())
            losses.append(loss.item())
            deltas = torch.tensor(by_loop(rule, start.tolist(), grads, losses), dtype=torch.float64)
            theta = start + deltas.sum(1)
        expected = (theta[:12].reshape(3, 4) @ query + theta[12:]).log_softmax(0)
        torch.testing.assert_close(mbpa(queries)[row], expected, rtol=1e-9, atol=1e-11)


def test_mbpa_without_steps_or_memories_is_parametric() -> None:
    queries = torch.randn(4, 4, dtype=torch.float64)
    for mbpa, head in (model(made(), steps=0), model(made(), empty=True)):
        assert torch.equal(mbpa(queries), Parametric(head)(queries))


def test_an_mbpa_batch_is_its_rows_one_by_one() -> None:
    mbpa, _ = model(made(), chunk_size=3)
    queries = torch.randn(7, 4, dtype=torch.float64)
    rows = torch.cat([mbpa(query.unsqueeze(0)) for query in queries])
    torch.testing.assert_close(mbpa(queries), rows, rtol=1e-12, atol=1e-12)


def test_mbpa_changes_nothing_and_keeps_no_graph(rng_untouched: Untouched) -> None:
    rule = made()
    mbpa, head = model(rule)
    before = [p.clone() for p in (*rule.parameters(), *head.parameters())]
    queries = torch.randn(4, 4, dtype=torch.float64)
    with rng_untouched():
        outputs = mbpa(queries)
    assert not outputs.requires_grad
    assert torch.equal(outputs, mbpa(queries))
    with torch.inference_mode():
        assert torch.equal(outputs, mbpa(queries))
    after = (*rule.parameters(), *head.parameters())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))


# Learning


def test_meta_gradient_is_that_with_gradients_and_losses_as_numbers() -> None:
    """Finite differences of a trajectory in which what the rule reads of the problem is frozen."""
    rule = made()
    problem = quadratics(2, dimension=3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = problem._replace(start={"theta": 30 * problem.start["theta"]})
    run = unrolled(rule, problem, steps=4)
    run.losses.sum().backward()

    read, params = [], problem.start  # the numbers that the rule reads, at the true parameters
    state = rule.init(params)
    for _ in range(4):
        leaf = params["theta"].detach().requires_grad_()
        loss = problem.objective({"theta": leaf})
        read.append((torch.autograd.grad(loss.sum(), leaf)[0], loss.detach()))
        with torch.no_grad():
            delta, state = rule.update({"theta": read[-1][0]}, state, params, read[-1][1])
            params = {"theta": params["theta"] + delta["theta"]}

    @torch.no_grad()
    def total() -> float:
        params, state, losses = problem.start, rule.init(problem.start), []
        for grad, loss in read:
            losses.append(problem.objective(params).sum())
            delta, state = rule.update({"theta": grad}, state, params, loss)
            params = {"theta": params["theta"] + delta["theta"]}
        return (sum(losses) + problem.objective(params).sum()).item()

    for parameter in rule.parameters():
        flat, grad = parameter.data.view(-1), parameter.grad
        assert grad is not None
        for place in range(0, len(flat), max(1, len(flat) // 7)):
            kept, sides = flat[place].item(), []
            for side in (1e-5, -1e-5):
                flat[place] = kept + side
                sides.append(total())
            flat[place] = kept
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(grad.view(-1)[place].item(), rel=1e-5, abs=1e-8)


def test_the_start_is_learned_by_whoever_owns_it() -> None:
    rule = made()
    problem = quadratics(2, dimension=3, dtype=torch.float64)
    start = {"theta": problem.start["theta"].requires_grad_()}
    unrolled(rule, problem._replace(start=start), steps=3).losses[-1].sum().backward()
    assert start["theta"].grad is not None
    assert (start["theta"].grad != 0).all()


def test_it_learns() -> None:
    g = torch.Generator().manual_seed(0)
    rule = MetaLSTM(generator=g)
    adam, trainer = torch.optim.Adam(rule.parameters(), lr=0.02), Backpropagation(steps=8, truncation=None)
    curves = [trainer.step(rule, quadratics(32, generator=g), optimizer=adam) for _ in range(20)]
    assert curves[-1][-1] < 0.8 * curves[0][-1]


# Errors


def test_values_as_two_numbers_at_the_largest_p() -> None:
    for dtype, p in ((torch.float32, 88.7), (torch.float64, 709.7)):
        answer = log_and_sign(torch.tensor([0.0, 1.0, -2.0], dtype=dtype), p)
        expected = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [math.log(2) / p, -1.0]], dtype=dtype)
        torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 100.0), (torch.float64, 710.0), (torch.float32, -1.0)])
def test_an_infinite_scale_is_refused(dtype: torch.dtype, p: float) -> None:
    with pytest.raises(SettingError, match=r"p must be (at most .* as e\^p is infinite|a finite number above 0)"):
        log_and_sign(torch.zeros((), dtype=dtype), p)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hidden": 0}, "hidden"), ({"p": 0.0}, "p must be"), ({"p": 100.0}, r"p must be at most 88\.7")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MetaLSTM(**settings)


def test_a_loss_for_each_example_is_refused() -> None:
    rule, params = made(), draw(1, rows=(3,))
    with pytest.raises(ShapeError, match=r"loss of shape \(7,\).*'weight' has shape \(3, 2, 3\)"):
        rule.update(params, rule.init(params), params, torch.ones(7, dtype=torch.float64))


def test_flat_and_back() -> None:
    params = draw(1, rows=(3,))
    flat = flatten(params, torch.zeros(3), like=params)
    assert flat.shape == (3, 9)
    assert torch.equal(flat[1, 6:8], params["bias"][1])
    assert all(torch.equal(p, params[name]) for name, p in unflatten(flat, params).items())


class Moments(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_states_are_mapped_whole() -> None:
    one, kept = torch.ones(1), (3, [{"a": torch.ones(1)}, None], Moments(torch.ones(1), torch.zeros(1)))
    changed = mapped(lambda tensor: tensor + one, kept)
    assert changed[0] == 3
    assert changed[1][0]["a"].item() == 2
    assert changed[1][1] is None
    assert changed[2] == Moments(torch.tensor([2.0]), torch.tensor([1.0]))
    assert kept[1][0]["a"].item() == 1
