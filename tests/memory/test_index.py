"""Reading finds the true nearest entries, whatever the data, the dtype, the batch and the block size."""

import math
from collections.abc import Callable
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from recollect import EpisodicMemory
from recollect.kernels import dot_product, gaussian, inverse_distance
from recollect.memory import exact, index, scan
from recollect.memory.exact import ExactIndex
from recollect.memory.index import Neighbors, compute_dtype, exact_distances

KERNELS = [inverse_distance(epsilon=0.5), gaussian(bandwidth=2.0), dot_product(flatness=0.3)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]


def filled(keys: Tensor, capacity: int | None = None, **settings) -> EpisodicMemory:
    memory = EpisodicMemory(capacity or len(keys), keys.shape[1], **settings)
    memory.write(keys, torch.arange(len(keys)))
    return memory


def brute_force(memory: EpisodicMemory, query: Tensor, before: int | None) -> list[tuple[float, int, int]]:
    """All entries that one query sees as (squared distance in float64, write time, slot), nearest and oldest first."""
    distances = (memory.keys.double() - query.double()).square().sum(1).tolist()
    written = memory.written.tolist()
    seen = [slot for slot, time in enumerate(written) if time >= 0 and (before is None or time < before)]
    return sorted((distances[slot], written[slot], slot) for slot in seen)


def weights_by_hand(kernel: object, query: Tensor, keys: Tensor, distances: Tensor) -> Tensor:
    """The normalized weights of one query in float64, each kernel's formula written out."""
    if isinstance(kernel, inverse_distance):
        raw = 1 / (kernel.epsilon + distances)
    elif isinstance(kernel, gaussian):
        raw = torch.exp(-distances / (2 * kernel.bandwidth**2))
    else:
        assert isinstance(kernel, dot_product)
        raw = torch.exp(kernel.flatness * (keys @ query))
    return raw / raw.sum()


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=["float32", "bfloat16"])
def first_scan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a search may begin, whatever the size of the data and the processor."""
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda device: request.param == "bfloat16")
    monkeypatch.setattr(exact, "_COARSE", 1)
    monkeypatch.setattr(exact, "_MANY", 1)
    if request.param == "bfloat16":
        monkeypatch.setattr(scan, "_FEW", 0)
    return request.param


class Case(NamedTuple):
    """A memory's history and a read, in plain numbers."""

    size: int
    capacity: int
    dtype: torch.dtype
    keys: list[list[int]]
    forgotten: list[int]
    queries: list[list[float]]
    neighbors: int
    before: int | list[int] | None

    def build(self) -> tuple[EpisodicMemory, Tensor, int | Tensor | None]:
        memory = EpisodicMemory(self.capacity, self.size, key_dtype=self.dtype)
        count = len(self.keys)
        memory.write(torch.tensor(self.keys).reshape(count, self.size), torch.arange(count) + 100)
        memory.forget(torch.tensor(self.forgotten, dtype=torch.long))
        before = torch.tensor(self.before, dtype=torch.long) if isinstance(self.before, list) else self.before
        return memory, torch.tensor(self.queries).reshape(len(self.queries), self.size), before

    def limit(self, row: int) -> int | None:
        return self.before[row] if isinstance(self.before, list) else self.before


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small whole-numbered keys: all arithmetic is exact, and equal distances are frequent."""
    size, capacity = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    numbers = st.integers(0, draw(st.integers(0, 4)))
    key = st.lists(numbers, min_size=size, max_size=size)
    keys = draw(st.lists(key, max_size=60))
    rows = draw(st.integers(0, 4))
    shift = draw(st.sampled_from([0.0, 0.5]))  # queries need not be whole numbers where keys are
    queries = [[x - shift for x in query] for query in draw(st.lists(key, min_size=rows, max_size=rows))]
    times = st.integers(-1, len(keys) + 1)
    return Case(
        size,
        capacity,
        draw(st.sampled_from(DTYPES)),
        keys,
        draw(st.lists(st.integers(0, capacity - 1), max_size=5)),
        queries,
        draw(st.integers(1, 50)),
        draw(st.none() | times | st.lists(times, min_size=rows, max_size=rows)),
    )


@given(case=cases())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it holds for all examples
def test_a_read_is_brute_force_with_ties_to_the_older(first_scan: str, case: Case) -> None:
    (memory, queries, before), neighbors = case.build(), case.neighbors
    context = memory.read(queries, neighbors, before=before)
    count = min(neighbors, len(memory))
    assert context.slots.shape == (len(queries), count)
    assert context.keys.dtype == context.weights.dtype == context.distances.dtype == compute_dtype(memory.keys)
    for row, query in enumerate(queries):
        expected = brute_force(memory, query, case.limit(row))[:count]
        found, padding = len(expected), count - len(expected)
        slots = [slot for _, _, slot in expected]
        assert context.slots[row].tolist() == slots + [-1] * padding
        assert context.distances[row].tolist() == [d for d, _, _ in expected] + [math.inf] * padding
        assert context.values[row].tolist() == memory.values[slots].tolist() + [0] * padding
        assert torch.equal(context.keys[row, :found], memory.keys[slots].to(context.keys.dtype))
        assert context.weights[row, found:].tolist() == [0.0] * padding
        if found:
            distances = torch.tensor([d for d, _, _ in expected], dtype=torch.float64)
            weights = weights_by_hand(inverse_distance(1e-3), query, memory.keys[slots], distances)
            torch.testing.assert_close(context.weights[row, :found].double(), weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
@given(case=cases())
def test_reading_all_entries_gives_the_oldest_first(kernel, case: Case) -> None:
    memory, queries, before = case.build()
    context = memory.read(queries, None, kernel=kernel, before=before)
    order = sorted((time, slot) for slot, time in enumerate(memory.written.tolist()) if time >= 0)
    assert context.slots.shape == (len(queries), len(order)) == (len(queries), len(memory))
    for row, query in enumerate(queries.double()):
        limit = case.limit(row)
        seen = [limit is None or time < limit for time, _ in order]
        slots = torch.tensor([slot for _, slot in order], dtype=torch.long)
        keys = memory.keys[slots].double()
        distances = (keys - query).square().sum(1)
        shown = torch.tensor(seen, dtype=torch.bool)
        assert context.slots[row].tolist() == [slot if see else -1 for (_, slot), see in zip(order, seen, strict=True)]
        assert torch.equal(context.values[row], memory.values[slots].where(shown, 0))
        torch.testing.assert_close(context.distances[row].double(), distances.where(shown, math.inf))
        assert torch.equal(context.keys[row][shown].double(), keys[shown])
        expected = torch.zeros(len(order), dtype=torch.float64)
        if any(seen):
            expected[shown] = weights_by_hand(kernel, query, keys[shown], distances[shown])
        torch.testing.assert_close(context.weights[row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_the_formula_normalized(kernel, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(50, 6, generator=g, dtype=dtype), torch.randn(7, 6, generator=g, dtype=dtype)
    memory = filled(keys, key_dtype=dtype)
    for neighbors in (5, 50, None):
        context = memory.read(queries, neighbors, kernel=kernel)
        for row, query in enumerate(queries.double()):
            near = context.keys[row].double()
            weights = weights_by_hand(kernel, query, near, (near - query).square().sum(1))
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(context.weights[row].double(), weights, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("neighbors", [2, None])
@pytest.mark.parametrize(
    ("kernel", "keys", "query", "weights"),
    [
        (gaussian(0.01), [[1.0], [3.0]], 1e6, [0.0, 1.0]),  # exp(-5e15): both underflow
        (gaussian(1e-12), [[1.0], [1.0]], 1e15, [0.5, 0.5]),  # the logarithm overflows, too
        (inverse_distance(1e-60), [[1.0], [3.0]], 1.0, [1.0, 0.0]),  # 1 / 0 in float32
        (dot_product(1e25), [[1e15], [-1e15]], 1e15, [1.0, 0.0]),  # exp(+-inf)
    ],
)
def test_weights_are_numbers_at_the_limits(kernel, keys, query, weights, neighbors) -> None:
    context = filled(torch.tensor(keys)).read(torch.tensor([query]), neighbors, kernel=kernel)
    by_slot = context.weights[context.slots.argsort()]
    assert by_slot.tolist() == weights


# Real-valued data, exact in float32 by the distances' definition, and right to rounding in float64.


def gauss(g: torch.Generator) -> Tensor:
    return torch.randn(600, 16, generator=g)


def features(g: torch.Generator) -> Tensor:
    return torch.randn(600, 16, generator=g).relu()


def offset(g: torch.Generator) -> Tensor:
    return torch.randn(600, 16, generator=g) + 1000


def drift(g: torch.Generator) -> Tensor:
    return 1e-3 * torch.randn(600, 16, generator=g).cumsum(0) + torch.linspace(0, 300, 600).unsqueeze(1)


def clusters(g: torch.Generator) -> Tensor:
    return (20 * torch.randn(6, 16, generator=g)).repeat(100, 1) + 1e-4 * torch.randn(600, 16, generator=g)


def far_clusters(g: torch.Generator) -> Tensor:
    return torch.tensor([[1e4], [-1e4]]).repeat(300, 16) + 0.01 * torch.randn(600, 16, generator=g)


def shell(g: torch.Generator) -> Tensor:
    """Seen from near the center, all keys are equally far but for rounding."""
    half = torch.nn.functional.normalize(torch.randn(300, 16, generator=g)) * 100
    return torch.stack([half, -half], 1).flatten(0, 1)


def duplicates(g: torch.Generator) -> Tensor:
    return torch.randn(3, 16, generator=g).repeat(200, 1)


def equal(g: torch.Generator) -> Tensor:
    return torch.randn(1, 16, generator=g).repeat(600, 1)


def outliers(g: torch.Generator) -> Tensor:
    return torch.randn(600, 16, generator=g) * (1 + 1e3 * (torch.arange(600) % 97 == 0)).unsqueeze(1)


CERTAIN = [gauss, features, offset, outliers]
DOUBTFUL = [clusters, far_clusters, shell, duplicates, equal]
Data = Callable[[torch.Generator], Tensor]


def difficult(data: Data) -> tuple[EpisodicMemory, Tensor]:
    """A memory that went once around its ring, and queries near some of its keys, on others, and elsewhere."""
    g = torch.Generator().manual_seed(3)
    keys = data(g)
    memory = EpisodicMemory(500, keys.shape[1])
    for start in range(0, 600, 50):
        memory.write(keys[start : start + 50], torch.arange(start, start + 50))
    memory.forget(torch.arange(7, 500, 60))
    queries = torch.cat([keys[::60], keys[5::60] + 1e-3 * torch.randn(10, 16, generator=g), keys[9::60] * 1.5])
    if data is shell:
        queries = 1e-5 * torch.randn(30, 16, generator=g)
    return memory, queries


def by_differences(memory: EpisodicMemory, queries: Tensor, neighbors: int, limit: Tensor | None) -> Neighbors:
    order = memory.written.argsort(stable=True)
    order = order[memory.written[order] >= 0]
    distances = (memory.keys[order] - queries.unsqueeze(1)).square().sum(2)
    if limit is not None:
        distances = distances.masked_fill(memory.written[order] >= limit.unsqueeze(1), torch.inf)
    near = distances.argsort(dim=1, stable=True)[:, :neighbors]
    distances = distances.gather(1, near)
    return Neighbors(distances, order[near].masked_fill(distances == torch.inf, -1))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each search could not prove in its first pass."""
    counts: list[int] = []
    settle = ExactIndex._settle

    def spy(self, scan, queries, nearest, rows) -> None:
        counts.append(len(rows))
        settle(self, scan, queries, nearest, rows)

    monkeypatch.setattr(ExactIndex, "_settle", spy)
    return counts


def check(memory: EpisodicMemory, queries: Tensor, neighbors: int, limit: Tensor | None = None) -> None:
    context = memory.read(queries, neighbors, before=limit)
    assert same(context[3:], by_differences(memory, queries, neighbors, limit))
    for row, query in enumerate(queries):
        truth = brute_force(memory, query, None if limit is None else int(limit[row]))
        count = int((context.slots[row] >= 0).sum())
        distances = {slot: distance for distance, _, slot in truth}
        found = torch.tensor([distances[slot] for slot in context.slots[row, :count].tolist()], dtype=torch.float64)
        best = torch.tensor([distance for distance, _, _ in truth[:count]], dtype=torch.float64)
        torch.testing.assert_close(found, best, rtol=1e-5, atol=0)
        torch.testing.assert_close(context.distances[row, :count].double(), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("data", [*CERTAIN, drift, *DOUBTFUL])
def test_real_valued_data(data: Data, first_scan: str, settled: list[int]) -> None:
    memory, queries = difficult(data)
    check(memory, queries, 10)
    check(memory, queries, 10, torch.arange(len(queries)) * 25)
    check(memory, queries, 1)
    check(memory, queries, 480)
    if data in CERTAIN:
        assert sum(settled) == 0, "the first pass should have been enough"
    if data in DOUBTFUL:
        assert max(settled) > 5, "the doubtful path has not run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("data", [*CERTAIN, drift, *DOUBTFUL])
def test_no_distance_lies_below_what_its_score_proves(
    data: Data, coarse: bool, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda device: True)
    memory, queries = difficult(data)
    keys, queries = memory.keys.to(dtype), torch.cat([queries, -queries, queries * 1e-3]).to(dtype)
    found = ExactIndex()
    found.rebuild(keys, memory.written)
    if coarse and dtype == torch.float64:
        assert not found._coarse  # bfloat16 gains nothing there
        return
    fine = found._scan(keys, memory.written, queries, None)
    one_scan = found._coarse_scan(fine) if coarse else fine
    ((_, scores),) = one_scan.blocks()
    truth = (keys.double() - queries.double().unsqueeze(1)).square().sum(2)
    for distances, bounds in zip(truth.T, scores, strict=True):  # slot by slot: one score for each query
        shown = bounds < torch.inf
        assert bool((one_scan.proven(bounds)[shown].double() <= distances[shown]).all())
    proven = torch.stack([one_scan.proven(bounds) for bounds in scores]).T.double()
    loss = ((truth - proven) / (truth + fine.factors.double().square().sum(1, keepdim=True)))[proven < torch.inf]
    if data in (gauss, features, offset):
        assert float(loss.median()) < (0.02 if coarse else 1e-3), "these bounds prove nothing"


@given(
    rows=st.integers(1, 70),
    batch=st.integers(1, 12),
    size=st.integers(1, 9),
    neighbors=st.integers(1, 12),
    scales=st.lists(st.sampled_from([1e-22, 1e-20, 1e-19, 1e-10, 1.0, 1e5, 1e14]), min_size=1, max_size=3),
    offset=st.sampled_from([0.0, 0.0, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_scale(first_scan: str, rows, batch, size, neighbors, scales, offset, dtype, seed) -> None:
    """Of scales whose squares underflow, too, and of several at once."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, size, generator=g, dtype=dtype) + offset
    keys *= torch.tensor(scales, dtype=dtype)[torch.randint(len(scales), (rows, 1), generator=g)]
    queries = keys[torch.randint(rows, (batch,), generator=g)]
    queries = queries + scales[0] * 1e-2 * torch.randn(batch, size, generator=g, dtype=dtype)
    memory = filled(keys, key_dtype=dtype)
    context = memory.read(queries, neighbors)
    assert same(context[3:], by_differences(memory, queries, min(neighbors, rows), None))


def test_scores_of_what_is_hidden_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = scan._Lowest._keep

    def watch(self, scores: Tensor, *places: Tensor) -> None:
        assert bool((scores < torch.inf).all())
        keep(self, scores, *places)

    monkeypatch.setattr(scan._Lowest, "_keep", watch)
    monkeypatch.setattr(scan, "_FEW", 0)
    memory = filled(torch.randn(500, 4))
    assert (memory.read(torch.zeros(3, 4), 9, before=torch.tensor([0, 5, 500])).slots >= 0).sum(1).tolist() == [0, 5, 9]


def test_tiny_keys_find_themselves_in_a_large_batch() -> None:
    keys = torch.randn(1000, 2) * 1e-20
    assert filled(keys).read(keys[:200], 1).slots[:, 0].tolist() == list(range(200))


@given(
    rows=st.integers(1, 300),
    factors=st.integers(1, 9),
    size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    wide=st.sampled_from([0, 512]),
    seed=st.integers(0, 2**32),
)
def test_products_are_products(rows: int, factors: int, size: int, dtype: torch.dtype, wide: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, size, generator=g, dtype=dtype) for count in (rows, factors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_WIDE", wide)
        product = scan.products(a, b)
    assert product.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    expected = (a.double().unsqueeze(1) * b.double()).sum(2)
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_is_tried_again_after_a_pause(first_scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if first_scan == "float32":
        return
    tried: list[bool] = []
    prove = ExactIndex._prove

    def spy(self, scan, *args) -> Tensor:
        tried.append(scan.coarse)
        return prove(self, scan, *args)

    monkeypatch.setattr(ExactIndex, "_prove", spy)
    monkeypatch.setattr(exact, "_PAUSE", 2)
    memory = filled(duplicates(torch.Generator()))
    for _ in range(4):
        memory.read(memory.keys[:5], 3)
    assert tried == [True, False, False, False, True, False]


def test_bfloat16_proves_ordinary_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(8)
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda device: True)
    memory = filled(torch.randn(20_000, 32, generator=g).relu())
    monkeypatch.setattr(scan, "products", None)  # what a scan in float32 would call
    memory.read(torch.randn(200, 32, generator=g).relu(), 10)


def test_more_duplicates_than_candidates(settled: list[int]) -> None:
    memory = filled(torch.ones(500, 3), capacity=300)  # slot 200 holds the oldest entry, of time 200
    context = memory.read(torch.ones(3), 4)
    assert context.values.tolist() == [200, 201, 202, 203]
    assert context.slots.tolist() == [200, 201, 202, 203]
    assert context.weights.tolist() == [0.25] * 4
    memory.forget(201)
    assert memory.read(torch.zeros(3), 4, before=300).values.tolist() == [200, 202, 203, 204]
    assert settled == [1, 1]


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("data", [gauss, offset, drift, clusters, equal])
def test_products_of_low_precision_do_not_change_a_read(data: Data, precision: str) -> None:
    memory, queries = difficult(data)
    expected = memory.read(queries, 10)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert same(memory.read(queries, 10), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["medium", "mixed", "environment"])
@pytest.mark.parametrize("data", [gauss, offset, drift, clusters])
def test_products_that_really_round_their_factors(data: Data, setting: str, settled, monkeypatch) -> None:
    """What "medium" allows, on machines that do not do it."""
    memory, queries = difficult(data)
    expected = memory.read(queries, 10)

    def rounded(keys: Tensor, factors: Tensor) -> Tensor:
        return keys.bfloat16().float() @ factors.bfloat16().float().mT

    def precision() -> str:
        if setting == "mixed":
            raise RuntimeError("the settings of the backends differ")
        return "medium" if setting == "medium" else "highest"

    if setting == "environment":
        monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", precision)
    monkeypatch.setattr(scan, "products", rounded)
    settled.clear()
    assert same(memory.read(queries, 10), expected)
    assert sum(settled) > 0 or data is gauss


@pytest.mark.parametrize("neighbors", [10, None])
def test_autocast_does_not_change_a_read(neighbors: int | None) -> None:
    for kernel in KERNELS:
        memory, queries = difficult(gauss)
        expected = memory.read(queries, neighbors, kernel=kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(memory.read(queries, neighbors, kernel=kernel), expected)
            again, _ = difficult(gauss)  # written under autocast
        assert same(again.read(queries, neighbors, kernel=kernel), expected)


@pytest.mark.parametrize("data", [gauss, offset, clusters, duplicates])
def test_a_batch_is_its_rows_one_by_one(data: Data, first_scan: str) -> None:
    memory, queries = difficult(data)
    queries = torch.cat([queries] * 10)  # more than one search takes at once
    before = torch.arange(len(queries)) * 2
    batch = memory.read(queries, 10, before=before)
    reversed_batch = memory.read(queries.flip(0), 10, before=before.flip(0))
    assert same(batch, tuple(part.flip(0) for part in reversed_batch))
    for row in range(0, len(queries), 37):
        one = memory.read(queries[row], 10, before=int(before[row]))
        assert same(one[2:], tuple(part[row] for part in batch[2:]))
    grid = memory.read(queries.view(2, 150, 16), 10, before=before.view(2, 150))
    assert same(grid, tuple(part.view(2, 150, *part.shape[1:]) for part in batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("data", [gauss, clusters, duplicates])
def test_block_sizes_do_not_matter(
    data: Data, dtype: torch.dtype, first_scan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(4)
    keys = data(g)
    queries, before = keys[::50] + 0.01, torch.arange(12) * 50
    expected = [filled(keys, key_dtype=dtype).read(queries, 7, before=limit) for limit in (None, before)]
    for scratch, gather in ((1, 1), (5000, 600), (20_000, 2000)):
        monkeypatch.setattr(scan, "_SCORES", scratch)
        monkeypatch.setattr(scan, "_CONVERTED", scratch)
        monkeypatch.setattr(scan, "_IMAGES", 2)
        monkeypatch.setattr(scan, "_FEW", 0)
        monkeypatch.setattr(exact, "_CHUNK", scratch)
        monkeypatch.setattr(exact, "_BATCH", 5)
        monkeypatch.setattr(index, "_GATHER", gather)
        memory = filled(keys, key_dtype=dtype)
        for limit, wanted in zip((None, before), expected, strict=True):
            assert same(memory.read(queries, 7, before=limit), wanted)


def test_one_search_works_on_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    index_select, nonzero, products = torch.index_select, Tensor.nonzero, scan.products

    def watch(make):
        def made(*args, **kwargs) -> Tensor:
            nonlocal largest
            result = make(*args, **kwargs)
            largest = max(largest, result.numel() * result.element_size())
            return result

        return made

    memory = filled(torch.zeros(2000, 32))  # all entries are candidates
    monkeypatch.setattr(scan, "_SCORES", 2**16)
    monkeypatch.setattr(exact, "_SETTLED", 2**16)
    monkeypatch.setattr(index, "_GATHER", 2**14)
    monkeypatch.setattr(scan, "products", watch(products))
    monkeypatch.setattr(torch, "index_select", watch(index_select))
    monkeypatch.setattr(Tensor, "nonzero", watch(nonzero))
    memory.read(torch.zeros(40, 32), 3)
    memory.read(torch.zeros(40, 32), 3, before=torch.arange(40) - 20)  # some see nothing
    assert 2**17 < largest <= 2**18  # where all scores are equal: two whole numbers for each


def test_the_center_follows_the_keys(settled: list[int]) -> None:
    """The bounds are useful only while the center is near: after a move of all keys the first pass is enough again."""
    g = torch.Generator().manual_seed(5)
    memory = EpisodicMemory(400, 8)
    for shift in (0.0, 1e3, -1e4):
        for _ in range(16):
            memory.write(torch.randn(50, 8, generator=g) + shift, torch.zeros(50, dtype=torch.long))
        settled.clear()
        check(memory, torch.randn(20, 8, generator=g) + shift, 5)
        assert sum(settled) == 0


def test_empty_slots_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0
    products = scan.products

    def watch(keys: Tensor, factors: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, len(keys))
        return products(keys, factors)

    memory = filled(torch.eye(8), capacity=100_000)
    monkeypatch.setattr(scan, "products", watch)
    assert memory.read(torch.eye(8), 1).values.squeeze(1).tolist() == list(range(8))
    assert widest == 8


def test_exact_distances_keep_what_the_expanded_form_loses() -> None:
    keys = torch.full((4, 2048), 100.0)
    keys[1, 0] += 0.09
    keys[2] += 0.01
    truth = (keys.double() - 100).square().sum(1)
    slots = torch.tensor([[0, 1, 2, 3]])
    torch.testing.assert_close(exact_distances(keys[:1], keys, slots)[0].double(), truth, rtol=1e-5, atol=0)
    expanded = keys.square().sum(1) - 2 * keys @ keys[0] + keys[0].square().sum()
    assert float((expanded[1] - truth[1]).abs()) > 0.5 * float(truth[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reading_all_entries_keeps_small_distances(dtype: torch.dtype) -> None:
    shift = 1e3 if dtype == torch.float32 else 1e8
    g = torch.Generator().manual_seed(6)
    keys = torch.randn(40, 8, generator=g, dtype=dtype) + shift
    memory = filled(keys, key_dtype=dtype)
    context = memory.read(keys[:5] + 2**-7, None)
    truth = (keys.double() - (keys[:5] + 2**-7).double().unsqueeze(1)).square().sum(2)
    torch.testing.assert_close(context.distances.double(), truth, rtol=1e-6, atol=1e-12)


class BruteForce:
    """An index as a user may write it: it keeps nothing, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def rebuild(self, keys: Tensor, written: Tensor) -> None:
        self.calls.append("rebuild")

    def update(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        assert len(slots) > 0
        self.calls.append("update")

    def search(
        self, keys: Tensor, written: Tensor, queries: Tensor, neighbors: int, before: Tensor | None
    ) -> Neighbors:
        assert len(queries) > 0
        assert 1 <= neighbors <= int((written >= 0).sum())
        assert queries.dtype == compute_dtype(keys)
        order = written.argsort(stable=True)
        distances = (keys[order].to(queries.dtype) - queries.unsqueeze(1)).square().sum(2)
        hidden = (written[order] < 0).expand(distances.shape)
        if before is not None:
            hidden = hidden | (written[order] >= before.unsqueeze(1))
        near = distances.masked_fill(hidden, torch.inf).sort(dim=1, stable=True)
        slots = order[near.indices[:, :neighbors]]
        return Neighbors(near.values[:, :neighbors], slots.masked_fill(near.values[:, :neighbors] == torch.inf, -1))


@given(cases())
def test_an_index_of_ones_own(case: Case) -> None:
    (memory, queries, before), neighbors = case.build(), case.neighbors
    index = BruteForce()
    other = EpisodicMemory(memory.capacity, memory.key_size, key_dtype=memory.keys.dtype, index=index)
    assert index.calls == ["rebuild"]
    other.load_state_dict(memory.state_dict())
    other.to(torch.float32 if memory.keys.dtype == torch.uint8 else memory.keys.dtype)
    assert index.calls == ["rebuild"] * 3
    assert same(other.read(queries, neighbors, before=before), memory.read(queries, neighbors, before=before))
    index.calls.clear()
    slot = other.write(torch.zeros(1, other.key_size), torch.tensor([0]))
    other.write(torch.zeros(0, other.key_size), torch.zeros(0, dtype=torch.long))
    other.forget(slot)
    other.forget(slot)
    other.clear()
    assert index.calls == ["update", "update", "rebuild"]


def test_exact_search_by_itself() -> None:
    memory = filled(torch.tensor([[0.0], [2.0], [1.0]]))
    found = ExactIndex()
    found.rebuild(memory.keys, memory.written)
    distances, slots = found.search(memory.keys, memory.written, torch.tensor([[1.25]]), 2)
    assert slots.tolist() == [[2, 1]]
    assert distances.tolist() == [[0.0625, 0.5625]]
