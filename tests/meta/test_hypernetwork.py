"""Generated kernels: held to loops over tiles and channels, to the published counts, and to a plain network."""

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from recollect import load, save
from recollect.errors import DtypeError, SettingError
from recollect.meta.hypernetwork import Hypernetwork

Untouched = Callable[[], AbstractContextManager[None]]
SIZE, BASIC = 3, (2, 3)
IMAGES = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    """Layer 'a' has 2 x 2 tiles (inputs x outputs) of 2 x 3 channels, 'deep.b' has 3 x 1."""
    deep = nn.Sequential()
    deep.add_module("b", nn.Conv2d(6, 3, SIZE, stride=2, dtype=torch.float64))
    net = nn.Sequential()
    net.add_module("a", nn.Conv2d(4, 6, SIZE, padding=1, bias=False, dtype=torch.float64))
    net.add_module("norm", nn.BatchNorm2d(6, dtype=torch.float64))
    net.add_module("deep", deep)
    return net


def randomize(model: Hypernetwork) -> Hypernetwork:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=seeded(parameter.numel()))
    return model


def wrapped(net: nn.Module | None = None) -> Hypernetwork:
    """With parameters of size one: from the small initial values, every kernel is nearly zero."""
    net = network() if net is None else net
    return randomize(Hypernetwork(net, layers=("a", "deep.b"), embedding=2, basic=BASIC, generator=seeded()))


def kernel(model: Hypernetwork, first: int, rows: int, columns: int) -> Tensor:
    """Eq. (2) and (3), one number at a time; the embeddings of the layer begin with ``first``."""
    inputs, outputs = BASIC
    width = model.embeddings.shape[1]
    w = model.inner.weight.reshape(inputs, width, width).tolist()
    b = model.inner.bias.reshape(inputs, width).tolist()
    w_out = model.outer.weight.reshape(outputs, SIZE, SIZE, width).tolist()
    b_out = model.outer.bias.reshape(outputs, SIZE, SIZE).tolist()
    result = torch.zeros(columns * outputs, rows * inputs, SIZE, SIZE, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            z = model.embeddings[first + row * columns + column].tolist()
            for i in range(inputs):
                a = [sum(w[i][d][n] * z[n] for n in range(width)) + b[i][d] for d in range(width)]
                for o in range(outputs):
                    for y in range(SIZE):
                        for x in range(SIZE):
                            value = sum(w_out[o][y][x][d] * a[d] for d in range(width)) + b_out[o][y][x]
                            result[column * outputs + o, row * inputs + i, y, x] = value
    return result


def test_kernels_are_the_written_out_formula_tile_by_tile() -> None:
    model = wrapped()
    kernels = model.kernels()
    assert list(kernels) == ["a", "deep.b"]
    assert len(model.embeddings) == 2 * 2 + 3 * 1
    expected = {"a": kernel(model, 0, 2, 2), "deep.b": kernel(model, 4, 3, 1)}
    torch.testing.assert_close(kernels, expected, rtol=1e-12, atol=1e-12)
    assert expected["a"].abs().min() > 1e-3, "a tile out of place would show"


def test_outputs_are_those_of_the_network_with_these_kernels() -> None:
    plain = network()
    model = wrapped(copy.deepcopy(plain))
    for name, weight in model.kernels().items():
        plain.get_submodule(name).get_parameter("weight").data.copy_(weight)
    for name, value in model.net.named_parameters():
        plain.get_parameter(name).data.copy_(value)
    for train in (True, False):
        torch.testing.assert_close(model.train(train)(IMAGES), plain.train(train)(IMAGES), rtol=1e-12, atol=1e-12)
    statistics = model.net.get_submodule("norm").state_dict()
    torch.testing.assert_close(statistics, plain.get_submodule("norm").state_dict())
    assert int(statistics["num_batches_tracked"]) == 1


def generating(model: Hypernetwork) -> int:
    own = sum(p.numel() for p in model.parameters())
    return own - sum(p.numel() for p in model.net.parameters())


def test_published_count_for_mnist() -> None:
    net = nn.Sequential(nn.Conv2d(1, 16, 7), nn.Conv2d(16, 16, 7))
    assert net[1].weight.numel() == 12_544
    model = Hypernetwork(net, layers=("1",), embedding=4, generator=seeded())
    assert generating(model) == 4_240 + 4


def test_published_count_for_wide_residual_networks() -> None:
    widths = [16] * 13 + [32] * 12 + [64] * 12
    layers = [nn.Conv2d(i, o, 3, bias=False) for i, o in itertools.pairwise(widths)]
    assert len(layers) == 36
    names = tuple(str(number) for number in range(36))
    model = Hypernetwork(nn.Sequential(*layers), layers=names, embedding=64, generator=seeded())
    assert len(model.embeddings) == 242
    assert generating(model) == sum(p.numel() for p in model.parameters()) == 75_920 + 242 * 64
    shapes = {name: tuple(weight.shape) for name, weight in model.kernels().items()}
    assert (shapes["0"], shapes["12"], shapes["35"]) == ((16, 16, 3, 3), (32, 16, 3, 3), (64, 64, 3, 3))


def test_no_weight_is_left_behind() -> None:
    model = wrapped()
    kept = {"net.norm.weight", "net.norm.bias", "net.deep.b.bias"}
    own = {"embeddings", "inner.weight", "inner.bias", "outer.weight", "outer.bias"}
    assert {name for name, _ in model.named_parameters()} == kept | own
    statistics = {f"net.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(model.state_dict()) == kept | own | statistics
    model(IMAGES)
    assert set(model.state_dict()) == kept | own | statistics, "nor after a call"


def test_gradients() -> None:
    model = wrapped().eval()
    parameters = dict(model.named_parameters())

    def outputs(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(parameters, values, strict=True)), (IMAGES[:1, :, :4, :4],))

    assert torch.autograd.gradcheck(outputs, tuple(parameters.values()), fast_mode=True)


def test_it_learns() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 1))
    model = Hypernetwork(net, layers=("2",), embedding=3, basic=(2, 2), generator=seeded())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = torch.randn(64, 1, 8, 8, generator=seeded(1))
    y = x[:, 0, 2:6, 2:6].amax((1, 2)).unsqueeze(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_initial_values_are_those_of_the_notebook(rng_untouched: Untouched) -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 5))
    with rng_untouched():
        model = Hypernetwork(net, layers=("0",), embedding=64, generator=seeded())
    for weight in (model.inner.weight.detach(), model.outer.weight.detach()):
        assert 0.019 < float(weight.abs().max()) <= 0.02
        assert abs(float(weight.std()) - 0.0088) < 2e-4, "a normal distribution cut off at two deviations"
    assert not model.inner.bias.any()
    assert not model.outer.bias.any()
    assert 1.7 < float(model.embeddings.detach().abs().max()) <= 2.01
    assert abs(float(model.embeddings.detach().std()) - 0.88) < 0.05


def test_the_generator_decides_the_initial_values() -> None:
    one, same, other = (
        Hypernetwork(network(), layers=("a",), embedding=2, basic=BASIC, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    for name in ("embeddings", "inner.weight", "outer.weight"):
        assert torch.equal(one.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert one.embeddings.dtype == one.inner.weight.dtype == torch.float64, "as the network's"


def test_a_copy_is_independent() -> None:
    model = wrapped().eval()
    expected = model(IMAGES)
    twin = copy.deepcopy(model)
    randomize(model).embeddings.data.zero_()
    assert torch.equal(twin(IMAGES), expected)
    assert not torch.equal(model(IMAGES), expected)


def test_state_dict_restores_it() -> None:
    model = wrapped().eval()
    other = Hypernetwork(network(), layers=("a", "deep.b"), embedding=2, basic=BASIC, generator=seeded(9)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), model(IMAGES))


def test_saving_and_loading(tmp_path: Path) -> None:
    model = wrapped().eval()
    save(model, tmp_path / "model")
    fresh = Hypernetwork(network(), layers=("a", "deep.b"), embedding=2, basic=BASIC, generator=seeded(9))
    loaded = load(tmp_path / "model", modules={"": fresh})
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_it_follows_to_another_dtype() -> None:
    model = wrapped().eval()
    expected = model(IMAGES)
    outputs = model.float()(IMAGES.float())
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients(mode: type[torch.no_grad]) -> None:
    model = wrapped().eval()
    expected = model(IMAGES)
    with mode():
        assert torch.equal(model(IMAGES), expected)


def test_one_layer_can_be_the_whole_network() -> None:
    model = Hypernetwork(nn.Conv2d(4, 6, 3), layers=("",), embedding=2, basic=BASIC, generator=seeded())
    expected = nn.functional.conv2d(IMAGES.float(), model.kernels()[""], model.net.get_parameter("bias"))
    torch.testing.assert_close(model(IMAGES.float()), expected)


def test_networks_of_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, dtype=torch.float64)

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(left), self.conv(right)

    model = randomize(Hypernetwork(Sum(), layers=("conv",), embedding=2, basic=BASIC, generator=seeded()))
    left, right = model(IMAGES, 2 * IMAGES)
    kernels, bias = model.kernels()["conv"], model.net.get_parameter("conv.bias")
    torch.testing.assert_close(left, nn.functional.conv2d(IMAGES, kernels, bias))
    torch.testing.assert_close(right, nn.functional.conv2d(2 * IMAGES, kernels, bias))


class Named(nn.Module):
    """Takes an input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, image: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.conv(image) * scale


def test_inputs_by_name() -> None:
    model = randomize(Hypernetwork(Named(), layers=("conv",), embedding=2, basic=BASIC, generator=seeded()))
    image = IMAGES.float()
    expected = nn.functional.conv2d(image, model.kernels()["conv"], model.net.get_parameter("conv.bias"))
    torch.testing.assert_close(model(image, scale=3.0), 3 * expected)
    torch.testing.assert_close(model(image=image), expected)


def test_inputs_of_another_dtype() -> None:
    model = Hypernetwork(Named(), layers=("conv",), embedding=2, basic=BASIC, generator=seeded())
    for call in (lambda: model(IMAGES), lambda: model(image=IMAGES)):
        with pytest.raises(DtypeError, match=r"of torch\.float64, where the generated kernels are torch\.float32"):
            call()
    with pytest.raises(RuntimeError, match="channels"):  # its own, as it is about no dtype
        model(IMAGES.float()[:, :2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(IMAGES.bfloat16()).isfinite().all()


def refused(
    message: str, net: nn.Module, layers: object = ("0",), basic: object = (2, 2), embedding: object = 2
) -> None:
    before = [name for name, _ in net.named_parameters()]
    with pytest.raises(SettingError, match=message):
        Hypernetwork(net, layers=layers, embedding=embedding, basic=basic)
    assert [name for name, _ in net.named_parameters()] == before, "an error leaves the network alone"


def test_layers_that_are_not_there(untyped: None) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(2, 2))
    refused("'conv2' is nothing in the network. There are: \\['0'\\]", net, ("0", "conv2"))
    refused("'1' is a Linear", net, ("0", "1"))
    refused(r"such as layers=\('0',\), got '0'", net, "0")
    refused("different names", net, ("0", "0"))
    refused("different names", net, ())
    refused("different names", net, ["0"])


def test_layers_that_cannot_be_tiled(untyped: None) -> None:
    refused(
        r"channels of '0', 4 x 6 \(inputs x outputs\), must be multiples of basic=\(2, 4\)", one(4, 6), basic=(2, 4)
    )
    refused("channels of '0', 8 x 8", one(8, 8), basic=(16, 16))
    refused("'0' has groups=2", one(4, 4, groups=2))
    refused("kernel of '0' must be square, got 3 x 5", nn.Sequential(nn.Conv2d(4, 4, (3, 5))))
    two = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5))
    refused("'0' has 3 x 3, '1' has 5 x 5", two, ("0", "1"))


def test_layers_whose_weight_is_not_their_own() -> None:
    net = one(4, 4)
    Hypernetwork(net, layers=("0",), embedding=2, basic=(2, 2))
    refused("'0' has no weight of its own", net)
    refused("'0' has no weight of its own", nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))))
    shared = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    shared[1].weight = shared[0].weight
    refused("weight of '0' is shared", shared)


def test_lazy_layers() -> None:
    refused(r"weight of '0' has no shape yet\. Run the network once", nn.Sequential(nn.LazyConv2d(4, 3)))


@pytest.mark.parametrize("basic", [16, (16,), [2, 2], (2, 0), (2.0, 2), (True, 2)])
def test_basic_sizes(untyped: None, basic: object) -> None:
    refused("basic", one(4, 4), basic=basic)


@pytest.mark.parametrize("embedding", [0, 2.0, True, None])
def test_embedding_sizes(untyped: None, embedding: object) -> None:
    refused("embedding must be a whole number above 0", one(4, 4), embedding=embedding)


def test_a_class_is_no_network(untyped: None) -> None:
    with pytest.raises(SettingError, match=r"net must be a torch\.nn\.Module"):
        Hypernetwork(nn.Conv2d, layers=("0",), embedding=2)


def one(inputs: int, outputs: int, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, groups=groups))
