"""The rules against ``torch.optim``, on the same random gradients."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from recollect import rules
from recollect.errors import SettingError

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

RULES: list[tuple[rules.Rule, Optimizer]] = [
    (rules.sgd(0.1), lambda ps: torch.optim.SGD(ps, lr=0.1)),
    (rules.sgd(0.1, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
    (rules.rmsprop(0.01), lambda ps: torch.optim.RMSprop(ps, lr=0.01)),
    (rules.rmsprop(0.3, decay=0.7, epsilon=0.1), lambda ps: torch.optim.RMSprop(ps, lr=0.3, alpha=0.7, eps=0.1)),
    (rules.adam(0.01), lambda ps: torch.optim.Adam(ps, lr=0.01)),
    (
        rules.adam(0.3, beta1=0.5, beta2=0.7, epsilon=0.1),
        lambda ps: torch.optim.Adam(ps, lr=0.3, betas=(0.5, 0.7), eps=0.1),
    ),
]
SHAPES = {"weight": (4, 3), "bias": (4,), "scale": ()}
LOSS = torch.tensor(0.0)


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("rule", "optimizer"), RULES, ids=lambda case: str(case) if isinstance(case, rules.Rule) else ""
)
def test_rule_is_torch_optim(rule: rules.Rule, optimizer: Optimizer) -> None:
    params = tensors()
    parameters = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    stepper = optimizer(parameters.values())
    state = rule.init(params)
    for step in range(7):
        grads = tensors()
        if step == 3:
            grads["bias"].zero_()
        for name, parameter in parameters.items():
            parameter.grad = grads[name].clone()
        stepper.step()
        delta, state = rule.update(grads, state, params, LOSS)
        params = {name: p + delta[name] for name, p in params.items()}
        for name, parameter in parameters.items():
            torch.testing.assert_close(params[name], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_rule_is_pure(rule: rules.Rule) -> None:
    params, grads = tensors(), tensors()
    _, state = rule.update(grads, rule.init(params), params, LOSS)
    kept = [{name: t.clone() for name, t in part.items()} for part in (params, grads)]
    first, _ = rule.update(grads, state, params, LOSS)
    again, _ = rule.update(grads, state, params, LOSS)
    for name in SHAPES:
        assert torch.equal(first[name], again[name])
        assert torch.equal(params[name], kept[0][name])
        assert torch.equal(grads[name], kept[1][name])


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_rule_has_a_derivative(rule: rules.Rule) -> None:
    """A meta-learner differentiates through the steps."""
    params, grads = tensors(), [tensors() for _ in range(3)]

    def moved(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, parts, total = rule.init(params), [flat[i : i + 3] for i in (0, 3, 6)], dict.fromkeys(SHAPES, 0.0)
        for part in parts:
            delta, state = rule.update(dict(zip(SHAPES, part, strict=True)), state, params, LOSS)
            total = {name: total[name] + delta[name] for name in SHAPES}
        return tuple(total.values())

    flat = [g.requires_grad_() for part in grads for g in part.values()]
    assert torch.autograd.gradcheck(moved, flat)


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_the_derivative_is_finite_where_gradients_are_zero(rule: rules.Rule) -> None:
    """As they are behind a ReLU that is off."""
    params, state = {"w": torch.ones(2)}, rule.init({"w": torch.ones(2)})
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    total = torch.zeros(2)
    for _ in range(2):
        delta, state = rule.update({"w": x * torch.tensor([0.0, 1.0])}, state, params, LOSS)
        total = total + delta["w"]
    total.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[0] == 0


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_state_may_start_shared(rule: rules.Rule) -> None:
    """The state before the first step, made for one head, serves any number of them."""
    params, many = tensors(), {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    wide = {name: p.expand(3, *p.shape) for name, p in params.items()}
    delta, _ = rule.update(many, rule.init(params), params, LOSS)
    expected, _ = rule.update(many, rule.init(wide), wide, LOSS)
    for name in SHAPES:
        torch.testing.assert_close(delta[name], expected[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_rule_drives_many_heads_side_by_side(rule: rules.Rule) -> None:
    apart = [(tensors(), tensors(), tensors()) for _ in range(3)]
    params, *grads = ({n: torch.stack([one[i][n] for one in apart]) for n in SHAPES} for i in range(3))
    state = rule.init(params)
    for grad in grads:
        together, state = rule.update(grad, state, params, LOSS)
    for row, (alone, *alone_grads) in enumerate(apart):
        state = rule.init(alone)
        for grad in alone_grads:
            delta, state = rule.update(grad, state, alone, LOSS)
        for name in SHAPES:
            torch.testing.assert_close(together[name][row], delta[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: rules.sgd(-0.1), "rate"),
        (lambda: rules.sgd(float("nan")), "rate"),
        (lambda: rules.sgd(0.1, momentum=1.0), "momentum"),
        (lambda: rules.sgd(0.1, momentum=-0.1), "momentum"),
        (lambda: rules.rmsprop(float("inf")), "rate"),
        (lambda: rules.rmsprop(0.1, decay=1.0), "decay"),
        (lambda: rules.rmsprop(0.1, epsilon=-1e-8), "epsilon"),
        (lambda: rules.rmsprop(0.1, epsilon=0.0), "epsilon"),
        (lambda: rules.adam(0.1, beta1=1.0), "beta1"),
        (lambda: rules.adam(0.1, beta2=-0.1), "beta2"),
        (lambda: rules.adam(0.1, epsilon=0.0), "epsilon"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], rules.Rule], setting: str) -> None:
    with pytest.raises(SettingError, match=setting):
        make()
