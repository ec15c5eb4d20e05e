"""The networks that the experiments use: an MLP (of ``torch.nn`` alone, so ``save`` knows it) and a ResNet."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.errors import SettingError


def mlp(*sizes: int, generator: torch.Generator | None = None) -> nn.Sequential:
    """Returns linear layers of these sizes with ReLU between them.

    Args:
        sizes: Input size, hidden sizes, output size; at least two.
        generator: Draws the initial weights, uniform in ``+-1/sqrt(inputs)`` as ``nn.Linear`` does. With None they
            come from torch's global random state, as ``nn.Linear``'s do.

    Raises:
        SettingError: If there are fewer than two sizes, or one is below 1.

    Example:
        >>> mlp(784, 256, 10)
        Sequential(
          (0): Linear(in_features=784, out_features=256, bias=True)
          (1): ReLU()
          (2): Linear(in_features=256, out_features=10, bias=True)
        )
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise SettingError(f"an MLP needs an input size and an output size, both above 0, got {sizes}.")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """Two convolutions beside a shortcut, then ReLU: the basic block of a residual network.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution; 2 halves height and width.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, 3, stride=stride), nn.ReLU(), *_convolution(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride=stride))

    def forward(self, images: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o y x"]:
        """Returns the block's output, of the same or half the height and width."""
        return torch.relu(self.body(images) + self.shortcut(images))


class ResNet(nn.Module):
    """A residual network in two parts: ``features``, whose output can be the key of a memory, and the layer ``fc``.

    Source: He et al. (2016), "Deep residual learning for image recognition": version 1, basic blocks. *Differs from
    it:* the number of channels and blocks of each stage is free, and a widening shortcut is a 1x1 convolution (their
    option B). ``ResNet(1000, blocks=(2, 2, 2, 2))`` is their ResNet-18.

    Args:
        classes: The number of outputs.
        widths: Channels of each stage; each stage but the first halves height and width.
        blocks: Blocks of each stage.
        generator: Draws the initial weights (He et al., 2015, by the number of outputs of each filter); with None they
            come from torch's global random state.

    Raises:
        SettingError: If a number is below 1, or ``widths`` and ``blocks`` are empty or differ in length.

    Example:
        >>> net = ResNet(200, widths=(8, 16), blocks=(1, 1), generator=torch.Generator().manual_seed(0))
        >>> net.features(torch.zeros(2, 3, 64, 64)).shape, net(torch.zeros(2, 3, 64, 64)).shape
        (torch.Size([2, 16]), torch.Size([2, 200]))
    """

    def __init__(
        self,
        classes: int,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(blocks) or min(classes, *widths, *blocks) < 1:
            raise SettingError(
                "a ResNet needs numbers above 0 and as many widths as blocks, got "
                f"classes={classes}, widths={widths}, blocks={blocks}."
            )
        stem = (*_convolution(3, widths[0], 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        stages = list[nn.Module]()
        for stage, (inputs, outputs, count) in enumerate(zip((widths[0], *widths), widths, blocks, strict=False)):
            stages.append(Residual(inputs, outputs, stride=1 if stage == 0 else 2))
            stages += (Residual(outputs, outputs) for _ in range(count - 1))
        self.features = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(widths[-1], classes, device="meta").to_empty(device="cpu")  # weights are drawn below
        with torch.no_grad():
            for part in self.features.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            for parameter in self.fc.parameters():
                parameter.uniform_(-(widths[-1] ** -0.5), widths[-1] ** -0.5, generator=generator)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Returns the logits of images of any height and width."""
        return self.fc(self.features(images))


def _convolution(inputs: int, outputs: int, size: int, *, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """Returns a convolution that keeps height and width at stride 1, its weights not drawn yet, and batch norm."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return layer, nn.BatchNorm2d(outputs)
