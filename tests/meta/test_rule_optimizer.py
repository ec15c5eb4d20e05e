"""Rules as optimizers: against ``torch.optim``, and stopped and resumed."""

import copy
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from recollect import rules
from recollect.errors import DtypeError, NonFiniteError, SettingError, ShapeError
from recollect.meta.learned_optimizer import LSTMOptimizer
from recollect.meta.meta_lstm import MetaLSTM
from recollect.meta.policy import Policy
from recollect.meta.rule_optimizer import RuleOptimizer

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
CASES: list[tuple[rules.Rule, Optimizer]] = [
    (rules.sgd(0.05), lambda ps: torch.optim.SGD(ps, lr=0.05)),
    (rules.sgd(0.05, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9)),
    (rules.rmsprop(0.01), lambda ps: torch.optim.RMSprop(ps, lr=0.01)),
    (rules.adam(0.01), lambda ps: torch.optim.Adam(ps, lr=0.01)),
]
RULES = [
    lambda: rules.adam(0.01),
    lambda: MetaLSTM(generator=torch.Generator().manual_seed(0)),
    lambda: LSTMOptimizer(generator=torch.Generator().manual_seed(0)),
]
X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def walk(model: nn.Module, optimizer: Any, steps: int, *, skip: int = 3) -> list[float]:
    """Trains; at every ``skip``-th step the first layer is left out, and has no gradient."""
    losses = []
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            outputs = model(X.to(next(model.parameters()).dtype))
            loss = (outputs - 1).square().mean()
            loss.backward()
            if step % skip == skip - 1:
                for parameter in list(model.parameters())[:2]:
                    parameter.grad = None
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


@pytest.mark.parametrize(
    ("rule", "optimizer"), CASES, ids=lambda case: str(case) if isinstance(case, rules.Rule) else ""
)
def test_it_is_torch_optim(rule: rules.Rule, optimizer: Optimizer) -> None:
    ours, theirs = net(), net()
    one = walk(ours, RuleOptimizer(ours.parameters(), rule), 20)
    two = walk(theirs, optimizer(theirs.parameters()), 20)
    assert one == pytest.approx(two, rel=1e-10)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_stopped_run_goes_on_bit_for_bit(make: Callable[[], rules.Rule], dtype: torch.dtype) -> None:
    whole, half = net(dtype), net(dtype)
    expected = walk(whole, RuleOptimizer(whole.parameters(), make()), 9)
    optimizer = RuleOptimizer(half.parameters(), make())
    first = walk(half, optimizer, 6)
    file = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    walk(half, optimizer, 2)  # what was saved is not touched by going on

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = net(dtype)
    resumed.load_state_dict(saved["net"])
    optimizer = RuleOptimizer(resumed.parameters(), make())
    optimizer.load_state_dict(saved["optimizer"])
    assert first + walk(resumed, optimizer, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_state_that_was_taken_stays_as_it_was() -> None:
    model = net()
    optimizer = RuleOptimizer(model.parameters(), rules.adam(0.01))
    walk(model, optimizer, 2)
    taken = optimizer.state_dict()
    kept = copy.deepcopy(taken)
    other = RuleOptimizer(net().parameters(), rules.adam(0.01))
    other.load_state_dict(taken)
    walk(model, optimizer, 2)
    assert [state["rule"][0] for state in kept["state"].values()] == [2] * 4, "steps"
    loaded = other.state_dict()["state"][3]["rule"][1]["0"]
    assert torch.equal(loaded, kept["state"][3]["rule"][1]["0"])
    assert loaded is not taken["state"][3]["rule"][1]["0"]


@pytest.mark.parametrize("make", RULES)
def test_a_copy_goes_its_own_way(make: Callable[[], rules.Rule]) -> None:
    model = net()
    optimizer = RuleOptimizer(model.parameters(), make())
    walk(model, optimizer, 2)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    assert walk(model_copy, optimizer_copy, 3) == walk(model, optimizer, 3)


def test_a_learned_rule_takes_the_steps_that_it_says() -> None:
    rule, model = MetaLSTM(generator=torch.Generator().manual_seed(0)).double(), net()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, state = RuleOptimizer(model.parameters(), rule), rule.init(params)
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert optimizer.step(lambda loss=loss: loss) is loss
        with torch.no_grad():
            delta, state = rule.update(grads, state, params, loss)
        params = {name: p + delta[name] for name, p in params.items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-12, atol=1e-14)
        assert p.is_leaf
    assert all(p.grad is None for p in rule.parameters()), "the rule itself is not trained"


def test_a_policy_steps_jointly() -> None:
    model = nn.Linear(3, 1).double()
    policy = Policy(4, current=True, generator=torch.Generator().manual_seed(0)).double()
    policy.output.weight.data.normal_(std=0.1)
    params, state = {name: p.detach().clone() for name, p in model.named_parameters()}, policy.init({})
    optimizer = RuleOptimizer(model.parameters(), policy, joint=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step(lambda loss=loss: loss)
        with torch.no_grad():
            delta, state = policy.update(grads, state, params, loss)
        params = {name: p + delta[name] for name, p in params.items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-12, atol=1e-14)


def test_groups_may_come_later() -> None:
    ours, theirs = net(), net()
    one = RuleOptimizer([{"params": list(ours[0].parameters())}], rules.adam(0.01))
    two = torch.optim.Adam(theirs[0].parameters(), lr=0.01)
    for model, optimizer in ((ours, one), (theirs, two)):
        walk(model, optimizer, 2, skip=9)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        walk(model, optimizer, 3, skip=9)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_nothing_to_do() -> None:
    model = net()
    for joint in (False, True):
        optimizer = RuleOptimizer(model.parameters(), rules.adam(0.1), joint=joint)
        before = [p.clone() for p in model.parameters()]
        assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not optimizer.state_dict()["state"]


# Errors


def test_a_rule_is_needed(untyped: None) -> None:
    with pytest.raises(SettingError, match="rule must be a rule with init and update"):
        RuleOptimizer(net().parameters(), rules.sgd)
    with pytest.raises(SettingError, match="rule must be a rule"):
        RuleOptimizer(net().parameters(), 0.1)
    with pytest.raises(SettingError, match="joint must be True or False, got 'no'"):
        RuleOptimizer(net().parameters(), rules.sgd(0.1), **{"joint": "no"})


def test_groups_have_no_settings() -> None:
    with pytest.raises(SettingError, match=r"a group has its own \['lr'\]"):
        RuleOptimizer([{"params": list(net().parameters()), "lr": 0.1}], rules.sgd(0.1))


def test_the_loss_is_needed(untyped: None) -> None:
    optimizer = RuleOptimizer(net().parameters(), rules.sgd(0.1))
    with pytest.raises(SettingError, match=r"step\(lambda: loss\) after backward"):
        optimizer.step()
    with pytest.raises(DtypeError, match="the loss that the closure returns must be a tensor, got float"):
        optimizer.step(lambda: 0.3)
    with pytest.raises(ShapeError, match=r"one loss, got shape \(5,\)"):
        optimizer.step(lambda: torch.ones(5))


def test_joint_steps_need_all_gradients() -> None:
    model = net()
    optimizer = RuleOptimizer(model.parameters(), Policy(26), joint=True)
    loss = model[2](torch.ones(1, 4, dtype=torch.float64)).sum()
    loss.backward()
    with pytest.raises(SettingError, match="2 of 4 have no gradient"):
        optimizer.step(lambda: loss)


def test_a_policy_needs_joint() -> None:
    model: Any = net()
    optimizer = RuleOptimizer(model.parameters(), Policy(26).double())
    loss = model(X).sum()
    loss.backward()
    with pytest.raises(ShapeError, match=r"moves 26 numbers.*are 12.*joint=True"):
        optimizer.step(lambda: loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", RULES)
def test_numbers_that_are_not_finite_change_nothing(make: Callable[[], rules.Rule], bad: float) -> None:
    model: Any = net()
    optimizer = RuleOptimizer(model.parameters(), make())
    loss = model(X).square().sum()
    loss.backward()
    optimizer.step(lambda: loss)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NonFiniteError, match="the loss is NaN or infinite"):
        optimizer.step(lambda: loss * bad)
    model[2].bias.grad[1] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 4 gradients, the first of shape \(2,\), are NaN or infinite"):
        optimizer.step(lambda: loss)
    for kept, now in ((before, model.state_dict()), (state, optimizer.state_dict())):
        assert repr(kept) == repr(now)
    assert all(torch.equal(kept, now) for kept, now in zip(before.values(), model.parameters(), strict=True))


def test_steps_that_are_not_finite_change_nothing() -> None:
    model: Any = net()
    rule = LSTMOptimizer()
    optimizer = RuleOptimizer(model.parameters(), rule)
    loss = model(X).square().sum()
    loss.backward()
    optimizer.step(lambda: loss)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        rule.output.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the rule answers with steps that are NaN or infinite"):
        optimizer.step(lambda: loss)
    assert repr(state) == repr(optimizer.state_dict())
    assert all(torch.equal(kept, now) for kept, now in zip(before.values(), model.parameters(), strict=True))


def test_an_error_of_the_rule_changes_nothing() -> None:
    """The policy moves the first parameter, and cannot move the second."""
    model: Any = net()
    policy = Policy(12).double()
    nn.init.ones_(policy.output.bias)
    optimizer = RuleOptimizer(model.parameters(), policy)
    before = copy.deepcopy(model.state_dict())
    loss = model(X).sum()
    loss.backward()
    with pytest.raises(ShapeError, match=r"moves 12 numbers.*joint=True"):
        optimizer.step(lambda: loss)
    assert all(torch.equal(kept, now) for kept, now in zip(before.values(), model.parameters(), strict=True))
    assert not optimizer.state


def test_the_state_of_another_optimizer_is_refused() -> None:
    model: Any = net()
    adam = torch.optim.Adam(model.parameters())
    optimizer = RuleOptimizer(model.parameters(), rules.adam(0.1))
    loss = model(X).sum()
    loss.backward()
    adam.step()
    optimizer.step(lambda: loss)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SettingError, match="not that of a RuleOptimizer"):
        optimizer.load_state_dict(adam.state_dict())
    assert repr(state) == repr(optimizer.state_dict())


def test_large_empty_and_sparse_gradients_are_finite() -> None:
    words = nn.Embedding(5, 3, sparse=True)
    largest, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))
    optimizer = RuleOptimizer([words.weight, largest, empty], rules.sgd(1.0))
    before = words.weight.detach().clone()
    loss = words(torch.tensor([1, 1, 3])).sum()
    loss.backward()
    largest.grad, empty.grad = torch.full((2,), torch.finfo(torch.float32).max), torch.ones(0)
    optimizer.step(lambda: loss)
    torch.testing.assert_close(before - words.weight.detach(), torch.tensor([0.0, 2, 0, 1, 0])[:, None].expand(5, 3))
    assert largest.isfinite().all()
    (words(torch.tensor([2])) * math.nan).sum().backward()
    with pytest.raises(NonFiniteError, match="gradients, the first of shape"):
        optimizer.step(lambda: loss)
