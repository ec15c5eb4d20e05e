"""LwF against its formula written out, and what its teacher must not do."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.continual import EWC, LwF
from recollect.errors import SettingError, ShapeError

DOUBLE = torch.float64


def make(outputs: int = 4) -> nn.Module:
    """A network that behaves differently in training."""
    network = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, outputs)
    ).double()
    nn.init.normal_(network[1].running_mean)
    return network


def plain(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def inputs(count: int = 6) -> Tensor:
    return torch.randn(count, 3, dtype=DOUBLE)


def move(network: nn.Module, size: float = 0.5) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn_like(p))


def formula(old: Tensor, new: Tensor, strength: float, temperature: float, groups: list[list[int]]) -> Tensor:
    """``strength T^2 / b sum_n sum_groups sum_c p_c log(p_c / q_c)``, number by number."""
    total = torch.zeros((), dtype=DOUBLE)
    for n in range(len(old)):
        for group in groups:
            p = (old[n, group] / temperature).exp() / (old[n, group] / temperature).exp().sum()
            q = (new[n, group] / temperature).exp() / (new[n, group] / temperature).exp().sum()
            for c in range(len(group)):
                total = total + p[c] * (p[c].log() - q[c].log())
    return strength * temperature**2 * total / len(old)


def agree(got: Tensor, wanted: Tensor, network: nn.Module) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
    parameters = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(got, parameters, retain_graph=True)
    rights = torch.autograd.grad(wanted, parameters, retain_graph=True)
    for grad, right in zip(grads, rights, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_value_and_gradient_are_the_formula(temperature: float, strength: float) -> None:
    network = make().train()
    penalty = LwF(network, strength, temperature=temperature)
    teacher = copy.deepcopy(network).eval()
    penalty.consolidate()
    move(network)
    x = inputs()
    new = network(x)
    with torch.no_grad():
        old = teacher(x)
    agree(penalty(), formula(old, new, strength, temperature, [[0, 1, 2, 3]]), network)


def test_the_default_temperature_is_the_papers() -> None:
    assert LwF(plain()).temperature == 2.0


def test_the_gradient_keeps_its_size_at_any_temperature() -> None:
    """For high T it is that of half the squared difference of centered logits, divided by their number."""
    network = plain()
    penalty = LwF(network, temperature=1e4)
    teacher = copy.deepcopy(network)
    penalty.consolidate()
    move(network)
    x = inputs()
    away = network(x) - teacher(x).detach()
    away = away - away.mean(1, keepdim=True)
    torch.testing.assert_close(penalty(), away.square().sum() / 8 / len(x), rtol=1e-3, atol=0)


def test_groups_are_distributions_of_their_own() -> None:
    network = plain(6)
    penalty = LwF(network)
    x = inputs()
    for outputs, groups in (
        ([0, 1], [[0, 1]]),
        (torch.tensor([3, 2]), [[0, 1], [2, 3]]),
        ([4], [[0, 1], [2, 3], [4]]),
        ([2, 3, 4, 5], [[0, 1], [2, 3, 4, 5]]),
        (range(6), [[0, 1, 2, 3, 4, 5]]),
    ):
        penalty.consolidate(outputs=outputs)
        teacher = copy.deepcopy(network)
        move(network)
        new = network(x)
        agree(penalty(), formula(teacher(x).detach(), new, 1.0, 2.0, groups), network)
    penalty.consolidate()
    teacher = copy.deepcopy(network)
    move(network)
    new = network(x)
    agree(penalty(), formula(teacher(x).detach(), new, 1.0, 2.0, [list(range(6))]), network)


def test_the_teacher_is_the_network_of_the_last_task() -> None:
    network = plain()
    penalty = LwF(network)
    for _ in range(3):
        move(network)
        penalty.consolidate()
        x = inputs()
        network(x)
        assert penalty().item() == 0.0
        teacher = copy.deepcopy(network)
        move(network)
        new = network(x)
        agree(penalty(), formula(teacher(x).detach(), new, 1.0, 2.0, [[0, 1, 2, 3]]), network)


def test_there_is_no_penalty_before_a_task_has_ended() -> None:
    network = plain()
    penalty = LwF(network)
    assert penalty().item() == 0.0
    network(inputs())
    assert penalty().item() == 0.0
    assert penalty().dtype == DOUBLE


def test_the_teacher_stays_as_it_was_while_the_network_trains(rng_untouched: Callable) -> None:
    network = make().train()
    penalty = LwF(network).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    penalty.consolidate()
    state = copy.deepcopy(penalty.teacher.state_dict())
    assert not any(p.requires_grad for p in penalty.teacher.parameters())
    losses = []
    for _ in range(3):
        penalty.train()  # as the loop over epochs does
        logits = network(inputs())
        with rng_untouched():
            loss = penalty()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + logits.square().mean()).backward()
        optimizer.step()
        assert not any(module.training for module in penalty.teacher.modules())
        assert all(p.grad is None for p in penalty.teacher.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in penalty.teacher.state_dict().items())
    assert min(losses) > 0
    assert all(module.training for module in network.modules())


def test_consolidation_leaves_the_network_as_it_was(rng_untouched: Callable) -> None:
    network = make().train()
    network[1].eval()
    network[0].bias.requires_grad_(requires_grad=False)
    network[0].weight.grad = torch.ones(5, 3, dtype=DOUBLE)
    before = copy.deepcopy(network)
    penalty = LwF(network)
    keys = list(network.state_dict())
    with rng_untouched(), torch.inference_mode():
        penalty.consolidate((inputs(0), torch.zeros(0)))
    assert [module.training for module in network.modules()] == [module.training for module in before.modules()]
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in before.parameters()]
    assert bool((network[0].weight.grad == 1).all())
    assert list(network.state_dict()) == keys
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert penalty.teacher[0].weight.grad is None
    assert not [p for p in penalty.parameters() if p.requires_grad]
    assert not {id(p) for p in penalty.parameters()} & {id(p) for p in network.parameters()}
    move(network)
    x = inputs()
    new = network(x)
    agree(penalty(), formula(before.eval()(x).detach(), new, 1.0, 2.0, [[0, 1, 2, 3]]), network)


def test_the_last_call_with_gradients_counts() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    teacher = copy.deepcopy(network)
    move(network)
    x = inputs()
    network(inputs(3))
    new = network(x)
    with torch.no_grad():
        network(inputs(2))  # an evaluation in between
    agree(penalty(), formula(teacher(x).detach(), new, 1.0, 2.0, [[0, 1, 2, 3]]), network)
    with pytest.raises(SettingError, match="LwF needs the network's outputs: call network"):
        penalty()


def test_a_layer_that_is_called_by_itself_does_not_count() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    network[0](inputs())
    with pytest.raises(SettingError, match="LwF needs the network's outputs"):
        penalty()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_inputs_may_be_passed_by_name() -> None:
    network = Named().double()
    penalty = LwF(network)
    penalty.consolidate()
    teacher = copy.deepcopy(network)
    move(network)
    x = inputs()
    new = network(x=x)
    agree(penalty(), formula(teacher(x).detach(), new, 1.0, 2.0, [[0, 1, 2, 3]]), network)


def test_another_penalty_beside_it_is_no_call_of_the_network() -> None:
    """What EWC computes for its importances is not what the loss was computed on."""
    network = plain()
    penalty, other = LwF(network), EWC(network)
    penalty.consolidate()
    other.consolidate(inputs())
    with pytest.raises(SettingError, match="LwF needs the network's outputs"):
        penalty()


# Copies


def test_a_copy_of_the_network_is_no_copy_of_the_penalty() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    x = inputs()
    network(x)
    copied = copy.deepcopy(network)
    assert type(copied) is type(network)
    assert list(copied.state_dict()) == list(network.state_dict())
    gc.collect()
    before = len([thing for thing in gc.get_objects() if type(thing) is LwF])
    again = copy.deepcopy(network)
    gc.collect()
    assert len([thing for thing in gc.get_objects() if type(thing) is LwF]) == before
    move(again)
    move(copied)
    again(inputs(2))  # calls of a copy are not the network's
    copied(inputs(2))
    assert penalty().item() == 0.0


def test_teachers_do_not_pile_up() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    first = weakref.ref(penalty.teacher)
    network(inputs())
    for _ in range(3):
        penalty.consolidate()
    gc.collect()
    assert first() is None
    assert len(network._forward_hooks) == 1
    assert not penalty.teacher._forward_hooks


def test_a_penalty_that_is_gone_leaves_the_network_working() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    gone = weakref.ref(penalty)
    x = inputs()
    wanted = network(x).detach()
    penalty()
    del penalty
    assert torch.equal(network(x), wanted)
    del network
    gc.collect()
    assert gone() is None


def test_copies_have_a_network_of_their_own() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    teacher = copy.deepcopy(network)
    network(inputs())  # what was seen last is not copied
    other_network, other = copy.deepcopy((network, penalty))
    move(other_network)
    x = inputs()
    new = other_network(x)
    agree(other(), formula(teacher(x).detach(), new, 1.0, 2.0, [[0, 1, 2, 3]]), other_network)


def test_mbpa_on_a_network_that_has_a_penalty() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    memory = EpisodicMemory(20, 3, key_dtype=DOUBLE)
    memory.write(inputs(9), torch.arange(9) % 4)
    x = inputs(3)
    adaptation = LocalAdaptation(rules.sgd(0.1), steps=2)
    got = MbPA(network, memory, neighbors=3, adaptation=adaptation)(x)
    wanted = MbPA(plain_copy(network), memory, neighbors=3, adaptation=adaptation)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)


def plain_copy(network: nn.Module) -> nn.Module:
    """Without hooks."""
    made = plain()
    made.load_state_dict(network.state_dict())
    return made


class Keeps(nn.Module):
    """Keeps a tensor with a graph, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        if len(x) == 1:
            self.kept = made
        return made


def test_a_network_that_cannot_be_copied_changes_nothing() -> None:
    network = Keeps().double()
    penalty = LwF(network)
    penalty.consolidate(outputs=[0, 1])
    teacher, state = penalty.teacher, copy.deepcopy(penalty.state_dict())
    move(network)
    network(inputs(1))
    with pytest.raises(RuntimeError):
        penalty.consolidate(outputs=[2, 3])
    assert penalty.teacher is teacher
    assert all(torch.equal(tensor, state[name]) for name, tensor in penalty.state_dict().items())
    network(inputs())
    assert penalty().item() > 0


# State


@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_a_state_goes_on_bit_for_bit(tasks: int) -> None:
    network = make()
    penalty = LwF(network)
    for number in range(tasks):
        move(network)
        penalty.consolidate(outputs=[number, number + 1])
    move(network)
    saved = copy.deepcopy(penalty.state_dict())
    assert any(name.startswith("teacher.") for name in saved) == (tasks > 0)
    other = make()
    other.load_state_dict(network.state_dict())
    fresh = LwF(other)
    fresh.load_state_dict(saved, strict=True)
    assert fresh.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.state_dict().items())
    x = inputs()
    for _ in range(2):
        network.eval()(x)
        other.eval()(x)
        assert torch.equal(penalty(), fresh())
        penalty.consolidate(outputs=[3])
        fresh.consolidate(outputs=[3])
        assert torch.equal(penalty.groups, fresh.groups)
        torch.manual_seed(1)
        move(network)
        torch.manual_seed(1)
        move(other)
    assert not any(p.requires_grad for p in fresh.parameters())
    used = LwF(other)
    used.consolidate(outputs=[0, 1, 2])
    if tasks:
        used.load_state_dict(saved, strict=True)
        assert torch.equal(used.groups, saved["groups"])


def test_double_after_single() -> None:
    network = plain().float()
    penalty = LwF(network)
    penalty.consolidate(outputs=[0, 1])
    network.double()
    penalty.double()
    assert penalty.groups.dtype == torch.bool
    move(network)
    x = inputs()
    new = network(x)
    agree(penalty(), formula(penalty.teacher(x), new, 1.0, 2.0, [[0, 1]]), network)


# What is refused


def test_settings() -> None:
    with pytest.raises(SettingError, match="strength must be a finite number of at least 0, got -1"):
        LwF(plain(), -1.0)
    for temperature in (0.0, -1.0, float("inf")):
        with pytest.raises(SettingError, match="temperature must be a finite number above 0, got"):
            LwF(plain(), temperature=temperature)


@pytest.mark.usefixtures("untyped")
def test_a_class_is_no_network() -> None:
    with pytest.raises(SettingError, match=r"network must be a torch.nn.Module, got"):
        LwF(nn.Linear)


@pytest.mark.parametrize("outputs", [[], [0, 0], [-1]])
def test_outputs_that_are_refused(outputs: list[int]) -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate(outputs=[0, 1])
    teacher, groups = penalty.teacher, penalty.groups.clone()
    with pytest.raises(SettingError, match="outputs must be"):
        penalty.consolidate(outputs=outputs)
    assert penalty.teacher is teacher
    assert torch.equal(penalty.groups, groups)


def test_outputs_that_the_network_has_not() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate(outputs=[2, 7])
    network(inputs())
    with pytest.raises(ShapeError, match="a task was said to have output 7, but there are 4"):
        penalty()


def test_logits_must_be_a_matrix_of_the_size_that_they_had() -> None:
    network = plain()
    penalty = LwF(network)
    penalty.consolidate()
    network(torch.randn(2, 5, 3, dtype=DOUBLE))
    with pytest.raises(ShapeError, match=r"logits must be \(b, c\), .*\(2, 5, 4\)"):
        penalty()
    network[2] = nn.Linear(5, 6).double()
    network(inputs())
    with pytest.raises(ShapeError, match=r"\(6, 4\), got \(6, 6\)"):
        penalty()
