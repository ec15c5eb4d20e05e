"""What is kept beside the entries is used only while it is true, and changes no prediction."""

import copy
import pickle
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from recollect import Categorical, EpisodicMemory, Gaussian, LocalAdaptation, MbPA, load, rules, save
from recollect.adaptation import entries as entries_module
from recollect.adaptation import kept as kept_module
from recollect.adaptation.entries import add_weighted_rows, distinct
from recollect.adaptation.kept import Kept
from recollect.errors import SettingError
from recollect.memory import Context
from recollect.memory.protocol import Entries

D, C = 3, 5


def linear() -> nn.Module:
    return nn.Linear(D, C)


def behind_a_projection() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, C))


def pair(head: nn.Module, memory: EpisodicMemory, *, steps: int, parameters=None, likelihood=None) -> tuple[MbPA, MbPA]:
    """The same model without and with a table."""
    models = []
    for keep_base in (False, True):
        adaptation = LocalAdaptation(rules.sgd(0.3), steps=steps, parameters=parameters, keep_base=keep_base)
        settings = {"neighbors": 4, "adaptation": adaptation, "likelihood": likelihood or Categorical()}
        models.append(MbPA(head, memory, **settings))
    return models[0], models[1]


def agree(models: tuple[MbPA, MbPA], queries: Tensor) -> None:
    expected, why = models[0](queries), models[0].explain(queries[0])
    for _ in range(2):  # the second time from the table
        torch.testing.assert_close(models[1](queries), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(models[1].explain(queries[0]), why, rtol=1e-10, atol=1e-10)


CHANGES = ["write", "write many", "forget", "clear", "train", "data", "load memory", "load head", "nothing"]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("make", "parameters"), [(linear, None), (linear, ("bias",)), (behind_a_projection, ("2",)), (mlp, None)]
)
@given(changes=st.lists(st.sampled_from(CHANGES), max_size=6), width=st.sampled_from([1, 3, 1024]))
@settings(max_examples=10)
def test_the_table_changes_no_prediction(make, parameters, steps: int, changes: list[str], width: int) -> None:
    g = torch.Generator().manual_seed(0)
    head = make().double()
    memory = EpisodicMemory(7, D, key_dtype=torch.float64)
    queries = torch.randn(3, D, dtype=torch.float64, generator=g)

    def fresh(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, D, dtype=torch.float64, generator=g), torch.randint(C, (count,), generator=g)

    memory.write(*fresh(5))
    old_memory, old_head = copy.deepcopy(memory.state_dict()), copy.deepcopy(head.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_module, "_WIDTH", width)
        models = pair(head, memory, steps=steps, parameters=parameters)
        agree(models, queries)
        for change in changes:
            if change.startswith("write"):
                memory.write(*fresh(9 if change == "write many" else 1))
            elif change == "forget":
                memory.forget(torch.tensor([1, 3]))
            elif change == "clear":
                memory.clear()
                memory.write(*fresh(2))
            elif change == "train":
                loss = nn.functional.cross_entropy(head(queries), torch.tensor([0, 1, 2]))
                torch.optim.SGD(head.parameters(), 0.5).zero_grad()
                loss.backward()
                torch.optim.SGD(head.parameters(), 0.5).step()
            elif change == "data":
                next(head.parameters()).data[0] += 0.5  # leaves no trace but the numbers
            elif change == "load memory":
                memory.load_state_dict(old_memory)
            elif change == "load head":
                head.load_state_dict(old_head)
            agree(models, queries)


def test_the_value_belongs_to_the_entry() -> None:
    """A correction: the same key in the same slot, another label."""
    memory = EpisodicMemory(1, D)
    models = pair(linear(), memory, steps=1)
    for label in (0, 3, 3, 1):
        memory.write(torch.ones(1, D), torch.tensor([label]))
        assert torch.allclose(*(model(torch.ones(1, D)) for model in models), atol=1e-6)
        assert int(models[1](torch.ones(D)).argmax()) == label


@pytest.mark.parametrize("steps", [1, 2])
def test_vectors_as_values_and_places_that_nothing_fills(steps: int) -> None:
    g = torch.Generator().manual_seed(1)
    memory = EpisodicMemory(6, D, value_shape=(C,), value_dtype=torch.float32)
    memory.write(torch.randn(6, D, generator=g), torch.randn(6, C, generator=g))
    plain, model = pair(linear(), memory, steps=steps, likelihood=Gaussian())
    queries, before = torch.randn(4, D, generator=g), torch.tensor([0, 1, 3, 6])
    for _ in range(2):
        torch.testing.assert_close(model(queries, before=before), plain(queries, before=before))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_in_another_precision(head_dtype: torch.dtype, steps: int) -> None:
    memory = EpisodicMemory(6, D, value_shape=(C,), value_dtype=torch.float64)
    memory.write(torch.randn(4, D), torch.randn(4, C, dtype=torch.float64))
    head, queries = linear(), torch.randn(3, D)
    models = pair(copy.deepcopy(head).to(head_dtype), memory, steps=steps, likelihood=Gaussian())
    exact = pair(head.double(), memory, steps=steps, likelihood=Gaussian())[0]
    tolerance = 0.05 if head_dtype == torch.bfloat16 else 1e-5
    for _ in range(2):
        for model in models:
            outputs = model(queries)
            assert outputs.dtype == head_dtype
            torch.testing.assert_close(outputs.double(), exact(queries), rtol=tolerance, atol=tolerance)
        memory.float()  # the table must not stay behind
        memory.write(torch.randn(1, D), torch.randn(1, C))


def test_rows_that_were_not_finished_do_not_count() -> None:
    """An interrupt while the rows of new entries are put in, after which the old entries come back."""
    rows, place = torch.randn(2, 4), torch.zeros(1, 1, dtype=torch.long)
    old, new = (
        Entries(torch.tensor([0]), torch.full((1, D), float(which)), torch.zeros(1), place, place.float())
        for which in (0, 1)
    )
    table = Kept()
    table.update(old, (), lambda keys, values: rows[:1])

    class Breaks(Tensor):
        def split(self, *args):
            yield rows[1:]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.update(new, (), lambda keys, values: rows[1:].as_subclass(Breaks))
    table.update(old, (), lambda keys, values: rows[:1])
    assert torch.equal(table.rows(place)[0], rows[:1])


def test_a_table_that_could_not_grow_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = EpisodicMemory(40, D)
    memory.write(torch.randn(4, D), torch.randint(C, (4,)))
    models = pair(linear(), memory, steps=1)
    queries = torch.randn(3, D)
    models[1](queries)
    memory.write(torch.randn(36, D), torch.randint(C, (36,)))
    zeros, calls = Tensor.new_zeros, []

    def full(self, *shape, **settings):
        calls.append(shape)
        if len(calls) == 3:
            raise MemoryError
        return zeros(self, *shape, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", full)
        with pytest.raises(MemoryError):
            models[1](queries)
    torch.testing.assert_close(models[1](queries), models[0](queries))


def test_what_is_known_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    gradient = Categorical.gradient
    monkeypatch.setattr(
        Categorical,
        "gradient",
        lambda self, outputs, values: computed.append(len(outputs)) or gradient(self, outputs, values),
    )
    memory = EpisodicMemory(8, D)
    memory.write(torch.randn(8, D), torch.zeros(8, dtype=torch.long))
    _, model = pair(linear(), memory, steps=1)
    model.neighbors = 8
    model(torch.randn(5, D))
    assert sum(computed) == 8 + 1  # one row more to learn how wide rows are
    model(torch.randn(5, D))
    assert sum(computed) == 9
    memory.write(torch.randn(2, D), torch.zeros(2, dtype=torch.long))
    model(torch.randn(5, D))
    assert sum(computed) == 11


def test_what_frozen_layers_make_of_a_key_is_not_computed_again() -> None:
    memory, seen = EpisodicMemory(8, D), []

    class Counting(nn.Linear):
        def forward(self, keys: Tensor) -> Tensor:
            seen.append(len(keys))
            return super().forward(keys)

    memory.write(torch.randn(8, D), torch.zeros(8, dtype=torch.long))
    head = nn.Sequential(Counting(D, 4), nn.Linear(4, C))
    plain, model = pair(head, memory, steps=1, parameters=("1",))
    plain.neighbors = model.neighbors = 8
    for new, expected in ((0, 8 + 1), (0, 0), (2, 2)):  # one row more to learn how wide rows are
        memory.write(torch.randn(new, D), torch.zeros(new, dtype=torch.long))
        seen.clear()
        outputs = model(torch.randn(5, D))
        assert sum(seen) == expected + 5 + 1, "beside the queries, and one to check the head"
        assert outputs.shape == (5, C)
    queries = torch.randn(5, D)
    torch.testing.assert_close(model(queries), plain(queries))


def test_copies_and_saves_are_without_the_table(tmp_path) -> None:
    memory = EpisodicMemory(8, D)
    memory.write(torch.randn(8, D), torch.zeros(8, dtype=torch.long))
    _, model = pair(linear(), memory, steps=1)
    queries = torch.randn(5, D)
    expected = model(queries)
    assert torch.equal(copy.deepcopy(model)(queries), expected)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded(queries), expected)
    assert loaded.adaptation.keep_base
    table = Kept()
    table._known = torch.ones(3, dtype=torch.bool)
    assert len(pickle.loads(pickle.dumps(table))._known) == len(copy.deepcopy(table)._known) == 0


def test_threads_do_not_mix_their_rows() -> None:
    """Two memories that share an adapter in turns: their slots hold other entries each time."""
    g = torch.Generator().manual_seed(2)
    model = pair(linear(), EpisodicMemory(4, D), steps=1)[1]
    contexts = []
    for _ in range(2):
        memory = EpisodicMemory(4, D)
        memory.write(torch.randn(4, D, generator=g), torch.randint(C, (4,), generator=g))
        contexts.append(memory.read(torch.zeros(2, D), 4))
    with torch.no_grad():
        expected = [model._adapter(torch.ones(2, D), context) for context in contexts]
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.no_grad():
            outputs = [model._adapter(torch.ones(2, D), contexts[which]) for _ in range(200)]
        wrong.extend(which for output in outputs if not torch.equal(output, expected[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("head", "rule", "steps"),
    [
        (linear(), rules.adam(0.1), 1),
        (linear(), rules.sgd(0.1), 0),
        (nn.Sequential(nn.LayerNorm(D), nn.Linear(D, C)), rules.sgd(0.1), 1),
    ],
)
def test_what_cannot_be_kept_is_refused(head, rule, steps: int) -> None:
    memory = EpisodicMemory(4, D)
    with pytest.raises(SettingError, match=r"keep_base=True needs rules\.sgd"):
        MbPA(head, memory, neighbors=2, adaptation=LocalAdaptation(rule, steps=steps, keep_base=True))


@given(
    queries=st.integers(1, 6),
    neighbors=st.integers(1, 5),
    slots=st.integers(1, 9),
    tile=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_weighted_rows_are_a_sum_over_neighbors(queries, neighbors, slots, tile, dtype, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    all_keys = torch.randn(slots, D, dtype=dtype, generator=g)
    at = torch.randint(slots, (queries, neighbors), generator=g)
    shares = torch.randn(queries, neighbors, dtype=dtype, generator=g)
    context = Context(all_keys[at], at, shares, shares, at)
    outputs = torch.randn(queries, C, dtype=dtype, generator=g)
    weight = torch.randn(C, D, dtype=dtype, generator=g)
    rows = all_keys @ weight.mT + torch.arange(slots)[:, None]
    expected = outputs + torch.stack(
        [sum(shares[b, k] * rows[at[b, k]] for k in range(neighbors)) for b in range(queries)]
    )
    entries = distinct(context)
    assert entries.slots.tolist() == sorted(set(at.reshape(-1).tolist()))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10

    def compute(keys: Tensor, values: Tensor) -> Tensor:
        return keys @ weight.mT + values[:, None]

    table = Kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recollect.adaptation.entries._TILE", tile)
        patch.setattr("recollect.adaptation.entries._FEWEST", 1)
        patch.setattr(kept_module, "_CHUNK", tile)
        patch.setattr(kept_module, "_WIDTH", 1 + tile % 7)
        total = add_weighted_rows(outputs.clone(), shares, entries, compute)
        table.update(entries, (weight,), compute)
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(outputs + table.weighted_sum(at, shares), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(table.rows(at), rows[at], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("many", [0, 1000])
def test_dots_are_with_a_query_s_own_keys(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product with all keys, or repeated keys in tiles of two queries."""
    monkeypatch.setattr(entries_module, "_MANY", many)
    monkeypatch.setattr(entries_module, "_TILE", 2 * 4 * D * 8)
    queries, keys = torch.randn(5, D, dtype=torch.float64), torch.randn(9, D, dtype=torch.float64)
    place = torch.randint(9, (5, 4))
    expected = torch.stack([keys[place[row]] @ queries[row] for row in range(5)])
    torch.testing.assert_close(entries_module.dots(queries, keys, place), expected)


def test_entries_without_an_entry() -> None:
    """Only places that nothing fills: nothing is stored for them."""
    table = Kept()
    place = torch.zeros(1, 2, dtype=torch.long)
    nothing = Entries(torch.tensor([-1]), torch.zeros(1, D), torch.zeros(1), place, place.float())
    table.update(nothing, (), lambda keys, values: keys)
    slots = torch.tensor([[-1, -1]])
    assert table.weighted_sum(slots, torch.zeros(1, 2)).shape == (1, D)
