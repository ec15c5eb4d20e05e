"""The dictionary's gradients are those of its formula, and its writes are those of a literal dictionary."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.functional import mse_loss, nll_loss, one_hot

from recollect import (
    Categorical,
    EpisodicMemory,
    Gaussian,
    LocalAdaptation,
    MbPA,
    NeuralDictionary,
    NonParametric,
    dot_product,
    gaussian,
    inverse_distance,
    load,
    rules,
    save,
)
from recollect.errors import DtypeError, EmptyMemoryError, NonFiniteError, SettingError, ShapeError
from recollect.kernels import Kernel
from recollect.memory import Context, Memory, Static

LABEL = torch.tensor([0])


def random_dictionary(count: int = 12, capacity: int = 15, **settings) -> NeuralDictionary:
    g = torch.Generator().manual_seed(0)
    dictionary = NeuralDictionary(capacity, 3, value_shape=(2,), **settings)
    dtype, values = dictionary.keys.dtype, dictionary.values.dtype
    dictionary.write(torch.randn(count, 3, generator=g, dtype=dtype), torch.randn(count, 2, generator=g, dtype=values))
    return dictionary


def random_queries(*batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*batch, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)


def double() -> NeuralDictionary:
    return random_dictionary(value_dtype=torch.float64, key_dtype=torch.float64)


def same(a: Context, b: Context) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def written_out(keys: Tensor, values: Tensor, query: Tensor, neighbors: int, delta: float) -> Tensor:
    """Eq. (1), (2) and (5) of Neural Episodic Control for one query, with one loop over the entries."""
    distances = [sum((h - q) ** 2 for h, q in zip(key, query, strict=True)) for key in keys]
    nearest = sorted(range(len(keys)), key=lambda i: distances[i].item())[:neighbors]
    kernels = [1 / (distances[i] + delta) for i in nearest]
    return torch.stack([k / sum(kernels) * values[i] for k, i in zip(kernels, nearest, strict=True)]).sum(0)


# Gradients


@pytest.mark.parametrize("neighbors", [1, 4, 12, 40, None])
def test_gradients_are_those_of_the_formula(neighbors: int | None) -> None:
    dictionary, targets = double(), torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    queries = random_queries(5, dtype=torch.float64).requires_grad_()
    outputs = NonParametric(dictionary, neighbors=neighbors, likelihood=Gaussian())(queries)
    mse_loss(outputs, targets).backward()
    keys, values, again = (
        tensor.detach().clone().requires_grad_() for tensor in (dictionary.keys, dictionary.values, queries)
    )
    expected = torch.stack([written_out(keys[:12], values[:12], query, neighbors or 12, 1e-3) for query in again])
    mse_loss(expected, targets).backward()
    assert torch.allclose(outputs, expected, rtol=1e-12)
    for found, wanted in ((dictionary.keys, keys), (dictionary.values, values), (queries, again)):
        assert found.grad is not None
        assert wanted.grad is not None
        assert bool((wanted.grad != 0).any()) or (neighbors == 1 and found is not dictionary.values)
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kernel", [inverse_distance(1e-3), gaussian(0.7), dot_product(0.5)])
def test_gradients_pass_gradcheck(kernel: Kernel) -> None:
    dictionary, queries = double(), random_queries(2, 2, dtype=torch.float64).requires_grad_()

    def read(keys: Tensor, values: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
        context = torch.func.functional_call(dictionary, {"keys": keys, "values": values}, (queries, kernel))
        return context.keys, context.values, context.weights, context.distances

    dictionary.forward = lambda queries, kernel: dictionary.read(queries, 3, kernel=kernel)
    assert torch.autograd.gradcheck(read, (dictionary.keys, dictionary.values, queries))


def test_labels_train_keys_and_queries() -> None:
    dictionary = NeuralDictionary(6, 3, value_dtype=torch.long, key_dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    dictionary.write(random_queries(5, dtype=torch.float64), labels)
    assert [name for name, _ in dictionary.named_parameters()] == ["keys"]
    queries = (random_queries(4, dtype=torch.float64) + 0.1).requires_grad_()
    asked = torch.tensor([1, 2, 0, 1])
    predictions = NonParametric(dictionary, classes=3, neighbors=5)(queries)
    nll_loss(predictions, asked).backward()
    keys, again = (tensor.detach().clone().requires_grad_() for tensor in (dictionary.keys, queries))
    rows = one_hot(labels, 3).double()
    votes = torch.stack([written_out(keys[:5], rows, query, 5, 1e-3) for query in again])
    nll_loss(votes.log(), asked).backward()
    assert torch.allclose(predictions, votes.log(), rtol=1e-12)
    for found, wanted in ((dictionary.keys, keys), (queries, again)):
        assert found.grad is not None
        assert wanted.grad is not None
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-10)


def test_a_loss_trains_embedding_keys_and_values() -> None:
    dictionary, embedding = random_dictionary(), nn.Linear(5, 3)
    model = nn.Sequential(embedding, NonParametric(dictionary, neighbors=4, likelihood=Gaussian()))
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "1.memory.keys", "1.memory.values"}
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    inputs, targets = torch.randn(8, 5), torch.randn(8, 2)
    losses = []
    for _ in range(60):
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_no_gradient_where_none_is_recorded() -> None:
    dictionary, queries = random_dictionary(), random_queries(3).requires_grad_()
    predictor = NonParametric(dictionary, neighbors=4, likelihood=Gaussian())
    expected = predictor(queries)
    assert expected.requires_grad
    with torch.no_grad():
        quiet = predictor(queries)
    with torch.inference_mode():
        inferred = predictor(queries)
    assert not quiet.requires_grad
    assert not inferred.requires_grad
    assert torch.equal(quiet, expected)
    assert torch.equal(inferred, expected)
    products = dictionary.read(queries, 4, kernel=dot_product())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictor(queries), expected)
        assert same(dictionary.read(queries, 4, kernel=dot_product()), products)
    assert torch.allclose(products.weights, (products.keys @ queries.unsqueeze(-1)).squeeze(-1).softmax(-1), rtol=1e-6)
    assert NonParametric(Static(dictionary), neighbors=4, likelihood=Gaussian())(queries).requires_grad
    memory = EpisodicMemory(15, 3, value_shape=(2,), value_dtype=torch.float32)
    memory.write(dictionary.keys[:12], dictionary.values[:12].detach())
    assert not NonParametric(memory, neighbors=4, likelihood=Gaussian())(queries).requires_grad


def test_a_row_without_neighbors_has_no_gradient() -> None:
    dictionary, queries = double(), random_queries(3, dtype=torch.float64).requires_grad_()
    context = dictionary.read(queries, 4, before=torch.tensor([0, 2, 12]))
    assert (context.slots[0] == -1).all()
    assert (context.weights[0] == 0).all()
    (context.weights.unsqueeze(-1) * context.values).sum().backward()
    assert queries.grad is not None
    assert queries.grad[0].eq(0).all()
    assert queries.grad[1:].isfinite().all()
    assert queries.grad[2].ne(0).any()
    assert dictionary.keys.grad is not None
    assert dictionary.keys.grad.isfinite().all()


def test_a_write_between_forward_and_backward_changes_no_gradient() -> None:
    found = []
    for writes in (False, True):
        dictionary, queries = double(), random_queries(3, dtype=torch.float64).requires_grad_()
        loss = NonParametric(dictionary, neighbors=4, likelihood=Gaussian())(queries).square().sum()
        if writes:
            dictionary.write(random_queries(9, dtype=torch.float64), torch.ones(9, 2, dtype=torch.float64))
        loss.backward()
        found.append((queries.grad, dictionary.keys.grad, dictionary.values.grad))
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


# Reads


@pytest.mark.parametrize("neighbors", [1, 5, 30, None])
@pytest.mark.parametrize("before", [None, 7, 0])
def test_reads_what_an_episodic_memory_reads(neighbors: int | None, before: int | None) -> None:
    dictionary, queries = random_dictionary(), random_queries(2, 4)
    memory = EpisodicMemory(15, 3, value_shape=(2,), value_dtype=torch.float32)
    memory.write(dictionary.keys[:12], dictionary.values[:12].detach())
    for tensor in (dictionary, memory):
        tensor.forget(torch.tensor([4, 6]))
    found, wanted = (m.read(queries, neighbors, before=before) for m in (dictionary, memory))
    assert torch.equal(found.slots, wanted.slots)
    assert torch.allclose(found.distances, wanted.distances, atol=1e-6)
    assert torch.allclose(found.weights, wanted.weights, atol=1e-6)
    assert torch.equal(found.values, wanted.values)
    seen = found.slots >= 0
    assert torch.equal(found.keys[seen], wanted.keys[seen])


@pytest.mark.parametrize("neighbors", [1, 3, None])
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3)])
def test_shapes_of_a_read(batch: tuple[int, ...], neighbors: int | None) -> None:
    for count in (0, 1, 4):
        context = random_dictionary(count).read(random_queries(*batch), neighbors)
        k = count if neighbors is None else min(neighbors, count)
        assert context.keys.shape == (*batch, k, 3)
        assert context.values.shape == (*batch, k, 2)
        assert context.weights.shape == context.distances.shape == context.slots.shape == (*batch, k)


def test_a_batch_reads_what_its_rows_read() -> None:
    dictionary, queries = random_dictionary(), random_queries(6)
    whole = dictionary.read(queries, 5)
    rows = [dictionary.read(query, 5) for query in queries]
    assert same(whole, Context(*(torch.stack(parts) for parts in zip(*rows, strict=True))))


def test_empty() -> None:
    dictionary = NeuralDictionary(3, 2, value_shape=(2,))
    assert dictionary
    assert len(dictionary) == 0
    assert isinstance(dictionary, Memory)
    with pytest.raises(EmptyMemoryError, match="no neighbors"):
        NonParametric(dictionary, neighbors=2, likelihood=Gaussian())(torch.zeros(2))
    labels = NeuralDictionary(3, 2, value_dtype=torch.long)
    uniform = NonParametric(labels, classes=4, neighbors=2)(torch.zeros(1, 2, requires_grad=True))
    assert torch.allclose(uniform.exp(), torch.full((1, 4), 0.25))
    labels.touch(labels.read(torch.zeros(2), 2).slots)
    assert len(labels.write(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))) == 0


def test_a_read_changes_nothing_and_draws_nothing(rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    dictionary = random_dictionary()
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    with rng_untouched():
        dictionary.read(random_queries(4), 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dictionary.state_dict().items())


@pytest.mark.parametrize("way", ["sgd", "fused", "data", "copied", "loaded", "assigned", "moved"])
def test_the_search_follows_whatever_changes_the_keys(way: str, tmp_path: Path) -> None:
    dictionary, query = random_dictionary(200, 220), torch.tensor([5.0, 5.0, 5.0])  # more than a search takes anew
    assert int(dictionary.read(query, 1).slots) != 7
    goal = dictionary.keys.detach().clone()
    goal[7] = query
    if way in ("sgd", "fused"):
        dictionary.keys.grad = dictionary.keys.detach() - goal
        torch.optim.SGD([dictionary.keys], lr=1.0, fused=way == "fused").step()
    elif way == "data":
        dictionary.keys.data.copy_(goal)
    elif way == "copied":
        dictionary = copy.deepcopy(dictionary)
        with torch.no_grad():
            dictionary.keys[7] = query
    elif way == "moved":
        dictionary.keys.data.copy_(goal)
        dictionary.double()
    else:
        state = dictionary.state_dict() | {"keys": goal}
        dictionary.load_state_dict(state, assign=way == "assigned")
    context = dictionary.read(query.to(dictionary.keys.dtype), 1)
    assert int(context.slots) == 7
    assert context.distances.item() < 1e-10


def test_the_search_follows_a_state_with_fewer_entries() -> None:
    dictionary, other = random_dictionary(200, 220), NeuralDictionary(220, 3, value_shape=(2,))
    other.write(torch.full((1, 3), 9.0), torch.ones(1, 2))
    with torch.no_grad():
        other.keys[1:] = dictionary.keys[1:]  # what lies in empty slots counts for nothing
    dictionary.load_state_dict(other.state_dict())
    assert dictionary.read(torch.zeros(3), 2).slots.tolist() == [0]


# Writes


class Literal:
    """The dictionary as Python has it: the first entry is the one that was used least recently."""

    def __init__(self, capacity: int, rate: float) -> None:
        self.capacity, self.rate = capacity, rate
        self.entries: OrderedDict[tuple[float, ...], float] = OrderedDict()
        self.written: dict[tuple[float, ...], int] = {}
        self.step = 0

    def write(self, key: tuple[float, ...], target: float) -> None:
        if key in self.entries:
            self.entries[key] += self.rate * (target - self.entries[key])
        else:
            if len(self.entries) == self.capacity:
                self.forget(next(iter(self.entries)))
            self.entries[key], self.written[key] = target, self.step
        self.entries.move_to_end(key)
        self.step += 1

    def forget(self, key: tuple[float, ...]) -> None:
        del self.entries[key], self.written[key]

    def neighbors(self, query: float, count: int) -> list[tuple[float, ...]]:
        return sorted(self.entries, key=lambda key: ((key[0] - query) ** 2, self.written[key]))[:count]

    def touch(self, keys: list[tuple[float, ...]]) -> None:
        for key in reversed(keys):
            self.entries.move_to_end(key)


numbers = st.integers(0, 9)
operations = st.one_of(
    st.tuples(st.just("write"), st.lists(numbers, min_size=1, max_size=12)),
    st.tuples(st.just("touch"), st.lists(numbers, min_size=1, max_size=4)),
    st.tuples(st.just("forget"), st.lists(numbers, max_size=3)),
    st.tuples(st.just("clear"), st.just([0])),
)


@given(st.integers(1, 6), st.sampled_from([0.0, 0.25, 1.0]), st.lists(operations, max_size=12))
def test_writes_are_those_of_a_literal_dictionary(
    capacity: int, rate: float, history: list[tuple[str, list[int]]]
) -> None:
    dictionary = NeuralDictionary(capacity, 1, value_shape=(1,), value_dtype=torch.float64, rate=rate)
    literal = Literal(capacity, rate)
    for operation, some in history:
        column = torch.tensor(some, dtype=torch.float32).unsqueeze(1)
        if operation == "write":
            targets = [float(literal.step + 2 * row) for row in range(len(some))]
            slots = dictionary.write(column, torch.tensor(targets, dtype=torch.float64).unsqueeze(1))
            for number, target in zip(some, targets, strict=True):
                literal.write((float(number),), target)
            kept = [(float(number),) in literal.entries for number in some]
            assert (slots >= 0).tolist() == kept
            assert dictionary.keys[slots[slots >= 0]].flatten().tolist() == [
                n for n, k in zip(some, kept, strict=True) if k
            ]
        elif operation == "touch":
            dictionary.touch(dictionary.read(column, 2).slots)
            for nearest in [literal.neighbors(number, 2) for number in some]:
                literal.touch(nearest)
        elif operation == "forget":
            gone = [
                slot for slot in range(capacity) if dictionary.written[slot] >= 0 and dictionary.keys[slot] in column
            ]
            dictionary.forget(torch.tensor(gone, dtype=torch.long))
            for key in {(float(number),) for number in some} & literal.entries.keys():
                literal.forget(key)
        else:
            dictionary.clear()
            literal = Literal(capacity, rate)
        there = [slot for slot in dictionary.used.argsort().tolist() if dictionary.written[slot] >= 0]
        assert len(dictionary) == len(literal.entries)
        assert dictionary.keys[there].flatten().tolist() == [key[0] for key in literal.entries]
        assert dictionary.values[there].flatten().tolist() == list(literal.entries.values())
        assert dictionary.written[there].tolist() == [literal.written[key] for key in literal.entries]
        assert int(dictionary.step) == literal.step


@given(st.lists(st.integers(0, 5), min_size=1, max_size=15), st.integers(1, 5))
def test_a_batch_writes_what_its_rows_write(numbers: list[int], capacity: int) -> None:
    one, other = (NeuralDictionary(capacity, 1, value_shape=(1,), rate=0.3) for _ in range(2))
    keys, values = torch.tensor(numbers).float().unsqueeze(1), torch.arange(len(numbers)).float().sin().unsqueeze(1)
    one.write(keys, values)
    for key, value in zip(keys, values, strict=True):
        other.write(key, value)
    state, wanted = one.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_tabular_update() -> None:
    dictionary = NeuralDictionary(4, 2, value_shape=(2,), rate=0.1)
    key = torch.tensor([[1.0, 2.0]])
    first = dictionary.write(key, torch.tensor([[10.0, 0.0]]))
    again = dictionary.write(key, torch.tensor([[20.0, 1.0]]))
    other = dictionary.write(key + 1e-6, torch.tensor([[5.0, 5.0]]))
    assert first.tolist() == again.tolist() == [0]
    assert other.tolist() == [1]
    assert torch.allclose(dictionary.values[:2], torch.tensor([[11.0, 0.1], [5.0, 5.0]]))


def test_a_known_label_is_replaced() -> None:
    dictionary = NeuralDictionary(4, 2, value_dtype=torch.long)
    dictionary.write(torch.zeros(1, 2), torch.tensor([3]))
    dictionary.write(torch.tensor([[-0.0, 0.0], [-0.0, -0.0]]), torch.tensor([7, 8]))  # equal, by whatever sign of 0
    assert len(dictionary) == 1
    assert int(dictionary.values[0]) == 8


def test_keys_too_close_for_a_distance_are_told_apart() -> None:
    dictionary = NeuralDictionary(4, 1, value_dtype=torch.long)
    tiny = torch.tensor([[0.0], [1e-30], [2e-30]])
    assert dictionary.write(tiny, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert dictionary.write(tiny.flip(0), torch.tensor([5, 4, 3])).tolist() == [2, 1, 0]
    assert dictionary.values.tolist() == [3, 4, 5, 0]
    with torch.no_grad():
        dictionary.keys[1:3] = 1e-30  # training has made two keys equal: the older counts
    assert dictionary.write(torch.tensor([[1e-30]]), torch.tensor([9])).tolist() == [1]


def test_the_least_recently_read_is_overwritten() -> None:
    dictionary = NeuralDictionary(3, 1, value_dtype=torch.long)
    dictionary.write(torch.tensor([[0.0], [1.0], [2.0]]), torch.arange(3))
    dictionary.read(torch.tensor([0.0]), 1)  # by itself no use
    dictionary.touch(dictionary.read(torch.tensor([[1.1], [0.1]]), 1).slots)
    assert dictionary.write(torch.tensor([[5.0]]), LABEL).tolist() == [2]
    dictionary.touch(dictionary.read(torch.tensor([0.9]), 2).slots)  # of one read, the farther (0) goes first
    assert dictionary.write(torch.tensor([[6.0]]), LABEL).tolist() == [2]
    assert dictionary.write(torch.tensor([[7.0]]), LABEL).tolist() == [0]


def test_an_optimizer_without_momentum_moves_no_row_that_was_not_read() -> None:
    dictionary = random_dictionary()
    optimizer = torch.optim.RMSprop(dictionary.parameters(), lr=0.1)
    for _ in range(3):
        before = dictionary.keys.detach().clone()
        context = dictionary.read(random_queries(1), 3)
        optimizer.zero_grad()
        (context.weights.unsqueeze(-1) * context.values).sum().backward()
        optimizer.step()
        moved = (dictionary.keys != before).any(1).nonzero().squeeze(1)
        assert set(moved.tolist()) <= set(context.slots.flatten().tolist())
        dictionary.write(torch.full((1, 3), 9.0), torch.zeros(1, 2))


# State and errors


@pytest.mark.parametrize("settings", [{}, {"rate": 0.7, "key_dtype": torch.float64}, {"key_dtype": torch.bfloat16}])
def test_state_and_folder_are_complete(settings: dict, tmp_path: Path) -> None:
    dictionary = random_dictionary(20, **settings)
    queries = random_queries(4, dtype=dictionary.keys.dtype)
    dictionary.touch(dictionary.read(queries, 3).slots)
    dictionary.forget(3)
    model = NonParametric(dictionary, neighbors=4, likelihood=Gaussian())
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    other = NeuralDictionary(15, 3, value_shape=(2,), **settings)
    other.load_state_dict(dictionary.state_dict())
    assert isinstance(loaded, NonParametric)
    assert isinstance(loaded.memory, NeuralDictionary)
    assert {name for name, _ in loaded.named_parameters()} == {"memory.keys", "memory.values"}
    for twin in (loaded.memory, other):
        assert twin.rate == dictionary.rate
        assert same(twin.read(queries, 5), dictionary.read(queries, 5))
    writes = random_queries(6, dtype=dictionary.keys.dtype).flip(0), torch.ones(6, 2)
    slots = dictionary.write(*writes)
    for twin in (loaded.memory, other):
        assert torch.equal(twin.write(*writes), slots)
        state, wanted = twin.state_dict(), dictionary.state_dict()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_mbpa_reads_a_dictionary() -> None:
    dictionary, head = NeuralDictionary(10, 3, value_dtype=torch.long), nn.Linear(3, 4)
    memory = EpisodicMemory(10, 3)
    adaptation = LocalAdaptation(rules.sgd(0.5), steps=3)
    for each in (dictionary, memory):
        each.write(random_queries(8), torch.arange(8) % 4)
    found, wanted = (MbPA(head, m, neighbors=4, adaptation=adaptation)(random_queries(5)) for m in (dictionary, memory))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not found.requires_grad


@pytest.mark.usefixtures("untyped")
def test_refuses_what_it_cannot_use() -> None:
    for settings in ({"capacity": 0}, {"key_size": 2.0}, {"rate": -0.1}, {"rate": 1.5}, {"rate": float("nan")}):
        with pytest.raises(SettingError):
            NeuralDictionary(**({"capacity": 3, "key_size": 2} | settings))
    for settings, message in (
        ({"value_shape": 3}, r"value_shape must be a tuple, such as \(3,\) .*got 3"),
        ({"value_shape": (-1,)}, "each of value_shape must be a whole number of at least 0, got -1"),
        ({"value_dtype": "float"}, r"value_dtype must be a dtype, such as torch\.long, got 'float'"),
    ):
        with pytest.raises(SettingError, match=message):
            NeuralDictionary(3, 2, **settings)
    with pytest.raises(DtypeError, match="uint8"):
        NeuralDictionary(3, 2, key_dtype=torch.uint8)
    dictionary = random_dictionary()
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    with pytest.raises(NonFiniteError, match="row 1 holds NaN"):
        dictionary.write(torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), torch.zeros(2, 2))
    with pytest.raises(NonFiniteError, match="values must be finite"):
        dictionary.write(torch.zeros(1, 3), torch.tensor([[torch.inf, 0]]))
    with pytest.raises(ShapeError, match=r"keys must have shape \(\*, 3\)"):
        dictionary.write(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ShapeError, match="values must have shape"):
        dictionary.write(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(NonFiniteError, match="queries"):
        dictionary.read(torch.full((3,), torch.nan), 2)
    with pytest.raises(SettingError, match="neighbors"):
        dictionary.read(torch.zeros(3), 0)
    with pytest.raises(SettingError, match="kernel"):
        dictionary.read(torch.zeros(3), 1, kernel="near")
    for slots, error in ((torch.tensor([15]), SettingError), (torch.tensor(1), ShapeError), (1, DtypeError)):
        with pytest.raises(error):
            dictionary.touch(slots)
    with pytest.raises(SettingError, match="from 0 to 14"):
        dictionary.forget(15)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dictionary.state_dict().items())
    with pytest.raises(DtypeError, match="floating-point"):
        NonParametric(NeuralDictionary(3, 2, value_dtype=torch.long), neighbors=1, likelihood=Gaussian())(
            torch.zeros(2)
        )
    with pytest.raises(DtypeError, match="labels"):
        NonParametric(dictionary, classes=2, neighbors=1, likelihood=Categorical())(torch.zeros(3))


def test_says_that_training_has_spoiled_a_key() -> None:
    dictionary = random_dictionary()
    with torch.no_grad():
        dictionary.keys[5, 1] = torch.nan
    for use in (lambda: dictionary.read(torch.zeros(3), 2), lambda: dictionary.write(torch.zeros(3), torch.zeros(2))):
        with pytest.raises(NonFiniteError, match="slot 5 has become NaN"):
            use()
    loaded = random_dictionary()
    loaded.load_state_dict(dictionary.state_dict())
    converted = random_dictionary(value_dtype=torch.float64, key_dtype=torch.float64)
    with torch.no_grad():
        converted.keys[5, 1] = 1e30
    for spoiled in (loaded, converted.half()):
        with pytest.raises(NonFiniteError, match="slot 5 has become NaN"):
            spoiled.read(torch.zeros(3), 2)
