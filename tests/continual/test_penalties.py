"""EWC, MAS and SI against their formulas, one example, one task and one step at a time."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recollect import Categorical, Gaussian
from recollect.continual import EWC, MAS, SI
from recollect.errors import (
    DtypeError,
    FormatError,
    LabelError,
    NonFiniteError,
    RecollectError,
    SettingError,
    ShapeError,
)

DOUBLE = torch.float64
Data = tuple[Tensor, Tensor]
Sums = dict[str, Tensor]


def make(outputs: int = 3) -> nn.Module:
    """Layers that behave differently in training, and one that is left alone."""
    network = nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(5, 4),
        nn.Tanh(),
        nn.Linear(4, outputs),
    ).double()
    nn.init.normal_(network[1].running_mean)
    network[4].bias.requires_grad_(requires_grad=False)
    return network


def task(count: int = 6, outputs: int = 3) -> Data:
    return torch.randn(count, 4, dtype=DOUBLE), torch.randint(0, outputs, (count,))


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def move(network: nn.Module, size: float = 0.3) -> None:
    """As training would."""
    with torch.no_grad():
        for p in trainable(network).values():
            p.add_(size * torch.randn_like(p))


def places(network: nn.Module) -> Sums:
    return {name: p.detach().clone() for name, p in trainable(network).items()}


def mean_of(
    network: nn.Module, inputs: Tensor, scalars: Callable[[Tensor, int], Iterator[tuple[float, Tensor]]]
) -> Sums:
    """The mean over examples of ``sum_v weight |gradient of scalar|^2`` (weight < 0: of the absolute value)."""
    network = copy.deepcopy(network).eval()
    parameters = trainable(network)
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for n in range(len(inputs)):
        for weight, scalar in scalars(network(inputs[n : n + 1])[0], n):
            grads = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=True)
            for name, grad in zip(sums, grads, strict=True):
                sums[name] += (weight * grad**2 if weight >= 0 else -weight * grad.abs()) / len(inputs)
    return sums


def exact_fisher(network: nn.Module, inputs: Tensor, outputs: list[int] | None = None) -> Sums:
    def scalars(out: Tensor, n: int) -> Iterator[tuple[float, Tensor]]:
        log = (out if outputs is None else out[outputs]).log_softmax(0)
        for c in range(len(log)):
            yield float(log[c].detach().exp()), log[c]

    return mean_of(network, inputs, scalars)


def empirical_fisher(network: nn.Module, inputs: Tensor, labels: Tensor) -> Sums:
    return mean_of(network, inputs, lambda out, n: iter([(1.0, out.log_softmax(0)[labels[n]])]))


def omegas(network: nn.Module, inputs: Tensor) -> Sums:
    return mean_of(network, inputs, lambda out, n: iter([(-1.0, (out**2).sum())]))


def quadratic(network: nn.Module, terms: list[tuple[Sums, Sums]], factor: float) -> Tensor:
    """``factor sum_t sum_i importance_ti (theta_i - anchor_ti)^2``, written out."""
    total = torch.zeros((), dtype=DOUBLE)
    for importance, anchor in terms:
        for name, p in trainable(network).items():
            total = total + factor * (importance[name] * (p - anchor[name]) ** 2).sum()
    return total


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale)


def same(penalty: nn.Module, wanted: Sums) -> None:
    assert penalty.anchors.terms == 1
    assert set(penalty.anchors.names) == set(wanted)
    for name, right in wanted.items():
        close(penalty.anchors.importance(name)[0], right)


def gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(trainable(network).values()), materialize_grads=True))


def agree(penalty: nn.Module, network: nn.Module, wanted: Tensor) -> None:
    value = penalty()
    assert value.shape == ()
    close(value, wanted)
    for got, right in zip(gradients(value, network), gradients(wanted, network), strict=True):
        close(got, right)


# EWC: which Fisher information


@pytest.mark.parametrize("count", [1, 7])
def test_exact_is_the_expectation_under_the_softmax(count: int) -> None:
    network, (inputs, labels) = make(), task(count)
    for data in ((inputs, labels), inputs, [(inputs, labels)], DataLoader(TensorDataset(inputs, labels), 2)):
        penalty = EWC(network)
        penalty.consolidate(data)
        same(penalty, exact_fisher(network, inputs))


def test_empirical_is_the_square_of_each_examples_gradient() -> None:
    network, (inputs, labels) = make(), task(7)
    penalty = EWC(network, fisher="empirical")
    penalty.consolidate((inputs, labels))
    wanted = empirical_fisher(network, inputs, labels)
    same(penalty, wanted)
    log = copy.deepcopy(network).eval()
    mean = log(inputs).log_softmax(1)[torch.arange(7), labels].mean()
    squared = gradients(mean, log)[0] ** 2  # the common defect: the square of a batch's gradient
    assert not torch.allclose(squared, wanted["0.weight"], rtol=0.1)


def test_the_fisher_of_a_linear_softmax_in_closed_form() -> None:
    network, inputs = nn.Linear(4, 3, bias=False).double(), task(5)[0]
    penalty = EWC(network)
    penalty.consolidate(inputs)
    chances = network(inputs).softmax(1).detach()
    close(penalty.anchors.importance("weight")[0], (chances * (1 - chances)).T @ inputs**2 / 5)


@pytest.mark.usefixtures("untyped")
def test_sampled_has_the_exact_one_as_its_mean() -> None:
    network, (inputs, labels) = make(), task(4)
    exact = exact_fisher(network, inputs)
    drawn = EWC(network, fisher="sampled", generator=torch.Generator().manual_seed(1))
    drawn.consolidate((inputs.repeat(1500, 1), labels.repeat(1500)))
    for name, right in exact.items():
        got = drawn.anchors.importance(name)[0]
        assert float((got - right).norm() / right.norm()) < 0.08
        assert not torch.allclose(got, right, rtol=1e-6)


def test_sampled_is_a_labels_own_square() -> None:
    network, (inputs, _) = make(), task(1)
    penalty = EWC(network, fisher="sampled")
    penalty.consolidate(inputs)
    options = [empirical_fisher(network, inputs, torch.tensor([c]))["0.weight"] for c in range(3)]
    assert any(torch.allclose(penalty.anchors.importance("0.weight")[0], one, rtol=1e-9) for one in options)


@pytest.mark.usefixtures("untyped")
def test_sampled_draws_from_its_generator(rng_untouched: Callable) -> None:
    network, data = make(), task(9)

    def drawn(seed: int | None, times: int = 1) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        penalty = EWC(network, fisher="sampled", tasks="online", decay=0.0, generator=generator)
        for _ in range(times):
            penalty.consolidate(data)
        return penalty.anchors.importance("0.weight")

    with rng_untouched():
        assert torch.equal(drawn(3), drawn(3))
        assert torch.equal(drawn(None), drawn(None))
        assert not torch.equal(drawn(3), drawn(4))
        assert not torch.equal(drawn(3), drawn(3, times=2))


@pytest.mark.parametrize("variance", [1.0, 0.25])
@pytest.mark.usefixtures("untyped")
def test_gaussian_fishers(variance: float) -> None:
    network, (inputs, _) = make(), task(6)
    targets = torch.randn(6, 3, dtype=DOUBLE)
    exact = EWC(network, likelihood=Gaussian(variance))
    exact.consolidate(inputs)
    wanted = mean_of(network, inputs, lambda out, n: iter([(1 / variance, out[c]) for c in range(3)]))
    same(exact, wanted)
    empirical = EWC(network, likelihood=Gaussian(variance), fisher="empirical")
    empirical.consolidate((inputs, targets))
    same(
        empirical,
        mean_of(network, inputs, lambda out, n: iter([(1.0, -((targets[n] - out) ** 2).sum() / 2 / variance)])),
    )
    drawn = EWC(network, likelihood=Gaussian(variance), fisher="sampled")
    drawn.consolidate(inputs.repeat(1000, 1))
    for name, right in wanted.items():
        assert float((drawn.anchors.importance(name)[0] - right).norm() / right.norm()) < 0.1


@pytest.mark.usefixtures("untyped")
def test_outputs_are_a_network_that_has_no_others() -> None:
    network = make(5)
    inputs = task(6)[0]
    labels = torch.tensor([4, 1, 1, 4, 4, 1])
    small = copy.deepcopy(network)
    small[6] = nn.Linear(4, 2).double()
    with torch.no_grad():
        small[6].weight.copy_(network[6].weight[[1, 4]])
        small[6].bias.copy_(network[6].bias[[1, 4]])
    for fisher in ("exact", "empirical", "sampled"):
        whole, part = EWC(network, fisher=fisher), EWC(small, fisher=fisher)
        whole.consolidate((inputs, labels), outputs=[4, 1])
        part.consolidate((inputs, (labels == 4).long()))
        for name in part.anchors.names:
            got, right = whole.anchors.importance(name)[0], part.anchors.importance(name)[0]
            if name.startswith("6."):
                assert bool((got[[0, 2, 3]] == 0).all())
                got = got[[1, 4]]
            close(got, right)
    whole = EWC(network)
    whole.consolidate(inputs, outputs=torch.tensor([1, 4]))
    same(whole, exact_fisher(network, inputs, [1, 4]))


def test_gaussian_outputs_have_targets_for_these_alone() -> None:
    network, inputs = make(4), task(5)[0]
    targets = torch.randn(5, 2, dtype=DOUBLE)
    penalty = EWC(network, likelihood=Gaussian(), fisher="empirical")
    penalty.consolidate((inputs, targets), outputs=[0, 3])
    same(penalty, mean_of(network, inputs, lambda o, n: iter([(1.0, -((targets[n] - o[[0, 3]]) ** 2).sum() / 2)])))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.usefixtures("untyped")
def test_labels_of_any_whole_dtype(dtype: torch.dtype) -> None:
    network, (inputs, labels) = make(), task(6)
    for outputs in (None, [0, 1, 2]):
        penalty = EWC(network, fisher="empirical")
        penalty.consolidate((inputs, labels.to(dtype)), outputs=outputs)
        same(penalty, empirical_fisher(network, inputs, labels))


def test_sequences_of_predictions() -> None:
    network = nn.Linear(4, 3).double()
    inputs, labels = torch.randn(5, 2, 4, dtype=DOUBLE), torch.randint(0, 3, (5, 2))
    penalty = EWC(network, fisher="empirical")
    penalty.consolidate((inputs, labels))

    def scalars(out: Tensor, n: int) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, out.log_softmax(-1)[torch.arange(2), labels[n]].sum()

    same(penalty, mean_of(network, inputs, scalars))
    drawn = EWC(network, fisher="sampled")
    drawn.consolidate(inputs)
    assert bool((drawn.anchors.importance("weight") > 0).all())
    with pytest.raises(ShapeError, match=r"outputs \(b, c\), but its output for 5 has shape \(5, 2, 3\).*'sampled'"):
        EWC(network).consolidate((inputs, labels))


# EWC: over tasks


def many_tasks(
    tasks: int, *, size: float, importance: Callable[[], float]
) -> tuple[nn.Module, list[tuple[Sums, Sums]]]:
    network = nn.Linear(6, 5)
    terms = []
    for _ in range(tasks):
        move(network, size)
        terms.append(
            ({name: torch.rand_like(p) * importance() for name, p in trainable(network).items()}, places(network))
        )
    return network, terms


@pytest.mark.usefixtures("untyped")
def test_merged_is_separate_for_twenty_tasks() -> None:
    network, merged, separate = make(), None, None
    merged, separate = EWC(network, 3.0), EWC(network, 3.0, tasks="separate")
    terms = []
    for number in range(20):
        move(network)
        data = task(3)
        merged.consolidate(data)
        separate.consolidate(data)
        terms.append((exact_fisher(network, data[0]), places(network)))
        if number not in {0, 1, 5, 19}:
            continue
        agree(separate, network, quadratic(network, terms, 1.5))
        agree(merged, network, quadratic(network, terms, 1.5))
        move(network)
        agree(separate, network, quadratic(network, terms, 1.5))
        agree(merged, network, quadratic(network, terms, 1.5))
        assert (merged.anchors.terms, separate.anchors.terms) == (1, number + 1)


def test_merged_in_single_precision_is_near_the_truth() -> None:
    network = nn.Linear(30, 20)
    penalty = EWC(network)
    terms = []
    for _ in range(20):
        move(network, 1e-3)
        importances = {name: torch.rand_like(p) ** 4 for name, p in trainable(network).items()}
        importances["weight"][:, :10] = 0  # of dead inputs
        penalty.anchors.merge(importances)
        terms.append((importances, places(network)))
    move(network, 1e-3)
    exact = copy.deepcopy(network).double()
    doubles = [tuple({name: t.double() for name, t in part.items()} for part in term) for term in terms]
    wanted = quadratic(exact, doubles, 0.5)
    value = penalty()
    assert abs(value.item() / wanted.item() - 1) < 2e-6
    for got, right in zip(gradients(value, network), gradients(wanted, exact), strict=True):
        assert bool(got.isfinite().all())
        assert float((got.double() - right).norm() / right.norm()) < 4e-6
    assert bool((gradients(penalty(), network)[0][:, :10] == 0).all())


@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 7.5, 1e6]), min_size=3, max_size=3),
            st.lists(st.floats(-3, 3), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_merging_is_a_sum_of_squares(terms: list[tuple[list[float], list[float]]], end: list[float]) -> None:
    network = nn.Linear(3, 1, bias=False).double()
    merged, separate = EWC(network).anchors, EWC(network).anchors
    for importance, anchor in terms:
        with torch.no_grad():
            network.weight.copy_(torch.tensor([anchor], dtype=DOUBLE))
        new = {"weight": torch.tensor([importance], dtype=DOUBLE)}
        merged.merge(new)
        separate.append(new)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([end], dtype=DOUBLE))
    total = sum(sum(f * (e - a) ** 2 for f, a, e in zip(*term, end, strict=True)) for term in terms)
    assert separate().item() == pytest.approx(total, rel=1e-12, abs=1e-300)
    assert merged().item() == pytest.approx(total, rel=1e-9, abs=1e-20)
    scale = float(sum(f * 12 for term in terms for f in term[0]))
    for got, right in zip(gradients(merged(), network), gradients(separate(), network), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-13 * scale)


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.usefixtures("untyped")
def test_online_decays_and_holds_to_the_last(decay: float) -> None:
    network = make()
    penalty = EWC(network, 4.0, tasks="online", decay=decay)
    fisher: Sums = {}
    for _ in range(3):
        move(network)
        data = task(5)
        penalty.consolidate(data)
        new = exact_fisher(network, data[0])
        fisher = {name: (decay * fisher[name] if fisher else 0) + part for name, part in new.items()}
        anchor = places(network)
        assert penalty().item() == 0.0
        same(penalty, fisher)
    move(network)
    agree(penalty, network, quadratic(network, [(fisher, anchor)], 2.0))


PENALTIES: list[tuple[str, Callable[[nn.Module], nn.Module]]] = [
    ("merged", lambda net: EWC(net, 2.0)),
    ("separate", lambda net: EWC(net, 2.0, tasks="separate")),
    ("online", lambda net: EWC(net, 2.0, tasks="online", decay=0.5)),
    ("sampled", lambda net: EWC(net, 2.0, fisher="sampled")),
    ("empirical", lambda net: EWC(net, 2.0, fisher="empirical")),
    ("mas", lambda net: MAS(net, 2.0)),
    ("mas average", lambda net: MAS(net, 2.0, accumulate="average")),
]
KEPT = pytest.mark.parametrize(  # how terms are kept
    "build", [build for _, build in (*PENALTIES[:3], PENALTIES[5])], ids=["merged", "separate", "online", "mas"]
)
MEASURED = pytest.mark.parametrize(  # how they are measured
    "build", [PENALTIES[number][1] for number in (0, 3, 5)], ids=["exact", "sampled", "mas"]
)


@KEPT
@pytest.mark.usefixtures("untyped")
def test_nothing_is_held_before_a_task_ends_nor_where_it_ended(build: Callable) -> None:
    network = make()
    penalty = build(network)
    assert penalty().item() == 0.0
    move(network)
    assert penalty().item() == 0.0
    (penalty() + sum((p**2).sum() for p in trainable(network).values())).backward()  # fits into a loss
    penalty.consolidate(task())
    assert penalty().item() == 0.0
    assert all(bool((grad == 0).all()) for grad in gradients(penalty(), network))
    move(network)
    assert penalty().item() > 0


@KEPT
@pytest.mark.usefixtures("untyped")
def test_added_gradients_are_those_of_the_penalty_in_the_loss(build: Callable) -> None:
    network, (inputs, labels) = make().eval(), task()
    penalty, held = build(network), trainable(network)

    def grads(*, in_loss: bool, own: bool = True) -> dict[str, Tensor | None]:
        network.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs), labels)
        (loss + penalty() if in_loss else loss).backward()
        if own and not in_loss:
            penalty.add_gradient()
        return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}

    def agree_in_all() -> None:
        wanted = grads(in_loss=True)
        for name, got in grads(in_loss=False).items():
            right = wanted[name]
            assert (got is None) == (right is None) == (not network.get_parameter(name).requires_grad)
            if got is not None and right is not None:
                close(got, right, 1e-12)

    alone = grads(in_loss=False, own=False)
    for name, got in grads(in_loss=False).items():
        assert got is alone[name] is None or torch.equal(got, alone[name]), "there is nothing to add before any task"
    network.zero_grad()
    penalty.add_gradient()
    assert all(p.grad is None for p in network.parameters())
    for _ in range(3):
        penalty.consolidate(task())
        move(network)
        agree_in_all()
    assert any(not torch.equal(got, alone[name]) for name, got in grads(in_loss=False).items() if name in held)

    network.zero_grad()
    penalty.add_gradient()  # where .grad is None
    for p, right in zip(held.values(), gradients(penalty(), network), strict=True):
        assert not p.grad.requires_grad
        close(p.grad, right, 1e-12)
    penalty.anchors.add_gradient(0.5)
    for p, right in zip(held.values(), gradients(penalty() + 0.5 * penalty.anchors(), network), strict=True):
        close(p.grad, right, 1e-12)
    network[0].requires_grad_(requires_grad=False)  # frozen since
    agree_in_all()
    network[0].weight.grad = torch.ones_like(network[0].weight)
    penalty.add_gradient()
    assert bool((network[0].weight.grad == 1).all())


@KEPT
@pytest.mark.usefixtures("untyped")
def test_gradients_of_the_penalty(build: Callable) -> None:
    network = nn.Linear(4, 2).double()
    penalty = build(network)
    for _ in range(2):
        penalty.consolidate(task(outputs=2))
        move(network)
    parameters = tuple(trainable(network).values())
    assert torch.autograd.gradcheck(lambda *_: penalty(), parameters)
    assert torch.autograd.gradgradcheck(lambda *_: penalty(), parameters)


@KEPT
@pytest.mark.usefixtures("untyped")
def test_the_strength_is_a_factor(build: Callable) -> None:
    network = make()
    penalty = build(network)
    penalty.consolidate(task())
    move(network)
    before = penalty().item()
    penalty.strength = 6.0
    assert penalty().item() == pytest.approx(3 * before, rel=1e-12)
    penalty.strength = 0.0
    assert penalty().item() == 0.0


@MEASURED
def test_a_penalty_disturbs_nothing(build: Callable, rng_untouched: Callable) -> None:
    network, data = make().train(), task()
    network[3].eval()
    for p in trainable(network).values():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(network)
    with rng_untouched():
        penalty = build(network)
        for _ in range(2):
            penalty.consolidate(data)
            penalty()
    unchanged(network, before)
    assert not list(penalty.parameters())
    assert not [name for name in penalty.state_dict() if "num_batches" in name or "running" in name]
    assert not list(penalty.anchors.children())


def unchanged(network: nn.Module, before: nn.Module) -> None:
    for module, other in zip(network.modules(), before.modules(), strict=True):
        assert module.training == other.training
        assert len(module._forward_hooks) == len(other._forward_hooks)
    for (name, tensor), other in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    for p, other in zip(network.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == other.requires_grad
        assert p.grad is None or bool((p.grad == 1).all())


def equal_states(penalty: nn.Module, state: dict[str, Tensor]) -> None:
    now = penalty.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype
        assert torch.equal(now[name], tensor), name


@MEASURED
@pytest.mark.usefixtures("untyped")
def test_an_error_halfway_changes_nothing(build: Callable, rng_untouched: Callable) -> None:
    network = make().train()
    network[1].eval()
    penalty = build(network)
    penalty.consolidate(task())
    move(network)
    before, state, good = copy.deepcopy(network), copy.deepcopy(penalty.state_dict()), task()
    broken = torch.zeros(4, 7, dtype=DOUBLE), torch.zeros(4, dtype=torch.long)
    with rng_untouched():
        for bad, error in ((broken, RuntimeError), ((good[0], good[1][:2]), ShapeError), (("a", "b"), RecollectError)):
            with pytest.raises(error):
                penalty.consolidate(part for part in [good, bad])
    unchanged(network, before)
    equal_states(penalty, state)


def test_a_wrong_label_halfway_changes_nothing() -> None:
    network, (inputs, labels) = make(), task()
    penalty = EWC(network, fisher="empirical")
    penalty.consolidate((inputs, labels))
    state = copy.deepcopy(penalty.state_dict())
    with pytest.raises(LabelError, match="labels must be from 0 to 2, the numbers of the outputs, got 0 to 3"):
        penalty.consolidate([(inputs, labels), (inputs[:4], torch.arange(4))])
    equal_states(penalty, state)


@pytest.mark.parametrize(
    ("build", "tasks"),
    [(PENALTIES[0][1], 0), *((build, 2) for name, build in PENALTIES if name not in ("empirical", "mas"))],
    ids=["nothing", "merged", "separate", "online", "sampled", "mas average"],
)
@pytest.mark.usefixtures("untyped")
def test_a_state_goes_on_bit_for_bit(build: Callable, tasks: int) -> None:
    network = make()
    penalty = build(network)
    for _ in range(tasks):
        penalty.consolidate(task())
        move(network)
    saved = copy.deepcopy(penalty.state_dict())
    other = copy.deepcopy(network)
    fresh = build(other)
    fresh.load_state_dict(saved, strict=True)
    equal_states(fresh, saved)
    used = build(other)  # what was there is replaced
    used.consolidate(task())
    used.load_state_dict(saved, strict=True)
    last = task()
    for one in (fresh, used):
        assert torch.equal(one(), penalty())
    for one in (penalty, fresh, used):
        one.consolidate(last)
    move(network)
    with torch.no_grad():
        for mine, right in zip(other.parameters(), network.parameters(), strict=True):
            mine.copy_(right)
    for one, net in ((fresh, other), (used, other)):
        equal_states(one, penalty.state_dict())
        for mine, right in zip(gradients(one(), net), gradients(penalty(), network), strict=True):
            assert torch.equal(mine, right)


@KEPT
@pytest.mark.usefixtures("untyped")
def test_copies_have_a_network_of_their_own(build: Callable) -> None:
    network = make()
    penalty = build(network)
    penalty.consolidate(task())
    other_network, other = copy.deepcopy((network, penalty))
    assert other.anchors.network is other_network
    state = copy.deepcopy(penalty.state_dict())
    move(other_network)
    assert penalty().item() == 0.0
    assert other().item() > 0
    other.consolidate(task())
    equal_states(penalty, state)


@MEASURED
@pytest.mark.usefixtures("untyped")
def test_double_after_single(build: Callable) -> None:
    network = make().float()
    inputs, labels = task()
    penalty = build(network)
    penalty.consolidate((inputs.float(), labels))
    move(network)
    value = penalty()
    assert value.dtype == torch.float32
    penalty.double()
    assert all(b.dtype == DOUBLE for name, b in penalty.named_buffers() if "count" not in name)
    assert penalty().item() == pytest.approx(value.item(), rel=1e-5)
    network.double()
    penalty.consolidate((inputs, labels))
    move(network)
    assert penalty().dtype == DOUBLE


@MEASURED
@pytest.mark.usefixtures("untyped")
def test_consolidation_without_gradients_around(build: Callable) -> None:
    network, other = make(), None
    other = copy.deepcopy(network)
    first, second = task(), task()
    penalty, wanted = build(network), build(other)
    with torch.inference_mode():
        penalty.consolidate(first)
    wanted.consolidate(first)
    torch.manual_seed(1)
    move(network)
    torch.manual_seed(1)
    move(other)
    for mine, right in zip(gradients(penalty(), network), gradients(wanted(), other), strict=True):
        assert torch.equal(mine, right)
    with torch.no_grad():
        penalty.consolidate(second)
        penalty()
    wanted.consolidate(second)
    equal_states(penalty, wanted.state_dict())


def test_anchors_are_copies() -> None:
    for build in (lambda net: EWC(net, tasks="separate"), EWC, MAS):
        network = make()
        penalty = build(network)
        penalty.consolidate(task())
        where = places(network)
        move(network)
        for name, place in where.items():
            assert torch.equal(penalty.anchors.anchor(name)[0], place)


def test_frozen_parameters_are_left_alone() -> None:
    penalty = EWC(make())
    assert "4.bias" not in penalty.anchors.names
    assert not [name for name in penalty.state_dict() if "4/bias" in name]


def test_parameters_of_equal_names_but_for_the_dots_are_told_apart() -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "a/weight": nn.Linear(2, 2)})
    assert len(list(EWC(network).anchors.named_buffers())) == 1 + 2 * 4


def test_a_layer_frozen_after_the_penalty_was_made() -> None:
    """Either it counts as unimportant, or the error says what to do; torch's own words do not."""
    network = make()
    penalty = EWC(network)
    network[0].requires_grad_(requires_grad=False)
    try:
        penalty.consolidate(task())
    except RecollectError:
        return
    assert bool(penalty.anchors.importance("6.weight").any())


# EWC: what is refused


def test_settings_of_ewc() -> None:
    network = make()
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SettingError, match="strength must be a finite number of at least 0, got"):
            EWC(network, strength)
    for decay in (-0.1, float("nan")):
        with pytest.raises(SettingError, match="decay must be a finite number of at least 0, got"):
            EWC(network, tasks="online", decay=decay)
    with pytest.raises(SettingError, match=r"decay must be from 0 to 1, .* got 1.5"):
        EWC(network, tasks="online", decay=1.5)
    with pytest.raises(SettingError, match=r"only tasks='online' decays, got 0.5 for 'merged'"):
        EWC(network, decay=0.5)
    for frozen in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(requires_grad=False)):
        for build in (EWC, MAS):
            with pytest.raises(SettingError, match="no parameter that requires a gradient"):
                build(frozen)


@pytest.mark.usefixtures("untyped")
def test_words_and_types_that_are_refused() -> None:
    network = make()
    with pytest.raises(SettingError, match="fisher must be one of 'exact', 'sampled', 'empirical', got 'true'"):
        EWC(network, fisher="true")
    with pytest.raises(SettingError, match="tasks must be one of 'merged', 'separate', 'online', got 'all'"):
        EWC(network, tasks="all")
    with pytest.raises(SettingError, match="accumulate must be one of 'sum', 'average', 'last', got 'mean'"):
        MAS(network, accumulate="mean")
    with pytest.raises(SettingError, match="likelihood must be a likelihood, such as"):
        EWC(network, likelihood=Categorical)
    for build in (EWC, MAS):
        with pytest.raises(SettingError, match=r"network must be a torch.nn.Module, got"):
            build(nn.Linear)
        with pytest.raises(SettingError, match="strength must be a finite number of at least 0, got 'much'"):
            build(network, "much")


class Poisson:
    """A likelihood of somebody's own."""

    def log_prob(self, outputs: Tensor, values: Tensor) -> Tensor:
        return (values * outputs - outputs.exp()).sum(-1)

    def gradient(self, outputs: Tensor, values: Tensor) -> Tensor:
        return values - outputs.exp()

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.exp()

    def fit_constant(self, values: Tensor, weights: Tensor, size: int | None) -> Tensor:
        return (weights.unsqueeze(-1) * values).sum(-2).log()

    def check_values(self, values: Tensor, size: int) -> None:
        if bool((values < 0).any()) or values.shape[-1] != size:
            raise ShapeError(f"{size} counts are needed, got {values}.")


def test_a_likelihood_of_ones_own_has_an_empirical_fisher() -> None:
    network, inputs = make(), task(5)[0]
    targets = torch.randint(0, 4, (5, 3)).double()
    for fisher in ("exact", "sampled"):
        with pytest.raises(SettingError, match="Use fisher='empirical'"):
            EWC(network, fisher=fisher, likelihood=Poisson())
    penalty = EWC(network, fisher="empirical", likelihood=Poisson())
    penalty.consolidate((inputs, targets))
    same(penalty, mean_of(network, inputs, lambda o, n: iter([(1.0, (targets[n] * o - o.exp()).sum())])))


def test_labels_that_are_refused() -> None:
    network, (inputs, labels) = make(), task(4)
    penalty = EWC(network, fisher="empirical")
    with pytest.raises(SettingError, match="needs labels: pass pairs"):
        penalty.consolidate(inputs)
    with pytest.raises(LabelError, match=r"labels must be from 0 to 2, .* got -1 to -1"):
        penalty.consolidate((inputs, torch.full((4,), -1)))
    for wrong in (labels.double(), labels > 0):
        with pytest.raises(DtypeError, match="labels must be whole numbers, got torch"):
            penalty.consolidate((inputs, wrong))
    with pytest.raises(ShapeError, match=r"labels must have shape \(4,\) to match the outputs, got \(4, 1\)"):
        penalty.consolidate((inputs, labels.view(4, 1)))
    with pytest.raises(ShapeError, match=r"targets must have the shape of the outputs, \(4, 3\), got \(4,\)"):
        EWC(network, fisher="empirical", likelihood=Gaussian()).consolidate((inputs, labels.double()))
    with pytest.raises(SettingError, match="no examples"):
        penalty.consolidate(iter([]))
    with pytest.raises(LabelError, match=r"not among the task's outputs, \[0, 1\]"):
        penalty.consolidate((inputs, torch.tensor([0, 1, 2, 0])), outputs=[0, 1])
    for wrong_outputs in ([0, 3], [], [1, 1], [-1]):
        with pytest.raises(SettingError, match="outputs must be"):
            penalty.consolidate((inputs, labels), outputs=wrong_outputs)
    assert penalty.anchors.terms == 0


# MAS


def test_mas_is_the_absolute_gradient_of_each_examples_squared_norm() -> None:
    network, (inputs, labels) = make(), task(7)
    wanted = omegas(network, inputs)
    targets = torch.randn(7, 2)
    for data in (
        inputs,
        (inputs, labels),
        (inputs, labels - 99),
        (inputs, targets),
        [inputs[:1], inputs[1:2], inputs[2:]],
    ):
        penalty = MAS(network)
        penalty.consolidate(data)
        same(penalty, wanted)


@pytest.mark.parametrize("accumulate", ["sum", "average", "last"])
@pytest.mark.usefixtures("untyped")
def test_mas_over_three_tasks(accumulate: str) -> None:
    network = make()
    penalty = MAS(network, 1.5, accumulate=accumulate)
    all_of_them = []
    for _ in range(3):
        move(network)
        inputs = task(5)[0]
        penalty.consolidate(inputs)
        all_of_them.append(omegas(network, inputs))
    total = {name: sum(one[name] for one in all_of_them) for name in all_of_them[0]}
    wanted = {"sum": total, "average": {n: t / 3 for n, t in total.items()}, "last": all_of_them[-1]}[accumulate]
    same(penalty, wanted)
    anchor = places(network)
    move(network)
    agree(penalty, network, quadratic(network, [(wanted, anchor)], 1.5))


def test_mas_of_sequences_and_convolutions() -> None:
    for network, inputs in (
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(5, 3, 4, dtype=DOUBLE)),
        (nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh()).double(), torch.randn(5, 2, 4, 4, dtype=DOUBLE)),
        (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double(), torch.randn(5, 4, dtype=DOUBLE)),
    ):
        penalty = MAS(network)
        penalty.consolidate(inputs)
        same(penalty, omegas(network, inputs))


def test_mas_of_some_outputs_looks_at_no_labels() -> None:
    network, inputs = make(4), task(5)[0]
    wanted = mean_of(network, inputs, lambda out, n: iter([(-1.0, out[1] ** 2 + out[3] ** 2)]))
    for data in (inputs, (inputs, torch.tensor([1, 3, 1, 3, 3])), (inputs, torch.arange(5))):
        penalty = MAS(network)
        penalty.consolidate(data, outputs=[1, 3])
        same(penalty, wanted)


def test_settings_of_mas() -> None:
    with pytest.raises(SettingError, match="strength must be a finite number of at least 0, got -1"):
        MAS(make(), -1.0)


# SI

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "decay": lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1, maximize=False),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "nesterov foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True, weight_decay=0.1),
    "fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class LiteralSI:
    """The loop of the paper: the loss's gradient and the penalty's are computed apart."""

    def __init__(self, network: nn.Module, strength: float, damping: float) -> None:
        self.network, self.strength, self.damping = network, strength, damping
        self.path = {name: torch.zeros_like(p, requires_grad=False) for name, p in trainable(network).items()}
        self.start = places(network)
        self.omega: Sums | None = None

    def penalty(self) -> Tensor:
        if self.omega is None:
            return torch.zeros((), dtype=DOUBLE)
        return quadratic(self.network, [(self.omega, self.start)], self.strength)

    def step(self, optimizer: torch.optim.Optimizer, losses: list[Callable[[], Tensor]]) -> None:
        parameters = trainable(self.network)
        pure = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        for loss in losses:
            for own, grad in zip(pure.values(), gradients(loss(), self.network), strict=True):
                own.add_(grad)
            if self.omega is not None:
                for p, grad in zip(parameters.values(), gradients(self.penalty(), self.network), strict=True):
                    p.grad.add_(grad)
        for name, p in parameters.items():
            p.grad.add_(pure[name])
        before = places(self.network)
        optimizer.step()
        for name, p in parameters.items():
            self.path[name] -= pure[name] * (p.detach() - before[name])

    def consolidate(self) -> None:
        omega = {}
        for name, p in trainable(self.network).items():
            gained = self.path[name] / ((p.detach() - self.start[name]) ** 2 + self.damping)
            omega[name] = (gained + (0 if self.omega is None else self.omega[name])).clamp(min=0)
            self.path[name].zero_()
        self.omega, self.start = omega, places(self.network)


def losses_of(network: nn.Module, data: Data) -> list[Callable[[], Tensor]]:
    return [lambda: nn.functional.cross_entropy(network(data[0]), data[1])]


def step_of_si(network: nn.Module, optimizer: torch.optim.Optimizer, penalty: nn.Module, way: str, data: list) -> None:
    """One step, with its backward passes in one of five ways."""
    optimizer.zero_grad()
    (loss,), (second,) = losses_of(network, data[0]), losses_of(network, data[1])

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss() + penalty()
        total.backward()
        return total

    if way == "closure":
        optimizer.step(closure)
        return
    if way in {"together", "accumulated"}:
        (loss() + penalty()).backward()
        if way == "accumulated":
            (second() + penalty()).backward()
    else:
        parts = [loss, penalty] if penalty.anchors.terms else [loss]
        for part in parts if way == "loss first" else reversed(parts):
            part().backward()
    optimizer.step()


WAYS = ("accumulated", "loss first", "penalty first", "closure")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "together") for name in OPTIMIZERS),
        *((name, way) for name in ("nesterov", "adam") for way in WAYS),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_si_is_the_literal_loop(name: str, way: str) -> None:
    network = plain()
    twin = copy.deepcopy(network)
    optimizer, other = OPTIMIZERS[name](list(network.parameters())), OPTIMIZERS[name](list(twin.parameters()))
    penalty, literal = SI(network, optimizer, 5.0, damping=0.01), LiteralSI(twin, 5.0, 0.01)
    for _ in range(3):
        for _ in range(4):
            data, more = task(), task()
            if way == "accumulated":
                literal.step(other, losses_of(twin, data) + losses_of(twin, more))
            else:
                literal.step(other, losses_of(twin, data))
            step_of_si(network, optimizer, penalty, way, [data, more])
        for mine, right in zip(network.parameters(), twin.parameters(), strict=True):
            close(mine.detach(), right.detach())
        penalty.consolidate()
        literal.consolidate()
        assert literal.omega is not None
        for key, right in literal.omega.items():
            got = penalty.anchors.importance(key)[0]
            assert float((got - right).abs().max() / right.abs().max()) < 1e-9
        assert penalty().item() == 0.0
    move(network)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), network.parameters(), strict=True):
            p.copy_(q)
    close(penalty(), literal.penalty(), 1e-9)


def si_step(network: nn.Module, optimizer: torch.optim.Optimizer, penalty: nn.Module, data: Data) -> None:
    optimizer.zero_grad()
    (nn.functional.cross_entropy(network(data[0]), data[1]) + penalty()).backward()
    optimizer.step()


def paths(penalty: nn.Module) -> Sums:
    return {name: tensor.clone() for name, tensor in penalty.state_dict().items() if "path" in name}


def test_si_is_not_naive_training() -> None:
    ends = []
    for strength in (10.0, 0.0):
        torch.manual_seed(3)
        network = plain()
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        penalty = SI(network, optimizer, strength)
        for _ in range(2):
            data = task()
            for _ in range(5):
                si_step(network, optimizer, penalty, data)
            penalty.consolidate(data)
            assert all(bool((penalty.anchors.importance(name) > 0).any()) for name in penalty.anchors.names)
        ends.append(network[0].weight.detach().clone())
    assert not torch.allclose(*ends, rtol=1e-3)


@pytest.mark.parametrize("between", ["a skipped step", "a look at the gradient", "a value alone", "an evaluation"])
def test_si_counts_only_what_reached_the_step(between: str) -> None:
    """What is asked of the penalty between two steps leaves no trace in the path."""
    network = plain()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    penalty = SI(network, optimizer, 10.0)
    first, second = task(), task()
    si_step(network, optimizer, penalty, first)
    penalty.consolidate()
    si_step(network, optimizer, penalty, first)
    twin, steps, other = copy.deepcopy((network, optimizer, penalty))
    other.watch(steps)
    if between == "a skipped step":
        (nn.functional.cross_entropy(network(first[0]), first[1]) + penalty()).backward()
        optimizer.zero_grad()
    elif between == "a look at the gradient":
        gradients(penalty(), network)
    elif between == "a value alone":
        penalty()
    else:
        with torch.no_grad():
            penalty()
    si_step(network, optimizer, penalty, second)
    si_step(twin, steps, other, second)
    assert torch.equal(network[0].weight, twin[0].weight)
    wanted = paths(other)
    for name, got in paths(penalty).items():
        close(got, wanted[name])


def test_si_refuses_lbfgs() -> None:
    network = plain()
    with pytest.raises(SettingError, match="LBFGS"):
        SI(network, torch.optim.LBFGS(network.parameters()))


def test_si_watches_another_optimizer_instead() -> None:
    network = plain()
    first = torch.optim.SGD(network.parameters(), 0.1)
    second = torch.optim.SGD(network.parameters(), 0.1)
    penalty = SI(network, first)
    penalty.watch(second)
    si_step(network, first, penalty, task())
    assert not any(bool(path.any()) for path in paths(penalty).values())
    si_step(network, second, penalty, task())
    assert all(bool(path.any()) for path in paths(penalty).values())
    penalty.watch(second)  # again: it must not count twice
    penalty.consolidate()
    before, data = places(network), task()
    grad = gradients(nn.functional.cross_entropy(network(data[0]), data[1]), network)[0]
    si_step(network, second, penalty, data)
    close(paths(penalty)["path:0/weight"], -grad * (network[0].weight.detach() - before["0.weight"]))


def test_si_says_so_where_it_saw_no_step() -> None:
    network = plain()
    penalty = SI(network, torch.optim.SGD(network.parameters(), 0.1))
    with pytest.raises(SettingError, match=r"no step has been seen.*watch"):
        penalty.consolidate()
    head, body = torch.optim.SGD(network[-1].parameters(), 0.1), torch.optim.Adam(network[0].parameters())
    penalty.watch(head, body)
    data = task()
    (nn.functional.cross_entropy(network(data[0]), data[1]) + penalty()).backward()
    head.step()
    body.step()
    penalty.consolidate()
    assert all(bool((penalty.anchors.importance(name) > 0).any()) for name in penalty.anchors.names)
    with pytest.raises(SettingError, match="no step"):
        penalty.consolidate()


def test_a_network_that_is_not_finite_leaves_penalties_as_they_were() -> None:
    data = task()
    for make_penalty in (EWC, MAS):
        network = plain()
        penalty = make_penalty(network)
        penalty.consolidate(data)
        before = copy.deepcopy(penalty.state_dict())
        with torch.no_grad():
            network[0].weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="not finite"):
            penalty.consolidate(data)
        assert all(torch.equal(tensor, before[name]) for name, tensor in penalty.state_dict().items())


def test_a_layer_that_has_grown_needs_a_new_penalty() -> None:
    network = plain()
    penalty = EWC(network)
    penalty.consolidate(task())
    network[0] = nn.Linear(network[0].in_features, network[0].out_features + 1, dtype=torch.float64)
    with pytest.raises(ShapeError, match="Make a new penalty"):
        penalty()


def test_separate_terms_are_not_taken_for_merged_ones() -> None:
    network = plain()
    separate = EWC(network, tasks="separate")
    for _ in range(2):
        separate.consolidate(task())
    with pytest.raises(FormatError, match="tasks='separate'"):
        EWC(network).load_state_dict(separate.state_dict())


def test_small_importances_count_in_half_precision() -> None:
    network = nn.Linear(1, 1, bias=False).half()
    penalty = EWC(network, 1e9)
    penalty.anchors.replace({"weight": torch.full((1, 1), 1e-9)})
    with torch.no_grad():
        network.weight += 0.5
    penalty.add_gradient()
    added, network.weight.grad = network.weight.grad, None
    penalty().backward()
    assert added.item() == pytest.approx(0.5, rel=1e-2)
    assert network.weight.grad.item() == pytest.approx(added.item(), rel=1e-2)


@pytest.mark.parametrize("tasks", [0, 1, 3])
@pytest.mark.usefixtures("untyped")
def test_si_goes_on_bit_for_bit(tasks: int) -> None:
    network = plain()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    penalty = SI(network, optimizer, 3.0)
    for _ in range(tasks):
        si_step(network, optimizer, penalty, task())
        penalty.consolidate()
    si_step(network, optimizer, penalty, task())  # in the middle of a task
    other, steps = copy.deepcopy((network, optimizer))
    fresh = SI(plain(), steps, 3.0)
    fresh = SI(other, steps, 3.0)
    fresh.load_state_dict(copy.deepcopy(penalty.state_dict()), strict=True)
    for _ in range(2):
        data = task()
        si_step(network, optimizer, penalty, data)
        si_step(other, steps, fresh, data)
        equal_states(fresh, penalty.state_dict())
        penalty.consolidate()
        fresh.consolidate()
    equal_states(fresh, penalty.state_dict())
    assert torch.equal(network[0].weight, other[0].weight)


def test_si_disturbs_nothing(rng_untouched: Callable) -> None:
    network = make().train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for p in trainable(network).values():
        p.grad = torch.ones_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(network)
    with rng_untouched():
        penalty = SI(network, optimizer)
        optimizer.step()
        penalty.consolidate()
        penalty()
        optimizer.step()
        with torch.inference_mode():
            penalty.consolidate()
    unchanged(network, before)
    assert not list(penalty.parameters())
    move(network)
    assert all(bool(grad.isfinite().all()) for grad in gradients(penalty(), network))
    optimizer.step()
    parameters = tuple(trainable(network).values())
    si_step(network, optimizer, penalty, task())
    penalty.consolidate()
    move(network)
    assert torch.autograd.gradcheck(lambda *_: penalty(), parameters)


def test_si_with_parameters_that_have_no_gradient() -> None:
    network = plain()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    penalty = SI(network, optimizer)
    optimizer.zero_grad()
    network[0](task()[0]).square().sum().backward()
    optimizer.step()
    assert not bool(paths(penalty)["path:2/weight"].any())
    assert bool((paths(penalty)["path:0/weight"] > 0).all())


def test_settings_of_si() -> None:
    network = plain()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with pytest.raises(SettingError, match="damping must be a finite number above 0, got 0"):
        SI(network, optimizer, damping=0.0)
    with pytest.raises(SettingError, match="strength must be a finite number of at least 0, got -1"):
        SI(network, optimizer, -1.0)
    with pytest.raises(SettingError, match="no parameter that requires a gradient"):
        SI(nn.Linear(2, 2).requires_grad_(requires_grad=False), optimizer)


@pytest.mark.usefixtures("untyped")
def test_si_needs_an_optimizer() -> None:
    with pytest.raises(SettingError, match=r"optimizer must be a torch.optim.Optimizer, got"):
        SI(plain(), 0.1)


def test_si_says_which_parameter_moved_unseen() -> None:
    network, data = plain(), task()
    head, body = torch.optim.SGD(network[-1].parameters(), 0.1), torch.optim.SGD(network[0].parameters(), 0.1)
    penalty = SI(network, head)
    (nn.functional.cross_entropy(network(data[0]), data[1]) + penalty()).backward()
    head.step()
    body.step()
    with pytest.raises(SettingError, match=r"0\.\w+ has changed by steps that were not seen"):
        penalty.consolidate()


def test_si_follows_parameters_that_an_optimizer_takes_in_later() -> None:
    network, data = plain(), task()
    optimizer = torch.optim.SGD(network[-1].parameters(), 0.1)
    penalty = SI(network, optimizer)
    optimizer.add_param_group({"params": list(network[0].parameters())})
    si_step(network, optimizer, penalty, data)
    penalty.consolidate()
    assert bool((penalty.anchors.importance("0.weight") > 0).any())


def test_a_sparse_gradient_takes_the_penalty_too() -> None:
    network = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    penalty = MAS(network, 2.0)
    tokens = torch.tensor([[0, 1], [1, 4]])
    penalty.consolidate(tokens)
    move(network)
    loss = network(tokens).square().sum()
    loss.backward()
    penalty.add_gradient()
    added, network[0].weight.grad = network[0].weight.grad, None
    (network(tokens).square().sum() + penalty()).backward()
    torch.testing.assert_close(added, network[0].weight.grad.to_dense())
