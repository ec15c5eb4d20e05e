"""What ``load`` returns is what ``save`` got: predictions, sharing, flags, and everything after."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from recollect import (
    EpisodicMemory,
    ExactIndex,
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
from recollect.errors import FormatError, SettingError
from recollect.likelihoods import Gaussian
from recollect.persistence import _LAYERS, load, save


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the waiting for the disk, which takes more time than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


SGD = LocalAdaptation(rules.sgd(0.5), steps=3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, (count,), generator=torch.Generator().manual_seed(seed))


def filled(capacity: int = 40, key_size: int = 6, entries: int = 57, dtype: torch.dtype = torch.float32):
    """Returns a memory that has wrapped around, and forgotten some."""
    memory = EpisodicMemory(capacity, key_size, key_dtype=dtype)
    memory.write((10 * normal(entries, key_size, dtype=torch.float64)).abs().round().to(dtype), labels(entries))
    memory.forget(torch.tensor([3, 17, 18]))
    return memory


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5)).to(dtype)


def regression() -> MbPA:
    memory = EpisodicMemory(30, 6, value_shape=(2,), value_dtype=torch.float32)
    memory.write(normal(40, 6), normal(40, 2, seed=1))
    adaptation = LocalAdaptation(rules.adam(0.1, beta1=0.8), steps=2, prior=0.1)
    return MbPA(nn.Linear(6, 2), memory, neighbors=7, adaptation=adaptation, likelihood=Gaussian(variance=0.5))


def mixture() -> Mixture:
    memory, head = filled(), nn.Linear(6, 5)
    adapted = MbPA(head, memory, neighbors=4, adaptation=SGD, kernel=gaussian(3.0))
    return Mixture(Parametric(head), adapted, neural_cache(memory, classes=5, flatness=0.1), weights=(0.5, 0.3, 0.2))


def convolutional() -> nn.Sequential:
    features = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, padding="same"), nn.BatchNorm2d(3), nn.ReLU()
    )
    features(normal(16, 64))  # moves the running statistics
    pooled = nn.Sequential(features, nn.AdaptiveAvgPool2d((None, 1)), nn.Flatten(), nn.LayerNorm(24))
    memory = EpisodicMemory(20, 24)
    memory.write(pooled(normal(33, 64)), labels(33))
    momentum = LocalAdaptation(rules.sgd(0.1, momentum=0.9), steps=4, prior=0.01, parameters=("4",), chunk_size=3)
    head = nn.Sequential(nn.Linear(24, 6), *mlp())
    return nn.Sequential(pooled, MbPA(head, memory, neighbors=50, adaptation=momentum)).eval()


KINDS = {
    "parametric": lambda: Parametric(mlp()),
    "votes": lambda: NonParametric(filled(), classes=5, neighbors=3, kernel=inverse_distance(0.1)),
    "cache": lambda: neural_cache(filled(), classes=5),
    "linear": lambda: MbPA(nn.Linear(6, 5), filled(), neighbors=4, adaptation=SGD),
    "empty": lambda: MbPA(nn.Linear(6, 5), EpisodicMemory(9, 6), neighbors=4, adaptation=SGD),
    "mlp": lambda: MbPA(mlp(), filled(), neighbors=4, adaptation=SGD, kernel=dot_product(0.2)),
    "rmsprop": lambda: MbPA(mlp(), filled(), neighbors=4, adaptation=LocalAdaptation(rules.rmsprop(0.1), steps=2)),
    "double": lambda: MbPA(mlp(torch.double), filled(dtype=torch.double), neighbors=4, adaptation=SGD),
    "regression": regression,
    "mixture": mixture,
    "nested": lambda: Mixture(mixture(), mixture(), weights=(0.9, 0.1)),
    "convolutional": convolutional,
}


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_predicts_the_same_bit_for_bit(kind, tmp_path):
    model = KINDS[kind]()
    keys = normal(41, 64 if kind == "convolutional" else 6, seed=2, dtype=torch.double if kind == "double" else None)
    random_state = torch.get_rng_state()
    save(model, tmp_path / "a")
    before = contents(tmp_path)
    loaded = load(tmp_path / "a")
    assert contents(tmp_path) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert repr(loaded) == repr(model)
    assert_same_state(loaded, model)
    for batch in (keys, keys[:1]):
        assert torch.equal(loaded(batch), model(batch))
    save(loaded, tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_what_a_memory_says_is_the_same(tmp_path):
    memory = filled()
    save(memory, tmp_path / "memory")
    loaded = load(tmp_path / "memory")
    assert isinstance(loaded, EpisodicMemory)
    for limit in (None, 30):
        one, other = (m.read(normal(9, 6), 5, before=limit) for m in (memory, loaded))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


operations = st.lists(st.tuples(st.sampled_from(["write", "forget", "clear"]), st.integers(0, 9)), max_size=8)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=operations, after=operations)
def test_a_loaded_memory_goes_on_as_the_saved_one_would(before, after, tmp_path):
    def run(memory: EpisodicMemory, history: list[tuple[str, int]]) -> None:
        for number, (operation, count) in enumerate(history):
            if operation == "write":
                memory.write(normal(count, 2, seed=number), labels(count, seed=number))
            elif operation == "forget":
                memory.forget(torch.arange(count % 6))
            elif count == 0:
                memory.clear()

    memory = EpisodicMemory(7, 2)
    run(memory, before)
    save(memory, tmp_path / "memory")
    loaded = load(tmp_path / "memory")
    assert isinstance(loaded, EpisodicMemory)
    for each in (memory, loaded):
        run(each, after)
    assert_same_state(loaded, memory)
    assert torch.equal(loaded.read(normal(5, 2), 3).slots, memory.read(normal(5, 2), 3).slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("values", [torch.long, torch.int8, torch.bool, torch.float16])
def test_every_dtype_is_kept(dtype, values, tmp_path):
    memory = EpisodicMemory(5, 3, key_dtype=dtype, value_shape=(2, 1), value_dtype=values)
    memory.write(torch.arange(21.0).view(7, 3), torch.ones(7, 2, 1, dtype=values))
    save(memory, tmp_path / "memory")
    loaded = load(tmp_path / "memory")
    assert_same_state(loaded, memory)
    assert repr(loaded) == repr(memory)


IMAGE, SEQUENCE, VECTOR = normal(2, 4, 8, 8), normal(2, 4, 8), normal(3, 4)
LAYERS = [
    (nn.Linear(4, 3, bias=False), VECTOR),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular"), SEQUENCE),
    (nn.Conv2d(4, 2, (3, 1), padding="same", bias=False, padding_mode="reflect"), IMAGE),
    (nn.BatchNorm1d(4, eps=0.1, momentum=None), VECTOR),
    (nn.BatchNorm2d(4, affine=False), IMAGE),
    (nn.LayerNorm((4, 8), eps=0.1, bias=False), SEQUENCE),
    (nn.GroupNorm(2, 4, affine=False), IMAGE),
    (nn.Embedding(7, 3, padding_idx=1, max_norm=0.5), torch.tensor([1, 2])),
    (nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), IMAGE),
    (nn.AvgPool2d(3, padding=1, count_include_pad=False, divisor_override=7), IMAGE),
    (nn.AdaptiveAvgPool2d((None, 3)), IMAGE),
    (nn.Flatten(0, 1), IMAGE),
    (nn.Unflatten(1, (2, 2)), VECTOR),
    (nn.LeakyReLU(0.3), VECTOR),
    (nn.GELU(approximate="tanh"), VECTOR),
    (nn.Softplus(beta=2.0, threshold=5.0), VECTOR),
    (nn.Hardtanh(-0.1, 0.2), VECTOR),
    (nn.ELU(alpha=0.3), VECTOR),
    (nn.CELU(alpha=0.3), VECTOR),
    (nn.Dropout(0.3), VECTOR),
]
LAYERS += [(kind(), VECTOR) for kind in _LAYERS if kind not in {type(layer) for layer, _ in LAYERS}]


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda x: type(x).__name__)
def test_every_layer_comes_back_with_all_its_settings(layer, inputs, tmp_path):
    layer.eval()
    save(nn.Sequential(layer), tmp_path / "layer")
    loaded = load(tmp_path / "layer")
    assert {k: v for k, v in vars(loaded[0]).items() if not k.startswith("_")} == {
        k: v for k, v in vars(layer).items() if not k.startswith("_")
    }
    assert torch.equal(loaded(inputs), layer(inputs))


def test_flags_and_names_come_back(tmp_path):
    model = nn.Sequential()
    model.add_module("body", mlp())
    model.add_module("top", nn.Linear(5, 5))
    model.body[0].requires_grad_(False)
    model.body[2].eval()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    for attribute in ("named_parameters", "named_modules"):
        one, other = (dict(getattr(m, attribute)()) for m in (model, loaded))
        assert list(one) == list(other)
        for flag in ("requires_grad",) if attribute == "named_parameters" else ("training",):
            assert [getattr(x, flag) for x in one.values()] == [getattr(x, flag) for x in other.values()]


def test_what_was_shared_is_shared_again(tmp_path):
    save(mixture(), tmp_path / "mixture")
    parametric, adapted, cache = load(tmp_path / "mixture").components
    assert adapted.memory is cache.memory
    assert adapted.head is parametric.head
    adapted.memory.write(normal(1, 6), labels(1))
    assert len(cache.memory) == 38

    embedding, decoder, relu = nn.Embedding(5, 6), nn.Linear(6, 5), nn.ReLU()
    decoder.weight = embedding.weight
    model = nn.Sequential(embedding, relu, decoder, relu)
    save(model, tmp_path / "tied")
    loaded = load(tmp_path / "tied")
    assert loaded[0].weight is loaded[2].weight
    assert loaded[1] is loaded[3]
    assert loaded[0].weight.requires_grad
    assert len(list(loaded.parameters())) == 2


def test_views_of_one_tensor_and_strided_ones_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data.mT
    model[2].weight.data = model[0].weight.data
    save(model, tmp_path / "model")
    assert_same_state(load(tmp_path / "model"), model)


class Net(nn.Module):
    """What a user brings: a network that recollect knows nothing of."""

    def __init__(self, size: int = 6, memory: EpisodicMemory | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, size)
        self.again = self.layer
        self.output = MbPA(nn.Linear(6, 5), memory or EpisodicMemory(40, 6), neighbors=4, adaptation=SGD)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, inputs):
        return self.layer(inputs) * self.scale


def test_a_network_of_ones_own_is_filled_where_it_is_supplied(tmp_path):
    memory = filled()
    net = Net(memory=memory).double().eval()
    net.scale.fill_(3.0)
    model = nn.Sequential(net, MbPA(nn.Linear(6, 5).double(), memory, neighbors=3, adaptation=SGD))
    model[1].head.bias = net.output.head.bias
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"0": (mine := Net())})
    keys = normal(8, 6, dtype=torch.double)
    assert loaded[0] is mine
    assert torch.equal(loaded(keys), model(keys))
    assert torch.equal(mine.output(keys), net.output(keys))
    assert not mine.training
    assert mine.again is mine.layer
    assert mine.output.memory is loaded[1].memory
    assert mine.output.head.bias is loaded[1].head.bias


def test_a_network_of_ones_own_gets_the_memory_that_others_loaded_before_it(tmp_path):
    memory = filled()
    model = nn.Sequential(NonParametric(memory, classes=5, neighbors=1), Net(memory=memory))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"1": Net()})
    assert loaded[1].output.memory is loaded[0].memory
    save(Net(memory=memory), tmp_path / "root")
    root = load(tmp_path / "root", modules={"": Net()})
    assert torch.equal(root.output.memory.read(normal(3, 6), 5).slots, memory.read(normal(3, 6), 5).slots)


def test_what_cannot_be_built_is_asked_for_by_its_path(tmp_path):
    save(Mixture(Parametric(Net()), Parametric(mlp()), weights=(0.5, 0.5)), tmp_path / "model")
    with pytest.raises(SettingError, match=r"'components\.0\.head' is a Net.*modules=\{'components\.0\.head': "):
        load(tmp_path / "model")
    with pytest.raises(SettingError, match=r"\['x'\], which need no instance"):
        load(tmp_path / "model", modules={"components.0.head": Net(), "x": Net()})
    with pytest.raises(
        FormatError, match=r"(?s)'components\.0\.head' cannot be restored.*size mismatch for layer\.weight"
    ):
        load(tmp_path / "model", modules={"components.0.head": Net(size=7)})
    with pytest.raises(FormatError, match=r"(?s)Unexpected key.*scale"):
        load(tmp_path / "model", modules={"components.0.head": nn.Identity()})


@pytest.mark.usefixtures("untyped")
def test_only_modules_are_saved_and_filled(tmp_path):
    with pytest.raises(SettingError, match="save takes a module"):
        save(inverse_distance(), tmp_path / "model")
    save(Net(), tmp_path / "model")
    with pytest.raises(SettingError, match=r"modules\[''\] must be a module, got <class"):
        load(tmp_path / "model", modules={"": Net})


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, inputs, outputs: outputs * 2)
    return layer


def resized() -> nn.Module:
    layer = nn.Linear(6, 7)
    layer.weight, layer.bias = nn.Parameter(layer.weight[:6]), nn.Parameter(layer.bias[:6])
    return layer


class OtherIndex(ExactIndex):
    pass


class MyMemory(EpisodicMemory):
    pass


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(6, 6))


def extended() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6))
    model.register_buffer("mean", torch.zeros(6))
    return model


@pytest.mark.parametrize("make", [hooked, resized, normed, extended, lambda: nn.Bilinear(2, 2, 2)])
def test_a_layer_that_is_more_than_its_settings_say_is_asked_for(make, tmp_path):
    model = nn.Sequential(make())
    save(model, tmp_path / "model")
    with pytest.raises(SettingError, match="'0' is a"):
        load(tmp_path / "model")
    assert_same_state(load(tmp_path / "model", modules={"0": make()}), model)


@pytest.mark.parametrize("make", [lambda: EpisodicMemory(40, 6, index=OtherIndex()), lambda: MyMemory(40, 6)])
def test_a_memory_with_an_index_of_ones_own_is_asked_for_and_its_index_rebuilt(make, tmp_path):
    memory = make()
    memory.write(normal(50, 6), labels(50))
    save(NonParametric(memory, classes=5, neighbors=3), tmp_path / "model")
    with pytest.raises(SettingError, match="'memory' is a"):
        load(tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"memory": make()})
    assert type(loaded.memory.index) is type(memory.index)
    assert torch.equal(loaded.memory.read(normal(4, 6), 3).distances, memory.read(normal(4, 6), 3).distances)


@dataclass(frozen=True)
class MyKernel:
    scale: float = 1.0

    def log_weights(self, queries, keys, distances):
        return -self.scale * distances


class MyGaussian(Gaussian):
    pass


@dataclass(frozen=True)
class MyRule:
    rate: float

    def init(self, params):
        return None

    def update(self, grads, state, params, loss):
        return {name: -self.rate * g for name, g in grads.items()}, state


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: NonParametric(filled(), classes=5, neighbors=3, kernel=MyKernel()), "kernel"),
        (lambda: Parametric(nn.Linear(6, 5), likelihood=MyGaussian()), "likelihood"),
        (
            lambda: MbPA(mlp(), filled(), neighbors=3, adaptation=LocalAdaptation(MyRule(0.1), steps=1)),
            "adaptation.rule",
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_of_ones_own_are_refused_before_anything_is_written(make, path, tmp_path):
    with pytest.raises(SettingError, match=rf"'0\.{path}.* cannot be saved"):
        save(nn.Sequential(make()), tmp_path / "new" / "model")
    assert list(tmp_path.iterdir()) == []


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"answer": 42}

    def set_extra_state(self, state):
        self.answer = state["answer"]


@pytest.mark.parametrize(
    "make", [lambda: nn.LazyLinear(3), lambda: Stateful(2, 2), lambda: nn.Linear(2, 2, device="meta")]
)
def test_what_is_no_tensor_with_contents_is_refused(make, tmp_path):
    with pytest.raises(SettingError, match=r"'0\.\w+' is a \w+ that cannot be saved"):
        save(nn.Sequential(make()), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
