"""A memory with history answers for each moment of its past as a memory without did at that moment."""

import copy
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from recollect import EpisodicMemory, load, persistence, save
from recollect.errors import SettingError
from recollect.kernels import Kernel, dot_product, gaussian, inverse_distance
from recollect.memory import Context, approximate, episodic, exact, scan
from recollect.memory.approximate import ApproximateIndex
from recollect.memory.index import Neighbors


def numbers(count: int, seed: int, *, distinct: int, size: int = 2) -> Tensor:
    """Keys of which many are equal (all that there are when ``distinct`` is small), and many equally far."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(-2, 3, (distinct, size), generator=g)
    return keys[torch.randint(distinct, (count,), generator=g)].double()


def stream(
    memory: EpisodicMemory, keys: Tensor, queries: Tensor, neighbors: int | None, every: int = 1
) -> list[Context]:
    """Writes a few entries at a time; before each write the next query, ``every`` places further, is read."""
    contexts = []
    for time in range(0, len(keys), every):
        contexts.append(memory.read(queries[time], neighbors))
        part = keys[time : time + every]
        memory.write(part, torch.arange(time, time + len(part)))
    return contexts


def agree(block: Context, one_by_one: list[Context], tolerance: float = 1e-12) -> None:
    """Asserts that each row of a block is what was read at its moment, but for the slots, and padding."""
    for row, expected in enumerate(one_by_one):
        seen = block.slots[row] >= 0
        assert torch.equal(block.values[row, seen], expected.values)
        assert torch.equal(block.keys[row, seen], expected.keys)
        for name in ("distances", "weights"):
            found = getattr(block, name)[row, seen]
            torch.testing.assert_close(found, getattr(expected, name), rtol=tolerance, atol=tolerance)
        assert (block.slots[row, ~seen] == -1).all()
        assert (block.distances[row, ~seen] == torch.inf).all()
        assert block.weights[row, ~seen].count_nonzero() == 0
        assert block.values[row, ~seen].count_nonzero() == 0


@settings(max_examples=10)
@given(
    capacity=st.integers(1, 7),
    history=st.integers(1, 9),
    blocks=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    neighbors=st.integers(1, 9),
    distinct=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_a_block_is_the_stream_one_by_one(
    capacity: int, history: int, blocks: list[int], neighbors: int, distinct: int, seed: int
) -> None:
    total = sum(blocks)
    keys = numbers(total, seed, distinct=distinct)
    queries = keys.roll(1, 0) + 0.5 * (seed % 2)
    near = stream(EpisodicMemory(capacity, 2, key_dtype=torch.float64), keys, queries, neighbors)
    everything = stream(EpisodicMemory(capacity, 2, key_dtype=torch.float64), keys, queries, None)
    memory, step = EpisodicMemory(capacity, 2, key_dtype=torch.float64, history=history), 0
    for block in blocks:
        memory.write(keys[step : step + block], torch.arange(step, step + block))
        step += block
        times = torch.arange(max(0, step - history), min(step + 1, total))
        for count, expected in ((neighbors, near), (None, everything)):
            context = memory.read(queries[times], count, before=times)
            agree(context, [expected[time] for time in times.tolist()])
            if count is None and len(times):
                assert (context.slots >= 0).any(0).all(), "an entry that none of the queries sees"
            if step < total:
                agree(memory.read(queries[step : step + 1], count), [expected[step]])
        assert len(memory) == min(step, capacity)


@pytest.mark.parametrize("distinct", [3, 1000])
@pytest.mark.parametrize("way", ["float64", "bfloat16", "graphs", "no graphs"])
def test_every_search_hides_what_was_overwritten(way: str, distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many small blocks of scores, in each way that a search may begin, with a proof and (few keys) without."""
    monkeypatch.setattr(scan, "_SCORES", 2**13)
    monkeypatch.setattr(scan, "_FEW", 0)
    index, dtype = None, torch.float64
    if way in {"graphs", "no graphs"}:
        pytest.importorskip("faiss")
        monkeypatch.setattr(approximate, "_NODE", 0)  # small graphs are used although a scan would be faster
        # The beam reaches every node; with more recent entries there are no graphs yet.
        index = ApproximateIndex(graphs=2, recent=4 if way == "graphs" else 1000, beam=200)
    elif way == "bfloat16":
        dtype = torch.float32
        monkeypatch.setattr(exact, "multiplies_bfloat16", lambda device: True)
        monkeypatch.setattr(exact, "_COARSE", 1)
        monkeypatch.setattr(exact, "_MANY", 1)
    keys = numbers(300, 1, distinct=distinct, size=5).to(dtype)
    queries = keys.roll(7, 0) + 0.5
    expected = stream(EpisodicMemory(90, 5, key_dtype=dtype), keys, queries, 5, every=5)
    memory = EpisodicMemory(90, 5, key_dtype=dtype, history=100, index=index)
    for start in range(0, 300, 100):
        memory.write(keys[start : start + 100], torch.arange(start, start + 100))
        times = torch.arange(start, start + 100, 5)
        context = memory.read(queries[times], 5, before=times)
        agree(context, expected[start // 5 : start // 5 + 20], 1e-6 if dtype == torch.float32 else 1e-12)
    if isinstance(memory.index, ApproximateIndex):
        assert bool(memory.index._graphs) is (way == "graphs")


# Forgetting


def seen(memory: EpisodicMemory, before: int | Tensor | None = None) -> list[list[int]]:
    """The write times of what two queries see, oldest first."""
    slots = memory.read(torch.zeros(2, 1), None, before=before).slots
    return [memory.written[row[row >= 0]].tolist() for row in slots]


def write(memory: EpisodicMemory, count: int) -> Tensor:
    return memory.write(torch.arange(count).unsqueeze(1).float(), torch.arange(count))


operations = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 13)),
    st.tuples(st.just("forget"), st.lists(st.integers(-1, 8), max_size=5)),
    st.tuples(st.just("clear"), st.just(0)),
)


@settings(max_examples=15)
@given(st.lists(operations, max_size=12), st.integers(0, 4))
def test_what_is_seen_after_any_course_of_events(course: list[tuple[str, int | list[int]]], ago: int) -> None:
    capacity, history = 5, 4
    memory = EpisodicMemory(capacity, 1, history=history)
    step, alive = 0, set()
    for operation, argument in course:
        if operation == "write":
            assert isinstance(argument, int)
            write(memory, argument)
            alive |= set(range(step, step + argument))
            step += argument
        elif operation == "forget":
            assert isinstance(argument, list)
            alive -= {int(memory.written[slot]) for slot in argument if slot >= 0}
            memory.forget(torch.tensor(argument, dtype=torch.long))
        else:
            memory.clear()
            step, alive = 0, set()
        now, past = (sorted(alive & set(range(end - capacity, end))) for end in (step, step - ago))
        assert len(memory) == len(now)
        assert seen(memory) == [now, now]
        assert seen(memory, torch.tensor([step - ago, step])) == [past, now]
        assert seen(memory, step + 9) == [now, now], "what lies ahead is now"
        near = memory.read(torch.zeros(1), 3)
        assert near.slots.shape == (min(3, len(now)),)
        assert set(memory.written[near.slots].tolist()) <= set(now)
        near = memory.read(torch.zeros(1), 99, before=step - ago).slots
        assert sorted(memory.written[near[near >= 0]].tolist()) == past


def test_a_forgotten_entry_leaves_a_gap_and_takes_nothing_else_along() -> None:
    memory = EpisodicMemory(3, 1, history=2)
    slots = write(memory, 5)
    assert seen(memory) == [[2, 3, 4]] * 2
    memory.forget(slots[3])
    assert seen(memory) == [[2, 4]] * 2
    memory.forget(slots[1])  # of those that only the past sees
    assert seen(memory, 3) == [[0, 2]] * 2
    memory.forget(slots[[2, 4]])
    assert len(memory) == 0
    assert memory.read(torch.zeros(2, 1), 3).slots.shape == (2, 0)
    assert seen(memory) == [[], []]
    assert seen(memory, 3) == [[0]] * 2
    assert memory.read(torch.zeros(1), 3, before=3).slots.tolist() == [int(slots[0])]
    assert write(memory, 9).unique().tolist() == [0, 1, 2, 3, 4]


def test_further_back_than_is_kept_the_rest_answers() -> None:
    memory = EpisodicMemory(3, 1, history=2)
    write(memory, 10)
    assert seen(memory, torch.tensor([7, 6])) == [[5, 6], [5]]
    for before in (5, 0, -(10**9)):
        assert seen(memory, before) == [[], []]
        assert memory.read(torch.zeros(1), 3, before=before).weights.tolist() == [0.0, 0.0, 0.0]


class ByFirstNumber:
    """A kernel that looks at the keys."""

    def log_weights(self, queries: Tensor, keys: Tensor, distances: Tensor) -> Tensor:
        return (keys[..., 0] - queries[:, :1]).abs() - distances


KERNELS = [inverse_distance(), gaussian(2.0), dot_product(0.3), ByFirstNumber()]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("history", [0, 5])
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.float64, torch.uint8])
def test_entries_are_a_context_without_repeated_keys(
    kernel: Kernel, history: int, key_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodic, "_GATHER", 200)
    memory = EpisodicMemory(6, 2, key_dtype=key_dtype, history=history)
    queries = numbers(7, 5, distinct=9).abs().to(torch.float64 if key_dtype == torch.float64 else torch.float32)
    for count in (0, 9):
        memory.write(numbers(count, 4, distinct=9).abs().to(key_dtype), torch.arange(100, 100 + count))
        for before in (None, 3, torch.arange(3, 10), 0):
            for few in (queries, queries[:0] if before is None else queries):
                context = memory.read(few, 4, kernel=kernel, before=before)
                entries = memory.read_entries(few, 4, kernel=kernel, before=before)
                assert entries.slots.tolist() == sorted(set(context.slots.view(-1).tolist()))
                for name in ("slots", "keys", "values"):
                    assert torch.equal(getattr(entries, name)[entries.place], getattr(context, name))
                torch.testing.assert_close(entries.weights, context.weights)


def test_entries_need_a_number_of_neighbors() -> None:
    with pytest.raises(SettingError, match=r"neighbors must be a whole number above 0, got 0\."):
        used().read_entries(numbers(3, 1, distinct=3), 0)


@pytest.mark.parametrize("limited", [False, True])
def test_all_entries_under_the_dot_product_have_distances_too(limited: bool) -> None:
    memory = EpisodicMemory(40, 3, history=20)
    g = torch.Generator().manual_seed(1)
    memory.write(torch.randn(70, 3, generator=g), torch.arange(70))
    queries = torch.cat([torch.randn(9, 3, generator=g), memory.keys[5:6]])
    before = torch.arange(61, 71) if limited else None
    found = memory.read(queries, None, kernel=dot_product(0.7), before=before)
    plain = memory.read(queries, None, before=before)
    for name in ("keys", "values", "slots"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    torch.testing.assert_close(found.distances, plain.distances, rtol=1e-4, atol=1e-5)
    scores = 0.7 * (found.keys @ queries.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.weights, scores.masked_fill(found.slots < 0, -torch.inf).softmax(1))


@pytest.mark.parametrize("neighbors", [2, None])
def test_a_limit_may_be_of_any_whole_type_and_a_batch_of_any_shape(neighbors: int | None) -> None:
    memory = EpisodicMemory(300, 1, history=50)
    write(memory, 400)
    queries = torch.arange(6.0).view(2, 3, 1)
    expected = memory.read(queries, neighbors, before=torch.full((2, 3), 120))
    small = memory.read(queries, neighbors, before=torch.full((2, 3), 120, dtype=torch.int8))
    assert all(torch.equal(a, b) for a, b in zip(expected, small, strict=True))
    assert memory.read(queries[:0], neighbors, before=torch.zeros(0, 3, dtype=torch.long)).slots.shape[:2] == (0, 3)


# State, settings, and indices of one's own


def used(**settings) -> EpisodicMemory:
    memory = EpisodicMemory(6, 2, key_dtype=torch.float64, **settings)
    memory.write(numbers(17, 3, distinct=9), torch.arange(17))
    memory.forget(4)
    return memory


def answers(memory: EpisodicMemory) -> list[Context]:
    contexts = []
    for start in (20, 30):
        queries, times = numbers(4, start, distinct=9), int(memory.step) - torch.arange(4)
        contexts += [
            memory.read(queries, 3, before=times),
            memory.read(queries, None),
            memory.read(queries, None, before=14),
        ]
        memory.write(queries, torch.arange(4))
    return contexts


def same(a: EpisodicMemory, b: EpisodicMemory) -> bool:
    pairs = zip(answers(a), answers(b), strict=True)
    return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))


def test_the_state_is_complete(tmp_path: Path) -> None:
    fresh = EpisodicMemory(6, 2, key_dtype=torch.float64, history=5)
    fresh.load_state_dict(used(history=5).state_dict())
    save(torch.nn.Sequential(used(history=5)), tmp_path / "model")
    loaded = load(tmp_path / "model").get_submodule("0")
    assert isinstance(loaded, EpisodicMemory)
    assert (loaded.capacity, loaded.history, len(loaded)) == (6, 5, 5)
    for memory in (fresh, loaded, copy.deepcopy(used(history=5)), used(history=5).to(torch.float32).to(torch.float64)):
        assert same(memory, used(history=5))
    for history in (0, 4):
        with pytest.raises(RuntimeError, match="size mismatch for keys"):
            used(history=history).load_state_dict(used(history=5).state_dict())


def test_a_save_from_before_there_was_history_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(persistence._ARGUMENTS, EpisodicMemory, ())
        save(used(), tmp_path / "model")
    assert '"history"' not in (tmp_path / "model/config.json").read_text()
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, EpisodicMemory)
    assert (loaded.capacity, loaded.history) == (6, 0)
    assert same(loaded, used())


@pytest.mark.parametrize("history", [-1, 1.0, True, None])
@pytest.mark.usefixtures("untyped")
def test_a_bad_history_is_refused(history) -> None:
    with pytest.raises(SettingError, match=f"history must be a whole number of at least 0, got {history}"):
        EpisodicMemory(3, 2, history=history)


class First:
    """Finds the first slots, whatever the query."""

    def rebuild(self, keys: Tensor, written: Tensor) -> None: ...

    def update(self, keys: Tensor, written: Tensor, slots: Tensor) -> None: ...

    def search(
        self, keys: Tensor, written: Tensor, queries: Tensor, neighbors: int, before: Tensor | None
    ) -> Neighbors:
        slots = torch.arange(neighbors).expand(len(queries), -1)
        return Neighbors(queries.new_zeros(slots.shape), slots)


def test_an_index_that_cannot_hide_the_old_is_refused() -> None:
    with pytest.raises(SettingError, match=r"needs an index that hides what is too old, got a First"):
        EpisodicMemory(3, 2, history=1, index=First())
    memory = EpisodicMemory(3, 2, index=First())
    memory.write(torch.zeros(2, 2), torch.arange(2))
    assert memory.read(torch.zeros(2), 5).slots.tolist() == [0, 1]


def test_history_is_shown() -> None:
    assert "5 of 6 entries, key_size=2, key_dtype=torch.float64, history=5" in repr(used(history=5))
    assert "history" not in repr(used())
