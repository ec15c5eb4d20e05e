"""MAML is the loop over tasks that the paper writes down: its outputs, and its gradients through every step."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, layer_norm, mse_loss, scaled_dot_product_attention

from recollect import Categorical, Gaussian, rules
from recollect.errors import (
    DtypeError,
    HeadError,
    LabelError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from recollect.meta import maml as module
from recollect.meta.maml import MAML, MetaSGD

Untouched = Callable[[], AbstractContextManager[None]]
Params = dict[str, Tensor]
Step = Callable[[Params, Any, Params, Tensor], tuple[Params, Any]]  # (grads, state, params, loss) -> (params, state)

TASKS, SHOTS, ASKED, INPUTS, CLASSES = 3, 6, 5, 5, 3
DOUBLE = torch.float64


class FunctionalNorm(nn.Module):
    """Calls the function of layer normalization itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.scale, self.shift)


class Sine(nn.Module):
    """Makes a weight from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Recurrent(nn.Module):
    """Two steps of a cell."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.last = cell, nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x, self.cell(x)))


class Attentive(nn.Module):
    """Attention over the pixels, by its layer or by its function."""

    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if layer else None
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.unsqueeze(2))
        if self.attention is None:
            heads = y.unsqueeze(1)
            return self.last(scaled_dot_product_attention(heads, heads, heads).mean((1, 2)))
        return self.last(self.attention(y, y, y, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """The same matrix twice, and a function in place at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight
        self.last = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.mul_(0.5)).tanh()).tanh())


class Moody(nn.Module):
    """Computes something else in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if self.training else 1)


def flat(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 6), norm, nn.Tanh(), nn.Linear(6, CLASSES))


def image(norm: nn.Module) -> nn.Sequential:
    # The inputs are images of 1 x 5 pixels.
    shape = (nn.Unflatten(1, (1, 1, INPUTS)), nn.Conv2d(1, 4, (1, 3), padding=(0, 1)))
    return nn.Sequential(*shape, norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * INPUTS, CLASSES))


NETS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: flat(nn.BatchNorm1d(6)),
    "BatchNorm1d without running statistics": lambda: flat(nn.BatchNorm1d(6, track_running_stats=False)),
    "BatchNorm1d without weights": lambda: flat(nn.BatchNorm1d(6, affine=False)),
    "BatchNorm2d": lambda: image(nn.BatchNorm2d(4)),
    "BatchNorm2d without running statistics": lambda: image(nn.BatchNorm2d(4, track_running_stats=False)),
    "LayerNorm": lambda: flat(nn.LayerNorm(6)),
    "LayerNorm without weights": lambda: flat(nn.LayerNorm(6, elementwise_affine=False)),
    "layer_norm": lambda: flat(FunctionalNorm(6)),
    "RMSNorm": lambda: flat(nn.RMSNorm(6)),
    "GroupNorm": lambda: image(nn.GroupNorm(2, 4)),
    "InstanceNorm2d": lambda: image(nn.InstanceNorm2d(4, affine=True)),
    "InstanceNorm2d with running statistics": lambda: image(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ),
    "parametrized": lambda: nn.utils.parametrize.register_parametrization(nn.Linear(INPUTS, CLASSES), "weight", Sine()),
    "by mode": Moody,
    "tied": Tied,
}


class Case(NamedTuple):
    support: Tensor
    targets: Tensor
    queries: Tensor
    wanted: Tensor


def episodes(outputs: int | None = None, *, tasks: int = TASKS) -> Case:
    def wanted(rows: int) -> Tensor:
        if outputs is None:
            return torch.randint(CLASSES, (tasks, rows))
        return torch.randn(tasks, rows, outputs, dtype=DOUBLE)

    inputs = [torch.randn(tasks, rows, INPUTS, dtype=DOUBLE) for rows in (SHOTS, ASKED)]
    return Case(inputs[0], wanted(SHOTS), inputs[1], wanted(ASKED))


def made(name: str = "BatchNorm1d") -> nn.Module:
    net = NETS[name]().double()
    for parameter in net.parameters():  # weights of 1 and biases of 0 would hide mistakes
        parameter.data += 0.3 * torch.randn_like(parameter)
    return net


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def stripped(net: nn.Module) -> nn.Module:
    """The network in training mode, its normalization without running statistics; with the same parameters."""
    memo: dict[int, object] = {id(p): p for p in net.parameters()}
    net = copy.deepcopy(net, memo).train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.InstanceNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    return net


def loop(
    net: nn.Module,
    case: Case,
    step: Step,
    *,
    steps: int,
    first_order: bool = False,
    names: tuple[str, ...] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """Algorithm 2, literally: one task at a time, one step at a time. Returns the outputs at the queries."""
    net, outputs = stripped(net), []
    for support, targets, queries, _ in zip(*case, strict=True):
        params = {n: p for n, p in net.named_parameters() if names is None or n in names}
        state = None
        for _ in range(steps):
            error = loss(functional_call(net, params, (support.clone(),)), targets)
            parts = torch.autograd.grad(error, tuple(params.values()), create_graph=True)
            if first_order:
                error, parts = error.detach(), tuple(part.detach() for part in parts)
            params, state = step(dict(zip(params, parts, strict=True)), state, params, error)
        outputs.append(functional_call(net, params, (queries.clone(),)))
    return torch.stack(outputs)


def descent(grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
    return {n: p - 0.4 * grads[n] for n, p in params.items()}, state


def momentum(grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
    state = {n: g + (0.7 * state[n] if state else 0) for n, g in grads.items()}
    return {n: p - 0.3 * state[n] for n, p in params.items()}, state


def adam(grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
    count, first, second = state or (0, dict.fromkeys(grads, 0.0), dict.fromkeys(grads, 0.0))
    count += 1
    first = {n: 0.9 * first[n] + 0.1 * g for n, g in grads.items()}
    second = {n: 0.999 * second[n] + 0.001 * g**2 for n, g in grads.items()}
    new = {}
    for n, p in params.items():
        mean, square = first[n] / (1 - 0.9**count), second[n] / (1 - 0.999**count)
        new[n] = p - 0.1 * mean / (square.sqrt() + 1e-3)
    return new, (count, first, second)


RULES: dict[str, tuple[rules.Rule, Step]] = {
    "momentum": (rules.sgd(0.3, momentum=0.7), momentum),
    "adam": (rules.adam(0.1, epsilon=1e-3), adam),
}


class Learned(nn.Module):
    """A rule with three numbers to learn, which reads the loss and the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.3, 0.2, 0.1], dtype=DOUBLE))

    def init(self, params: Params) -> Params:
        return {}

    def change(self, g: Tensor, p: Tensor, loss: Tensor) -> Tensor:
        rate, slope, decay = self.numbers
        return -rate * g * (1 + slope * loss) - decay * p

    def update(self, grads: Params, state: Params, params: Params, loss: Tensor) -> tuple[Params, Params]:
        assert loss.shape == (len(next(iter(grads.values()))),)
        wide = {n: loss.view(-1, *[1] * (g.dim() - 1)) for n, g in grads.items()}
        return {n: self.change(g, params[n], wide[n]) for n, g in grads.items()}, state

    def step(self, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {n: p + self.change(grads[n], p, loss) for n, p in params.items()}, state


def agree(maml: MAML, case: Case, expected: Tensor) -> None:
    """Outputs and all meta-gradients are those of the loop."""
    outputs = maml(*case[:3])
    close(outputs, expected)
    learned = tuple(maml.parameters())
    weights = torch.randn_like(expected)
    actual, right = (
        torch.autograd.grad((result * weights).sum(), learned, materialize_grads=True) for result in (outputs, expected)
    )
    assert sum(float(part.abs().sum()) for part in right) > 0.1
    for one, other in zip(actual, right, strict=True):
        close(one, other)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_the_loop(name: str, steps: int) -> None:
    net, case = made(name), episodes()
    agree(MAML(net, rule=rules.sgd(0.4), steps=steps), case, loop(net, case, descent, steps=steps))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_finite_differences(name: str, steps: int) -> None:
    net, case = made(name), episodes()
    maml = MAML(net, rule=rules.sgd(0.4), steps=steps)
    direction = [torch.randn_like(p) for p in net.parameters()]

    def loss() -> Tensor:
        return cross_entropy(maml(*case[:3]).flatten(0, 1), case.wanted.flatten())

    def moved(distance: float) -> float:
        with torch.no_grad():
            for parameter, d in zip(net.parameters(), direction, strict=True):
                parameter.add_(d, alpha=distance)
            return float(loss())

    grads = torch.autograd.grad(loss(), tuple(net.parameters()), materialize_grads=True)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    ahead, behind = moved(1e-5), moved(-2e-5)
    assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm", "tied"])
def test_first_order(name: str) -> None:
    net, case = made(name), episodes()
    maml = MAML(net, rule=rules.sgd(0.4), steps=3, first_order=True)
    agree(maml, case, loop(net, case, descent, steps=3, first_order=True))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_other_rules(name: str, first_order: bool) -> None:
    net, case, (rule, step) = made("tied"), episodes(), RULES[name]
    maml = MAML(net, rule=rule, steps=3, first_order=first_order)
    agree(maml, case, loop(net, case, step, steps=3, first_order=first_order))


@pytest.mark.parametrize("first_order", [False, True])
def test_learned_rules(first_order: bool) -> None:
    net, case, rule = made(), episodes(), Learned()
    maml = MAML(net, rule=rule, steps=3, first_order=first_order)
    assert "rule.numbers" in maml.state_dict()
    agree(maml, case, loop(net, case, rule.step, steps=3, first_order=first_order))


def test_meta_sgd() -> None:
    net, case = made(), episodes()
    rule = MetaSGD(net, 0.4)
    rates = dict(rule.rates.named_parameters())
    assert {name: rate.shape for name, rate in rates.items()} == {n: p.shape for n, p in net.named_parameters()}
    assert all(bool((rate == 0.4).all()) and rate.dtype == DOUBLE for rate in rates.values())
    for rate in rates.values():
        rate.data += 0.2 * torch.randn_like(rate)

    def step(grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {n: p - rates[n] * grads[n] for n, p in params.items()}, state

    agree(MAML(net, rule=rule, steps=2), case, loop(net, case, step, steps=2))


@pytest.mark.parametrize("names", [("3",), ("3.bias", "1")])
def test_some_parameters_adapt_and_all_learn(names: tuple[str, ...]) -> None:
    net, case = made(), episodes()
    chosen = tuple(n for n, _ in net.named_parameters() if n in names or n.partition(".")[0] in names)
    maml = MAML(net, rule=rules.sgd(0.4), steps=2, parameters=names)
    agree(maml, case, loop(net, case, descent, steps=2, names=chosen))
    assert tuple(maml.adapt(case.support, case.targets)) == chosen


def test_shared_parameters_adapt_by_either_name() -> None:
    net, case = made("tied"), episodes()
    maml = MAML(net, rule=rules.sgd(0.4), parameters=("second.weight",))
    agree(maml, case, loop(net, case, descent, steps=1, names=("first.weight",)))


def test_regression() -> None:
    net, case = made("LayerNorm"), episodes(CLASSES)
    maml = MAML(net, rule=rules.sgd(0.4), steps=2, likelihood=Gaussian(variance=0.5))

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return CLASSES * mse_loss(outputs, targets)

    agree(maml, case, loop(net, case, descent, steps=2, loss=squares))


def test_no_step_is_the_network_itself() -> None:
    net, case = made("LayerNorm"), episodes()
    close(MAML(net, rule=rules.sgd(0.4), steps=0)(*case[:3]), net(case.queries))
    close(MAML(net, rule=rules.sgd(0.4))(*case[:3], steps=0), net(case.queries))


def test_steps_may_differ_from_training() -> None:
    net, case = made(), episodes()
    one, three = (MAML(net, rule=rules.sgd(0.4), steps=steps) for steps in (1, 3))
    close(one(*case[:3], steps=3), three(*case[:3]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, None])
def test_chunks_change_nothing(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net, case = made(), episodes(tasks=4)
    monkeypatch.setattr(module, "_BUDGET", 1)  # with None: as few as possible
    maml = MAML(net, rule=rules.sgd(0.4), steps=2, chunk_size=size)
    agree(maml, case, loop(net, case, descent, steps=2))
    whole = MAML(net, rule=rules.sgd(0.4), steps=2, chunk_size=4).adapt(case.support, case.targets)
    for name, parameter in maml.adapt(case.support, case.targets).items():
        close(parameter, whole[name])


def test_tasks_do_not_see_each_other() -> None:
    net, case, order = made(), episodes(tasks=4), torch.tensor([2, 0, 3, 1])
    maml = MAML(net, rule=rules.sgd(0.4), steps=2)
    outputs = maml(*case[:3])
    close(maml(*(part[order] for part in case[:3])), outputs[order])
    close(maml(*(part[1:2] for part in case[:3])), outputs[1:2])


@pytest.mark.parametrize("name", ["BatchNorm1d", "LayerNorm"])
def test_adapted_parameters_are_those_that_answer(name: str) -> None:
    net, case = made(name), episodes()
    maml = MAML(net, rule=rules.sgd(0.4), steps=2)
    params = maml.adapt(case.support, case.targets)
    outputs = [
        functional_call(stripped(net), {n: p[task] for n, p in params.items()}, (case.queries[task],))
        for task in range(TASKS)
    ]
    close(maml(*case[:3]), torch.stack(outputs))
    assert all(p.requires_grad for p in params.values())


@pytest.mark.parametrize("name", NETS)
def test_the_network_is_left_alone(name: str, rng_untouched: Untouched) -> None:
    net, case = made(name), episodes()
    maml = MAML(net, rule=rules.sgd(0.4))
    before = copy.deepcopy(net.state_dict())
    inputs = case.support.clone()
    results = []
    for training in (True, False):
        maml.train(training)
        with rng_untouched():
            results.append(maml(*case[:3]))
            results[-1].sum().backward()
        assert all(part.training is training for part in net.modules())
    assert torch.equal(*results), "the network's mode plays no role"
    assert torch.equal(case.support, inputs)
    assert net.state_dict().keys() == before.keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first_order", [False, True])
def test_without_gradients(mode: Callable[[], AbstractContextManager[None]], first_order: bool) -> None:
    net, case = made(), episodes()
    maml = MAML(net, rule=MetaSGD(net, 0.4), steps=3, first_order=first_order)
    expected = maml(*case[:3])
    with mode():
        outputs = maml(*(part.clone() for part in case[:3]))
        params = maml.adapt(case.support, case.targets)
    assert not outputs.requires_grad
    assert not any(p.requires_grad for p in params.values())
    assert torch.equal(outputs, expected)


def test_frozen_starts_adapt() -> None:
    net, case = made(), episodes()
    expected = loop(net, case, descent, steps=2)
    right = torch.autograd.grad(expected.sum(), net.get_parameter("0.weight"))[0]
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name == "0.weight")
    outputs = MAML(net, rule=rules.sgd(0.4), steps=2)(*case[:3])
    close(outputs, expected)
    outputs.sum().backward()
    close(net.get_parameter("0.weight").grad, right)
    assert net.get_parameter("3.weight").grad is None
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    close(MAML(net, rule=rules.sgd(0.4), steps=2)(*case[:3]), expected)


def test_state_round_trip() -> None:
    case = episodes()
    one, other = (MAML(net, rule=MetaSGD(net, rate), steps=2) for net, rate in ((made(), 0.4), (made(), 0.1)))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*case[:3]), other(*case[:3]))
    assert not any(key.startswith("_") for key in one.state_dict())


def test_copies_are_independent() -> None:
    net, case = made(), episodes()
    maml = MAML(net, rule=rules.sgd(0.4))
    before = maml(*case[:3])
    other = copy.deepcopy(maml)
    for parameter in net.parameters():
        parameter.data.zero_()
    assert torch.equal(other(*case[:3]), before)
    assert not maml(*case[:3], steps=0).any(), "the live parameters are the start"


def test_it_follows_its_network_to_another_dtype() -> None:
    case = episodes()
    maml = MAML(made(), rule=rules.sgd(0.4)).float()
    assert maml(case.support.float(), case.targets, case.queries.float()).dtype == torch.float32


def test_it_learns_a_start() -> None:
    """Lines through 0 of any slope: the best start is in the middle, and one example is enough."""
    net = nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    net.weight.data.fill_(5.0)
    maml = MAML(net, rule=MetaSGD(net, 0.1), likelihood=Gaussian())
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.1)
    for _ in range(150):
        slopes, x = torch.randn(20, 1, 1, dtype=DOUBLE) - 1, torch.ones(20, 1, 1, dtype=DOUBLE)
        loss = mse_loss(maml(x, slopes * x, 2 * x), slopes * 2 * x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2
    assert maml.get_parameter("rule.rates.weight").item() == pytest.approx(1, abs=0.05)


def refused(error: type[Exception], match: str, *, net: nn.Module | None = None, **settings: Any) -> None:
    with pytest.raises(error, match=match):
        MAML(made() if net is None else net, **{"rule": rules.sgd(0.4)} | settings)


def test_settings_are_checked(untyped: None) -> None:
    refused(SettingError, "rule must be a rule", rule=0.4)
    refused(SettingError, "rule must be a rule", rule=rules.sgd)
    refused(SettingError, "steps must be a whole number of at least 0, got -1", steps=-1)
    refused(SettingError, "chunk_size must be a whole number above 0, got 0", chunk_size=0)
    refused(SettingError, r"parameters must be a tuple of names.*got '3'", parameters="3")
    refused(SettingError, "lets nothing adapt", parameters=())
    refused(SettingError, "likelihood must be", likelihood="categorical")
    refused(SettingError, "first_order must be True or False", first_order=1)
    refused(HeadError, r"no parameter or submodule 'fc'.*3.weight", parameters=("fc",))
    refused(HeadError, r"\(ReLU\) has no parameters", net=nn.ReLU())
    refused(HeadError, "submodule '1' is a Dropout", net=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    refused(HeadError, "the network itself is a GRU", net=nn.GRU(2, 2))
    refused(HeadError, "submodule '0' is a LSTMCell", net=nn.Sequential(nn.LSTMCell(2, 2)))
    refused(HeadError, "has no shape yet", net=nn.LazyLinear(2))
    with pytest.raises(SettingError, match="net must be"):
        MAML(nn.Linear, rule=rules.sgd(0.4))
    with pytest.raises(SettingError, match="rate must be a finite number, got nan"):
        MetaSGD(nn.Linear(2, 2), math.nan)


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (nn.Linear(5, 2), r"shape \(3, 5\) and torch.float32, but has those of shape \(2, 5\) and torch.float32"),
        (nn.Linear(5, 3).double(), r"but has those of shape \(3, 5\) and torch.float64"),
        (nn.Sequential(nn.Linear(5, 3)), "but has none. Make it of the same network"),
    ],
)
def test_learned_rates_of_another_network_are_refused(other: nn.Module, got: str) -> None:
    refused(SettingError, "MetaSGD needs rates for 'weight'.*" + got, net=nn.Linear(5, 3), rule=MetaSGD(other, 0.1))


def test_learned_rates_of_more_than_adapts() -> None:
    rule = MetaSGD(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), 0.1)
    net = nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3))
    assert MAML(net, rule=rule, parameters=("1",)).rule is rule


class Odd(nn.Module):
    """A linear layer, and something to be refused."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(INPUTS, CLASSES, dtype=DOUBLE), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.linear(x))


@pytest.mark.parametrize(
    "then",
    [
        nn.functional.dropout,
        lambda y: y if bool(y.sum() > 0) else -y,
        lambda y: y + torch.rand(CLASSES, dtype=DOUBLE),
        lambda y: nn.functional.batch_norm(y, torch.zeros(3).double(), torch.ones(3).double(), training=True),
    ],
    ids=["dropout", "decides", "random", "running statistics"],
)
def test_networks_that_cannot_run_side_by_side_are_refused(then: Callable[[Tensor], Any], untyped: None) -> None:
    with pytest.raises(HeadError, match=r"\(Odd\) cannot run for many tasks side by side"):
        MAML(Odd(then), rule=rules.sgd(0.4))(*episodes()[:3])


@pytest.mark.parametrize("then", [lambda y: (y, y), lambda y: y.sum(1), lambda y: y.T], ids=["tuple", "sum", "turned"])
def test_networks_must_return_a_row_for_each_input(then: Callable[[Tensor], Any], untyped: None) -> None:
    with pytest.raises(HeadError, match=r"must return a row of outputs for each input, \(6, outputs\)"):
        MAML(Odd(then), rule=rules.sgd(0.4))(*episodes()[:3])


def test_other_errors_of_the_network_are_its_own() -> None:
    def then(y: Tensor) -> Tensor:
        raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match=r"^out of coffee") as caught:
        MAML(Odd(then), rule=rules.sgd(0.4))(*episodes()[:3])
    assert caught.value.__notes__ == ["The network ran on 3 tasks side by side, each with inputs of shape (6, 5)."]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch runs them task by task, and says so
@pytest.mark.parametrize("cell", [nn.GRUCell, nn.RNNCell])
def test_cells_without_a_pair_of_states_can_run(cell: type) -> None:
    case, net = episodes(), Recurrent(cell(INPUTS, 4)).double()
    agree(MAML(net, rule=rules.sgd(0.4), steps=2), case, loop(net, case, descent, steps=2))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4, dtype=DOUBLE), nn.Flatten(), nn.Linear(4 * INPUTS, CLASSES, dtype=DOUBLE))


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "LayerNorm", "tied"])
@pytest.mark.parametrize("dtype", [torch.long, torch.uint8])
def test_whole_numbers_are_no_inputs_of_a_linear_layer(name: str, dtype: torch.dtype) -> None:
    case = episodes()
    for support, queries in ((case.support.to(dtype), case.queries), (case.support, case.queries.to(dtype))):
        with pytest.raises(DtypeError, match=rf"the network takes inputs of torch\.float64, got {dtype}\. Use \.to"):
            MAML(made(name), rule=rules.sgd(0.4))(support, case.targets, queries)


def test_whole_numbers_are_the_inputs_of_an_embedding() -> None:
    case, maml = episodes(), MAML(words(), rule=rules.sgd(0.4))
    support, queries = (torch.randint(9, inputs.shape) for inputs in (case.support, case.queries))
    assert maml(support, case.targets, queries).shape == (TASKS, ASKED, CLASSES)
    with pytest.raises(DtypeError, match=r"the network takes inputs of torch\.int64, got torch\.float64"):
        maml(case.support, case.targets, case.queries)
    with pytest.raises(RuntimeError, match="size") as caught:  # one word too many is no matter of dtypes
        maml(support.repeat(1, 1, 2), case.targets, queries.repeat(1, 1, 2))
    assert not isinstance(caught.value, DtypeError)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("layer", [True, False], ids=["layer", "function"])
def test_attention_without_a_second_derivative_says_what_to_do(layer: bool) -> None:
    case, net = episodes(), Attentive(layer=layer).double()
    refusal = pytest.raises(HeadError, match=r"no second derivative.*sdpa_kernel\(SDPBackend.MATH\), or take first")
    with refusal:
        MAML(net, rule=rules.sgd(0.4), steps=2)(*case[:3]).sum().backward()
    with refusal:
        MAML(net, rule=rules.sgd(0.4), steps=2).adapt(*case[:2])["last.weight"].sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("layer", [True, False], ids=["layer", "function"])
def test_attention_is_refused_only_where_it_fails(layer: bool) -> None:
    case, net = episodes(), Attentive(layer=layer).double()
    exact = MAML(net, rule=rules.sgd(0.4))
    with sdpa_kernel(SDPBackend.MATH):
        outputs = exact(*case[:3])
    outputs.sum().backward()
    close(exact(*case[:3]), outputs)  # without a derivative nothing is missing
    torch.autograd.grad(exact(*case[:3], steps=0).sum(), net.get_parameter("first.weight"))
    MAML(net, rule=rules.sgd(0.4), first_order=True)(*case[:3]).sum().backward()
    MAML(net, rule=rules.sgd(0.4), parameters=("last",))(*case[:3]).sum().backward()


def test_arguments_are_checked(untyped: None) -> None:
    case = episodes()
    maml = MAML(made(), rule=rules.sgd(0.4))

    def wrong(error: type[Exception], match: str, **other: Any) -> None:
        with pytest.raises(error, match=match):
            maml(*case._replace(**other)[:3])

    wrong(
        ShapeError, r"queries must be of the same tasks as the support, of 3, got those of 2", queries=case.queries[:2]
    )
    wrong(ShapeError, r"targets must have one target for each example of the support, \(3, 6\)", targets=case.targets.T)
    wrong(ShapeError, r"support must have shape \(tasks, examples, ...\).*got \(3, 0, 5\)", support=case.support[:, :0])
    wrong(ShapeError, r"queries must have shape.*got \(0, 5, 5\)", queries=case.queries[:0])
    wrong(DtypeError, r"support must be torch.float64.*got torch.float32", support=case.support.float())
    wrong(DtypeError, r"queries must be torch.float64.*got torch.float16", queries=case.queries.half())
    wrong(DtypeError, "queries must be a tensor, got list", queries=[[1.0]])
    wrong(DtypeError, r"support must be torch.float64.*got torch.complex128", support=case.support.to(torch.complex128))
    wrong(ShapeError, r"same shape as the support's, \(5,\), got \(4,\)", queries=case.queries[..., :4])
    wrong(ShapeError, r"same shape as the support's, \(5,\), got \(5, 1\)", queries=case.queries.unsqueeze(-1))
    wrong(
        DtypeError, r"labels, which are whole numbers, got torch.float64.*Gaussian\(\)", targets=case.targets.double()
    )
    wrong(ShapeError, r"one label for each example, \(t, n\), got \(3, 6, 1\)", targets=case.targets.unsqueeze(-1))
    wrong(LabelError, r"labels from 1 to 3, but the network has 3 outputs \(0 to 2\)", targets=case.targets % 2 * 2 + 1)
    wrong(LabelError, "labels from -1 to", targets=case.targets - 1)
    with pytest.raises(SettingError, match=r"steps must be a whole number of at least 0, got 0\.5"):
        maml(*case[:3], steps=0.5)
    maml = MAML(made(), rule=rules.sgd(0.4), likelihood=Gaussian())
    wrong(DtypeError, "targets must be torch.float64 as the network's outputs are, got torch.int64")
    wrong(ShapeError, r"\(3, 6, 3\), got \(3, 6\). For a single output use unsqueeze", targets=case.targets.double())


def test_numbers_that_run_away_are_named() -> None:
    case = episodes(CLASSES, tasks=5)
    maml = MAML(made("tied"), rule=rules.sgd(1e80), steps=4, likelihood=Gaussian(), chunk_size=2)
    with pytest.raises(NonFiniteError, match=r"task 0 .* after [123] of 4 steps. Lower the rate"):
        maml(*case[:3])
    maml = MAML(nn.Linear(INPUTS, CLASSES, dtype=DOUBLE), rule=rules.sgd(1e308), likelihood=Gaussian(), chunk_size=2)
    support = torch.zeros_like(case.support)
    support[3] = 100
    start = {"support": support, "targets": torch.zeros_like(case.targets), "queries": case.queries}
    maml.net.get_parameter("bias").data.zero_()
    with pytest.raises(NonFiniteError, match=r"task 3 .* after 1 of 1 steps. Lower"):
        maml(**start)
    with pytest.raises(NonFiniteError, match=r"task 3 .* after 1 of 1 steps. Lower"):
        maml.adapt(start["support"], start["targets"])
    support[3, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"task 3 .* after 0 of 1 steps. Its inputs or targets"):
        maml(**start)
    start["support"], queries = torch.zeros_like(support), case.queries.clone()
    queries[4, 1, 2] = math.inf
    for steps in (0, 1):
        with pytest.raises(NonFiniteError, match="the queries of task 4 hold NaN or infinite numbers"):
            maml(**{**start, "queries": queries}, steps=steps)


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d"])
def test_one_number_has_no_statistics(name: str) -> None:
    case, net = episodes(), made(name).eval()
    maml = MAML(net, rule=rules.sgd(0.4))
    if name == "BatchNorm2d":  # a channel of an image has many numbers
        assert maml(case.support, case.targets, case.queries[:, :1]).isfinite().all()
        return
    refusal = pytest.raises(ShapeError, match=r"statistics of a task's own inputs.*\(1, 5\).*Pass more")
    with refusal:
        maml(case.support, case.targets, case.queries[:, :1])
    with refusal:
        maml(case.support[:, :1], case.targets[:, :1], case.queries)


def test_categorical_is_the_default() -> None:
    assert MAML(made(), rule=rules.sgd(0.4)).likelihood == Categorical()
