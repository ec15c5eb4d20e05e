"""The small networks of the experiments."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.errors import SettingError
from recollect.models import Residual, ResNet, mlp

Untouched = Callable[[], AbstractContextManager[None]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_layers_and_sizes() -> None:
    net = mlp(6, 5, 4, 3, generator=generator())
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert net(torch.zeros(2, 7, 6)).shape == (2, 7, 3)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())


def test_two_sizes_make_one_linear_layer() -> None:
    assert [type(layer) for layer in mlp(6, 3, generator=generator())] == [nn.Linear]


def test_weights_come_from_the_generator_alone(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, same, other = (mlp(6, 5, 3, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_weights_are_uniform_as_those_of_nn_linear() -> None:
    theirs, ours = nn.Linear(400, 300), mlp(400, 300, generator=generator())[0]
    assert isinstance(ours, nn.Linear)
    for a, b in ((theirs.weight, ours.weight), (theirs.bias, ours.bias)):
        assert b.abs().max() <= 400**-0.5
        assert b.abs().max() > 0.95 * 400**-0.5
        assert b.std().item() == pytest.approx(a.std().item(), rel=0.1)


def test_without_a_generator_the_global_random_state_is_used() -> None:
    torch.manual_seed(7)
    one = mlp(6, 3)[0].weight
    torch.manual_seed(7)
    assert torch.equal(one, mlp(6, 3)[0].weight)


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (-1, 2)])
def test_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="input size and an output size"):
        mlp(*sizes)


def test_generator_is_keyword_only() -> None:
    assert inspect.signature(mlp).parameters["generator"].kind is inspect.Parameter.KEYWORD_ONLY


# ResNet ---------------------------------------------------------------------------------------------------------------


def small(seed: int = 0, *, widths: tuple[int, ...] = (4, 6), blocks: tuple[int, ...] = (2, 1)) -> ResNet:
    """Returns a network in float64 whose normalization does something."""
    net = ResNet(5, widths=widths, blocks=blocks, generator=generator(seed)).double()
    g = generator(seed)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                assert isinstance(tensor, Tensor)
                tensor.uniform_(0.5, 1.5, generator=g)
    return net


def by_hand(state: dict[str, Tensor], images: Tensor, blocks: tuple[int, ...], *, training: bool) -> tuple[Tensor, ...]:
    """Returns features and logits, from He et al. (2016): Figures 2 and 3, Table 1, and option B."""
    state = {name: tensor.clone() for name, tensor in state.items()}

    def layer(x: Tensor, name: int | str, place: int, *, stride: int = 1) -> Tensor:
        """A convolution and, behind it, batch normalization."""
        weight = state[f"features.{name}{place}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)
        norm = {kind: state[f"features.{name}{place + 1}.{kind}"] for kind in ("weight", "bias")}
        mean, variance = (state[f"features.{name}{place + 1}.running_{kind}"] for kind in ("mean", "var"))
        return functional.batch_norm(x, mean, variance, norm["weight"], norm["bias"], training, eps=1e-5)

    x = functional.max_pool2d(layer(images, "", 0, stride=2).relu(), 3, stride=2, padding=1)
    number = 4
    for stage, count in enumerate(blocks):
        for block in range(count):
            first = block == 0 and stage > 0
            y = layer(x, f"{number}.body.", 0, stride=2 if first else 1).relu()
            y = layer(y, f"{number}.body.", 3)
            x = (y + (layer(x, f"{number}.shortcut.", 0, stride=2) if first else x)).relu()
            number += 1
    features = x.mean((2, 3))
    return features, features @ state["fc.weight"].T + state["fc.bias"]


def test_resnet_18_has_the_published_number_of_parameters() -> None:
    net = ResNet(1000, blocks=(2, 2, 2, 2), generator=generator())
    assert sum(p.numel() for p in net.parameters()) == 11_689_512
    assert sum(p.numel() for p in ResNet(1000, generator=generator()).parameters()) == 11_689_512
    assert sum(isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1) for part in net.modules()) == 17


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("size", [(32, 32), (21, 34)])
def test_resnet_is_its_formula(training: bool, blocks: tuple[int, int], size: tuple[int, int]) -> None:
    net = small(blocks=blocks).train(training)
    images = torch.randn(3, 3, *size, dtype=torch.float64, generator=generator(1))
    features, logits = by_hand(dict(net.state_dict()), images, blocks, training=training)
    torch.testing.assert_close(net.features(images), features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(images), logits, rtol=1e-10, atol=1e-10)


def test_each_stage_but_the_first_halves_height_and_width() -> None:
    net = ResNet(7, widths=(3, 4, 5, 6), blocks=(1, 2, 1, 1), generator=generator()).eval()
    x, shapes = torch.zeros(2, 3, 64, 96), []
    for part in net.features:
        x = part(x)
        if isinstance(part, Residual | nn.MaxPool2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(3, 16, 24), (3, 16, 24), (4, 8, 12), (4, 8, 12), (5, 4, 6), (6, 2, 3)]
    assert x.shape == (2, 6)
    assert net(torch.zeros(2, 3, 64, 96)).shape == (2, 7)


def test_resnet_takes_images_of_any_size_and_layout() -> None:
    net = small().eval()
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64, generator=generator(1))
    other = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, small().eval()(images))
    assert net(images[:, :, :1, :1]).shape == (2, 5)


def test_shortcuts_are_the_input_where_they_can() -> None:
    assert isinstance(Residual(4, 4).shortcut, nn.Identity)
    assert not isinstance(Residual(4, 4, stride=2).shortcut, nn.Identity)
    assert not isinstance(Residual(4, 6).shortcut, nn.Identity)


def test_weights_of_a_resnet_come_from_the_generator_alone(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, same, other = (
            ResNet(5, widths=(4, 6), blocks=(1, 1), generator=generator(seed)).state_dict() for seed in (1, 1, 2)
        )
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if one[name].dim() > 1] + ["fc.bias"]
    assert len(drawn) == 8
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_a_resnet_without_a_generator_uses_the_global_random_state() -> None:
    torch.manual_seed(7)
    one = ResNet(5, widths=(4,), blocks=(1,)).state_dict()
    torch.manual_seed(7)
    two = ResNet(5, widths=(4,), blocks=(1,)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_of_a_resnet_are_spread_as_published() -> None:
    """He et al. (2015), Eq. (14): by the number of outputs of each filter; normalization begins as the identity."""
    net = ResNet(300, widths=(32, 64), blocks=(1, 1), generator=generator())
    for part in net.features.modules():
        if isinstance(part, nn.Conv2d):
            spread = (2 / (part.out_channels * part.kernel_size[0] ** 2)) ** 0.5
            assert part.weight.std().item() == pytest.approx(spread, rel=0.05)
            assert abs(part.weight.mean().item()) < 0.1 * spread
        if isinstance(part, nn.BatchNorm2d):
            assert part.weight.detach().unique().tolist() == [1]
            assert part.bias.detach().unique().tolist() == [0]
    assert net.fc.weight.std().item() == pytest.approx((64 * 3) ** -0.5, rel=0.05)
    assert net.fc.weight.abs().max() <= 64**-0.5


@pytest.mark.parametrize(
    ("classes", "widths", "blocks"),
    [
        (0, (4, 8), (1, 1)),
        (-1, (4, 8), (1, 1)),
        (5, (4, 8), (1, 1, 1)),
        (5, (4, 8), (1,)),
        (5, (4, 0), (1, 1)),
        (5, (4, 8), (1, 0)),
        (5, (4, 8), (-1, 1)),
        (5, (), ()),
        (5, (), (1,)),
    ],
)
def test_an_impossible_resnet_is_refused(classes: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="numbers above 0 and as many widths as blocks") as caught:
        ResNet(classes, widths=widths, blocks=blocks, generator=generator())
    assert f"classes={classes}, widths={widths}, blocks={blocks}" in str(caught.value)
