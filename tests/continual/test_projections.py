"""GEM and A-GEM against the textbook (every active set tried), the KKT conditions, and what they must leave alone."""

import copy
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from recollect.continual.projections import AGEM, GEM, _nonnegative, _projected
from recollect.errors import DtypeError, NonFiniteError, SettingError, ShapeError

DOUBLE = torch.float64


class Kept(NamedTuple):
    """The least that A-GEM takes as a buffer; ``len`` of it is 2, that of a pair."""

    inputs: Tensor
    labels: Tensor

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        return self.inputs[:count], self.labels[:count]


class Empty:
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("there is nothing to draw")

    def __len__(self) -> int:
        return 0


def every_active_set(rows: Tensor, g: Tensor, margin: float) -> Tensor:
    """min over v >= margin of |g + G' v|: of all choices of which v lie above the margin, the best feasible one."""
    start = g + margin * rows.sum(0)
    best = start
    for size in range(1, len(rows) + 1):
        for chosen in map(list, itertools.combinations(range(len(rows)), size)):
            u = -torch.linalg.pinv(rows[chosen].T, rtol=1e-11) @ start
            x = start + rows[chosen].T @ u
            if (u >= -1e-9).all() and x.norm() < best.norm():
                best = x
    return best


def data(count: int = 6, size: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(count, size, dtype=DOUBLE), torch.randint(classes, (count,))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def gradient(network: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the mean loss, by ``backward`` on a copy in evaluation mode."""
    network = copy.deepcopy(network).eval()
    network.zero_grad()
    cross_entropy(network(examples[0]), examples[1]).backward()
    return flat(network)


def flat(network: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in network.parameters()]
    )


def opposed(network: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    """Gives the network a gradient that raises the loss on the examples, and some noise."""
    network.zero_grad()
    (-cross_entropy(network(examples[0]), examples[1])).backward()
    for p in network.parameters():
        assert p.grad is not None
        p.grad += 0.01 * torch.randn_like(p)
    return flat(network)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def projected(rows: Tensor, g: Tensor, margin: float) -> Tensor:
    return _projected(torch.cat([rows, g[None]]), margin)


# The problem


def degenerate(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and a gradient; T from 1 to 24, P from 1 to 29, so that T > P is common."""
    rng = np.random.default_rng(seed)
    tasks, size = int(rng.integers(1, 25)), int(rng.integers(1, 30))
    rows = rng.standard_normal((tasks, size))
    scales = 10.0 ** rng.uniform(-12, 12, (tasks, 1))
    repeated = rows[rng.integers(0, max(1, tasks // 3), tasks)]
    match kind:
        case "duplicates":
            rows = repeated
        case "scaled and opposite duplicates":
            rows = repeated * scales * rng.choice([-1, 1], (tasks, 1))
        case "scales":
            rows = rows * scales
        case "zeros":
            rows[rng.random(tasks) < 0.5] = 0
        case "all zero":
            rows[:] = 0
        case "rank 1":
            rows = np.outer(rng.standard_normal(tasks), rows[0])
        case "rank 2":
            rows = rng.standard_normal((tasks, 2)) @ rng.standard_normal((2, size))
        case "nearly parallel":
            rows = rows[:1] + 1e-9 * rows
        case "nearly opposite":
            rows = (rows[:1] + 1e-7 * rows) * rng.choice([-1, 1], (tasks, 1))
        case "whole numbers":
            rows = rng.integers(-1, 2, (tasks, size)).astype(float)
    g = rng.standard_normal(size) * 10.0 ** rng.uniform(-6, 6)
    if rng.random() < 0.3:
        g = -rows[rng.integers(0, tasks, 3)].sum(0)
    return torch.from_numpy(rows), torch.from_numpy(g)


KINDS = ("random", "duplicates", "scaled and opposite duplicates", "scales", "zeros", "all zero", "rank 1", "rank 2")


@pytest.mark.parametrize("kind", [*KINDS, "nearly parallel", "nearly opposite", "whole numbers"])
@pytest.mark.usefixtures("untyped")
def test_every_problem_is_solved(kind: str) -> None:
    """Over hundreds of problems: x.g_t >= 0 (KKT), x is no further from the start than scipy's, and equals it."""
    for seed in range(30):
        rows, g = degenerate(kind, seed)
        margin = 0.5 * (seed % 2)
        x = projected(rows, g, margin)
        norms = rows.norm(dim=1)
        units = rows / norms.where(norms > 0, 1)[:, None]
        start = g + margin * rows.sum(0)
        scale = float(g.norm() + margin * norms.sum()) or 1.0
        hard = kind == "nearly opposite"  # weights of up to 1e7 cancel
        assert float((units @ x).min()) >= -(1e-7 if hard else 1e-12) * scale
        if not hard:
            # complementary: x is orthogonal to what was added, which with feasibility makes it the only solution
            assert abs(float(x @ (x - start))) <= 1e-8 * scale**2
            u, _ = nnls(units.T.numpy(), -(start / scale).numpy())
            close(x / scale, start / scale + units.T @ torch.from_numpy(u), 1e-8)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.0, 0.5, 2.0]))
def test_equals_the_best_of_all_active_sets(seed: int, tasks: int, size: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, size, dtype=DOUBLE, generator=generator)
    if seed % 3 == 0:
        rows[-1] = rows[0] * (-2 if seed % 2 else 3)
    g = torch.randn(size, dtype=DOUBLE, generator=generator)
    close(projected(rows, g, margin), every_active_set(rows, g, margin), 1e-8)


@pytest.mark.usefixtures("untyped")
def test_weights_are_never_negative_and_few_rounds_are_enough() -> None:
    for seed in range(40):
        rows, g = degenerate("nearly opposite", seed)
        columns = nn.functional.normalize(rows, dim=1).T.contiguous()
        assert (_nonnegative(columns, g) >= 0).all()


def test_margin_pushes_the_step_toward_old_tasks() -> None:
    rows, g = torch.tensor([[1.0, 0.0]], dtype=DOUBLE), torch.tensor([-1.0, 1.0], dtype=DOUBLE)
    close(projected(rows, g, 0.0), torch.tensor([0.0, 1.0], dtype=DOUBLE))
    close(projected(rows, g, 0.5), torch.tensor([0.0, 1.0], dtype=DOUBLE))  # v = 1 is above it anyway
    close(projected(rows, g, 3.0), torch.tensor([2.0, 1.0], dtype=DOUBLE))


def test_many_parameters_are_one_problem() -> None:
    rows, g = torch.randn(4, 20_000), torch.randn(20_000)  # three pieces
    g -= rows[:3].sum(0)
    gram, start = rows.double() @ rows.double().T, g.double() + 0.5 * rows.double().sum(0)
    u, _ = nnls(
        np.linalg.cholesky(gram.numpy()).T,
        np.linalg.solve(np.linalg.cholesky(gram.numpy()), -(rows.double() @ start).numpy()),
    )
    close(projected(rows, g, 0.5), start + torch.from_numpy(u) @ rows.double())


# The gradient of a network


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_is_the_textbook(margin: float) -> None:
    network = mlp()
    gem, tasks = GEM(network, margin=margin), [data() for _ in range(3)]
    for task in tasks:
        gem.consolidate(task)
    rows = torch.stack([gradient(network, task) for task in tasks])
    g = opposed(network, tasks[1])
    assert gem.project()
    close(flat(network), every_active_set(rows, g, margin))
    assert (rows @ flat(network) >= -1e-12).all()


def test_agem_is_the_textbook() -> None:
    network, task = mlp(), data()
    r, g = gradient(network, task), opposed(network, task)
    assert AGEM(network, Kept(*task)).project()
    close(flat(network), g - (g @ r) / (r @ r) * r)


def test_agem_draws_as_many_examples_as_asked() -> None:
    network, task = mlp(), data()
    r, g = gradient(network, (task[0][:2], task[1][:2])), opposed(network, (task[0][:2], task[1][:2]))
    assert AGEM(network, Kept(*task), examples=2).project()
    close(flat(network), g - (g @ r) / (r @ r) * r)


METHODS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], GEM | AGEM]] = {
    "gem": lambda network, task: remembering(GEM(network), task),
    "agem": lambda network, task: AGEM(network, Kept(*task)),
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def remembering(gem: GEM, *tasks: tuple[Tensor, Tensor]) -> GEM:
    for task in tasks:
        gem.consolidate(task)
    return gem


@methods
def test_agreement_changes_nothing(make) -> None:
    network, task = mlp(), data()
    method = make(network, task)
    cross_entropy(network(task[0]), task[1]).backward()
    before, grads = flat(network), [p.grad for p in network.parameters()]
    assert method.project() is False
    assert torch.equal(flat(network), before)
    assert all(p.grad is grad for p, grad in zip(network.parameters(), grads, strict=True))


@methods
def test_gradients_change_in_place(make) -> None:
    network, task = mlp(), data()
    method = make(network, task)
    opposed(network, task)
    grads = [p.grad for p in network.parameters()]
    assert method.project() is True
    assert all(p.grad is grad for p, grad in zip(network.parameters(), grads, strict=True))


@methods
def test_works_under_no_grad_and_inference_mode(make) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        network, task = mlp(), data()
        method = make(network, task)
        opposed(network, task)
        with mode():
            assert method.project()


def test_without_examples_nothing_happens() -> None:
    network = mlp()
    assert GEM(network).project() is False
    assert AGEM(network, Empty()).project() is False
    assert all(p.grad is None for p in network.parameters())


def test_another_loss() -> None:
    network = nn.Linear(3, 2).double()
    inputs, targets = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE)
    gem = remembering(GEM(network, margin=0.0), (inputs, targets))
    (-mse_loss(network(inputs), targets)).backward()
    assert gem.project(mse_loss)
    assert flat(network).abs().max() < 1e-12


@methods
def test_frozen_parameters_play_no_part(make) -> None:
    network, task = mlp(), data()
    network[0].requires_grad_(False)
    method = make(network, task)
    (-cross_entropy(network(task[0]), task[1])).backward()
    assert method.project()
    assert network[0].weight.grad is None
    assert flat(network).abs().max() < 1e-12 or isinstance(method, GEM)


def test_a_grad_of_none_is_zero_and_stays_none_where_nothing_changes() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * (self.a + self.b)

    network = Three()
    inputs = torch.ones(1, 2, dtype=DOUBLE)
    agem = AGEM(network, Kept(inputs, inputs))
    network.a.grad = -torch.ones(2, dtype=DOUBLE)
    assert agem.project(lambda outputs, labels: outputs.sum())
    close(network.a.grad, torch.full((2,), -0.5, dtype=DOUBLE))
    assert network.b.grad is not None
    close(network.b.grad, torch.full((2,), 0.5, dtype=DOUBLE))
    assert network.c.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_in_float64(dtype: torch.dtype) -> None:
    network, rows = nn.Linear(3, 1, bias=False).to(dtype), torch.tensor([[1.0, 2.0, 4.0]]).to(dtype)
    network.weight.grad = torch.tensor([[1.0, -1.0, -1.0]]).to(dtype)
    agem = AGEM(network, Kept(rows, rows))
    assert agem.project(lambda outputs, labels: outputs.sum())
    assert network.weight.grad.dtype is dtype
    r, g = rows[0].double(), torch.tensor([1.0, -1.0, -1.0], dtype=DOUBLE)
    assert torch.equal(network.weight.grad[0], (g - (g @ r) / (r @ r) * r).to(dtype))


def test_mixed_dtypes() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    network[2].bias = nn.Parameter(network[2].bias.detach().double())
    network[2].forward = lambda h: h @ network[2].weight.T + network[2].bias
    task = (torch.randn(6, 3), torch.randint(4, (6,)))
    agem = AGEM(network, Kept(*task))
    (-cross_entropy(network(task[0]), task[1])).backward()
    assert agem.project()
    assert [p.grad.dtype for p in network.parameters()] == [torch.float32] * 3 + [DOUBLE]
    assert all(p.grad.abs().max() < 1e-6 for p in network.parameters())


def test_tiny_and_huge_gradients_are_projected() -> None:
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        network, row = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0]])
        network.weight.grad = torch.tensor([[-1.0, 1.0]]) * scale
        assert AGEM(network, Kept(row, row)).project(lambda outputs, labels, scale=scale: outputs.sum() * scale)
        assert (network.weight.grad / scale).allclose(torch.tensor([[0.0, 1.0]]))


# What stays as it is


class Restless(nn.Module):
    """Draws random numbers, counts its calls in a buffer, and replaces another, whatever its mode."""

    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3, dtype=DOUBLE), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.last = inputs[0]
        return inputs + 0.001 * torch.randn(())


@methods
def test_network_and_random_state_are_left_alone(make, rng_untouched) -> None:
    task = data()
    network = nn.Sequential(Restless(), nn.BatchNorm1d(3), nn.Dropout(0.5), mlp(), nn.Dropout(0.1)).double()
    network[1].eval()
    network[3][1].eval()
    method = make(network, task)
    opposed(network, task)
    modes = [module.training for module in network.modules()]
    buffers = dict(network.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    parameters = [p.detach().clone() for p in network.parameters()]
    with rng_untouched():
        assert method.project()
    assert [module.training for module in network.modules()] == modes
    assert all(new is buffers[name] and torch.equal(new, values[name]) for name, new in network.named_buffers())
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), parameters, strict=True))


@methods
def test_modes_return_after_a_failure(make) -> None:
    network, task = nn.Sequential(nn.Dropout(), mlp()), data()
    method = make(network, task)
    opposed(network, task)
    network[1].eval()

    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        assert not network.training
        raise KeyError("no loss")

    with pytest.raises(KeyError, match="no loss"):
        method.project(broken)
    assert [module.training for module in network] == [True, False]


@methods
def test_references_are_taken_in_evaluation_mode(make) -> None:
    network, task = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), mlp()).double(), data()
    method = make(network, task)
    g = opposed(network, task)  # moves the running statistics, so before the reference
    r = gradient(network, task)
    if g @ r >= 0:
        for p in network.parameters():
            p.grad.neg_()
        g = -g
    assert method.project()
    close(flat(network), every_active_set(r[None], g, 0.5 if isinstance(method, GEM) else 0.0))


def test_recurrent_layers_are_in_evaluation_mode_too() -> None:
    """Only cuDNN's backward pass needs another; ones of a user's own may do anything in training mode."""
    network = nn.Sequential(nn.GRU(3, 4), nn.LSTM(3, 4, num_layers=2, dropout=0.5), nn.Linear(3, 4)).double()
    seen = []
    task = data()
    agem = AGEM(network, Kept(*task))
    network.forward = network[2].forward
    opposed(network[2], task)
    agem.project(lambda *pair: seen.extend(module.training for module in network) or cross_entropy(*pair))
    assert seen == [False, False, False]


# What is kept


def test_all_are_kept_if_few_and_a_sample_if_many() -> None:
    network = nn.Linear(1, 1)
    gem = GEM(network, examples=5)
    gem.consolidate((torch.arange(3.0)[:, None], torch.arange(3)))
    gem.consolidate((torch.arange(100.0)[:, None], torch.arange(100)))
    assert gem.starts.tolist() == [0, 3]
    assert gem.labels[:3].tolist() == [0, 1, 2]
    drawn = gem.labels[3:].tolist()
    assert len(set(drawn)) == 5
    assert drawn == sorted(drawn) != [0, 1, 2, 3, 4]
    assert torch.equal(gem.inputs[:, 0], gem.labels.float())


def test_every_row_has_the_same_chance() -> None:
    counts = torch.zeros(8)
    gem = GEM(nn.Linear(1, 1), examples=2)
    for _ in range(2000):
        gem.consolidate([(torch.zeros(4, 1), torch.arange(4)), (torch.zeros(4, 1), torch.arange(4, 8))])
    counts = gem.labels.bincount(minlength=8).double()
    assert ((counts - 500).abs() < 5 * 500**0.5).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_same_rows_in_every_form(sizes: list[int]) -> None:
    inputs, labels = torch.arange(float(sum(sizes))), torch.arange(sum(sizes))
    whole, parts = (GEM(nn.Linear(1, 1), examples=7) for _ in range(2))
    whole.consolidate((inputs, labels))
    parts.consolidate(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    assert torch.equal(whole.labels, parts.labels)
    assert torch.equal(whole.inputs, parts.inputs)


def test_more_rows_than_one_batch() -> None:
    gem = GEM(nn.Linear(1, 1), examples=1500)
    gem.consolidate((torch.zeros(1500, 1), torch.arange(1500)))
    assert torch.equal(gem.labels, torch.arange(1500))


def test_generator_decides_and_the_global_one_is_not_used(rng_untouched) -> None:
    task = (torch.zeros(1000, 1), torch.arange(1000))
    network = nn.Linear(1, 1)
    with rng_untouched():
        first, same = (remembering(GEM(network, examples=20), task) for _ in range(2))
        seeded = remembering(GEM(network, examples=20, generator=torch.Generator().manual_seed(1)), task)
    assert torch.equal(first.labels, same.labels)
    assert not torch.equal(first.labels, seeded.labels)


def test_what_is_kept_is_a_copy() -> None:
    inputs, labels = data(3)
    gem = remembering(GEM(nn.Linear(3, 4).double()), (inputs.requires_grad_(), labels))
    kept = inputs.detach().clone()
    with torch.no_grad():
        inputs.zero_()
    assert torch.equal(gem.inputs, kept)
    assert not gem.inputs.requires_grad


# State


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_loading_undoes_saving(dtype: torch.dtype) -> None:
    network = nn.Linear(6, 2)
    gem, fresh = (GEM(network, examples=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    tasks = [(torch.randint(9, (9, 2, 3)).to(dtype), torch.randint(2, (9, 1))) for _ in range(3)]
    remembering(gem, *tasks[:2])
    fresh.load_state_dict(gem.state_dict())
    remembering(gem, tasks[2])
    remembering(fresh, tasks[2])
    for name, value in gem.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert fresh.inputs.dtype is dtype


def test_loading_inside_another_module_and_over_other_tasks() -> None:
    gem, other = (GEM(mlp()) for _ in range(2))
    remembering(gem, data(2), data(3))
    remembering(other, data(9, size=5))
    nn.ModuleDict({"gem": other}).load_state_dict(nn.ModuleDict({"gem": gem}).state_dict())
    assert other.starts.tolist() == [0, 2]
    assert torch.equal(other.inputs, gem.inputs)
    other.load_state_dict(GEM(mlp()).state_dict())
    assert len(other.starts) == len(other.inputs) == 0
    with pytest.raises(RuntimeError, match=r'Missing key.*"inputs"'):
        other.load_state_dict({})


def test_network_and_buffer_are_not_in_the_state() -> None:
    network = mlp()
    gem, agem = remembering(GEM(network), data()), AGEM(network, Kept(*data()))
    assert set(gem.state_dict()) == {"inputs", "labels", "starts", "_extra_state"}
    assert all(isinstance(value, Tensor) for value in gem.state_dict().values())
    assert not agem.state_dict()
    for method in (gem, agem):
        assert not list(method.parameters())
        assert not list(method.children())


def test_deep_copies_are_independent() -> None:
    gem = remembering(GEM(mlp(), examples=2), data())
    twin = copy.deepcopy(gem)
    twin.load_state_dict(remembering(GEM(mlp()), data(), data()).state_dict())
    assert (len(gem.starts), len(twin.starts)) == (1, 2)


def test_agem_consolidate_does_nothing() -> None:
    assert AGEM(mlp(), Empty()).consolidate(data()) is None


# Training


@methods
@pytest.mark.usefixtures("untyped")
def test_training_on_a_conflicting_task_does_not_raise_the_loss_of_the_first(make) -> None:
    inputs, labels = data(32)
    network = mlp()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (100 * cross_entropy(network(inputs), labels)).backward()
        optimizer.step()
    method, changed, worst = make(network, (inputs, labels)), 0, 0.0
    shifted = (labels + 1) % 4

    def of(wanted: Tensor) -> float:
        return cross_entropy(network(inputs), wanted).item()

    new = of(shifted)
    for _ in range(60):
        old = of(labels)
        optimizer.zero_grad()
        cross_entropy(network(inputs), shifted).backward()
        gain = 1e-3 * flat(network).square().sum().item()  # of this step, unprojected, on the new task
        changed += method.project()
        optimizer.step()
        worst = max(worst, (of(labels) - old) / gain)
    assert changed == 60
    assert worst < 1e-2  # only the second order is left
    assert of(shifted) < new or isinstance(method, GEM)


# Errors


def raises(error: type[Exception], text: str):
    return pytest.raises(error, match=re.escape(text))


def test_settings_are_checked() -> None:
    frozen = mlp().requires_grad_(False)
    for examples in (0, -1, True):
        with raises(SettingError, f"examples must be a whole number above 0, got {examples!r}."):
            GEM(mlp(), examples=examples)
        with raises(SettingError, f"examples must be a whole number above 0, got {examples!r}."):
            AGEM(mlp(), Empty(), examples=examples)
    with raises(SettingError, "margin must be a finite number of at least 0, got -0.1."):
        GEM(mlp(), margin=-0.1)
    with raises(SettingError, "the network has no trainable parameters, so no gradient to project: unfreeze some."):
        GEM(frozen)
    with raises(SettingError, "the network has no trainable parameters"):
        AGEM(frozen, Empty())


@pytest.mark.usefixtures("untyped")
def test_settings_of_another_type_are_refused() -> None:
    with raises(SettingError, "network must be a torch.nn.Module, got 3."):
        GEM(3)
    with raises(SettingError, "buffer must be a replay buffer, with sample(count) and len(), got []."):
        AGEM(mlp(), [])
    with raises(SettingError, "generator must be a torch.Generator or None, got 3."):
        GEM(mlp(), generator=3)


@methods
def test_project_before_backward_and_of_a_frozen_network(make) -> None:
    network = mlp()
    method = make(network, data())
    with raises(SettingError, "call project() after loss.backward() and before optimizer.step()"):
        method.project()
    network.requires_grad_(False)
    with raises(SettingError, "no trainable parameters"):
        method.project()


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_must_be_finite(make, bad: float) -> None:
    network, task = mlp(), data()
    method = make(network, task)
    before = opposed(network, task)
    with raises(NonFiniteError, "the gradient of the stored examples' loss holds NaN or infinity. Do not take this"):
        method.project(lambda outputs, labels: outputs.sum() * bad)
    assert torch.equal(flat(network), before)
    network[0].bias.grad[0] = bad
    kept = flat(network)
    with raises(NonFiniteError, "the gradient of the present loss holds NaN or infinity"):
        method.project()
    assert torch.equal(flat(network).nan_to_num(), kept.nan_to_num())


def test_half_precision_that_overflows_is_refused() -> None:
    network, row = nn.Linear(2, 1, bias=False).half(), torch.ones(2, 2).half()
    network.weight.grad = torch.tensor([[6e4, -6.4e4]]).half()
    gem = remembering(GEM(network, margin=9.0), (row, row))
    with raises(NonFiniteError, "the projected gradient does not fit torch.float16"):
        gem.project(lambda outputs, labels: 3e4 * outputs.mean())
    assert network.weight.grad.isfinite().all()


def test_sparse_and_complex_gradients_are_refused() -> None:
    network = nn.Embedding(3, 2, sparse=True)
    task = (torch.tensor([0, 1]), torch.tensor([0, 1]))
    cross_entropy(network(task[0]), task[1]).backward()
    with raises(DtypeError, "gradients must be dense and real, got a sparse or complex one: try sparse=False."):
        AGEM(network, Kept(*task)).project()
    layer = nn.Linear(2, 2, dtype=torch.complex64)
    layer.weight.grad = torch.ones_like(layer.weight)
    inputs = torch.ones(2, 2, dtype=torch.complex64)
    with raises(DtypeError, "dense and real"):
        AGEM(layer, Kept(inputs, inputs)).project(lambda outputs, labels: outputs.abs().sum())


@pytest.mark.parametrize(
    ("second", "error", "text"),
    [
        (
            (torch.zeros(2, 4), torch.zeros(2)),
            ShapeError,
            "inputs must have shape ('n', 3) as those before, got (2, 4): reshape them.",
        ),
        ((torch.zeros(2, 3), torch.zeros(2, 1)), ShapeError, "labels must have shape ('n',) as those before"),
        (
            (torch.zeros(2, 3, dtype=DOUBLE), torch.zeros(2)),
            DtypeError,
            "inputs must be torch.float32 as those before, got torch.float64: convert them.",
        ),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), DtypeError, "labels must be torch.float32"),
        (torch.zeros(2, 3), SettingError, "GEM needs examples with labels"),
        ([], SettingError, "there are no examples"),
    ],
)
def test_another_form_changes_nothing(second, error: type[Exception], text: str) -> None:
    gem = remembering(GEM(nn.Linear(3, 2), examples=2), (torch.ones(5, 3), torch.ones(5)))
    before = copy.deepcopy(gem.state_dict())
    with raises(error, text):
        gem.consolidate(second)
    if second != [] and not isinstance(second, Tensor):
        with raises(error, text):
            gem.consolidate([(torch.zeros(4, 3), torch.zeros(4)), second])
        with raises(error, text):
            GEM(nn.Linear(3, 2)).consolidate([(torch.zeros(4, 3), torch.zeros(4)), second])
    assert all(torch.equal(value, before[name]) for name, value in gem.state_dict().items())
