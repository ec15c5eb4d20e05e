"""Laws that hold for every predictor, whatever the head, the rule and the memory."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recollect import (
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
from recollect.adaptation.dense import Dense
from recollect.adaptation.factored import Factored
from recollect.adaptation.general import General

KEY, CLASSES, CAPACITY = 6, 4, 30


def norm_head() -> nn.Sequential:
    """A head with all that behaves differently in training, and with functions in place."""
    head = nn.Sequential(
        nn.LeakyReLU(0.5, inplace=True),
        nn.Linear(KEY, 5),
        nn.BatchNorm1d(5),
        nn.Dropout(0.5),
        nn.ReLU(inplace=True),
        nn.Linear(5, CLASSES),
    )
    head(torch.randn(50, KEY))  # running statistics
    return head


def dropout_head() -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.5), nn.Linear(KEY, 5), nn.SELU(inplace=True), nn.AlphaDropout(0.5), nn.Linear(5, CLASSES)
    )


def mbpa(head: nn.Module, memory: EpisodicMemory, rule: rules.Rule, **settings) -> MbPA:
    adaptation = LocalAdaptation(rule, **{"steps": 3, "prior": 0.1, **settings})
    return MbPA(head, memory, neighbors=5, adaptation=adaptation)


Model = nn.Module
MODELS: dict[str, Callable[[EpisodicMemory], Model]] = {
    "linear": lambda memory: mbpa(nn.Linear(KEY, CLASSES), memory, rules.sgd(0.5)),
    "mlp": lambda memory: mbpa(dropout_head(), memory, rules.sgd(0.2, momentum=0.5)),
    "frozen prefix": lambda memory: mbpa(norm_head(), memory, rules.sgd(0.5), parameters=("5",)),
    "one step": lambda memory: mbpa(nn.Linear(KEY, CLASSES), memory, rules.sgd(0.5), steps=1),
    "kept": lambda memory: mbpa(nn.Linear(KEY, CLASSES), memory, rules.sgd(0.5), steps=1, keep_base=True),
    "kept mlp": lambda memory: mbpa(dropout_head(), memory, rules.sgd(0.2), keep_base=True),
    "dense": lambda memory: mbpa(nn.Linear(KEY, CLASSES), memory, rules.adam(0.05, epsilon=1e-4)),
    "general": lambda memory: mbpa(norm_head(), memory, rules.adam(0.05, epsilon=1e-4)),
    "parametric": lambda memory: Parametric(norm_head()),
    "non-parametric": lambda memory: NonParametric(memory, classes=CLASSES, neighbors=5),
    "cache": lambda memory: neural_cache(memory, classes=CLASSES, flatness=0.5),
    "mixture": lambda memory: Mixture(
        Parametric(dropout_head()),
        mbpa(norm_head(), memory, rules.rmsprop(0.05, epsilon=1e-4)),
        neural_cache(memory, classes=CLASSES),
        weights=(0.2, 0.5, 0.3),
    ),
}
ADAPTING = ["linear", "mlp", "frozen prefix", "one step", "kept", "kept mlp", "dense", "general"]
all_models = pytest.mark.parametrize("kind", MODELS)
adapting_models = pytest.mark.parametrize("kind", ADAPTING)


def remember(count: int, dtype: torch.dtype = torch.float32) -> EpisodicMemory:
    memory = EpisodicMemory(CAPACITY, KEY, key_dtype=dtype)
    memory.write(torch.randn(count, KEY, dtype=dtype), torch.randint(CLASSES, (count,)))
    return memory


def make(kind: str, memory: EpisodicMemory) -> Model:
    return MODELS[kind](memory).to(memory.keys.dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_models_use_the_engines_they_stand_for() -> None:
    engines = [type(make(kind, remember(3))._adapter) for kind in ADAPTING]
    assert engines == [Factored] * 6 + [Dense, General]


# Where MbPA is the head by itself


@adapting_models
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (3000,)])
def test_empty_memory_is_parametric(kind: str, shape: tuple[int, ...]) -> None:
    model, keys = make(kind, remember(0)), torch.randn(*shape, KEY)
    assert torch.equal(model(keys), Parametric(model.head)(keys))
    assert model(keys).shape == (*shape, CLASSES)


@pytest.mark.parametrize("make_head", [lambda: nn.Linear(KEY, CLASSES), dropout_head, norm_head])
@pytest.mark.parametrize("rule", [rules.sgd(0.5), rules.adam(0.1)])
def test_no_steps_are_parametric(make_head: Callable[[], nn.Module], rule: rules.Rule) -> None:
    model, keys = mbpa(make_head(), remember(20), rule, steps=0), torch.randn(9, KEY)
    assert torch.equal(model(keys), Parametric(model.head)(keys))
    torch.testing.assert_close(model.explain(keys[0]).contributions, torch.zeros(5, CLASSES))


@adapting_models
def test_rate_0_is_parametric(kind: str) -> None:
    head, memory, keys = make(kind, remember(0)).head, remember(20), torch.randn(9, KEY)
    for rule in (rules.sgd(0.0), rules.sgd(0.0, momentum=0.9), rules.rmsprop(0.0), rules.adam(0.0)):
        torch.testing.assert_close(mbpa(head, memory, rule)(keys), Parametric(head)(keys))


@adapting_models
def test_what_before_hides_has_no_effect(kind: str) -> None:
    memory = remember(20, torch.float64)
    model, keys = make(kind, memory), torch.randn(9, KEY, dtype=torch.float64)
    close(model(keys, before=0), Parametric(model.head)(keys))
    assert not torch.allclose(model(keys, before=1), Parametric(model.head)(keys), rtol=1e-3)


# Appendix E: a constant fitted to the neighbors is attention


@pytest.mark.parametrize("kernel", [inverse_distance(0.5), gaussian(1.5), dot_product(0.3)], ids=str)
def test_constant_head_becomes_attention(kernel) -> None:
    memory, head = remember(20, torch.float64), nn.Linear(KEY, CLASSES).double()
    nn.init.zeros_(head.weight)
    keys = torch.randn(6, KEY, dtype=torch.float64)
    adaptation = LocalAdaptation(rules.sgd(2.0), steps=3000, parameters=("bias",))
    fitted = MbPA(head, memory, neighbors=15, adaptation=adaptation, kernel=kernel)
    attention = NonParametric(memory, classes=CLASSES, neighbors=15, kernel=kernel)
    torch.testing.assert_close(fitted(keys).exp(), attention(keys).exp(), rtol=0, atol=1e-3)
    reached = attention(keys).exp() > 0.02  # a class that no neighbor has only tends to probability 0
    torch.testing.assert_close(fitted(keys)[reached], attention(keys)[reached], rtol=0, atol=1e-2)


def test_constant_mean_becomes_attention() -> None:
    memory = EpisodicMemory(20, KEY, value_shape=(2,), value_dtype=torch.float64, key_dtype=torch.float64)
    memory.write(torch.randn(20, KEY, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64))
    head, keys = nn.Linear(KEY, 2).double(), torch.randn(6, KEY, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    adaptation = LocalAdaptation(rules.sgd(0.5), steps=60, parameters=("bias",))
    fitted = MbPA(head, memory, neighbors=7, adaptation=adaptation, likelihood=Gaussian())
    close(fitted(keys), NonParametric(memory, neighbors=7, likelihood=Gaussian())(keys))


# The first step starts at theta: the prior has nothing to pull back


@pytest.mark.parametrize("make_head", [lambda: nn.Linear(KEY, CLASSES), dropout_head, norm_head])
@pytest.mark.parametrize("rule", [rules.sgd(0.5), rules.sgd(0.5, momentum=0.9), rules.rmsprop(0.1), rules.adam(0.1)])
def test_prior_has_no_effect_on_one_step(make_head: Callable[[], nn.Module], rule: rules.Rule) -> None:
    head, memory, keys = make_head(), remember(20), torch.randn(9, KEY)
    weak, strong = (mbpa(head, memory, rule, steps=1, prior=prior)(keys) for prior in (0.0, 0.9))
    assert torch.equal(weak, strong)
    weak, strong = (mbpa(head, memory, rule, steps=2, prior=prior)(keys) for prior in (0.0, 0.9))
    assert not torch.allclose(weak, strong)


# Batches


@settings(max_examples=25)
@given(
    kind=st.sampled_from(list(MODELS)),
    count=st.integers(1, 7),
    entries=st.integers(0, CAPACITY + 5),
    limits=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_batch_is_its_rows_one_by_one(kind: str, count: int, entries: int, limits: bool, seed: int) -> None:
    torch.manual_seed(seed)
    memory = remember(entries, torch.float64)
    model, keys = make(kind, memory), torch.randn(count, KEY, dtype=torch.float64)
    keys[-1] = keys[0]
    before = torch.randint(entries + 1, (count,)) if limits else None
    alone = [model(key, before=None if before is None else int(before[row])) for row, key in enumerate(keys)]
    close(model(keys, before=before), torch.stack(alone))


@all_models
def test_leading_dimensions(kind: str) -> None:
    memory = remember(20, torch.float64)
    model, keys = make(kind, memory), torch.randn(2, 3, KEY, dtype=torch.float64)
    flat = model(keys.view(6, KEY))
    close(model(keys), flat.view(2, 3, CLASSES))
    close(model(keys[0, 0]), flat[0])
    close(model(keys.mT.contiguous().mT), flat.view(2, 3, CLASSES))
    assert model(keys[:0]).shape == (0, 3, CLASSES)
    before = torch.tensor([[0, 5, 20], [1, 2, 30]])
    close(model(keys, before=before), model(keys.view(6, KEY), before=before.view(6)).view(2, 3, CLASSES))


@all_models
@pytest.mark.parametrize("bytes_", [1, 4 * 1000])
def test_memory_budget_does_not_change_the_result(kind: str, bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = remember(20, torch.float64)
    model, keys = make(kind, memory), torch.randn(11, KEY, dtype=torch.float64)
    before = torch.tensor([0, 20, 3, 9, 1, 20, 0, 2, 15, 7, 4])
    expected, earlier = model(keys), model(keys, before=before)
    for module in ("predictors", "adaptation.factored", "adaptation.dense", "adaptation.general"):
        monkeypatch.setattr(f"recollect.{module}._BUDGET", bytes_)
    close(model(keys), expected)
    close(model(keys, before=before), earlier)


@all_models
def test_a_block_with_history_is_the_stream_one_by_one(kind: str) -> None:
    keys, labels = torch.randn(2 * CAPACITY, KEY, dtype=torch.float64), torch.randint(CLASSES, (2 * CAPACITY,))
    short, long = (EpisodicMemory(CAPACITY, KEY, key_dtype=torch.float64, history=size) for size in (0, 7))
    torch.manual_seed(1)
    stream = make(kind, short)
    torch.manual_seed(1)
    block = make(kind, long)
    for memory in (short, long):
        memory.write(keys[:-7], labels[:-7])
    expected = []
    for row in range(2 * CAPACITY - 7, 2 * CAPACITY):
        expected.append(stream(keys[row] / 2))
        short.write(keys[row : row + 1], labels[row : row + 1])
    long.write(keys[-7:], labels[-7:])
    times = torch.arange(2 * CAPACITY - 7, 2 * CAPACITY)
    close(block(keys[-7:] / 2, before=times), torch.stack(expected))
    close(block(keys[:5]), stream(keys[:5]))


# A prediction changes nothing, and nothing around it changes the prediction


def state_of(model: Model) -> list[Tensor | bool | None]:
    grads = [parameter.grad for parameter in model.parameters()]
    return [*model.state_dict().values(), *grads, *(module.training for module in model.modules())]


def same(one: Tensor | bool | None, other: Tensor | bool | None) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


@all_models
def test_prediction_changes_nothing(kind: str, rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    model, keys = make(kind, remember(20)), torch.randn(9, KEY, requires_grad=True)
    modules = list(model.modules())
    for module in modules[::2]:
        module.training = False
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    before, given = copy.deepcopy(state_of(model)), keys.detach().clone()
    with rng_untouched():
        output = model(keys)
        model(keys[0], before=10)
        if isinstance(model, MbPA):
            model.explain(keys[0])
    assert all(same(one, other) for one, other in zip(state_of(model), before, strict=True))
    assert torch.equal(keys, given)
    assert keys.grad is None
    assert not output.requires_grad


@all_models
def test_training_mode_does_not_matter(kind: str) -> None:
    model, keys = make(kind, remember(20)), torch.randn(9, KEY)
    assert torch.equal(model.train()(keys), model.eval()(keys))


@all_models
def test_surroundings_do_not_matter(kind: str) -> None:
    model, keys = make(kind, remember(20)), torch.randn(9, KEY)
    expected = model(keys)
    for surroundings in (
        torch.no_grad(),
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        with surroundings:
            output = model(keys.clone())
        assert output.dtype == torch.float32
        assert torch.equal(output, expected)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(keys * 1), expected)
        if isinstance(model, MbPA):
            torch.testing.assert_close(model.explain(keys[0]).after, expected[0])


def test_memory_written_in_inference_mode() -> None:
    with torch.inference_mode():
        memory = remember(20)
        for kind in MODELS:
            model = make(kind, memory)
            assert model(torch.randn(3, KEY)).isfinite().any()


@all_models
def test_prediction_is_deterministic(kind: str) -> None:
    model, keys = make(kind, remember(20)), torch.randn(9, KEY)
    assert torch.equal(model(keys), model(keys))


# Sharing and copying


@all_models
def test_deepcopy_predicts_the_same_and_is_independent(kind: str) -> None:
    model, keys = make(kind, remember(20)), torch.randn(9, KEY)
    expected, twin = model(keys), copy.deepcopy(model)
    assert torch.equal(twin(keys), expected)
    for module in twin.modules():
        if isinstance(module, EpisodicMemory):
            module.write(keys, torch.randint(CLASSES, (9,)))
    assert len(list(twin.parameters())) == 0 or not torch.equal(perturbed(twin)(keys), expected)
    assert torch.equal(model(keys), expected)


def perturbed(model: Model) -> Model:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@adapting_models
def test_predictions_follow_the_head(kind: str) -> None:
    """Training after wrapping, loading, and new parameters in the place of old ones."""
    memory, keys = remember(20), torch.randn(9, KEY)
    model = make(kind, memory)

    def made_now() -> Tensor:
        """What a model predicts that was made around this head just now."""
        fresh = make(kind, memory)
        fresh.head.load_state_dict(model.head.state_dict())
        return copy.deepcopy(fresh)(keys)

    stale = model(keys)
    perturbed(model)
    assert torch.equal(model(keys), made_now())
    assert not torch.allclose(model(keys), stale)
    model.load_state_dict(perturbed(copy.deepcopy(model)).state_dict())
    assert torch.equal(model(keys), made_now())
    last = model.head if isinstance(model.head, nn.Linear) else model.head[-1]
    last.weight = nn.Parameter(last.weight.detach() * 2)
    assert torch.equal(model(keys), made_now())


@adapting_models
def test_optimizer_trains_the_wrapped_head(kind: str) -> None:
    model, keys = make(kind, remember(20)), torch.randn(9, KEY)
    stale = model(keys)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.head(torch.randn(8, KEY)).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(keys), stale)


# The past


@all_models
def test_before_is_the_memory_of_that_time(kind: str) -> None:
    memory, earlier = EpisodicMemory(CAPACITY, KEY), EpisodicMemory(CAPACITY, KEY)
    stored, labels = torch.randn(20, KEY), torch.randint(CLASSES, (20,))
    memory.write(stored, labels)
    earlier.write(stored[:12], labels[:12])
    keys = torch.randn(9, KEY)
    torch.manual_seed(1)
    model = make(kind, memory)
    torch.manual_seed(1)
    torch.testing.assert_close(model(keys, before=12), make(kind, earlier)(keys))
    limits = torch.tensor([0, 20, 12, 5, 12, 20, 0, 1, 99])
    one_by_one = torch.stack([model(key, before=int(limit)) for key, limit in zip(keys, limits, strict=True)])
    torch.testing.assert_close(model(keys, before=limits), one_by_one)
    torch.testing.assert_close(model(keys, before=99), model(keys))


# Number formats


@pytest.mark.parametrize("likelihood", ["labels", "means"])
@pytest.mark.parametrize(
    "rule", [rules.sgd(0.5), rules.sgd(0.2, momentum=0.5), rules.adam(0.05, epsilon=1e-3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_head_of_another_dtype(dtype: torch.dtype, rule: rules.Rule, likelihood: str) -> None:
    """A head in low precision predicts nearly the same as in float32; one in float64 beside a float32 memory too."""
    if likelihood == "labels":
        memory, gauss = remember(20), {}
    else:
        memory = EpisodicMemory(20, KEY, value_shape=(CLASSES,), value_dtype=torch.float32)
        memory.write(torch.randn(20, KEY), torch.randn(20, CLASSES))
        gauss = {"likelihood": Gaussian()}
    for head in (nn.Linear(KEY, CLASSES), dropout_head()):
        adaptation = LocalAdaptation(rule, steps=3, prior=0.1)
        exact = MbPA(copy.deepcopy(head), memory, neighbors=5, adaptation=adaptation, **gauss)
        model = MbPA(head.to(dtype), memory, neighbors=5, adaptation=adaptation, **gauss)
        keys = torch.randn(9, KEY)
        output = model(keys)
        wide = torch.promote_types(dtype, torch.float32)  # in which the probabilities sum to one
        assert output.dtype == (wide if likelihood == "labels" else dtype)
        tolerance = {torch.bfloat16: 0.2, torch.float16: 0.05, torch.float64: 1e-4}[dtype]
        if isinstance(rule, rules.adam):  # takes the sign of gradients that low precision rounds
            tolerance *= 4
        torch.testing.assert_close(output.float(), exact(keys), rtol=tolerance, atol=tolerance)
        assert model.explain(keys[0]).contributions.dtype == dtype


def test_mixture_of_dtypes() -> None:
    memory = remember(20)
    low = mbpa(nn.Linear(KEY, CLASSES).bfloat16(), memory, rules.sgd(0.1))
    mixture = Mixture(low, NonParametric(memory, classes=CLASSES, neighbors=None), weights=(0.5, 0.5))
    output = mixture(torch.randn(9, KEY))
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(9), rtol=0, atol=1e-2)
