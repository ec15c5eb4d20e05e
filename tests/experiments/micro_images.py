"""Six classes of made-up images in the place of Tiny-ImageNet, and a scale of Section 4.2 that fits them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.data import ImageClasses, Images
from recollect.experiments.incremental import study
from recollect.experiments.incremental.pretraining import Features, Recipe
from recollect.experiments.incremental.scales import SCALES, Scale, grids
from recollect.experiments.incremental.shots import shots

CLASSES, TRAIN, TEST = 6, 60, 10
NAMES = tuple(f"{name}, {name}us" for name in ("ant", "bee", "cat", "dog", "elk", "fox"))
MICRO = Scale(
    Recipe(widths=(4, 8), blocks=(1, 1), epochs=2, batch=16, rate=0.05, shift=2),
    grids(
        {"sgd": (0.003, 0.1)},
        ((2, 5), (None,)),
        ((4,), (None,), (0.3, 0.7)),
        ((4,), (1e-3, 1e-2), (2,), (None,)),
        ((4,), (0.1, 1.0), (2,), (None,)),
    ),
    shots((1, 3), ((4,), (0.1, 1.0), (2,)), ((1e-2,), (1, 3)), ((1, 3), (None,))),
    splits=3,
    marks=(0.5, 1.0),
    points=(0.0, 0.5, 1.0, 1.5),
    long_points=(0.5, 2.0),
    sweep=(0.5, 1.0),
    every=2,
    capacities=(50, 200),
    rates=(1.0, 10.0),
    neighbors=(2, 6),
)


def images(count: int, seed: int) -> Images:
    """Returns images of 32 x 32 pixels, those of a class near a color of its own."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(count)
    colors = torch.randint(150, (CLASSES, 1, 1, 3), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(100, (CLASSES * count, 32, 32, 3), generator=g)
    return Images((colors[labels] + noise).to(torch.uint8), labels)


def data() -> ImageClasses:
    """Returns training images, test images and names."""
    return ImageClasses(images(TRAIN, 0), images(TEST, 1), NAMES)


def use(patch: pytest.MonkeyPatch, cache: Path, scale: Scale = MICRO) -> None:
    """Puts the images in the place of Tiny-ImageNet, and scales that fit them in the place of the real ones."""

    def read(*, watch: Callable[[float], None]) -> ImageClasses:
        watch(1.0)
        return data()

    patch.setenv("RECOLLECT_CACHE", str(cache))
    patch.setattr(study, "tiny_imagenet", read)
    patch.setitem(SCALES, "smoke", scale)
    patch.setitem(SCALES, "small", replace(scale, splits=4))


def untrained(images: ImageClasses, recipe: Any, *, seed: int, device: str) -> Features:
    """Stands for ``features``: the mean colors and some noise, and a head that knows nothing."""
    g = torch.Generator().manual_seed(seed)

    def look(pixels: Tensor) -> Tensor:
        colors = pixels.float().mean((1, 2)) / 50
        return torch.cat([colors, torch.randn(len(pixels), 2, generator=g)], 1)

    weight, bias = torch.randn(CLASSES, 5, generator=g) / 10, torch.randn(CLASSES, generator=g) / 10
    return Features(look(images.train.pixels), look(images.test.pixels), weight, bias)
