"""The general engine is Algorithm 1; the factored engine is the general one, and is used exactly where it may be."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algorithm1
from torch import Tensor, nn

from recollect import Categorical, Context, EpisodicMemory, Gaussian, LocalAdaptation, MbPA, rules
from recollect.adaptation import Head, factored
from recollect.adaptation.dense import Dense
from recollect.adaptation.factored import Factored
from recollect.adaptation.general import General
from recollect.adaptation.layers import ELEMENTWISE
from recollect.likelihoods import Likelihood

KEY, CLASSES, ENTRIES, QUERIES = 8, 4, 12, 5
DOUBLE = torch.float64
LABELS = Categorical()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class Normed(nn.Module):
    """A head that is no Sequential: residual, with LayerNorm and a function in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(KEY)
        self.inner = nn.Linear(KEY, KEY)
        self.outer = nn.Linear(KEY, CLASSES)

    def forward(self, keys: Tensor) -> Tensor:
        return self.outer(keys + torch.nn.functional.silu(self.inner(self.norm(keys)), inplace=True))


def batch_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(6)
    norm.running_mean = torch.linspace(-1, 1, 6)
    norm.running_var = torch.linspace(0.5, 2, 6)
    return norm


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(KEY, CLASSES),
    "no bias": lambda: nn.Linear(KEY, CLASSES, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(KEY, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)),
    "layer norm": Normed,
    "batch norm": lambda: nn.Sequential(nn.Linear(KEY, 6), batch_norm(), nn.ReLU(), nn.Linear(6, CLASSES)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(-1, (2, 4)), nn.Conv1d(2, 3, 3, padding=1), nn.PReLU(), nn.Flatten(), nn.Linear(12, CLASSES)
    ),
    "in place first": lambda: nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(KEY, CLASSES)),
}
RULES: dict[str, tuple[rules.Rule, algorithm1.Optimizer]] = {
    "sgd": (rules.sgd(0.5), lambda ps: torch.optim.SGD(ps, lr=0.5)),
    "momentum": (rules.sgd(0.3, momentum=0.8), lambda ps: torch.optim.SGD(ps, lr=0.3, momentum=0.8)),
    "rmsprop": (rules.rmsprop(0.05, epsilon=1e-4), lambda ps: torch.optim.RMSprop(ps, lr=0.05, eps=1e-4)),
    "adam": (rules.adam(0.1, epsilon=1e-4), lambda ps: torch.optim.Adam(ps, lr=0.1, eps=1e-4)),
}


def remember(outputs: int | None = None) -> EpisodicMemory:
    shape, dtype = ((), torch.long) if outputs is None else ((outputs,), DOUBLE)
    memory = EpisodicMemory(ENTRIES, KEY, value_shape=shape, value_dtype=dtype, key_dtype=DOUBLE)
    keys = torch.randn(ENTRIES, KEY, dtype=DOUBLE)
    memory.write(keys, torch.randint(CLASSES, (ENTRIES,)) if outputs is None else torch.randn(ENTRIES, outputs))
    return memory


class Case(NamedTuple):
    memory: EpisodicMemory
    queries: Tensor
    neighbors: int

    @property
    def context(self) -> Context:
        return self.memory.read(self.queries, self.neighbors)

    def oracle(self, head: nn.Module, **settings) -> Tensor:
        keys, values = self.memory.keys, self.memory.values
        one = [
            algorithm1.mbpa_test(head, keys, values, query, neighbors=self.neighbors, **settings)
            for query in self.queries
        ]
        return torch.stack(one)


def case(outputs: int | None = None, neighbors: int = 4) -> Case:
    return Case(remember(outputs), torch.randn(QUERIES, KEY, dtype=DOUBLE), neighbors)


def general(
    head: nn.Module,
    rule: rules.Rule,
    steps: int,
    *,
    likelihood: Likelihood = LABELS,
    prior: float = 0.0,
    parameters: tuple[str, ...] | None = None,
    chunk_size: int | None = None,
) -> General:
    wrapped = Head(head)
    names = wrapped.select(parameters)
    return General(wrapped, likelihood, names, rule=rule, steps=steps, prior=prior, chunk_size=chunk_size)


# General = Algorithm 1


@pytest.mark.parametrize("prior", [0.0, 0.2])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", HEADS)
def test_general_is_algorithm_1(kind: str, name: str, prior: float) -> None:
    head, (rule, optimizer), data = HEADS[kind]().double(), RULES[name], case()
    outputs = general(head, rule, 3, prior=prior)(data.queries, data.context)
    close(outputs, data.oracle(head, optimizer=optimizer, steps=3, prior=prior))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["linear", "mlp", "layer norm"])
def test_regression_is_algorithm_1(kind: str, name: str) -> None:
    head, (rule, optimizer), data = HEADS[kind]().double(), RULES[name], case(outputs=CLASSES)
    model = MbPA(
        head,
        data.memory,
        neighbors=4,
        adaptation=LocalAdaptation(rule, steps=3, prior=0.1),
        likelihood=Gaussian(),
    )
    settings = {"optimizer": optimizer, "steps": 3, "prior": 0.1, "loss": algorithm1.gaussian}
    close(model(data.queries), data.oracle(head, **settings))
    outputs = general(head, rule, 3, prior=0.1, likelihood=Gaussian())(data.queries, data.context)
    close(outputs, data.oracle(head, **settings))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["linear", "mlp", "batch norm", "convolution"])
def test_layer_is_algorithm_1(kind: str, name: str) -> None:
    """The whole path, with the memory's search and weights and whichever engine MbPA picks."""
    head, (rule, optimizer), data = HEADS[kind]().double(), RULES[name], case(neighbors=ENTRIES - 3)
    model = MbPA(head, data.memory, neighbors=data.neighbors, adaptation=LocalAdaptation(rule, steps=4, prior=0.1))
    close(model(data.queries), data.oracle(head, optimizer=optimizer, steps=4, prior=0.1).log_softmax(-1))


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("parameters", [("0.weight",), ("2.bias",), ("2",), ("0", "4.bias"), ("0.bias", "2.weight")])
def test_parameters_that_are_not_named_stay(name: str, parameters: tuple[str, ...]) -> None:
    head, (rule, optimizer), data = HEADS["mlp"]().double(), RULES[name], case()

    def adapts(parameter: str) -> bool:
        return any(parameter in (chosen, f"{chosen}.weight", f"{chosen}.bias") for chosen in parameters)

    expected = data.oracle(head, optimizer=optimizer, steps=3, adapts=adapts)
    close(general(head, rule, 3, parameters=parameters)(data.queries, data.context), expected)
    adaptation = LocalAdaptation(rule, steps=3, parameters=parameters)
    model = MbPA(head, data.memory, neighbors=data.neighbors, adaptation=adaptation)
    close(model(data.queries), expected.log_softmax(-1))


@pytest.mark.parametrize("parameters", [("weight",), ("bias",)])
def test_linear_layer_adapts_in_part(parameters: tuple[str, ...]) -> None:
    head, (rule, optimizer), data = HEADS["linear"]().double(), RULES["momentum"], case()
    expected = data.oracle(head, optimizer=optimizer, steps=3, prior=0.1, adapts=parameters.__contains__)
    adaptation = LocalAdaptation(rule, steps=3, prior=0.1, parameters=parameters)
    model = MbPA(head, data.memory, neighbors=data.neighbors, adaptation=adaptation)
    assert isinstance(model._adapter, Factored)
    close(model(data.queries), expected.log_softmax(-1))


def test_shared_parameter_moves_in_all_its_places() -> None:
    head = nn.Sequential(nn.Linear(KEY, KEY), nn.Tanh(), nn.Linear(KEY, KEY)).double()
    head[2].weight = head[0].weight
    (rule, optimizer), data = RULES["sgd"], case()
    expected = data.oracle(head, optimizer=optimizer, steps=3, adapts=lambda name: name != "0.bias")
    for parameters in (("2",), ("0.weight", "2.bias"), ("2.weight", "2.bias")):
        close(general(head, rule, 3, parameters=parameters)(data.queries, data.context), expected)


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_general_does_not_depend_on_chunks(size: int | None) -> None:
    head, data = HEADS["layer norm"]().double(), case()
    whole = general(head, rules.adam(0.1), 3, chunk_size=QUERIES)(data.queries, data.context)
    close(general(head, rules.adam(0.1), 3, chunk_size=size)(data.queries, data.context), whole)


# Factored = General


class Drawn(NamedTuple):
    head: nn.Sequential
    parameters: tuple[str, ...] | None
    key_size: int


IN_PLACE = [c for c in ELEMENTWISE if "inplace" in c.__init__.__annotations__]


def functions() -> st.SearchStrategy[nn.Module]:
    plain = st.sampled_from(ELEMENTWISE).map(lambda c: c())
    in_place = st.sampled_from(IN_PLACE).map(lambda c: c(inplace=True))
    settings = st.sampled_from([nn.GELU("tanh"), nn.LeakyReLU(0.3), nn.Softplus(2.0, 1.0), nn.Hardtanh(-0.2, 0.5)])
    return st.one_of(plain, in_place, settings, st.sampled_from([nn.Identity(), nn.Dropout(0.5), nn.AlphaDropout(0.5)]))


@st.composite
def prefixes(draw, size: int) -> tuple[list[nn.Module], int]:
    """Frozen modules before the first layer that adapts, and how many numbers they put out."""
    kind = draw(st.sampled_from(["none", "norm", "functions", "linear", "convolution", "nested"]))
    if kind == "norm":
        return [nn.LayerNorm(size)], size
    if kind == "functions":
        return [nn.LeakyReLU(0.3, inplace=True), nn.Dropout(0.5)], size
    if kind == "linear":
        return [nn.Linear(size, 6), batch_norm(), nn.ReLU(inplace=True)], 6
    if kind == "convolution":
        return [nn.Unflatten(-1, (1, size)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten()], 2 * size
    if kind == "nested":
        return [nn.Sequential(nn.Linear(size, 3), nn.Sequential(nn.Tanh()), nn.PReLU())], 3
    return [], size


@st.composite
def heads(draw) -> Drawn:
    sizes = st.integers(1, 5)
    key_size = draw(sizes)
    modules, width = draw(prefixes(key_size))
    start, frozen = len(modules), bool([p for m in modules for p in m.parameters()])
    shared = draw(functions())
    linears = []
    for _ in range(draw(st.integers(1, 4))):
        following = draw(sizes)
        linears.append(len(modules))
        modules.append(nn.Linear(width, following, bias=draw(st.booleans())))
        modules += [shared] if draw(st.booleans()) else draw(st.lists(functions(), max_size=2))
        width = following
    names = [f"{i}.{n}" for i in linears for n, _ in modules[i].named_parameters()]
    if draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        return Drawn(nn.Sequential(*modules), tuple(chosen), key_size)
    if draw(st.booleans()):  # the adapting part in a Sequential of its own, by whose name it is chosen
        modules = [*modules[:start], nn.Sequential(*modules[start:])]
        return Drawn(nn.Sequential(*modules), (str(start),), key_size)
    return Drawn(nn.Sequential(*modules), tuple(names) if frozen else None, key_size)


def both(
    drawn: Drawn,
    likelihood: Likelihood,
    rule: rules.sgd,
    steps: int,
    prior: float,
    queries: Tensor,
    context: Context,
    chunks: tuple[int | None, ...] = (None, 1, 3),
    tolerance: float = 1e-10,
) -> None:
    """Compares the two engines; the general one, like training, does not stand two functions in place in a row."""
    plain = copy.deepcopy(drawn.head)
    for module in plain.modules():
        if isinstance(module, tuple(IN_PLACE)):
            module.inplace = False
    settings = {"likelihood": likelihood, "prior": prior, "parameters": drawn.parameters}
    with torch.no_grad():
        expected = general(plain, rule, steps, **settings)(queries.clone(), context)
    for size in chunks:
        adaptation = LocalAdaptation(rule, steps=steps, prior=prior, parameters=drawn.parameters, chunk_size=size)
        engine = adaptation.bind(Head(drawn.head), likelihood)
        assert isinstance(engine, Factored)
        with torch.no_grad():
            torch.testing.assert_close(engine(queries.clone(), context), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=80)
@given(
    drawn=heads(),
    regression=st.booleans(),
    momentum=st.sampled_from([0.0, 0.0, 0.6]),
    steps=st.integers(1, 4),
    prior=st.sampled_from([0.0, 0.0, 0.3]),
    neighbors=st.integers(1, 6),
    queries=st.integers(1, 4),
    narrow=st.sampled_from([0, 64]),
    single=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_factored_is_general(
    drawn, regression, momentum, steps, prior, neighbors, queries, narrow, single, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn.head.double()
    for parameter in drawn.head.parameters():
        nn.init.uniform_(parameter, -1.0, 1.0, generator=generator)
    rows = torch.randn(queries, drawn.key_size, generator=generator, dtype=DOUBLE)
    with torch.no_grad():
        outputs = copy.deepcopy(drawn.head).eval()(rows.clone()).shape[1]
    shape, dtype = ((outputs,), DOUBLE) if regression else ((), torch.long)
    memory = EpisodicMemory(8, drawn.key_size, value_shape=shape, value_dtype=dtype, key_dtype=DOUBLE)
    keys = torch.randn(6, drawn.key_size, generator=generator, dtype=DOUBLE)
    keys[-1] = keys[0]  # a duplicate
    labels = torch.randint(outputs, (6,), generator=generator)
    memory.write(keys, torch.randn(6, outputs, generator=generator, dtype=DOUBLE) if regression else labels)
    likelihood = Gaussian(variance=2.0) if regression else LABELS
    rule = rules.sgd(0.2, momentum=momentum)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factored, "_NARROW", narrow)
        both(drawn, likelihood, rule, steps, prior, rows, memory.read(rows, neighbors))
        if single:
            drawn.head.float()
            context = memory.float().read(rows.float(), neighbors)
            both(drawn, likelihood, rule, steps, prior, rows.float(), context, tolerance=1e-3)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("function", ELEMENTWISE, ids=lambda c: c.__name__)
def test_slope_of_each_function(function: type[nn.Module], in_place: bool) -> None:
    if in_place and function not in IN_PLACE:
        pytest.skip("has no in-place form")
    twice = function(inplace=True) if in_place else function()
    head = nn.Sequential(nn.Linear(KEY, 6), twice, nn.Linear(6, 5), twice, twice, nn.Linear(5, CLASSES)).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)  # wide enough to reach the flat parts and the kinks
    data = case()
    both(Drawn(head, None, KEY), LABELS, rules.sgd(0.1), 3, 0.1, data.queries, data.context, (None,))


def test_factored_on_places_that_nothing_fills() -> None:
    data = case()
    context = data.memory.read(data.queries, 4, before=torch.tensor([0, 1, 2, 3, 12]))
    for kind in ("linear", "mlp"):
        both(Drawn(HEADS[kind]().double(), None, KEY), LABELS, rules.sgd(0.3), 3, 0.1, data.queries, context)


def test_no_copy_of_the_first_layer_for_each_query() -> None:
    """40 queries of a layer of 4 MB: copies would take 160 MB and more."""
    head = nn.Linear(1024, 1024)
    memory = EpisodicMemory(8, 1024)
    memory.write(torch.randn(8, 1024), torch.arange(8))
    model = MbPA(head, memory, neighbors=4, adaptation=LocalAdaptation(rules.sgd(0.1), steps=2))
    queries = torch.randn(40, 1024)
    with torch.profiler.profile(profile_memory=True) as profile:
        model(queries)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**22


# Which engine


def hooked(head: nn.Sequential) -> nn.Sequential:
    head[0].register_forward_hook(lambda module, args, output: 2 * output)
    return head


def pre_hooked(head: nn.Sequential) -> nn.Sequential:
    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return head


def normalized(head: nn.Sequential) -> nn.Sequential:
    nn.utils.parametrizations.orthogonal(head[2])
    return head


class Doubled(nn.Linear):
    def forward(self, keys: Tensor) -> Tensor:
        return 2 * super().forward(keys)


class Reversed(nn.Sequential):
    def forward(self, keys: Tensor) -> Tensor:
        return super().forward(keys.flip(-1))


class Shifted(nn.ReLU):
    def forward(self, keys: Tensor) -> Tensor:
        return super().forward(keys - 0.1)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(KEY, KEY), nn.ReLU(), nn.Linear(KEY, KEY))


def tied() -> nn.Sequential:
    head = mlp()
    head[2].weight = head[0].weight
    return head


def twice() -> nn.Sequential:
    layer = nn.Linear(KEY, KEY)
    return nn.Sequential(layer, nn.ReLU(), layer)


FACTORED = {
    "linear": (lambda: nn.Linear(KEY, KEY), None),
    "mlp": (mlp, None),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(KEY, KEY), nn.Tanh()), nn.Linear(KEY, KEY)), None),
    "last layer": (mlp, ("2",)),
    "first layer": (mlp, ("0",)),
    "behind anything": (lambda: nn.Sequential(Normed(), nn.PReLU(), nn.Linear(CLASSES, KEY)), ("2",)),
    "behind a subclass": (lambda: nn.Sequential(Doubled(KEY, KEY), nn.Linear(KEY, KEY)), ("1",)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(), nn.Linear(KEY, KEY), nn.Dropout()), None),
    "only a bias": (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.Identity()), ("0.bias",)),
}
GENERAL = {
    "hook": (lambda: hooked(mlp()), None),
    "pre-hook": (lambda: pre_hooked(mlp()), None),
    "parametrization": (lambda: normalized(mlp()), None),
    "subclass of Linear": (lambda: nn.Sequential(Doubled(KEY, KEY), nn.ReLU(), nn.Linear(KEY, KEY)), None),
    "subclass of Sequential": (lambda: Reversed(nn.Linear(KEY, KEY)), None),
    "subclass of a function": (lambda: nn.Sequential(nn.Linear(KEY, KEY), Shifted(), nn.Linear(KEY, KEY)), None),
    "tied weights": (tied, None),
    "layer used twice": (twice, None),
    "LayerNorm adapts": (lambda: nn.Sequential(nn.LayerNorm(KEY), nn.Linear(KEY, KEY)), None),
    "LayerNorm behind": (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.LayerNorm(KEY)), ("0",)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.PReLU(), nn.Linear(KEY, KEY)), None),
    "softmax": (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.LogSoftmax(-1)), None),
    "own module": (Normed, None),
    "softmax between": (lambda: nn.Sequential(nn.Linear(KEY, KEY), nn.Softmax(-1), nn.Linear(KEY, KEY)), None),
}


@pytest.mark.parametrize("kind", [*FACTORED, *GENERAL])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over what makes a matrix orthogonal
def test_choice_of_the_engine(kind: str) -> None:
    make, parameters = {**FACTORED, **GENERAL}[kind]
    head, data = make().double(), case()
    model = MbPA(
        head, data.memory, neighbors=4, adaptation=LocalAdaptation(rules.sgd(0.3), steps=2, parameters=parameters)
    )
    assert type(model._adapter) is (Factored if kind in FACTORED else General)
    adapts = Head(head).select(parameters).__contains__
    expected = data.oracle(head, steps=2, adapts=adapts, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.3))
    close(model(data.queries), expected.log_softmax(-1))


@pytest.mark.parametrize("rule", [rules.rmsprop(0.1), rules.adam(0.1)])
def test_elementwise_rules_take_the_dense_engine_for_linear_heads(rule: rules.Rule) -> None:
    linear = nn.Linear(KEY, CLASSES)
    for head, engine in ((linear, Dense), (nn.Sequential(nn.Linear(KEY, KEY), linear), General)):
        assert type(LocalAdaptation(rule, steps=2).bind(Head(head), LABELS)) is engine


def test_float16_takes_the_general_engine() -> None:
    """Where products of ordinary keys overflow."""
    head = nn.Linear(512, CLASSES).half()
    assert type(LocalAdaptation(rules.sgd(1e-5), steps=1).bind(Head(head), LABELS)) is General


def test_many_steps_in_bfloat16_do_not_drift() -> None:
    data = case()
    head = nn.Linear(KEY, CLASSES)
    exact = LocalAdaptation(rules.sgd(0.3, momentum=0.9), steps=200).bind(Head(copy.deepcopy(head).double()), LABELS)
    adapter = LocalAdaptation(rules.sgd(0.3, momentum=0.9), steps=200).bind(Head(head.bfloat16()), LABELS)
    half = data.context._replace(keys=data.context.keys.bfloat16(), weights=data.context.weights.bfloat16())
    with torch.no_grad():
        expected = exact(data.queries, data.context).softmax(-1)
        outputs = adapter(data.queries.bfloat16(), half)
    assert float((outputs.double().softmax(-1) - expected).abs().max()) < 0.1


class Linearly(Gaussian):
    """A likelihood of one's own whose gradient is no new tensor: log p = v . o."""

    def log_prob(self, outputs: Tensor, values: Tensor) -> Tensor:
        return (values * outputs).sum(-1)

    def gradient(self, outputs: Tensor, values: Tensor) -> Tensor:
        return values


@pytest.mark.parametrize("rule", [rules.sgd(0.3), rules.rmsprop(0.1, epsilon=1e-4)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_gradient_belongs_to_its_likelihood(rule: rules.Rule, steps: int) -> None:
    head = nn.Linear(KEY, CLASSES).double()
    memory = EpisodicMemory(8, KEY, value_shape=(CLASSES,), value_dtype=DOUBLE, key_dtype=DOUBLE)
    memory.write(torch.randn(8, KEY, dtype=DOUBLE), torch.randn(8, CLASSES, dtype=DOUBLE))
    queries = torch.randn(3, KEY, dtype=DOUBLE)
    context = memory.read(queries, 4)
    expected = general(head, rule, steps, likelihood=Linearly())(queries, context)
    with torch.no_grad():
        outputs = LocalAdaptation(rule, steps=steps).bind(Head(head), Linearly())(queries, context)
    close(outputs, expected)
    assert torch.equal(context.values, memory.read(queries, 4).values)


def test_subclass_of_sgd_takes_the_general_engine() -> None:
    class Doubling(rules.sgd):
        def update(self, grads, state, params, loss):
            return {name: -2 * self.rate * grad for name, grad in grads.items()}, state

    adapter = LocalAdaptation(Doubling(0.1), steps=2).bind(Head(nn.Linear(KEY, CLASSES)), LABELS)
    assert isinstance(adapter, General)
