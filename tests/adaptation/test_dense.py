"""The dense engine is the general one and Algorithm 1, as a whole and in tiles, and is built only where it is."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algorithm1
from torch import Tensor, nn

from recollect import Categorical, EpisodicMemory, Gaussian, rules
from recollect.adaptation import Head, dense, entries
from recollect.adaptation.dense import Dense
from recollect.adaptation.general import General
from recollect.likelihoods import Likelihood

KEY, CLASSES, ENTRIES, QUERIES = 8, 5, 12, 6
DOUBLE = torch.float64
RULES = {
    "rmsprop": (rules.rmsprop(0.05, epsilon=1e-4), lambda ps: torch.optim.RMSprop(ps, lr=0.05, eps=1e-4)),
    "adam": (rules.adam(0.1, epsilon=1e-4), lambda ps: torch.optim.Adam(ps, lr=0.1, eps=1e-4)),
}
PREFIXES: dict[str, Callable[[int], list[nn.Module]]] = {
    "none": lambda size: [],
    "in place": lambda size: [nn.LeakyReLU(0.3, inplace=True), nn.Dropout(0.5)],
    "network": lambda size: [nn.Sequential(nn.Linear(size, 4), nn.LayerNorm(4)), nn.Tanh()],
}


def built(
    module: nn.Module,
    names: tuple[str, ...] | None,
    rule: rules.Rule,
    *,
    steps: int = 3,
    prior: float = 0.0,
    likelihood: Likelihood | None = None,
    chunk_size: int | None = None,
) -> tuple[Dense | None, General]:
    head, settings = Head(module), {"rule": rule, "steps": steps, "prior": prior, "chunk_size": chunk_size}
    arguments = head, likelihood or Categorical(), head.select(names)
    return Dense.build(*arguments, **settings), General(*arguments, **settings)


def remember(keys: Tensor, values: Tensor) -> EpisodicMemory:
    shape, dtypes = tuple(values.shape[1:]), {"value_dtype": values.dtype, "key_dtype": keys.dtype}
    memory = EpisodicMemory(len(keys), keys.shape[1], value_shape=shape, **dtypes)
    memory.write(keys, values)
    return memory


def labeled(dtype: torch.dtype = DOUBLE) -> tuple[EpisodicMemory, Tensor]:
    memory = remember(torch.randn(ENTRIES, KEY, dtype=dtype), torch.randint(CLASSES, (ENTRIES,)))
    return memory, torch.randn(QUERIES, KEY, dtype=dtype)


def room(classes: int, width: int, dtype: torch.dtype) -> int:
    return classes * 5 * width * (8 if dtype == DOUBLE else 4)


@settings(max_examples=120)
@given(
    prefix=st.sampled_from(list(PREFIXES)),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    bias=st.booleans(),
    adapting=st.sampled_from([("weight",), ("bias",), ("weight", "bias")]),
    regression=st.booleans(),
    rule=st.sampled_from(list(RULES)),
    steps=st.integers(1, 4),
    prior=st.sampled_from([0.0, 0.3]),
    neighbors=st.integers(1, 6),
    queries=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
    classes=st.sampled_from([1, 2, 3, 4, 7, 12, 20, 1000]),
    shared=st.sampled_from([1, 1000, 2**20]),
    chunk_size=st.sampled_from([None, None, 1, 2]),
    seed=st.integers(0, 2**32),
)
def test_dense_is_general(
    prefix,
    sizes,
    bias,
    adapting,
    regression,
    rule,
    steps,
    prior,
    neighbors,
    queries,
    dtype,
    classes,
    shared,
    chunk_size,
    seed,
) -> None:
    (size, outputs), generator = sizes, torch.Generator().manual_seed(seed)
    front = PREFIXES[prefix](size)
    width = 4 if prefix == "network" else size
    last = nn.Linear(width, outputs, bias=bias or "bias" in adapting)
    head = nn.Sequential(*front, last).to(dtype)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -1.0, 1.0, generator=generator)
    keys = torch.randn(6, size, generator=generator, dtype=dtype)
    keys[-1] = keys[0]  # a duplicate
    labels = torch.randint(outputs, (6,), generator=generator)
    values = torch.randn(6, outputs, generator=generator, dtype=dtype) if regression else labels
    rows = torch.randn(queries, size, generator=generator, dtype=dtype)
    context = remember(keys, values).read(rows, neighbors)
    names = tuple(f"{len(front)}.{name}" for name in adapting)
    likelihood = Gaussian(variance=2.0) if regression else Categorical()
    # A large epsilon: where a gradient is nearly 0, its sign is an accident that the rules would make a whole step of.
    chosen = rules.rmsprop(0.1, epsilon=0.1) if rule == "rmsprop" else rules.adam(0.1, epsilon=0.1)
    settings = {"steps": steps, "prior": prior, "likelihood": likelihood, "chunk_size": chunk_size}
    engine, general = built(head, names, chosen, **settings)
    assert engine is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_BUDGET", room(classes, width, dtype))
        patch.setattr(entries, "_SHARED", shared)
        actual = engine(rows.clone(), context)
    tolerance = 1e-10 if dtype == DOUBLE else 1e-4
    torch.testing.assert_close(actual, general(rows.clone(), context), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("adapting", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("name", RULES)
def test_dense_is_algorithm_1(monkeypatch: pytest.MonkeyPatch, name: str, adapting: tuple, classes: int) -> None:
    monkeypatch.setattr(dense, "_BUDGET", room(classes, KEY, DOUBLE))
    head, (rule, optimizer), (memory, queries) = nn.Linear(KEY, CLASSES).double(), RULES[name], labeled()
    settings = {"optimizer": optimizer, "adapts": adapting.__contains__, "neighbors": 4, "steps": 4, "prior": 0.1}
    one_by_one = [algorithm1.mbpa_test(head, memory.keys, memory.values, query, **settings) for query in queries]
    engine, _ = built(head, adapting, rule, steps=4, prior=0.1)
    assert engine is not None
    actual = engine(queries, memory.read(queries, 4))
    torch.testing.assert_close(actual, torch.stack(one_by_one), rtol=1e-10, atol=1e-10)


def test_places_that_nothing_fills() -> None:
    memory, queries = labeled()
    context = memory.read(queries, 4, before=torch.tensor([0, 1, 2, 3, 5, 12]))
    for name in RULES:
        engine, general = built(nn.Linear(KEY, CLASSES).double(), None, RULES[name][0], prior=0.1)
        assert engine is not None
        torch.testing.assert_close(engine(queries, context), general(queries, context), rtol=1e-10, atol=1e-10)


def test_values_in_another_precision() -> None:
    keys, queries = torch.randn(ENTRIES, KEY), torch.randn(QUERIES, KEY)
    context = remember(keys, torch.randn(ENTRIES, CLASSES, dtype=DOUBLE)).read(queries, 4)
    engine, general = built(nn.Linear(KEY, CLASSES), None, rules.adam(0.1, epsilon=0.1), likelihood=Gaussian())
    assert engine is not None
    actual = engine(queries, context)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, general(queries, context), rtol=1e-4, atol=1e-4)


def test_half_precision() -> None:
    memory, queries = labeled(torch.float32)
    context = memory.read(queries, 4)
    floats = {name: getattr(context, name).bfloat16() for name in ("keys", "weights", "distances")}
    head = nn.Linear(KEY, CLASSES).bfloat16()
    engine, general = built(head, None, rules.rmsprop(0.05, epsilon=0.1), prior=0.1)
    assert engine is not None
    actual = engine(queries.bfloat16(), context._replace(**floats))
    assert actual.dtype == torch.bfloat16
    expected = general(queries.bfloat16(), context._replace(**floats))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_head_and_context_stay_as_they_are() -> None:
    head, (memory, queries) = nn.Linear(KEY, CLASSES).double(), labeled()
    context = memory.read(queries, 4)
    watched = {**dict(head.named_parameters()), **context._asdict(), "queries": queries}
    before = {name: tensor.detach().clone() for name, tensor in watched.items()}
    engine, _ = built(head, None, rules.adam(0.1), prior=0.1)
    assert engine is not None
    first = engine(queries, context)
    assert torch.equal(engine(queries, context), first)
    assert not first.requires_grad
    assert all(torch.equal(watched[name], tensor) for name, tensor in before.items())


# Where it is built


def hooked() -> nn.Module:
    head = nn.Linear(KEY, KEY)
    head.register_forward_hook(lambda module, args, output: 2 * output)
    return head


def tied() -> nn.Module:
    head = nn.Sequential(nn.Linear(KEY, KEY), nn.ReLU(), nn.Linear(KEY, KEY))
    head[2].weight = head[0].weight
    return head


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(KEY, KEY), nn.ReLU(), nn.Linear(KEY, KEY))


class Doubled(nn.Linear):
    def forward(self, keys: Tensor) -> Tensor:
        return 2 * super().forward(keys)


@pytest.mark.parametrize("rule", [rules.rmsprop(0.1), rules.adam(0.1)], ids=["rmsprop", "adam"])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Linear(KEY, KEY), None),
        (lambda: nn.Linear(KEY, KEY), ("bias",)),
        (mlp, ("2",)),
        (lambda: nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(KEY, KEY), nn.Dropout())), None),
        (lambda: nn.Sequential(Doubled(KEY, KEY), nn.PReLU(), nn.Linear(KEY, KEY)), ("2.weight",)),
    ],
)
def test_built_for_the_last_linear_layer(make: Callable, names: tuple | None, rule: rules.Rule) -> None:
    assert built(make(), names, rule)[0] is not None


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (mlp, None),
        (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.Linear(KEY, KEY)), None),
        (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.Linear(KEY, KEY)), ("0",)),  # a frozen layer behind
        (tied, ("2",)),
        (hooked, None),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(KEY, KEY)), None),
        (lambda: Doubled(KEY, KEY), None),
        (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.ReLU()), None),
        (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.LogSoftmax(-1)), None),
        (lambda: nn.Sequential(nn.LayerNorm(KEY), nn.Linear(KEY, KEY)), None),
    ],
)
def test_not_built_for_other_heads(make: Callable, names: tuple | None) -> None:
    assert built(make(), names, rules.rmsprop(0.1))[0] is None


class Slower(rules.rmsprop):
    def update(self, grads, state, params, loss):
        delta, state = super().update(grads, state, params, loss)
        return {name: d / 2 for name, d in delta.items()}, state


@pytest.mark.parametrize("rule", [rules.sgd(0.1), rules.sgd(0.1, momentum=0.5), Slower(0.1)], ids=str)
def test_not_built_for_other_rules(rule: rules.Rule) -> None:
    assert built(nn.Linear(KEY, KEY), None, rule)[0] is None


def test_not_built_for_no_steps() -> None:
    assert built(nn.Linear(KEY, KEY), None, rules.adam(0.1), steps=0)[0] is None


def test_large_head_is_never_copied_as_a_whole() -> None:
    """No allocation during the steps is as large as a tenth of the weights, apart from the state they start with."""
    head = nn.Linear(1024, 2048)  # 8 MB
    memory = remember(torch.randn(ENTRIES, 1024), torch.randint(2048, (ENTRIES,)))
    queries = torch.randn(8, 1024)
    engine, _ = built(head, None, rules.rmsprop(1e-3), steps=2)
    assert engine is not None
    context = memory.read(queries, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        engine(queries, context)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20
