"""``Head``: a module as a pure function, and what cannot be one."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Parametric, rules
from recollect.adaptation import Head
from recollect.errors import HeadError, SettingError

KEYS = torch.linspace(-2, 2, 12).view(3, 4)


def batch_norm_head() -> nn.Sequential:
    head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, 2))
    head(torch.randn(20, 4))  # running statistics
    return head


@pytest.mark.parametrize("training", [True, False])
def test_head_is_the_module_in_evaluation_mode(training: bool) -> None:
    module = batch_norm_head().train(training)
    expected = copy.deepcopy(module).eval()(KEYS)
    assert torch.equal(Head(module)({}, KEYS), expected)
    assert module.training is training


def test_parameters_are_replaced_for_one_call() -> None:
    module = nn.Linear(4, 2)
    head, bias = Head(module), torch.tensor([10.0, 20.0])
    assert torch.equal(head({"bias": bias}, KEYS), nn.functional.linear(KEYS, module.weight, bias))
    assert torch.equal(head({}, KEYS), module(KEYS))


def test_head_follows_its_module() -> None:
    module = batch_norm_head().eval()
    head = Head(module)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    assert torch.equal(head({}, KEYS), module(KEYS))
    module[0].weight = nn.Parameter(torch.ones(5, 4))
    assert torch.equal(head({}, KEYS), module(KEYS))
    module.double()
    assert head.dtype() == torch.float64
    assert torch.equal(head({}, KEYS.double()), module(KEYS.double()))


def test_head_holds_no_copy_of_the_tensors() -> None:
    head = Head(batch_norm_head())
    assert all(tensor.is_meta for tensor in (*head._shell.parameters(), *head._shell.buffers()))


def test_keys_survive_a_function_in_place() -> None:
    keys = KEYS.clone()
    Head(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))({}, keys)
    assert torch.equal(keys, KEYS)


def test_parameters_are_live_and_detached() -> None:
    module = nn.Linear(4, 2)
    parameters = Head(module).parameters()
    assert list(parameters) == ["weight", "bias"]
    assert parameters["weight"].data_ptr() == module.weight.data_ptr()
    assert not parameters["weight"].requires_grad


def test_head_made_in_inference_mode_adapts() -> None:
    with torch.inference_mode():
        head = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    memory = EpisodicMemory(10, 4)
    memory.write(torch.randn(10, 4), torch.randint(3, (10,)))
    for rule in (rules.sgd(0.1), rules.adam(0.1)):
        for parameters in (None, ("2",), ("0.bias",)):
            model = MbPA(head, memory, neighbors=3, adaptation=LocalAdaptation(rule, steps=2, parameters=parameters))
            assert not torch.equal(model(KEYS), Parametric(head)(KEYS))


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (None, ("0.weight", "0.bias", "block.inner.weight", "block.inner.bias", "block2.weight")),
        (("block",), ("block.inner.weight", "block.inner.bias")),
        (("block.inner",), ("block.inner.weight", "block.inner.bias")),
        (("block.inner.bias", "0.weight"), ("0.weight", "block.inner.bias")),
        (("block", "block2", "block.inner"), ("block.inner.weight", "block.inner.bias", "block2.weight")),
    ],
)
def test_select(names: tuple[str, ...] | None, selected: tuple[str, ...]) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    module.add_module("block", nn.Sequential())
    module.block.add_module("inner", nn.Linear(4, 4))
    module.add_module("block2", nn.Linear(4, 2, bias=False))
    assert Head(module).select(names) == selected


def test_select_shared_parameter_by_any_of_its_names() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    head = Head(module)
    assert head.select(None) == ("0.weight", "0.bias", "1.bias")
    assert head.select(("1.weight",)) == ("0.weight",)
    assert head.select(("1",)) == ("0.weight", "1.bias")


@pytest.mark.parametrize("name", ["weights", "0.w", "0.weight.", "", "3", "0.weight.extra"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(HeadError, match=re.escape(f"no parameter or submodule {name!r}") + r".*'0\.weight', '0\.bias'"):
        Head(nn.Sequential(nn.Linear(4, 2))).select(("0.bias", name))


def test_head_without_parameters_is_refused() -> None:
    with pytest.raises(HeadError, match=r"Identity.*no parameters.*NonParametric"):
        LocalAdaptation(rules.sgd(0.1), steps=1).bind(Head(nn.Identity()), Parametric(nn.Identity()).likelihood)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(4, 4), cell)

    def forward(self, keys: Tensor) -> Tensor:
        return self.decoder(keys)[0]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN, nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_recurrent_modules_are_refused_by_name(kind: type[nn.Module]) -> None:
    with pytest.raises(HeadError, match=rf"'decoder\.1' is a {kind.__name__}"):
        Head(Recurrent(kind(4, 2)))
    with pytest.raises(HeadError, match=f"the head itself is a {kind.__name__}"):
        Parametric(kind(4, 2))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_batch_statistics_are_refused_by_name(kind: type[nn.Module]) -> None:
    with pytest.raises(HeadError, match=rf"'0\.1' is a {kind.__name__} without running statistics"):
        Head(nn.Sequential(nn.Sequential(nn.Linear(4, 5), kind(5, track_running_stats=False))))


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(2), nn.LazyBatchNorm1d])
def test_lazy_modules_are_refused_by_name(lazy) -> None:
    with pytest.raises(HeadError, match=r"of submodule '1' has no shape yet"):
        Head(nn.Sequential(nn.Linear(4, 4), lazy()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_computed_tensors_as_attributes_are_refused() -> None:
    head = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(HeadError, match=r"parametrizations"):
        Head(head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 1.0}, "steps"),
        ({"prior": 1.0}, "prior"),
        ({"prior": -0.1}, "prior"),
        ({"prior": float("nan")}, "prior"),
        ({"parameters": "weight"}, r"parameters=\('weight',\)"),
        ({"parameters": ()}, "parameters"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": True}, "chunk_size"),
        ({"chunk_size": 1.5}, "chunk_size"),
        ({"rule": "sgd"}, "rule"),
        ({"rule": rules.sgd}, "rule"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LocalAdaptation(**{"rule": rules.sgd(0.1), "steps": 1, **settings})
