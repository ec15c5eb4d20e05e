"""The memory is a ring that forgets on request, refuses what it cannot keep, and is its ``state_dict``."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
from hypothesis import given
from torch import Tensor

from recollect import EpisodicMemory
from recollect.errors import DeviceError, DtypeError, NonFiniteError, RecollectError, SettingError, ShapeError
from recollect.memory import Context, Memory

LABEL = torch.tensor([0])


def entries(start: int, *batch: int) -> tuple[Tensor, Tensor]:
    """Pairs that are all different: the t-th has the key (t, -t) and the value t + 100."""
    count = int(torch.tensor(batch).prod())
    times = torch.arange(start, start + count).view(batch)
    return torch.stack([times, -times], -1).float(), times + 100


def random_memory(capacity: int = 30, count: int = 40, **settings) -> EpisodicMemory:
    g = torch.Generator().manual_seed(0)
    memory = EpisodicMemory(capacity, 4, **settings)
    memory.write(torch.randn(count, 4, generator=g), torch.arange(count))
    memory.forget(torch.tensor([3, 8, 9]))
    return memory


def snapshot(memory: EpisodicMemory) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in memory.state_dict().items()}


def unchanged(memory: EpisodicMemory, before: dict[str, Tensor]) -> bool:
    now = memory.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def same(a: Context, b: Context) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns jaxtyping's checks off: the errors are those that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# The ring

batches = st.one_of(
    st.tuples(st.integers(0, 12)),
    st.tuples(st.integers(0, 3), st.integers(0, 4)),
    st.just(()),  # one key of shape (key_size,)
)


@given(st.integers(1, 8), st.lists(batches, max_size=8))
def test_the_ring_is_a_deque_with_maxlen(capacity: int, writes: list[tuple[int, ...]]) -> None:
    memory, ring, step = EpisodicMemory(capacity, 2), deque(maxlen=capacity), 0
    for batch in writes:
        keys, values = entries(step, *batch)
        slots = memory.write(keys, values)
        pairs = list(zip(keys.reshape(-1, 2).tolist(), values.reshape(-1).tolist(), strict=True))
        for time, (key, value) in enumerate(pairs, start=step):
            ring.append((time, key, value))
        step += len(pairs)
        kept = pairs[-capacity:]
        assert slots.dtype == torch.long
        assert memory.keys[slots].tolist() == [key for key, _ in kept]
        assert memory.values[slots].tolist() == [value for _, value in kept]
        assert memory.written[slots].tolist() == list(range(step - len(kept), step))
        content = memory.read(torch.zeros(2), None)
        assert memory.written[content.slots].tolist() == [time for time, _, _ in ring]
        assert content.keys.tolist() == [key for _, key, _ in ring]
        assert content.values.tolist() == [value for _, _, value in ring]
        assert len(memory) == len(ring)


operations = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 14)),
    st.tuples(st.just("forget"), st.lists(st.integers(-1, 5), max_size=6)),
    st.tuples(st.just("clear"), st.just(0)),
)


@given(st.lists(operations, max_size=25))
def test_the_oldest_is_overwritten_first_after_any_history(history: list[tuple[str, int | list[int]]]) -> None:
    capacity = 6
    memory = EpisodicMemory(capacity, 2)
    alive: list[tuple[int, int]] = []  # (slot, time), the oldest first
    free, step = list(range(capacity)), 0  # empty slots, the next to be used first
    for operation, argument in history:
        if operation == "write":
            assert isinstance(argument, int)
            used = []
            for time in range(step, step + argument):
                slot = free.pop(0) if free else alive.pop(0)[0]
                alive.append((slot, time))
                used.append(slot)
            assert memory.write(*entries(step, argument)).tolist() == used[-capacity:]
            step += argument
        elif operation == "forget":
            assert isinstance(argument, list)
            memory.forget(torch.tensor(argument, dtype=torch.long))
            gone = sorted({slot for slot, _ in alive} & set(argument))
            alive = [(slot, time) for slot, time in alive if slot not in gone]
            free = gone + free
        else:
            memory.clear()
            alive, free, step = [], list(range(capacity)), 0
        times = dict(alive)
        keys, values = entries(0, step)
        assert len(memory) == len(alive)
        assert memory.written.tolist() == [times.get(slot, -1) for slot in range(capacity)]
        for slot in range(capacity):
            present = slot in times
            assert memory.keys[slot].tolist() == (keys[times[slot]].tolist() if present else [0.0, 0.0])
            assert int(memory.values[slot]) == (int(values[times[slot]]) if present else 0)
        assert memory.read(torch.zeros(2), None).slots.tolist() == [slot for slot, _ in alive]
        assert sorted(memory.read(torch.zeros(2), 99).slots.tolist()) == sorted(times)


def test_an_empty_memory_is_true_and_has_no_length() -> None:
    memory = EpisodicMemory(3, 2)
    assert memory
    assert len(memory) == 0
    memory.write(*entries(0, 2))
    assert len(memory) == 2
    assert (memory.capacity, memory.key_size, memory.value_shape) == (3, 2, ())
    assert "2 of 3 entries" in repr(memory)
    assert isinstance(memory, Memory)


@pytest.mark.parametrize("neighbors", [1, 5, None])
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3), (2, 0)])
def test_shapes_of_a_read(batch: tuple[int, ...], neighbors: int | None) -> None:
    memory = EpisodicMemory(4, 2, value_shape=(3, 1), value_dtype=torch.float64)
    for count in (0, 1, 4):
        memory.clear()
        memory.write(torch.randn(count, 2), torch.randn(count, 3, 1))
        context = memory.read(torch.randn(*batch, 2), neighbors)
        k = count if neighbors is None else min(count, neighbors)
        assert context.keys.shape == (*batch, k, 2)
        assert context.values.shape == (*batch, k, 3, 1)
        assert context.values.dtype == torch.float64
        assert context.weights.shape == context.distances.shape == context.slots.shape == (*batch, k)
        if k:
            torch.testing.assert_close(context.weights.sum(-1), torch.ones(batch))


def test_a_forgotten_entry_is_gone() -> None:
    memory = EpisodicMemory(5, 2)
    memory.write(*entries(0, 5))
    memory.forget(2)
    memory.forget(torch.tensor([[4, 4], [-1, 2]]))  # twice, no slot, empty already
    assert len(memory) == 3
    assert memory.keys[[2, 4]].count_nonzero() == 0
    assert memory.values[[2, 4]].count_nonzero() == 0
    for neighbors in (1, 5, None):
        near = memory.read(torch.tensor([[2.0, -2.0], [0.0, 0.0], [4.0, -4.0]]), neighbors)
        assert not torch.isin(near.slots, torch.tensor([2, 4])).any()
    assert memory.write(*entries(5, 3)).tolist() == [4, 2, 0]  # the last forgotten first, then the oldest
    memory.forget(memory.read(torch.zeros(3, 2), 4, before=3).slots)  # what read returned, -1 for what is missing
    assert memory.written.tolist() == [7, -1, 6, 3, 5]


def test_padding_holds_nothing_of_hidden_entries() -> None:
    memory = EpisodicMemory(4, 2, value_shape=(1,), value_dtype=torch.float32)
    memory.write(torch.ones(3, 2), torch.tensor([[9.0], [5.0], [6.0]]))
    memory.forget(0)
    memory.write(torch.ones(1, 2), torch.tensor([[9.0]]))
    for neighbors in (3, None):
        context = memory.read(torch.zeros(1, 2), neighbors, before=2)
        assert sorted(context.values.flatten().tolist()) == [0.0, 0.0, 5.0]
        assert float((context.weights.unsqueeze(-1) * context.values).sum()) == 5.0


# What is refused, and that a refusal changes nothing

NAN, INF = float("nan"), float("inf")


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def key_of(number: float, row: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    keys = torch.ones(5, 4, dtype=dtype)
    keys[row, 2] = number
    return keys


FIVE = torch.arange(5)


@pytest.mark.parametrize(
    ("settings", "keys", "values", "error", "message"),
    [
        ({}, torch.ones(5, 3), FIVE, ShapeError, r"keys must have shape \(\*, 4\).*got \(5, 3\)"),
        ({}, torch.tensor(1.0), FIVE, ShapeError, r"keys must have shape \(\*, 4\).*got \(\)"),
        ({}, torch.ones(5, 4), torch.arange(4), ShapeError, r"values must have shape \(5,\).*got \(4,\)"),
        ({}, torch.ones(5, 4), torch.ones(5, 1).long(), ShapeError, r"shape \(5,\).*got \(5, 1\)"),
        ({}, torch.ones(2, 5, 4), FIVE, ShapeError, r"shape \(2, 5\).*got \(5,\)"),
        ({"value_shape": (2,)}, torch.ones(5, 4), FIVE, ShapeError, r"shape \(5, 2\).*got \(5,\)"),
        ({}, torch.ones(5, 4, dtype=torch.complex64), FIVE, DtypeError, "keys must be real numbers, got torch.complex"),
        ({}, torch.ones(5, 4, dtype=torch.bool), FIVE, DtypeError, "keys must be real numbers, got torch.bool"),
        ({}, key_of(NAN), FIVE, NonFiniteError, "row 3 holds NaN or infinity. Nothing of the batch was stored"),
        ({}, key_of(-INF, row=0), FIVE, NonFiniteError, "row 0 holds NaN or infinity"),
        ({}, torch.tensor([[1.0], [NAN], [INF]]).expand(3, 4), FIVE[:3], NonFiniteError, r"row 1 .*\(2 rows in all\)"),
        ({}, key_of(1e300, dtype=torch.float64), FIVE, NonFiniteError, "row 3 of keys is too large"),
        ({}, key_of(1e19), FIVE, NonFiniteError, "row 3 .*squared distance.*overflows"),
        ({"key_dtype": torch.float16}, key_of(65520), FIVE, NonFiniteError, "row 3 .*torch.float16"),
        ({"key_dtype": torch.bfloat16}, key_of(1e19), FIVE, NonFiniteError, "row 3 .*torch.bfloat16"),
        ({"key_dtype": torch.float64}, key_of(1e160, dtype=torch.float64), FIVE, NonFiniteError, "row 3"),
        ({"key_dtype": torch.uint8}, key_of(0.5), FIVE, DtypeError, "whole numbers from 0 to 255, but row 3"),
        ({"key_dtype": torch.uint8}, key_of(-1), FIVE, DtypeError, "row 3"),
        ({"key_dtype": torch.uint8}, key_of(256), FIVE, DtypeError, "row 3"),
        ({"key_dtype": torch.uint8}, key_of(256, dtype=torch.int64), FIVE, DtypeError, "row 3"),
        ({"key_dtype": torch.uint8}, key_of(-1, dtype=torch.int8), FIVE, DtypeError, "row 3"),
        ({"key_dtype": torch.uint8}, key_of(NAN), FIVE, NonFiniteError, "row 3 holds NaN"),
        ({}, torch.ones(5, 4), torch.ones(5), DtypeError, "torch.float32 cannot be stored as torch.int64.*value_dtype"),
        (
            {"value_dtype": torch.uint8},
            torch.ones(5, 4),
            FIVE + 252,
            DtypeError,
            "int64 cannot be stored as torch.uint8",
        ),
        ({"value_dtype": torch.uint8}, torch.ones(5, 4), FIVE - 1, DtypeError, "int64 cannot be stored as torch.uint8"),
        ({"value_dtype": torch.float16}, torch.ones(5, 4), FIVE * 1e5, DtypeError, "cannot be stored as torch.float16"),
        ({}, meta(torch.ones(5, 4)), FIVE, DeviceError, r"keys are on meta, the memory is on cpu.*\.to\(\)"),
        ({}, torch.ones(5, 4), meta(FIVE), DeviceError, "values are on meta, the memory is on cpu"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_refused_write_stores_nothing(settings, keys, values, error, message) -> None:
    memory = EpisodicMemory(6, 4, **settings)
    memory.write(torch.zeros(8, 4), torch.zeros(8, *memory.value_shape, dtype=torch.long))
    memory.forget(1)
    before = snapshot(memory)
    with pytest.raises(error, match=message) as caught:
        memory.write(keys, values)
    assert isinstance(caught.value, RecollectError)
    assert unchanged(memory, before)
    assert len(memory.read(torch.zeros(4), 9).slots) == 5


@pytest.mark.parametrize(
    ("queries", "neighbors", "before", "error", "message"),
    [
        (torch.ones(5, 3), 1, None, ShapeError, r"queries must have shape \(\*, 4\).*got \(5, 3\)"),
        (torch.tensor(1.0), 1, None, ShapeError, r"got \(\)"),
        (torch.ones(5, 4, dtype=torch.bool), 1, None, DtypeError, "queries must be real numbers"),
        (meta(torch.ones(5, 4)), 1, None, DeviceError, "queries are on meta, the memory is on cpu"),
        (key_of(NAN), 1, None, NonFiniteError, "row 3 holds NaN or infinity"),
        (key_of(INF, row=2), None, None, NonFiniteError, "row 2 holds NaN or infinity"),
        (key_of(1e19), 1, None, NonFiniteError, "row 3 is so large that squared distances overflow"),
        (torch.ones(5, 4), 0, None, SettingError, "neighbors must be a whole number above 0, or None.*got 0"),
        (torch.ones(5, 4), -1, None, SettingError, "got -1"),
        (torch.ones(5, 4), True, None, SettingError, "got True"),
        (torch.ones(5, 4), 1.5, None, SettingError, "got 1.5"),
        (torch.ones(5, 4), 1, torch.arange(4), ShapeError, r"one for each query, shape \(5,\), got \(4,\)"),
        (torch.ones(5, 4), 1, torch.ones(5, 1).long(), ShapeError, r"shape \(5,\), got \(5, 1\)"),
        (torch.ones(4), 1, torch.arange(1), ShapeError, r"shape \(\), got \(1,\)"),
        (
            torch.ones(5, 4),
            1,
            2.5,
            DtypeError,
            "before must be a write time, which is a whole number, got torch.float32",
        ),
        (torch.ones(5, 4), 1, torch.ones(5), DtypeError, "got torch.float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_read_is_refused(queries, neighbors, before, error, message) -> None:
    memory = random_memory()
    with pytest.raises(error, match=message):
        memory.read(queries, neighbors, before=before)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (30, "slots must be from 0 to 29 in this memory, got 30"),
        (torch.tensor([0, 1, 30]), "got 30"),
        (torch.tensor([0, -2]), "got -2"),
        (torch.tensor([0.0]), "whole numbers, got torch.float32"),
        (torch.ones(30, dtype=torch.bool), "got torch.bool"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_slot_forgets_nothing(slots, message) -> None:
    memory = random_memory()
    before = snapshot(memory)
    with pytest.raises(SettingError, match=message):
        memory.forget(slots)
    assert unchanged(memory, before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"capacity": 0}, SettingError, "capacity must be a whole number above 0, got 0"),
        ({"capacity": 2.0}, SettingError, "capacity .*got 2.0"),
        ({"capacity": True}, SettingError, "capacity .*got True"),
        ({"key_size": -1}, SettingError, "key_size must be a whole number above 0, got -1"),
        ({"value_shape": 3}, SettingError, r"value_shape must be a tuple, such as \(3,\) .*got 3"),
        ({"value_shape": (2, -1)}, SettingError, "each of value_shape must be a whole number of at least 0, got -1"),
        ({"value_dtype": "float"}, SettingError, r"value_dtype must be a dtype, such as torch\.long, got 'float'"),
        ({"key_dtype": torch.int64}, DtypeError, "torch.uint8, got key_dtype=torch.int64"),
        ({"key_dtype": torch.float8_e4m3fn}, DtypeError, "float8"),
        ({"key_dtype": torch.complex64}, DtypeError, "complex64"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_setting_is_refused(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        EpisodicMemory(**{"capacity": 3, "key_size": 2, **settings})


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        (torch.uint8, torch.tensor([[0, 255]])),
        (torch.uint8, torch.tensor([[0.0, 255.0]], dtype=torch.float16)),
        (torch.uint8, torch.tensor([[0.0, 255.0]], dtype=torch.bfloat16)),
        (torch.uint8, torch.tensor([[0, 127]], dtype=torch.int8)),
        (torch.uint8, torch.tensor([[0, 255]], dtype=torch.uint16)),
        (torch.float32, torch.tensor([[-3, 7]], dtype=torch.int32)),
        (torch.float32, torch.tensor([[1e18, -1e18]])),
        (torch.float16, torch.tensor([[65504.0, -65504.0]])),
        (torch.bfloat16, torch.tensor([[1e18, -1e18]]).bfloat16()),
        (torch.float64, torch.tensor([[1e150, 1.0]], dtype=torch.float64)),
    ],
)
def test_keys_that_fit_are_stored_as_they_are(stored: torch.dtype, given: Tensor) -> None:
    memory = EpisodicMemory(9, 2, key_dtype=stored)
    memory.write(given, LABEL)
    assert torch.equal(memory.keys[0].double(), given[0].double())
    context = memory.read(-given.to(memory.keys.dtype).double(), 1)
    assert bool(context.distances.isfinite().all())
    assert context.slots.tolist() == [[0]]


@pytest.mark.parametrize("values", [torch.tensor([True]), torch.tensor([9], dtype=torch.uint8), torch.tensor([9.5])])
def test_values_that_fit_are_converted(values: Tensor) -> None:
    memory = EpisodicMemory(3, 2, value_dtype=torch.float64 if values.is_floating_point() else torch.long)
    memory.write(torch.zeros(1, 2), values)
    assert float(memory.values[0]) == float(values[0])


# State


def future(memory: EpisodicMemory) -> list[Context]:
    """What a memory answers now and after further writes and deletions."""
    g = torch.Generator().manual_seed(7)
    queries, contexts = torch.randn(6, 4, generator=g), []
    for _ in range(4):
        contexts += [memory.read(queries, 5), memory.read(queries, None), memory.read(queries, 5, before=42)]
        memory.write(torch.randn(9, 4, generator=g), torch.arange(9))
        memory.forget(contexts[-1].slots[0])
    return contexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_dict_is_the_whole_memory(dtype: torch.dtype) -> None:
    memory = random_memory(key_dtype=dtype)
    state = snapshot(memory)
    fresh, assigned, used = (EpisodicMemory(30, 4, key_dtype=dtype) for _ in range(3))
    used.write(1e6 * torch.ones(17, 4), torch.arange(17))
    fresh.load_state_dict(state)
    used.load_state_dict(state)
    assigned.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    expected = future(memory)
    for other in (fresh, used, assigned):
        assert all(same(a, b) for a, b in zip(expected, future(other), strict=True))
        assert unchanged(other, snapshot(memory))


def test_a_deep_copy_is_another_memory() -> None:
    memory = random_memory()
    network = torch.nn.Sequential(torch.nn.Identity(), memory)
    other = copy.deepcopy(network)[1]
    before = snapshot(memory)
    contexts = future(other)
    assert unchanged(memory, before)
    assert all(same(a, b) for a, b in zip(contexts, future(memory), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_conversion_keeps_the_entries_readable(dtype: torch.dtype) -> None:
    memory = random_memory()
    keys, written = memory.keys.clone(), memory.written.clone()
    assert torch.nn.Sequential(memory).to(dtype)[0] is memory
    assert memory.keys.dtype == dtype
    assert torch.equal(memory.written, written)
    fresh = EpisodicMemory(30, 4, key_dtype=dtype)
    fresh.write(keys[written.argsort()[3:]].to(dtype), memory.values[written.argsort()[3:]])
    queries = torch.randn(6, 4)
    for neighbors in (5, None):
        now, expected = memory.read(queries, neighbors), fresh.read(queries, neighbors)
        assert now.keys.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(now.distances, expected.distances)
        assert torch.equal(now.values, expected.values)


def test_a_conversion_that_overflows_changes_nothing() -> None:
    for key, value in ((1e5, 0.0), (0.0, 1e5)):
        memory = EpisodicMemory(3, 2, value_dtype=torch.float32)
        memory.write(torch.full((1, 2), key), torch.tensor([value]))
        before = snapshot(memory)
        with pytest.raises(NonFiniteError, match=r"overflow torch.float16, so it was not converted"):
            memory.half()
        assert unchanged(memory, before)
        assert memory.to(torch.float64).read(torch.zeros(2), 1).values.tolist() == [value]


def test_uint8_keys_survive_a_conversion() -> None:
    memory = EpisodicMemory(3, 2, key_dtype=torch.uint8)
    memory.write(torch.tensor([[0, 255], [7, 9]]), torch.tensor([1, 2]))
    memory.half()
    assert memory.keys.dtype == torch.uint8
    assert memory.read(torch.tensor([7.0, 10.0]), 1).distances.tolist() == [1.0]


# What public calls leave alone


def every_call(memory: EpisodicMemory) -> list[Context]:
    slots = memory.write(torch.full((3, 4), 0.5), torch.arange(3))
    contexts = [memory.read(torch.zeros(2, 4), 5), memory.read(torch.zeros(4), None, before=9)]
    memory.forget(slots[1])
    contexts.append(memory.read(torch.ones(1, 2, 4), 5))
    assert len(memory) == int(memory.size)
    repr(memory)
    memory.load_state_dict(memory.state_dict())
    memory.to(torch.float32)
    return contexts


def test_no_call_uses_the_global_random_state(rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    with rng_untouched():
        memory = EpisodicMemory(30, 4)
        every_call(memory)
        copy.deepcopy(memory).clear()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes(mode: Callable[[], AbstractContextManager[None]]) -> None:
    expected, memory = every_call(random_memory()), random_memory()
    with mode():
        contexts = every_call(memory)
    assert all(same(a, b) for a, b in zip(contexts, expected, strict=True))
    reference = random_memory()
    every_call(reference)
    assert all(same(a, b) for a, b in zip(future(memory), future(reference), strict=True))
    with mode():
        memory.clear()
    memory.write(torch.eye(4), torch.arange(4))
    assert copy.deepcopy(memory).read(torch.eye(4), 1).values.flatten().tolist() == [0, 1, 2, 3]


def test_gradients_are_not_kept() -> None:
    memory = EpisodicMemory(5, 2, value_shape=(2,), value_dtype=torch.float32)
    keys, values, queries = (torch.ones(3, 2, requires_grad=True) for _ in range(3))
    memory.write(keys * 2, values * 3)
    context = memory.read(queries * 2, 2)
    assert not any(part.requires_grad for part in context)
    assert not any(buffer.requires_grad for buffer in memory.buffers())
    assert not list(memory.parameters())


def test_written_tensors_are_copied() -> None:
    memory = EpisodicMemory(3, 2)
    keys, values = entries(1, 3)
    memory.write(keys, values)
    keys.zero_()
    values.zero_()
    assert memory.keys.count_nonzero() == 6
    context = memory.read(torch.ones(2, 2), None)
    before = snapshot(memory)
    context.weights.zero_()
    context.distances.zero_()
    near = memory.read(torch.ones(2, 2), 2)
    for part in near:
        part.zero_()
    assert unchanged(memory, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_by_row(value: float) -> None:
    memory = EpisodicMemory(4, 2, value_shape=(1,), value_dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    with pytest.raises(NonFiniteError, match="row 1 "):
        memory.write(torch.ones(2, 2), torch.tensor([[1.0], [value]]))
    with pytest.raises(NonFiniteError, match="row 3 "):
        memory.write(torch.ones(2, 2, 2), torch.tensor([[[1.0], [2.0]], [[3.0], [value]]]))
    assert all(torch.equal(memory.state_dict()[name], tensor) for name, tensor in before.items())
