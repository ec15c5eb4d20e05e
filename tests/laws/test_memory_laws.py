"""Laws that hold for every memory, wherever its entries lie, and that need nothing but the ``Memory`` protocol.

A new kind of memory is one more line in ``MAKERS``. What a memory promises beyond the protocol is tested beside it.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import pytest
import torch
from torch import Tensor, nn

from recollect import (
    DurableMemory,
    EpisodicMemory,
    Gaussian,
    LocalAdaptation,
    MbPA,
    Mixture,
    NonParametric,
    Parametric,
    dot_product,
    gaussian,
    inverse_distance,
    neural_cache,
    rules,
)
from recollect.errors import DtypeError, NonFiniteError, RecollectError, SettingError, ShapeError
from recollect.kernels import Kernel
from recollect.memory import Context, Memory, Static

KEY, CLASSES, CAPACITY = 6, 4, 30
EVERYTHING = 10**6  # neighbors: more than any memory here holds


def make_episodic(folder: Path, capacity: int, key_size: int, **values) -> Memory:
    return EpisodicMemory(capacity, key_size, **values)


# Each makes an empty memory of float32 keys in a new folder of its own. ``values`` are the arguments value_shape and
# value_dtype; where they are left out, values are labels: shape (), dtype int64.
MAKERS: dict[str, Callable[..., Memory]] = {
    "episodic": make_episodic,
    "durable": DurableMemory,
}


@runtime_checkable
class Closable(Protocol):
    def close(self) -> None: ...


Make = Callable[..., Memory]


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes memories of one kind, as many as a test needs, and closes them when it is over."""
    made: list[Memory] = []

    def new(capacity: int = CAPACITY, key_size: int = KEY, **values) -> Memory:
        made.append(MAKERS[request.param](tmp_path / str(len(made)), capacity, key_size, **values))
        return made[-1]

    yield new
    for memory in made:
        if isinstance(memory, Closable):
            memory.close()


@pytest.fixture
def filled(make: Make) -> Callable[[int], tuple[Memory, EpisodicMemory]]:
    """Makes a memory, and one in RAM beside it, of so many random entries."""

    def new(count: int) -> tuple[Memory, EpisodicMemory]:
        memory, beside = make(), EpisodicMemory(CAPACITY, KEY)
        for each in (memory, beside):
            each.write(normal(count, KEY), labels(count))
        return memory, beside

    return new


class Entry(NamedTuple):
    """What the tests know of an entry that was written."""

    time: int
    key: tuple[float, ...]
    value: int


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int, seed: int = 1) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def whole(count: int, seed: int, size: int = 2) -> Tensor:
    """Keys of small whole numbers: many are equal, and many equally far from a query."""
    return torch.randint(-2, 3, (count, size), generator=torch.Generator().manual_seed(seed)).float()


def numbered(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Pairs that are all different: the t-th has the key (t, -t) and the value t + 100."""
    times = torch.arange(start, start + count)
    return torch.stack([times, -times], -1).float(), times + 100


def pairs(start: int, count: int) -> list[tuple[tuple[float, float], int]]:
    return [((float(time), float(-time)), time + 100) for time in range(start, start + count)]


def held(memory: Memory, before: int | None = None) -> set[tuple[tuple[float, float], int]]:
    """What is in a memory of numbered pairs, by all ways to read everything."""
    found = []
    for neighbors in (None, EVERYTHING):
        context = memory.read(torch.zeros(2), neighbors, before=before)
        seen = context.slots >= 0
        keys, values = context.keys[seen].tolist(), context.values[seen].tolist()
        assert len(set(context.slots[seen].tolist())) == len(keys)
        found.append({((key[0], key[1]), value) for key, value in zip(keys, values, strict=True)})
        assert len(found[-1]) == len(keys)
    assert found[0] == found[1]
    return found[0]


def same(a: Context, b: Context) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The ring


def test_it_is_a_memory(make: Make) -> None:
    memory = make(capacity=7)
    assert isinstance(memory, Memory)
    assert memory.capacity == 7
    assert bool(memory)  # though it is empty
    assert len(memory) == 0


@pytest.mark.parametrize("capacity", [1, 5, 8])
def test_the_ring_is_a_deque_with_maxlen(make: Make, capacity: int) -> None:
    memory, ring, step, dice = make(capacity, 2), deque(maxlen=capacity), 0, random.Random(capacity)
    for count in (3, 0, capacity, 1, capacity + 3, 1, 1, *(dice.randint(0, 2 * capacity) for _ in range(5))):
        keys, values = numbered(step, count)
        slots = memory.write(keys, values)
        ring.extend(pairs(step, count))
        step += count
        kept = min(count, capacity)
        assert slots.dtype == torch.long
        assert slots.shape == (kept,)
        assert held(memory) == set(ring)
        assert len(memory) == len(ring)
        if kept:  # the slots are those of the batch's last entries, in their order
            near = memory.read(keys[-kept:], 1)
            assert torch.equal(near.slots.squeeze(1), slots)
            assert torch.equal(near.values.squeeze(1), values[-kept:])


def test_a_batch_may_have_any_shape(make: Make) -> None:
    memory = make(8, 2)
    keys, values = numbered(0, 6)
    assert memory.write(keys.view(2, 3, 2), values.view(2, 3)).shape == (6,)
    assert memory.write(torch.tensor([6.0, -6.0]), torch.tensor(106)).shape == (1,)
    assert memory.write(torch.zeros(0, 3, 2), torch.zeros(0, 3, dtype=torch.long)).shape == (0,)
    assert held(memory) == set(pairs(0, 7))


@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_writes_and_deletions(make: Make, seed: int) -> None:
    """What was forgotten stays away; of the rest the last ``capacity`` writes are there, and nothing else but what
    the places of forgotten entries may have kept."""
    capacity, dice = 6, random.Random(seed)
    memory, written, step = make(capacity, 2), [], 0
    gone: set[tuple[tuple[float, float], int]] = set()
    for _ in range(15):
        operation = dice.choice(["write", "write", "forget", "clear"] if dice.random() < 0.3 else ["write", "forget"])
        if operation == "write":
            count = dice.randint(0, 8)
            memory.write(*numbered(step, count))
            written += pairs(step, count)
            step += count
        elif operation == "forget":
            context = memory.read(torch.zeros(2), EVERYTHING)
            chosen = [place for place in range(len(context.slots)) if dice.random() < 0.3]
            gone |= {pairs(value - 100, 1)[0] for value in context.values[chosen].tolist()}
            memory.forget(context.slots[chosen])
        else:
            memory.clear()
            written, gone = [], set()
        now = held(memory)
        assert now >= set(written[-capacity:]) - gone
        assert now <= set(written) - gone
        assert len(memory) == len(now) <= capacity


# Nearest neighbors


def expected(entries: list[Entry], query: Tensor, neighbors: int, before: int | None) -> list[tuple[float, int]]:
    """The nearest entries of one query as (squared distance in float64, write time), equally near ones by age."""
    seen = [entry for entry in entries if before is None or entry.time < before]
    keys = torch.tensor([entry.key for entry in seen], dtype=torch.float64).view(len(seen), len(query))
    distances = (keys - query.double()).square().sum(1).tolist()
    return sorted(zip(distances, (entry.time for entry in seen), strict=True))[:neighbors]


@pytest.mark.parametrize("data", ["random", "ties and duplicates"])
@pytest.mark.parametrize("written", [1, 20, CAPACITY, 3 * CAPACITY + 7])
def test_neighbors_are_the_nearest(make: Make, data: str, written: int) -> None:
    keys = normal(written, 2) if data == "random" else whole(written, seed=0)
    queries = normal(9, 2, seed=5) if data == "random" else whole(9, seed=5)
    memory = make(CAPACITY, 2)
    for part in torch.arange(written).split(11):
        memory.write(keys[part], part)  # the value is the write time
    alive = range(max(0, written - CAPACITY), written)
    entries = [Entry(time, tuple(keys[time].tolist()), time) for time in alive]
    for neighbors, before in ((1, None), (5, None), (EVERYTHING, None), (5, written - 3), (CAPACITY, written // 2)):
        context = memory.read(queries, neighbors, before=before)
        assert context.slots.shape == (9, min(neighbors, len(entries)))
        for row, query in enumerate(queries):
            nearest = expected(entries, query, neighbors, before)
            count = len(nearest)
            assert context.values[row, :count].tolist() == [time for _, time in nearest]
            found, there = context.distances[row, :count].double(), torch.tensor([d for d, _ in nearest]).double()
            torch.testing.assert_close(found, there, rtol=1e-5, atol=1e-9)
            assert torch.equal(context.keys[row, :count], keys[[time for _, time in nearest]])
            assert (context.slots[row, count:] == -1).all()
            assert (context.distances[row, count:] == torch.inf).all()
            assert context.weights[row, count:].count_nonzero() == 0
            assert context.values[row, count:].count_nonzero() == 0


def test_equal_keys_are_entries_of_their_own(make: Make) -> None:
    memory = make(5, 2)
    slots = memory.write(torch.ones(3, 2), torch.tensor([7, 7, 8]))
    assert len(memory) == 3
    context = memory.read(torch.ones(2), 3)
    assert torch.equal(context.slots, slots)  # the older first
    assert context.values.tolist() == [7, 7, 8]
    memory.forget(slots[0])
    assert memory.read(torch.ones(2), 3).values.tolist() == [7, 8]
    memory.write(torch.ones(3, 2), torch.tensor([9, 10, 11]))
    assert memory.read(torch.ones(2), 2).values.tolist() == [7, 8]


@pytest.mark.parametrize("kernel", [inverse_distance(0.5), gaussian(1.5), dot_product(0.3)], ids=str)
def test_weights_are_the_kernels(filled, kernel: Kernel) -> None:
    memory, beside = filled(40)
    queries = normal(9, KEY, seed=3)
    for before in (None, 25):
        context, there = (each.read(queries, 7, kernel=kernel, before=before) for each in (memory, beside))
        torch.testing.assert_close(context.weights, there.weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(context.values, there.values)


@pytest.mark.parametrize("neighbors", [1, 5, None])
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3), (2, 0)])
def test_shapes_of_a_read(make: Make, batch: tuple[int, ...], neighbors: int | None) -> None:
    memory = make(4, 2, value_shape=(3, 1), value_dtype=torch.float32)
    for count in (0, 1, 4):
        memory.clear()
        memory.write(normal(count, 2), normal(count, 3, 1))
        context = memory.read(normal(*batch, 2), neighbors)
        k = count if neighbors is None else min(count, neighbors)
        assert context.keys.shape == (*batch, k, 2)
        assert context.keys.dtype == torch.float32
        assert context.values.shape == (*batch, k, 3, 1)
        assert context.values.dtype == torch.float32
        assert context.weights.shape == context.distances.shape == context.slots.shape == (*batch, k)
        assert context.slots.dtype == torch.long
        if k:
            torch.testing.assert_close(context.weights.sum(-1), torch.ones(batch))


def test_values_come_back_as_they_were_written(make: Make) -> None:
    numbers = normal(8, 2, 3)
    numbers[0, 0] = torch.tensor([0.0, -0.0, 1e-45])
    memory = make(8, 2, value_shape=(2, 3), value_dtype=torch.float32)
    memory.write(normal(8, 2), numbers)
    assert torch.equal(memory.read(normal(8, 2), 1).values.squeeze(1), numbers)
    memory = make(8, 2)
    extreme = torch.tensor([2**62 + 1, -(2**63), 2**63 - 1, 0, -1, 1, 2, 3])
    memory.write(normal(8, 2), extreme)
    assert torch.equal(memory.read(normal(8, 2), 1).values.squeeze(1), extreme)


# Time


@pytest.mark.parametrize("written", [4, 10, 23])
def test_before_hides_what_came_later(make: Make, written: int) -> None:
    capacity = 10
    memory = make(capacity, 2)
    for time in range(written):
        memory.write(*numbered(time, 1))
    alive = range(max(0, written - capacity), written)
    for limit in (0, 1, written // 2, written - 1, written, 10**9):
        assert held(memory, limit) == {pair for time in alive if time < limit for pair in pairs(time, 1)}
    limits = torch.tensor([0, written, 3, 10**9])
    together = memory.read(torch.zeros(4, 2), 3, before=limits)
    for row, limit in enumerate(limits.tolist()):
        alone = memory.read(torch.zeros(1, 2), 3, before=limit)
        assert torch.equal(together.slots[row], alone.slots[0])
        assert torch.equal(together.weights[row], alone.weights[0])


def test_write_times_start_anew_after_clear(make: Make) -> None:
    memory = make(5, 2)
    memory.write(*numbered(0, 8))
    memory.clear()
    assert len(memory) == 0
    assert held(memory) == set()
    memory.write(*numbered(0, 3))
    assert held(memory, before=2) == set(pairs(0, 2))


# Forgetting


def test_a_forgotten_entry_is_gone(make: Make) -> None:
    memory = make(5, 2)
    slots = memory.write(*numbered(0, 5))
    memory.forget(int(slots[2]))
    memory.forget(torch.stack([slots[4], slots[4], torch.tensor(-1), slots[2]]).view(2, 2))  # twice, none, gone already
    assert held(memory) == set(pairs(0, 2) + pairs(3, 1))
    for neighbors in (1, 5, None):
        near = memory.read(torch.tensor([[2.0, -2.0], [0.0, 0.0], [4.0, -4.0]]), neighbors)
        assert not torch.isin(near.slots, slots[[2, 4]]).any()
    memory.forget(memory.read(torch.zeros(3, 2), 4, before=1).slots)  # what read returned, -1 for what is missing
    assert held(memory) == {*pairs(1, 1), *pairs(3, 1)}
    memory.forget(torch.tensor([], dtype=torch.long))
    memory.forget(slots)
    assert held(memory) == set()
    memory.write(*numbered(5, 2))
    assert held(memory) == set(pairs(5, 2))


# The predictors

ADAPTING: dict[str, Callable[[Memory], nn.Module]] = {
    "linear": lambda memory: mbpa(linear(), memory, rules.sgd(0.5)),
    "one step": lambda memory: mbpa(linear(), memory, rules.sgd(0.5), steps=1),
    "kept": lambda memory: mbpa(linear(), memory, rules.sgd(0.5), steps=1, keep_base=True),
    "mlp": lambda memory: mbpa(mlp(), memory, rules.sgd(0.2, momentum=0.5)),
    "dense": lambda memory: mbpa(linear(), memory, rules.adam(0.05, epsilon=1e-2)),
    "general": lambda memory: mbpa(mlp(), memory, rules.rmsprop(0.05, epsilon=1e-2)),
}
MODELS: dict[str, Callable[[Memory], nn.Module]] = ADAPTING | {
    "votes": lambda memory: NonParametric(memory, classes=CLASSES, neighbors=5),
    "attention": lambda memory: NonParametric(memory, classes=CLASSES, neighbors=None, kernel=gaussian(1.0)),
    "cache": lambda memory: neural_cache(memory, classes=CLASSES, flatness=0.5),
    "static": lambda memory: mbpa(linear(), Static(memory), rules.sgd(0.5)),
    "mixture": lambda memory: Mixture(
        Parametric(linear()),
        mbpa(linear(), memory, rules.sgd(0.5)),
        neural_cache(memory, classes=CLASSES),
        weights=(0.2, 0.5, 0.3),
    ),
}


def linear() -> nn.Linear:
    return nn.Linear(KEY, CLASSES)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(KEY, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def mbpa(head: nn.Module, memory: Memory, rule: rules.Rule, **settings) -> MbPA:
    adaptation = LocalAdaptation(rule, **{"steps": 3, "prior": 0.1, **settings})
    return MbPA(head, memory, neighbors=5, adaptation=adaptation)


def model(kind: str, memory: Memory) -> nn.Module:
    """Makes a model: two of a kind have the same parameters."""
    torch.manual_seed(1)
    return MODELS[kind](memory)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("count", [0, 3, 20, 47])
def test_predictors_say_what_they_say_over_ram(filled, kind: str, count: int) -> None:
    memory, beside = filled(count)
    one, other = model(kind, memory), model(kind, beside)
    keys = normal(9, KEY, seed=3)
    limits = torch.arange(9) * count // 8
    for before in (None, 3, limits):
        torch.testing.assert_close(one(keys, before=before), other(keys, before=before), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one(keys.view(3, 3, KEY)), other(keys).view(3, 3, CLASSES), rtol=1e-5, atol=1e-5)
    for each in (memory, beside):  # and they see what is written after they were made
        each.write(3 * normal(4, KEY, seed=8), labels(4, seed=9))
    torch.testing.assert_close(one(keys), other(keys), rtol=1e-5, atol=1e-5)
    slot = int(memory.read(keys[0], 1).slots[0])
    memory.forget(slot)
    beside.forget(int(beside.read(keys[0], 1).slots[0]))
    torch.testing.assert_close(one(keys), other(keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTING)
def test_an_empty_memory_predicts_like_the_parametric_model(make: Make, kind: str) -> None:
    memory, keys = make(), normal(9, KEY, seed=3)
    adapted = model(kind, memory)
    assert isinstance(adapted, MbPA)
    parametric = Parametric(adapted.head)(keys)
    assert torch.equal(adapted(keys), parametric)
    memory.write(normal(3, KEY), labels(3))
    assert not torch.allclose(adapted(keys), parametric)
    torch.testing.assert_close(adapted(keys, before=0), parametric)
    memory.clear()
    assert torch.equal(adapted(keys), parametric)


@pytest.mark.parametrize("kind", ADAPTING)
def test_an_explanation_names_the_same_memories(filled, kind: str) -> None:
    memory, beside = filled(20)
    key = normal(KEY, seed=3)
    one, other = model(kind, memory), model(kind, beside)
    assert isinstance(one, MbPA)
    assert isinstance(other, MbPA)
    here, there = one.explain(key), other.explain(key)
    torch.testing.assert_close(here.contributions, there.contributions, rtol=1e-4, atol=1e-5)
    assert torch.equal(here.values, there.values)


def test_regression(make: Make) -> None:
    shape = {"value_shape": (2,), "value_dtype": torch.float32}
    memory, beside = make(**shape), EpisodicMemory(CAPACITY, KEY, **shape)
    for each in (memory, beside):
        each.write(normal(40, KEY), normal(40, 2, seed=1))
    keys = normal(9, KEY, seed=3)
    head, adaptation = nn.Linear(KEY, 2), LocalAdaptation(rules.sgd(0.1), steps=3)
    for make_model in (
        lambda memory: NonParametric(memory, neighbors=7, likelihood=Gaussian()),
        lambda memory: MbPA(head, memory, neighbors=7, adaptation=adaptation, likelihood=Gaussian()),
    ):
        torch.testing.assert_close(make_model(memory)(keys), make_model(beside)(keys), rtol=1e-5, atol=1e-5)


# What is refused, and that a refusal changes nothing

NAN, INF = float("nan"), float("inf")
FIVE = torch.arange(5)


def key_of(number: float, row: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    keys = torch.ones(5, 2, dtype=dtype)
    keys[row, 1] = number
    return keys


@pytest.mark.parametrize(
    ("keys", "values", "error", "message"),
    [
        (torch.ones(5, 3), FIVE, ShapeError, r"keys must have shape \(\*, 2\).*got \(5, 3\)"),
        (torch.tensor(1.0), FIVE, ShapeError, r"got \(\)"),
        (torch.ones(5, 2), torch.arange(4), ShapeError, r"values must have shape \(5,\).*got \(4,\)"),
        (torch.ones(5, 2), torch.ones(5, 1).long(), ShapeError, r"shape \(5,\).*got \(5, 1\)"),
        (torch.ones(5, 2, dtype=torch.complex64), FIVE, DtypeError, "keys must be real numbers, got torch.complex"),
        (torch.ones(5, 2, dtype=torch.bool), FIVE, DtypeError, "keys must be real numbers, got torch.bool"),
        (key_of(NAN), FIVE, NonFiniteError, "row 3 holds NaN or infinity. Nothing of the batch was stored"),
        (key_of(-INF, row=0), FIVE, NonFiniteError, "row 0 holds NaN or infinity"),
        (key_of(1e300, dtype=torch.float64), FIVE, NonFiniteError, "row 3"),
        (key_of(1e19), FIVE, NonFiniteError, "row 3"),
        (torch.ones(5, 2), torch.full((5,), 0.5), DtypeError, "float32 cannot be stored as torch.int64"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_refused_write_stores_nothing(make: Make, keys, values, error, message) -> None:
    memory = make(6, 2)
    memory.write(*numbered(0, 8))
    before, queries = held(memory), whole(4, seed=0)
    context = memory.read(queries, 4)
    with pytest.raises(error, match=message) as caught:
        memory.write(keys, values)
    assert isinstance(caught.value, RecollectError)
    assert held(memory) == before
    assert same(memory.read(queries, 4), context)
    memory.write(*numbered(8, 1))
    assert held(memory) == set(pairs(3, 6))  # the next entry takes the place that it would have taken


@pytest.mark.parametrize(
    ("queries", "neighbors", "before", "error", "message"),
    [
        (torch.ones(5, 3), 1, None, ShapeError, r"queries must have shape \(\*, 2\).*got \(5, 3\)"),
        (torch.tensor(1.0), 1, None, ShapeError, r"got \(\)"),
        (torch.ones(5, 2, dtype=torch.bool), 1, None, DtypeError, "queries must be real numbers"),
        (key_of(NAN), 1, None, NonFiniteError, "row 3 holds NaN or infinity"),
        (key_of(INF, row=2), None, None, NonFiniteError, "row 2 holds NaN or infinity"),
        (key_of(1e19), 1, None, NonFiniteError, "row 3"),
        (torch.ones(5, 2), 0, None, SettingError, "neighbors must be a whole number above 0, or None.*got 0"),
        (torch.ones(5, 2), True, None, SettingError, "got True"),
        (torch.ones(5, 2), 1.5, None, SettingError, "got 1.5"),
        (torch.ones(5, 2), 1, torch.arange(4), ShapeError, r"one for each query, shape \(5,\), got \(4,\)"),
        (torch.ones(5, 2), 1, 2.5, DtypeError, "before must be a write time, which is a whole number"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_bad_read_is_refused(make: Make, queries, neighbors, before, error, message) -> None:
    memory = make(6, 2)
    memory.write(*numbered(0, 4))
    with pytest.raises(error, match=message):
        memory.read(queries, neighbors, before=before)


@pytest.mark.parametrize("slots", [6, torch.tensor([0, 1, 6]), torch.tensor([0, -2]), torch.tensor([0.0])], ids=str)
@pytest.mark.usefixtures("untyped")
def test_a_bad_slot_forgets_nothing(make: Make, slots) -> None:
    memory = make(6, 2)
    memory.write(*numbered(0, 6))
    with pytest.raises(SettingError, match="slots must be"):
        memory.forget(slots)
    assert held(memory) == set(pairs(0, 6))


# What reading, and the tensors around it, leave alone


@pytest.mark.parametrize("kind", MODELS)
def test_reading_changes_nothing(filled, kind: str, rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    memory, _ = filled(20)
    predictor, keys = model(kind, memory), normal(9, KEY, seed=3)
    context, everything, count = memory.read(keys, 5), memory.read(keys, None), len(memory)
    with rng_untouched():
        first = predictor(keys)
        with torch.inference_mode():
            assert torch.equal(predictor(keys), first)
        predictor(keys, before=4)
    assert torch.equal(predictor(keys), first)
    assert same(memory.read(keys, 5), context)
    assert same(memory.read(keys, None), everything)
    assert len(memory) == count


def test_what_goes_in_and_comes_out_are_copies(make: Make) -> None:
    memory = make(5, 2)
    keys, values = numbered(1, 3)
    memory.write(keys, values)
    keys.zero_()
    values.zero_()
    for neighbors in (3, None):
        context = memory.read(torch.zeros(1, 2), neighbors)
        for part in (context.keys, context.values, context.weights, context.distances, context.slots):
            if part.is_contiguous():
                part.zero_()
    assert held(memory) == set(pairs(1, 3))


def test_gradients_are_not_kept(make: Make) -> None:
    memory = make(5, 2, value_shape=(2,), value_dtype=torch.float32)
    keys, values, queries = (torch.ones(3, 2, requires_grad=True) for _ in range(3))
    memory.write(keys * 2, values * 3)
    assert not any(part.requires_grad for part in memory.read(queries * 2, 2))
    with torch.inference_mode():
        memory.write(torch.zeros(1, 2), torch.zeros(1, 2))
    memory.write(torch.zeros(1, 2), torch.zeros(1, 2))
    assert len(memory) == 5
