"""Approximate reading: nearly all of the nearest entries, always, and nothing that is not in the memory."""

import copy
import math
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from recollect import EpisodicMemory
from recollect.errors import MissingExtraError, SettingError
from recollect.memory import approximate
from recollect.memory.approximate import ApproximateIndex
from recollect.memory.exact import ExactIndex
from recollect.memory.index import Index, compute_dtype

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]


def features(count: int, seed: int, network: int = 0, size: int = 16) -> Tensor:
    """ReLU features of an 8-dimensional latent, as a random network makes them."""
    weight = torch.randn(8, size, generator=torch.Generator().manual_seed(network))
    return (torch.randn(count, 8, generator=torch.Generator().manual_seed(1000 + seed)) @ weight).relu()


def memory_of(keys: Tensor, capacity: int, *, spread: int = 3, beam: int = 40, **settings) -> EpisodicMemory:
    index = ApproximateIndex(graphs=spread, recent=16, beam=beam)
    memory = EpisodicMemory(capacity, keys.shape[1], index=index, **settings)
    for start in range(0, len(keys), 40):
        write(memory, keys[start : start + 40])
    return memory


def write(memory: EpisodicMemory, keys: Tensor) -> Tensor:
    return memory.write(keys, torch.arange(len(keys)))


def graphs(memory: EpisodicMemory) -> list[int]:
    """How many nodes each graph has."""
    assert isinstance(memory.index, ApproximateIndex)
    return [len(graph) for graph in memory.index._graphs]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def truth(memory: EpisodicMemory, queries: Tensor, before: int | None = None) -> Tensor:
    """The squared distance of each slot in float64, infinite where there is nothing to see."""
    distances = (memory.keys.double() - queries.double().unsqueeze(1)).square().sum(2)
    hidden = memory.written < 0
    if before is not None:
        hidden = hidden | (memory.written >= before)
    return distances.masked_fill(hidden, torch.inf)


def check(memory: EpisodicMemory, queries: Tensor, neighbors: int, before: int | None = None) -> float:
    """Asserts all that holds of every read, and returns the recall."""
    context = memory.read(queries, neighbors, before=before)
    exact = truth(memory, queries, before)
    count = min(neighbors, len(memory))
    assert context.slots.shape == (len(queries), count)
    found = 0
    for row in range(len(queries)):
        seen = min(count, int(exact[row].isfinite().sum()))
        slots = context.slots[row, :seen]
        assert (slots >= 0).all(), "fewer neighbors than there are"
        assert context.slots[row, seen:].tolist() == [-1] * (count - seen)
        assert context.distances[row, seen:].tolist() == [math.inf] * (count - seen)
        assert len(slots.unique()) == seen, "an entry came twice"
        assert exact[row, slots].isfinite().all(), "an entry that is not there, or not to be seen"
        torch.testing.assert_close(context.distances[row, :seen].double(), exact[row, slots], rtol=1e-5, atol=1e-9)
        order = list(zip(context.distances[row, :seen].tolist(), memory.written[slots].tolist(), strict=True))
        assert order == sorted(order), "not near to far, or equal ones not older first"
        if seen:
            farthest = exact[row].sort().values[seen - 1] * (1 + 1e-5) + 1e-9
            found += int((exact[row, slots] <= farthest).sum())
    total = int(exact.isfinite().sum(1).clamp(max=count).sum())
    return found / max(1, total)


@pytest.fixture(autouse=True)
def _graphs_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs are used although scanning their entries would be faster."""
    monkeypatch.setattr(approximate, "_NODE", 0)


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a read falls back to a scan of everything."""

    def refuse(*args) -> None:
        raise AssertionError("everything was scanned")

    monkeypatch.setattr(ExactIndex, "search", refuse)


def test_it_is_an_index() -> None:
    assert isinstance(ApproximateIndex(), Index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_memory_reads_like_exact_search(dtype: torch.dtype) -> None:
    keys = (features(300, 1) * 10).round().clamp(max=255)
    memory = memory_of(keys, 256, key_dtype=dtype)
    exact = EpisodicMemory(256, 16, key_dtype=dtype)
    exact.load_state_dict(memory.state_dict())
    assert graphs(memory) == []
    queries = features(10, 2) * 10
    assert same(memory.read(queries, 20, before=280), exact.read(queries, 20, before=280))
    large = memory_of(keys[:200], 100_000, key_dtype=dtype)
    assert same(large.read(queries, 20), memory_of(keys[:200], 200, key_dtype=dtype).read(queries, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_all_neighbors_are_found(dtype: torch.dtype, no_scan: None) -> None:
    keys, queries = features(3000, 1) * 10, features(100, 2) * 10
    if dtype == torch.uint8:
        keys = keys.round().clamp(max=255)
    memory = memory_of(keys, 3000, key_dtype=dtype)
    assert sum(graphs(memory)) > 2900
    assert memory.read(queries[0], 5).distances.dtype == compute_dtype(memory.keys)
    for neighbors, bound in ((1, 0.97), (10, 0.98), (50, 0.98)):
        assert check(memory, queries, neighbors) >= bound


@pytest.mark.parametrize("drift", [False, True])
def test_recall_outlives_the_ring(drift: bool, no_scan: None) -> None:
    memory = memory_of(features(1, 0), 1000)
    for half in range(12):
        network = half if drift else 0
        for start in range(0, 500, 50):
            write(memory, features(50, 50 * half + start, network))
        now, old = features(40, 10_000 + half, network), features(40, 20_000 + half, network - 1 if drift else 0)
        if half % 2 or half > 8:
            assert check(memory, now, 30) >= 0.97
            assert check(memory, old.abs(), 30) >= 0.97
            assert len(graphs(memory)) <= 4
            assert sum(graphs(memory)) <= 1000 + 334 + 40


def test_a_beam_widens_where_all_neighbors_are_in_one_graph(no_scan: None) -> None:
    """A first beam of 40 + 56 nodes cannot hold 150 neighbors."""
    keys = torch.cat([features(500, seed, network=seed) + 100 * seed for seed in range(8)])
    assert check(memory_of(keys, 4000, spread=8), features(50, 9, network=5) + 500, 150) >= 0.98


def test_the_newest_entry_is_found_and_the_forgotten_one_is_not() -> None:
    keys = features(2000, 1)
    memory = memory_of(keys, 1000)
    for row in range(100):
        key = features(1, 5000 + row)
        slot = write(memory, key)
        assert memory.read(key[0], 3).slots[0] == slot
        assert memory.read(key[0], 3).distances[0] == 0
        if row % 2:
            memory.forget(slot)
            assert slot not in memory.read(key[0], 500).slots
    for row in range(1100, 2000, 30):  # in graphs
        near = memory.read(keys[row], 5)
        slot = int(near.slots[0])
        assert near.distances[0] == 0
        memory.forget(slot)
        assert slot not in memory.read(keys[row], 5).slots
        write(memory, -keys[row : row + 1] - 100)  # into the slot that is free now
        assert memory.written[slot] == memory.step - 1
        assert slot not in memory.read(keys[row], 5).slots


def test_before_hides_the_younger(no_scan: None) -> None:
    memory = memory_of(features(2500, 1), 2000)
    queries = features(30, 2)
    for before in (2499, 2300, 1500):
        assert check(memory, queries, 20, before) >= 0.97
    limits = torch.arange(1500, 2400, 30)
    batch = memory.read(queries, 20, before=limits)
    for row, limit in enumerate(limits.tolist()):
        assert same(memory.read(queries[row], 20, before=limit)[2:], tuple(part[row] for part in batch[2:]))


def test_before_a_time_when_there_was_little() -> None:
    memory = memory_of(features(2500, 1), 2000)
    queries = features(20, 2)
    assert (memory.read(queries, 20, before=500).slots == -1).all()
    for before in (501, 510, 560):
        assert check(memory, queries, 20, before) >= 0.97


def test_a_batch_is_its_rows_one_by_one() -> None:
    memory = memory_of(features(2500, 1), 2000)
    queries = features(300, 2)
    before = 1000 + 5 * torch.arange(300)
    batch = memory.read(queries, 60, before=before)
    for row in range(0, 300, 17):
        alone = memory.read(queries[row], 60, before=int(before[row]))
        assert same(alone[2:], tuple(part[row] for part in batch[2:]))


def test_the_same_history_gives_the_same_answer() -> None:
    keys, queries = features(2500, 1), features(50, 2)
    first, second = memory_of(keys, 2000, beam=1), memory_of(keys, 2000, beam=1)
    assert check(first, queries, 20) < 1, "some entries are missed: always the same ones"
    assert same(first.read(queries, 20), second.read(queries, 20))
    assert same(first.read(queries, 20), copy.deepcopy(first).read(queries, 20))


def test_many_duplicates() -> None:
    memory = memory_of(features(3, 1).repeat(700, 1), 1500)
    memory.forget(torch.arange(0, 1500, 7))
    queries = torch.cat([features(3, 1), features(5, 2)])
    for neighbors in (1, 10, 200, 700):
        assert check(memory, queries, neighbors) == 1


def test_all_entries_can_be_asked_for() -> None:
    memory = memory_of(features(1500, 1), 1000)
    memory.forget(torch.arange(100, 300))
    for neighbors in (400, 799, 800, 2000):
        assert check(memory, features(4, 2), neighbors) >= 0.97


@pytest.mark.parametrize("cost", [0, 2])
@pytest.mark.parametrize("neighbors", [1, 80, 100])
def test_beams_that_are_much_too_narrow(neighbors: int, cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_NODE", cost)
    memory = EpisodicMemory(4000, 16, index=ApproximateIndex(graphs=16, links=4, beam=1, recent=1))
    write(memory, features(100, 1))
    assert len(graphs(memory)) == 1
    assert check(memory, features(20, 2), neighbors) > 0.4


def test_loading_moving_and_clearing_make_new_graphs(no_scan: None) -> None:
    memory, queries = memory_of(features(2500, 1), 2000), features(50, 2)
    other = memory_of(features(2000, 3) + 50, 2000)
    other.load_state_dict(memory.state_dict())
    assert check(other, queries, 20) >= 0.97
    other.to(torch.float64)
    assert check(other, queries.double(), 20) >= 0.97
    assert sum(graphs(other)) + 16 >= 2000
    write(other, queries)
    assert (other.read(queries, 1).distances == 0).all()
    other.clear()
    assert graphs(other) == []
    assert other.read(queries, 5).slots.shape == (50, 0)


def test_a_memory_that_lost_most_of_its_entries_makes_its_graphs_anew(no_scan: None) -> None:
    g = torch.Generator().manual_seed(1)
    memory = memory_of(features(3000, 1), 3000)
    for turn in range(30):  # a stable part, and a part that is overwritten again and again
        memory.forget(1000 + torch.randperm(2000, generator=g)[:500])
        write(memory, features(500, 100 + turn))
        assert sum(graphs(memory)) <= 2 * 3000 + 3000 // 3 + 256 + 500
    assert len(graphs(memory)) <= 10
    assert check(memory, features(50, 2), 20) >= 0.97


def test_keys_at_the_limits_of_float32() -> None:
    for scale in (1e30, 1e150):  # beyond, everything is scanned
        keys = features(1000, 1, size=4).double() * scale
        assert check(memory_of(keys, 1000, key_dtype=torch.float64), keys[::100], 10) == 1
    far = memory_of(features(1000, 1, size=4) * 1e16, 1000)
    assert check(far, features(20, 2, size=4) * 1e16, 10) >= 0.97


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_autograd(mode) -> None:
    keys, queries = features(1500, 1), features(20, 2)
    expected = memory_of(keys, 1000).read(queries, 10)
    memory = memory_of(keys[:40], 1000)
    with mode():
        for start in range(40, 700, 40):
            write(memory, keys[start : start + 40].clone().requires_grad_(mode is torch.enable_grad))
    for start in range(700, 1500, 40):
        write(memory, keys[start : start + 40])
    assert check(memory, queries, 10) >= 0.97
    with mode():
        assert memory.read(queries, 10).distances.shape == expected.distances.shape


def test_nothing_global_changes(rng_untouched) -> None:
    import faiss

    faiss.omp_set_num_threads(3)  # torch may share the setting
    threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    with rng_untouched():
        memory_of(features(1500, 1), 1000).read(features(20, 2), 10)
    after = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    assert after == threads
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", ["graphs", "links", "beam", "recent"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_settings_are_checked(name: str, value: object, untyped: None) -> None:
    with pytest.raises(SettingError, match=f"{name} must be a whole number (above|of at least)"):
        ApproximateIndex(**{name: value})


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'recollect\[faiss\]'"):
        ApproximateIndex()


# Graphs lie on the CPU and keys on the GPU: without one there is no second device, so nothing can stand in for it.
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: the keys must lie on another device than the graphs"
)
def test_keys_on_a_gpu(no_scan: None) -> None:
    memory = memory_of(features(1500, 1), 1000).cuda()
    write(memory.cpu(), features(40, 3))
    memory = memory.cuda()
    slots = memory.write(features(40, 4).cuda(), torch.arange(40).cuda())
    memory.forget(slots[:10])
    context = memory.read(features(20, 2).cuda(), 10)
    assert context.slots.is_cuda
    distances = truth(memory, features(20, 2).cuda())
    torch.testing.assert_close(context.distances.double(), distances.gather(1, context.slots), rtol=1e-5, atol=1e-9)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int]]:
    actions = st.tuples(st.sampled_from(["write", "write", "write", "forget", "read", "load"]), st.integers(1, 60))
    return [("write", 70), *draw(st.lists(actions, max_size=25)), ("read", 5)]


@given(history=histories(), seed=st.integers(0, 1000), whole=st.booleans(), capacity=st.integers(17, 120))
@settings(max_examples=60)
def test_any_history(history: list[tuple[str, int]], seed: int, whole: bool, capacity: int) -> None:
    """Tiny graphs of 16 nodes and more; whole numbers make ties."""
    g = torch.Generator().manual_seed(seed)
    memory = EpisodicMemory(capacity, 2, index=ApproximateIndex(graphs=4, links=4, beam=3, recent=1))
    for action, number in history:
        keys = torch.randn(number, 2, generator=g)
        keys = (3 * keys).round() if whole else keys
        if action == "write":
            write(memory, keys)
        elif action == "forget":
            memory.forget(torch.randint(capacity, (number,), generator=g))
        elif action == "load":
            memory.load_state_dict(memory.state_dict())
        elif len(memory):
            before = int(torch.randint(int(memory.step) + 1, (), generator=g))
            check(memory, keys[:3], min(number, len(memory)))
            check(memory, keys[:3], min(number, len(memory)), before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_write_leaves_no_entry_out_or_twice(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(features(600, 0), 900)
    add, calls = approximate._Graph.add, []

    def interrupted(self, *arguments) -> None:
        if when == "after":
            add(self, *arguments)
        calls.append(when)
        raise KeyboardInterrupt

    keys = features(60, 1)
    with monkeypatch.context() as patch:
        patch.setattr(approximate._Graph, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(memory, keys)
    assert calls == [when]
    for _ in range(3):
        check(memory, keys[:5], 5)
        assert memory.read(keys[:5], 1).distances.max() == 0
        write(memory, features(40, 2))


def test_moving_survivors_loses_none(no_scan: None) -> None:
    """Of the newest graph, too: it must not take in its own entries before it goes."""
    memory = memory_of(features(900, 0), 900)
    for gone in (slice(300, 900), slice(0, 250)):
        memory.forget(torch.arange(900)[gone])
        alive = (memory.written >= 0).nonzero().squeeze(1)
        for step in range(4):
            write(memory, features(30, 3 + step))
            nearest = memory.read(memory.keys[alive], 1)
            assert bool((nearest.distances == 0).float().mean() > 0.95)
